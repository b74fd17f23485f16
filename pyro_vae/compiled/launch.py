"""Steps in one launch of a GPU: a CUDA graph, with the draw of their minibatches inside if it can be.

A step of a small model keeps a GPU busy for 0.05 ms, and Python takes ten times as long to launch its kernels
one by one. A CUDA graph is recorded once and launched as a whole. So far this has run on an emulation of such
graphs only, so it has to be asked for, by ``COMPILED_CUDA_GRAPHS=1`` in the environment; otherwise the
kernels of a compiled step are launched one by one.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.private import default_generator
from pyro_vae.compiled.variant import agree


def can_launch(tensors: Sequence[Tensor]) -> bool:
    """Return True if CUDA graphs were asked for and can take these tensors."""
    if not tensors or any(tensor.device.type != "cuda" for tensor in tensors) or torch.version.hip:
        return False
    return os.environ.get("COMPILED_CUDA_GRAPHS", "0") not in ("", "0")


def taken_as_is(tensors: Sequence[Tensor], device: torch.device) -> list:
    """Return what a recording fixes: addresses of tensors on the GPU, and values of the others."""
    return [tensor.data_ptr() if tensor.device == device else tensor.tolist() for tensor in tensors]


class Launch:
    """One or several steps, recorded as one CUDA graph.

    The steps are first taken one by one. Then the recording is tried: from the same state and the same random
    numbers it must lead to the same outputs and the same ``state``.

    Args:
        steps: From tensors to outputs; updates ``state`` in place, without looking at a value.
        inputs: Tensors on the GPU.
        state: All tensors that the steps change.
        generators: Sources of random numbers, besides the GPU's own generator.

    Attributes:
        first: Outputs of the steps on ``inputs``, taken one by one.
        refused: Reason why the recording cannot be used, if it cannot.
    """

    def __init__(
        self,
        steps: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        state: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> None:
        self.refused: str | None = None
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        device = inputs[0].device
        generators = [default_generator(device), *generators]
        before = _Moment(state, generators)
        self.first = steps(*inputs)  # which loads all that they run: it could not be loaded while recording
        after = _Moment(state, generators)
        try:
            # After a failure torch leaves the stream of the recording in place, but for the outer context.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
            ):
                self._outputs = steps(*self._inputs)
        except RuntimeError as error:
            _stop_recording(generators)
            reason = str(error).strip().splitlines()[0]
            self.refused = f"they cannot be recorded as a CUDA graph ({reason})"
            return
        before.restore()
        recorded = self(*inputs)
        pairs = [(recorded[name], value) for name, value in self.first.items()]
        if not all(agree(*pair) for pair in [*pairs, *zip(state, after.values, strict=True)]):
            self.refused = "recorded as a CUDA graph they compute something else"
        after.restore()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return the outputs of the steps on these tensors."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
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


def _stop_recording(generators: Sequence[torch.Generator]) -> None:
    """Give generators fresh states; after a failure torch takes the old ones for those of a recording."""
    for generator in generators:
        generator.graphsafe_set_state(generator.clone_state())
