"""What a run's folder says about it: numbers in words, and figures."""

import dataclasses
import io
import math
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.data import Split
from pyro_vae.files import write_atomically
from pyro_vae.latents import active_units, posterior_mean
from pyro_vae.marginal_likelihood import Bound, LogMarginal, bits_per_dim, elbo, importance_sampling
from pyro_vae.runs import Run
from pyro_vae.training import read_metrics


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good a pair is on some data.

    Attributes:
        bound: The ELBO of every datum and its parts, nats.
        log_marginal: Estimates of log p(x), nats.
        active: Number of active latent dimensions.
        bits: Bits per dimension by the estimates of log p(x); None for data that are bits.
        text: All of it in words.
    """

    bound: Bound
    log_marginal: LogMarginal
    active: int
    bits: float | None
    text: str


def assess(run: Run, split: Split, num_samples: int, limit: int | None = None) -> Quality:
    """ELBO, KL, active units and log p(x) of a split, or of its first ``limit`` data."""
    pyro.set_rng_seed(run.config.seed)
    x = split.x[:limit]
    description = split.description + (f", the first {len(x):,}" if len(x) < len(split) else "")
    bound = elbo(run.model, run.guide, x, num_samples=30)
    active = int(active_units(run.guide, x).sum())
    estimate = importance_sampling(run.model, run.guide, x, num_samples=num_samples, data=description)
    error = bound.elbo.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    name = "ELBO" if estimate.settings["scores"] == "log p(x)" else "bound on the cross-entropy, no ELBO,"
    lines = [
        f"{name} = {bound.elbo.mean():.2f} nats per datum ± {error:.2g} ({len(x):,} data): "
        f"log-likelihood {bound.log_likelihood.mean():.2f} - KL {bound.kl.mean():.2f}",
        f"{active} of {run.config.latent_dim} latent dimensions are active",
        estimate.summary(),
    ]
    bits = None
    if run.config.family not in ("bernoulli", "bernoulli_cross_entropy"):
        bits = bits_per_dim(estimate.mean, x.shape[1], 1 / split.levels)
        unit = f"in bins of 1/{split.levels:.0f}" if split.levels != 1 else "in the unit of the data"
        lines.append(
            f"{bits:.2f} bits per dimension {unit}; the data were not dequantised, so this is a density at "
            "their values and not the length of a code"
        )
    return Quality(bound, estimate, active, bits, "\n".join(lines))


def figures(folder: Path, run: Run) -> dict[str, Figure]:
    """All figures that the run folder and the kind of data allow, by name."""
    drawn = {"learning_curves": plots.learning_curves(read_metrics(folder))}
    if (folder / "log_marginal.json").exists():
        result = LogMarginal.load(folder / "log_marginal.json")
        drawn["log_marginal"] = plots.log_marginal(result)
        if result.khat is not None:
            drawn["khat"] = plots.khat(result)
    pyro.set_rng_seed(run.config.seed)
    with torch.no_grad():
        if plots.is_image(run.dataset.shape):
            drawn |= _images(run)
        if run.config.latent_dim == 2:
            test = run.dataset.test
            drawn["codes"] = plots.scatter(posterior_mean(run.guide, test.x), test.labels)
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
