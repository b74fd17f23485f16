"""One compiled graph of a function, what it stands for, and how it is compared with an eager run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.compiled.capture import Graph, Outputs
from pyro_vae.compiled.inductor import compile_graph
from pyro_vae.compiled.products import choose_products
from pyro_vae.compiled.rewrites import rewrite
from pyro_vae.compiled.state import ProgramState
from pyro_vae.compiled.trial import Trial

_OF_ALL = 0.03  # of the norm of all gradients, rounding of which may be in any
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class Variant:
    """Graph for some arguments and for plain values such as ``training``; None if nothing is compiled."""

    def __init__(self, state: ProgramState, trial: Trial, graph: "CompiledGraph | None") -> None:
        self.state = state
        self.trainable, self.left = trial.trainable, trial.left
        self.graph = graph
        self._unused = trial.unused

    def is_current(self) -> bool:
        """Return True if all is as it was."""
        return self.state.changed() is None and self.trains_the_same()

    def trains_the_same(self) -> bool:
        """Return True if of the parameters without effect on the loss the same have gradients as then."""
        return all((tensor.grad is not None) == had for tensor, had in self._unused)


class CompiledGraph:
    """One graph, compiled by Inductor for one shape of arguments."""

    def __init__(
        self, graph: Graph, state: ProgramState, tensors: list[Tensor], products: dict[str, str]
    ) -> None:
        rewrite(graph.module.graph)
        choose_products(graph.module.graph, products)
        graph.module.recompile()
        self.num_calls = self.num_mismatches = 0
        self._names = graph.names
        self.own = [*state.tensors, *graph.constants]
        # Inductor then draws by torch's own generators: the numbers that eager Pyro draws.
        options = {"fallback_random": True, "size_asserts": False}
        self._run = compile_graph(graph.module, [*self.own, *tensors], options)

    def __call__(self, tensors: list[Tensor]) -> tuple[Outputs, Sequence[Tensor]]:
        """Return named outputs, and gradients by what is trainable."""
        with torch.no_grad():
            results = self._run(*self.own, *tensors)
        count = len(self._names)
        return dict(zip(self._names, results, strict=False)), results[count:]


def agree(a: Tensor, b: Tensor, size: Tensor | None = None) -> bool:
    """Return True if two results are equal to rounding, relative to ``size``: by default the norm of b."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    if not bool(torch.isfinite(b).all()):
        return True  # nothing to compare; whoever looks at the result finds it
    error, size = (a - b).norm(), b.norm() if size is None else size
    return bool(error <= _TOLERANCE.get(a.dtype, 5e-2) * size + 1e-5)


def difference(variant: Variant, trial: Trial, results: tuple[Outputs, Sequence[Tensor]]) -> str | None:
    """Return in what the results of a graph are not those of a trial, in words."""
    outputs, gradients = results
    for name, value in trial.outputs.items():
        if not agree(outputs[name], value.detach()):
            return name
    # Where a gradient is 0 in theory, as before a batch normalisation, rounding is all of it.
    wanted = (*variant.trainable, *variant.left)
    expected = {id(t): g for t, g in zip((*trial.trainable, *trial.left), trial.gradients, strict=True)}
    if {id(tensor) for tensor in wanted} != expected.keys():
        return "what the loss depends on"
    size = torch.stack([g.norm() for g in expected.values()]).norm() if expected else None
    for tensor, gradient in zip(wanted, gradients, strict=True):
        own, eps = expected[id(tensor)], torch.finfo(gradient.dtype).eps
        is_lost = not bool(gradient.any()) and bool(own.norm() > eps * size)
        if is_lost or not agree(gradient, own, own.norm() + _OF_ALL * size):
            return f"the gradient of {variant.state.names[tensor]}"
    for tensor in variant.graph.own:
        value = trial.value_after(tensor)
        if value is not None and not agree(tensor, value):
            return variant.state.names.get(tensor, "a tensor that is no buffer")
    return None
