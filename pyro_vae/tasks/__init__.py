r"""What a density model is for: data that are missing, noisy, coarse, in between, or strange.

Whatever happened to a datum is a *degradation* of p(x | z) into a density p(y | z) of what was seen. The pair
whose model observes y in place of x (:func:`degraded`) is a pair like any other, so that every sampler
and every estimator of the package takes it: its posterior is :math:`p(z \mid y)`, its evidence :math:`p(y)`.
Restoring a datum is posterior inference,

.. math:: p(x \mid y) = \int p(x \mid z, y)\, p(z \mid y)\, dz ,

with draws of z that the guide proposes, that are resampled by their importance weights, and refined by
Hamiltonian Monte Carlo (:func:`~pyro_vae.mcmc.sample_posterior`). Several draws differ where the datum
is ambiguous; a single reconstruction cannot say so.
"""

from pyro_vae.tasks.codes import AnomalyScore, anomaly_score, interpolate, mix
from pyro_vae.tasks.degradations import (
    Degradation,
    DegradedGuide,
    DegradedModel,
    DegradedPair,
    Linear,
    Mask,
    degraded,
    pooling,
)
from pyro_vae.tasks.restoring import (
    ConditionalDensity,
    Restoration,
    annealed,
    denoise,
    inpaint,
    log_missing,
    restore,
    super_resolve,
)

__all__ = [
    "AnomalyScore",
    "ConditionalDensity",
    "Degradation",
    "DegradedGuide",
    "DegradedModel",
    "DegradedPair",
    "Linear",
    "Mask",
    "Restoration",
    "annealed",
    "anomaly_score",
    "degraded",
    "denoise",
    "inpaint",
    "interpolate",
    "log_missing",
    "mix",
    "pooling",
    "restore",
    "super_resolve",
]
