"""Figure 2 of the paper: the lower bound against training samples, AEVB and wake-sleep, MNIST and Frey Face.

    python scripts/paper/figure2.py
    python scripts/paper/figure2.py --data mnist --latent-dim 3 --budget 1e6

Trains the models that are not trained yet, continues where it was interrupted, and draws
results/figures/paper_figure2_*.png with the paper's curves beneath ours. Each variation (--binary, --levels,
--step-size, --warmup, --weight-prior, ...), one at a time, makes a curve of its own; report.py compares them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import curves
import published
import reproduction
import tyro
from reproduction import Common, Setting, Variation

from pyro_vae.lab import cli, jobs
from pyro_vae.lab.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENT_DIMS = {"mnist": (3, 5, 10, 20, 200), "frey_face": (2, 5, 10, 20)}
HIDDEN = {"mnist": 500, "frey_face": 200}
ALGORITHMS = {"aevb": "AEVB", "wake_sleep": "wake-sleep"}
_NAMES = tyro.conf.arg(metavar="NAME ...")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Figure 2 of the paper: the lower bound against training samples."""

    data: Annotated[tuple[str, ...], _NAMES] = ("mnist", "frey_face")
    """mnist, frey_face or both."""
    latent_dim: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Only these numbers of latents; default: the paper's."""
    algorithm: Annotated[tuple[str, ...], _NAMES] = ("aevb", "wake_sleep")
    """aevb, wake_sleep or both."""
    variation: tyro.conf.OmitArgPrefixes[Variation] = dataclasses.field(default_factory=Variation)
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train all curves and draw them."""
    arguments = tyro.cli(Arguments)
    jobs.run_all(make_curve, settings(arguments), arguments.common)
    for path in draw(arguments.common):
        print(f"figure in {path}")


def settings(arguments: Arguments) -> list[Setting]:
    """Settings of the curves that were asked for."""
    check_data(arguments.data)
    if unknown := set(arguments.algorithm) - set(ALGORITHMS):
        raise ConfigError(f"figure 2 has no algorithm {unknown.pop()!r}, only {', '.join(ALGORITHMS)}")
    return [
        Setting(data, latent_dim, algorithm, HIDDEN[data], **arguments.variation.of(data))
        for data in arguments.data
        for latent_dim in arguments.latent_dim or LATENT_DIMS[data]
        for algorithm in arguments.algorithm
    ]


def check_data(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless these are data sets of the paper."""
    if unknown := set(names) - set(HIDDEN):
        raise ConfigError(f"the paper has no data {unknown.pop()!r}, only {', '.join(HIDDEN)}")


def make_curve(setting: Setting, common: Common, *, progress: bool) -> str:
    """Choose the step size, train, keep the curve."""
    from pyro_vae import Evaluate

    dataset = reproduction.load(setting, common)
    folder = common.runs / "figure2" / setting.name
    epochs = reproduction.epochs_at(setting, reproduction.log_spaced(common.budget))
    callbacks = [Evaluate(dataset.test.x, name="test", epochs=epochs)]
    algorithm, folder, choice = reproduction.with_best_step_size(
        setting, common, dataset, folder, epochs[-1], callbacks=callbacks, progress=progress
    )
    history = reproduction.train(
        setting, dataset, algorithm, epochs[-1], callbacks=callbacks, folder=folder, progress=progress
    )
    rows = [row for row in history if "test/elbo" in row]
    curve = [[row["samples"], round(row["train/elbo"], 2), round(row["test/elbo"], 2)] for row in rows]
    curves.save(
        curves.file_of(setting, common, "figure2"),
        setting,
        **choice,
        seconds=round(history[-1]["seconds"]),
        columns=["samples", "train", "test"],
        curve=curve,
    )
    samples, train, test = curve[-1]
    return (
        f"{setting.name}: step size {choice['step_size']}, {samples:.1e} samples in "
        f"{history[-1]['seconds']:.0f} s, train {train:.1f}, test {test:.1f}"
    )


def trained_model(setting: Setting, common: Common) -> tuple[Any, tuple[int, ...]]:
    """Return the model at the end of its curve, on the CPU, and the shape of an image."""
    from pyro_vae.training import load_checkpoint, load_parameters

    dataset = reproduction.load(setting, common)
    step_size = curves.load(curves.file_of(setting, common, "figure2"))["step_size"]
    algorithm = reproduction.build(setting, common, dataset, step_size)
    path = common.runs / "figure2" / setting.name / f"{step_size}" / "checkpoint.pt"
    load_parameters(load_checkpoint(path), path, algorithm.model, algorithm.guide)
    return algorithm.model, dataset.shape


# ------------------------------------------------------------------------------------------- figure


def draw(common: Common) -> list[Path]:
    """Draw a row of panels for each data set, with the curves that have no variation."""
    from matplotlib.figure import Figure

    records = curves.load_all(common, "figure2")
    paths = []
    for data, latent_dims in LATENT_DIMS.items():
        if not any(record["setting"]["data"] == data for record in records):
            continue
        figure = Figure(figsize=(3.2 * len(latent_dims), 3.4), layout="constrained")
        for axes, latent_dim in zip(figure.subplots(1, len(latent_dims)), latent_dims, strict=True):
            for algorithm, colour in zip(ALGORITHMS, ("C3", "C2"), strict=True):
                setting = dataclasses.asdict(Setting(data, latent_dim, algorithm, HIDDEN[data]))
                ours = [record for record in records if record["setting"] == setting]
                _panel(axes, data, latent_dim, algorithm, colour, ours)
            axes.set(xscale="log", title=f"{latent_dim} latents", xlabel="training samples")
            axes.set(xlim=(8e4, 3e8), ylim=(-160, -95) if data == "mnist" else (0, 1600))
            axes.grid(alpha=0.3)
        figure.axes[0].plot([], [], color="0.7", linewidth=4, label="the paper's")
        figure.axes[0].set_ylabel("lower bound (nats)")
        figure.legend(*_labelled(figure), fontsize=7, loc="outside right upper")
        figure.suptitle(
            {"mnist": "MNIST, 500 hidden units", "frey_face": "Frey Face, 200 hidden units"}[data]
        )
        paths.append(curves.save_figure(figure, common, f"figure2_{data}"))
    return paths


def _labelled(figure: "Figure") -> tuple[list[Any], list[str]]:
    """Return one line of every kind that occurs in a panel, for the legend."""
    found = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    return list(found.values()), list(found)


def _panel(
    axes: "Axes", data: str, latent_dim: int, algorithm: str, colour: str, ours: list[dict[str, Any]]
) -> None:
    for column, (split, style) in enumerate((("train", "--"), ("test", "-")), 1):
        theirs = published.figure2(data, latent_dim, algorithm, split)
        label = f"{ALGORITHMS[algorithm]} ({split})"
        axes.plot(*zip(*theirs, strict=True), style, color=colour, alpha=0.3, linewidth=4)
        for curve in ours:
            points = [(row[0], row[column]) for row in curve["curve"]]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.2)


if __name__ == "__main__":
    cli.run(main)
