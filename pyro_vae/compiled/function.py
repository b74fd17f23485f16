"""Functions that run Pyro programs, captured and compiled when that pays, and never silently wrong."""

import contextlib
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.compiled.call import Call, key_of, shapes_in
from pyro_vae.compiled.capture import NEITHER, Outputs, capture
from pyro_vae.compiled.inductor import check_cache_folder
from pyro_vae.compiled.private import _PYRO_STACK, DeviceContext, function_modes, num_function_modes, pytree
from pyro_vae.compiled.state import CaptureError
from pyro_vae.compiled.trial import Background, Trial
from pyro_vae.compiled.variant import CompiledGraph, Variant, difference
from pyro_vae.compiled.work import Counting, Work

_log = logging.getLogger(__name__)

_EAGER_CALLS = 20
# Calls of a compiled function that are compared with an eager one, which costs nothing so rarely.
_CHECKED_CALLS = {0, 1, 1_000, 100_000}  # 0: after one that differed
_MAX_GRAPHS = 16
_MAX_VARIANTS = 8
_MAX_SHORT_LIVED = 4  # compiled for fewer than _EAGER_CALLS calls
_MAX_UNSETTLED = 3  # calls that find what the one before did not
_MAX_KEYS = 256
_TOO_MANY = (
    "its arguments came in more than {} shapes or values: give batches of few sizes, and numbers that change "
    "as tensors"
)
# Entered while a function is compiled; what shows progress puts something else here.
while_compiling: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class NotCompiledWarning(UserWarning):
    """Program that runs eagerly although it was to be compiled; the message says why and where."""


class CompiledFunction:
    r"""Function of tensors that runs Pyro programs, as one compiled graph for each shape of its arguments.

    It runs eagerly at first and is compiled once that saves time. Compiled and eager calls draw the same
    random numbers and agree to rounding. A function that cannot be compiled keeps running eagerly, with one
    warning that says why.

    Args:
        function: From tensors (and plain values) to named tensors.
        roots: What it runs: modules, functions, ELBO objects.
        differentiate: Also return the gradients of output ``"loss"``, in the order of :attr:`trainable`.
        eager: What runs instead while nothing is compiled; by default ``function``.
        always: Compile at the second call, whether it is worth it or not.
        traced_only: Differentiate only by parameters that Pyro's handlers see, as ``pyro.infer.SVI`` does.

    Attributes:
        planned_calls: Number of calls that are still to come; None if nobody knows.
        compiling: Shapes of the arguments that are worth compiling for.
        products: Library for matrix products of each size (``products.choose_products``).
        refused: Reason why it cannot be compiled, if so.
        trainable: Tensors by which the last call differentiated: those that the loss depends on.
        left: Tensors of Pyro's store that a handler hides: their gradients come last, and none is trained.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        roots: tuple[object, ...],
        *,
        differentiate: bool = False,
        eager: Callable[..., Outputs] | None = None,
        always: bool = False,
        traced_only: bool = False,
    ) -> None:
        self.function = function
        self.roots = roots
        self.differentiate = differentiate
        self.eager = eager or function
        self.always = always
        self.traced_only = traced_only
        self.planned_calls: int | None = None
        self.compiling: set[str] = set()
        self.products: dict[str, str] = {}
        self.refused: str | None = None
        self.trainable: list[Tensor] = []
        self.left: list[Tensor] = []
        self._variants: dict[tuple, list[Variant]] = {}  # by the arguments, the last first
        self._num_short_lived = 0
        self._handlers_noted = False
        self._num_unsettled = 0
        self._background = Background()
        self._calls: dict[str, int] = {}  # eager ones, by their arguments
        self._work: dict[str, Work] = {}

    @property
    def is_compiled(self) -> bool:
        """True if there is a compiled graph."""
        return any(variant.graph is not None for variants in self._variants.values() for variant in variants)

    def state_dict(self) -> dict[str, Any]:
        """Return what is compiled, so that a run that goes on elsewhere computes the same."""
        return {
            "compiling": sorted(self.compiling),
            "products": dict(self.products),
            "calls": dict(self._calls),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.compiling = set(state["compiling"])
        self.products.update(state["products"])
        self._calls = dict(state.get("calls", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled: a copy is compiled anew."""
        return {**vars(self), "_variants": {}, "_background": Background(), "trainable": [], "left": []}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Outputs, Sequence[Tensor] | None]:
        """Return named outputs, and their gradients; None in place of gradients if ``eager`` ran."""
        if self.planned_calls:
            self.planned_calls -= 1
        if self.refused is not None or self._is_within_others():
            return self.eager(*args, **kwargs), None
        leaves, spec = args, None  # by far the most common arguments, in less time than pytree takes
        if kwargs or not all(map(torch.is_tensor, args)):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        key = key_of(leaves, spec)
        variant = self._current(key)
        if self.refused is not None or (variant is not None and variant.graph is None):
            return self.eager(*args, **kwargs), None
        if variant is not None and variant.graph.num_calls not in _CHECKED_CALLS:
            variant.graph.num_calls += 1
            self.trainable, self.left = variant.trainable, variant.left
            return variant.graph([leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)])
        call = Call(args, kwargs, leaves, spec, key)
        is_due = str(key) in self.compiling or (self.always and bool(self._calls))
        if variant is None and not is_due:
            return self._eagerly(str(key), call), None
        return self._tried(call, variant)

    def ready(self, args: tuple, num_calls: int) -> CompiledGraph | None:
        """Return the graph that the next calls on such tensors will run; None if one is to be compared."""
        if self.refused is not None or self._is_within_others():
            return None
        variants = self._variants.get(key_of(args, None))
        if not variants or variants[0].graph is None or not variants[0].is_current() or variants[0].left:
            return None
        self.trainable, graph = variants[0].trainable, variants[0].graph
        if any(0 <= n - graph.num_calls < num_calls for n in _CHECKED_CALLS):
            return None
        return graph

    def _is_within_others(self) -> bool:
        """Return True if what surrounds this call changes what it does, but would not change a graph."""
        if _PYRO_STACK and not self._handlers_noted:
            self._handlers_noted = True
            warnings.warn(
                "not compiled, running eagerly: handlers of Pyro are active around it; put them around the "
                "model and the guide instead",
                NotCompiledWarning,
                stacklevel=5,
            )
        return (
            bool(_PYRO_STACK)
            or (self.differentiate and not torch.is_grad_enabled())
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
            or torch.is_anomaly_enabled()
            or (num_function_modes() > 0 and any(type(m) is not DeviceContext for m in function_modes()))
        )

    def _eagerly(self, key: str, call: Call) -> Outputs:
        self._calls[key] = self._calls.get(key, 0) + 1
        if len(self._calls) > _MAX_KEYS:
            self._refuse(_TOO_MANY.format(_MAX_KEYS))
        if self.always:
            return call.run(self.eager)
        with contextlib.nullcontext() if key in self._work else Counting() as counting:
            outputs = call.run(self.eager)
        if counting is not None:
            self._work[key] = counting.work()
        self._decide(key)
        return outputs

    def _decide(self, key: str) -> None:
        """Mark a shape for compiling if so many of its calls are still to come that this saves time.

        If nobody knows how many, they are taken to be as many as there were. Counts decide, not a clock, and
        after a call, when a checkpoint may be written: so a run that is interrupted and goes on, or is
        started again, computes the same bits.
        """
        ahead = self._calls[key]
        if ahead < _EAGER_CALLS:
            return
        if self.planned_calls is not None:
            ahead *= self.planned_calls / sum(self._calls.values())
        if ahead * self._work[key].saved > self._work[key].price:
            self.compiling.add(key)

    def _tried(self, call: Call, variant: Variant | None) -> tuple[Outputs, Sequence[Tensor] | None]:
        """Run eagerly, watched, and then run the graph, which is made if there is none.

        If both agree the results are the graph's, so that they do not depend on which calls are compared.
        """
        if sys.getprofile() is not None:  # which would not see what the programs do
            return call.run(self.eager), None
        try:
            if variant is None:
                self._check_arguments(call)
            trial = Trial(
                lambda: call.run(self.function),
                (*self.roots, *call.objects),
                call.tensors,
                call.containers,
                self._background,
                differentiate=self.differentiate,
                traced_only=self.traced_only,
            )
        except CaptureError as error:
            self._refuse(str(error))
            return call.run(self.eager), None
        self.trainable, self.left = trial.trainable, trial.left
        results = trial.outputs, trial.gradients if self.differentiate else ()
        if trial.reason is not None:
            self._num_unsettled += 1
            if not trial.settles or self._num_unsettled >= _MAX_UNSETTLED:
                self._refuse(trial.reason)
            return results
        try:
            if variant is None:
                variant = self._compiled(trial, call)
                self._variants.setdefault(call.key, []).insert(0, variant)
        except CaptureError as error:
            self._refuse(str(error))
            return results
        self._num_unsettled = 0
        return results if variant.graph is None else self._compared(variant, trial, call.tensors, results)

    def _check_arguments(self, call: Call) -> None:
        if len(self._variants) >= _MAX_GRAPHS:
            raise CaptureError(_TOO_MANY.format(_MAX_GRAPHS))
        check_cache_folder()
        if (unfit := call.unfit(self.differentiate)) is not None:
            raise CaptureError(f"an argument {unfit}")
        shapes = shapes_in(call.key)
        like = [v for key, variants in self._variants.items() if shapes_in(key) == shapes for v in variants]
        if sum(map(_is_short_lived, like)) >= _MAX_SHORT_LIVED:
            raise CaptureError("a number among its arguments changes again and again: pass it as a tensor")

    def _compiled(self, trial: Trial, call: Call) -> Variant:
        """Compile for such arguments, after a watched eager run."""
        started = time.perf_counter()
        state = trial.state()
        if self.differentiate and not trial.trainable:
            return Variant(state, trial, None)
        wanted = [*trial.trainable, *trial.left]
        if any(tensor not in state.names for tensor in wanted):
            raise CaptureError(NEITHER)
        with while_compiling(), torch.random.fork_rng(), _python_generators_kept():
            graph = capture(
                lambda *tensors: call.run_on(self.function, tensors),
                state,
                call.tensors,
                wanted,
                trial.heap_now(),
                traced_only=self.traced_only,
            )
            state.watch(graph.constants)
            compiled = CompiledGraph(graph, state, call.tensors, self.products)
        _log.info(
            "compiled in %.1f s; matrix products by the faster library: %s",
            time.perf_counter() - started,
            self.products,
        )
        return Variant(state, trial, compiled)

    def _compared(
        self, variant: Variant, trial: Trial, tensors: list[Tensor], eager: tuple
    ) -> tuple[Outputs, Sequence[Tensor]]:
        """Return the graph's results if they equal the eager ones to rounding; refuse if they differ twice.

        Where a program jumps, as to the nearest of several vectors, rounding alone may make one call differ.
        """
        graph = variant.graph
        trial.rewind()
        results = graph(tensors)
        drew_as_much = trial.has_drawn_as_much()
        different = difference(variant, trial, results)
        if different is None and not drew_as_much:
            different = "the number of random numbers that they draw"
        if different is None:
            graph.num_calls += 1
            graph.num_mismatches = 0
            self.trainable, self.left = variant.trainable, variant.left
            return results
        trial.wind(graph.own)
        graph.num_mismatches += 1
        if graph.num_mismatches > 1:
            self._refuse(
                f"compiled and eager results differ in {different}: the program depends on something that is "
                "not in its arguments, modules or parameters, or draws numbers in memory that is not "
                "contiguous"
            )
        return eager

    def _current(self, key: tuple) -> Variant | None:
        """Return what was compiled for such arguments while all else was as it is now."""
        variants = self._variants.get(key)
        while variants and not variants[0].trains_the_same():
            variants.pop(0)
        if not variants:
            return None
        change = variants[0].state.changed()
        if change is None:
            return variants[0]
        words, is_replaced = change
        was_short_lived = _is_short_lived(variants[0])
        if is_replaced:
            self._variants.clear()
            variants = []
        found = next(filter(Variant.is_current, variants), None)
        if found is not None:
            variants.remove(found)
            variants.insert(0, found)
            return found
        self._num_short_lived += was_short_lived
        if len(variants) >= _MAX_VARIANTS or self._num_short_lived >= _MAX_SHORT_LIVED:
            self._refuse(
                f"what it depends on changes again and again ({words}): keep such values in a tensor, "
                "and change that in place"
            )
        return None

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._variants = {}
        warnings.warn(f"not compiled, running eagerly: {reason}", NotCompiledWarning, stacklevel=4)


def _is_short_lived(variant: Variant) -> bool:
    return variant.graph is not None and variant.graph.num_calls < _EAGER_CALLS


@contextlib.contextmanager
def _python_generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
