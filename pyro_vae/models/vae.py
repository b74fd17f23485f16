r"""The variational autoencoder (Kingma & Welling, *Auto-Encoding Variational Bayes*, 2013).

.. math:: p_\theta(x, z) = p_\theta(z)\, p_\theta(x \mid z), \qquad q_\phi(z \mid x) .

Both are Pyro programs: what is sampled, in which order, is what ``forward`` says. Prior, likelihood and
posterior are values that are passed in. The parameters :math:`\theta` are ``model.parameters()``, and
:math:`\phi` are ``guide.parameters()``.
"""

from collections.abc import Sequence

import pyro
from jaxtyping import Shaped
from torch import Tensor, nn

from pyro_vae.distributions import (
    Bernoulli,
    Conditional,
    DiagNormal,
    Family,
    StandardNormal,
    check_support,
)
from pyro_vae.models.program import check_data, register, validating
from pyro_vae.nets import MLP


class VAEModel(nn.Module):
    r""":math:`p_\theta(x, z) = p(z)\, p(x \mid z)`, independently for every datum.

    Args:
        prior: :math:`p(z)`: a module whose ``forward()`` returns a distribution of batch shape ().
        likelihood: :math:`p(x \mid z)`: a module from z to a distribution, such as a ``Conditional``.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> None:
        """Sample sites ``z`` (latent) and ``x`` (observed) in the plate ``data``.

        Raises:
            SupportError: If ``x`` is not what the likelihood is a density of (while Pyro validates).
        """
        register(self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            likelihood = self.likelihood(z)
            if validating():
                check_support(likelihood, x)
            pyro.sample("x", likelihood, obs=x)


class VAEGuide(nn.Module):
    r""":math:`q_\phi(z \mid x)`, amortised: one network gives the posterior of any datum.

    Args:
        posterior: A module from x to a distribution of z, such as a ``Conditional``.
    """

    def __init__(self, posterior: nn.Module) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> None:
        """Sample site ``z`` in the plate ``data``."""
        register(self)
        if validating():
            check_data(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def vae(
    data_dim: int,
    latent_dim: int,
    *,
    hidden: Sequence[int] = (500,),
    prior: nn.Module | None = None,
    family: Family | None = None,
    posterior: Family | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
) -> tuple[VAEModel, VAEGuide]:
    """A VAE's model and guide, sized to fit each other.

    Args:
        data_dim: Numbers in a datum.
        latent_dim: Dimensions of z.
        hidden: Units of the hidden layers of the encoder; the decoder has them in reverse order.
        prior: p(z); by default ``StandardNormal(latent_dim)``.
        family: The family of p(x | z); by default ``Bernoulli()``.
        posterior: The family of q(z | x); by default ``DiagNormal()``.
        encoder: The network of q(z | x), ``(*, data_dim) -> (*, latent_dim * posterior.params_per_dim)``;
            by default an :class:`~pyro_vae.nets.MLP` with tanh units.
        decoder: The network of p(x | z), ``(*, latent_dim) -> (*, data_dim * family.params_per_dim)``;
            by default an :class:`~pyro_vae.nets.MLP` with tanh units.

    Returns:
        The model and the guide, to be passed to ``SVI``, ``log_weights``, ``importance_sampling`` and to
        Pyro's own ``SVI`` and ``Predictive``.

    Raises:
        ValueError: If the prior is not one of vectors of ``latent_dim`` numbers.
    """
    prior = StandardNormal(latent_dim) if prior is None else prior
    family = Bernoulli() if family is None else family
    posterior = DiagNormal() if posterior is None else posterior
    if (shape := tuple(prior().event_shape)) != (latent_dim,):
        raise ValueError(f"the prior is one of data of shape {shape}, but latent_dim is {latent_dim}")
    if encoder is None:
        encoder = MLP(data_dim, latent_dim * posterior.params_per_dim, hidden)
    if decoder is None:
        decoder = MLP(latent_dim, data_dim * family.params_per_dim, tuple(reversed(hidden)))
    return (
        VAEModel(prior, Conditional(decoder, family)),
        VAEGuide(Conditional(encoder, posterior)),
    )
