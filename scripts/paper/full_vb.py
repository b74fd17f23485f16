"""Appendix F of the paper: full variational Bayes beside point estimates of the weights, on 1,000 images.

    python scripts/paper/full_vb.py

The paper derives full variational Bayes and shows no experiment. Here the first 1,000 images of MNIST (3
latents, 100 hidden units, as in figure 3) are learned by maximum likelihood, by the paper's maximum a
posteriori, and with a normal q(theta) over all of the decoder's parameters, each from several seeds. Then
log p(x) of some training and test images is estimated by annealing (after 1,000 images the encoder is no
reliable proposal); for full variational Bayes, from the mean probability over --draws draws of theta.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import curves
import reproduction
import tyro
from reproduction import Common, Setting

from pyro_vae.lab import cli, jobs

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.marginal_likelihood import LogMarginal
    from pyro_vae.training import Algorithm

METHODS = {
    "maximum likelihood": {"algorithm": "aevb", "weight_prior": "none"},
    "maximum a posteriori": {"algorithm": "aevb"},
    "full variational Bayes": {"algorithm": "full_vb"},
}
COLUMNS = ("bound", "train_elbo", "test_elbo", "train_log_p", "test_log_p")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Appendix F of the paper: full variational Bayes beside point estimates of the weights."""

    num_train: int = 1000
    """Training images."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (0, 1, 2)
    """Seeds of the initial weights, the minibatches and the noise."""
    step_size: float = 0.1
    """Step size of Adagrad, the same for all, so that neither methods nor seeds differ by it."""
    estimated: int = 200
    """Number of training and of test images, drawn at random, whose log p(x) is estimated."""
    draws: int = 10
    """Draws of theta, for the mean probability of full variational Bayes."""
    num_temperatures: int = 200
    """Temperatures of the annealing."""
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train, estimate, print and draw."""
    arguments = tyro.cli(Arguments)
    data = {"data": "mnist", "latent_dim": 3, "hidden": 100, "num_train": arguments.num_train}
    settings = [
        Setting(**data, step_size=arguments.step_size, seed=seed, **method)
        for seed in arguments.seeds
        for method in METHODS.values()
    ]
    jobs.run_all(functools.partial(make_row, arguments), settings, arguments.common)
    records = load_records(arguments.common, arguments.num_train)
    print(table(records))
    print(f"figure in {draw_figure(records, arguments)}")


def make_row(arguments: Arguments, setting: Setting, common: Common, *, progress: bool) -> str:
    """Train, look at bounds, estimate log p(x)."""
    import torch

    dataset = reproduction.load(setting, common)
    folder = common.runs / "full_vb" / setting.name
    (epochs,) = reproduction.epochs_at(setting, [common.budget])
    algorithm, folder, choice = reproduction.with_best_step_size(
        setting, common, dataset, folder, epochs, progress=progress
    )
    history = reproduction.train(setting, dataset, algorithm, epochs, folder=folder, progress=progress)
    reproduction.require_end(setting, history, epochs, folder)
    row = [history[-1]["train/elbo"]]
    torch.manual_seed(setting.seed)
    some = {}
    for split in ("train", "test"):
        x = getattr(dataset, split).x
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: arguments.estimated]
        some[split] = x[drawn.to(x.device)]
    row += [elbo(arguments, algorithm, x) for x in some.values()]
    for split, x in some.items():
        numbers = epochs, len(x), arguments.draws, arguments.num_temperatures
        path = folder / f"{'_'.join(map(str, (split, *numbers)))}.json"
        result = log_marginal(arguments, algorithm, x, path, progress=progress)
        row.append(result.mean)
    row = [round(number, 3) for number in row]
    curves.save(
        curves.file_of(setting, common, "full_vb"),
        setting,
        **choice,
        samples=epochs * setting.epoch[1],
        seconds=round(history[-1]["seconds"]),
        estimated=arguments.estimated,
        draws=arguments.draws,
        num_temperatures=arguments.num_temperatures,
        columns=list(COLUMNS),
        curve=[row],
    )
    return f"{setting.name}: step size {choice['step_size']}, " + ", ".join(
        f"{name} {number:.1f}" for name, number in zip(COLUMNS, row, strict=True)
    )


def pairs(arguments: Arguments, algorithm: "Algorithm") -> list[Any]:
    """Return ordinary pairs: draws of theta, or the pair that was trained."""
    from pyro_vae.models import BayesianModel, draw

    if not isinstance(algorithm.model, BayesianModel):
        return [(algorithm.model, algorithm.guide)]
    return [draw(algorithm.model, algorithm.guide) for _ in range(arguments.draws)]


def elbo(arguments: Arguments, algorithm: "Algorithm", x: "Tensor") -> float:
    """Bound of these data without the term of theta; a mean over draws of theta."""
    from pyro_vae.marginal_likelihood import elbo

    bounds = [elbo(*pair, x, num_samples=10).elbo.mean().item() for pair in pairs(arguments, algorithm)]
    return statistics.mean(bounds)


def log_marginal(
    arguments: Arguments, algorithm: "Algorithm", x: "Tensor", path: Path, *, progress: bool
) -> "LogMarginal":
    """Estimate log p(x); for full variational Bayes, the log of the mean of p(x) over draws of theta."""
    from pyro_vae.marginal_likelihood import ais, average, load_estimates

    if not path.exists():
        options = {"num_chains": 16, "num_temperatures": arguments.num_temperatures, "num_leapfrog": 2}
        estimates = [ais(model, x, progress=progress, **options) for model, _ in pairs(arguments, algorithm)]
        average(estimates).save(path)
    return load_estimates(path)["ais"]


# ------------------------------------------------------------------------------------------- report


def load_records(common: Common, num_train: int) -> list[dict[str, Any]]:
    """Read the records with so many training images."""
    records = curves.load_all(common, "full_vb")
    return [record for record in records if record["setting"]["num_train"] == num_train]


def groups(records: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, list[float]]]:
    """Numbers of all seeds, by column, for every method with every step size."""
    found = {}
    for method, changed in METHODS.items():
        wanted = {"weight_prior": "data"} | changed
        for step_size in sorted({record["step_size"] for record in records}):
            rows = [
                record["curve"][0]
                for record in records
                if record["step_size"] == step_size
                and all(record["setting"][name] == value for name, value in wanted.items())
            ]
            if rows:
                found[method, step_size] = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Means over seeds, with the standard error of each, as a Markdown table."""
    lines = [
        "| method | step size | seeds | bound, train | ELBO, test "
        "| log p(x), train | log p(x), test | train - test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, step_size), numbers in groups(records).items():
        gaps = [a - b for a, b in zip(numbers["train_log_p"], numbers["test_log_p"], strict=True)]
        columns = [numbers[name] for name in ("bound", "test_elbo", "train_log_p", "test_log_p")]
        cells = [mean_and_error(column) for column in [*columns, gaps]]
        lines.append(f"| {method} | {step_size} | {len(gaps)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_error(numbers: list[float]) -> str:
    """Mean over seeds and its standard error."""
    if len(numbers) < 2:
        return f"{numbers[0]:.2f}"
    return f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers) / len(numbers) ** 0.5:.2f}"


def draw_figure(records: list[dict[str, Any]], arguments: Arguments) -> Path:
    """Draw log p(x) of training and test data, a point for each seed."""
    from matplotlib.figure import Figure

    found = groups(records)
    figure = Figure(figsize=(2 + 1.6 * len(found), 3.6), layout="constrained")
    axes = figure.subplots()
    for place, numbers in enumerate(found.values()):
        for name, colour, label in (("train_log_p", "C0", "train"), ("test_log_p", "C3", "test")):
            values = numbers[name]
            axes.plot([place] * len(values), values, "o", color=colour, label=label if place == 0 else None)
    axes.set_xticks(range(len(found)), [f"{method}\nstep size {step_size}" for method, step_size in found])
    axes.set(ylabel="log p(x) (nats)", title=f"MNIST, {arguments.num_train:,} training images")
    axes.grid(alpha=0.3)
    axes.legend()
    return curves.save_figure(figure, arguments.common, "full_vb")


if __name__ == "__main__":
    cli.run(main)
