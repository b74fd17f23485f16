r"""Objectives: what is maximised, as Pyro ELBO objects.

``differentiable_loss(model, guide, *batch)`` is *minus* the objective, summed over the batch, in nats. Pyro's
own objects are used where they are right:

- ``pyro.infer.Trace_ELBO`` is the paper's estimator A,
  :math:`\log p(x, z) - \log q(z \mid x)` at draws of z (Kingma & Welling 2013, equation 6);
- ``pyro.infer.TraceMeanField_ELBO`` is its estimator B,
  :math:`\log p(x \mid z) - KL(q(z \mid x) \| p(z))` with the divergence in closed form (equation 7);
  where Pyro knows no closed form, as for a mixture prior, it falls back on A for this site.

:class:`MAP` and :class:`BetaELBO` wrap one of those. :class:`FreeBitsELBO`, and the objectives that weigh
draws, :class:`ImportanceWeightedELBO`, :class:`RenyiELBO` and :class:`ReweightedWakeSleep`, are *per datum*:
they need a pair whose sites lie in the plate ``"data"`` (:mod:`pyro_vae.traces`), and leave
``poutine.scale`` out. So is :class:`WakeSleepPhases`, the loss of wake-sleep. All are ELBO
objects again, so ``pyro.infer.SVI`` takes them too.
"""

from pyro_vae.objectives.base import Objective as Objective
from pyro_vae.objectives.base import loss_and_metrics as loss_and_metrics
from pyro_vae.objectives.importance import ImportanceWeightedELBO as ImportanceWeightedELBO
from pyro_vae.objectives.importance import RenyiELBO as RenyiELBO
from pyro_vae.objectives.importance import ReweightedWakeSleep as ReweightedWakeSleep
from pyro_vae.objectives.wake_sleep import WakeSleepPhases as WakeSleepPhases
from pyro_vae.objectives.weighted import MAP as MAP
from pyro_vae.objectives.weighted import BetaELBO as BetaELBO
from pyro_vae.objectives.weighted import FreeBitsELBO as FreeBitsELBO
