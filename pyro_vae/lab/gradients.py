"""Statistics of gradients that are drawn again and again."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def flat_gradient(loss: "Tensor", parameters: "list[Tensor]") -> "Tensor":
    """Gradient of a number by all parameters, as one vector; 0 where the number does not depend on them."""
    import torch

    parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def moments(gradients: "Iterable[Tensor]") -> "tuple[Tensor, Tensor, int]":
    """Mean and unbiased variance of every entry, in double precision, and the number of gradients.

    Taken one by one, by Welford's method, so that none is kept.
    """
    count, mean, squares = 0, 0.0, 0.0
    for value in gradients:
        value = value.double()
        count += 1
        change = value - mean
        mean = mean + change / count
        squares = squares + change * (value - mean)
    return mean, squares / (count - 1), count
