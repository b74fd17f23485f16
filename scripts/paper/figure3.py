"""Figure 3 of the paper: log p(x) against training samples, AEVB, wake-sleep and Monte Carlo EM.

    python scripts/paper/figure3.py
    python scripts/paper/figure3.py --num-train 1000 --algorithm mcem --budget 1e6

MNIST, 3 latents, 100 hidden units. At several numbers of samples log p(x) is estimated on the first 1,000
training data and the first 1,000 test data by the paper's Appendix D, and on the first --exact of them by
quadrature, which has no error to speak of. Continues where it was interrupted, and draws
results/figures/paper_figure3.png with the paper's curves beneath ours. As we read the paper, x are grey
values scored by their cross-entropy; --binary scores bits.
"""

import dataclasses
import functools
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
    from torch import Tensor, nn

    from pyro_vae.marginal_likelihood import LogMarginal

ALGORITHMS = {"aevb": "AEVB", "wake_sleep": "wake-sleep", "mcem": "Monte Carlo EM"}
SAMPLES = (1e6, 2e6, 5e6, 1e7, 2e7, 3e7, 4e7, 5e7, 6e7)
COLUMNS = ("hmc", "impossible", "hmc_of_exact", "exact")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Figure 3 of the paper: log p(x) against training samples."""

    num_train: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1000, 50000)
    """Training data: 1000, 50000 or both."""
    algorithm: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = tuple(ALGORITHMS)
    """aevb, wake_sleep and mcem."""
    estimated: int = 1000
    """Number of training and of test data whose log p(x) is estimated."""
    exact: int = 100
    """Number of these data whose log p(x) is also found by quadrature."""
    variation: tyro.conf.OmitArgPrefixes[Variation] = dataclasses.field(default_factory=Variation)
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train, estimate, draw."""
    arguments = tyro.cli(Arguments)
    if unknown := set(arguments.algorithm) - set(ALGORITHMS):
        raise ConfigError(f"figure 3 has no algorithm {unknown.pop()!r}, only {', '.join(ALGORITHMS)}")
    settings = [
        setting(num_train, algorithm, **arguments.variation.of("mnist"))
        for num_train in arguments.num_train
        for algorithm in arguments.algorithm
    ]
    work = functools.partial(make_curve, arguments.estimated, arguments.exact)
    jobs.run_all(work, settings, arguments.common)
    print(f"figure in {draw(arguments.common)}")


def setting(num_train: int, algorithm: str, **varied: Any) -> Setting:
    """Return the setting that the paper describes, as we read it, with what is varied.

    Monte Carlo EM is no on-line algorithm, as the paper says: it takes all the data in an iteration. It also
    takes the largest of the step sizes at once: at 50,000 data the whole figure has 80 iterations, too few to
    try others, or for 100 updates that only sum Adagrad's squared gradients (20 iterations).
    """
    if algorithm == "mcem":
        step_size = max(reproduction.STEP_SIZES)
        varied = {"batch_size": num_train, "step_size": step_size, "warmup": 0} | varied
    return Setting("mnist", 3, algorithm, 100, num_train=num_train, **varied)


def make_curve(estimated: int, exact: int, setting: Setting, common: Common, *, progress: bool) -> str:
    """Train from one number of samples to the next, and estimate log p(x) there."""
    dataset = reproduction.load(setting, common)
    folder = common.runs / "figure3" / setting.name
    samples = [number for number in SAMPLES if number < common.budget] + [common.budget]
    all_epochs = reproduction.epochs_at(setting, samples)
    algorithm, folder, choice = reproduction.with_best_step_size(
        setting, common, dataset, folder, all_epochs[0], progress=progress
    )
    curve, seconds = [], 0
    for epochs in all_epochs:
        history = reproduction.train(setting, dataset, algorithm, epochs, folder=folder, progress=progress)
        seconds = round(history[-1]["seconds"])
        row = [epochs * setting.epoch[1]]
        for split, data in ("train", dataset.train), ("test", dataset.test):
            x, at = data.x[:estimated], folder / f"{split}_{row[0]}"
            if not all(file.exists() for file in estimate_files(at, len(x), exact).values()):
                reproduction.require_end(setting, history, epochs, folder)
            row += estimates(algorithm.model, x, exact, at, progress=progress)
        curve.append(row)
    curves.save(
        curves.file_of(setting, common, "figure3"),
        setting,
        **choice,
        seconds=seconds,
        estimated=estimated,
        exact=exact,
        columns=["samples", *(f"{split}_{name}" for split in ("train", "test") for name in COLUMNS)],
        curve=curve,
    )
    last = dict(zip(COLUMNS, curve[-1][1 + len(COLUMNS) :], strict=True))
    return (
        f"{setting.name}: step size {choice['step_size']}, {curve[-1][0]:.1e} samples in {seconds} s, "
        f"log p(x) of train {curve[-1][1]:.1f}, of test {last['hmc']:.1f}"
    )


def estimate_files(path: Path, estimated: int, exact: int) -> dict[str, Path]:
    """Paths of the estimates of so many data, by method."""
    numbers = {"hmc": estimated, "quadrature": exact}
    return {name: path.with_name(f"{path.name}_{name}_{number}.json") for name, number in numbers.items()}


def estimates(model: "nn.Module", x: "Tensor", exact: int, path: Path, *, progress: bool) -> list[float]:
    """Estimate log p(x) by Appendix D, and of the first ``exact`` data by quadrature; see :func:`means`."""
    from pyro_vae.marginal_likelihood import fit_kernel_density, hmc, load_estimates, quadrature

    files = estimate_files(path, len(x), exact)

    def kept(name: str, estimate: Any) -> "LogMarginal":
        file = files[name]
        if not file.exists():
            estimate().save(file)
        return load_estimates(file)[name]

    sampled = kept(
        "hmc",
        lambda: hmc(
            model,
            x,
            fit=fit_kernel_density,
            num_chains=8,
            num_samples=100,
            num_warmup=100,
            num_leapfrog=4,
            progress=progress,
        ),
    )
    # Values change by less than the tolerance in the last refinement, and are far closer to exact after it.
    found = kept("quadrature", lambda: quadrature(model, x[:exact], tolerance=0.2, progress=progress))
    return means(sampled.values, found.values)


def means(sampled: "Tensor", exact: "Tensor") -> list[float]:
    """Return the means of ``COLUMNS``; those of Appendix D leave out estimates above 0, and count these.

    For pixels in [0, 1] no log p(x) is above 0. Appendix D is too high by hundreds of nats where the draws
    that its density is fitted to and the draws that it is averaged over lie in different places; k-hat tells
    (``results/paper.md``). The exact value is the mean over all data for which it was found.
    """
    possible = sampled <= 0
    of_exact = sampled[: len(exact)][possible[: len(exact)]]
    mean, mean_of_exact, exact_mean = (
        round(values.mean().item(), 3) for values in (sampled[possible], of_exact, exact)
    )
    return [mean, int((~possible).sum()), mean_of_exact, exact_mean]


def draw(common: Common) -> Path:
    """Draw two panels, for 1,000 and for 50,000 training data."""
    from matplotlib.figure import Figure

    records = curves.load_all(common, "figure3")
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, num_train in zip(figure.subplots(1, 2), (1000, 50000), strict=True):
        for (algorithm, label), colour in zip(ALGORITHMS.items(), ("C3", "C2", "C0"), strict=True):
            plain = dataclasses.asdict(setting(num_train, algorithm))
            ours = [record for record in records if record["setting"] == plain]
            for split, style in (("train", "--"), ("test", "-")):
                theirs = published.figure3(num_train, algorithm, split)
                axes.plot(*zip(*theirs, strict=True), style, color=colour, alpha=0.3, linewidth=4)
                for curve in ours:
                    place = curve["columns"].index(f"{split}_hmc")
                    x, y = [row[0] for row in curve["curve"]], [row[place] for row in curve["curve"]]
                    axes.plot(x, y, style, color=colour, label=f"{label} ({split})", linewidth=1.2)
        axes.set(title=f"{num_train:,} training data", xlabel="training samples")
        axes.set(xlim=(8e5, 1e8), ylim=(-170, -100))
        axes.set(ylabel="log p(x) (nats)", xscale="log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return curves.save_figure(figure, common, "figure3")


if __name__ == "__main__":
    cli.run(main)
