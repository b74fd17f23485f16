"""Variance of gradients of one and the same bound, by estimator and draws: why the paper reparameterises.

    python scripts/paper/gradients.py

This measures gradients in phi, the encoder's parameters, on one minibatch of 100 data, drawn again and again:
before, early in and after the training of a VAE of MNIST (--latent-dim 10, 500 hidden units, grey values).

- the score function, log w grad log q(z | x), which the paper's section 2.2 calls impractical;
- the same with a baseline, the mean of log w over the other data of the minibatch;
- estimator A, reparameterised, with the KL term at the draw (Pyro's Trace_ELBO);
- estimator B, reparameterised, with the KL term in closed form (TraceMeanField_ELBO).

All have the same mean. The variance is summed over parameters, in units of the squared length of the mean;
beside it stands the variance due to the choice of minibatch, next to which the paper finds L = 1 draw enough.
"""

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING, Any

import curves
import reproduction
import tyro
from reproduction import Common, Setting

from pyro_vae.files import write_atomically
from pyro_vae.lab import cli
from pyro_vae.lab.config import ConfigError
from pyro_vae.lab.gradients import flat_gradient, moments
from pyro_vae.lab.provenance import provenance
from pyro_vae.progress import counted, progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

ESTIMATORS = {
    "score": "score function",
    "baseline": "score function, baseline",
    "A": "A: reparameterised",
    "B": "B: and KL in closed form",
}
STEP_SIZE = 0.02


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Variance of gradients of one and the same bound: why the paper reparameterises."""

    latent_dim: int = 10
    """Dimensions of z."""
    num_samples: tuple[int, ...] = (1, 2, 5, 10, 50)
    """L, draws of z for every datum."""
    repetitions: int = 200
    """Gradients that every variance is of."""
    seed: int = 0
    """Seed of weights, minibatches and draws."""
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=lambda: Common(budget=1e6))


def main() -> None:
    """Train, stop, measure; draw."""
    arguments = tyro.cli(Arguments)
    if arguments.repetitions < 2 or min(arguments.num_samples) < 1:
        raise ConfigError("repetitions must be at least 2 and num_samples at least 1")
    import pyro
    import torch

    common = arguments.common
    setting = Setting("mnist", arguments.latent_dim, "aevb", 500, step_size=STEP_SIZE, seed=arguments.seed)
    dataset = reproduction.load(setting, common)
    folder = common.runs / "gradients" / setting.name
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    stages = [0, *reproduction.epochs_at(setting, (common.budget / 10, common.budget))]
    for epochs in stages:
        algorithm = reproduction.build(setting, common, dataset, STEP_SIZE)
        if epochs:
            history = reproduction.train(
                setting, dataset, algorithm, epochs, folder=folder / f"{epochs}", progress=True
            )
            seconds += history[-1]["seconds"]
        pyro.set_rng_seed(arguments.seed)
        x = dataset.train.x
        batches = [(x[index],) for index in torch.randperm(len(x))[:5000].split(100)]
        count = len(ESTIMATORS) * len(arguments.num_samples) * arguments.repetitions
        samples, most = epochs * setting.epoch[1], max(arguments.num_samples)
        with progress_bar(count, f"gradients after {samples:,}", "gradient") as bar:
            for name, num_samples in itertools.product(ESTIMATORS, arguments.num_samples):
                draws = (
                    gradient(name, algorithm.model, algorithm.guide, num_samples, *batches[0])
                    for _ in counted(bar, arguments.repetitions)
                )
                rows.append(measured(samples, name, num_samples, draws))
        between = (gradient("B", algorithm.model, algorithm.guide, most, *batch) for batch in batches)
        rows.append(measured(samples, "minibatch", most, between))
    record = {
        "setting": dataclasses.asdict(setting),
        "repetitions": arguments.repetitions,
        "seconds": round(seconds),
        "made_by": provenance(),
        "rows": rows,
    }
    path = common.out / "paper" / "gradients.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json.dumps(record, indent=1).encode(), path)
    print(table(rows))
    print(f"figure in {curves.save_figure(draw(rows), common, 'gradients')}")


def gradient(
    name: str, model: "nn.Module", guide: "nn.Module", num_samples: int, *batch: "Tensor"
) -> "Tensor":
    """Estimate the gradient of the bound's mean over the batch in the guide's parameters once, flat."""
    import torch
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from pyro_vae.traces import local_parameters, log_guide, log_joint
    from pyro_vae.traces.densities import draw_guide

    if name in ("A", "B"):
        elbo = {"A": Trace_ELBO, "B": TraceMeanField_ELBO}[name](
            num_particles=num_samples, vectorize_particles=num_samples > 1, max_plate_nesting=1
        )
        with local_parameters(model, guide):
            bound = -elbo.differentiable_loss(model, guide, *batch) / len(batch[0])
    else:
        with torch.no_grad():
            latents, log_q = draw_guide(guide, *batch, num_samples=num_samples)
            log_w = sum(log_joint(model, latents, *batch)) - log_q
        if name == "baseline":
            mean = log_w.mean(0)
            log_w = log_w - (mean.sum() - mean) / (len(mean) - 1)
        bound = (log_w * log_guide(guide, latents, *batch)).mean()
    return flat_gradient(bound, list(guide.parameters()))


def measured(samples: int, estimator: str, num_samples: int, gradients: Any) -> dict[str, Any]:
    """Record of an estimator at a stage of training, summed over parameters and without bias."""
    mean, variance, count = moments(gradients)
    total = variance.sum().item()
    return {
        "samples": samples,
        "estimator": estimator,
        "L": num_samples,
        "variance": total,
        "squared_mean": mean.square().sum().item() - total / count,
    }


def signal(rows: list[dict[str, Any]], samples: int) -> float:
    """Squared length of the mean gradient at a stage: that of the estimate with the least variance."""
    of_stage = [row for row in rows if row["samples"] == samples and row["estimator"] != "minibatch"]
    return min(of_stage, key=lambda row: row["variance"])["squared_mean"]


def table(rows: list[dict[str, Any]]) -> str:
    """Variances in units of the squared mean, as a Markdown table."""
    draws = sorted({row["L"] for row in rows})
    lines = [
        "| samples | estimator | " + " | ".join(f"L = {number}" for number in draws) + " |",
        "|" + "---|" * (2 + len(draws)),
    ]
    for samples in sorted({row["samples"] for row in rows}):
        unit = signal(rows, samples)
        for name in (*ESTIMATORS, "minibatch"):
            values = {
                row["L"]: row["variance"] / unit
                for row in rows
                if row["samples"] == samples and row["estimator"] == name
            }
            cells = [f"{values[number]:.3g}" if number in values else "" for number in draws]
            label = ESTIMATORS.get(name, "another minibatch")
            lines.append(f"| {samples:,} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> "Figure":
    """Draw the variance against L, one panel for each stage of training."""
    from matplotlib.figure import Figure

    stages = sorted({row["samples"] for row in rows})
    figure = Figure(figsize=(4 * len(stages), 3.6), layout="constrained")
    for axes, samples in zip(figure.subplots(1, len(stages), sharey=True), stages, strict=True):
        unit = signal(rows, samples)
        for name, label in ESTIMATORS.items():
            points = [
                (row["L"], row["variance"] / unit)
                for row in rows
                if row["samples"] == samples and row["estimator"] == name
            ]
            axes.plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
        (between,) = (row for row in rows if row["samples"] == samples and row["estimator"] == "minibatch")
        axes.axhline(between["variance"] / unit, color="0.5", linestyle="--", label="another minibatch")
        axes.set(xscale="log", yscale="log", xlabel="draws L", title=f"after {samples:,} samples")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("variance / squared mean")
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=7, loc="outside right upper")
    return figure


if __name__ == "__main__":
    cli.run(main)
