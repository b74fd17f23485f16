r"""The seam: from a pair of Pyro programs and a batch to log-densities, one for every sample and datum.

Objectives, algorithms and estimators meet models only here. A program keeps the contract if its per-datum
sites lie in one plate called ``"data"`` at ``dim=-1``; a plate ``"samples"`` put around it at ``dim=-2`` then
draws everything ``num_samples`` times at once. From the two traces come

.. math:: \log w_s = \log p(x, z_s) - \log q(z_s \mid x), \qquad z_s \sim q(z \mid x),

of shape (samples, batch). Pyro's own importance weights are one number for the whole *batch*; log-likelihoods
per datum need this shape. ``poutine.mask`` is respected, ``poutine.scale`` is left out: it weights a loss and
is not part of a density.

*Discrete latents* are summed out by Pyro's enumeration. :func:`log_joint` and all that is built on it sum
over every discrete site that it is given no value for, :math:`\log \sum_y p(x, y, z)`; :func:`log_weights`
over those that the guide leaves out, and over those of the guide that are marked ``infer={"enumerate":
"parallel"}`` (as ``pyro.infer.config_enumerate`` does), :math:`\log \sum_y p(x, y, z_y) / q(z_y \mid x, y)`.

*Constrained latents*, such as those in an interval or a simplex, are reached from all of
:math:`\mathbb R^n` by Pyro's ``biject_to(support)``: :func:`at_unconstrained`.
"""

from pyro_vae.compiled import register_library, register_programs, register_requirements
from pyro_vae.traces.densities import Draws as Draws
from pyro_vae.traces.densities import LogJoint as LogJoint
from pyro_vae.traces.densities import at_point_masses as at_point_masses
from pyro_vae.traces.densities import check_batch as check_batch
from pyro_vae.traces.densities import decode as decode
from pyro_vae.traces.densities import draw_guide as draw_guide
from pyro_vae.traces.densities import draw_latents as draw_latents
from pyro_vae.traces.densities import draw_pair as draw_pair
from pyro_vae.traces.densities import factors as factors
from pyro_vae.traces.densities import first_nonfinite as first_nonfinite
from pyro_vae.traces.densities import guide_distributions as guide_distributions
from pyro_vae.traces.densities import kl_by_dimension as kl_by_dimension
from pyro_vae.traces.densities import likelihood as likelihood
from pyro_vae.traces.densities import log_guide as log_guide
from pyro_vae.traces.densities import log_joint as log_joint
from pyro_vae.traces.densities import log_weights as log_weights
from pyro_vae.traces.densities import model_distributions as model_distributions
from pyro_vae.traces.running import takes_samples as takes_samples
from pyro_vae.traces.simulation import sample as sample
from pyro_vae.traces.simulation import simulate as simulate
from pyro_vae.traces.sites import Program as Program
from pyro_vae.traces.unconstrained import DrawUnconstrained as DrawUnconstrained
from pyro_vae.traces.unconstrained import Unconstrained as Unconstrained
from pyro_vae.traces.unconstrained import at_unconstrained as at_unconstrained
from pyro_vae.traces.unconstrained import draw_unconstrained as draw_unconstrained
from pyro_vae.traces.unconstrained import log_guide_at as log_guide_at
from pyro_vae.traces.unconstrained import unconstrain as unconstrain
from pyro_vae.traces.unmoved import local_parameters as local_parameters
from pyro_vae.traces.unmoved import made_for_the_store as made_for_the_store
from pyro_vae.traces.unmoved import modules_of as modules_of
from pyro_vae.traces.unmoved import parameters_in_the_store as parameters_in_the_store
from pyro_vae.traces.unmoved import training_step as training_step
from pyro_vae.traces.unmoved import unmoved as unmoved

# Programs are made of this package; what trains, data and what registers modules with Pyro stand around them.
register_programs("pyro_vae")
register_requirements("pyro_vae")
register_library("pyro_vae.algorithms", "pyro_vae.training", "pyro_vae.data", "pyro_vae.models.program")
