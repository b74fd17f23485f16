"""Estimates of log p(x) of a run: which fit it, how each is made, kept and judged."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro_vae.errors import unknown
from pyro_vae.files import locked
from pyro_vae.lab.choices import ESTIMATORS, FAMILIES, PRIORS
from pyro_vae.lab.config import Config, ConfigError, flag

if TYPE_CHECKING:
    from pyro_vae.data import Split
    from pyro_vae.lab.runs import Run
    from pyro_vae.marginal_likelihood import LogMarginal


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the estimators; the others are their own defaults.

    Raises:
        ConfigError: If a number is out of range.
    """

    num_samples: int = 5000
    """Importance samples for every datum."""
    tolerance: float | None = None
    """Stop importance sampling when bias and Monte Carlo error are below so many nats."""
    num_chains: int = 16
    """Chains of ais and bidirectional for every datum."""
    num_temperatures: int = 1000
    """Temperatures of ais and bidirectional."""
    num_leapfrog: int = 3
    """Gradients for every transition of ais and bidirectional."""
    start: Literal["prior", "guide"] = "prior"
    """Start of the annealing: the guide takes fewer temperatures, but what it misses may stay missed."""
    num_simulated: int = 100
    """Data of bidirectional."""
    limit: int | None = None
    """Take only so many data, drawn at random, but the same ones each time."""

    def __post_init__(self) -> None:
        sizes = ("num_samples", "num_chains", "num_temperatures", "num_leapfrog", "num_simulated", "limit")
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, not {size}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"--tolerance must be positive (nats), not {self.tolerance}")

    def of(self, method: str, run: "Run") -> dict[str, Any]:
        """Arguments of an estimator besides programs and data."""
        if method == "importance_sampling":
            num_samples = self.num_samples if run.config.system.draws else 1
            return {"num_samples": num_samples, "tolerance": self.tolerance}
        if method in ("quadrature", "hmc"):
            return {}
        return {
            "guide": run.guide if self.start == "guide" else None,
            "num_chains": self.num_chains,
            "num_temperatures": self.num_temperatures,
            "num_leapfrog": self.num_leapfrog,
        }


def chosen(methods: Sequence[str], config: Config, say: Callable[[str], object] = print) -> list[str]:
    """Choose the methods, once each; of ``all`` those that fit the latents, and say why others do not.

    Raises:
        ConfigError: If one that was asked for by name does not fit.
    """
    if not methods:
        raise ConfigError("--method needs a name: leave it out, or see --help for what there is")
    takes_all = "all" in methods
    fitting = []
    for method in ESTIMATORS if takes_all else dict.fromkeys(methods):
        why = misfit(method, config, strictly=takes_all)
        if why is None:
            fitting.append(method)
        elif takes_all:
            say(f"without {method}: {why}")
        else:
            raise ConfigError(f"{method} does not fit this run: {why}")
    return fitting


def misfit(method: str, config: Config, *, strictly: bool = True) -> str | None:
    """Say why an estimator does not fit the latents of a run; None if it does.

    Args:
        method: One of ``ESTIMATORS``.
        config: Configuration of the run.
        strictly: Also count what only gets worse as dimensions are added.
    """
    if method not in ESTIMATORS:
        raise ConfigError(unknown("estimator", method, ESTIMATORS))
    row = ESTIMATORS[method]
    if row.needs_map and (why := PRIORS[config.chosen_prior].unmapped):
        return f"{why}; importance_sampling serves"
    if config.latent_dim > row.most_dimensions and (strictly or method == "quadrature"):
        return f"{config.latent_dim} latent dimensions are too many; ais takes any number"
    return None


def estimate(
    run: "Run", split: "Split", method: str, settings: Settings, checkpoint: Path | None = None
) -> "LogMarginal":
    """Estimate log p(x) of a split, or of ``settings.limit`` of its data, with the seconds that it took.

    Args:
        run: Run whose pair is judged.
        split: Data.
        method: One of ``ESTIMATORS``.
        settings: Settings of the estimators.
        checkpoint: File from which an interrupted estimate goes on.
    """
    import pyro

    from pyro_vae import marginal_likelihood

    pyro.set_rng_seed(run.config.seed)
    given = settings.of(method, run)
    limit = settings.num_simulated if method == "bidirectional" else settings.limit
    batch = run.arguments(split, limit)
    programs = (run.model, run.guide) if method == "importance_sampling" else (run.model,)
    if method != "bidirectional":
        count = len(batch[0])
        given["data"] = split.description + (f", {count:,} of them at random" if count < len(split) else "")
    started = time.perf_counter()
    result = getattr(marginal_likelihood, method)(*programs, *batch, checkpoint=checkpoint, **given)
    result.settings["seconds"] = time.perf_counter() - started
    return result


def keep(result: "LogMarginal", path: Path) -> "dict[str, LogMarginal]":
    """Add an estimate to a file, in which a smaller one never takes the place of a larger one; return all."""
    from pyro_vae.marginal_likelihood import merge_estimates

    return merge_estimates({result.method: result}, path)


def estimate_all(
    run: "Run",
    split: "Split",
    methods: Sequence[str],
    settings: Settings,
    path: Path,
    say: Callable[[str], object],
) -> None:
    """Estimate in several ways, keep each in the file as it is done, and judge them together.

    Interrupted, the same call goes on.
    """
    from pyro_vae import marginal_likelihood as ml

    estimates = {}
    for method in methods:
        partial = path.with_name(f"{path.stem}.{method}.partial")
        with locked(path.with_name(f"{path.stem}.{method}.lock"), f"{method} of {path.parent}"):
            result = estimate(run, split, method, settings, partial)
            estimates |= keep(result, path)
            partial.unlink(missing_ok=True)
        say(f"\n{in_words(run, split, result)}")
        if (kept := estimates[method]).size > result.size:
            say(f"{path} keeps what took more work: {kept.settings['effort']}, mean {kept.mean:.2f}")
    say(f"\n{ml.table(estimates)}\n")
    say(ml.verdict(estimates))


def in_words(run: "Run", split: "Split", result: "LogMarginal") -> str:
    """Summary of an estimate, with bits per dimension where data have them."""
    return "\n".join(filter(None, (result.summary(), bits(run, split, result))))


def bits(run: "Run", split: "Split", result: "LogMarginal") -> str | None:
    """Bits per dimension in words; None for bits, counts and tables."""
    from pyro_vae.marginal_likelihood import bits_per_dim

    family, data_dim = FAMILIES[run.config.family], run.facts.data_dim
    if family.values not in ("levels", "reals") or run.config.missing:
        return None
    if family.values == "levels":
        return f"{bits_per_dim(result.mean, data_dim, 1.0):.3f} bits per dimension, the length of a code"
    value = f"{bits_per_dim(result.mean, data_dim, split.bin_width):.3f} bits per dimension"
    if split.binarization == "dequantize":
        return f"{value} in dequantised bins of {split.bin_width:.3g}: at least the length of a code"
    unit = f"in bins of 1/{split.levels:.0f}" if split.levels != 1 else "in the unit of the data"
    return (
        f"{value} {unit}; the data were not dequantised, so this is a density at their values and not the "
        "length of a code"
    )
