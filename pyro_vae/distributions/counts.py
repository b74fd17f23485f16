"""Families of counts and of categories: whole numbers 0, 1, 2, ..."""

from collections.abc import Sequence
from typing import Annotated

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Range, checked
from pyro_vae.distributions.base import STORED_AS_BYTES, Family, UncheckedDistribution, soft_clamp
from pyro_vae.distributions.grey import whole_categorical

_WAY_OUT = (
    "It is a distribution of whole numbers; grey images are none. For them take DiscretizedLogistic, "
    f"BetaBinomial or GreyCategorical; for amounts a density such as DiagNormal. {STORED_AS_BYTES}"
)


def _positive(log_value: Tensor) -> Tensor:
    """Exponential, bounded to [1e-6, 1e9]."""
    return soft_clamp(log_value, -13.8, 20.7).exp()


def _log_mean(mean: Tensor) -> Tensor:
    """Logarithm of the mean, which is kept above 0.001."""
    return mean.clamp(min=1e-3).log()


class _Poisson(dist.Poisson):
    """Pyro's Poisson in 64 bits: its terms of large counts nearly cancel."""

    way_out = _WAY_OUT

    def log_prob(self, value: Tensor) -> Tensor:
        unchecked = dist.Poisson(self.rate, validate_args=False)
        return unchecked.log_prob(value.double()).to(self.rate.dtype)


class Poisson(Family):
    r"""Counts whose variance is their mean.

    :math:`\log P(x) = \sum_d x_d \log \lambda_d - \lambda_d - \log x_d!`, :math:`\eta = \log \lambda`.
    """

    params_per_dim = 1
    link = staticmethod(_log_mean)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent counts with rates ``exp(eta)``, bounded to [1e-6, 1e9]."""
        return _Poisson(_positive(eta), validate_args=False).to_event(1)


class _NegativeBinomial(dist.NegativeBinomial):
    """Pyro's negative binomial in 64 bits: its log-gammas of large numbers nearly cancel."""

    way_out = _WAY_OUT

    def log_prob(self, value: Tensor) -> Tensor:
        count, logits = self.total_count.double(), self.logits.double()
        double = dist.NegativeBinomial(count, logits=logits, validate_args=False)
        return double.log_prob(value.double()).to(self.logits.dtype)


def _negative_binomial(log_mean: Tensor, log_shape: Tensor) -> Distribution:
    """Negative binomial with this mean and variance mean + mean^2 / shape."""
    shape = _positive(log_shape)
    logits = _positive(log_mean).log() - shape.log()
    return _NegativeBinomial(shape, logits=logits, validate_args=False)


class NegativeBinomial(Family):
    r"""Counts that vary more than a Poisson's: mean :math:`\mu` and variance :math:`\mu + \mu^2 / r`.

    :math:`P(x) = \frac{\Gamma(x + r)}{x!\, \Gamma(r)} \big(\frac{r}{r + \mu}\big)^r \big(\frac{\mu}{r +
    \mu}\big)^x` with :math:`\eta = (\log \mu, \log r)`; the noise of single-cell counts (Lopez et al., *Deep
    Generative Modeling for Single-cell Transcriptomics*, 2018).
    """

    params_per_dim = 2
    link = staticmethod(_log_mean)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent counts; log means, then log shapes."""
        return _negative_binomial(*eta.chunk(2, -1)).to_event(1)


class _ZeroInflated(UncheckedDistribution):
    """Counts that are set to 0 with some probability; Pyro's own cannot be expanded once it has drawn."""

    support = constraints.nonnegative_integer
    way_out = _WAY_OUT

    def __init__(self, counts: Distribution, gate_logits: Tensor) -> None:
        self.counts, self.gate_logits = counts, gate_logits
        super().__init__(counts.batch_shape)

    @property
    def mean(self) -> Tensor:
        return self.counts.mean * torch.sigmoid(-self.gate_logits)

    @property
    def variance(self) -> Tensor:
        square = self.counts.variance + self.counts.mean.square()
        return square * torch.sigmoid(-self.gate_logits) - self.mean.square()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        counts = self.counts.sample(sample_shape)
        return torch.where(torch.rand_like(counts) < self.gate_logits.sigmoid(), 0.0, counts)

    def log_prob(self, value: Tensor) -> Tensor:
        counted = self.counts.log_prob(value) + F.logsigmoid(-self.gate_logits)
        return torch.where(value == 0, torch.logaddexp(counted, F.logsigmoid(self.gate_logits)), counted)


class ZeroInflatedNegativeBinomial(Family):
    r"""A negative binomial whose counts are set to 0 with probability :math:`\sigma(g)`.

    :math:`\eta = (\log \mu, \log r, g)`; Lopez et al. 2018, as :class:`NegativeBinomial`.
    """

    params_per_dim = 3

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent counts; log means, log shapes, logits of extra zeros."""
        log_mean, log_shape, gate_logits = eta.chunk(3, -1)
        return _ZeroInflated(_negative_binomial(log_mean, log_shape), gate_logits).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Make half of the counts extra zeros, and give the others twice the mean."""
        return torch.cat([_log_mean(2 * mean), torch.zeros_like(mean), torch.zeros_like(mean)])


class Categorical(Family):
    r"""Categories 0, 1, ..., ``categories`` - 1 without an order: that many logits for every number.

    Args:
        categories: Their number.
    """

    @checked
    def __init__(self, categories: Annotated[int, Range(2)]) -> None:
        super().__init__()
        self.params_per_dim = self.categories = categories

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent categories; the logits of category 0 come first."""
        return whole_categorical(eta, self.categories).to_event(1)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Equal probabilities: a mean of categories says nothing."""
        return mean.new_zeros(self.num_params(len(mean)))
