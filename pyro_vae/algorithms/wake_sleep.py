r"""The wake-sleep algorithm (Hinton, Dayan, Frey & Neal, *The wake-sleep algorithm*, 1995).

The baseline of Kingma & Welling's figures 2 and 3. It needs no gradient of a draw, so that latents may be
discrete. Of every datum x of a minibatch,

- *wake*: draw :math:`z \sim q_\phi(z \mid x)` and move theta along :math:`\nabla_\theta \log p_\theta(x, z)`;
- *sleep*: draw :math:`(x', z') \sim p_\theta(x, z)` and move phi along
  :math:`\nabla_\phi \log q_\phi(z' \mid x')`.

The wake phase climbs the bound in theta. The sleep phase descends :math:`KL(p(z \mid x) \| q(z \mid x))`,
the other way round than the bound has it, and for data that the model dreams of, not for those that there
are: the two phases have no common objective.
"""

from collections.abc import Iterator
from typing import Any, Literal

import pyro
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_vae.algorithms.svi import SVI
from pyro_vae.arguments import Count, checked
from pyro_vae.objectives import MAP, Objective
from pyro_vae.traces import Program, draw, draw_guide, log_guide, log_joint, simulate, unmoved


class WakeSleep:
    """Both phases in one step.

    Args:
        model: A Pyro program; an ``nn.Module`` that keeps the contract.
        guide: The same, for q(z | x).
        optimizer: Any optimiser of ``torch.optim`` over the parameters of both.
        num_data: N, the number of training data, for maximum a posteriori with a standard normal prior on the
            weights of both programs, as in the paper (:class:`~pyro_vae.objectives.MAP`); by default maximum
            likelihood.
        compile: As of :class:`SVI`.

    Raises:
        TypeError: As :class:`SVI`.
    """

    @checked
    def __init__(
        self,
        model: Any,
        guide: Any,
        optimizer: Any,
        *,
        num_data: Count | None = None,
        compile: bool | Literal["always"] = True,  # noqa: A002
    ) -> None:
        phases = _Phases() if num_data is None else MAP(num_data, _Phases())
        self._svi = SVI(model, guide, optimizer, phases, compile=compile)

    @property
    def model(self) -> nn.Module:
        """p(x, z)."""
        return self._svi.model

    @property
    def guide(self) -> nn.Module:
        """q(z | x)."""
        return self._svi.guide

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the parameters of both."""
        return self._svi.optimizer

    def step(self, *batch: Tensor) -> dict[str, Tensor]:
        r"""One update of theta and phi.

        Args:
            *batch: Arguments of both programs; the first is the data.

        Returns:
            As :meth:`SVI.step`: ``elbo``, the bound :math:`\log p(x, z) - \log q(z \mid x)` at the draw of
            the wake phase (which the paper reports), and ``sleep``, :math:`\log q(z' \mid x')`.

        Raises:
            SupportError, ValueError: As :meth:`SVI.step`; also if data cannot be drawn from the model
                (``traces.simulate``).
        """
        return self._svi.step(*batch)

    def steps(self, batches: Any) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, ...]]]:
        """As :meth:`SVI.steps`."""
        return self._svi.steps(batches)

    def state_dict(self) -> dict:
        """As :meth:`SVI.state_dict`."""
        return self._svi.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._svi.load_state_dict(state)

    def expect(self, num_steps: int | None) -> None:
        """As :meth:`SVI.expect`."""
        self._svi.expect(num_steps)


class _Phases(Objective):
    """A loss whose gradient by theta is that of the wake phase and by phi that of the sleep phase.

    No draw carries a gradient, so that the sum of both does it. (What a VampPrior takes from the guide is a
    parameter of the model as well, and moved by the wake phase, too.)
    """

    def __init__(self) -> None:
        super().__init__()

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See ``objectives.loss_and_metrics``."""
        if pyro.settings.get("validate_poutine"):  # that the two fit each other
            with unmoved(model, guide), torch.random.fork_rng(), torch.no_grad():
                draw(model, guide, *batch, num_samples=1)
        with torch.no_grad():
            latents, log_q = draw_guide(guide, *batch, num_samples=1)
            dreamt, dreams = simulate(model, *batch)
        wake = sum(log_joint(model, latents, *batch))
        sleep = log_guide(guide, dreamt, *dreams)
        metrics = {"elbo": (wake.detach() - log_q).mean(), "sleep": sleep.detach().mean()}
        return -(wake + sleep).sum(), metrics
