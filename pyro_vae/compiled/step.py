"""Whole training steps: loss, gradients and the optimiser's update."""

import dataclasses
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.compiled.capture import Outputs
from pyro_vae.compiled.function import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.launch import Launch, can_launch, taken_as_is
from pyro_vae.compiled.private import version
from pyro_vae.compiled.updates import FusedUpdate, has_fused_update

_STEPS_A_LAUNCH = 20


def can_update(outputs: Outputs, gradients: Iterable[Tensor]) -> bool:
    """Return False if gradients are nan or infinite, which is checked on a CPU alone, where that is cheap.

    Without the update, whoever looks at the metrics finds the parameters that led there. An infinite loss
    alone says nothing: that of ``TraceTailAdaptive_ELBO`` is infinite by design. A finite one is taken to
    have finite gradients. Output ``"inside"``, if any, is nan where data or parameters are not allowed.
    """
    loss = outputs["loss"]
    if loss.device.type != "cpu" or math.isfinite(loss.item()):
        return True
    is_inside = "inside" not in outputs or not bool(outputs["inside"].isnan())
    return is_inside and all(bool(gradient.isfinite().all()) for gradient in gradients)


class CompiledStep:
    """Gradient steps on output ``"loss"`` of a function that runs Pyro programs.

    Args:
        function: From a batch to named tensors, among them ``"loss"``.
        roots: What it runs: modules, functions, ELBO objects.
        optimizers: Present torch optimisers of all parameters; None if some are not torch's.
        update: Update of parameters by their gradients, for optimisers without fused kernels.
        eager: Whole step, update included, that runs while nothing is compiled.
        always: Compile at once, whether it is worth it or not.
        clears_gradients: Leave None as ``grad`` of parameters after a compiled step, not zeros, as Pyro does,
            to which others may add.
        traced_only: Train only the parameters that Pyro's handlers see, as ``pyro.infer.SVI`` does.
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
        clears_gradients: bool = False,
        traced_only: bool = False,
    ) -> None:
        self.function = CompiledFunction(
            function, roots, differentiate=True, eager=eager, always=always, traced_only=traced_only
        )
        self._optimizers = optimizers
        self._update = update
        self._clears_gradients = clears_gradients
        self._fused: FusedUpdate | None = None
        self._launches: dict[tuple, _Recorded] = {}  # by the shapes of their inputs
        self._examples: dict[int, tuple[Tensor, ...]] = {}  # batches by their size
        self._zeros: dict[Tensor, Tensor] = {}  # gradients that were left, by parameter

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled: a copy is compiled anew."""
        return {**vars(self), "_fused": None, "_launches": {}, "_examples": {}, "_zeros": {}}

    def is_of(self, *roots: object) -> bool:
        """Return True if these are the roots, and not others that were set since."""
        return all(map(operator.is_, roots, self.function.roots))

    def step(self, *args: Any, **kwargs: Any) -> Outputs:
        """Update once; return the outputs from before the update. On a GPU it may be one launch."""
        if not kwargs and all(map(torch.is_tensor, args)) and can_launch(args):
            outputs = self._launched(lambda step, *batch: step(*batch), args, args)
            if outputs is not None:
                return outputs
        outputs, gradients = self.function(*args, **kwargs)
        if gradients and can_update(outputs, gradients):
            params, optimizers = self.function.trainable, self._optimizers()
            for tensor, gradient in zip(self.function.left, gradients[len(params) :], strict=True):
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
            gradients = gradients[: len(params)]
            if not self._has_fused(optimizers, params):
                self._fused = None
                if optimizers is not None and all(map(has_fused_update, optimizers)):
                    self._fused = FusedUpdate(optimizers, params)
            if self._clears_gradients:
                for param in params:
                    param.grad = None
            else:
                gradients = self._with_those_there(params, gradients)
            if self._fused is None:
                self._update(params, gradients)
            else:
                self._fused(gradients)
            if not self._clears_gradients:
                self._leave_zeros(params)
        return outputs

    def _with_those_there(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return gradients plus those that others have left in the parameters since the last step."""
        added = []
        for param, gradient in zip(params, gradients, strict=True):
            there = param.grad
            if there is None or (there is self._zeros.get(param) and version(there) == 0):
                added.append(gradient)
            else:
                added.append(gradient + there)
                param.grad = None
        return added

    def _leave_zeros(self, params: Sequence[Tensor]) -> None:
        """Leave zeros as gradients, as Pyro does, which goes on to update what has one."""
        for param in params:
            if param.grad is None:
                param.grad = self._zeros[param] = torch.zeros_like(param)

    def _has_fused(self, optimizers: list[Optimizer] | None, params: list[Tensor]) -> bool:
        """Return True if there is a fused update for these."""
        return None not in (self._fused, optimizers) and self._fused.is_current(optimizers, params)

    def steps(
        self,
        step: Callable[..., Outputs],
        draw: Callable[[Tensor], tuple[Tensor, ...]],
        indices: Iterable[Tensor],
        generators: Sequence[torch.Generator],
    ) -> Iterator[tuple[Outputs, tuple[Tensor, ...]]]:
        """Take a step on ``draw(index)`` for every index; on a GPU, if asked for, several in one launch.

        Args:
            step: A single step, which calls :meth:`step`.
            draw: From positions of data to the arguments of a step, by operations of torch on the device.
            indices: Positions of the data of every minibatch.
            generators: Sources of the random numbers of ``draw``.

        Yields:
            Outputs, each a vector over one or several steps, and a batch of the same size as theirs.
        """

        def several(step: Callable[..., Outputs], index: Tensor) -> Outputs:
            taken = [step(*draw(row)) for row in index.unbind()]
            return {name: torch.stack([outputs[name] for outputs in taken]) for name in taken[0]}

        for rows in _equal_neighbours(indices, _STEPS_A_LAUNCH):
            batch = self._examples.get(len(rows[0]), ())
            if len(rows) == _STEPS_A_LAUNCH and can_launch(rows):
                inputs = (torch.stack(rows),)
                outputs = self._launched(several, batch, inputs, len(rows), generators, draw)
                if outputs is not None:
                    yield outputs, batch
                    continue
            for index in rows:
                batch = self._examples[len(index)] = draw(index)
                yield {name: value[None] for name, value in step(*batch).items()}, batch

    def _launched(
        self,
        steps: Callable[..., Outputs],
        batch: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        num_steps: int = 1,
        generators: Sequence[torch.Generator] = (),
        draw: Callable | None = None,
    ) -> Outputs | None:
        """Return outputs of ``steps(step, *inputs)`` as one CUDA graph; None if they are to be taken singly.

        Args:
            steps: From a function that takes one step on a batch, and the inputs, to outputs.
            batch: Example of the batches.
            inputs: Tensors.
            num_steps: Number of steps.
            generators: Sources of the random numbers of ``steps``.
            draw: Function by which ``steps`` makes batches of the inputs.
        """
        graph = self.function.ready(batch, num_steps)
        if graph is None or not self._has_fused(self._optimizers(), self.function.trainable):
            return None
        state = [*graph.own, *self._fused.state]
        as_is = (draw, graph, self._fused, self._fused.settings, taken_as_is(state, inputs[0].device))
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        recorded = self._launches.get(key)
        if recorded is None or recorded.as_is != as_is:
            recorded = self._launches[key] = _Recorded(as_is)  # without the memory of the one before
        if recorded.num_steps < _STEPS_A_LAUNCH:  # what changes at every step is not worth it
            recorded.num_steps += num_steps
            return None
        if recorded.launch is not None:
            outputs = recorded.launch(*inputs)
        elif not recorded.is_refused:

            def step(*batch: Tensor) -> Outputs:
                outputs, gradients = graph([tensor.contiguous() for tensor in batch])
                self._fused(gradients)
                return outputs

            launch = Launch(lambda *tensors: steps(step, *tensors), inputs, state, generators)
            if launch.refused is None:
                recorded.launch = launch
            else:
                recorded.is_refused = True
                warnings.warn(
                    f"steps are launched one by one: {launch.refused}", NotCompiledWarning, stacklevel=4
                )
            outputs = launch.first
        else:
            return None
        graph.num_calls += num_steps
        return outputs


@dataclasses.dataclass
class _Recorded:
    """Steps on inputs of one shape: what a recording of them fixes, and the recording."""

    as_is: tuple
    num_steps: int = 0  # one by one, before the recording
    launch: Launch | None = None
    is_refused: bool = False


def _equal_neighbours(indices: Iterable[Tensor], count: int) -> Iterator[list[Tensor]]:
    """Yield up to ``count`` neighbours of equal length at a time."""
    for _, group in itertools.groupby(indices, len):
        while rows := list(itertools.islice(group, count)):
            yield rows
