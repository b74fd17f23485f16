"""What a latent space is like: its information, its regularity, and what its codes are worth."""

from pyro_vae.latents.information import (
    AggregatePosterior,
    CodeUsage,
    Estimate,
    active_units,
    aggregate_posterior,
    code_usage,
    kl_per_dim,
    posterior_mean,
    posterior_variance,
)
from pyro_vae.latents.regularity import (
    Completeness,
    Continuity,
    along,
    completeness,
    continuity,
    fitted_box,
    fitted_mixture,
    fitted_normal,
    lipschitz,
    nearest_distances,
    spherical,
    straight,
)
from pyro_vae.latents.representation import ProbeAccuracy, probe_accuracy

__all__ = [
    "AggregatePosterior",
    "CodeUsage",
    "Completeness",
    "Continuity",
    "Estimate",
    "ProbeAccuracy",
    "active_units",
    "aggregate_posterior",
    "along",
    "code_usage",
    "completeness",
    "continuity",
    "fitted_box",
    "fitted_mixture",
    "fitted_normal",
    "kl_per_dim",
    "lipschitz",
    "nearest_distances",
    "posterior_mean",
    "posterior_variance",
    "probe_accuracy",
    "spherical",
    "straight",
]
