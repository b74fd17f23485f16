"""What a run's folder says about it: numbers in words, and figures."""

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae import experiment, plots
from pyro_vae.data import Split
from pyro_vae.files import write_atomically
from pyro_vae.latents import active_units, posterior_mean
from pyro_vae.marginal_likelihood import (
    Bound,
    EstimatesError,
    LogMarginal,
    best_estimate,
    bits_per_dim,
    elbo,
    load_estimates,
    save_estimates,
)
from pyro_vae.runs import Run
from pyro_vae.training import read_metrics


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good a pair is on some data.

    Attributes:
        bound: The ELBO of every datum and its parts, nats.
        active: Number of active latent dimensions.
        text: All of it in words.
    """

    bound: Bound
    active: int
    text: str


def assess(run: Run, split: Split, limit: int | None = None) -> Quality:
    """ELBO, KL and active units of a split, or of its first ``limit`` data."""
    pyro.set_rng_seed(run.config.seed)
    x = split.x[:limit]
    bound = elbo(run.model, run.guide, x, num_samples=30)
    active = int(active_units(run.guide, x).sum())
    error = bound.elbo.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    is_density = run.config.family != "bernoulli_cross_entropy"
    name = "ELBO" if is_density else "bound on the cross-entropy, no ELBO,"
    text = (
        f"{name} = {bound.elbo.mean():.2f} nats per datum ± {error:.2g} ({len(x):,} data): "
        f"log-likelihood {bound.log_likelihood.mean():.2f} - KL {bound.kl.mean():.2f}\n"
        f"{active} of {run.config.latent_dim} latent dimensions are active"
    )
    return Quality(bound, active, text)


def estimate(
    run: Run,
    split: Split,
    method: str,
    limit: int | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> LogMarginal:
    """Log p(x) of a split, or of its first ``limit`` data, with the seconds that it took.

    Args:
        run: Whose pair is judged.
        split: Data.
        method: One of ``experiment.ESTIMATORS``.
        limit: Take only the first so many data.
        checkpoint: File from which an interrupted estimate goes on.
        **settings: Of the estimator.
    """
    pyro.set_rng_seed(run.config.seed)
    x = split.x[:limit]
    description = split.description + (f", the first {len(x):,}" if len(x) < len(split) else "")
    programs = (run.model, run.guide) if method == "importance_sampling" else (run.model,)
    if method != "bidirectional":
        settings["data"] = description
    started = time.perf_counter()
    result = experiment.estimator(method)(*programs, x, checkpoint=checkpoint, **settings)
    result.settings["seconds"] = time.perf_counter() - started
    return result


def keep(estimates: Mapping[str, LogMarginal], path: Path) -> dict[str, LogMarginal]:
    """Write estimates, with those of the same data and weights by other methods that the file has."""
    earlier: dict[str, LogMarginal] = {}
    if path.exists():
        with contextlib.suppress(EstimatesError):  # of another version, whose place these take
            earlier = load_estimates(path)
    *_, latest = estimates.values()
    data = {latest.settings["data_checksum"], "simulated"}
    kept = {
        name: estimate
        for name, estimate in earlier.items()
        if estimate.settings["model_checksum"] == latest.settings["model_checksum"]
        and (estimate.settings["data_checksum"] in data or data == {"simulated"})
    }
    merged = kept | dict(estimates)
    save_estimates(merged, path)
    return merged


def bits(run: Run, split: Split, result: LogMarginal) -> str | None:
    """Bits per dimension in words; None for data that are bits."""
    if run.config.family in ("bernoulli", "bernoulli_cross_entropy"):
        return None
    unit = f"in bins of 1/{split.levels:.0f}" if split.levels != 1 else "in the unit of the data"
    return (
        f"{bits_per_dim(result.mean, split.x.shape[1], 1 / split.levels):.2f} bits per dimension {unit}; the "
        "data were not dequantised, so this is a density at their values and not the length of a code"
    )


def figures(folder: Path, run: Run) -> dict[str, Figure]:
    """All figures that the run folder and the kind of data allow, by name."""
    drawn = {"learning_curves": plots.learning_curves(read_metrics(folder))}
    if (folder / "log_marginal.json").exists():
        drawn |= _estimates(load_estimates(folder / "log_marginal.json"))
    pyro.set_rng_seed(run.config.seed)
    with torch.no_grad():
        if plots.is_image(run.dataset.shape):
            drawn |= _images(run)
        if run.config.latent_dim == 2:
            test = run.dataset.test
            drawn["codes"] = plots.scatter(posterior_mean(run.guide, test.x), test.labels)
    return drawn


def _estimates(estimates: Mapping[str, LogMarginal]) -> dict[str, Figure]:
    drawn = {}
    if any(estimate.settings["data_checksum"] != "simulated" for estimate in estimates.values()):
        drawn = {
            "log_marginal": plots.log_marginal(best_estimate(estimates)),
            "sandwich": plots.sandwich(estimates),
        }
    sampled, simulated = estimates.get("importance_sampling"), estimates.get("bidirectional")
    if sampled is not None and sampled.khat is not None:
        drawn["khat"] = plots.khat(sampled)
    if simulated is not None:
        drawn["certificate"] = plots.certificate(simulated)
    return drawn


def _images(run: Run) -> dict[str, Figure]:
    shape, test = run.dataset.shape, run.dataset.test

    def decode(z: torch.Tensor) -> torch.Tensor:
        return run.model.likelihood(z.to(test.stored.device)).mean

    x = test.x[:16]
    posterior = run.guide.posterior(x)
    sampled = run.model.likelihood(posterior.sample())
    rows = [x, decode(posterior.mean), sampled.mean]
    titles = ["data", "mean of p(x|z) at the mean of q(z|x)", "mean of p(x|z) at one draw of z from q(z|x)"]
    prior = run.model.prior()
    drawn = {
        "reconstructions": plots.image_grid(rows, shape, titles),
        "samples": plots.image_grid([decode(prior.sample((16,))) for _ in range(10)], shape),
    }
    if run.config.latent_dim == 2:
        drawn["manifold"] = plots.manifold(decode, shape)
    return drawn


def save_figures(folder: Path, run: Run) -> Path:
    """Write all figures as PNG files; returns the folder they are in."""
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    for name, figure in figures(folder, run).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write_atomically(buffer.getvalue(), target / f"{name}.png")
    return target
