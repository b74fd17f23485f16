"""Several steps in one launch of a GPU: a CUDA graph, with the draw of every minibatch inside.

A step of a small model keeps a GPU busy for 0.05 ms, and Python needs ten times as long to order its kernels
one by one. A CUDA graph is recorded once and ordered as a whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import agree


def can_launch(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda" and torch.version.hip is None


class Launch:
    """Steps on as many minibatches as there are rows in ``index``, recorded as one CUDA graph.

    They are taken one by one first. The recording is then tried: from the same state and the same random
    numbers it shall lead to the same outputs and the same ``state``.

    Args:
        step: From a row of ``index`` to outputs; updates ``state`` in place, without looking at a value.
        index: Positions of the data of each minibatch, (num_steps, batch), on the GPU.
        state: All tensors that a step changes.
        generators: Where the random numbers come from, besides the GPU's own generator.

    Attributes:
        first: Outputs of the steps on ``index``, one by one.
        refused: Why the recording cannot be used, if it cannot.
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

        self.refused: str | None = None
        self._index = index.clone()
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        generators = [_default_generator(index.device), *generators]
        before = _Moment(state, generators)
        self.first = steps(index)  # which loads all that they run: it could not be loaded while recording
        after = _Moment(state, generators)
        try:
            # After a failure torch leaves the stream of the recording in place, but for the outer context.
            with (
                torch.cuda.stream(torch.cuda.current_stream(index.device)),
                torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
            ):
                self._outputs = steps(self._index)
        except RuntimeError as error:
            _stop_recording(generators)
            reason = str(error).strip().splitlines()[0]
            self.refused = f"they cannot be recorded as a CUDA graph ({reason})"
            return
        before.restore()
        recorded = self(index)
        pairs = [(recorded[name], value) for name, value in self.first.items()]
        if not all(agree(*pair) for pair in [*pairs, *zip(state, after.values, strict=True)]):
            self.refused = "recorded as a CUDA graph they compute something else"
        after.restore()

    def __call__(self, index: Tensor) -> Outputs:
        """The outputs of the steps, a vector for each."""
        self._index.copy_(index)
        self._graph.replay()
        return {name: value.clone() for name, value in self._outputs.items()}


class _Moment:
    """Values of tensors and states of random generators, to go back to."""

    def __init__(self, tensors: Sequence[Tensor], generators: Sequence[torch.Generator]) -> None:
        self._tensors, self._generators = tensors, generators
        self.values = [tensor.detach().clone() for tensor in tensors]
        self._drawn = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self.values, strict=True):
            tensor.copy_(value)
        for generator, drawn in zip(self._generators, self._drawn, strict=True):
            generator.set_state(drawn)


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]


def _stop_recording(generators: Sequence[torch.Generator]) -> None:
    """Give generators fresh states: after a failure torch takes the old ones for those of a recording."""
    for generator in generators:
        generator.graphsafe_set_state(generator.clone_state())
