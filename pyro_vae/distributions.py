r"""Densities: modules whose ``forward`` returns a Pyro distribution.

There is one type for every density, and three roles. A *prior* :math:`p(z)` takes nothing; a *likelihood*
:math:`p(x \mid z)` and a *posterior* :math:`q(z \mid x)` are :class:`Conditional` densities: a network
computes the parameters :math:`\eta` and a :class:`Family` turns them into a distribution,

.. math:: p(x \mid c) = \mathrm{family}(x;\ \eta = \mathrm{net}(c)) .

Parameters live in the module (``.to``, ``state_dict`` and optimisers see them); densities live in the
short-lived distribution (``log_prob``, ``rsample`` and the registry of KL divergences see them). The event is
the datum, always one axis here, so ``batch_shape`` is that of the plates and nothing else.
"""

import abc
import math

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.errors import UserError


class SupportError(UserError, ValueError):
    """Data that a density does not cover."""

    def __init__(self, message: str) -> None:
        # Pyro raises errors of a program again with a table of shapes behind the message.
        super().__init__(message.split("\nTrace Shapes:")[0].strip())


_WAYS_OUT = {
    "Bernoulli": (
        "Binarise the data (binarization='dynamic', 'fixed' or 'threshold'), or score grey values by "
        "a density such as ContinuousBernoulli. If the cross-entropy of grey pixels is what you want, "
        "ask for it: Bernoulli(cross_entropy=True); it is no log-likelihood."
    ),
    "ContinuousBernoulli": "Scale the data to [0, 1], or use DiagNormal.",
    "BernoulliCrossEntropy": "Scale the data to [0, 1].",
    "Normal": "Remove or fill in what is not finite.",
}


def base_distribution(distribution: Distribution) -> Distribution:
    """The distribution of one number, without the ``to_event`` and ``expand`` around it."""
    while isinstance(distribution, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


def check_support(distribution: Distribution, x: Tensor, site: str = "x") -> None:
    """Raise :class:`SupportError` if ``x`` is not a batch of data that ``distribution`` covers.

    The message names the family, the offending range and the way out. This costs a pass over ``x`` and,
    on a GPU, a synchronisation.

    Args:
        distribution: The density of a datum; its ``event_shape`` and ``support`` are what counts.
        x: Data, shape ``(*, *event_shape)``.
        site: What to call ``x`` in the message.
    """
    event = tuple(distribution.event_shape)
    base = base_distribution(distribution)
    name = type(base).__name__.lstrip("_")
    shape = tuple(x.shape)
    if shape[len(shape) - len(event) :] != event:
        raise SupportError(
            f"{site} has shape {shape}, but {name} is a density of data of shape {event}: flatten "
            f"the data, or build the pair with data_dim={math.prod(shape[1:])}"
        )
    inside = base.support.check(x) & torch.isfinite(x)  # to torch, infinity is a real number
    if bool(inside.all()):
        return
    outside = x[~inside]
    raise SupportError(
        f"{site} holds {_range(outside)} ({outside.numel()} of {x.numel()} numbers), outside the "
        f"support of {name}. {_WAYS_OUT.get(name, f'Its support is {base.support}.')}"
    )


def _range(values: Tensor) -> str:
    finite = values[torch.isfinite(values)]
    parts = [f"values from {finite.min():g} to {finite.max():g}"] if len(finite) else []
    parts += ["nan"] if values.isnan().any() else []
    parts += ["infinite values"] if values.isinf().any() else []
    return " and ".join(parts)


def soft_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Identity well inside (low, high), bent smoothly so that it never leaves the interval.

    At a distance d from both ends it differs from the identity by less than 2 exp(-d).
    """
    value = low + F.softplus(value - low)
    return high - F.softplus(high - value)


# ---------------------------------------------------------------------------------------- families


class Family(nn.Module, abc.ABC):
    r"""Parameters :math:`\eta \to` distribution. Knows no network.

    ``params_per_dim`` says how many numbers of :math:`\eta` a dimension of the datum takes: the network is
    sized from it. :math:`\eta` holds them one kind after another: all locations, then all scales.
    """

    params_per_dim: int

    @abc.abstractmethod
    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """The distribution of a datum of ``params / params_per_dim`` numbers, batch shape ``(*batch,)``."""

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        r"""The :math:`\eta` to start from when the data have this mean: an output bias for the network."""
        raise NotImplementedError(f"{type(self).__name__} does not say which parameters have a given mean")


def _logit(mean: Tensor) -> Tensor:
    return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


class BernoulliCrossEntropy(dist.Bernoulli):
    r"""Minus the binary cross-entropy of grey values in [0, 1]; **not a density** of them.

    :math:`\sum_d x_d \log p_d + (1 - x_d) \log (1 - p_d)` integrates to less than one over [0, 1], so no
    number that comes of it is a log-likelihood of grey data. It is the expected log-probability of data
    binarised anew with probabilities x.
    """

    support = constraints.unit_interval


class Bernoulli(Family):
    r"""Bits: :math:`\log p(x) = \sum_d x_d \log p_d + (1 - x_d) \log(1 - p_d)`, logits :math:`\eta`.

    Kingma & Welling 2013, equation (11).

    Args:
        cross_entropy: Accept grey values in [0, 1] as well. The result is then a cross-entropy and no
            log-likelihood, and estimates of log p(x) say so (:class:`BernoulliCrossEntropy`).
    """

    params_per_dim = 1

    def __init__(self, *, cross_entropy: bool = False) -> None:
        super().__init__()
        self.cross_entropy = cross_entropy

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Bernoulli with logits ``eta``."""
        make = BernoulliCrossEntropy if self.cross_entropy else dist.Bernoulli
        # The support is checked by check_support, with a message that helps.
        return make(logits=eta, validate_args=False).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Logits of the mean, which is kept 0.001 away from 0 and 1."""
        return _logit(mean)


class _ContinuousBernoulli(dist.ContinuousBernoulli):
    """torch's, with a ``log_prob`` that stays normalised at large logits.

    torch computes the normalising constant from probabilities clipped at 1e-7, i.e. logits within 16:
    beyond that its density integrates to less than one (by a factor 16/30 a pixel at logit 30).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.logits
        small = logits.abs() < 1e-3
        safe = torch.where(small, 1.0, logits)
        # C = 2 atanh(1 - 2p) / (1 - 2p) = logit / tanh(logit / 2)
        log_constant = torch.where(
            small, math.log(2) + logits**2 / 12, torch.log(safe / torch.tanh(safe / 2))
        )
        return value * logits - F.softplus(logits) + log_constant


class ContinuousBernoulli(Family):
    r"""Grey values in [0, 1], as a density: :math:`p(x) = \prod_d C(p_d)\, p_d^{x_d} (1 - p_d)^{1 - x_d}`.

    With :math:`C(p) = 2 \operatorname{atanh}(1 - 2p) / (1 - 2p)`; logits :math:`\eta`. Loaiza-Ganem &
    Cunningham, *The continuous Bernoulli*, 2019.
    """

    params_per_dim = 1

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Continuous Bernoulli with logits ``eta``."""
        return _ContinuousBernoulli(logits=eta, validate_args=False).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Logits of the mean: right at 1/2, and on the right side of it elsewhere."""
        return _logit(mean)


class DiagNormal(Family):
    r"""Normal with a mean and a scale of its own for every dimension (heteroscedastic).

    :math:`\log p(x) = \sum_d \log N(x_d; \mu_d, \sigma_d^2)` with :math:`\eta = (\mu, \log \sigma^2)`:
    Kingma & Welling 2013, equation (12).

    Args:
        squash_loc: Pass the mean through a sigmoid into (0, 1), as the paper does for Frey Face.
        min_scale: Lower bound of :math:`\sigma`. Without one the density of constant pixels is unbounded.
        max_scale: Upper bound of :math:`\sigma`. Between the bounds :math:`\log \sigma` is
            :func:`soft_clamp`-ed, which changes it by less than 0.1 % at :math:`\sigma = 1`.
    """

    params_per_dim = 2

    def __init__(self, *, squash_loc: bool = False, min_scale: float = 1e-3, max_scale: float = 1e3) -> None:
        super().__init__()
        if not 0 < min_scale < max_scale < math.inf:
            raise ValueError(f"scales must satisfy 0 < min_scale < max_scale < inf: {min_scale}, {max_scale}")
        self.squash_loc = squash_loc
        self.log_bounds = (math.log(min_scale), math.log(max_scale))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals; the first half of ``eta`` are means, the second log variances."""
        loc, log_variance = eta.chunk(2, -1)
        scale = soft_clamp(log_variance / 2, *self.log_bounds).exp()
        return dist.Normal(loc.sigmoid() if self.squash_loc else loc, scale).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """The mean (its logit, if squashed) and a scale of 1."""
        return torch.cat([_logit(mean) if self.squash_loc else mean, torch.zeros_like(mean)])


class FixedScaleNormal(Family):
    r"""Normal with one given scale: :math:`\log p(x) = \sum_d \log N(x_d; \eta_d, \sigma^2)`.

    Args:
        scale: :math:`\sigma > 0`, in the unit of the data.
    """

    params_per_dim = 1

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, not {scale}")
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals with means ``eta``."""
        return dist.Normal(eta, self.scale).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """The mean itself."""
        return mean


class Conditional(nn.Module):
    r"""A conditional density, :math:`p(\cdot \mid c) = \mathrm{family}(\mathrm{net}(c))`.

    Args:
        net: Any module, ``(*batch, context) -> (*batch, params)``, for any leading shape.
        family: What the network's outputs are the parameters of.
    """

    def __init__(self, net: nn.Module, family: Family) -> None:
        super().__init__()
        self.net = net
        self.family = family

    def forward(self, c: Float[Tensor, "*batch context"]) -> Distribution:
        """The distribution given ``c``, of batch shape ``(*batch,)``."""
        return self.family(self.net(c))


# ------------------------------------------------------------------------------------------ priors


class StandardNormal(nn.Module):
    r"""The prior of the paper, :math:`p(z) = N(0, I)`; batch shape (), event shape ``(latent_dim,)``."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        """N(0, I)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class MixtureOfNormals(nn.Module):
    r"""A learned mixture, :math:`p(z) = \sum_k \pi_k N(z; \mu_k, \operatorname{diag} \sigma_k^2)`.

    Means start at draws from N(0, I), scales at 1, weights equal.

    Args:
        latent_dim: Dimensions of z.
        components: Number of normals.
        min_scale: Lower bound of every :math:`\sigma_k`; a component cannot collapse to a point.
        max_scale: Upper bound of every :math:`\sigma_k`.
    """

    def __init__(
        self,
        latent_dim: int,
        components: int = 20,
        *,
        min_scale: float = 1e-2,
        max_scale: float = 1e2,
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"a mixture needs at least one component, not {components}")
        self.normals = DiagNormal(min_scale=min_scale, max_scale=max_scale)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent_dim))
        self.log_variance = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self) -> Distribution:
        """The mixture; batch shape (), event shape ``(latent_dim,)``."""
        normals = self.normals(torch.cat([self.loc, self.log_variance], -1))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)
