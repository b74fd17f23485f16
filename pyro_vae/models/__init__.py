"""Pairs of Pyro programs, one file each: what is sampled, in which order."""

from pyro_vae.models.autoencoder import VQGuide, autoencoder, vq_vae
from pyro_vae.models.bayesian import BayesianGuide, BayesianModel, bayesian, draw
from pyro_vae.models.vae import VAEGuide, VAEModel, vae

__all__ = [
    "BayesianGuide",
    "BayesianModel",
    "VAEGuide",
    "VAEModel",
    "VQGuide",
    "autoencoder",
    "bayesian",
    "draw",
    "vae",
    "vq_vae",
]
