"""Algorithms, one file each: how theta and phi move. Each has ``step(*batch) -> metrics``."""

from pyro_vae.algorithms.pyro_svi import PyroSVI
from pyro_vae.algorithms.svi import SVI

__all__ = ["SVI", "PyroSVI"]
