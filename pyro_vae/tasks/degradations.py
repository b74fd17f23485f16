r"""Degradations of data: from p(x | z) to p(y | z) of what was seen, and the pair that sees it."""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import found
from pyro_vae.distributions import Observed, SupportError, base_distribution, bounds, check_support
from pyro_vae.latents import posterior_mean
from pyro_vae.traces import Program, guide_distributions, likelihood, log_joint, modules_of, sample
from pyro_vae.traces.blocks import check_sizes, evaluation, split

_ROUNDS = 5  # of filling in what the encoder is to see
_STARTS = 16
_DATA_AT_ONCE = 256


class Moments(NamedTuple):
    r"""Mean and variance of the single numbers of x given z and y."""

    mean: Tensor
    variance: Tensor


def _variance(distribution: Distribution) -> Tensor:
    try:
        return distribution.variance
    except NotImplementedError:
        raise ValueError(
            f"{type(base_distribution(distribution)).__name__} does not say its variance, which restoring "
            "data takes: give the class the property variance, or choose another family"
        ) from None


class Degradation(nn.Module, abc.ABC):
    """Map from p(x | z) to p(y | z), and back."""

    @abc.abstractmethod
    def forward(self, of_x: Distribution) -> Distribution:
        """Return p(y | z) for p(x | z)."""

    @abc.abstractmethod
    def blank(self, y: Float[Tensor, "batch observed"]) -> Float[Tensor, "batch data"]:
        """Return something of the shape of x."""

    def check(self, of_x: Distribution, y: Float[Tensor, "batch observed"]) -> None:
        """Raise ``SupportError`` if y cannot be what was seen of such an x."""
        of_y = self(of_x)
        if y.shape[1:] != of_y.event_shape:
            raise SupportError(
                f"what was seen has {y.shape[1]} numbers a row, and the degradation leaves "
                f"{of_y.event_shape[0]} of what the model observes"
            )
        check_support(of_y, y, site="what was seen")

    @abc.abstractmethod
    def restored(self, of_x: Distribution, y: Float[Tensor, "batch observed"]) -> Moments:
        """Return E[x | z, y] and Var[x | z, y] for p(x | z)."""


class Mask(Degradation):
    """Missing numbers: y is x with nan in their places. Numbers must be independent given z."""

    def forward(self, of_x: Distribution) -> Distribution:
        """Density of the numbers that are not nan."""
        return of_x if isinstance(base_distribution(of_x), Observed) else Observed(of_x)

    def blank(self, y: Float[Tensor, "batch observed"]) -> Float[Tensor, "batch data"]:
        """Put 0 where nothing was observed."""
        return y.nan_to_num(0.0)

    def restored(self, of_x: Distribution, y: Float[Tensor, "batch observed"]) -> Moments:
        """Observed numbers, and E[x | z] elsewhere."""
        missing = y.isnan()
        return Moments(torch.where(missing, of_x.mean, y), torch.where(missing, _variance(of_x), 0.0))


class Linear(Degradation):
    r""":math:`y = A x + \epsilon`, :math:`\epsilon \sim N(0, \sigma^2 I)`.

    Exact where p(x | z) is a product of normals. For any other product, such as of Bernoullis, p(y | z) is
    the normal with the same mean and variance, :math:`N(A\,E[x], A \operatorname{Var}[x] A^T + \sigma^2 I)`,
    and E[x | z, y] the best linear estimate: good where many numbers of x make one of y.

    Args:
        matrix: A, shape ``(observed, data)``; None for the identity, which is noise alone.
        noise_scale: :math:`\sigma > 0`, in the unit of x.

    Raises:
        ValueError: If the noise_scale is not positive and finite, or the matrix is none.
    """

    matrix: Tensor | None

    def __init__(self, matrix: Any, noise_scale: float) -> None:
        super().__init__()
        if not 0 < noise_scale < math.inf:
            raise ValueError(
                f"noise_scale must be positive and finite, not {noise_scale}: without any noise most data "
                "are impossible; a small number stands for none"
            )
        is_matrix = isinstance(matrix, Tensor) and matrix.dim() == 2 and matrix.is_floating_point()
        if matrix is not None and not (is_matrix and bool(matrix.isfinite().all())):
            raise ValueError(
                f"matrix must be a tensor of finite floats, of shape (observed, data), not {found(matrix)}"
            )
        self.register_buffer("matrix", matrix)
        # Each number of x is in one number of y at most, so those of y are independent, too.
        self.is_disjoint = matrix is None or bool(((matrix != 0).sum(0) <= 1).all())
        self.noise_scale = noise_scale

    def forward(self, of_x: Distribution) -> Distribution:
        """Normal density of y."""
        mean, variance = of_x.mean, _variance(of_x)
        noise = self.noise_scale**2
        if self.matrix is None:
            return dist.Normal(mean, (variance + noise).sqrt(), validate_args=False).to_event(1)
        if mean.shape[-1] != self.matrix.shape[1]:
            raise ValueError(
                f"the matrix takes data of {self.matrix.shape[1]} numbers, and the model observes "
                f"{mean.shape[-1]}"
            )
        mean = mean @ self.matrix.T
        if self.is_disjoint:
            variance = variance @ self.matrix.square().T + noise
            return dist.Normal(mean, variance.sqrt(), validate_args=False).to_event(1)
        return dist.MultivariateNormal(mean, self._covariance(variance), validate_args=False)

    def blank(self, y: Float[Tensor, "batch observed"]) -> Float[Tensor, "batch data"]:
        """Zeros."""
        return y if self.matrix is None else y.new_zeros(len(y), self.matrix.shape[1])

    def check(self, of_x: Distribution, y: Float[Tensor, "batch observed"]) -> None:
        """Raise ``SupportError`` if y is further from what data can make than noise explains."""
        super().check(of_x, y)
        low, high = bounds(of_x)
        if self.matrix is not None:
            is_up = self.matrix > 0
            low, high = (
                torch.where(is_up, self.matrix * one, self.matrix * other)
                .masked_fill(self.matrix == 0, 0.0)
                .sum(1)
                for one, other in ((low, high), (high, low))
            )
        slack = 10 * self.noise_scale
        outside = int(((y < low - slack) | (y > high + slack)).sum())
        if outside:
            raise SupportError(
                f"what was seen holds {outside} numbers of {y.numel()} (values from {y.min():g} to "
                f"{y.max():g}) that are more than ten noise_scale ({self.noise_scale:g}) away from what data "
                "of this family can make: scale it as the data were, or give the noise_scale that it has"
            )

    def _covariance(self, variance: Tensor) -> Tensor:
        noise = self.noise_scale**2 * torch.eye(len(self.matrix)).to(self.matrix)
        return (self.matrix * variance.unsqueeze(-2)) @ self.matrix.T + noise

    def restored(self, of_x: Distribution, y: Float[Tensor, "batch observed"]) -> Moments:
        r""":math:`E + G (y - A E)` and :math:`V - G A V`, :math:`G = V A^T (A V A^T + \sigma^2 I)^{-1}`."""
        mean, variance = of_x.mean, _variance(of_x)
        if self.matrix is None:
            gain = variance / (variance + self.noise_scale**2)
            return Moments(mean + gain * (y - mean), variance * (1 - gain))
        error = y - mean @ self.matrix.T
        if self.is_disjoint:
            each = variance @ self.matrix.square().T + self.noise_scale**2
            gain = variance * self.matrix.sum(0) / each[..., self.matrix.abs().argmax(0)]
            spread = error[..., self.matrix.abs().argmax(0)]
            return Moments(mean + gain * spread, variance * (1 - gain * self.matrix.sum(0)))
        cross = self.matrix * variance.unsqueeze(-2)  # A V
        gain = torch.linalg.solve(self._covariance(variance), cross)
        change = (error.unsqueeze(-2) @ gain).squeeze(-2)
        return Moments(mean + change, variance - (cross * gain).sum(-2))


def pooling(shape: Sequence[int], factor: int) -> Float[Tensor, "observed data"]:
    """The matrix that averages blocks of ``factor`` times ``factor`` pixels.

    Args:
        shape: Shape of an image, (height, width) or (height, width, colours).
        factor: Must divide height and width.

    Raises:
        ValueError: If it does not, or for another kind of shape.
    """
    if len(shape) not in (2, 3):
        raise ValueError(
            f"an image has shape (height, width) or (height, width, colours), not {tuple(shape)}"
        )
    height, width, *colours = shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"blocks of {factor} x {factor} pixels do not fill images of {height} x {width}")
    pixels = torch.eye(math.prod(shape)).reshape(-1, height, width, math.prod(colours))
    pooled = nn.functional.avg_pool2d(pixels.movedim(3, 1), factor)
    return pooled.movedim(1, 3).flatten(1).T.contiguous()


# ---------------------------------------------------------------------------- degraded pairs


class DegradedModel(nn.Module):
    """p(y, z): the model observes y where it observed x.

    Args:
        model: p(x, z), with one observed site.
        degradation: Map from p(x | z) to p(y | z).
    """

    def __init__(self, model: Program, degradation: Degradation) -> None:
        super().__init__()
        self.model, self.degradation = model, degradation

    def forward(self, y: Float[Tensor, "batch observed"], *guess: Tensor) -> None:
        """Sample the sites of the model; ``guess`` are its arguments, with a guess in place of x."""
        with pyro.validation_enabled(False), _Degrade(self.degradation, y):
            self.model(*guess)


class _Degrade(Messenger):
    def __init__(self, degradation: Degradation, y: Tensor) -> None:
        super().__init__()
        self.degradation, self.y = degradation, y

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not site_is_subsample(msg) and not msg["infer"].get("is_auxiliary"):
            msg["fn"], msg["value"] = self.degradation(msg["fn"]), self.y


class DegradedGuide(nn.Module):
    """Proposal for p(z | y): q(z | x) at a guess of x.

    Args:
        guide: q(z | x).
    """

    def __init__(self, guide: Program) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, y: Float[Tensor, "batch observed"], *guess: Tensor) -> None:
        """Sample the sites of the guide."""
        self.guide(*guess)


class DegradedPair(NamedTuple):
    """Pair for what was seen, and its arguments: for any estimator, ``estimate(model, guide, *batch)``.

    Attributes:
        model: p(y, z).
        guide: A proposal for p(z | y).
        batch: y, and the arguments of the complete pair with a guess in place of x.
    """

    model: DegradedModel
    guide: DegradedGuide
    batch: tuple[Tensor, ...]


@torch.no_grad()
def degraded(
    model: Program, guide: Program, degradation: Degradation, y: Tensor, *context: Tensor
) -> DegradedPair:
    r"""Make the pair that observes y in place of x.

    Its guide sees a guess of x, found by going back and forth a few times: take E[x | z, y], and for the next
    z the mean of q(z | x) (Rezende, Mohamed & Wierstra, *Stochastic Backpropagation*, 2014, with means in
    place of draws). Of several, started at draws from the prior, the one with the largest p(y, z) is taken.

    Args:
        model: p(x, z), with one observed site.
        guide: q(z | x).
        degradation: Map from p(x | z) to p(y | z).
        y: Numbers that were seen, one row a datum; for a :class:`Mask` with nan where nothing was.
        *context: Further arguments of both programs.

    Raises:
        TypeError: If the degradation is a class and no instance, or an argument no tensor.
        ValueError: If the prior has no draws (an autoencoder's), the model does not observe one site, the
            degradation is for data of another size, or the arguments have no rows or differ in length.
        SupportError: If y is of another type than the weights, holds infinite numbers or
            numbers that the likelihood does not cover (of a :class:`Linear` more than ten
            ``noise_scale`` from them), or has not the size that the degradation makes.
    """
    if not isinstance(degradation, Degradation):
        raise TypeError(f"degradation must be an instance, as in Mask(), not {degradation!r}")
    check_sizes((y, *context))
    parameter = next((p for module in modules_of(model) for p in module.parameters()), y)
    if y.dtype != parameter.dtype:
        raise SupportError(
            f"what was seen holds {y.dtype}, and the networks' weights {parameter.dtype}: use "
            f"y.to({parameter.dtype})"
        )
    if y.dim() != 2 or y.isinf().any() or (y.isnan().any() and not isinstance(degradation, Mask)):
        raise SupportError(
            f"what was seen has shape {tuple(y.shape)} and {int((~y.isfinite()).sum())} numbers that are not "
            "finite; it must be a row of numbers for each datum, with nan only where a Mask has missing ones"
        )
    with evaluation(model, guide), pyro.validation_enabled(False):
        blocks = split((y, *context), _DATA_AT_ONCE)
        x = torch.cat([_guess(model, guide, degradation, *block) for block in blocks])
    takes_missing = any(getattr(module, "missing", False) is True for module in modules_of(guide))
    seen = y if takes_missing and isinstance(degradation, Mask) else x
    return DegradedPair(DegradedModel(model, degradation), DegradedGuide(guide), (y, seen, *context))


def _guess(model: Program, guide: Program, degradation: Degradation, y: Tensor, *context: Tensor) -> Tensor:
    """Return the most probable of several guesses of x, one a datum."""
    count = len(y)
    y, *context = (part.repeat(_STARTS, *(1,) * (part.dim() - 1)) for part in (y, *context))
    codes, _ = sample(model, degradation.blank(y), *context)
    degradation.check(likelihood(model, codes, degradation.blank(y), *context), y[:count])
    for _ in range(_ROUNDS):
        of_x = likelihood(model, codes, degradation.blank(y), *context)
        x = degradation.restored(of_x, y).mean.squeeze(0)
        codes = {
            name: posterior_mean(guide, x, *context, site=name).unsqueeze(0)
            for name in guide_distributions(guide, x, *context)
        }
    log_prob = sum(log_joint(DegradedModel(model, degradation), codes, y, x, *context))
    best = log_prob.reshape(_STARTS, count).argmax(0)
    return x.reshape(_STARTS, count, -1)[best, torch.arange(count, device=best.device)]
