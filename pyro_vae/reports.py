"""What a run's folder says about it: numbers in words, and figures."""

import dataclasses
import io
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae import experiment, plots
from pyro_vae.data import Split
from pyro_vae.files import WriteError, write_atomically
from pyro_vae.latents import active_units, code_usage, fitted_mixture, posterior_mean
from pyro_vae.marginal_likelihood import (
    LogMarginal,
    best_estimate,
    bits_per_dim,
    elbo,
    load_estimates_by_data,
)
from pyro_vae.models.vae import beside
from pyro_vae.runs import Run
from pyro_vae.traces import at_point_masses, guide_distributions
from pyro_vae.traces.blocks import evaluation
from pyro_vae.training import read_metrics


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good a pair is on some data.

    Attributes:
        row: Means over data, as metrics of the test: ``test/elbo``, ``test/kl``, ..., nats.
        text: All of it in words.
    """

    row: dict[str, int | float]
    text: str


def assess(run: Run, split: Split, limit: int | None = None) -> Quality:
    """The bound, its parts, and how much of the latents a split uses, or ``limit`` of its data at random."""
    pyro.set_rng_seed(run.config.seed)
    batch = run.arguments(split, limit)
    count = len(batch[0])
    used, text_of_latents = _latents(run, batch)

    def error(values: torch.Tensor) -> str:
        return f"{values.std().item() / math.sqrt(count) if count > 1 else math.nan:.2g} ({count:,} data)"

    if run.config.is_autoencoder:
        with evaluation(run.model, run.guide):
            joint = sum(at_point_masses(run.model, run.guide, *batch)).squeeze(0)
        text = (
            f"log-likelihood at the codes = {joint.mean():.2f} nats per datum ± {error(joint)}; an "
            f"autoencoder has no log p(x)\n{text_of_latents}"
        )
        return Quality({"test/log_joint": joint.mean().item()} | used, text)
    bound = elbo(run.model, run.guide, *batch, num_samples=1 if run.config.has_codes else 30)
    is_density = run.config.family != "bernoulli_cross_entropy"
    name = "ELBO" if is_density else "bound on the cross-entropy, no ELBO,"
    text = (
        f"{name} = {bound.elbo.mean():.2f} nats per datum ± {error(bound.elbo)}: "
        f"log-likelihood {bound.log_likelihood.mean():.2f} - KL {bound.kl.mean():.2f}\n{text_of_latents}"
    )
    row = {"test/elbo": bound.elbo.mean().item(), "test/kl": bound.kl.mean().item()}
    return Quality(row | used, text)


def _latents(run: Run, batch: tuple[torch.Tensor, ...]) -> tuple[dict[str, int | float], str]:
    """What of the latents is in use, as metrics and in words."""
    if run.config.has_codes:
        usage = code_usage(run.guide, *batch)
        text = (
            f"{100 * usage.share:.0f} % of {run.config.num_codes} codes are in use, perplexity "
            f"{usage.perplexity:.1f}"
        )
        return {"test/perplexity": usage.perplexity, "test/codes_used": usage.share}, text
    active = int(active_units(run.guide, *batch).sum())
    return {"test/active_units": active}, f"{active} of {run.config.latent_dim} latent dimensions are active"


def estimate(
    run: Run,
    split: Split,
    method: str,
    limit: int | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> LogMarginal:
    """Log p(x) of a split, or of ``limit`` of its data, with the seconds that it took.

    Args:
        run: Whose pair is judged.
        split: Data.
        method: One of ``experiment.ESTIMATORS``.
        limit: Take only so many data, drawn at random, but the same ones each time.
        checkpoint: File from which an interrupted estimate goes on.
        **settings: Of the estimator.
    """
    pyro.set_rng_seed(run.config.seed)
    batch = run.arguments(split, limit)
    count = len(batch[0])
    description = split.description + (f", {count:,} of them at random" if count < len(split) else "")
    programs = (run.model, run.guide) if method == "importance_sampling" else (run.model,)
    if method != "bidirectional":
        settings["data"] = description
    started = time.perf_counter()
    result = experiment.estimator(method)(*programs, *batch, checkpoint=checkpoint, **settings)
    result.settings["seconds"] = time.perf_counter() - started
    return result


def bits(run: Run, split: Split, result: LogMarginal) -> str | None:
    """Bits per dimension in words; None for bits, counts and tables."""
    family, data_dim = run.config.family, run.dataset.data_dim
    if family.startswith("bernoulli") or family in (*experiment.COUNTS, "columns") or run.config.missing:
        return None
    if family in experiment.GREY_LEVELS:
        return f"{bits_per_dim(result.mean, data_dim, 1.0):.3f} bits per dimension, the length of a code"
    value = f"{bits_per_dim(result.mean, data_dim, split.bin_width):.3f} bits per dimension"
    if split.binarization == "dequantize":
        return f"{value} in dequantised bins of {split.bin_width:.3g}: at least the length of a code"
    unit = f"in bins of 1/{split.levels:.0f}" if split.levels != 1 else "in the unit of the data"
    return (
        f"{value} {unit}; the data were not dequantised, so this is a density at their values and not the "
        "length of a code"
    )


def figures(folder: Path, run: Run) -> dict[str, Figure]:
    """All figures that the run folder and the kind of data allow, by name."""
    drawn = {"learning_curves": plots.learning_curves(read_metrics(folder))}
    if os.path.lexists(folder / "log_marginal.json"):
        drawn |= _estimates(load_estimates_by_data(folder / "log_marginal.json"))
    pyro.set_rng_seed(run.config.seed)
    with torch.no_grad():
        if plots.is_image(run.dataset.shape):
            drawn |= _images(run)
        if run.config.latent_dim == 2:
            test = run.dataset.test
            drawn["codes"] = plots.scatter(posterior_mean(run.guide, *run.arguments(test)), test.labels)
    return drawn


def _estimates(by_data: Mapping[str, Mapping[str, LogMarginal]]) -> dict[str, Figure]:
    drawn = {}
    given = [estimates for data, estimates in by_data.items() if data is not None]
    given.sort(key=lambda estimates: max(estimate.size[0] for estimate in estimates.values()))
    if given:
        best, most = best_estimate(given[-1]), max(reversed(given), key=len)
        drawn["log_marginal"] = plots.log_marginal(best)
        if not best.is_of_codes:  # one bound, the same for any number of samples
            drawn["sandwich"] = plots.sandwich(most)
        sampled = given[-1].get("importance_sampling")
        if sampled is not None and sampled.khat is not None:
            drawn["khat"] = plots.khat(sampled)
    for simulated in by_data.get(None, {}).values():
        drawn["certificate"] = plots.certificate(simulated)
    return drawn


def _images(run: Run) -> dict[str, Figure]:
    shape, test = run.dataset.shape, run.dataset.test
    x, *context = run.arguments(test, 16)

    def decode(z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return run.model.likelihood(beside(z.to(test.stored.device), c)).mean

    posterior = guide_distributions(run.guide, x, *context)["z"]
    rows = [x, decode(posterior_mean(run.guide, x, *context), *context)]
    titles = ["data", "mean of p(x|z) at the mean of q(z|x)"]
    if not (run.config.is_autoencoder or run.config.has_codes):
        rows.append(decode(posterior.sample().squeeze(0), *context))
        titles.append("mean of p(x|z) at one draw of z from q(z|x)")
    prior = run.model.prior()
    if run.config.is_autoencoder:  # nothing can be drawn from its own
        prior = fitted_mixture(posterior_mean(run.guide, *run.arguments(run.dataset.train, 10_000)))
    if context:  # a row for every class
        classes = torch.eye(context[0].shape[1], device=test.stored.device).unsqueeze(1)
        samples = [decode(prior.sample((16,)), c) for c in classes]
    else:
        samples = [decode(prior.sample((16,))) for _ in range(10)]
    title = "z from a mixture fitted to the codes" if run.config.is_autoencoder else ""
    drawn = {
        "reconstructions": plots.image_grid(rows, shape, titles),
        "samples": plots.image_grid(samples, shape, [title] if title else []),
    }
    if run.config.latent_dim == 2 and not context and run.config.prior not in experiment.POSTERIOR_OF:
        drawn["manifold"] = plots.manifold(decode, shape)
    return drawn


def check_files(folder: Path) -> None:
    """Raise ``UserError`` if metrics or estimates of a run are damaged: before long work that needs them."""
    read_metrics(folder)
    for path in folder.glob("log_marginal*.json"):
        load_estimates_by_data(path)


def save_figures(folder: Path, run: Run) -> Path:
    """Write all figures as PNG files; returns the folder they are in."""
    target = folder / "figures"
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError(target, error) from error
    for name, figure in figures(folder, run).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write_atomically(buffer.getvalue(), target / f"{name}.png")
    return target
