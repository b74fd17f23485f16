"""Several steps in one launch of a GPU: a CUDA graph, with the draw of every minibatch inside.

A step of a small model keeps a GPU busy for 0.05 ms, and Python needs ten times as long to order its kernels
one by one. A CUDA graph is recorded once and ordered as a whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.compiled.capture import CaptureError, Outputs
from pyro_vae.compiled.function import agree


def can_launch(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda" and torch.version.hip is None


class Launch:
    """Steps on as many minibatches as there are rows in ``index``, recorded as one CUDA graph.

    The recording is tried at once: from the same state and the same random numbers it shall lead to the same
    outputs and the same ``state`` as the steps one by one.

    Args:
        step: From a row of ``index`` to outputs; updates ``state`` in place, without looking at a value.
        index: Positions of the data of each minibatch, (num_steps, batch), on the GPU.
        state: All tensors that a step changes.
        generators: Where the random numbers come from, besides the GPU's own generator.

    Attributes:
        first: Outputs of the steps on ``index``, which the trial has taken.
        is_right: Whether the trial went well.

    Raises:
        CaptureError: If the steps cannot be recorded.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Outputs],
        index: Tensor,
        state: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> None:
        def steps(rows: Tensor) -> Outputs:
            taken = [step(row) for row in rows.unbind()]
            return {name: torch.stack([outputs[name] for outputs in taken]) for name in taken[0]}

        self._index = index.clone()
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self._graph):
                self._outputs = steps(self._index)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(f"its steps cannot be recorded as a CUDA graph ({reason})") from error

        generators = [_default_generator(index.device), *generators]
        before = [tensor.detach().clone() for tensor in state]
        drawn = [generator.get_state() for generator in generators]
        recorded = self(index)
        after = [tensor.detach().clone() for tensor in state]
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        for generator, value in zip(generators, drawn, strict=True):
            generator.set_state(value)
        self.first = steps(index)
        pairs = [(recorded[name], value) for name, value in self.first.items()]
        self.is_right = all(agree(*pair) for pair in [*pairs, *zip(after, state, strict=True)])

    def __call__(self, index: Tensor) -> Outputs:
        """The outputs of the steps, a vector for each."""
        self._index.copy_(index)
        self._graph.replay()
        return {name: value.clone() for name, value in self._outputs.items()}


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]
