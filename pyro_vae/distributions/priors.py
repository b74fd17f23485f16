r"""Priors that are no :class:`~pyro_vae.distributions.Unconditional` family."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import Count, Finite, Positive, checked, found
from pyro_vae.distributions.base import Conditional, UncheckedDistribution, check_ends
from pyro_vae.distributions.continuous import DiagNormal


class StandardNormal(nn.Module):
    r"""The prior of the paper, :math:`p(z) = N(0, I)`; batch shape (), event shape ``(latent_dim,)``."""

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        """N(0, I)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class Flat(nn.Module):
    r"""No preference, :math:`p(z) \propto 1` on :math:`\mathbb R^d`: the prior of an autoencoder.

    It is improper: its log-density counts as 0 everywhere, and nothing can be drawn from it. Programs need a
    value all the same when they are run by themselves, and get one from N(0, I); ``sample`` and estimators
    of log p(x) refuse.
    """

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        """Improper distribution of batch shape () and event shape ``(latent_dim,)``."""
        return _Flat(self.zero)


class _Flat(dist.ImproperUniform):
    def __init__(self, zero: Tensor) -> None:
        self.zero = zero
        super().__init__(constraints.real_vector, torch.Size(), zero.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.randn((*sample_shape, *self.zero.shape), dtype=self.zero.dtype, device=self.zero.device)

    expand = dist.TorchDistribution.expand


class UniformBox(nn.Module):
    r"""Uniform on a box, :math:`p(z) = \prod_j U(z_j; l, h)`; needs a posterior on it, :class:`LogitNormal`.

    Args:
        latent_dim: Dimensions of z.
        low: l.
        high: h.
    """

    @checked
    def __init__(self, latent_dim: Count, low: Finite = 0.0, high: Finite = 1.0) -> None:
        super().__init__()
        check_ends(low, high)
        self.register_buffer("low", torch.full((latent_dim,), float(low)), persistent=False)
        self.register_buffer("high", torch.full((latent_dim,), float(high)), persistent=False)

    def forward(self) -> Distribution:
        """Uniform distribution of batch shape () and event shape ``(latent_dim,)``."""
        return dist.Uniform(self.low, self.high, validate_args=False).to_event(1)


class MixtureOfNormals(nn.Module):
    r"""A learned mixture, :math:`p(z) = \sum_k \pi_k N(z; \mu_k, \operatorname{diag} \sigma_k^2)`.

    Means start at draws from N(0, I), scales at 1, weights equal.

    Args:
        latent_dim: Dimensions of z.
        components: Number of normals.
        min_scale: Lower bound of every :math:`\sigma_k`; a component cannot collapse to a point.
        max_scale: Upper bound of every :math:`\sigma_k`.
    """

    @checked
    def __init__(
        self,
        latent_dim: Count,
        components: Count = 20,
        *,
        min_scale: Positive = 1e-2,
        max_scale: Positive = 1e2,
    ) -> None:
        super().__init__()
        self.normals = DiagNormal(min_scale=min_scale, max_scale=max_scale)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent_dim))
        self.log_variance = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self) -> Distribution:
        """Mixture of batch shape () and event shape ``(latent_dim,)``."""
        normals = self.normals(torch.cat([self.loc, self.log_variance], -1))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)


class _EvenMixture(UncheckedDistribution):
    """A mixture of the distributions of a batch, all of the same weight.

    Args:
        components: Distribution of batch shape ``(components,)`` and event shape ``(dim,)``; values are
            expanded to the batch, as the density of a flow demands.
    """

    def __init__(self, components: Distribution) -> None:
        self.components = components
        super().__init__((), components.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return self.components.support

    def log_prob(self, value: Tensor) -> Tensor:
        (count,) = self.components.batch_shape
        each = value.unsqueeze(-2).expand(*value.shape[:-1], count, -1)
        return self.components.log_prob(each).logsumexp(-1) - math.log(count)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        draws = self.components.sample(torch.Size(sample_shape))
        which = torch.randint(*self.components.batch_shape, (*sample_shape, 1, 1), device=draws.device)
        return draws.take_along_dim(which, -2).squeeze(-2)


class VampPrior(nn.Module):
    r"""The mixture of posteriors at pseudo-inputs, :math:`p(z) = \frac1K \sum_k q(z \mid u_k)`.

    Tomczak & Welling, *VAE with a VampPrior*, 2018.

    .. code-block:: python

        model, guide = vae(784, 40)
        model.prior = VampPrior(guide.posterior, mnist.train.x[:500])

    The posterior stays with the guide: its parameters are not among ``model.parameters()``, ``.to(device)``
    of the model does not move it, and model and guide must be copied together
    (``copy.deepcopy((model, guide))``).

    Args:
        posterior: Posterior of the guide, :math:`q(z \mid x)`; it needs a density at any z.
        inputs: :math:`u_1 \dots u_K`, shape ``(K, data)``, such as some of the training data.
        learned: Make the inputs parameters, which start where they are; else they are kept.

    Raises:
        ValueError: If the posterior does not take such inputs, as one that is given a context besides.
    """

    @checked
    def __init__(
        self, posterior: Conditional, inputs: Float[Tensor, "components data"], *, learned: bool = True
    ) -> None:
        super().__init__()
        if inputs.dim() != 2 or len(inputs) == 0:
            raise ValueError(
                f"inputs must be pseudo-inputs, (components, numbers of a datum), not {found(inputs)}"
            )
        if inputs.isnan().any():
            raise ValueError(
                "pseudo-inputs start at data, and in these numbers are missing (nan): fill them in"
            )
        try:
            of_one = posterior(inputs[:1])
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the posterior does not take pseudo-inputs of shape {tuple(inputs.shape)}: {error}. One "
                "that is given labels or covariates besides needs another prior, such as MixtureOfNormals"
            ) from error
        try:
            with torch.random.fork_rng():
                of_one.log_prob(of_one.sample().clone())
        except KeyError as error:  # Pyro's word for: not among the draws that I remember
            raise ValueError(
                "the posterior has no density of given z, since its transforms have no inverse: take "
                "another, such as inverse_autoregressive"
            ) from error
        self._posterior = (posterior,)  # in a tuple, which nn.Module does not look into
        inputs = inputs.detach().clone()
        if learned:
            self.inputs = nn.Parameter(inputs)
        else:
            self.register_buffer("inputs", inputs)

    def forward(self) -> Distribution:
        """Mixture of batch shape () and event shape ``(latent_dim,)``."""
        return _EvenMixture(self._posterior[0](self.inputs))
