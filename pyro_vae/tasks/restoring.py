"""Posterior inference of degraded data, and the density of missing numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.marginal_likelihood import LogMarginal, ais
from pyro_vae.mcmc import sample_posterior
from pyro_vae.tasks.degradations import Degradation, Linear, Mask, degraded, pooling
from pyro_vae.traces import Program, likelihood
from pyro_vae.traces.blocks import check_sizes, evaluation

_DRAWS = 32  # decoded at once


class Restoration(NamedTuple):
    r"""Draws of restored data.

    Attributes:
        samples: :math:`E[x \mid z_s, y]` for draws :math:`z_s \sim p(z \mid y)`.
        mean: E[x | y], their mean over all draws: the estimate of least squared error.
        std: Standard deviation of x given y, of every number: over draws of z, and given each.
        rhat: Worst R-hat over coordinates of z, for every datum: above 1.1 the chains did not agree, so that
            some modes have too little or too much weight.
    """

    samples: Float[Tensor, "samples batch data"]
    mean: Float[Tensor, "batch data"]
    std: Float[Tensor, "batch data"]
    rhat: Float[Tensor, " batch"]


@checked
@torch.no_grad()
def restore(
    model: Program,
    guide: Program,
    degradation: Degradation,
    y: Float[Tensor, "batch observed"],
    *context: Tensor,
    num_samples: Count = 16,
    num_chains: Count = 8,
    num_draws: int = 48,
    num_warmup: int = 120,
    num_leapfrog: Count = 10,
    progress: bool = True,
) -> Restoration:
    """Draw data that may have been degraded to y.

    Args:
        model: p(x, z), with one observed site and continuous latent ones.
        guide: q(z | x), which proposes.
        degradation: Map from p(x | z) to p(y | z).
        y: Numbers that were seen, one row a datum.
        *context: Further arguments of both programs.
        num_samples: Draws to return, spread over all chains.
        num_chains: Chains of every datum, started at resampled proposals.
        num_draws: Draws of every chain.
        num_warmup: Steps before them.
        num_leapfrog: Gradients for every draw.
        progress: Show a progress bar.

    Raises:
        TypeError, ValueError, SupportError: As :func:`degraded` and ``mcmc.sample_posterior``; for codes
            of a VQ-VAE, which are discrete.
    """
    pair = degraded(model, guide, degradation, y, *context)
    if not 1 <= num_samples <= num_chains * num_draws:
        raise ValueError(f"num_samples must be from 1 to num_chains * num_draws, not {num_samples}")
    draws = sample_posterior(
        pair.model,
        *pair.batch,
        guide=pair.guide,
        num_chains=num_chains,
        num_samples=num_draws,
        num_warmup=num_warmup,
        num_leapfrog=num_leapfrog,
        progress=progress,
    )
    latents = {name: z.transpose(0, 1).flatten(0, 1).to(y.device) for name, z in draws.latents.items()}
    count = num_chains * num_draws
    kept = torch.linspace(0, count - 1, num_samples).round().long()
    means, total, squares = [], 0.0, 0.0
    guess = pair.batch[1:]
    with evaluation(model):
        for number in range(0, count, _DRAWS):
            z = {name: value[number : number + _DRAWS] for name, value in latents.items()}
            mean, variance = degradation.restored(likelihood(model, z, *guess), y)
            total = total + mean.double().sum(0)
            squares = squares + (variance + mean.square()).double().sum(0)
            means.append(mean[kept[(kept >= number) & (kept < number + _DRAWS)] - number])
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return Restoration(torch.cat(means), mean.to(y.dtype), variance.sqrt().to(y.dtype), draws.rhat)


@checked
def inpaint(
    model: Program,
    guide: Program,
    x: Float[Tensor, "batch data"],
    observed: Tensor,
    *context: Tensor,
    **settings: Any,
) -> Restoration:
    """Complete data that have missing numbers: :func:`restore` of a :class:`Mask`.

    Args:
        model: p(x, z); the numbers of x must be independent given z.
        guide: q(z | x).
        x: Data; numbers in places where nothing was observed do not count.
        observed: True where a number was observed, shape ``(batch, data)``, or ``(data,)`` for all alike.
        *context: Further arguments of both programs.
        **settings: Settings of :func:`restore`.

    Raises:
        ValueError, SupportError: As :func:`restore`; if ``observed`` is no mask for x.
    """
    return restore(model, guide, Mask(), _seen(x, observed), *context, **settings)


def _seen(x: Float[Tensor, "batch data"], observed: Tensor) -> Float[Tensor, "batch data"]:
    """Put nan where nothing was observed."""
    check_sizes((x,))
    if observed.dtype != torch.bool or observed.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"observed must be bool, of shape {tuple(x.shape)} or {tuple(x.shape[1:])} as the data; it is "
            f"{observed.dtype} of shape {tuple(observed.shape)}"
        )
    return torch.where(observed, x, math.nan)


@checked
def denoise(
    model: Program,
    guide: Program,
    y: Float[Tensor, "batch data"],
    noise_scale: Positive,
    *context: Tensor,
    **settings: Any,
) -> Restoration:
    """Remove normal noise of a known standard deviation: :func:`restore` of a :class:`Linear`."""
    return restore(model, guide, Linear(None, noise_scale), y, *context, **settings)


@checked
def super_resolve(
    model: Program,
    guide: Program,
    y: Float[Tensor, "batch observed"],
    shape: Sequence[Count],
    factor: int,
    *context: Tensor,
    noise_scale: Positive = 0.02,
    **settings: Any,
) -> Restoration:
    """Restore images of ``shape`` from y, the means of blocks of ``factor`` times ``factor`` pixels.

    :func:`restore` of a :class:`Linear` with the matrix :func:`pooling`.
    """
    degradation = Linear(pooling(shape, factor).to(y), noise_scale)
    return restore(model, guide, degradation, y, *context, **settings)


class ConditionalDensity(NamedTuple):
    r""":math:`\log p(x_{\mathrm{missing}} \mid x_{\mathrm{observed}})` of every datum, nats.

    Attributes:
        values: :math:`\log p(x) - \log p(x_{\mathrm{observed}})`.
        std_error: Monte Carlo error of the difference.
        complete: Estimates of log p(x).
        observed: Estimates of log p(x_observed).
    """

    values: Float[Tensor, " batch"]
    std_error: Float[Tensor, " batch"]
    complete: LogMarginal
    observed: LogMarginal


Estimate = Callable[..., LogMarginal]


def annealed(model: Program, guide: Program, *batch: Tensor, **settings: Any) -> LogMarginal:
    """Run annealed importance sampling from the guide, with 200 temperatures if not given."""
    return ais(model, *batch, guide=guide, **({"num_temperatures": 200} | settings))


@checked
def log_missing(
    model: Program,
    guide: Program,
    x: Float[Tensor, "batch data"],
    observed: Tensor,
    *context: Tensor,
    estimate: Estimate = annealed,
    **settings: Any,
) -> ConditionalDensity:
    r"""Estimate the density of missing numbers given those observed, by two estimates of evidence.

    Both are lower bounds in expectation, so that the difference errs to no known side; where both have
    small errors it is right.

    Args:
        model: p(x, z); the numbers of x must be independent given z.
        guide: q(z | x).
        x: Complete data.
        observed: True where a number counts as observed, as in :func:`inpaint`.
        *context: Further arguments of both programs.
        estimate: Function from a pair and its arguments to log p: :func:`annealed` from the guide, or
            ``importance_sampling``.
        **settings: Settings of the estimate.

    Raises:
        TypeError: If the estimate gives something else than a ``LogMarginal``.
        ValueError, SupportError: As :func:`degraded` and the estimate; if ``observed`` is no mask for x.
    """
    pair = degraded(model, guide, Mask(), _seen(x, observed), *context)
    complete = estimate(model, guide, x, *context, **settings)
    if not isinstance(complete, LogMarginal):
        raise TypeError(
            f"estimate must give a LogMarginal, as annealed and importance_sampling do, not a "
            f"{type(complete).__name__}"
        )
    partial = estimate(pair.model, pair.guide, *pair.batch, **settings)
    return ConditionalDensity(
        complete.values - partial.values,
        (complete.std_error.square() + partial.std_error.square()).sqrt(),
        complete,
        partial,
    )
