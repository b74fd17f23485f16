"""A whole training step: loss, gradients and the optimiser's update."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.compiled.updates import FusedUpdate, has_fused_update


def can_update(loss: Tensor) -> bool:
    """Whether to update by this loss: on a CPU, where looking costs nothing, not if it is nan or infinite.

    Whoever looks at the metrics then finds the parameters that led there.
    """
    return loss.device.type != "cpu" or math.isfinite(loss.item())


class CompiledStep:
    """Gradient steps on output ``"loss"`` of a function that runs Pyro programs.

    Args:
        function: From a batch to named tensors, among them ``"loss"``.
        roots: What it runs: modules, functions, ELBO objects.
        optimizers: The torch optimisers of all parameters at present; None if there are others.
        update: The update of these parameters by these gradients for optimisers without fused kernels.
        eager: A whole step, update included, that runs while nothing is compiled.
        always: Compile at once, whether it is worth it or not.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        roots: tuple[object, ...],
        optimizers: Callable[[], list[Optimizer] | None],
        update: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
        eager: Callable[..., Outputs],
        *,
        always: bool = False,
    ) -> None:
        self.function = CompiledFunction(function, roots, differentiate=True, eager=eager, always=always)
        self._optimizers = optimizers
        self._update = update
        self._fused: FusedUpdate | None = None

    def step(self, *args: Any, **kwargs: Any) -> Outputs:
        """One update; the outputs as they were before it."""
        outputs, gradients = self.function(*args, **kwargs)
        if gradients and can_update(outputs["loss"]):
            params = self.function.trainable
            if self._fused is None or not self._fused.is_current(params):
                self._fused = self._make_fused(params)
            if self._fused is None:
                self._update(params, gradients)
            else:
                self._fused(gradients)
        return outputs

    def _make_fused(self, params: list[Tensor]) -> FusedUpdate | None:
        optimizers = self._optimizers()
        if optimizers is None or not all(map(has_fused_update, optimizers)):
            return None
        return FusedUpdate(optimizers, params)

    def expect(self, num_steps: int) -> None:
        """Say how many steps are to come."""
        self.function.planned_calls = num_steps

    def state_dict(self) -> dict[str, Any]:
        """What was compiled, see :meth:`CompiledFunction.state_dict`."""
        return self.function.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.function.load_state_dict(state)
