r"""The paper's own estimator (Kingma & Welling, *Auto-Encoding Variational Bayes*, 2013, Appendix D).

Draw :math:`z_l \sim p(z \mid x)` by Hamiltonian Monte Carlo, fit a density q to one half of the draws, and
with the other half

.. math:: \hat p(x) = \Big( \frac1L \sum_{l=1}^L \frac{q(z_l)}{p(z_l)\, p(x \mid z_l)} \Big)^{-1} .

The mean is an unbiased estimate of 1 / p(x) if the draws are exact, so that the estimate of log p(x) is too
*high* in expectation. Its variance is :math:`\int q^2 / p(z \mid x)\, dz - 1`, infinite where q has heavier
tails than the posterior; with few draws or many latents q cannot be fitted, and the error grows to many nats
without a sign of it in a standard error. The paper uses it below 5 dimensions. (The estimator is that of
Gelfand & Dey, *Bayesian model choice*, 1994.)

Draws and fits live in unconstrained space, where all is smooth.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Share, checked
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.marginal_likelihood.runner import Estimator
from pyro_vae.mcmc.diagnostics import MIN_SAMPLES_FOR_KHAT, effective_sample_size, pareto_smooth
from pyro_vae.mcmc.posterior import Chains, coordinates, draw_posterior
from pyro_vae.traces import Program
from pyro_vae.traces.blocks import Advance, Batch, PerDatum

Density = Callable[[Float[Tensor, "points batch dim"]], Float[Tensor, "points batch"]]
FitDensity = Callable[[Float[Tensor, "draws batch dim"]], Density]


@checked
def hmc(
    model: Program,
    *batch: Tensor,
    fit: FitDensity | None = None,
    num_chains: int = 8,
    num_samples: int = 250,
    num_warmup: int = 300,
    num_leapfrog: int = 10,
    target_acceptance: Share = 0.8,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Log-likelihoods from posterior draws, by the paper's Appendix D (see the module).

    Args:
        model: A Pyro program that keeps the contract. Its discrete sites are summed out.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        fit: From draws of every datum, unconstrained, ``(draws, batch, dim)``, to a log-density of points
            ``(points, batch, dim)``: :func:`fit_normal` (the default), :func:`fit_kernel_density` (the
            authors'), or your own.
        num_chains: Chains of every datum. The density is fitted to the first half of them and evaluated on
            the others; of a single chain, as in the paper, to its first half.
        num_samples: Draws of every chain.
        num_warmup: Steps before them, see ``mcmc.sample_posterior``.
        num_leapfrog: Gradients for every draw.
        target_acceptance: Acceptance that step sizes are tuned to.
        data: Words on the data, for the summary.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Returns:
        Upper bounds in expectation. The errors allow for the correlation of the draws, not for chains that
        do not get everywhere. Diagnostics: ``khat`` of the ratios :math:`q / p` (from 30 draws on), worst
        ``rhat`` and least ``ess`` over coordinates, ``acceptance``, ``divergences``.

    Raises:
        ValueError: If a size is below 1, there are fewer than 8 draws, or as ``sample_posterior``.
    """
    chains = Chains(num_chains, num_samples, num_warmup, num_leapfrog, target_acceptance)
    return _AppendixD(model, batch, fit or fit_normal, chains).estimate(data, progress, checkpoint)


class _AppendixD(Estimator):
    name, bound, unit = "hmc", "upper", "draw"

    def __init__(self, model: Program, batch: Batch, fit: FitDensity, chains: Chains) -> None:
        super().__init__(model, None, batch)
        if chains.num_chains * chains.num_samples < 8:
            raise ValueError(
                f"{chains.num_chains} chains of {chains.num_samples} draws are too few: the fit needs 4, and "
                "so does the mean"
            )
        self.chains, self.fit = chains, fit
        self.settings = {"fit": getattr(fit, "__name__", type(fit).__name__), **dataclasses.asdict(chains)}
        self.size = chains.block_size(model, batch)
        self.amount = chains.num_transitions
        self.density = chains.density(model, batch)

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        drawn = draw_posterior(self.density, block, self.chains, advance)
        log_joint, draws = drawn.log_joint.double().cpu(), coordinates(drawn.position).double().cpu()
        if len(draws) == 1:  # two halves of one
            half = self.chains.num_samples // 2
            draws = torch.stack([draws[0, :half], draws[0, half : 2 * half]])
            log_joint = torch.stack([log_joint[0, :half], log_joint[0, half : 2 * half]])
        values, std_error, khat = reciprocal_importance(log_joint, draws, self.fit)
        columns = {"values": values, "std_error": std_error} | drawn.diagnostics()
        return columns if khat is None else columns | {"khat": khat}

    def effort(self, columns: PerDatum) -> str:
        chains, fitted = self.chains, self.settings["fit"].replace("_", " ")
        return f"{chains.num_chains} chains of {chains.num_samples:,} draws a datum, {fitted}"


def reciprocal_importance(
    log_joint: Float[Tensor, "chains samples batch"],
    draws: Float[Tensor, "chains samples batch dim"],
    fit: FitDensity,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
    r"""Appendix D from posterior draws: :math:`-\log \frac1L \sum_l q(z_l) / p(x, z_l)`, its error and k-hat.

    Args:
        log_joint: :math:`\log p(x, z)` at the draws, nats.
        draws: From :math:`p(z \mid x)`; the first half of the chains is for the fit.
        fit: See :func:`hmc`.

    Returns:
        Estimates of log p(x), their standard errors, and k-hat (None below 30 draws).
    """
    half = max(1, len(draws) // 2)
    density = fit(draws[:half].flatten(0, 1))
    evaluated = draws[half:]
    log_q = density(evaluated.flatten(0, 1)).unflatten(0, evaluated.shape[:2])
    log_ratio = log_q - log_joint[half:]
    count = log_ratio.shape[0] * log_ratio.shape[1]
    values = math.log(count) - log_ratio.flatten(0, 1).logsumexp(0)
    ratio = (log_ratio + values).exp()  # of mean 1
    variance = ratio.flatten(0, 1).var(0)
    independent = effective_sample_size(ratio, method="mean")
    # ArviZ has no number for draws that do not vary, which have no error either.
    std_error = torch.where(variance > 1e-14, (variance / independent).sqrt(), 0.0)
    khat = None
    if count >= MIN_SAMPLES_FOR_KHAT:
        khat, _ = pareto_smooth(log_ratio.flatten(0, 1).T, count)
    return values, std_error, khat


def fit_normal(draws: Float[Tensor, "draws batch dim"]) -> Density:
    """A normal with the mean and the covariance of the draws; a diagonal one if they are too few for more."""
    count, _, dim = draws.shape
    mean = draws.mean(0)
    centred = draws - mean
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / (count - 1)
    if count <= dim + 1:
        covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    factor = _cholesky(covariance)
    return lambda points: torch.distributions.MultivariateNormal(mean, scale_tril=factor).log_prob(points)


def fit_kernel_density(draws: Float[Tensor, "draws batch dim"]) -> Density:
    r"""The density of the paper's authors: normal kernels with the covariance of the draws times a bandwidth.

    The bandwidth is :math:`n^{-1/(d+4)} e^{(i-5)/2}`, :math:`i = 0, \dots, 9` (Scott's factor, and smaller
    and larger ones); every datum gets the one with the best log-score of one half of the draws fitted to the
    other. With fewer than 4 draws a dimension it is a diagonal normal (as in the authors' published code).
    """
    count, _, dim = draws.shape
    if count < 4 * dim:
        mean, std = draws.mean(0), draws.std(0)
        return lambda points: torch.distributions.Normal(mean, std).log_prob(points).sum(-1)
    fitting, scoring = draws[: count // 2], draws[count // 2 :]
    relative = torch.tensor([math.exp((i - 5) / 2) for i in range(10)], dtype=draws.dtype)
    scores = torch.stack([_kernels(scoring, fitting, r).sum(0) for r in relative.tolist()])
    best = relative[scores.argmax(0)]
    return lambda points: _kernels(points, draws, best)


def _kernels(
    points: Float[Tensor, "points batch dim"],
    centres: Float[Tensor, "centres batch dim"],
    relative: Tensor | float,
) -> Float[Tensor, "points batch"]:
    """Log-density of a mixture of normals around the centres, ``relative`` times Scott's bandwidth."""
    count, batch, dim = centres.shape
    centred = centres - centres.mean(0)
    factor = _cholesky(torch.einsum("sbi,sbj->bij", centred, centred) / (count - 1))
    width = count ** (-1 / (dim + 4)) * torch.as_tensor(relative, dtype=centres.dtype).expand(batch)

    def whitened(values: Tensor) -> Tensor:  # (batch, values, dim)
        return torch.linalg.solve_triangular(factor, values.permute(1, 2, 0), upper=False).mT

    a, b = whitened(points), whitened(centres)
    log_sums = [  # one datum after the other: the distances of all would not fit
        (-torch.cdist(a[i], b[i]).square() / (2 * width[i] ** 2)).logsumexp(1) for i in range(batch)
    ]
    log_norm = math.log(count) + dim / 2 * math.log(2 * math.pi) + dim * width.log()
    log_norm = log_norm + factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.stack(log_sums, 1) - log_norm


def _cholesky(covariance: Float[Tensor, "batch dim dim"]) -> Float[Tensor, "batch dim dim"]:
    """Factor of a covariance; where draws got stuck, its variances are bounded away from 0."""
    jitter = 1e-10 * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
    return torch.linalg.cholesky(
        covariance + jitter[:, None, None] * torch.eye(covariance.shape[-1]).to(covariance)
    )
