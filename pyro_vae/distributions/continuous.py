"""Families of real numbers."""

import math

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F  # noqa: N812

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.distributions.base import Family, ScaleBounds, inverse_softplus, logit


class _LocationFamily(Family):
    """A family whose first parameters are means: of real numbers, or of numbers in (0, 1)."""

    def __init__(self, *, squash_loc: bool) -> None:
        super().__init__()
        self.squash_loc = squash_loc

    def loc(self, eta: Tensor) -> Tensor:
        return eta.sigmoid() if self.squash_loc else eta

    def location(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " data"]:
        """The mean (its logit, if squashed)."""
        return logit(mean) if self.squash_loc else mean


class DiagNormal(_LocationFamily):
    r"""Normal with a mean and a scale of its own for every dimension (heteroscedastic).

    :math:`\log p(x) = \sum_d \log N(x_d; \mu_d, \sigma_d^2)` with :math:`\eta = (\mu, \log \sigma^2)`:
    Kingma & Welling 2013, equation (12).

    Args:
        squash_loc: Pass the mean through a sigmoid into (0, 1), as the paper does for Frey Face.
        min_scale: Lower bound of :math:`\sigma`. Without one the density of constant pixels is unbounded.
        max_scale: Upper bound of :math:`\sigma`. Between the bounds :math:`\log \sigma` is
            :func:`~pyro_vae.distributions.soft_clamp`-ed, which changes it by less than 0.1 % at
            :math:`\sigma = 1`.
    """

    params_per_dim = 2

    @checked
    def __init__(
        self, *, squash_loc: bool = False, min_scale: Positive = 1e-3, max_scale: Positive = 1e3
    ) -> None:
        super().__init__(squash_loc=squash_loc)
        self.scale = ScaleBounds(min_scale, max_scale)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals; the first half of ``eta`` are means, the second log variances."""
        loc, log_variance = eta.chunk(2, -1)
        return dist.Normal(self.loc(loc), self.scale(log_variance)).to_event(1)


class FixedScaleNormal(_LocationFamily):
    r"""Normal with one given scale: :math:`\log p(x) = \sum_d \log N(x_d; \eta_d, \sigma^2)`.

    Args:
        scale: :math:`\sigma > 0`, in the unit of the data.
    """

    params_per_dim = 1

    @checked
    def __init__(self, scale: Positive = 1.0) -> None:
        super().__init__(squash_loc=False)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, not {scale}")
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals with means ``eta``."""
        return dist.Normal(eta, self.scale).to_event(1)


class SharedScaleNormal(_LocationFamily):
    r"""Normal with one scale that is learned and shared by all data and dimensions.

    :math:`\log p(x) = \sum_d \log N(x_d; \eta_d, \sigma^2)`: the decoder of probabilistic PCA, and of a
    :math:`\sigma`-VAE (Rybkin, Daniilidis & Levine, *Simple and Effective VAE Training with Calibrated
    Decoders*, 2021).

    Args:
        squash_loc: Pass the mean through a sigmoid into (0, 1).
        scale: :math:`\sigma` to start from.
        min_scale: Lower bound of :math:`\sigma`.
        max_scale: Upper bound of :math:`\sigma`.
    """

    params_per_dim = 1

    @checked
    def __init__(
        self,
        *,
        squash_loc: bool = False,
        scale: Positive = 1.0,
        min_scale: Positive = 1e-3,
        max_scale: Positive = 1e3,
    ) -> None:
        super().__init__(squash_loc=squash_loc)
        self.scale = ScaleBounds(min_scale, max_scale)
        if not min_scale < scale < max_scale:
            raise ValueError(f"scale must lie between {min_scale} and {max_scale}, not at {scale}")
        self.log_variance = nn.Parameter(torch.tensor(self.scale.log_variance(scale)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent normals with means ``eta`` and the one scale."""
        return dist.Normal(self.loc(eta), self.scale(self.log_variance)).to_event(1)


class LowRankNormal(_LocationFamily):
    r"""Normal whose numbers are correlated: :math:`N(x; \mu, \operatorname{diag} \sigma^2 + W W^\top)`.

    :math:`W` has ``rank`` columns, and is computed from the condition like :math:`\mu` and :math:`\sigma`
    (structured uncertainty: Dorta et al., *Structured Uncertainty Prediction Networks*, 2018).

    Args:
        rank: Columns of W.
        squash_loc: Pass the mean through a sigmoid into (0, 1).
        min_scale: Lower bound of :math:`\sigma`.
        max_scale: Upper bound of :math:`\sigma`.
    """

    @checked
    def __init__(
        self,
        rank: Count = 5,
        *,
        squash_loc: bool = False,
        min_scale: Positive = 1e-3,
        max_scale: Positive = 1e3,
    ) -> None:
        super().__init__(squash_loc=squash_loc)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        self.rank = rank
        self.params_per_dim = 2 + rank
        self.scale = ScaleBounds(min_scale, max_scale)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Means, then log variances, then the columns of W."""
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

    @checked
    def __init__(self, *, min_scale: Positive = 1e-3, max_scale: Positive = 1e3) -> None:
        super().__init__()
        self.scale = ScaleBounds(min_scale, max_scale)

    def num_params(self, dim: int) -> int:
        """``dim (dim + 3) / 2``."""
        return dim * (dim + 3) // 2

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """The normal of ``dim`` numbers for which ``eta`` has the right length."""
        dim = (math.isqrt(9 + 8 * eta.shape[-1]) - 3) // 2
        loc, log_variance, below = eta.split([dim, dim, dim * (dim - 1) // 2], -1)
        rows, columns = torch.tril_indices(dim, dim, -1, device=eta.device)
        scale_tril = torch.diag_embed(self.scale(log_variance))
        scale_tril[..., rows, columns] = below
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)

    def location(self, mean: Float[Tensor, " data"]) -> Float[Tensor, " data"]:
        """The mean itself."""
        return mean


class Laplace(_LocationFamily):
    r"""Laplace: :math:`\log p(x) = -\sum_d \big(|x_d - \mu_d| / b_d + \log 2 b_d\big)`.

    :math:`\eta = (\mu, 2 \log b)`.

    Args:
        squash_loc: Pass the location through a sigmoid into (0, 1).
        min_scale: Lower bound of b.
        max_scale: Upper bound of b.
    """

    params_per_dim = 2

    @checked
    def __init__(
        self, *, squash_loc: bool = False, min_scale: Positive = 1e-3, max_scale: Positive = 1e3
    ) -> None:
        super().__init__(squash_loc=squash_loc)
        self.scale = ScaleBounds(min_scale, max_scale)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent Laplace distributions; locations, then twice the logarithms of b."""
        loc, twice_log_scale = eta.chunk(2, -1)
        return dist.Laplace(self.loc(loc), self.scale(twice_log_scale)).to_event(1)


class StudentT(_LocationFamily):
    r"""Student's t, for data with outliers: locations, scales and one shared, learned number of freedom.

    :math:`p(x_d) \propto \big(1 + (x_d - \mu_d)^2 / (\nu \sigma_d^2)\big)^{-(\nu + 1) / 2}` with
    :math:`\eta = (\mu, \log \sigma^2)`.

    Args:
        df: Degrees of freedom :math:`\nu` to start from; they stay above 1, so that there is a mean.
        squash_loc: Pass the location through a sigmoid into (0, 1).
        min_scale: Lower bound of :math:`\sigma`.
        max_scale: Upper bound of :math:`\sigma`.
    """

    params_per_dim = 2

    @checked
    def __init__(
        self,
        df: Positive = 5.0,
        *,
        squash_loc: bool = False,
        min_scale: Positive = 1e-3,
        max_scale: Positive = 1e3,
    ) -> None:
        super().__init__(squash_loc=squash_loc)
        if not 1 < df < math.inf:
            raise ValueError(f"df must be above 1 and finite, not {df}")
        self.scale = ScaleBounds(min_scale, max_scale)
        self.unconstrained_df = nn.Parameter(torch.tensor(inverse_softplus(df - 1)))

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent t distributions; locations, then the logarithms of squared scales."""
        loc, log_variance = eta.chunk(2, -1)
        df = 1 + F.softplus(self.unconstrained_df)
        return dist.StudentT(df, self.loc(loc), self.scale(log_variance)).to_event(1)
