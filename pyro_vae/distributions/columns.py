"""Tables: columns with families of their own, and numbers that are missing."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import checked
from pyro_vae.distributions.base import Family, UncheckedDistribution, base_distribution, check_support
from pyro_vae.distributions.grey import BernoulliCrossEntropy


class Columns(Family):
    r"""Rows of a table whose columns are of different kinds: :math:`p(x) = \prod_d p_d(x_d)`.

    .. code-block:: python

        amount, count, ward = DiagNormal(), Poisson(), Categorical(4)
        vae(5, 2, family=Columns([amount, amount, count, count, ward]))

    :math:`\eta` holds the parameters of one family after another. Columns with the same object share its
    parameters (such as a scale), and are computed at once.

    Args:
        families: One for every column.
    """

    @checked
    def __init__(self, families: Sequence[Family]) -> None:
        super().__init__()
        if not families or not all(isinstance(family, Family) for family in families):
            raise ValueError(f"Columns takes a family for every column, not {families!r}")
        distinct = list({id(family): family for family in families}.values())
        self.families = nn.ModuleList(distinct)
        self.columns = [[i for i, one in enumerate(families) if one is family] for family in distinct]

    def num_params(self, dim: int) -> int:
        """Return the sum over columns; raise ``ValueError`` if there are not ``dim`` of them."""
        if dim != (count := sum(map(len, self.columns))):
            raise ValueError(f"there are families for {count} columns, but the data have {dim}")
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        pairs = zip(self.families, self.columns, strict=True)
        return [family.num_params(len(columns)) for family, columns in pairs]

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent columns."""
        parts = zip(self.families, eta.split(self._sizes(), -1), strict=True)
        return _TableRow([family(part) for family, part in parts], self.columns)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Join the biases of the families."""
        means = [mean[columns] for columns in self.columns]
        return torch.cat([family.bias(part) for family, part in zip(self.families, means, strict=True)])


class _TableRow(UncheckedDistribution):
    """A row whose columns are distributed independently, in groups.

    Args:
        parts: Distributions of the groups, each with one event axis.
        columns: Numbers of the columns of each group.
    """

    def __init__(self, parts: Sequence[Distribution], columns: Sequence[Sequence[int]]) -> None:
        self.parts, self.columns = list(parts), columns
        order = [column for group in columns for column in group]
        self._place = [order.index(column) for column in range(len(order))]
        super().__init__(self.parts[0].batch_shape, (len(order),))

    @property
    def support(self) -> constraints.Constraint:
        return _OfColumns([part.support for part in self.parts], self.columns)

    @property
    def mean(self) -> Tensor:
        return self._join([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return self._join([part.variance for part in self.parts])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._join([part.sample(sample_shape) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        return sum(part.log_prob(group) for part, group in zip(self.parts, self._split(value), strict=True))

    def log_prob_of_numbers(self, value: Tensor) -> Tensor:
        groups = zip(self.parts, self._split(value), strict=True)
        return self._join([_log_prob_of_numbers(part, group) for part, group in groups])

    def check_support(self, value: Tensor, site: str) -> None:
        for part, columns in zip(self.parts, self.columns, strict=True):
            few = ", ".join(map(str, columns[:5])) + ", ..." * (len(columns) > 5)
            check_support(part, value[..., columns], f"{site}[..., [{few}]]")

    def _split(self, value: Tensor) -> list[Tensor]:
        return [value[..., columns] for columns in self.columns]

    def _join(self, groups: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(groups), -1)[..., self._place]


class _OfColumns(constraints.Constraint):
    event_dim = 1

    def __init__(self, supports: Sequence[constraints.Constraint], columns: Sequence[Sequence[int]]) -> None:
        self.supports, self.columns = supports, columns
        self.is_discrete = any(support.is_discrete for support in supports)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        groups = zip(self.supports, self.columns, strict=True)
        return torch.stack([support.check(value[..., columns]) for support, columns in groups]).all(0)


def scores_cross_entropy(distribution: Distribution) -> bool:
    """Return whether its log-probability is, in part, a cross-entropy of grey values."""
    base = base_distribution(distribution)
    if isinstance(base, Observed):
        return scores_cross_entropy(base.complete)
    if isinstance(base, _TableRow):
        return any(map(scores_cross_entropy, base.parts))
    return isinstance(base, BernoulliCrossEntropy)


def _log_prob_of_numbers(distribution: Distribution, x: Tensor) -> Tensor:
    """Log-densities of the single numbers of a datum; raises ``ValueError`` unless they are independent."""
    if isinstance(base := base_distribution(distribution), _TableRow):
        return base.log_prob_of_numbers(x)
    if isinstance(distribution, dist.Independent) and distribution.reinterpreted_batch_ndims == 1:
        return distribution.base_dist.log_prob(x)
    raise ValueError(
        f"numbers can be missing only where they are independent given z, and those of a "
        f"{type(base).__name__} are not: take a family such as DiagNormal, or Columns"
    )


class Missing(Family):
    r"""Family of data with missing numbers: those that are nan are left out.

    :math:`\log p(x_{\mathrm{observed}}) = \sum_{d\ \mathrm{observed}} \log p_d(x_d)`: the marginal density of
    what was observed. This is right where numbers are *missing at random*, that is, whether one is missing
    does not depend on its value given what was observed. The encoder must take nan as well:
    ``vae(..., missing=True)`` arranges both.

    Args:
        family: Family of complete data; it must cover 0, and its numbers be independent given z.
    """

    @checked
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def num_params(self, dim: int) -> int:
        """Return the number of parameters of the family."""
        return self.family.num_params(dim)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Distribution of the observed numbers; draws are complete."""
        return Observed(self.family(eta))

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """Return the bias of the family."""
        return self.family.bias(mean)


class Observed(UncheckedDistribution):
    """Distribution of those of independent numbers that are not nan; draws are complete."""

    def __init__(self, complete: Distribution) -> None:
        self.complete = complete
        super().__init__(complete.batch_shape, complete.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """Support of complete data."""
        return self.complete.support

    @property
    def mean(self) -> Tensor:
        """Mean of complete data."""
        return self.complete.mean

    @property
    def variance(self) -> Tensor:
        """Variance of complete data."""
        return self.complete.variance

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw complete data."""
        return self.complete.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the numbers that are not nan, nats."""
        # Every family of the package covers 0.
        each = _log_prob_of_numbers(self.complete, value.nan_to_num(0.0))
        return torch.where(value.isnan(), 0.0, each).sum(-1)

    def check_support(self, value: Tensor, site: str) -> None:
        """Check the numbers that are not nan as ``check_support`` does."""
        check_support(self.complete, torch.where(value.isnan(), 0.0, value), site)
