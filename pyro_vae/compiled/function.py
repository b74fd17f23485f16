"""Functions that run Pyro programs, captured and compiled when that pays, and never silently wrong."""

import contextlib
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.capture import Graph, Outputs, capture
from pyro_vae.compiled.products import choose_products
from pyro_vae.compiled.rewrites import rewrite
from pyro_vae.compiled.state import CaptureError, ProgramState
from pyro_vae.compiled.survey import OPEN_ARGUMENTS

_log = logging.getLogger(__name__)

# Compiling costs 3 to 15 s on two cores and saves about half of the time that is still to come.
_EAGER_CALLS = 20
_WORTH_SECONDS = 20.0
# Calls of a compiled function that are compared with an eager one, which costs nothing so rarely.
_CHECKED_CALLS = {0, 1, 1_000, 100_000}
_MAX_GRAPHS = 16
_MAX_VARIANTS = 8
_MAX_SHORT_LIVED = 4  # compiled for fewer than _EAGER_CALLS calls
_PLAIN_ARGUMENTS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
_ADVICE = {  # on errors of Inductor
    "InvalidCxxCompiler": "; install g++ or clang++",
    "ImportError": "; if this file was damaged, as when a machine crashes, delete it",
}


class NotCompiledWarning(UserWarning):
    """A program runs eagerly although it was to be compiled; the message says why and where."""


class CompiledFunction:
    r"""A function of tensors that runs Pyro programs, as one compiled graph for every shape of its arguments.

    It runs eagerly at first, and is compiled once the time it takes makes that worth it; both draw the same
    random numbers and agree to rounding. A function that cannot be compiled goes on eagerly, with one
    warning that says why.

    Args:
        function: From tensors (and plain values) to named tensors.
        roots: What it runs: modules, functions, ELBO objects.
        differentiate: Also return the gradients of output ``"loss"``, in the order of :attr:`trainable`.
        eager: What runs instead while nothing is compiled; by default ``function``.
        always: Compile at once, whether it is worth it or not.

    Attributes:
        planned_calls: How many more calls will come, if somebody knows.
        compiling: Shapes of the arguments for which compiling was found to be worth it.
        products: Which library computes products of which size (``products.choose_products``).
        refused: Why the function runs eagerly, if it cannot be compiled.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        roots: tuple[object, ...],
        *,
        differentiate: bool = False,
        eager: Callable[..., Outputs] | None = None,
        always: bool = False,
    ) -> None:
        self.function = function
        self.roots = roots
        self.differentiate = differentiate
        self.eager = eager or function
        self.always = always
        self.planned_calls: int | None = None
        self.compiling: set[str] = set()
        self.products: dict[str, str] = {}
        self.refused: str | None = None
        self._variant: _Variant | None = None  # that of the last call
        self._variants: dict[tuple, list[_Variant]] = {}  # by the arguments, the last first
        self._were_replaced = False
        self._num_short_lived = 0
        self._handlers_noted = False
        self._seconds: dict[str, list[float]] = {}

    @property
    def is_compiled(self) -> bool:
        """Whether there is a compiled graph."""
        return any(variant.graph is not None for variants in self._variants.values() for variant in variants)

    @property
    def trainable(self) -> list[Tensor]:
        """Tensors by which is differentiated: those that the loss depends on."""
        return self._variant.trainable if self._variant is not None else []

    def state_dict(self) -> dict[str, Any]:
        """What is compiled, for a run that goes on elsewhere and shall compute the same."""
        return {"compiling": sorted(self.compiling), "products": dict(self.products)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.compiling = set(state["compiling"])
        self.products.update(state["products"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy is compiled anew."""
        return {**vars(self), "_variant": None, "_variants": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Outputs, Sequence[Tensor] | None]:
        """Named outputs, and their gradients; None in place of gradients if ``eager`` ran."""
        if self.planned_calls:
            self.planned_calls -= 1
        if self.refused is not None or _autocast() or self._is_within_others():
            return self.eager(*args, **kwargs), None
        leaves, spec = args, None  # by far the most common arguments, in less time than pytree takes
        if kwargs or not all(map(torch.is_tensor, args)):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        key = _key(leaves, spec)
        variant = self._variant = self._current(key)
        if variant is None:
            if self._were_replaced or not self._worth_it(str(key)):
                self._were_replaced = False  # an eager step makes the parameters that are missing
                started = time.perf_counter()
                outputs = self.eager(*args, **kwargs)
                self._seconds.setdefault(str(key), []).append(time.perf_counter() - started)
                return outputs, None
            try:
                variant = self._variant = self._compile(leaves, spec)
            except CaptureError as error:
                self._refuse(str(error))
                return self.eager(*args, **kwargs), None
            self._variants.setdefault(key, []).insert(0, variant)
        graph = variant.graph
        if graph is None:
            return self.eager(*args, **kwargs), None
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        if graph.num_calls in _CHECKED_CALLS and not self._is_right(variant, tensors, args, kwargs):
            return self.eager(*args, **kwargs), None  # and the next call is checked again
        graph.num_calls += 1
        return graph(tensors)

    def ready(self, args: tuple, num_calls: int) -> "_Compiled | None":
        """The graph that the next calls on such tensors will run; None if a check comes before."""
        if self.refused is not None or _autocast() or self._is_within_others():
            return None
        variants = self._variants.get(_key(args, None))
        if not variants or variants[0].graph is None or not variants[0].is_current():
            return None
        self._variant, graph = variants[0], variants[0].graph
        if any(0 <= n - graph.num_calls < num_calls for n in _CHECKED_CALLS):
            return None
        return graph

    def _is_within_others(self) -> bool:
        """Whether what surrounds this call has an effect on it that a graph would not have."""
        if _PYRO_STACK and not self._handlers_noted:
            self._handlers_noted = True
            warnings.warn(
                "not compiled, running eagerly: handlers of Pyro are active around it; put them around the "
                "model and the guide instead",
                NotCompiledWarning,
                stacklevel=5,
            )
        return bool(_PYRO_STACK) or (self.differentiate and not torch.is_grad_enabled())

    def _worth_it(self, key: str) -> bool:
        """Whether the calls of this shape that are to come take so long that compiling saves time.

        If nobody knows how many will come: as many as there were.
        """
        spent = self._seconds.get(key, [])
        if self.always or key in self.compiling or len(spent) < _EAGER_CALLS:
            return self.always or key in self.compiling
        ahead = sum(spent)
        if self.planned_calls is not None:
            ahead *= self.planned_calls / sum(map(len, self._seconds.values()))
        if ahead > _WORTH_SECONDS:
            self.compiling.add(key)
        return key in self.compiling

    def _compile(self, leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> "_Variant":
        if len(self._variants) >= _MAX_GRAPHS:
            raise CaptureError(
                f"its arguments came in more than {_MAX_GRAPHS} shapes or values: give batches of few sizes, "
                "and numbers that change as tensors"
            )
        for leaf in leaves:
            if (unfit := _unfit(leaf, self.differentiate)) is not None:
                raise CaptureError(f"an argument {unfit}")
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]

        def function(*values: Tensor) -> Outputs:
            remaining = iter(values)
            filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = (filled, {}) if spec is None else pytree.tree_unflatten(filled, spec)
            return self.function(*args, **kwargs)

        started = time.perf_counter()
        with torch.random.fork_rng(), _python_generators_kept():
            copies = [tensor.detach().clone() for tensor in tensors]
            roots = (*self.roots, *(leaf for leaf in leaves if isinstance(leaf, OPEN_ARGUMENTS)))
            state, trainable = self._try_eagerly(lambda: function(*copies), roots)
            if any(copy._version for copy in copies):
                raise CaptureError("it changes an argument in place: let it work on a copy")
            if self.differentiate and not trainable:
                return _Variant(state, trainable, None)
            graph = capture(function, state, tensors, trainable)
            compiled = _Compiled(graph, state, tensors, self.products)
        _log.info(
            "compiled in %.1f s; matrix products by the faster library: %s",
            time.perf_counter() - started,
            self.products,
        )
        return _Variant(state, trainable, compiled)

    def _try_eagerly(
        self, run: Callable[[], Outputs], roots: tuple[object, ...]
    ) -> tuple[ProgramState, list[Tensor]]:
        """What the programs read, and by which tensors to differentiate."""
        found_by = ProgramState.found_by(roots, run)
        with torch.set_grad_enabled(self.differentiate), found_by as (state, outputs):
            if not self.differentiate or not outputs["loss"].requires_grad:
                return state, []
            if hooked := state.hook():
                raise CaptureError(f"{hooked} has a hook for its gradient, which a graph would not call")
            tensors = [tensor for tensor in state.tensors if tensor.requires_grad]
            gradients = torch.autograd.grad(outputs["loss"], tensors, allow_unused=True)
            # Pyro goes on with gradients of 0 for parameters of its store that are no longer used.
            return state, [
                t
                for t, g in zip(tensors, gradients, strict=True)
                if g is not None or (t in state.stored and t.grad is not None)
            ]

    def _current(self, key: tuple) -> "_Variant | None":
        """What was compiled for such arguments and all else as it is now."""
        variants = self._variants.get(key)
        if not variants:
            return None
        change = variants[0].state.changed()
        if change is None:
            return variants[0]
        words, is_replaced = change
        was_short_lived = variants[0].graph is not None and variants[0].graph.num_calls < _EAGER_CALLS
        if is_replaced:
            self._variants.clear()
            variants = []
        found = next(filter(_Variant.is_current, variants), None)
        if found is not None:
            variants.remove(found)
            variants.insert(0, found)
            return found
        self._were_replaced = is_replaced
        self._num_short_lived += was_short_lived
        if len(variants) >= _MAX_VARIANTS or self._num_short_lived >= _MAX_SHORT_LIVED:
            self._refuse(
                f"what it depends on changes again and again ({words}): keep such values in a tensor, "
                "and change that in place"
            )
        return None

    def _is_right(self, variant: "_Variant", tensors: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """Compare with the eager function, at the same random numbers; refuse if they differ twice running.

        Where a program jumps, as to the nearest of several vectors, rounding alone may make one call differ.
        """
        graph, names = variant.graph, variant.state.names
        buffers = [tensor for tensor in graph.own if not tensor.requires_grad]
        before = [buffer.detach().clone() for buffer in buffers]

        def outcome(run: Callable[[], tuple[Outputs, Sequence[Tensor]]]) -> list[tuple[str, Tensor]]:
            with torch.random.fork_rng():
                outputs, gradients = run()
            found = [(name, value.detach()) for name, value in outputs.items()]
            for parameter, gradient in zip(self.trainable, gradients, strict=True):
                found.append((f"the gradient of {names[parameter]}", gradient))
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    found.append((names.get(buffer, "a tensor that is no buffer"), buffer.clone()))
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            return found

        def eager() -> tuple[Outputs, Sequence[Tensor]]:
            with torch.set_grad_enabled(self.differentiate):
                outputs = self.function(*args, **kwargs)
            if not self.trainable:
                return outputs, ()
            return outputs, torch.autograd.grad(outputs["loss"], self.trainable, materialize_grads=True)

        compiled, expected = outcome(lambda: graph(tensors)), outcome(eager)
        for (_, found), (name, value) in zip(compiled, expected, strict=True):
            if not agree(found, value):
                graph.num_mismatches += 1
                if graph.num_mismatches == 1:
                    return False
                self._refuse(
                    f"compiled and eager results differ in {name}: the program depends on something that is "
                    "not in its arguments, modules or parameters"
                )
                return False
        graph.num_mismatches = 0
        return True

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._variant, self._variants = None, {}
        warnings.warn(f"not compiled, running eagerly: {reason}", NotCompiledWarning, stacklevel=4)


class _Variant:
    """What is compiled for some arguments and for plain values such as ``training``; None if nothing is."""

    def __init__(self, state: ProgramState, trainable: list[Tensor], graph: "_Compiled | None") -> None:
        self.state = state
        self.trainable = trainable
        self.graph = graph

    def is_current(self) -> bool:
        """Whether all is as it was."""
        return self.state.changed() is None


class _Compiled:
    """One graph, compiled by Inductor for one shape of arguments."""

    def __init__(
        self, graph: Graph, state: ProgramState, tensors: list[Tensor], products: dict[str, str]
    ) -> None:
        import torch._inductor

        rewrite(graph.module.graph)
        choose_products(graph.module.graph, products)
        graph.module.recompile()
        self.num_calls = self.num_mismatches = 0
        self._names = graph.names
        self.own = [*state.tensors, *graph.constants]
        # Inductor then draws by torch's own generators: the numbers that eager Pyro draws.
        options = {"fallback_random": True, "size_asserts": False}
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of modules of torch among themselves
                self._run = torch._inductor.compile(graph.module, [*self.own, *tensors], options=options)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            advice = next((text for error, text in _ADVICE.items() if error in reason), "")
            raise CaptureError(
                f"torch's Inductor could not compile its graph ({type(error).__name__}: {reason}){advice}"
            ) from error

    def __call__(self, tensors: list[Tensor]) -> tuple[Outputs, Sequence[Tensor]]:
        with torch.no_grad():
            results = self._run(*self.own, *tensors)
        count = len(self._names)
        return dict(zip(self._names, results, strict=False)), results[count:]


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    if not bool(torch.isfinite(b).all()):
        return True  # nothing to compare; whoever looks at the result finds it
    error, size = (a - b).norm(), b.norm()
    return bool(error <= _TOLERANCE.get(a.dtype, 5e-2) * size + 1e-5)


def _unfit(leaf: object, differentiate: bool) -> str | None:
    """Why there is no graph for such an argument."""
    if not isinstance(leaf, (Tensor, *_PLAIN_ARGUMENTS, *OPEN_ARGUMENTS)):
        return f"is a {type(leaf).__name__}: pass tensors and plain values"
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_neg() or leaf.is_conj():
            return "is a sparse, nested, negated or conjugated view: pass a dense tensor"
        if leaf.requires_grad and differentiate:
            return "requires gradients: make it an nn.Parameter of the model or the guide"
    return None


def _key(leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> tuple:
    """What a graph is good for: shapes and types of tensors, and other values."""
    described = [
        (t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg(), t.is_conj())
        if isinstance(t, Tensor)
        else (id(t) if isinstance(t, OPEN_ARGUMENTS) else repr(t))
        for t in leaves
    ]
    return (torch.get_default_dtype(), spec, *described)


@contextlib.contextmanager
def _python_generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
