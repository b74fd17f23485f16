r"""The variational autoencoder (Kingma & Welling, *Auto-Encoding Variational Bayes*, 2013).

.. math:: p_\theta(x, z) = p_\theta(z)\, p_\theta(x \mid z), \qquad q_\phi(z \mid x) .

Both are Pyro programs: what is sampled, in which order, is what ``forward`` says. Prior, likelihood and
posterior are values that are passed in. The parameters :math:`\theta` are ``model.parameters()``, and
:math:`\phi` are ``guide.parameters()``.
"""

from collections.abc import Sequence

import pyro
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import Count, NonNegative, checked
from pyro_vae.distributions import (
    Bernoulli,
    Conditional,
    DiagNormal,
    Family,
    Missing,
    StandardNormal,
    check_support,
    same_support,
)
from pyro_vae.models.program import check_inputs, check_rows, register, validating
from pyro_vae.nets import MLP, WithMissing


class VAEModel(nn.Module):
    r""":math:`p_\theta(x, z) = p(z)\, p(x \mid z)`, independently for every datum; given c, p(x | z, c).

    Args:
        prior: :math:`p(z)`: a module whose ``forward()`` returns a distribution of batch shape ().
        likelihood: :math:`p(x \mid z)`: a module from z to a distribution, such as a ``Conditional``; given
            c, from (z, c) side by side.
    """

    @checked
    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Shaped[Tensor, "batch ..."], c: Float[Tensor, "data context"] | None = None) -> None:
        """Sample sites ``z`` (latent) and ``x`` (observed) in the plate ``data``.

        Raises:
            SupportError: If ``x`` is not what the likelihood is a density of (while Pyro validates).
        """
        register(self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            likelihood = self.likelihood(beside(z, c))
            if validating():
                check_support(likelihood, x)
            pyro.sample("x", likelihood, obs=x)


class VAEGuide(nn.Module):
    r""":math:`q_\phi(z \mid x)`, amortised: one network gives the posterior of any datum; or q(z | x, c).

    Args:
        posterior: A module from x to a distribution of z, such as a ``Conditional``; given c, from (x, c)
            side by side.
        missing: x may hold nan, where a number is missing.
    """

    @checked
    def __init__(self, posterior: nn.Module, *, missing: bool = False) -> None:
        super().__init__()
        self.posterior = posterior
        self.missing = missing

    def forward(self, x: Shaped[Tensor, "batch ..."], c: Float[Tensor, "data context"] | None = None) -> None:
        """Sample site ``z`` in the plate ``data``."""
        register(self)
        if validating():
            check_inputs(self, x, c, missing=self.missing)
        with pyro.plate("data", len(x)):
            posterior = self.posterior(beside(x, c))
            if validating():
                check_rows(x, posterior)
            pyro.sample("z", posterior)


def beside(
    values: Shaped[Tensor, "*batch dim"], c: Float[Tensor, "data context"] | None = None
) -> Shaped[Tensor, "*batch both"]:
    """Values with the context of their datum behind, if there is one."""
    if c is None:
        return values
    return torch.cat([values, c.expand(*values.shape[:-1], -1)], -1)


@checked
def vae(
    data_dim: Count,
    latent_dim: Count,
    *,
    hidden: Sequence[Count] = (500,),
    prior: nn.Module | None = None,
    family: Family | None = None,
    posterior: Family | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    context_dim: NonNegative = 0,
    missing: bool = False,
) -> tuple[VAEModel, VAEGuide]:
    """A VAE's model and guide, sized to fit each other.

    Args:
        data_dim: Numbers in a datum.
        latent_dim: Dimensions of z.
        hidden: Units of the hidden layers of the encoder; the decoder has them in reverse order.
        prior: p(z); by default ``StandardNormal(latent_dim)``. (A ``VampPrior`` is made of the guide's
            posterior, so it is set afterwards: ``model.prior = VampPrior(guide.posterior, ...)``.)
        family: The family of p(x | z); by default ``Bernoulli()``.
        posterior: The family of q(z | x); by default ``DiagNormal()``.
        encoder: The network of q(z | x), ``(*, data_dim + context_dim) ->
            (*, posterior.num_params(latent_dim))``; by default an :class:`~pyro_vae.nets.MLP` of tanh units.
        decoder: The network of p(x | z), ``(*, latent_dim + context_dim) ->
            (*, family.num_params(data_dim))``; by default an :class:`~pyro_vae.nets.MLP` with tanh units.
        context_dim: Numbers of a condition c, such as a label as ``one_hot(y, 10).float()``: both programs
            then take ``(x, c)`` and are p(x, z | c) and q(z | x, c); the prior is not conditioned.
        missing: x may hold nan where a number is missing at random: the likelihood leaves it out
            (:class:`~pyro_vae.distributions.Missing`), and the encoder sees 0 and which numbers were observed
            (:class:`~pyro_vae.nets.WithMissing`; an encoder of your own is put into it and takes
            ``2 (data_dim + context_dim)`` numbers).

    Returns:
        The model and the guide, to be passed to ``SVI``, ``log_weights``, ``importance_sampling`` and to
        Pyro's own ``SVI`` and ``Predictive``.

    Raises:
        TypeError: If prior, family or posterior is something else, such as a class instead of an instance.
        ValueError: If there is no dimension, the prior is not one of vectors of ``latent_dim`` numbers, or
            the posterior is one of other values than the prior.
    """
    prior = StandardNormal(latent_dim) if prior is None else prior
    family = Bernoulli() if family is None else family
    posterior = DiagNormal() if posterior is None else posterior
    _check_prior(prior, posterior, latent_dim)
    if encoder is None:
        inputs = (1 + missing) * (data_dim + context_dim)
        encoder = MLP(inputs, posterior.num_params(latent_dim), hidden)
    if decoder is None:
        decoder = MLP(latent_dim + context_dim, family.num_params(data_dim), hidden[::-1])
    if missing:
        encoder, family = WithMissing(encoder), Missing(family)
    return (
        VAEModel(prior, Conditional(decoder, family, data_dim, role="decoder")),
        VAEGuide(Conditional(encoder, posterior, latent_dim, role="encoder"), missing=missing),
    )


def _check_prior(prior: nn.Module, posterior: Family, latent_dim: int) -> None:
    """Raise ``ValueError`` unless prior and posterior are of the same vectors."""
    of_prior = failed = None
    try:
        of_prior = prior()
    except TypeError as error:
        failed = error
    if not isinstance(of_prior, Distribution):
        raise TypeError(
            "prior must be a module whose forward() takes nothing and returns a distribution, such as "
            f"StandardNormal(5), not a {type(prior).__name__}; of a family Unconditional(DiagNormal(), 5) "
            "makes a prior"
        ) from failed
    of_posterior = posterior(torch.zeros(posterior.num_params(latent_dim)))
    try:
        with torch.random.fork_rng():
            of_posterior.sample()
    except RuntimeError as error:
        raise ValueError(
            f"posterior ({type(posterior).__name__}) is not one of latent_dim = {latent_dim} numbers, as "
            f"inverse_autoregressive({latent_dim}) is"
        ) from error
    if (shape := tuple(of_prior.event_shape)) != (latent_dim,):
        raise ValueError(f"the prior is one of data of shape {shape}, but latent_dim is {latent_dim}")
    if not same_support(of_prior, of_posterior):
        raise ValueError(
            f"prior and posterior must be of the same values, but {type(prior).__name__} is of "
            f"{of_prior.support} and {type(posterior).__name__} of {of_posterior.support}: a box goes with "
            "LogitNormal(low, high), a sphere with ProjectedNormal, all real numbers with the others"
        )
