"""Experiments: a configuration of plain values, and what it builds.

This is the only place where strings are looked up: names of priors, families, objectives, ... become the
objects that the rest of the package passes around. It imports nothing heavy until something is built, so that
``--help`` answers at once.
"""

from pyro_vae.experiment.build import (
    arguments,
    build_family,
    build_objective,
    build_pair,
    build_posterior,
    build_prior,
    build_training,
    check_data,
    context,
    device,
    estimator,
    load_data,
    num_classes,
)
from pyro_vae.experiment.config import Config, ConfigError, with_absolute_paths
from pyro_vae.experiment.names import (
    BINARIZATIONS,
    COUNTS,
    DATA,
    DEVICES,
    ESTIMATORS,
    FAMILIES,
    GRADIENTS,
    GREY_LEVELS,
    INITS,
    MOST_DIMENSIONS,
    NETS,
    OBJECTIVES,
    OPTIMIZERS,
    POSTERIOR_OF,
    POSTERIORS,
    PRIORS,
    SCHEDULES,
)

__all__ = [
    "BINARIZATIONS",
    "COUNTS",
    "DATA",
    "DEVICES",
    "ESTIMATORS",
    "FAMILIES",
    "GRADIENTS",
    "GREY_LEVELS",
    "INITS",
    "MOST_DIMENSIONS",
    "NETS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "POSTERIORS",
    "POSTERIOR_OF",
    "PRIORS",
    "SCHEDULES",
    "Config",
    "ConfigError",
    "arguments",
    "build_family",
    "build_objective",
    "build_pair",
    "build_posterior",
    "build_prior",
    "build_training",
    "check_data",
    "context",
    "device",
    "estimator",
    "load_data",
    "num_classes",
    "with_absolute_paths",
]
