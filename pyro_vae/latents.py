r"""What the latent space is like: which dimensions carry information about x, and how much.

A dimension is *active* if the mean of its posterior moves with the data,

.. math:: A_j = \operatorname{Var}_x\big( E_{q(z \mid x)}[z_j] \big) > 0.01

(Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, 2016, section 5.1). The information that
dimension j carries about a datum is :math:`KL(q(z_j \mid x) \| p(z_j))`; where it is zero for all data the
posterior has collapsed onto the prior.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_vae.distributions import base_distribution
from pyro_vae.traces import Program, guide_distributions, model_distributions

_DRAWS = 500


@torch.no_grad()
def posterior_mean(guide: Program, *batch: Tensor, site: str = "z") -> Float[Tensor, "batch latent"]:
    r"""The codes of data: :math:`E_{q(z \mid x)}[z]`, the mean of 500 draws where it is not known (flows)."""
    posterior = _at(site, guide_distributions(guide, *batch))
    try:
        mean = posterior.mean
    except NotImplementedError:
        mean = sum(posterior.sample() for _ in range(_DRAWS)) / _DRAWS
    return mean.squeeze(0)


def active_units(
    guide: Program, *batch: Tensor, site: str = "z", threshold: float = 0.01
) -> Bool[Tensor, " latent"]:
    """Which dimensions are active: the variance over data of their posterior mean is above ``threshold``."""
    return posterior_mean(guide, *batch, site=site).var(0, correction=0) > threshold


@torch.no_grad()
def kl_per_dim(
    model: Program, guide: Program, *batch: Tensor, site: str = "z"
) -> Float[Tensor, "batch latent"]:
    r""":math:`KL(q(z_j \mid x) \| p(z_j))` of every datum and dimension, nats, in closed form.

    Raises:
        ValueError: If prior or posterior are not independent over dimensions (a mixture prior is not), or
            torch knows no closed form for the two.
    """
    posterior = base_distribution(_at(site, guide_distributions(guide, *batch)))
    prior = base_distribution(_at(site, model_distributions(model, guide, *batch)))
    for role, distribution in ("posterior", posterior), ("prior", prior):
        if distribution.event_shape:
            raise ValueError(
                f"the {role} of {site!r}, {type(distribution).__name__}, is not independent over "
                "dimensions, so its divergence does not fall into parts; elbo(...).kl has the whole"
            )
    try:
        return kl_divergence(posterior, prior).squeeze(0)
    except NotImplementedError:
        names = f"{type(posterior).__name__} from {type(prior).__name__}"
        raise ValueError(f"torch knows no closed form for the divergence of {names}") from None


def _at(site: str, distributions: dict[str, Distribution]) -> Distribution:
    if site not in distributions:
        raise ValueError(f"there is no site {site!r}, only {sorted(distributions)}: say which by site=")
    return distributions[site]
