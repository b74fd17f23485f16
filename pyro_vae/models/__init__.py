"""Pairs of Pyro programs, one file each: what is sampled, in which order."""

from pyro_vae.models.vae import VAEGuide, VAEModel, vae

__all__ = ["VAEGuide", "VAEModel", "vae"]
