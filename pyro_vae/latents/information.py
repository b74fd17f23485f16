r"""Information about x in the dimensions of z, and how all data together fill the prior.

A dimension is *active* if the mean of its posterior moves with the data,

.. math:: A_j = \operatorname{Var}_x\big( E_{q(z \mid x)}[z_j] \big) > 0.01

(Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, 2016, section 5.1). The information that
dimension j carries about a datum is :math:`KL(q(z_j \mid x) \| p(z_j))`; where it is zero for all data the
posterior has collapsed onto the prior.

Averaged over N data the divergence has two parts (Hoffman & Johnson, *ELBO surgery*, 2016), with the
*aggregate posterior* :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`:

.. math:: \frac1N \sum_n KL(q(z \mid x_n) \| p(z)) = I_q(n; z) + KL(q(z) \| p(z)) :

the *mutual information* of z and the number of the datum, at most log N, and the *marginal divergence*, 0
where samples of the prior are such as the encoder makes of data.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_vae.arguments import Count, checked
from pyro_vae.distributions import QuantizedPoint, base_distribution, perplexity
from pyro_vae.traces import (
    Program,
    draw_guide,
    guide_distributions,
    log_guide,
    log_joint,
    model_distributions,
    unmoved,
)

_DRAWS = 500
_NUMBERS_AT_ONCE = 2**22


@torch.no_grad()
def posterior_mean(guide: Program, *batch: Tensor, site: str = "z") -> Float[Tensor, "batch latent"]:
    r"""Return the codes of data, :math:`E_{q(z \mid x)}[z]`; of 500 draws where it is not known (flows)."""
    posterior = _at(site, guide_distributions(guide, *batch))
    try:
        mean = posterior.mean
    except NotImplementedError:
        mean = sum(posterior.sample() for _ in range(_DRAWS)) / _DRAWS
    return mean.squeeze(0)


@checked
def active_units(
    guide: Program, *batch: Tensor, site: str = "z", threshold: float = 0.01
) -> Bool[Tensor, " latent"]:
    """Tell which dimensions are active: those whose posterior mean varies by more than ``threshold``."""
    return posterior_mean(guide, *batch, site=site).var(0, correction=0) > threshold


@torch.no_grad()
def posterior_variance(guide: Program, *batch: Tensor, site: str = "z") -> Float[Tensor, " latent"]:
    r""":math:`\frac1N \sum_n \operatorname{Var}_{q(z \mid x_n)}[z_j]` of every dimension.

    Near 1 under N(0, I) a dimension says nothing of x; near 0 its posteriors are almost points. From 500
    draws where the variance is not known (flows).
    """
    posterior = _at(site, guide_distributions(guide, *batch))
    try:
        variance = posterior.variance
    except NotImplementedError:
        variance = torch.stack([posterior.sample() for _ in range(_DRAWS)]).var(0)
    return variance.squeeze(0).mean(0)


@checked
@torch.no_grad()
def kl_per_dim(
    model: Program, guide: Program, *batch: Tensor, site: str = "z"
) -> Float[Tensor, "batch latent"]:
    r""":math:`KL(q(z_j \mid x) \| p(z_j))` of every datum and dimension, nats, in closed form.

    Raises:
        ValueError: If prior or posterior are not independent over dimensions (a mixture prior is not), or
            torch knows no closed form for the two.
    """
    with unmoved(model, guide):
        posterior = base_distribution(_at(site, guide_distributions(guide, *batch)))
        prior = base_distribution(_at(site, model_distributions(model, guide, *batch)))
    for role, distribution in ("posterior", posterior), ("prior", prior):
        if distribution.event_shape:
            raise ValueError(
                f"the {role} of {site!r}, {type(distribution).__name__}, is not independent over "
                "dimensions, so its divergence does not fall into parts; elbo(...).kl has the whole, where "
                "there is a density (an autoencoder has none)"
            )
    try:
        return kl_divergence(posterior, prior).squeeze(0)
    except NotImplementedError:
        names = f"{type(posterior).__name__} from {type(prior).__name__}"
        raise ValueError(f"torch knows no closed form for the divergence of {names}") from None


class Estimate(NamedTuple):
    """A mean and its Monte Carlo error, nats."""

    mean: float
    std_error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std_error:.2g}"


class AggregatePosterior(NamedTuple):
    r"""Mean divergence of some data in its two parts (see the module); nats per datum.

    Attributes:
        kl: :math:`\frac1N \sum_n KL(q(z \mid x_n) \| p(z))`.
        mutual_information: :math:`I_q(n; z) \le \log N`.
        marginal_kl: :math:`KL(q(z) \| p(z))`.
    """

    kl: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate


@checked
@torch.no_grad()
def aggregate_posterior(
    model: Program, guide: Program, *batch: Tensor, num_samples: Count = 2
) -> AggregatePosterior:
    r"""Compare the aggregate posterior of these N data with the prior, over all latent sites.

    From draws :math:`z \sim q(z \mid x_n)`, each scored under all N posteriors, which takes time
    :math:`N^2`; a few thousand data do.

    Args:
        model: A Pyro program that keeps the contract.
        guide: Its guide, with a density at any z.
        *batch: Arguments of both programs.
        num_samples: Draws for every datum; the errors of a single one are not known.

    Raises:
        ValueError: If the guide has no density, such as an autoencoder's.
    """
    num_data, log_aggregate = len(batch[0]), []
    with unmoved(model, guide):
        latents, log_q = draw_guide(guide, *batch, num_samples=num_samples)
        log_prior = log_joint(model, latents, *batch).log_prior
        # (draws, 1, *event): every draw is scored at every datum.
        draws = {name: z.flatten(0, 1).unsqueeze(1) for name, z in latents.items()}
        count = max(1, _NUMBERS_AT_ONCE // (sum(z[0].numel() for z in draws.values()) * num_data))
        for start in range(0, num_samples * num_data, count):
            part = {name: z[start : start + count] for name, z in draws.items()}
            part = {name: z.expand(len(z), num_data, *z.shape[2:]) for name, z in part.items()}
            log_aggregate.append(log_guide(guide, part, *batch).logsumexp(1) - math.log(num_data))
    aggregate = torch.cat(log_aggregate).reshape(num_samples, num_data)
    differences = log_q - log_prior, log_q - aggregate, aggregate - log_prior
    return AggregatePosterior(*map(_mean, differences))


def _mean(values: Float[Tensor, "samples batch"]) -> Estimate:
    """Average over all; the error comes from the draws alone, and takes two or more for every datum."""
    count, num_data = values.shape
    error = values.double().var(0).mean().item() / (count * num_data) if count > 1 else math.nan
    return Estimate(values.double().mean().item(), math.sqrt(error))


class CodeUsage(NamedTuple):
    """Usage of a codebook by data.

    Attributes:
        perplexity: Exponential of the entropy of codes: K if all K are used alike.
        share: Share of the K codes that occur at all.
    """

    perplexity: float
    share: float


@torch.no_grad()
def code_usage(guide: Program, *batch: Tensor, site: str = "z") -> CodeUsage:
    """Measure the usage of a VQ-VAE's codes by these data.

    Raises:
        ValueError: If the guide's site is no vector of a codebook.
    """
    posterior = base_distribution(_at(site, guide_distributions(guide, *batch)))
    if not isinstance(posterior, QuantizedPoint):
        raise ValueError(
            f"the guide's site {site!r} is no code of a codebook, but {type(posterior).__name__}"
        )
    codes = posterior.codebook.nearest(posterior.mean)
    num_codes = posterior.codebook.num_codes
    return CodeUsage(perplexity(codes, num_codes).item(), len(codes.unique()) / num_codes)


def _at(site: str, distributions: dict[str, Distribution]) -> Distribution:
    if site not in distributions:
        raise ValueError(f"there is no site {site!r}, only {sorted(distributions)}: say which by site=")
    return distributions[site]
