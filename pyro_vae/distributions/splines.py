r"""Monotone rational-quadratic splines as transforms (Durkan et al., *Neural Spline Flows*, 2019).

Pyro's own splines choose values by masks, whose number depends on the data, so that no graph can be captured
of them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from pyro.distributions.torch_transform import TransformModule
from pyro.nn import DenseNN
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional as F  # noqa: N812

_LEAST = 1e-3  # share of a bin, and derivative


class RationalQuadratic:
    r"""A spline through K bins on [-bound, bound], the identity outside of it; :math:`C^1` and increasing.

    Args:
        parameters: Shape ``(*, 3 K - 1)`` for values of shape ``(*,)``: logits of the bins' widths, of their
            heights, and the derivatives at the inner knots before a softplus.
        bound: End of the spline.
    """

    def __init__(self, parameters: Tensor, bound: float) -> None:
        bins = (parameters.shape[-1] + 1) // 3
        widths, heights, slopes = parameters.split([bins, bins, bins - 1], -1)
        self.bound = bound
        self.x, self.y = self._knots(widths), self._knots(heights)
        # At parameters 0 it is the identity.
        inner = _LEAST + (1 - _LEAST) * F.softplus(slopes) / math.log(2)
        self.slopes = F.pad(inner, (1, 1), value=1.0)

    def _knots(self, logits: Tensor) -> Tensor:
        shares = _LEAST + (1 - _LEAST * logits.shape[-1]) * logits.softmax(-1)
        return F.pad(2 * self.bound * shares.cumsum(-1), (1, 0)) - self.bound

    def _bin(self, value: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Return left end, width, bottom, height and both derivatives of the bins that values lie in."""
        index = (value.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)

        def at(table: Tensor, offset: int = 0) -> Tensor:
            return table.expand(*index.shape[:-1], -1).gather(-1, index + offset).squeeze(-1)

        left, bottom = at(self.x), at(self.y)
        return left, at(self.x, 1) - left, bottom, at(self.y, 1) - bottom, at(self.slopes), at(self.slopes, 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values, and the logarithms of the derivatives."""
        inside = x.abs() < self.bound
        safe = torch.where(inside, x, 0.0)
        left, width, bottom, height, first, second = self._bin(safe, self.x)
        slope, t = height / width, (safe - left) / width
        mixed = t * (1 - t)
        denominator = slope + (first + second - 2 * slope) * mixed
        y = bottom + height * (slope * t.square() + first * mixed) / denominator
        numerator = second * t.square() + 2 * slope * mixed + first * (1 - t).square()
        log_derivative = 2 * slope.log() + numerator.log() - 2 * denominator.log()
        return torch.where(inside, y, x), torch.where(inside, log_derivative, 0.0)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the numbers at which the spline takes these values."""
        inside = y.abs() < self.bound
        safe = torch.where(inside, y, 0.0)
        left, width, bottom, height, first, second = self._bin(safe, self.y)
        slope, above = height / width, safe - bottom
        bend = above * (first + second - 2 * slope)
        a, b, c = height * (slope - first) + bend, height * first - bend, -slope * above
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        return torch.where(inside, left + width * 2 * c / (-b - root), y)


class SplineCoupling(TransformModule):
    """Second half of the dimensions through splines that a network computes from the first half.

    Args:
        dim: Dimensions.
        hidden: Units of the network.
        bins: Bins of each spline.
        bound: End of the splines; outside of it they are the identity.
    """

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, dim: int, hidden: Sequence[int], bins: int, bound: float) -> None:
        super().__init__(cache_size=1)
        self.sizes, self.bound = [dim // 2, dim - dim // 2], bound
        self.net = DenseNN(self.sizes[0], list(hidden), param_dims=[self.sizes[1] * (3 * bins - 1)])

    def _spline(self, first: Tensor) -> RationalQuadratic:
        return RationalQuadratic(self.net(first).unflatten(-1, (self.sizes[1], -1)), self.bound)

    def _call(self, x: Tensor) -> Tensor:
        first, second = x.split(self.sizes, -1)
        return torch.cat([first, self._spline(first)(second)[0]], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        first, second = y.split(self.sizes, -1)
        return torch.cat([first, self._spline(first).inverse(second)], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over the second half."""
        first, second = x.split(self.sizes, -1)
        return self._spline(first)(second)[1].sum(-1)


class SplineAutoregressive(Transform):
    """Every dimension through a spline that a masked network computes from those before.

    Args:
        net: The network, from ``(*, dim)`` to ``(*, 3 bins - 1, dim)``.
        bound: End of the splines; outside of it they are the identity.
    """

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, net: Callable[[Tensor], Tensor], bound: float) -> None:
        super().__init__(cache_size=1)
        self.net, self.bound = net, bound

    def _spline(self, x: Tensor) -> RationalQuadratic:
        return RationalQuadratic(self.net(x).movedim(-2, -1), self.bound)

    def _call(self, x: Tensor) -> Tensor:
        return self._spline(x)(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # one more dimension is right after each pass
            x = self._spline(x).inverse(y)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over all dimensions."""
        return self._spline(x)(x)[1].sum(-1)
