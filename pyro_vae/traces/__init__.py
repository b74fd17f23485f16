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

from pyro_vae.traces.densities import (
    Draws,
    LogJoint,
    at_point_masses,
    check_batch,
    decode,
    draw_guide,
    draw_latents,
    draw_pair,
    factors,
    first_nonfinite,
    guide_distributions,
    kl_by_dimension,
    likelihood,
    log_guide,
    log_joint,
    log_weights,
    model_distributions,
)
from pyro_vae.traces.running import takes_samples
from pyro_vae.traces.simulation import sample, simulate
from pyro_vae.traces.sites import Program
from pyro_vae.traces.unconstrained import (
    DrawUnconstrained,
    Unconstrained,
    at_unconstrained,
    draw_unconstrained,
    log_guide_at,
    unconstrain,
)
from pyro_vae.traces.unmoved import (
    local_parameters,
    made_for_the_store,
    modules_of,
    parameters_in_the_store,
    training_step,
    unmoved,
)

__all__ = [
    "DrawUnconstrained",
    "Draws",
    "LogJoint",
    "Program",
    "Unconstrained",
    "at_point_masses",
    "at_unconstrained",
    "check_batch",
    "decode",
    "draw_guide",
    "draw_latents",
    "draw_pair",
    "draw_unconstrained",
    "factors",
    "first_nonfinite",
    "guide_distributions",
    "kl_by_dimension",
    "likelihood",
    "local_parameters",
    "log_guide",
    "log_guide_at",
    "log_joint",
    "log_weights",
    "made_for_the_store",
    "model_distributions",
    "modules_of",
    "parameters_in_the_store",
    "sample",
    "simulate",
    "takes_samples",
    "training_step",
    "unconstrain",
    "unmoved",
]
