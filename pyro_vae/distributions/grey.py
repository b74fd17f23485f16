r"""Families of bits and of grey values.

Grey values of an image are numbers k / (levels - 1), k = 0 ... levels - 1: 256 levels of bytes. The families
of levels (:class:`DiscretizedLogistic`, :class:`GreyCategorical`, :class:`BetaBinomial`) give each one a
probability, so their log-likelihoods are lengths of codes and compare with each other in bits per dimension.
Densities, such as :class:`ContinuousBernoulli`, compare with them where they are of dequantised data
(``binarization="dequantize"``), which bounds the probability of a level from below.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Count, Positive, Range, checked
from pyro_vae.distributions.base import STORED_AS_BYTES, Family, ScaleBounds, UncheckedDistribution, logit

Levels = Annotated[int, Range(2)]


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
    link = staticmethod(logit)

    @checked
    def __init__(self, *, cross_entropy: bool = False) -> None:
        super().__init__()
        self.cross_entropy = cross_entropy

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Bernoulli with logits ``eta``."""
        make = BernoulliCrossEntropy if self.cross_entropy else dist.Bernoulli
        # The support is checked by check_support, with a message that helps.
        return make(logits=eta, validate_args=False).to_event(1)


class _ContinuousBernoulli(dist.ContinuousBernoulli):
    """Continuous Bernoulli of torch, made right at large logits.

    torch computes all from probabilities clipped at 1e-7, i.e. logits within 16: beyond that its density
    integrates to less than one (by a factor 16/30 a pixel at logit 30), and its draws are of another one.
    """

    def _logits_away_from_0(self) -> tuple[Tensor, Tensor]:
        small = self.logits.abs() < 1e-3
        return small, torch.where(small, 1.0, self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.logits
        small, safe = self._logits_away_from_0()
        # C = 2 atanh(1 - 2p) / (1 - 2p) = logit / tanh(logit / 2)
        log_constant = torch.where(
            small, math.log(2) + logits**2 / 12, torch.log(safe / torch.tanh(safe / 2))
        )
        return value * logits - F.softplus(logits) + log_constant

    @property
    def mean(self) -> Tensor:
        small, safe = self._logits_away_from_0()
        return torch.where(small, 0.5 + self.logits / 12, -1 / torch.expm1(-safe) - 1 / safe)

    def icdf(self, value: Tensor) -> Tensor:
        # Of -|logit|, whose exponential does not overflow; the other side is its mirror image.
        size = self.logits.abs().clamp(min=1e-6)
        below = torch.where(self.logits > 0, 1 - value, value)
        inverse = (-torch.log1p(below * torch.expm1(-size)) / size).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - inverse, inverse)


class ContinuousBernoulli(Family):
    r"""Grey values in [0, 1], as a density: :math:`p(x) = \prod_d C(p_d)\, p_d^{x_d} (1 - p_d)^{1 - x_d}`.

    With :math:`C(p) = 2 \operatorname{atanh}(1 - 2p) / (1 - 2p)`; logits :math:`\eta`. Loaiza-Ganem &
    Cunningham, *The continuous Bernoulli*, 2019.
    """

    params_per_dim = 1
    link = staticmethod(logit)  # right at 1/2, and on the right side of it elsewhere

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Continuous Bernoulli with logits ``eta``."""
        return _ContinuousBernoulli(logits=eta, validate_args=False).to_event(1)


# ------------------------------------------------------------------------------------- grey levels


class _IsLevel(constraints.Constraint):
    """0, 1/(levels - 1), ..., 1, to the rounding of 32-bit floats."""

    is_discrete = True
    lower_bound, upper_bound = 0.0, 1.0

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        whole = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((whole - whole.round()).abs() < 1e-3)


class _GreyLevels(UncheckedDistribution):
    """Grey values k / (levels - 1) for a distribution of whole numbers k = 0 ... levels - 1."""

    way_out = (
        "It is a distribution of grey levels 0, 1/(levels - 1), ..., 1: give bytes as they are stored "
        "(binarization='none'), and the number of levels, if it is not 256."
    )

    def __init__(self, whole: Distribution, levels: int) -> None:
        self.whole, self.levels = whole, levels
        super().__init__(whole.batch_shape, whole.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return _IsLevel(self.levels)

    @property
    def mean(self) -> Tensor:
        return self.whole.mean / (self.levels - 1)

    @property
    def variance(self) -> Tensor:
        return self.whole.variance / (self.levels - 1) ** 2

    def log_prob(self, value: Tensor) -> Tensor:
        return self.whole.log_prob((value * (self.levels - 1)).round())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.whole.sample(sample_shape) / (self.levels - 1)


class _WholeCategorical(dist.Categorical):
    """A categorical distribution whose mean is that of the numbers and whose values may be floats."""

    way_out = (
        "Its categories are the numbers 0, 1, ..., one less than there are (by default, in the training "
        f"data); Categorical(n) makes room for more. {STORED_AS_BYTES}"
    )

    @property
    def mean(self) -> Tensor:
        return self.probs @ self._numbers()

    @property
    def variance(self) -> Tensor:
        return (self.probs @ self._numbers().square() - self.mean.square()).clamp(min=0)

    def _numbers(self) -> Tensor:
        return torch.arange(self._num_events, dtype=self.probs.dtype, device=self.probs.device)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(sample_shape).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        category = value.round().clamp(0, self._num_events - 1)
        return torch.where(value == category, super().log_prob(category), -math.inf)


def whole_categorical(eta: Float[Tensor, "*batch params"], count: int) -> Distribution:
    """Independent whole numbers below ``count``; the logits of 0 come first in ``eta``, for all numbers."""
    return _WholeCategorical(logits=eta.unflatten(-1, (count, -1)).movedim(-2, -1), validate_args=False)


class _WholeLogistic(UncheckedDistribution):
    """Mixture of logistics on [0, 1], rounded to whole numbers 0 ... levels - 1; the ends take the tails.

    Shapes of parameters: ``(*batch, components)``.
    """

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.logits, self.loc, self.scale, self.levels = logits, loc, scale, levels
        super().__init__(loc.shape[:-1])

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.unsqueeze(-1)
        bin_width = 1 / (self.levels - 1)
        centre = (value * bin_width - self.loc) / self.scale
        half = bin_width / 2 / self.scale
        below = F.logsigmoid(centre + half)  # log P(K <= k)
        above = F.logsigmoid(half - centre)  # log P(K >= k)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        inside = below + above + torch.log(-torch.expm1(-2 * half))
        log_prob = torch.where(value < 0.5, below, torch.where(value > self.levels - 1.5, above, inside))
        return (log_prob + self.logits.log_softmax(-1)).logsumexp(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.loc.shape)
        component = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
        noise = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(1e-7, 1 - 1e-7)
        drawn = self.loc + self.scale * noise.logit()
        drawn = drawn.gather(-1, component.unsqueeze(-1)).squeeze(-1)
        return (drawn.clamp(0, 1) * (self.levels - 1)).round()

    @property
    def mean(self) -> Tensor:
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        mean, square = self._moments()
        return (square - mean.square()).clamp(min=0)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E[K] as the sum of P(K > k) over k, and E[K^2] as that of (2 k + 1) P(K > k)."""
        weights = self.logits.softmax(-1)
        mean = square = torch.zeros_like(weights[..., 0])
        for k in range(self.levels - 1):
            above = weights * torch.sigmoid((self.loc - (k + 0.5) / (self.levels - 1)) / self.scale)
            mean = mean + above.sum(-1)
            square = square + (2 * k + 1) * above.sum(-1)
        return mean, square


class DiscretizedLogistic(Family):
    r"""Grey levels from a logistic distribution, or a mixture of them, in bins.

    :math:`P(x) = \sum_i \pi_i [\sigma((x + h - \mu_i) / s_i) - \sigma((x - h - \mu_i) / s_i)]` with half a
    bin :math:`h = 1 / (2 (\mathrm{levels} - 1))`; the first and the last level have the tails. Kingma et al.,
    *Improving Variational Inference with Inverse Autoregressive Flow*, 2016; mixtures: Salimans et al.,
    *PixelCNN++*, 2017.

    :math:`\eta`: the logits of all components, if there are several, their means before a sigmoid, and
    :math:`2 \log s`.

    Args:
        levels: Grey levels of the data: 256 for bytes.
        components: Logistics in the mixture of every number.
        min_scale: Lower bound of s, in the unit of x.
        max_scale: Upper bound of s.
    """

    @checked
    def __init__(
        self,
        levels: Levels = 256,
        components: Count = 1,
        *,
        min_scale: Positive = 1e-3,
        max_scale: Positive = 10.0,
    ) -> None:
        super().__init__()
        self.levels, self.components = levels, components
        self.params_per_dim = 3 * components if components > 1 else 2
        self.scale = ScaleBounds(min_scale, max_scale)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent grey levels."""
        kinds = eta.unflatten(-1, (self.params_per_dim, -1)).movedim(-2, -1)  # (*batch, data, params_per_dim)
        *_, loc, twice_log_scale = kinds.chunk(self.params_per_dim // self.components, -1)
        logits = kinds[..., : self.components] if self.components > 1 else torch.zeros_like(loc)
        whole = _WholeLogistic(logits, loc.sigmoid(), self.scale(twice_log_scale), self.levels)
        return _GreyLevels(whole, self.levels).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Spread the means of components around that of the data, by 1 each in logits."""
        spread = torch.arange(self.components) - (self.components - 1) / 2
        loc = (logit(mean) + spread[:, None].to(mean)).flatten()
        rest = loc.new_zeros(self.num_params(len(mean)) // (self.params_per_dim // self.components))
        return torch.cat([*([rest] if self.components > 1 else []), loc, rest])


class GreyCategorical(Family):
    r"""Grey levels, each with a probability of its own: ``levels`` logits for every number.

    It knows no order of the levels (van den Oord et al., *Pixel Recurrent Neural Networks*, 2016).

    Args:
        levels: Grey levels of the data: 256 for bytes.
    """

    @checked
    def __init__(self, levels: Levels = 256) -> None:
        super().__init__()
        self.params_per_dim = self.levels = levels

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent grey levels; the logits of level 0 come first."""
        return _GreyLevels(whole_categorical(eta, self.levels), self.levels).to_event(1)


class BetaBinomial(Family):
    r"""Grey levels from a beta-binomial: k of levels - 1 trials succeed, with a probability from a beta.

    :math:`P(k) = \binom{n}{k} B(k + a, n - k + b) / B(a, b)`, :math:`n = \mathrm{levels} - 1`; smooth over
    levels, with one bump or piled up at the ends. :math:`\eta`: the logit of the mean :math:`a / (a + b)`,
    and :math:`\log (a + b)`, bounded to [0.05, 5,000].

    Args:
        levels: Grey levels of the data: 256 for bytes.
    """

    params_per_dim = 2
    link = staticmethod(logit)

    @checked
    def __init__(self, levels: Levels = 256) -> None:
        super().__init__()
        self.levels = levels
        self.concentration = ScaleBounds(0.05, 5e3)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent grey levels."""
        mean_logit, log_total = eta.chunk(2, -1)
        mean = mean_logit.sigmoid().clamp(1e-4, 1 - 1e-4)
        total = self.concentration(2 * log_total)
        whole = dist.BetaBinomial(total * mean, total * (1 - mean), self.levels - 1, validate_args=False)
        return _GreyLevels(whole, self.levels).to_event(1)
