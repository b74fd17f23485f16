"""Families of real numbers."""

import math
from typing import Annotated, Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Count, Positive, Range, checked
from pyro_vae.distributions.base import Family, ScaleBounds, identity, inverse_softplus, logit


class LocationScale(Family):
    r"""Base of families of independent numbers that have locations and bounded scales.

    The numbers :math:`\eta` are locations, then the logarithms of squared scales.

    Args:
        squash_loc: Pass the locations through a sigmoid into (0, 1), as the paper does for Frey Face.
        min_scale: Lower bound of the scales. Without one the density of constant pixels is unbounded.
        max_scale: Upper bound of the scales. Between the bounds their logarithms are
            :func:`~pyro_vae.distributions.soft_clamp`-ed, which changes a scale of 1 by less than 0.1 %.
    """

    params_per_dim = 2

    @checked
    def __init__(
        self, *, squash_loc: bool = False, min_scale: Positive = 1e-3, max_scale: Positive = 1e3
    ) -> None:
        super().__init__()
        self.squash_loc = squash_loc
        self.scale = ScaleBounds(min_scale, max_scale)

    def link(self, mean: Tensor) -> Tensor:
        """Return the mean, or its logit if locations are squashed."""
        return logit(mean) if self.squash_loc else mean

    def loc(self, eta: Tensor) -> Tensor:
        """Return locations, squashed or as they are."""
        return eta.sigmoid() if self.squash_loc else eta

    def loc_and_scale(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return locations from the first half of ``eta``, and scales from the second."""
        loc, log_variance = eta.chunk(2, -1)
        return self.loc(loc), self.scale(log_variance)


class DiagNormal(LocationScale):
    r"""Normal with a mean and a scale of its own for every dimension (heteroscedastic).

    :math:`\log p(x) = \sum_d \log N(x_d; \mu_d, \sigma_d^2)` with :math:`\eta = (\mu, \log \sigma^2)`:
    Kingma & Welling 2013, equation (12). Arguments as of :class:`LocationScale`.
    """

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals; the first half of ``eta`` are means, the second log variances."""
        return dist.Normal(*self.loc_and_scale(eta)).to_event(1)


class FixedScaleNormal(Family):
    r"""Normal with one given scale: :math:`\log p(x) = \sum_d \log N(x_d; \eta_d, \sigma^2)`.

    Args:
        scale: :math:`\sigma > 0`, in the unit of the data.
    """

    params_per_dim = 1
    link = staticmethod(identity)

    @checked
    def __init__(self, scale: Positive = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals with means ``eta``."""
        return dist.Normal(eta, self.scale).to_event(1)


class SharedScaleNormal(LocationScale):
    r"""Normal with one scale that is learned and shared by all data and dimensions.

    :math:`\log p(x) = \sum_d \log N(x_d; \eta_d, \sigma^2)`: the decoder of probabilistic PCA, and of a
    :math:`\sigma`-VAE (Rybkin, Daniilidis & Levine, *Simple and Effective VAE Training with Calibrated
    Decoders*, 2021).

    Args:
        scale: :math:`\sigma` to start from, between the bounds.
        **settings: Arguments of :class:`LocationScale`.
    """

    params_per_dim = 1

    @checked
    def __init__(self, *, scale: Positive = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.log_variance = nn.Parameter(torch.tensor(self.scale.log_variance(scale)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals with means ``eta`` and the one scale."""
        return dist.Normal(self.loc(eta), self.scale(self.log_variance)).to_event(1)


class LowRankNormal(LocationScale):
    r"""Normal whose numbers are correlated: :math:`N(x; \mu, \operatorname{diag} \sigma^2 + W W^\top)`.

    :math:`W` has ``rank`` columns, and is computed from the condition like :math:`\mu` and :math:`\sigma`
    (structured uncertainty: Dorta et al., *Structured Uncertainty Prediction Networks*, 2018).

    Args:
        rank: Columns of W.
        **settings: Arguments of :class:`LocationScale`.
    """

    @checked
    def __init__(self, rank: Count = 5, **settings: Any) -> None:
        super().__init__(**settings)
        self.rank = rank
        self.params_per_dim = 2 + rank

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Correlated normals; means, then log variances, then the columns of W."""
        loc, log_variance, *columns = eta.chunk(2 + self.rank, -1)
        return dist.LowRankMultivariateNormal(
            self.loc(loc),
            cov_factor=torch.stack(columns, -1),
            cov_diag=self.scale(log_variance).square(),
            validate_args=False,
        )


class FullNormal(Family):
    r"""Normal with a full covariance matrix, :math:`N(z; \mu, L L^\top)`, L lower triangular.

    :math:`\eta` holds :math:`\mu`, then :math:`2 \log \operatorname{diag} L`, then the rest of L row by row.

    Args:
        min_scale: Lower bound of the diagonal of L.
        max_scale: Upper bound of the diagonal of L.
    """

    link = staticmethod(identity)

    @checked
    def __init__(self, *, min_scale: Positive = 1e-3, max_scale: Positive = 1e3) -> None:
        super().__init__()
        self.scale = ScaleBounds(min_scale, max_scale)

    def num_params(self, dim: int) -> int:
        """Return ``dim (dim + 3) / 2``."""
        return dim * (dim + 3) // 2

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Normal of the dimension that the length of ``eta`` tells."""
        dim = (math.isqrt(9 + 8 * eta.shape[-1]) - 3) // 2
        loc, log_variance, below = eta.split([dim, dim, dim * (dim - 1) // 2], -1)
        rows, columns = torch.tril_indices(dim, dim, -1, device=eta.device)
        scale_tril = torch.diag_embed(self.scale(log_variance))
        scale_tril[..., rows, columns] = below
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


class Laplace(LocationScale):
    r"""Laplace: :math:`\log p(x) = -\sum_d \big(|x_d - \mu_d| / b_d + \log 2 b_d\big)`.

    :math:`\eta = (\mu, 2 \log b)`. Arguments as of :class:`LocationScale`.
    """

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent Laplace distributions; locations, then twice the logarithms of b."""
        return dist.Laplace(*self.loc_and_scale(eta)).to_event(1)


class StudentT(LocationScale):
    r"""Student's t, for data with outliers: locations, scales and shared, learned degrees of freedom.

    :math:`p(x_d) \propto \big(1 + (x_d - \mu_d)^2 / (\nu \sigma_d^2)\big)^{-(\nu + 1) / 2}` with
    :math:`\eta = (\mu, \log \sigma^2)`.

    Args:
        df: Degrees of freedom :math:`\nu` to start from; they stay above 1, so that there is a mean.
        **settings: Arguments of :class:`LocationScale`.
    """

    @checked
    def __init__(self, df: Annotated[float, Range(1, open=True)] = 5.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.unconstrained_df = nn.Parameter(torch.tensor(inverse_softplus(df - 1)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent t distributions; locations, then the logarithms of squared scales."""
        return dist.StudentT(1 + F.softplus(self.unconstrained_df), *self.loc_and_scale(eta)).to_event(1)
