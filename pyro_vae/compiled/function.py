"""Functions that run Pyro programs, captured and compiled when that pays, and never silently wrong."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.capture import CaptureError, Graph, Outputs, capture
from pyro_vae.compiled.products import choose_products
from pyro_vae.compiled.rewrites import rewrite
from pyro_vae.compiled.state import ProgramState

# Compiling costs 5 to 20 s on two cores and saves about half of the time that is still to come.
_EAGER_CALLS = 20
_WORTH_SECONDS = 30.0
# Calls of a compiled function that are compared with an eager one, which costs nothing so rarely.
_CHECKED_CALLS = {0, 1, 1_000, 100_000}
_MAX_GRAPHS = 16
_MAX_VARIANTS = 8
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


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
        always: Compile at the second call, whether it is worth it or not.
        products: Choices of ``choose_products`` to take over.

    Attributes:
        planned_calls: How many more calls will come, if somebody knows.
        compiling: Shapes of the arguments for which compiling was found to be worth it.
        trainable: Tensors by which is differentiated: those that the loss of the first call depends on.
        products: Which library computes products of which size.
        refused: Why the function runs eagerly, if it cannot be compiled.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        roots: tuple[object, ...],
        *,
        differentiate: bool = False,
        always: bool = False,
        products: dict[str, str] | None = None,
    ) -> None:
        self.function = function
        self.roots = roots
        self.differentiate = differentiate
        self.always = always
        self.planned_calls: int | None = None
        self.compiling: set[str] = set()
        self.trainable: list[Tensor] = []
        self.products: dict[str, str] = {} if products is None else products
        self.refused: str | None = None
        self._state: ProgramState | None = None
        self._graphs: dict[str, _Compiled] = {}
        self._variants: dict[tuple, dict[str, _Compiled]] = {}
        self._seconds: dict[str, list[float]] = {}

    @property
    def is_compiled(self) -> bool:
        """Whether there is a compiled graph."""
        return bool(self._graphs)

    def state_dict(self) -> dict[str, Any]:
        """When what was compiled, for a run that goes on elsewhere and shall compute the same."""
        return {"compiling": sorted(self.compiling), "products": dict(self.products)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.compiling = set(state["compiling"])
        self.products.update(state["products"])

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Named outputs, detached, and gradients."""
        given = (args, kwargs)
        if self._state is None:
            return self._first_call(given)
        if self.refused is not None:
            return self._eager(given)
        if self._state.replaced() is not None:
            return self._first_call(given)
        changed = self._state.changed()
        if changed is not None:
            self._change_variant(changed)
        if self.refused is not None or torch.is_autocast_enabled():
            return self._eager(given)
        leaves, spec = pytree.tree_flatten(given)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        key = _key(leaves, spec)
        graph = self._graphs.get(key)
        if graph is None:
            if not self._worth_it(key):
                return self._timed(given, key)
            try:
                graph = self._compile(leaves, spec)
            except CaptureError as error:
                self._refuse(str(error))
                return self._eager(given)
            self._graphs[key] = graph
        if graph.num_calls in _CHECKED_CALLS:
            return self._checked(graph, tensors, given)
        return graph(tensors)

    # ------------------------------------------------------------------------------ eager

    def _first_call(self, given: tuple) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Eager; finds out what the programs read, at first and when tensors were replaced."""
        with torch.set_grad_enabled(self.differentiate):
            self._state = ProgramState(self.roots, lambda: self._run(given))
            outputs = self._state.__dict__.pop("result")
        self._graphs, self.trainable = {}, []
        self._variants = {self._state.signature(): self._graphs}
        gradients: tuple[Tensor, ...] = ()
        if self.differentiate and outputs["loss"].requires_grad:
            tensors = [tensor for tensor in self._state.tensors if tensor.requires_grad]
            found = torch.autograd.grad(outputs["loss"], tensors, allow_unused=True)
            self.trainable = [t for t, gradient in zip(tensors, found, strict=True) if gradient is not None]
            gradients = tuple(gradient for gradient in found if gradient is not None)
        return _detached(outputs), gradients

    def _run(self, given: tuple) -> Outputs:
        args, kwargs = given
        return self.function(*args, **kwargs)

    def _eager(self, given: tuple) -> tuple[Outputs, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(self.differentiate):
            outputs = self._run(given)
        gradients: tuple[Tensor, ...] = ()
        if self.trainable:
            gradients = torch.autograd.grad(outputs["loss"], self.trainable, materialize_grads=True)
        return _detached(outputs), gradients

    def _timed(self, given: tuple, key: str) -> tuple[Outputs, tuple[Tensor, ...]]:
        started = time.perf_counter()
        result = self._eager(given)
        self._seconds.setdefault(key, []).append(time.perf_counter() - started)
        return result

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

    # ------------------------------------------------------------------------------ compiled

    def _compile(self, leaves: list, spec: pytree.TreeSpec) -> "_Compiled":
        if len(self._graphs) >= _MAX_GRAPHS:
            raise CaptureError(
                f"its arguments came in more than {_MAX_GRAPHS} shapes or values: give batches of few sizes"
            )
        plain = (Tensor, bool, int, float, str, type(None))
        unfit = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, plain)]
        if unfit:
            raise CaptureError(f"an argument is a {unfit[0]}: pass tensors and plain values")
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]

        def function(*values: Tensor) -> Outputs:
            remaining = iter(values)
            filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._run(pytree.tree_unflatten(filled, spec))

        with _without_drawing():
            graph = capture(function, self._state, tensors, self.trainable)
            return _Compiled(graph, self._state, tensors, self.products)

    def _checked(
        self, graph: "_Compiled", tensors: list[Tensor], given: tuple
    ) -> tuple[Outputs, tuple[Tensor, ...]]:
        """The compiled result after comparing it with the eager one of the same random numbers."""
        state = self._state
        buffers = [(tensor, tensor.detach().clone()) for tensor in state.tensors if not tensor.requires_grad]
        with _without_drawing():
            outputs, gradients = self._eager(given)
        after = [tensor.detach().clone() for tensor, _ in buffers]
        with torch.no_grad():
            for tensor, before in buffers:
                tensor.copy_(before)
        result = graph(tensors)
        got = [*result[0].values(), *result[1], *(tensor for tensor, _ in buffers)]
        expected = [*outputs.values(), *gradients, *after]
        names = [*outputs, *(f"the gradient of {state.names[t]}" for t in self.trainable)]
        names += [f"buffer {state.names[tensor]}" for tensor, _ in buffers]
        for name, a, b in zip(names, got, expected, strict=True):
            if not _agree(a, b):
                with torch.no_grad():
                    for (tensor, _), value in zip(buffers, after, strict=True):
                        tensor.copy_(value)
                self._refuse(
                    f"compiled and eager results differ in {name}: the program depends on something that is "
                    "not in its arguments, modules or parameters"
                )
                return outputs, gradients
        return result

    def _change_variant(self, changed: str) -> None:
        """Plain values such as ``training`` have graphs of their own for all that they have been."""
        self._state.remember()
        self._graphs = self._variants.setdefault(self._state.signature(), {})
        if len(self._variants) > _MAX_VARIANTS:
            self._refuse(f"a value that it depends on changes again and again ({changed})")

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._graphs, self._variants = {}, {}
        warnings.warn(f"not compiled, running eagerly: {reason}", NotCompiledWarning, stacklevel=4)


class _Compiled:
    """One graph, compiled by Inductor for one shape of arguments."""

    def __init__(
        self, graph: Graph, state: ProgramState, tensors: list[Tensor], products: dict[str, str]
    ) -> None:
        import torch._inductor

        rewrite(graph.module.graph)
        choose_products(graph.module.graph, products)
        graph.module.recompile()
        self.num_calls = 0
        self._names = graph.names
        self._own = [*state.tensors, *graph.constants]
        # Inductor then draws by torch's own generators: the numbers that eager Pyro draws.
        options = {"fallback_random": True, "size_asserts": False}
        try:
            with torch.no_grad():
                self._run = torch._inductor.compile(graph.module, [*self._own, *tensors], options=options)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise CaptureError(
                f"torch's Inductor could not compile its graph ({type(error).__name__}: {reason}); a C++ "
                "compiler such as g++ is needed on a CPU"
            ) from error

    def __call__(self, tensors: list[Tensor]) -> tuple[Outputs, tuple[Tensor, ...]]:
        self.num_calls += 1
        with torch.no_grad():
            results = self._run(*self._own, *tensors)
        count = len(self._names)
        return dict(zip(self._names, results, strict=False)), tuple(results[count:])


class _without_drawing:  # noqa: N801
    """Leaves torch's random generators as they were."""

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()

    def __exit__(self, *error: object) -> None:
        self._fork.__exit__(*error)


def _detached(outputs: Outputs) -> Outputs:
    return {name: value.detach() for name, value in outputs.items()}


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    if not bool(torch.isfinite(b).all()):
        return True  # nothing to compare; whoever looks at the result finds it
    error, size = (a - b).norm(), b.norm()
    return bool(error <= _TOLERANCE.get(a.dtype, 5e-2) * size + 1e-5)


def _key(leaves: list, spec: pytree.TreeSpec) -> str:
    described = [
        f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device}" if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return f"{spec} {described} {torch.get_default_dtype()}"
