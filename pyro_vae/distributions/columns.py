"""Tables: columns with families of their own, and numbers that are missing."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import checked
from pyro_vae.distributions.base import Family, base_distribution, check_support
from pyro_vae.distributions.grey import BernoulliCrossEntropy


class Columns(Family):
    r"""Rows of a table whose columns are of different kinds: :math:`p(x) = \prod_d p_d(x_d)`.

    .. code-block:: python

        amount, count, ward = DiagNormal(), Poisson(), Categorical(4)
        vae(5, 2, family=Columns([amount, amount, count, count, ward]))

    :math:`\eta` holds the parameters of one family after another. Columns with the same object share what it
    learns (such as a scale), and are computed at once.

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
        """The sum over columns; raises ``ValueError`` if there are not ``dim`` of them."""
        if dim != (count := sum(map(len, self.columns))):
            raise ValueError(f"there are families for {count} columns, but the data have {dim}")
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [
            family.num_params(len(columns))
            for family, columns in zip(self.families, self.columns, strict=True)
        ]

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent columns."""
        parts = [
            family(part) for family, part in zip(self.families, eta.split(self._sizes(), -1), strict=True)
        ]
        return TableRow(parts, self.columns)

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """That of every family."""
        means = [mean[columns] for columns in self.columns]
        return torch.cat([family.bias(part) for family, part in zip(self.families, means, strict=True)])


class TableRow(dist.TorchDistribution):
    """A row whose columns are distributed independently, in groups.

    Args:
        parts: Distributions of the groups, each with one event axis.
        columns: Which columns belong to each.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own form)

    def __init__(self, parts: Sequence[Distribution], columns: Sequence[Sequence[int]]) -> None:
        self.parts, self.columns = list(parts), columns
        order = [column for group in columns for column in group]
        self._place = [order.index(column) for column in range(len(order))]
        super().__init__(self.parts[0].batch_shape, torch.Size([len(order)]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """That of every column."""
        return _OfColumns([part.support for part in self.parts], self.columns)

    @property
    def mean(self) -> Tensor:
        """Of every column."""
        return self._join([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Of every column."""
        return self._join([part.variance for part in self.parts])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Rows."""
        return self._join([part.sample(sample_shape) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum over columns, nats."""
        return sum(part.log_prob(group) for part, group in zip(self.parts, self._split(value), strict=True))

    def log_prob_of_numbers(self, value: Tensor) -> Tensor:
        """For every column, nats."""
        groups = zip(self.parts, self._split(value), strict=True)
        return self._join([log_prob_of_numbers(part, group) for part, group in groups])

    def check_support(self, value: Tensor, site: str) -> None:
        """As :func:`~pyro_vae.distributions.check_support`, saying which columns."""
        for part, columns in zip(self.parts, self.columns, strict=True):
            check_support(part, value[..., columns], f"{site}[..., {_words(columns)}]")

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "TableRow":
        """The same for a larger batch."""
        return TableRow([part.expand(batch_shape) for part in self.parts], self.columns)

    def _split(self, value: Tensor) -> list[Tensor]:
        return [value[..., columns] for columns in self.columns]

    def _join(self, groups: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(groups), -1)[..., self._place]


def _words(columns: Sequence[int]) -> str:
    few = ", ".join(map(str, columns[:5]))
    return f"[{few}{', ...' if len(columns) > 5 else ''}]"


class _OfColumns(constraints.Constraint):
    def __init__(self, supports: Sequence[constraints.Constraint], columns: Sequence[Sequence[int]]) -> None:
        self.supports, self.columns = supports, columns
        self.is_discrete = any(support.is_discrete for support in supports)
        self.event_dim = 1
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        groups = zip(self.supports, self.columns, strict=True)
        return torch.stack([support.check(value[..., columns]) for support, columns in groups]).all(0)


def scores_cross_entropy(distribution: Distribution) -> bool:
    """Whether what it calls a log-probability is, in part, a cross-entropy of grey values."""
    if isinstance(distribution, Observed):
        return scores_cross_entropy(distribution.complete)
    if isinstance(distribution, TableRow):
        return any(map(scores_cross_entropy, distribution.parts))
    return isinstance(base_distribution(distribution), BernoulliCrossEntropy)


def log_prob_of_numbers(distribution: Distribution, x: Tensor) -> Tensor:
    """Log-densities of the single numbers of a datum, which must be independent.

    Raises:
        ValueError: If they are not.
    """
    if isinstance(distribution, TableRow):
        return distribution.log_prob_of_numbers(x)
    if isinstance(distribution, dist.Independent) and distribution.reinterpreted_batch_ndims == 1:
        return distribution.base_dist.log_prob(x)
    raise ValueError(
        f"numbers can be missing only where they are independent given z, and those of a "
        f"{type(distribution).__name__} are not: take a family such as DiagNormal, or Columns"
    )


class Missing(Family):
    r"""A family for data of which some numbers are missing: those that are nan are left out.

    :math:`\log p(x_{\mathrm{observed}}) = \sum_{d\ \mathrm{observed}} \log p_d(x_d)`: the marginal density of
    what was observed. This is right where numbers are *missing at random*, that is, whether one is missing
    does not depend on its value given what was observed. The encoder must take nan as well:
    ``vae(..., missing=True)`` arranges both.

    Args:
        family: Of complete data; its numbers must be independent given z, and 0 among what it covers.
    """

    @checked
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def num_params(self, dim: int) -> int:
        """That of the family."""
        return self.family.num_params(dim)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Of observed numbers; draws are complete."""
        return Observed(self.family(eta))

    def bias(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " params"]:
        """That of the family."""
        return self.family.bias(mean)


class Observed(dist.TorchDistribution):
    """What a distribution of independent numbers says of those that are not nan."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, complete: Distribution) -> None:
        self.complete = complete
        super().__init__(complete.batch_shape, complete.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """That of complete data, or nan."""
        return self.complete.support

    @property
    def mean(self) -> Tensor:
        """Of complete data."""
        return self.complete.mean

    @property
    def variance(self) -> Tensor:
        """Of complete data."""
        return self.complete.variance

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Complete data."""
        return self.complete.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of what is not nan, nats."""
        observed = ~value.isnan()
        # Every family of the package covers 0.
        each = log_prob_of_numbers(self.complete, value.nan_to_num(0.0))
        return torch.where(observed, each, 0.0).sum(-1)

    def check_support(self, value: Tensor, site: str) -> None:
        """As :func:`~pyro_vae.distributions.check_support`, of what is not nan."""
        check_support(self.complete, torch.where(value.isnan(), 0.0, value), site)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Observed":
        """The same for a larger batch."""
        return Observed(self.complete.expand(batch_shape))
