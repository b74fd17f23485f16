r"""A Pyro program run once under a tracer becomes a graph of ATen operators.

``make_fx`` runs the function on tensors without values (fake tensors) and records what torch computes,
derivatives included; handlers, plates and Python are gone from the result, and random draws stay operators of
the graph, so every call draws anew. A program that looks at a value while it runs has no such graph: with
fake tensors there is no value to see, and the attempt is reported with its line.
"""

import contextlib
import operator
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_vae.compiled import private
from pyro_vae.compiled.heap import Heap
from pyro_vae.compiled.owners import is_in, is_registered, is_users
from pyro_vae.compiled.state import CaptureError, ProgramState

Outputs = dict[str, Tensor]
NEITHER = (
    "it uses a tensor that requires gradients but is neither a parameter of a module nor in Pyro's store: "
    "make it an nn.Parameter of the model or the guide"
)


class Graph(NamedTuple):
    """Captured graph and what it needs.

    Attributes:
        module: ATen operators; inputs are the state's tensors, then ``constants``, then the arguments.
        constants: Tensors that the program found elsewhere than in modules, the store and arguments.
        names: Names of the outputs; gradients by the trainable tensors follow them.
    """

    module: fx.GraphModule
    constants: list[Tensor]
    names: list[str]


def capture(
    function: Callable[..., Outputs],
    state: ProgramState,
    leaves: Sequence[Tensor],
    trainable: Sequence[Tensor],
    before: Heap,
    *,
    traced_only: bool = False,
) -> Graph:
    """Return the graph of ``function(*leaves)``, captured twice to see whether it is the same both times.

    Args:
        function: From tensors to named tensors; may run any Pyro programs.
        state: What the programs read.
        leaves: The arguments.
        trainable: Tensors of the state by which output ``"loss"`` is differentiated.
        before: What the programs reach, to put it back.
        traced_only: Other tensors that require gradients are not to be trained.

    Raises:
        CaptureError: If there is no graph, or not one for all runs.
    """
    try:
        first, names, sites = _trace(function, state, leaves, trainable)
        second, _, _ = _trace(function, state, leaves, trainable)
    finally:
        before.restore()  # tensors without values may have been left in it
    where = _first_difference(first, second)
    if where is not None:
        raise CaptureError(
            "it does not do the same twice: run again with the same arguments it takes another path or uses "
            f"other numbers {_site_of(sites, where)}"
        )
    graph = Graph(first, _lift_constants(first, len(leaves)), names)
    if any(constant is tensor for constant in graph.constants for tensor in state.tensors):
        raise CaptureError(
            "it uses a parameter or buffer that it keeps outside of its module as well, as in a list: look "
            "it up in the module"
        )
    if trainable and not traced_only and any(tensor.requires_grad for tensor in graph.constants):
        raise CaptureError(NEITHER)
    return graph


def _site_of(sites: list[tuple[int, str]], position: int) -> str:
    """Return the site that had begun when the graph had so many nodes."""
    return next((text for count, text in reversed(sites) if count <= position), "before the first site")


def _trace(
    function: Callable[..., Outputs],
    state: ProgramState,
    leaves: Sequence[Tensor],
    trainable: Sequence[Tensor],
) -> tuple[fx.GraphModule, list[str], list[tuple[int, str]]]:
    names: list[str] = []
    tensors = state.tensors
    sites = _Sites()

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        replacement = {}
        for tensor, fake in zip(tensors, inputs, strict=False):
            own = replacement[tensor] = fake.detach().requires_grad_() if tensor.requires_grad else fake
            private.mark_parameter(own, tensor)
        with state.swapped(replacement), sites, torch.set_grad_enabled(bool(trainable)):
            outputs = function(*inputs[len(tensors) :])
        names[:] = outputs
        gradients = ()
        if trainable:
            wanted = [replacement[tensor] for tensor in trainable]
            gradients = torch.autograd.grad(outputs["loss"], wanted, materialize_grads=True)
        # The fused kernels of optimisers take gradients for contiguous without looking; and what is
        # clipped in place must share its memory with nothing else, as equal gradients do.
        taken = set(map(private.memory, inputs))
        results = []
        for result in (*outputs.values(), *(gradient.contiguous() for gradient in gradients)):
            memory = private.memory(result)
            results.append(result.detach().clone() if memory in taken else result.detach())
            taken.add(memory)
        return tuple(results)

    inputs = [tensor.detach() for tensor in tensors] + [leaf.detach() for leaf in leaves]
    try:
        with _without_looking_at_values():
            module = private.make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except CaptureError as error:
        raise CaptureError(f"{error} {sites.last}") from None
    except Exception as error:
        line = _line(reversed([*traceback.walk_tb(error.__traceback__)]))
        reason, *_ = [*str(error).strip().splitlines(), ""]
        raise CaptureError(
            f"{type(error).__name__}: {reason}{f' at {line}' if line else ''} {sites.last}"
        ) from error
    for position, node in enumerate(module.graph.nodes):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
            where = _site_of(sites.seen, position)
            raise CaptureError(f"a shape or a Python number in it depends on values of tensors {where}")
    module.graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
    module.recompile()
    return module, names, sites.seen


# ------------------------------------------------------------------------------------ looking at values

_LOOKS = {
    torch.Tensor.item: "item()",
    torch.Tensor.__bool__: "a comparison in if or while",
    torch.Tensor.__float__: "float()",
    torch.Tensor.__int__: "int()",
    torch.Tensor.__index__: "use as an index or a size",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy()",
}
_WHOLE_NUMBERS = (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__)
_ELEMENTS = (torch.ops.aten.unbind.int, torch.ops.aten.select.int)


def _position(tensor: Tensor) -> int | None:
    """Return the value of an element of ``torch.arange(size)``, as of a plate whose data come singly."""
    mode = private.get_proxy_mode()
    known = mode and private.get_proxy_slot(tensor, mode.tracer, None)  # none of a constant
    node = getattr(getattr(known, "proxy", None), "node", None)
    if node is None:
        return None
    elements = node.args[0] if node.target is operator.getitem else node
    if elements.target not in _ELEMENTS:
        return None
    whole = elements.args[0]
    if whole.target is not torch.ops.aten.arange.default or any(
        n.target not in _ELEMENTS for n in whole.users
    ):
        return None
    return range(whole.args[0])[node.args[-1]]


class _NoValues(TorchFunctionMode):
    """Lets Pyro's own looks at values pass, which only report or check, and names the user's."""

    seen: str | None = None

    def __torch_function__(self, func, _, args=(), kwargs=None):
        if func is torch.Tensor.masked_select and _home(_asking()) == private.SUMS_OF_PYRO:
            return torch.where(args[1], args[0], 0)  # what is summed, in a shape that hangs on no value
        if func not in _LOOKS:
            return func(*args, **(kwargs or {}))
        if func in _WHOLE_NUMBERS and (position := _position(args[0])) is not None:
            return position
        if _home(_asking(within_torch=True)) == "torch.distributions.distribution":
            return True  # whether parameters and values are valid, which those of the first step were
        frame = _asking()
        caller = _home(frame)
        if caller.startswith("pyro.infer") and func is torch.Tensor.item:
            return args[0].detach()  # the loss as a number
        if caller == private.SUMS_OF_PYRO and func is torch.Tensor.__bool__:
            return False  # whether all probabilities are above 0: terms of others are left out, above
        # The program may catch what is raised.
        line = _line(traceback.walk_stack(frame)) or "an unknown line"
        self.seen = f"it looks at the value of a tensor by {_LOOKS[func]} at {line}"
        raise CaptureError(self.seen)


@contextlib.contextmanager
def _without_looking_at_values() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        looks = stack.enter_context(_NoValues())
        stack.enter_context(pyro.validation_enabled(False))
        for check in private.PYROS_CHECKS:
            stack.enter_context(mock.patch(check, return_value=False))
        yield
    if looks.seen is not None:
        raise CaptureError(looks.seen)


# ------------------------------------------------------------------------------------ where


def _home(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _is_generated(frame: types.FrameType) -> bool:
    """Return True for code that no file has, but for what is typed in."""
    file = frame.f_code.co_filename
    return file.startswith("<") and not file.startswith(("<stdin", "<ipython"))


def _asking(*, within_torch: bool = False) -> types.FrameType:
    """Return the frame that asked: not a mode or a check of types through which the call came."""
    passed = ("beartype", "jaxtyping", "torch.fx" if within_torch else "torch")
    for frame, _ in traceback.walk_stack(sys._getframe(2)):
        home = _home(frame)
        if not (is_in(home, passed) or is_registered(home) or _is_generated(frame)):
            return frame
    raise LookupError("nobody asks")


def _line(frames: Iterable[tuple[types.FrameType, int]]) -> str | None:
    """Return file and line of the first of these frames that is the user's."""
    theirs = (f"{f.f_code.co_filename}:{n}" for f, n in frames if is_users(_home(f)) and not _is_generated(f))
    return next(theirs, None)


class _Sites(Messenger):
    """Notes at which node of the graph each sample site begins."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    @property
    def last(self) -> str:
        return self.seen[-1][1] if self.seen else "before the first site"

    def _pyro_sample(self, msg: dict) -> None:
        mode = private.get_proxy_mode()
        count = len(mode.tracer.graph.nodes) if mode else 0
        self.seen.append((count, f"(site {msg['name']!r}, {_line(traceback.walk_stack(sys._getframe(1)))})"))


# ------------------------------------------------------------------------------------ graphs


def _first_difference(first: fx.GraphModule, second: fx.GraphModule) -> int | None:
    """Return the position of the first node of a graph that computes what no node of the other does.

    The order of nodes does not count, but for those that draw or change something.
    """
    described, expected = _described(first), _described(second)
    if sorted(described) == sorted(expected):
        return None
    known = set(expected)
    return next((i for i, one in enumerate(described) if one not in known), len(described) - 1)


def _described(module: fx.GraphModule) -> list[int]:
    """Return a hash of what each node computes, and from what, which does not depend on their order."""
    hashes: dict[fx.Node, int] = {}
    count = 0
    for node in module.graph.nodes:
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        name, content = str(node.target), None
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            # Literals are made anew by every run, and named by their order.
            name, content = "", str(tensor.tolist()) if _is_literal(node) else id(tensor)
        if isinstance(node.target, private.OpOverload) and (
            node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
        ):
            content = count = count + 1
        inputs = fx.map_arg((node.args, dict(node.kwargs)), hashes.__getitem__)
        hashes[node] = hash((node.op, name, str(inputs), shape, content))
    return list(hashes.values())


def _is_literal(node: fx.Node) -> bool:
    return all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)


def _lift_constants(module: fx.GraphModule, num_leaves: int) -> list[Tensor]:
    """Make tensors that the program found somewhere inputs of the graph: their values may change."""
    graph, constants = module.graph, {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    after_state = (*inputs, *(n for n in graph.nodes if n.op != "placeholder"))[len(inputs) - num_leaves]
    for node in list(graph.nodes):
        if node.op != "get_attr" or _is_literal(node):
            continue
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in constants:
            with graph.inserting_before(after_state):
                constants[id(tensor)] = (tensor, graph.placeholder(f"constant_{len(constants)}"))
                constants[id(tensor)][1].meta.update(node.meta)
        node.replace_all_uses_with(constants[id(tensor)][1])
        graph.erase_node(node)
    module.recompile()
    return [tensor for tensor, _ in constants.values()]
