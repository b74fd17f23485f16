"""Measure the signal in the encoder's gradients of the importance-weighted bound, by estimator and draws.

    python scripts/studies/signal_to_noise.py runs/digits --num-particles 1 8 64

Of the same images the gradient is taken again and again, with new draws of z. The signal-to-noise ratio of a
parameter is |mean| / standard deviation (Rainforth et al., Tighter Variational Bounds are Not Necessarily
Better, 2018); shown is its mean over the encoder's parameters. Writes signal_to_noise.json and a figure.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pyro_vae.files import write_atomically
from pyro_vae.lab import cli, runs
from pyro_vae.lab.choices import GRADIENTS, POSTERIORS
from pyro_vae.lab.config import ConfigError
from pyro_vae.lab.gradients import flat_gradient, moments
from pyro_vae.progress import counted, progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the signal in the encoder's gradients of the importance-weighted bound.

    Mean over its parameters of |mean| / standard deviation, by estimator and number of draws.
    """

    run: tyro.conf.Positional[Path]
    """Folder that train.py made."""
    num_particles: tuple[int, ...] = (1, 4, 16, 64)
    """Draws of the bound."""
    repetitions: int = 1000
    """Gradients that mean and standard deviation are of; ratios below 1 / sqrt(repetitions) are noise."""
    num_data: int = 10
    """Training data of every gradient."""
    data_dir: Path | None = None
    """Folder of the data files, if not where they were."""


def main() -> None:
    """Load the run, measure, write and draw."""
    arguments = tyro.cli(Arguments)
    if min(*arguments.num_particles, arguments.num_data) < 1 or arguments.repetitions < 2:
        raise ConfigError("num_particles and num_data must be at least 1, repetitions at least 2")

    import pyro

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir)
    batch = run.arguments(run.dataset.train, arguments.num_data)
    pyro.set_rng_seed(run.config.seed)
    ratios: dict[str, dict[int, float]] = {}
    gradients = list(GRADIENTS)
    if not POSTERIORS[run.config.chosen_posterior].has_inverse:
        print(f"posterior {run.config.chosen_posterior} has no density of given z: plain gradients only")
        gradients = ["plain"]
    total = len(gradients) * len(arguments.num_particles) * arguments.repetitions
    with progress_bar(total, "gradients", "gradient", show=True) as bar:
        for gradient in gradients:
            ratios[gradient] = {}
            for num_particles in arguments.num_particles:
                draws = counted(bar, arguments.repetitions)
                ratios[gradient][num_particles] = signal_to_noise(run, batch, gradient, num_particles, draws)

    print(f"{'draws':>10} {''.join(f'{gradient:>10}' for gradient in ratios)}")
    for num_particles in arguments.num_particles:
        print(f"{num_particles:10} {''.join(f'{ratios[name][num_particles]:10.4f}' for name in ratios)}")
    write_atomically(json.dumps(ratios, indent=2).encode(), arguments.run / "signal_to_noise.json")
    path = arguments.run / "figures" / "signal_to_noise.png"
    path.parent.mkdir(exist_ok=True)
    draw(ratios, arguments.repetitions).savefig(path, dpi=150)
    print(f"figure {path}")


def signal_to_noise(
    run: runs.Run, batch: tuple["Tensor", ...], gradient: str, num_particles: int, draws: Iterable[int]
) -> float:
    """Mean over the encoder's parameters of |mean| / standard deviation of their gradients."""
    from pyro_vae import ImportanceWeightedELBO

    objective = ImportanceWeightedELBO(num_particles, gradient)
    parameters = list(run.guide.parameters())
    mean, variance, _ = moments(
        flat_gradient(objective.differentiable_loss(run.model, run.guide, *batch), parameters) for _ in draws
    )
    used = variance > 0  # weights of pixels that are always 0 have no gradient
    return (mean[used].abs() / variance[used].sqrt()).mean().item()


def draw(ratios: dict[str, dict[int, float]], repetitions: int) -> "Figure":
    """Ratios against draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for gradient, by_draws in ratios.items():
        axes.plot(list(by_draws), list(by_draws.values()), "o-", label=gradient)
    axes.axhline(math.sqrt(2 / (math.pi * repetitions)), color="grey", linestyle=":", label="no signal")
    axes.set(xscale="log", yscale="log", xlabel="draws K", ylabel="signal-to-noise ratio")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    cli.run(main)
