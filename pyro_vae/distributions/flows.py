r"""Normalising flows: :math:`z = T_n \circ \dots \circ T_1(\epsilon)`, as families made of Pyro's transforms.

.. math:: \log q(z) = \log q_0(\epsilon) - \sum_i \log \big|\det \partial T_i / \partial \epsilon_i\big| .

A :class:`Flow` is a family like any other. As a posterior, the encoder computes the parameters of the base
distribution :math:`q_0` and a context for the transforms; as a prior, ``Unconditional(Flow(...), dim)``.
Which transforms are cheap in which direction is what they differ by:

======================  =======  ==========  =================================================================
transforms              draw     density of  reference
                                 any z
======================  =======  ==========  =================================================================
affine_coupling         1        1           Dinh, Sohl-Dickstein & Bengio 2017
spline_coupling         1        1           Durkan et al. 2019
masked_autoregressive   dim      1           Papamakarios, Pavlakou & Murray 2017: for priors
inverse_autoregressive  1        dim         Kingma et al. 2016: for posteriors
spline_autoregressive   1        dim         Durkan et al. 2019: for posteriors
planar                  1        none        Rezende & Mohamed 2015
sylvester               1        none        van den Berg et al. 2018
======================  =======  ==========  =================================================================

(passes through a transform's network). The density of a draw is cheap everywhere.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import pyro.distributions as dist
import pyro.distributions.transforms as T  # noqa: N812
import torch
from jaxtyping import Float
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_vae.arguments import Count, NonNegative, Positive, Range, checked
from pyro_vae.distributions.base import Family
from pyro_vae.distributions.continuous import DiagNormal
from pyro_vae.distributions.splines import SplineAutoregressive, SplineCoupling

SeveralDims = Annotated[int, Range(2)]
_BINS = 8  # of splines


class Flow(Family):
    """A base distribution sent through transforms.

    Args:
        transforms: Pyro's transform modules, or others of their kind; the first acts first. Those that are
            conditional get the context, others are the same for all conditions.
        context_dim: Numbers of the context, which follow the parameters of the base distribution.
        base: Family of the base distribution; its N(0, I) at parameters 0 makes it a prior's.
        inverted: Send the base distribution through the transforms' inverses, the last one first.
    """

    @checked
    def __init__(
        self,
        transforms: Sequence[nn.Module],
        *,
        context_dim: NonNegative = 0,
        base: Family | None = None,
        inverted: bool = False,
    ) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.base = DiagNormal() if base is None else base
        self.context_dim = context_dim
        self.inverted = inverted

    def num_params(self, dim: int) -> int:
        """Return the number of parameters of the base distribution, plus the context."""
        return self.base.num_params(dim) + self.context_dim

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Transformed base distribution; batch shape ``(*batch,)``."""
        parameters, context = eta.split([eta.shape[-1] - self.context_dim, self.context_dim], -1)
        transforms = [self._given(transform, context) for transform in self.transforms]
        if self.inverted:
            transforms = [transform.inv for transform in reversed(transforms)]
        return dist.TransformedDistribution(self.base(parameters), transforms)

    @staticmethod
    def _given(transform: nn.Module, context: Tensor) -> Transform:
        if isinstance(transform, ConditionalTransformModule):
            return transform.condition(context)
        # Pyro's transforms remember their last values: let that be as short-lived as the distribution.
        return copy.copy(transform)

    @property
    def link(self) -> Callable[[Tensor], Tensor] | None:
        """Link of the base distribution, which leaves the transforms out."""
        return self.base.link


def _with_reversals(transforms: Sequence[nn.Module]) -> list[nn.Module]:
    """Put a reversal of the order of dimensions between any two transforms."""
    mixed: list[nn.Module] = []
    for transform in transforms:
        mixed += [Reversal(), transform] if mixed else [transform]
    return mixed


class Reversal(TransformModule):
    """Reversal of the order of dimensions."""

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self) -> None:
        # So that the transform before is given the very tensor that it made, and need not be inverted.
        super().__init__(cache_size=1)

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    _inverse = _call

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros."""
        return x.new_zeros(x.shape[:-1])


class ConditionalAutoregressive(ConditionalTransformModule):
    """Every dimension through a map whose parameters come from those before and a context.

    Args:
        make: Makes the transform of a masked network that was given the context.
        dim: Dimensions.
        context_dim: Numbers of the context.
        hidden: Units of the masked network.
        param_dims: Numbers of parameters of the map of a dimension.
    """

    def __init__(
        self,
        make: Callable[[partial], Transform],
        dim: int,
        context_dim: int,
        hidden: Sequence[int],
        param_dims: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.make = make
        units, order = _at_least(dim, hidden), torch.arange(dim)
        self.net = ConditionalAutoRegressiveNN(dim, context_dim, units, list(param_dims), permutation=order)

    def condition(self, context: Tensor) -> Transform:
        """Return the transform given a context."""
        return self.make(partial(self.net, context=context))


def _stable_affine(net: partial) -> Transform:
    r"""Every dimension :math:`y_d = \sigma_d x_d + (1 - \sigma_d) \mu_d`."""
    # Its inverse goes by these numbers of Python instead of a tensor's values, so that it can be captured.
    net.permutation = range(net.func.input_dim)
    return T.AffineAutoregressive(net, stable=True)


class _MaskedNet(AutoRegressiveNN):
    """Pyro's network for weights of any dtype: in Pyro 1.9.2 inverses begin with zeros of the default one."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.to(self.layers[0].weight.dtype))


def _at_least(dim: int, hidden: Sequence[int]) -> list[int]:
    """Units of a masked network, no layer of which may have fewer than ``dim``."""
    return [max(dim, units) for units in hidden]


@checked
def affine_coupling(dim: SeveralDims, *, depth: Count = 4, hidden: Sequence[Count] = (64, 64)) -> Flow:
    """RealNVP: half of the dimensions are shifted and scaled by functions of the other half, in turns.

    Args:
        dim: Dimensions.
        depth: Number of transforms.
        hidden: Units of their networks.
    """
    return Flow(_with_reversals([T.affine_coupling(dim, list(hidden)) for _ in range(depth)]))


@checked
def spline_coupling(
    dim: SeveralDims, *, depth: Count = 2, hidden: Sequence[Count] = (64, 64), bound: Positive = 5.0
) -> Flow:
    """RealNVP as in :func:`affine_coupling`, with monotone rational splines on ``[-bound, bound]``."""
    return Flow(_with_reversals([SplineCoupling(dim, hidden, _BINS, bound) for _ in range(depth)]))


@checked
def masked_autoregressive(dim: SeveralDims, *, depth: Count = 3, hidden: Sequence[Count] = (64,)) -> Flow:
    """Every dimension is shifted and scaled by functions of those before: density in one pass, for priors."""
    transforms = [T.AffineAutoregressive(_MaskedNet(dim, _at_least(dim, hidden))) for _ in range(depth)]
    return Flow(_with_reversals(transforms), inverted=True)


@checked
def inverse_autoregressive(
    dim: SeveralDims, *, depth: Count = 2, hidden: Sequence[Count] = (320,), context_dim: NonNegative = 32
) -> Flow:
    """IAF: draws in one pass, for posteriors; the encoder gives the base distribution and a context.

    Args:
        dim: Dimensions.
        depth: Number of transforms.
        hidden: Units of their masked networks; no layer may have fewer than ``dim``.
        context_dim: Numbers of the encoder's output that the transforms see.
    """
    transforms = [ConditionalAutoregressive(_stable_affine, dim, context_dim, hidden) for _ in range(depth)]
    return Flow(_with_reversals(transforms), context_dim=context_dim)


@checked
def spline_autoregressive(
    dim: SeveralDims,
    *,
    depth: Count = 1,
    hidden: Sequence[Count] = (64,),
    context_dim: NonNegative = 32,
    bound: Positive = 5.0,
) -> Flow:
    """IAF as in :func:`inverse_autoregressive`, with monotone rational splines on ``[-bound, bound]``."""
    make = partial(SplineAutoregressive, bound=bound)
    transforms = [
        ConditionalAutoregressive(make, dim, context_dim, hidden, [3 * _BINS - 1]) for _ in range(depth)
    ]
    return Flow(_with_reversals(transforms), context_dim=context_dim)


@checked
def planar(
    dim: Count, *, depth: Count = 4, hidden: Sequence[Count] = (32,), context_dim: NonNegative = 32
) -> Flow:
    """Each transform expands or contracts along one direction, which a network computes from the context."""
    transforms = [T.conditional_planar(dim, context_dim, list(hidden)) for _ in range(depth)]
    return Flow(transforms, context_dim=context_dim)


@checked
def sylvester(dim: SeveralDims, *, depth: Count = 4) -> Flow:
    """Each transform bends along ``dim`` orthogonal directions, the same ones for all data."""
    return Flow([T.sylvester(dim, dim) for _ in range(depth)])
