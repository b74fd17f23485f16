r"""Uses of a density model: data that are missing, noisy, coarse, in between, or strange.

A datum x that was not seen as it is was *degraded*: p(x | z) became a density p(y | z) of what was seen. The
pair whose model observes y in place of x (:func:`degraded`) is a pair like any other, so that every sampler
and every estimator of the package takes it: its posterior is :math:`p(z \mid y)`, its evidence :math:`p(y)`.
Restoring a datum is posterior inference,

.. math:: p(x \mid y) = \int p(x \mid z, y)\, p(z \mid y)\, dz ,

with draws of z that the guide proposes, that are resampled by their importance weights, and refined by
Hamiltonian Monte Carlo (:func:`~pyro_vae.mcmc.sample_posterior`). Several draws differ where the datum
is ambiguous; a single reconstruction cannot say so.
"""

from pyro_vae.tasks.codes import AnomalyScore as AnomalyScore
from pyro_vae.tasks.codes import anomaly_score as anomaly_score
from pyro_vae.tasks.codes import interpolate as interpolate
from pyro_vae.tasks.codes import mix as mix
from pyro_vae.tasks.degradations import Degradation as Degradation
from pyro_vae.tasks.degradations import DegradedGuide as DegradedGuide
from pyro_vae.tasks.degradations import DegradedModel as DegradedModel
from pyro_vae.tasks.degradations import DegradedPair as DegradedPair
from pyro_vae.tasks.degradations import Linear as Linear
from pyro_vae.tasks.degradations import Mask as Mask
from pyro_vae.tasks.degradations import degraded as degraded
from pyro_vae.tasks.degradations import pooling as pooling
from pyro_vae.tasks.restoring import ConditionalDensity as ConditionalDensity
from pyro_vae.tasks.restoring import Restoration as Restoration
from pyro_vae.tasks.restoring import annealed as annealed
from pyro_vae.tasks.restoring import denoise as denoise
from pyro_vae.tasks.restoring import inpaint as inpaint
from pyro_vae.tasks.restoring import log_missing as log_missing
from pyro_vae.tasks.restoring import restore as restore
from pyro_vae.tasks.restoring import super_resolve as super_resolve
