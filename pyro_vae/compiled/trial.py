"""One run of a program, watched: its results, and all that it does besides.

It is a call that was due anyway, with the caller's own arguments and random numbers. So nothing has to be
undone when it turns out that the program counts its calls or writes to a file: it has done so once, as ever.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.compiled import private
from pyro_vae.compiled.heap import Heap
from pyro_vae.compiled.state import CaptureError, ProgramState, following, readable
from pyro_vae.compiled.witness import Witness


@dataclasses.dataclass
class Background:
    """Facts about programs from runs before: other roots than those that were given.

    Attributes:
        ran: Code that ran, with its global names.
        held: Things that it found in its arguments and in enclosing functions.
    """

    ran: list[tuple[types.CodeType, dict]] = dataclasses.field(default_factory=list)
    held: list[object] = dataclasses.field(default_factory=list)


class Trial:
    """Run of ``run()``, which has happened when this exists.

    Args:
        run: Runs the programs; returns named tensors.
        roots: Model, guide, objective: modules, functions, bound methods, ELBO objects.
        arguments: Tensors that are passed to the programs.
        containers: Dictionaries and lists in which they are passed.
        background: What is known of the programs; what is new is added.
        differentiate: Also by output ``"loss"``.
        traced_only: Train only what Pyro's handlers see, as ``pyro.infer.SVI`` does.

    Attributes:
        outputs: The named tensors.
        trainable: Tensors that the loss depends on.
        left: Others of Pyro's store that it depends on, such as those that a handler hides: their gradients
            stay, as after ``backward()``, and nothing is updated by them.
        gradients: By ``trainable`` and ``left``.
        unused: What Pyro's handlers see and the loss does not depend on, and whether it has a gradient, by
            which Pyro would go on to update it.
        reason: Why no graph can stand for the programs; None if none is known.
        settles: Whether that may be otherwise at the next run.

    Raises:
        CaptureError: If no graph can stand for the programs: before anything has run, or raised by the run
            itself, of which nothing is left then.
    """

    def __init__(
        self,
        run: Callable[[], dict[str, Tensor]],
        roots: tuple[object, ...],
        arguments: Sequence[Tensor],
        containers: Sequence[object],
        background: Background,
        *,
        differentiate: bool,
        traced_only: bool,
    ) -> None:
        self._roots, self._background = roots, background
        survey = readable((*roots, *background.held), background.ran)
        store = private.stored()
        own = [tensor for module in survey.modules for tensor in private.own_tensors(module)]
        own += store.values()
        for tensor in own if differentiate else ():
            if tensor is not None and private.has_gradient_hook(tensor):
                name = ProgramState(survey, store).names.get(tensor, "a tensor")
                raise CaptureError(f"{name} has a hook for its gradient, which a graph would not call")
        with following():
            self.heap = Heap((*roots, *containers, *background.held), background.ran)
        self.heap.keep_tensors(own)
        self.heap.keep_tensors(arguments)
        self._called: list[nn.Module] = []
        self._has_others = False  # that require gradients
        versions = list(map(private.version, arguments))
        self._drawn = _drawn()
        hook = nn.modules.module.register_module_forward_pre_hook(self._note)
        witness = Witness(survey.codes)
        numpy_drawn = _numpy_state()
        try:
            with poutine.trace(param_only=True) as params, torch.set_grad_enabled(differentiate), witness:
                self.outputs = run()
                self.trainable, self.left, self.gradients, self.unused = [], [], [], []
                if differentiate and self.outputs["loss"].requires_grad:
                    traced = _traced(params.trace) if traced_only else None
                    self._differentiate(traced)
        except CaptureError:  # of the run itself, which is to be done otherwise
            self.heap.restore()
            _draw_again(self._drawn)
            raise
        finally:
            hook.remove()
        hidden = set(map(id, self.left))
        self._params = list(params.trace.param_nodes)
        self._params += [name for name, t in private.stored().items() if id(t) in hidden]
        background.ran += witness.ran
        background.held += witness.held
        self._drawn_after = _drawn()
        self.changes = self.heap.changes()
        if witness.said is None and _numpy_state() != numpy_drawn:  # by functions that no profiler sees
            witness.said = "it draws from NumPy's random generator"
        self.reason, self.settles = self._judge(witness, versions, arguments)

    def _note(self, module: nn.Module, _: object) -> None:
        self._called.append(module)
        self.heap.keep_tensors(private.own_tensors(module))

    def _differentiate(self, traced: list[Tensor] | None) -> None:
        leaves = _leaves(self.outputs["loss"])
        try:
            gradients = torch.autograd.grad(self.outputs["loss"], leaves)
        except RuntimeError as error:  # as of reentrant checkpoints, which know backward() alone
            raise CaptureError(f"torch.autograd.grad says: {str(error).splitlines()[0]}") from error
        found = dict(zip(map(id, leaves), gradients, strict=True))
        # Pyro goes on with gradients of 0 for parameters of its store that are no longer used.
        self.trainable = leaves
        if traced is not None:
            self.trainable = [tensor for tensor in traced if id(tensor) in found or tensor.grad is not None]
        self.unused = [(t, t.grad is not None) for t in traced or () if id(t) not in found]
        trained = set(map(id, self.trainable))
        others = [leaf for leaf in leaves if id(leaf) not in trained]
        stored = set(map(id, private.stored().values()))
        self.left = [leaf for leaf in others if id(leaf) in stored]
        self._has_others = len(others) > len(self.left)
        for leaf in others:  # as backward() does
            if id(leaf) not in stored:
                leaf.grad = found[id(leaf)] if leaf.grad is None else leaf.grad + found[id(leaf)]
        self.gradients = [
            found[id(tensor)] if id(tensor) in found else torch.zeros_like(tensor)
            for tensor in (*self.trainable, *self.left)
        ]

    def _judge(
        self, witness: Witness, versions: Sequence[int], arguments: Sequence[Tensor]
    ) -> tuple[str | None, bool]:
        if witness.said is not None:
            return f"{witness.said}, which a graph would not do", False
        if list(map(private.version, arguments)) != versions:
            return "it changes an argument in place: let it work on a copy", False
        if (label := self.heap.lost()) is not None:
            return (
                f"it changes {label}, which is large, or gives it other memory, as by .data = ...: make it a "
                "buffer and change that in place"
            ), False
        counted = [change for change in self.changes if change.counts]
        lasting = [change for change in counted if not change.may_settle]
        for change in (*lasting, *counted):
            return (
                f"running it changes {change.label}, which a graph would not do: make it a buffer and change "
                "that in place, or let pyro.deterministic keep it"
            ), not lasting
        if self._has_others:
            return (
                "the loss depends on parameters that Pyro's handlers do not see, as of a network without "
                "pyro.module, for which a graph would leave no gradients: Pyro trains none of them"
            ), False
        if witness.ran:
            code, _ = witness.ran[0]
            return f"code that it makes anew ran at {code.co_filename}:{code.co_firstlineno}", True
        return None, False

    @property
    def _all_roots(self) -> tuple[object, ...]:
        return (*self._roots, *self._background.held, *self._called)

    def state(self) -> ProgramState:
        """Return what the programs read; raise ``CaptureError`` if no graph can stand for it."""
        survey = readable(self._all_roots, self._background.ran)
        return ProgramState(survey, self._params, [change.place for change in self.changes])

    def heap_now(self) -> Heap:
        """Return all that the programs reach, after the run."""
        with following():
            return Heap(self._all_roots, self._background.ran)

    def has_drawn_as_much(self) -> bool:
        """Return True if as many random numbers were drawn since :meth:`rewind` as by the run."""
        return all(map(torch.equal, _drawn(), self._drawn_after))

    def rewind(self) -> None:
        """Put tensors and random generators back to before the run."""
        _draw_again(self._drawn)
        self.after = self.heap.restore_tensors()

    def wind(self, changed: Sequence[Tensor]) -> None:
        """After :meth:`rewind`, go to after the run again, whatever has happened to these tensors since."""
        self.heap.restore_tensors(changed)
        with torch.no_grad():
            for tensor, value in self.after:
                tensor.copy_(value)
        _draw_again(self._drawn_after)

    def value_after(self, tensor: Tensor) -> Tensor | None:
        """Return what a tensor was after the run, which :meth:`rewind` undid; None if that was not kept."""
        return next((v for t, v in self.after if t is tensor), self.heap.value(tensor))


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return tensors that a loss is made of and that collect gradients."""
    if loss.grad_fn is None:
        return [loss]
    found: dict[int, Tensor] = {}
    seen, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        node = todo.pop()
        if type(node).__name__ == "AccumulateGrad":
            found.setdefault(id(node.variable), node.variable)
        new = [inner for inner, _ in node.next_functions if inner is not None and inner not in seen]
        seen.update(new)
        todo += new
    return list(found.values())


def _traced(trace: poutine.Trace) -> list[Tensor]:
    """Return parameters that ``pyro.infer.SVI`` would train."""
    found: dict[int, Tensor] = {}
    for name in trace.param_nodes:
        value = trace.nodes[name]["value"]
        value = value.unconstrained() if hasattr(value, "unconstrained") else value
        found.setdefault(id(value), value)
    return list(found.values())


def _drawn() -> list[Tensor]:
    """Return states of the random generators: of the CPU, and of the GPUs if there are any."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _draw_again(drawn: list[Tensor]) -> None:
    torch.set_rng_state(drawn[0])
    if drawn[1:]:
        torch.cuda.set_rng_state_all(drawn[1:])


def _numpy_state() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tobytes(), *rest)
