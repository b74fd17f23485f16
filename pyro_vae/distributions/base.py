"""What all densities share: families, the data that they cover, and densities made of families."""

import abc
import math
import re

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Count, check, checked, found
from pyro_vae.distributions.unfolded import Unfolded
from pyro_vae.errors import NetworkError, UserError


class SupportError(UserError, ValueError):
    """Data that a density does not cover."""


_STORED_AS_BYTES = (
    "Whole numbers stored as bytes (uint8) are read as grey values k / 255: store them as int64."
)
_COUNTS = (
    "It is a distribution of whole numbers; grey images are none. For them take DiscretizedLogistic, "
    f"BetaBinomial or GreyCategorical; for amounts a density such as DiagNormal. {_STORED_AS_BYTES}"
)
_WAYS_OUT = {
    "Bernoulli": (
        "Binarise the data (binarization='dynamic', 'fixed' or 'threshold'), or score grey values by "
        "a density such as ContinuousBernoulli. If the cross-entropy of grey pixels is what you want, "
        "ask for it: Bernoulli(cross_entropy=True); it is no log-likelihood."
    ),
    "ContinuousBernoulli": "Scale the data to [0, 1], or use DiagNormal.",
    "BernoulliCrossEntropy": "Scale the data to [0, 1].",
    **dict.fromkeys(
        ("Normal", "Laplace", "StudentT", "LowRankMultivariateNormal", "MultivariateNormal"),
        "Remove or fill in what is not finite.",
    ),
    **dict.fromkeys(("Poisson", "NegativeBinomial", "ZeroInflated"), _COUNTS),
    "GreyLevels": (
        "It is a distribution of grey levels 0, 1/(levels - 1), ..., 1: give bytes as they are stored "
        "(binarization='none'), and the number of levels, if it is not 256."
    ),
    "Categorical": (
        "Its categories are the numbers 0, 1, ..., one less than there are (by default, in the training "
        f"data); Categorical(n) makes room for more. {_STORED_AS_BYTES}"
    ),
}


def base_distribution(distribution: Distribution) -> Distribution:
    """The distribution of one number, without the ``to_event`` and ``expand`` around it."""
    around = dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution | Unfolded
    while isinstance(distribution, around):
        distribution = distribution.base_dist
    return distribution


def is_point_mass(distribution: Distribution) -> bool:
    """Whether all of its mass is at one point among the real numbers, so that it has no density."""
    return isinstance(base_distribution(distribution), dist.Delta)


def check_support(distribution: Distribution, x: Tensor, site: str = "x") -> None:
    """Raise :class:`SupportError` if ``x`` is not a batch of data that ``distribution`` covers.

    The message names the family, the offending range and the way out. This costs a pass over ``x`` and,
    on a GPU, a synchronisation.

    Args:
        distribution: The density of a datum; its ``event_shape`` and ``support`` are what counts.
        x: Data, shape ``(*, *event_shape)``.
        site: What to call ``x`` in the message.
    """
    check(site, x, Tensor)
    event = tuple(distribution.event_shape)
    base = base_distribution(distribution)
    name = type(base).__name__.lstrip("_").removeprefix("Whole")
    shape = tuple(x.shape)
    if len(shape) <= len(event):
        raise SupportError(
            f"{site} has {len(shape)} axes, but programs take a batch, (data, numbers of a datum): a single "
            f"datum is the batch {site}[None]"
        )
    if shape[len(shape) - len(event) :] != event:
        raise SupportError(
            f"{site} has shape {shape}, but {name} is a density of data of shape {event}: flatten "
            f"the data, or build the pair with data_dim={math.prod(shape[1:])}"
        )
    if hasattr(base, "check_support"):  # a table, whose columns have families of their own
        base.check_support(x, site)
        return
    if not x.is_floating_point():
        raise SupportError(
            f"{site} holds {x.dtype}, but programs take floating-point data: {site}.to(torch.float32)"
        )
    support = _of_numbers(base.support)
    if support.is_discrete and (x > (most := 2 / torch.finfo(x.dtype).eps)).any():
        raise SupportError(
            f"{site} holds counts up to {x.max():.0f}, but {x.dtype} rounds whole numbers above {most:.0f}: "
            "use from_array(x, dtype=torch.float64), model.double() and guide.double(); or count in a larger "
            "unit"
        )
    inside = support.check(x) & ~x.isinf()  # to torch, infinity is a real number
    if bool(inside.all()):
        return
    outside = x[~inside]
    raise SupportError(
        f"{site} holds {_range(outside)} ({outside.numel()} of {x.numel()} numbers), outside the "
        f"support of {name}. {_WAYS_OUT.get(name, f'Its support is {support}.')}"
    )


def _of_numbers(support: constraints.Constraint) -> constraints.Constraint:
    """The support of single numbers, where that of the whole is one of independent numbers."""
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def bounds(distribution: Distribution) -> tuple[float, float]:
    """Between which numbers data of a family can be; without end where the support has none."""
    support = _of_numbers(base_distribution(distribution).support)
    if support is constraints.boolean:
        return 0.0, 1.0
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))


def _range(values: Tensor) -> str:
    finite = values[torch.isfinite(values)]
    parts = [f"values from {finite.min():g} to {finite.max():g}"] if len(finite) else []
    parts += ["nan"] if values.isnan().any() else []
    parts += ["infinite values"] if values.isinf().any() else []
    return " and ".join(parts)


def same_support(first: Distribution, second: Distribution) -> bool:
    """Whether two distributions are of the same values: all real numbers, the same interval, a sphere."""

    def described(distribution: Distribution) -> tuple:
        support = _of_numbers(distribution.support)
        bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
        return type(support), *(None if b is None else torch.as_tensor(b).unique().tolist() for b in bounds)

    return described(first) == described(second)


def soft_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Identity well inside (low, high), bent smoothly so that it never leaves the interval.

    At a distance d from both ends it differs from the identity by less than 2 exp(-d).
    """
    value = low + F.softplus(value - low)
    return high - F.softplus(high - value)


def inverse_softplus(value: float) -> float:
    """The number whose softplus is ``value`` > 0."""
    return value + math.log(-math.expm1(-value))


def logit(mean: Tensor) -> Tensor:
    """Logit of numbers in [0, 1], which are kept 0.001 away from the ends."""
    return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


class ScaleBounds:
    r"""From the logarithms of variances to scales in (min_scale, max_scale).

    Between the bounds :math:`\log \sigma` is :func:`soft_clamp`-ed: with bounds 0.001 and 1,000 this changes
    :math:`\sigma = 1` by less than 0.1 %, with narrower ones by more.
    """

    def __init__(self, min_scale: float, max_scale: float) -> None:
        if not 0 < min_scale < max_scale < math.inf:
            raise ValueError(f"scales must satisfy 0 < min_scale < max_scale < inf: {min_scale}, {max_scale}")
        self.log_bounds = (math.log(min_scale), math.log(max_scale))

    def __call__(self, log_variance: Tensor) -> Tensor:
        """The scales."""
        return soft_clamp(log_variance / 2, *self.log_bounds).exp()

    def log_variance(self, scale: float) -> float:
        """What gives this scale, which must lie between the bounds."""
        low, high = self.log_bounds
        bent = high - inverse_softplus(high - math.log(scale))
        return 2 * (low + inverse_softplus(bent - low))


# ---------------------------------------------------------------------------------------- families


class Family(nn.Module, abc.ABC):
    r"""Parameters :math:`\eta \to` distribution. Knows no network.

    ``params_per_dim`` says how many numbers of :math:`\eta` a dimension of the datum takes: the network is
    sized from it. :math:`\eta` holds them one kind after another: all locations, then all scales. A family
    that needs another number of them overrides :meth:`num_params`.
    """

    params_per_dim: int

    @abc.abstractmethod
    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """The distribution of a datum of ``params / params_per_dim`` numbers, batch shape ``(*batch,)``."""

    def num_params(self, dim: int) -> int:
        r"""Numbers in the :math:`\eta` of a datum of ``dim`` numbers."""
        return self.params_per_dim * dim

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        r"""The :math:`\eta` to start from when the data have this mean: an output bias for the network.

        Raises:
            NotImplementedError: If the family has no parameters that a mean determines.
        """
        location = self.location(mean)
        return torch.cat([location, location.new_zeros(self.num_params(len(mean)) - len(location))])

    def location(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " data"]:
        r"""The first ``dim`` numbers of :math:`\eta` when the data have this mean and the others are 0."""
        raise NotImplementedError(f"{type(self).__name__} does not say which parameters have a given mean")


class Conditional(nn.Module):
    r"""A conditional density, :math:`p(\cdot \mid c) = \mathrm{family}(\mathrm{net}(c))`.

    Args:
        net: Any module, ``(*batch, context) -> (*batch, params)``; estimators fold samples into the batch for
            one that takes (batch, context) only.
        family: What the network's outputs are the parameters of.
        dim: Numbers in a datum of the family, if the number of outputs is to be checked.
        role: What to call the network in messages.

    Raises:
        NetworkError: In ``forward``, if the network does not take ``c``, or its outputs are no parameters of
            the family.
    """

    @checked
    def __init__(
        self, net: nn.Module, family: Family, dim: Count | None = None, *, role: str = "network"
    ) -> None:
        super().__init__()
        self.net = net
        self.family = family
        self.outputs = None if dim is None else family.num_params(dim)
        self.role = role

    def forward(self, c: Float[Tensor, "*batch context"]) -> Distribution:
        """The distribution given ``c``, of batch shape ``(*batch,)``."""
        return self.family(outputs_of(self.net, c, self.outputs, self.role, type(self.family).__name__))


# What torch says of tensors that do not fit each other, rather than of memory, devices or bugs.
_OF_SHAPES = re.compile(
    r"shape|size|dtype|dimension|channels|Expected .*input|scalar type|same device|on the same"
)


def outputs_of(net: nn.Module, c: Tensor, size: int | None, role: str, of: str) -> Tensor:
    """The network's outputs; :class:`NetworkError` unless it takes ``c`` and gives ``size`` numbers.

    Args:
        net: The network.
        c: What it is given.
        size: Numbers along the last axis; None if nobody knows.
        role: What the network is: encoder, decoder.
        of: What is made of the numbers.
    """
    name = f"the {role} ({type(net).__name__})"
    try:
        outputs = net(c)
    except (RuntimeError, IndexError) as error:
        if isinstance(error, UserError) or not _OF_SHAPES.search(reason := str(error).strip()):
            raise
        raise NetworkError(
            f"{name} does not take {c.dtype} of shape {tuple(c.shape)} ({reason.splitlines()[0]}): build it "
            f"for vectors of {c.shape[-1]} numbers, of the same dtype and device"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.dim() == 0:
        raise NetworkError(f"{name} must give a tensor with an axis of numbers, not {found(outputs)}")
    if size is not None and outputs.shape[-1] != size:
        raise NetworkError(
            f"{name} gives {outputs.shape[-1]} numbers for a datum, but {of} takes {size} here: let its last "
            f"layer have {size} outputs"
        )
    return outputs


class Unconditional(nn.Module):
    r"""A density without a condition, :math:`p(\cdot) = \mathrm{family}(\eta)`: a prior of any family.

    ``Unconditional(Laplace(), 10)`` is a standard Laplace distribution, ``Unconditional(DiagNormal(), 10,
    learned=True)`` a normal whose mean and scales are learned.

    Args:
        family: Of the density.
        dim: Numbers in a datum (dimensions of z).
        learned: Make :math:`\eta`, which starts at 0, a parameter.
    """

    @checked
    def __init__(self, family: Family, dim: Count, *, learned: bool = False) -> None:
        super().__init__()
        self.family = family
        eta = torch.zeros(family.num_params(dim))
        if learned:
            self.eta = nn.Parameter(eta)
        else:
            self.register_buffer("eta", eta, persistent=False)

    def forward(self) -> Distribution:
        """The distribution; batch shape (), event shape ``(dim,)``."""
        return self.family(self.eta)
