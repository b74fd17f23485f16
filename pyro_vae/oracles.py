r"""Models whose log p(x) is known, and slow sure ways to it, to test programs and estimators against.

.. code-block:: python

    oracle = LinearGaussian.random(data_dim=10, latent_dim=3)
    x = oracle.sample(100)
    model, guide = oracle.pair(widening=1.2)
    error = importance_sampling(model, guide, x).values - oracle.log_prob(x)

For programs of your own, :func:`quadrature_log_prob` and :func:`enumerated_log_prob` take log p(x, z) as a
function and sum it over a dense grid or over all values; they share no code with the estimators of
``marginal_likelihood``.
"""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.distributions import Conditional, Family, FixedScaleNormal, StandardNormal
from pyro_vae.models import VAEGuide, VAEModel


class FixedCovarianceNormal(Family):
    """N(eta, L L^T) with a given factor L, shape (dim, dim)."""

    params_per_dim = 1

    def __init__(self, scale_tril: Float[Tensor, "dim dim"]) -> None:
        super().__init__()
        self.register_buffer("scale_tril", scale_tril)

    def forward(self, eta: Float[Tensor, "*batch dim"]) -> Distribution:
        """Normals with mean ``eta``."""
        return dist.MultivariateNormal(eta, scale_tril=self.scale_tril)


class LinearGaussian:
    r"""Probabilistic PCA: z ~ N(0, I), x | z ~ N(W z + mu, s^2 I), of which everything is known.

    log p(x) = log N(x; mu, W W^T + s^2 I), and p(z | x) = N(M^-1 W^T (x - mu), s^2 M^-1) with
    M = W^T W + s^2 I (Tipping & Bishop, *Probabilistic Principal Component Analysis*, 1999).
    """

    def __init__(self, weight: Float[Tensor, "data latent"], mean: Float[Tensor, " data"], scale: float):
        self.weight, self.mean, self.scale = weight, mean, scale
        latent_dim = weight.shape[1]
        precision = weight.T @ weight + scale**2 * torch.eye(latent_dim)
        self.gain = torch.linalg.solve(precision, weight.T)
        self.covariance = scale**2 * torch.linalg.inv(precision)
        self.marginal = torch.distributions.MultivariateNormal(
            mean, weight @ weight.T + scale**2 * torch.eye(len(mean))
        )

    @classmethod
    def random(cls, data_dim: int, latent_dim: int, scale: float = 0.5) -> "LinearGaussian":
        """A model with standard normal weights and mean."""
        return cls(torch.randn(data_dim, latent_dim), torch.randn(data_dim), scale)

    @classmethod
    def maximum_likelihood(
        cls, x: Float[Tensor, "n data"], latent_dim: int, scale: float
    ) -> "LinearGaussian":
        """The maximum for a given s: W = U (Lambda - s^2 I)^(1/2), of the covariance's leading pairs."""
        eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        excess = (eigenvalues[-latent_dim:] - scale**2).clamp(min=0)
        return cls(vectors[:, -latent_dim:] * excess.sqrt(), x.mean(0), scale)

    def sample(self, count: int) -> Float[Tensor, "n data"]:
        """Draw data."""
        return self.marginal.sample((count,))

    def log_prob(self, x: Float[Tensor, "n data"]) -> Float[Tensor, " n"]:
        """Exact log p(x)."""
        return self.marginal.log_prob(x)

    def posterior(self, x: Float[Tensor, "n data"]) -> torch.distributions.MultivariateNormal:
        """Exact p(z | x), batch shape (n,)."""
        loc = (x - self.mean) @ self.gain.T
        return torch.distributions.MultivariateNormal(loc, self.covariance)

    def pair(self, widening: float = 1.0) -> tuple[VAEModel, VAEGuide]:
        """The model, and as guide the exact posterior with its standard deviations times ``widening``."""
        data_dim, latent_dim = self.weight.shape
        decoder, encoder = nn.Linear(latent_dim, data_dim), nn.Linear(data_dim, latent_dim)
        with torch.no_grad():
            decoder.weight.copy_(self.weight)
            decoder.bias.copy_(self.mean)
            encoder.weight.copy_(self.gain)
            encoder.bias.copy_(-self.gain @ self.mean)
        posterior = FixedCovarianceNormal(widening * torch.linalg.cholesky(self.covariance))
        return (
            VAEModel(StandardNormal(latent_dim), Conditional(decoder, FixedScaleNormal(self.scale))),
            VAEGuide(Conditional(encoder, posterior)),
        )

    def elbo(self, x: Float[Tensor, "n data"], widening: float = 1.0) -> Float[Tensor, " n"]:
        """The exact bound with the guide of :meth:`pair`: log p(x) - KL(q || p(z | x))."""
        latent_dim = self.weight.shape[1]
        kl = latent_dim * (widening**2 - 1 - 2 * math.log(widening)) / 2
        return self.log_prob(x) - kl

    def kl_to_prior(self, x: Float[Tensor, "n data"]) -> Float[Tensor, " n"]:
        """KL(p(z | x) || p(z)) of every datum."""
        loc = self.posterior(x).mean
        trace, log_det = self.covariance.trace(), self.covariance.logdet()
        return (loc.square().sum(-1) + trace - len(self.covariance) - log_det) / 2


def quadrature_log_prob(
    log_joint: Callable[[Float[Tensor, "nodes latent"]], Float[Tensor, "nodes batch"]],
    latent_dim: int,
    *,
    nodes: int = 200,
    limit: float = 8.0,
) -> Float[Tensor, " batch"]:
    """Log p(x) = log of the integral of p(x, z) over a box in up to three latents, by the trapezoidal rule.

    For smooth integrands that vanish at the border it converges faster than any power of the step.

    Args:
        log_joint: log p(x, z) of every datum at every node.
        latent_dim: Dimensions of z.
        nodes: A side.
        limit: The box is [-limit, limit] in every dimension.
    """
    line = torch.linspace(-limit, limit, nodes)
    grid = torch.cartesian_prod(*[line] * latent_dim).reshape(-1, latent_dim)
    return log_joint(grid).logsumexp(0) + latent_dim * math.log(2 * limit / (nodes - 1))


def enumerated_log_prob(
    log_joint: Callable[[Int[Tensor, "values latent"]], Float[Tensor, "values batch"]], sizes: Sequence[int]
) -> Float[Tensor, " batch"]:
    """Log p(x) = log of the sum of p(x, y) over all values of discrete latents.

    Args:
        log_joint: log p(x, y) of every datum at all values of y.
        sizes: Number of values of each latent; they are 0, 1, ...
    """
    values = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
    return log_joint(values).logsumexp(0)
