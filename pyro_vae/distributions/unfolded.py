"""A distribution over one axis of rows, seen with the axes that the rows were made of."""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_vae.distributions.base import UncheckedDistribution


def unfolded(distribution: Distribution, axes: Sequence[int], hidden: int = 0) -> Distribution:
    """Return the distribution with its first axis taken apart into ``axes``.

    Args:
        distribution: Its first axis has as many rows as ``axes`` make.
        axes: Their sizes.
        hidden: How many of the first ones do not matter to it, and are left out.
    """
    if isinstance(distribution, dist.Independent):
        base = unfolded(distribution.base_dist, axes, hidden)
        return dist.Independent(base, distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, dist.MaskedDistribution):
        mask = distribution._mask  # Pyro 1.9.2 keeps it there
        if isinstance(mask, Tensor) and mask.shape[:1] == (math.prod(axes),):
            mask = mask.unflatten(0, tuple(axes))[(0,) * hidden]
        return unfolded(distribution.base_dist, axes, hidden).mask(mask)
    if math.prod(axes) == axes[-1]:  # nothing was folded
        return distribution.expand((*axes[hidden:], *distribution.batch_shape[1:]))
    names = [n for n in distribution.arg_constraints if isinstance(vars(distribution).get(n), Tensor)]
    values = {name: vars(distribution)[name] for name in names}
    plain = type(distribution).__module__ == "pyro.distributions.torch"
    if plain and values and all(value.shape == distribution.batch_shape for value in values.values()):
        # Of single numbers, such as a normal: the class itself, whose divergences are known.
        values = {name: value.unflatten(0, tuple(axes))[(0,) * hidden] for name, value in values.items()}
        return type(distribution)(**values, validate_args=distribution._validate_args)
    return _Unfolded(distribution, axes, hidden)


def is_unfolded(distribution: Distribution) -> bool:
    """Return whether the distribution inside still has its rows in one axis."""
    while not isinstance(distribution, _Unfolded):
        if not hasattr(distribution, "base_dist"):
            return False
        distribution = distribution.base_dist
    return True


class _Unfolded(UncheckedDistribution):
    """Distribution made by :func:`unfolded`; it computes with the rows as they are."""

    is_around_another = True

    def __init__(self, base_dist: Distribution, axes: Sequence[int], hidden: int) -> None:
        self.base_dist, self.hidden = base_dist, hidden
        self.axes = (*axes, *base_dist.batch_shape[1:])
        self.has_rsample = base_dist.has_rsample
        self.has_enumerate_support = base_dist.has_enumerate_support
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(self.axes[hidden:], base_dist.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        return self._apart(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        return self._apart(self.base_dist.variance)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(self.base_dist.sample, sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(self.base_dist.rsample, sample_shape)

    def _draw(self, draw: Callable[[torch.Size], Tensor], sample_shape: Sequence[int]) -> Tensor:
        rows = draw(torch.Size(sample_shape))
        value = self._apart(rows, len(sample_shape))
        if not sample_shape and not self.hidden:
            self._drawn = value, rows  # flows without an inverse know a draw only as the same object
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats; with as many axes as the distribution has, or the value if it has more."""
        if self._drawn is not None and value is self._drawn[0]:
            rows = self._drawn[1]
        else:
            rows = value.expand(*self.axes, *self.event_shape)
            rows = rows.reshape(*self.base_dist.batch_shape, *self.event_shape)
        log_prob = self.base_dist.log_prob(rows).reshape(self.axes)
        shown = max(len(self.batch_shape), value.dim() - self.event_dim)
        return log_prob[(0,) * (len(self.axes) - shown)]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.base_dist.enumerate_support(expand=False)
        ones = (1,) * len(self.batch_shape)
        values = values.reshape(len(values), *ones, *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values

    def _apart(self, rows: Tensor, num_before: int = 0) -> Tensor:
        before, event = rows.shape[:num_before], rows.shape[rows.dim() - len(self.event_shape) :]
        whole = rows.reshape(*before, *self.axes, *event)
        return whole[(slice(None),) * num_before + (0,) * self.hidden]
