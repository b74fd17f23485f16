"""Reports on a run: how good its pair is, in words and metrics, and figures."""

import dataclasses
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae.data import Split
from pyro_vae.files import WriteError, write_atomically
from pyro_vae.lab import plots
from pyro_vae.lab.choices import FAMILIES, PRIORS
from pyro_vae.lab.runs import Run
from pyro_vae.latents import fitted_mixture, posterior_mean
from pyro_vae.marginal_likelihood import LogMarginal, best_estimate, elbo, load_estimates_by_data
from pyro_vae.models.vae import beside
from pyro_vae.traces import at_point_masses, guide_distributions
from pyro_vae.traces.blocks import evaluation
from pyro_vae.training import read_metrics


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality of a pair on some data.

    Attributes:
        row: Means over data, as metrics of the test: ``test/elbo``, ``test/kl``, ..., nats.
        text: All of it in words.
    """

    row: dict[str, int | float]
    text: str


def assess(run: Run, split: Split, limit: int | None = None) -> Quality:
    """Judge a pair by its bound, and by how much of the latents a split uses, or ``limit`` of its data."""
    pyro.set_rng_seed(run.config.seed)
    batch = run.arguments(split, limit)
    count, system = len(batch[0]), run.config.system
    used, text_of_latents = system.usage(run, batch)

    def error(values: torch.Tensor) -> str:
        return f"{values.std().item() / math.sqrt(count) if count > 1 else math.nan:.2g} ({count:,} data)"

    if not system.has_log_prob:
        with evaluation(run.model, run.guide):
            joint = sum(at_point_masses(run.model, run.guide, *batch)).squeeze(0)
        text = (
            f"log-likelihood at the codes = {joint.mean():.2f} nats per datum ± {error(joint)}; "
            f"{system.noun} has no log p(x)\n{text_of_latents}"
        )
        return Quality({"test/log_joint": joint.mean().item()} | used, text)
    bound = elbo(run.model, run.guide, *batch, num_samples=30 if system.draws else 1)
    is_density = FAMILIES[run.config.family].is_density
    name = "ELBO" if is_density else "bound on the cross-entropy, no ELBO,"
    text = (
        f"{name} = {bound.elbo.mean():.2f} nats per datum ± {error(bound.elbo)}: "
        f"log-likelihood {bound.log_likelihood.mean():.2f} - KL {bound.kl.mean():.2f}\n{text_of_latents}"
    )
    row = {"test/elbo": bound.elbo.mean().item(), "test/kl": bound.kl.mean().item()}
    return Quality(row | used, text)


def figures(folder: Path, run: Run) -> dict[str, Figure]:
    """All figures that the run folder and the kind of data allow, by name."""
    drawn = {"learning_curves": plots.learning_curves(read_metrics(folder))}
    if os.path.lexists(folder / "log_marginal.json"):
        drawn |= _estimates(load_estimates_by_data(folder / "log_marginal.json"))
    pyro.set_rng_seed(run.config.seed)
    with torch.no_grad():
        if plots.is_image(run.facts.shape):
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
    shape, test = run.facts.shape, run.dataset.test
    x, *context = run.arguments(test, 16)
    system = run.config.system

    def decode(z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return run.model.likelihood(beside(z.to(test.stored.device), c)).mean

    posterior = guide_distributions(run.guide, x, *context)["z"]
    rows = [x, decode(posterior_mean(run.guide, x, *context), *context)]
    titles = ["data", "mean of p(x|z) at the mean of q(z|x)"]
    if system.draws:
        rows.append(decode(posterior.sample().squeeze(0), *context))
        titles.append("mean of p(x|z) at one draw of z from q(z|x)")
    prior = run.model.prior()
    if not system.has_log_prob:  # nothing can be drawn from its own
        prior = fitted_mixture(posterior_mean(run.guide, *run.arguments(run.dataset.train, 10_000)))
    if context:  # a row for every class
        classes = torch.eye(context[0].shape[1], device=test.stored.device).unsqueeze(1)
        samples = [decode(prior.sample((16,)), c) for c in classes]
    else:
        samples = [decode(prior.sample((16,))) for _ in range(10)]
    title = "" if system.has_log_prob else "z from a mixture fitted to the codes"
    drawn = {
        "reconstructions": plots.image_grid(rows, shape, titles),
        "samples": plots.image_grid(samples, shape, [title] if title else []),
    }
    if (
        run.config.latent_dim == 2
        and not context
        and PRIORS[run.config.chosen_prior].posterior == "diag_normal"
    ):
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
