"""Common ground of all densities: families, the data that they cover, and densities made of families."""

import abc
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Count, check, checked, found
from pyro_vae.errors import NetworkError, UserError


class SupportError(UserError, ValueError):
    """Data that a density does not cover."""


STORED_AS_BYTES = "Whole numbers stored as bytes are read as grey values k / 255: store them as int64."
_WAYS_OUT = {
    constraints.boolean: (
        "Binarise the data (binarization='dynamic', 'fixed' or 'threshold'), or score grey values by "
        "a density such as ContinuousBernoulli. If the cross-entropy of grey pixels is what you want, "
        "ask for it: Bernoulli(cross_entropy=True); it is no log-likelihood."
    ),
    constraints.unit_interval: "Scale the data to [0, 1], or use a density of all real numbers, DiagNormal.",
    constraints.real: "Remove or fill in what is not finite.",
}


class UncheckedDistribution(dist.TorchDistribution):
    """Base of this package's own distributions, whose parameters and values torch does not check.

    Attributes:
        way_out: Advice for data outside the support, if :func:`check_support` has none that fits.
        is_around_another: True if the distribution of the numbers is ``base_dist``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own form)
    way_out: str | None = None
    is_around_another = False

    def __init__(self, batch_shape: Sequence[int], event_shape: Sequence[int] = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)


def base_distribution(distribution: Distribution) -> Distribution:
    """Return the distribution of one number, without the ``to_event`` and ``expand`` around it."""
    around = dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
    while isinstance(distribution, around) or getattr(distribution, "is_around_another", False):
        distribution = distribution.base_dist
    return distribution


def is_point_mass(distribution: Distribution) -> bool:
    """Return whether all mass is at one point among the real numbers, so that there is no density."""
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
    way_out = getattr(base, "way_out", None) or _WAYS_OUT.get(support, f"Its support is {support}.")
    raise SupportError(
        f"{site} holds {_range(outside)} ({outside.numel()} of {x.numel()} numbers), outside the "
        f"support of {name}. {way_out}"
    )


def _of_numbers(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of single numbers, where that of the whole is one of independent numbers."""
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def bounds(distribution: Distribution) -> tuple[float, float]:
    """Return the least and the largest number of the support, infinite where it has no end."""
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
    """Return whether two distributions have the same values: all real numbers, one interval, a sphere."""

    def described(distribution: Distribution) -> tuple:
        support = _of_numbers(distribution.support)
        bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
        return type(support), *(None if b is None else torch.as_tensor(b).unique().tolist() for b in bounds)

    return described(first) == described(second)


def soft_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Identity well inside (low, high), bent smoothly so that it stays there.

    At a distance d from both ends it differs from the identity by less than 2 exp(-d). Below, it may end by
    exp(low - high) beyond ``low``: 10^-6 for scales between 0.001 and 1,000.
    """
    value = low + F.softplus(value - low)
    return high - F.softplus(high - value)


def inverse_softplus(value: float) -> float:
    """Return the number whose softplus is ``value`` > 0."""
    return value + math.log(-math.expm1(-value))


def logit(mean: Tensor) -> Tensor:
    """Logit of numbers in [0, 1], which are kept 0.001 away from the ends."""
    return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


def identity(mean: Tensor) -> Tensor:
    """Return the mean itself: the link of families over all real numbers."""
    return mean


def check_ends(low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``low`` and ``high`` are the ends of an interval."""
    if not low < high:
        raise ValueError(f"low must be below high, not {low} and {high}")


class ScaleBounds:
    r"""Map from the logarithms of variances to scales in (min_scale, max_scale).

    Between the bounds :math:`\log \sigma` is :func:`soft_clamp`-ed: with bounds 0.001 and 1,000 this changes
    :math:`\sigma = 1` by less than 0.1 %, with narrower ones by more.
    """

    def __init__(self, min_scale: float, max_scale: float) -> None:
        if not 0 < min_scale < max_scale < math.inf:
            raise ValueError(f"scales must satisfy 0 < min_scale < max_scale < inf: {min_scale}, {max_scale}")
        self.log_bounds = (math.log(min_scale), math.log(max_scale))

    def __call__(self, log_variance: Tensor) -> Tensor:
        """Return the scales."""
        return soft_clamp(log_variance / 2, *self.log_bounds).exp()

    def log_variance(self, scale: float) -> float:
        """Return the log variance of a scale; raise ``ValueError`` unless it lies between the bounds."""
        low, high = self.log_bounds
        if not low < math.log(scale) < high:
            raise ValueError(
                f"scale must lie between {math.exp(low):g} and {math.exp(high):g}, not at {scale}"
            )
        bent = high - inverse_softplus(high - math.log(scale))
        return 2 * (low + inverse_softplus(bent - low))


# ---------------------------------------------------------------------------------------- families


class Family(nn.Module, abc.ABC):
    r"""Parameters :math:`\eta \to` distribution. Knows no network.

    Attributes:
        params_per_dim: Numbers of :math:`\eta` that a dimension of the datum takes: the network is sized from
            it. :math:`\eta` holds them one kind after another: all locations, then all scales. A family that
            needs another number of them overrides :meth:`num_params`.
        link: Function from means to the first ``dim`` numbers of :math:`\eta`, as in a generalised linear
            model; None if no mean determines them.
    """

    params_per_dim: int
    link: Callable[[Tensor], Tensor] | None = None

    @abc.abstractmethod
    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Distribution of a datum of ``params / params_per_dim`` numbers, batch shape ``(*batch,)``."""

    def num_params(self, dim: int) -> int:
        r"""Numbers in the :math:`\eta` of a datum of ``dim`` numbers."""
        return self.params_per_dim * dim

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        r"""The :math:`\eta` to start from when the data have this mean: an output bias for the network.

        Raises:
            NotImplementedError: If the family has no parameters that a mean determines.
        """
        if self.link is None:
            raise NotImplementedError(
                f"{type(self).__name__} does not say which parameters have a given mean: give it a link"
            )
        location = self.link(mean)
        return torch.cat([location, location.new_zeros(self.num_params(len(mean)) - len(location))])


class Conditional(nn.Module):
    r"""A conditional density, :math:`p(\cdot \mid c) = \mathrm{family}(\mathrm{net}(c))`.

    Args:
        net: Any module, ``(*batch, context) -> (*batch, params)``; estimators fold samples into the batch for
            one that takes (batch, context) only.
        family: Makes a distribution of the network's outputs.
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
        """Distribution given ``c``, batch shape ``(*batch,)``."""
        return self.family(outputs_of(self.net, c, self.outputs, self.role, type(self.family).__name__))


# Words of torch about tensors that do not fit each other, rather than about memory, devices or bugs.
_OF_SHAPES = re.compile(
    r"shape|size|dtype|dimension|channels|Expected .*input|scalar type|same device|on the same"
)


def outputs_of(net: nn.Module, c: Tensor, size: int | None, role: str, of: str) -> Tensor:
    """Return the network's outputs; raise ``NetworkError`` unless there are ``size`` numbers for a datum.

    Args:
        net: The network.
        c: Its input.
        size: Numbers along the last axis; None if nobody knows.
        role: Name of the network in messages: encoder, decoder.
        of: Name of the family that takes the outputs.
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
        family: Family of the density.
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
        """Distribution of batch shape () and event shape ``(dim,)``."""
        return self.family(self.eta)
