"""The laboratory: plain settings become runs, ``train(config, folder) -> Run``.

This is the only place where strings are looked up: names of priors, families, objectives, ...
(:mod:`.choices`) and of systems (:mod:`.systems`) become the objects that the rest of the package passes
around. Nothing heavy is imported before something is built, so that ``--help`` answers at once.
"""

from pyro_vae.lab.config import Config, ConfigError, Facts, with_absolute_paths
from pyro_vae.lab.runs import Run, load_config, load_run
from pyro_vae.lab.train import train

__all__ = ["Config", "ConfigError", "Facts", "Run", "load_config", "load_run", "train", "with_absolute_paths"]
