"""Qualities of a latent space: its information, its regularity, and the worth of its codes."""

from pyro_vae.latents.information import AggregatePosterior as AggregatePosterior
from pyro_vae.latents.information import CodeUsage as CodeUsage
from pyro_vae.latents.information import Estimate as Estimate
from pyro_vae.latents.information import active_units as active_units
from pyro_vae.latents.information import aggregate_posterior as aggregate_posterior
from pyro_vae.latents.information import code_usage as code_usage
from pyro_vae.latents.information import kl_per_dim as kl_per_dim
from pyro_vae.latents.information import posterior_mean as posterior_mean
from pyro_vae.latents.information import posterior_variance as posterior_variance
from pyro_vae.latents.regularity import Completeness as Completeness
from pyro_vae.latents.regularity import Continuity as Continuity
from pyro_vae.latents.regularity import along as along
from pyro_vae.latents.regularity import completeness as completeness
from pyro_vae.latents.regularity import continuity as continuity
from pyro_vae.latents.regularity import fitted_box as fitted_box
from pyro_vae.latents.regularity import fitted_mixture as fitted_mixture
from pyro_vae.latents.regularity import fitted_normal as fitted_normal
from pyro_vae.latents.regularity import lipschitz as lipschitz
from pyro_vae.latents.regularity import nearest_distances as nearest_distances
from pyro_vae.latents.regularity import spherical as spherical
from pyro_vae.latents.regularity import straight as straight
from pyro_vae.latents.representation import ProbeAccuracy as ProbeAccuracy
from pyro_vae.latents.representation import probe_accuracy as probe_accuracy
