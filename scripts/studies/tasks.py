"""Compare denoising, inpainting and 4x super-resolution by posterior inference with simpler ways.

    python scripts/studies/tasks.py

A VAE of MNIST (bits) and one of Frey Face (grey values under normals) restore test images; so do the mean of
the training images, the nearest of them, one pass through the VAE (reconstruct and paste), and an autoencoder
that was trained for this very task. They are judged by the signal-to-noise ratio, and by the density of what
was missing. Ends in a report, tasks.md.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import study
import tyro
from study import Common, cell

from pyro_vae.lab import cli
from pyro_vae.lab.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from pyro_vae.lab import Run

NOISE = {"mnist": 0.5, "frey_face": 0.2}  # scale of the noise for denoising
FINE_NOISE = 0.02  # the same for super-resolution
FACTOR = 4
FREY_EPOCHS = 30  # epochs of Frey Face for each of MNIST, which has 31 times as many images
CHAINS = {"num_draws": 100, "num_warmup": 240}
TASKS = ("inpainting", "denoising", "super-resolution")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare denoising, inpainting and 4x super-resolution by posterior inference with simpler ways."""

    num_images: int = 100
    """Test images to restore."""
    num_temperatures: int = 200
    """Temperatures of the annealing that estimates the density of what was missing."""
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train, restore, report."""
    arguments = tyro.cli(Arguments)
    records, drawn = {}, {}
    for name in ("mnist", "frey_face"):
        path = study.record_file(arguments.common, "tasks", name)
        record, drawn[name] = restore_all(name, arguments)
        study.keep(path, **record)
        records[name] = json.loads(path.read_text())
    print(f"report in {report(records, drawn, arguments)}")


def trained_run(name: str, common: Common) -> "Run":
    """Train the VAE of the study of the latent space, or one of Frey Face as in the paper."""
    import latent_space

    if name == "mnist":
        return latent_space.trained(latent_space.Setting("VAE", 20, 0), common, progress=True)
    config = Config(
        data=name,
        data_dir=common.data_dir,
        family="sigmoid_normal",
        min_scale=0.01,
        latent_dim=10,
        hidden=(200,),
        epochs=FREY_EPOCHS * common.epochs,
        device="cpu",
    )
    dataset = study.load(name, common, binarization="none")
    return study.trained(common.runs / "tasks" / name, config, dataset, progress=True)


def trained_autoencoder(
    name: str, task: str, dataset: Any, degrade: "Callable[[Tensor], Tensor]", common: Common
) -> "nn.Module":
    """Train a network from degraded images to means of pixels, through 50 numbers, for one task alone."""
    import torch
    from torch import nn

    from pyro_vae import MLP, batches

    torch.manual_seed(0)
    dim = dataset.data_dim
    size = degrade(dataset.train.x[:1]).shape[1]
    net = nn.Sequential(MLP(size, dim, (500, 50, 500)), nn.Sigmoid())
    distance = nn.functional.binary_cross_entropy if name == "mnist" else nn.functional.mse_loss
    return study.train_network(
        common.runs / "tasks" / f"{name}_{task}_{common.epochs}.pt",
        net,
        batches(dataset.train),
        lambda x: distance(net(degrade(x)), x),
        num_epochs=common.epochs * (FREY_EPOCHS if name == "frey_face" else 1),
    )


def restore_all(name: str, arguments: Arguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the test images; return numbers of every task and way, and images."""
    import pyro
    import torch

    from pyro_vae import log_missing
    from pyro_vae.latents import posterior_mean
    from pyro_vae.tasks import Linear, Mask, annealed, degraded, pooling, restore

    common = arguments.common
    run = trained_run(name, common)
    model, guide, dataset = run.model, run.guide, run.dataset
    pyro.set_rng_seed(0)
    chosen = torch.randperm(len(dataset.test))[: arguments.num_images]
    x, train = dataset.test.x[chosen], dataset.train.x
    is_upper = torch.arange(dataset.data_dim) < dataset.data_dim // 2
    matrix = pooling(dataset.shape, FACTOR)
    noise = NOISE[name]
    degradations = {
        "inpainting": (Mask(), lambda x: torch.where(is_upper, x, math.nan)),
        "denoising": (Linear(None, noise), lambda x: x + noise * torch.randn_like(x)),
        "super-resolution": (
            Linear(matrix, FINE_NOISE),
            lambda x: x @ matrix.T + FINE_NOISE * torch.randn(len(x), len(matrix)),
        ),
    }
    numbers: dict[str, Any] = {}
    images: dict[str, Any] = {}
    annealing = {"num_temperatures": arguments.num_temperatures}
    evidence = annealed(model, guide, x, **annealing)
    for task, (degradation, degrade) in degradations.items():
        pyro.set_rng_seed(1)
        y = degrade(x)
        missing = ~is_upper if task == "inpainting" else torch.ones_like(is_upper)

        def seen(x: torch.Tensor, degrade: Any = degrade) -> torch.Tensor:
            return degrade(x).nan_to_num(0.0)

        found = restore(model, guide, degradation, y, **CHAINS)
        pair = degraded(model, guide, degradation, y)
        network = trained_autoencoder(name, task, dataset, seen, common)
        with torch.no_grad():
            first_guess = (
                degradation.blank(y) if task != "super-resolution" else y @ torch.linalg.pinv(matrix).T
            )
            once = model.likelihood(posterior_mean(guide, first_guess))
            best = model.likelihood(posterior_mean(guide, pair.batch[1]))
            nearest = train[torch.cdist(y.nan_to_num(0.0), seen(train)).argmin(1)]
            predicted = network(y.nan_to_num(0.0))
        ways = {
            "mean image": train.mean(0).expand_as(x),
            "nearest training image": nearest,
            "reconstruct and paste": once.mean,
            "reconstruct and paste, best guess": best.mean,
            "trained autoencoder": predicted,
            "posterior mean": found.mean,
            "one posterior draw": found.samples[0],
        }
        if task == "inpainting":
            ways = {way: torch.where(is_upper, x, image) for way, image in ways.items()}
        psnr = {way: _psnr(image, x, missing) for way, image in ways.items()}
        density: dict[str, list[float]] = {}
        errors: dict[str, list[float]] = {}
        if task == "inpainting":
            right = log_missing(model, guide, x, is_upper, **annealing)
            density["posterior"], errors["posterior"] = right.values.tolist(), right.std_error.tolist()
            density["reconstruct and paste"] = _log_prob(once, x, missing).tolist()
            density["reconstruct and paste, best guess"] = _log_prob(best, x, missing).tolist()
            if name == "mnist":
                for way in ("mean image", "trained autoencoder"):
                    bits = torch.distributions.Bernoulli(ways[way].clamp(1e-4, 1 - 1e-4))
                    of_missing = torch.where(missing, bits.log_prob(x), 0.0)
                    density[way] = of_missing.sum(1).tolist()
        elif name == "frey_face":  # where p(y | z) is exact
            of_y = annealed(pair.model, pair.guide, *pair.batch, **annealing)
            expected = x if degradation.matrix is None else x @ matrix.T
            scale = degradation.noise_scale
            log_noise = torch.distributions.Normal(expected, scale).log_prob(y).sum(1)
            density["posterior"] = (evidence.values + log_noise - of_y.values).tolist()
            errors["posterior"] = torch.hypot(evidence.std_error, of_y.std_error).tolist()
        numbers[task] = {
            "psnr": psnr,
            "log_missing": density,
            "log_missing_error": errors,
            "rhat_above_1.1": (found.rhat > 1.1).double().mean().item(),
            "rms": {
                "error of the posterior mean": _rms((found.mean - x)[:, missing]),
                "standard deviation of the posterior": _rms(found.std[:, missing]),
                "of these, over draws of z": _rms(found.samples.std(0)[:, missing]),
            },
        }
        if task == "inpainting" and name == "mnist":
            labels = dataset.test.labels[chosen]
            numbers[task]["classes"] = _classes(found.samples, is_upper, x, labels, ways, common)
        shown = y if task == "inpainting" else first_guess
        images[task] = {"x": x, "y": shown, "found": found, "ways": ways, "missing": missing}
    return {"tasks": numbers, "num_images": len(x)}, images | {"shape": dataset.shape}


def _psnr(image: "Tensor", x: "Tensor", missing: "Tensor") -> list[float]:
    """Peak signal-to-noise ratio of every image in dB, over what was missing; the peak is 1."""
    error = (image - x)[:, missing].square().mean(1).clamp(min=1e-6)
    return (-10 * error.log10()).tolist()


def _rms(numbers: "Tensor") -> float:
    return numbers.double().square().mean().sqrt().item()


def _log_prob(of_x: Any, x: "Tensor", missing: "Tensor") -> "Tensor":
    import torch

    return torch.where(missing, of_x.base_dist.log_prob(x), 0.0).sum(1)


def _classes(
    samples: "Tensor", is_upper: "Tensor", x: "Tensor", labels: "Tensor", ways: dict, common: Common
) -> dict[str, float]:
    """Count the digits that a classifier sees in the draws of every image."""
    import classifier
    import torch

    judge = classifier.trained(common.runs, study.load("mnist", common, binarization="none"))
    with torch.no_grad():
        seen = judge(torch.where(is_upper, x, samples).flatten(0, 1)).argmax(1).reshape(len(samples), -1)
        pasted = judge(ways["reconstruct and paste, best guess"]).argmax(1)
        itself = judge(x).argmax(1)
    differ = (seen != seen[0]).any(0)
    among = (seen == labels).any(0)

    def share(condition: torch.Tensor, of: torch.Tensor) -> float:
        return condition[of].double().mean().item() if of.any() else math.nan

    return {
        "images whose draws show several digits": differ.double().mean().item(),
        "of these, the true digit is among the draws": share(among, differ),
        "of these, reconstruct and paste shows it (best guess)": share(pasted == labels, differ),
        "of the others, the draws show the true digit": share(seen[0] == labels, ~differ),
        "of the others, reconstruct and paste shows it (best guess)": share(pasted == labels, ~differ),
        "the classifier is right on whole test digits": (itself == labels).double().mean().item(),
    }


# ------------------------------------------------------------------------------------------- report


def report(records: dict[str, Any], drawn: dict[str, Any], arguments: Arguments) -> Path:
    """Write tasks.md and its figures."""
    common = arguments.common
    figures = [
        f"![{task} of {name}]({study.save_figure(figure_of(found, task), common, f'tasks_{name}_{task}')})"
        for name, found in drawn.items()
        for task in TASKS
    ]
    path = common.out / "tasks.md"
    made = records["mnist"]["made_by"]
    classes = records["mnist"]["tasks"]["inpainting"]["classes"]
    path.write_text(
        _TEXT.format(
            command=made["command"],
            machine=made["machine"],
            commit=made["commit"],
            num_images=arguments.num_images,
            temperatures=arguments.num_temperatures,
            noises=f"{NOISE['mnist']} and {NOISE['frey_face']}",
            fine=FINE_NOISE,
            psnr=psnr_table(records),
            density=density_table(records),
            uncertainty=uncertainty_table(records),
            classes=study.table(
                ["lower half of MNIST test digits", "share"],
                [[words, f"{value:.2f}"] for words, value in classes.items()],
            ),
            rhat=", ".join(
                f"{100 * record['tasks'][task]['rhat_above_1.1']:.0f} % ({name}, {task})"
                for name, record in records.items()
                for task in TASKS
            ),
            figures="\n\n".join(figures),
        )
    )
    return path


def psnr_table(records: dict[str, Any]) -> str:
    """Write a row for each way."""
    columns = [(name, task) for name in records for task in TASKS]
    ways = records["mnist"]["tasks"]["inpainting"]["psnr"]
    lines = [
        [way, *(cell(records[name]["tasks"][task]["psnr"][way]) for name, task in columns)] for way in ways
    ]
    return study.table(["PSNR, dB", *(f"{name}, {task}" for name, task in columns)], lines)


def uncertainty_table(records: dict[str, Any]) -> str:
    """Write the error of the posterior mean beside the error that the model expects."""
    columns = [(name, task) for name in records for task in TASKS]
    found = [records[name]["tasks"][task]["rms"] for name, task in columns]
    lines = [[words, *(f"{each[words]:.4f}" for each in found)] for words in found[0]]
    return study.table(["root mean square", *(f"{name}, {task}" for name, task in columns)], lines)


def density_table(records: dict[str, Any]) -> str:
    """Write the density of what was missing, by each way, and paired differences."""
    lines = []
    for name, record in records.items():
        for task in TASKS:
            found = record["tasks"][task]["log_missing"]
            for way, values in found.items():
                errors = record["tasks"][task]["log_missing_error"].get(way)
                monte_carlo = f"{math.hypot(*errors) / len(errors):.2f}" if errors else "0"
                gain = [a - b for a, b in zip(found["posterior"], values, strict=True)]
                better = "" if way == "posterior" else cell(gain)
                lines.append([name, task, way, cell(values), monte_carlo, better])
    header = ["data", "task", "way", "log p, nats ± over images", "± Monte Carlo", "posterior is better by"]
    return study.table(header, lines)


def figure_of(found: dict[str, Any], task: str) -> "Figure":
    """Draw truth, what was seen, draws and ways for the ten images whose draws differ most and two others."""
    import torch

    from pyro_vae.lab import plots

    parts = found[task]
    spread = parts["found"].samples.std(0).mean(1)
    order = spread.argsort(descending=True)
    shown = torch.cat([order[:10], order[-2:]])
    x, y, samples = parts["x"], parts["y"].nan_to_num(0.5), parts["found"].samples
    ways = parts["ways"]
    names = ["posterior mean", "reconstruct and paste", "reconstruct and paste, best guess"]
    names += ["trained autoencoder", "nearest training image"]
    rows = [x, y, *samples[::3][:5], *(ways[name] for name in names)]
    titles = ["truth", "seen", "posterior draws", *[""] * 4, *names]
    return plots.image_grid([row[shown] for row in rows], found["shape"], titles)


_TEXT = """# What a density model is for

Made by

    {command}

({machine}; commit {commit}). {num_images} test images each of MNIST (binarised; a VAE of 20 latents and
Bernoulli pixels) and Frey Face (grey; 10 latents, normal pixels), restored from their upper half
(inpainting), from themselves with normal noise of scale {noises} (denoising), and from means of blocks of
4 x 4 pixels with noise of scale {fine} (4x super-resolution).

The VAE was trained once, on whole images, and knows of no task; p(z | what was seen) is sampled by
annealing from the guide's proposals, resampling them by their weights, and Hamiltonian Monte Carlo.
*Reconstruct and paste* is one pass through encoder and decoder, of 0 for what is missing, or of the *best
guess* of several that were passed back and forth (`tasks.degraded`). The *trained autoencoder* was
trained for each task by itself, on pairs. R-hat of the chains is above 1.1 for {rhat}.

## Signal-to-noise ratio

Over what was missing; means over images ± standard error. The posterior mean is the best estimate in
squared error if the model is right; a single draw is sharp, and worse by that measure.

{psnr}

## Is the uncertainty right?

How far the posterior mean is off, and how far the model says it may be, over what was missing; pixels are
from 0 to 1. Of a right model the first two would be alike. The last row is what one sees of it in draws:
where it is far below the row above, z is pinned by what was seen, draws are alike, and the rest is noise of
pixels.

{uncertainty}

## log p(missing | observed)

Estimated as log p(x) - log p(observed), each by annealed importance sampling from the guide with
{temperatures} temperatures. Ways without a distribution over images have no density. For MNIST the noise
of the other two tasks is treated by the normal with the same moments, so no density is claimed for them.

{density}

## Ambiguous digits

What a classifier of real digits sees in 16 draws of the lower half:

{classes}

## Pictures

The ten images whose draws differ most, and the two whose draws differ least.

{figures}
"""


if __name__ == "__main__":
    cli.run(main)
