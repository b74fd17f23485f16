"""A whole training step: loss, gradients and the optimiser's update."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.launch import Launch, can_launch
from pyro_vae.compiled.updates import FusedUpdate, has_fused_update

_STEPS_A_LAUNCH = 20


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
        self._launches = True
        self._launch: Launch | None = None
        self._recorded: tuple | None = None
        self._examples: dict[int, tuple[Tensor, ...]] = {}  # batches by their size

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

    def steps(
        self,
        step: Callable[..., Outputs],
        draw: Callable[[Tensor], tuple[Tensor, ...]],
        indices: Iterable[Tensor],
        generators: Sequence[torch.Generator],
    ) -> Iterator[tuple[Outputs, tuple[Tensor, ...]]]:
        """A step on ``draw(index)`` for every index; on a GPU, once compiled, several in one launch.

        Args:
            step: A single step, which calls :meth:`step`.
            draw: From positions of data to the arguments of a step, by operations of torch on the device.
            indices: Positions of the data of every minibatch.
            generators: Where ``draw`` takes random numbers from.

        Yields:
            Outputs, each a vector over one or several steps, and a batch of as many data as theirs.
        """
        for rows in _equal_neighbours(indices, _STEPS_A_LAUNCH):
            outputs = self._launched(draw, rows, generators)
            if outputs is not None:
                yield outputs, self._examples[len(rows[0])]
                continue
            for index in rows:
                batch = self._examples[len(index)] = draw(index)
                yield {name: value[None] for name, value in step(*batch).items()}, batch

    def _launched(
        self, draw: Callable[..., Any], rows: list[Tensor], generators: Sequence[torch.Generator]
    ) -> Outputs | None:
        """Outputs of these steps as one CUDA graph, if there is nothing to be checked before."""
        if not self._launches or not can_launch(rows[0].device) or len(rows) < _STEPS_A_LAUNCH:
            return None
        graph = self.function.ready(self._examples.get(len(rows[0]), ()), len(rows))
        if graph is None or self._fused is None or not self._fused.is_current(self.function.trainable):
            return None
        index, state = torch.stack(rows), [*graph.own, *self._fused.state]
        # All that a recording takes as it is.
        addresses = [tensor.data_ptr() for tensor in state]
        recorded = (draw, graph, self._fused, self._fused.settings, addresses, len(rows[0]))
        if self._launch is None or self._recorded != recorded:

            def step(row: Tensor) -> Outputs:
                outputs, gradients = graph([tensor.contiguous() for tensor in draw(row)])
                self._fused(gradients)
                return outputs

            self._launch = None  # and its memory
            launch = Launch(step, index, state, generators)
            if launch.refused is None:
                self._launch, self._recorded = launch, recorded
            else:
                self._launches = False
                warnings.warn(
                    f"steps are launched one by one: {launch.refused}", NotCompiledWarning, stacklevel=4
                )
            outputs = launch.first
        else:
            outputs = self._launch(index)
        graph.num_calls += len(rows)
        return outputs


def _equal_neighbours(indices: Iterable[Tensor], count: int) -> Iterator[list[Tensor]]:
    """Up to ``count`` neighbours of equal length at a time."""
    for _, group in itertools.groupby(indices, len):
        while rows := list(itertools.islice(group, count)):
            yield rows
