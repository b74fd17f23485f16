"""Families that are mostly of use as posteriors: a point, several modes, a box, a sphere."""

from collections.abc import Sequence
from typing import Annotated, Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from pyro_vae.arguments import Finite, Positive, Range, checked
from pyro_vae.distributions.base import Family, ScaleBounds, UncheckedDistribution, check_ends, soft_clamp

Several = Annotated[int, Range(2)]


class DiagNormalMixture(UncheckedDistribution):
    r"""A mixture of diagonal normals whose draws carry gradients, by implicit reparameterisation.

    With :math:`u_d = F(z_d \mid z_{<d})`, the conditional distribution functions, :math:`u = S(z; \eta)` is
    uniform whatever :math:`\eta` is, so that a draw moves by

    .. math:: dz / d\eta = -(\partial S / \partial z)^{-1}\, \partial S / \partial \eta

    (Figurnov, Mohamed & Mnih, *Implicit Reparameterization Gradients*, 2018). Pyro's
    ``MixtureOfDiagNormals`` has wrong gradients by the weights of batches.

    Args:
        logits: Logits of the weights, shape ``(*batch, components)``.
        loc: Means, shape ``(*batch, components, dim)``.
        scale: Scales, the same shape.
    """

    has_rsample = True
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.log_weights, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:])

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "DiagNormalMixture":
        """Return the same for a larger batch, with parameters of that shape."""
        parameters = (
            parameter.expand(*batch_shape, *parameter.shape[len(self.batch_shape) :])
            for parameter in (self.log_weights, self.loc, self.scale)
        )
        return DiagNormalMixture(*parameters)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        return (self.log_weights.exp().unsqueeze(-1) * self.loc).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, nats."""
        normals = dist.Normal(self.loc, self.scale, validate_args=False)
        return (self.log_weights + normals.log_prob(value.unsqueeze(-2)).sum(-1)).logsumexp(-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw; differentiable in all parameters."""
        with torch.no_grad():
            weights = dist.Categorical(logits=self.log_weights, validate_args=False)
            component = weights.sample(sample_shape)[..., None, None]
            shape = (*sample_shape, *self.loc.shape)
            normals = self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            z = normals.take_along_dim(component, -2).squeeze(-2)
        u, by_z = self._distribution_functions(z)
        change = torch.linalg.solve_triangular(by_z.detach(), (u - u.detach()).unsqueeze(-1), upper=False)
        return z - change.squeeze(-1)

    def _distribution_functions(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """S at z, shape ``(*, dim)``, and its derivative, shape ``(*, dim, dim)``, lower triangular."""
        normals = dist.Normal(self.loc, self.scale, validate_args=False)
        each = z.unsqueeze(-2)
        log_density = normals.log_prob(each)
        # The weight of every component given the dimensions before.
        before = log_density.cumsum(-1) - log_density
        weights = (self.log_weights.unsqueeze(-1) + before).softmax(-2)
        below = normals.cdf(each)
        u = (weights * below).sum(-2)
        slope = (self.loc - each) / self.scale.square()
        by_z = torch.einsum("...kd,...kj->...dj", weights * (below - u.unsqueeze(-2)), slope).tril(-1)
        return u, by_z + torch.diag_embed((weights * log_density.exp()).sum(-2))


class PointMass(Family):
    r"""All mass at one point, :math:`q(z) = \delta(z - \eta)`: the guide of an autoencoder.

    It has no density, so that there are neither importance weights nor bounds on log p(x).
    """

    params_per_dim = 1

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        r"""The point mass at :math:`\eta`."""
        return dist.Delta(eta, event_dim=1, validate_args=False)


class NormalMixture(Family):
    r"""A mixture of diagonal normals, :math:`\sum_k \pi_k N(\mu_k, \sigma_k^2)`: posteriors of several modes.

    Its draws are reparameterised (:class:`DiagNormalMixture`). :math:`\eta`: the logits of the weights, all
    means, all log variances.

    Args:
        components: Number of normals.
        min_scale: Lower bound of every scale.
        max_scale: Upper bound of every scale.
    """

    @checked
    def __init__(
        self, components: Several = 3, *, min_scale: Positive = 1e-3, max_scale: Positive = 1e3
    ) -> None:
        super().__init__()
        self.components = components
        self.scale = ScaleBounds(min_scale, max_scale)

    def num_params(self, dim: int) -> int:
        """Return ``components (2 dim + 1)``."""
        return self.components * (2 * dim + 1)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Mixture of diagonal normals."""
        size = (eta.shape[-1] - self.components) // 2
        logits, loc, log_variance = eta.split([self.components, size, size], -1)
        loc, log_variance = (part.unflatten(-1, (self.components, -1)) for part in (loc, log_variance))
        return DiagNormalMixture(logits, loc, self.scale(log_variance))


class _BoxedNormal(dist.TransformedDistribution):
    """Normal through a sigmoid, stretched; torch believes that affine transforms reach all real numbers."""

    @property
    def support(self) -> constraints.Constraint:
        stretch = self.transforms[-1]
        return constraints.interval(stretch.loc, stretch.loc + stretch.scale)


class LogitNormal(Family):
    r"""Numbers in an interval: :math:`z = l + (h - l)\, \sigma(u)`, :math:`u \sim N(\mu, \sigma^2)`.

    The posterior for a :class:`~pyro_vae.distributions.UniformBox`. :math:`\eta = (\mu, \log \sigma^2)`, both
    bent (:func:`~pyro_vae.distributions.soft_clamp`) so that :math:`|\mu| < 8` and :math:`\sigma < 2`: beyond
    that, draws would be rounded to the ends of the interval, where no density can be told from another.

    Args:
        low: l.
        high: h.
        min_scale: Lower bound of :math:`\sigma`.
    """

    params_per_dim = 2

    @checked
    def __init__(self, low: Finite = 0.0, high: Finite = 1.0, *, min_scale: Positive = 1e-3) -> None:
        super().__init__()
        check_ends(low, high)
        self.low, self.high = low, high
        self.scale = ScaleBounds(min_scale, 2.0)

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Independent logit-normals."""
        transforms = [SigmoidTransform(), AffineTransform(self.low, self.high - self.low)]
        loc, log_variance = eta.chunk(2, -1)
        normal = dist.Normal(soft_clamp(loc, -8.0, 8.0), self.scale(log_variance), validate_args=False)
        return _BoxedNormal(normal, transforms, validate_args=False).to_event(1)


class ProjectedNormal(Family):
    r"""Directions: :math:`z = u / |u|`, :math:`u \sim N(\eta, I)`, on the sphere in 2, 3 or 4 dimensions.

    :math:`|\eta|` is how concentrated they are; at :math:`\eta = 0` they are uniform, so
    ``Unconditional(ProjectedNormal(), 3)`` is the prior that goes with it. Hernandez-Stumpfhauser, Breidt &
    van der Woerd, *The General Projected Normal Distribution of Arbitrary Dimension*, 2017. (Pyro's von
    Mises-Fisher distribution has no draws.)
    """

    params_per_dim = 1

    def num_params(self, dim: int) -> int:
        """Return ``dim``; raise ``ValueError`` for dimensions in which Pyro has no density."""
        if dim not in (2, 3, 4):
            raise ValueError(f"ProjectedNormal has a density in 2, 3 and 4 dimensions, not in {dim}")
        return dim

    def forward(self, eta: Float[Tensor, "*batch params"]) -> Distribution:
        """Distribution of directions."""
        return dist.ProjectedNormal(eta, validate_args=False)
