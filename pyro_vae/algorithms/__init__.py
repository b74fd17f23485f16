"""Algorithms, one file each: how theta and phi move. Each has ``step(*batch) -> metrics``."""

from pyro_vae.algorithms.mcem import MCEM
from pyro_vae.algorithms.pyro_svi import PyroSVI
from pyro_vae.algorithms.svi import SVI
from pyro_vae.algorithms.wake_sleep import WakeSleep

__all__ = ["MCEM", "SVI", "PyroSVI", "WakeSleep"]
