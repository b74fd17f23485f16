r"""Wake-sleep (Hinton, Dayan, Frey & Neal, *The wake-sleep algorithm*, 1995) as a loss.

The baseline of Kingma & Welling's figures 2 and 3. It needs no gradient of a draw, so that latents may be
discrete. Of every datum x of a minibatch,

- *wake*: draw :math:`z \sim q_\phi(z \mid x)` and move theta along :math:`\nabla_\theta \log p_\theta(x, z)`;
- *sleep*: draw :math:`(x', z') \sim p_\theta(x, z)` and move phi along
  :math:`\nabla_\phi \log q_\phi(z' \mid x')`.

The wake phase climbs the bound in theta. The sleep phase descends :math:`KL(p(z \mid x) \| q(z \mid x))`,
the other way round than the bound has it, and for data that the model dreams of, not for those that there
are: the two phases have no common objective.
"""

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.traces import Program, draw_guide, draw_pair, log_guide, log_joint, simulate, unmoved


class WakeSleepPhases(Objective):
    r"""A loss whose gradient by theta is that of the wake phase and by phi that of the sleep phase.

    No draw carries a gradient, so that the sum of both does it. (What a VampPrior takes from the guide is a
    parameter of the model as well, and moved by the wake phase, too.) The gradients of the loss mean
    something, its value nothing.

    Metrics, in nats per datum: ``elbo``, the bound :math:`\log p(x, z) - \log q(z \mid x)` at the draw of the
    wake phase (which the paper reports), and ``sleep``, :math:`\log q(z' \mid x')`.

    Raises:
        ValueError: While running, if data cannot be drawn from the model (``traces.simulate``).
    """

    def __init__(self) -> None:
        super().__init__()

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See ``objectives.loss_and_metrics``."""
        if pyro.settings.get("validate_poutine"):  # that the two fit each other
            with unmoved(model, guide), torch.random.fork_rng(), torch.no_grad():
                draw_pair(model, guide, *batch, num_samples=1)
        with torch.no_grad():
            latents, log_q = draw_guide(guide, *batch, num_samples=1)
            dreamt, dreams = simulate(model, *batch)
        wake = sum(log_joint(model, latents, *batch))
        sleep = log_guide(guide, dreamt, *dreams)
        metrics = {"elbo": (wake.detach() - log_q).mean(), "sleep": sleep.detach().mean()}
        return -(wake + sleep).sum(), metrics
