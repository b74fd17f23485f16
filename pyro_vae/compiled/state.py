"""What a Pyro program reads besides its arguments: tensors, and the Python values that decide its path.

A captured graph stands for a program only while these stay what they were. Tensors are read anew at every
call, so values may change; a *replaced* tensor, ``train()``/``eval()``, ``requires_grad``, a number or flag
in an attribute, a closure or a global that the program names are compared, at the cost of an identity test
each.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

T = TypeVar("T")

_PLAIN = (bool, int, float, complex, str, type(None))
_MISSING = object()
_LIBRARIES = ("torch", "pyro", "builtins", "beartype", "jaxtyping")  # whose own functions are not the user's


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, torch.dtype, torch.device))


class ProgramState:
    """The tensors and plain values that programs read.

    Args:
        objects: Modules, functions and ELBO objects: the programs and what they call.
        params: Names of the parameters in Pyro's store that they use.

    Attributes:
        names: Every tensor that is kept in a module or in Pyro's store, with a name for messages.
    """

    def __init__(self, objects: list[object], params: Iterable[str]) -> None:
        modules = [o for o in objects if isinstance(o, nn.Module)]
        self._objects = list(dict.fromkeys([*objects, *(m for module in modules for m in module.modules())]))
        store = pyro.get_param_store()._params
        self._slots: list[tuple[MutableMapping, str]] = [(store, name) for name in params if name in store]
        self.names: dict[Tensor, str] = {store[name]: name for _, name in self._slots}
        for module in self._objects:
            if isinstance(module, nn.Module):
                for holder in module._parameters, module._buffers:
                    for name, value in holder.items():
                        if value is not None:
                            self._slots.append((holder, name))
                            self.names.setdefault(value, f"{name} of {type(module).__name__}")
        self.remember()

    @classmethod
    @contextlib.contextmanager
    def found_by(cls, roots: tuple[object, ...], run: Callable[[], T]) -> Iterator["tuple[ProgramState, T]"]:
        """The state of programs, found by running them once, and what the run returned.

        Buffers that the run changes are put back when the context ends: autograd may need them before.

        Args:
            roots: Model, guide, objective: modules, functions, bound methods, ELBO objects.
            run: Runs the programs, eagerly.
        """
        called: list[nn.Module] = []
        before: dict[Tensor, Tensor] = {}

        def note(module: nn.Module, _: object) -> None:
            called.append(module)
            for buffer in module.buffers():
                before.setdefault(buffer, buffer.detach().clone())

        hook = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            with poutine.trace(param_only=True) as params:
                result = run()
        finally:
            hook.remove()
        yield cls([*_reachable(roots), *called], params.trace.param_nodes), result
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors kept in modules and in the store, each once."""
        return list(self.names)

    def remember(self) -> None:
        """Take the present values as those to compare with."""
        watched: list[tuple[Any, str, object]] = [(d, name, d[name]) for d, name in self._slots]
        self._cells = []
        for thing in self._objects:
            if isinstance(thing, types.FunctionType):
                watched += [
                    (thing.__globals__, name, thing.__globals__[name])
                    for name in _names(thing.__code__)
                    if name in thing.__globals__ and _watchable(thing.__globals__[name])
                ]
                self._cells += [(cell, _content(cell)) for cell in thing.__closure__ or ()]
            elif hasattr(thing, "__dict__"):
                attributes = vars(thing)
                watched += [(attributes, name, v) for name, v in attributes.items() if _watchable(v)]
        self._tensors = [entry for entry in watched if isinstance(entry[2], Tensor)]
        self._values = [entry for entry in watched if not isinstance(entry[2], Tensor)]
        self._requires_grad = [(tensor, tensor.requires_grad) for tensor in self.tensors]

    def replaced(self) -> str | None:
        """A tensor that is no longer the same, or requires gradients where it did not, by its name."""
        for holder, name, value in self._tensors:
            if holder.get(name) is not value:
                return name
        for tensor, requires_grad in self._requires_grad:
            if tensor.requires_grad is not requires_grad:
                return self.names[tensor]
        return None

    def changed(self) -> str | None:
        """A plain value that is no longer what it was, in words."""
        for holder, name, value in self._values:
            now = holder.get(name, _MISSING)
            if now is not value and now != value:
                return f"{name}: {value!r} -> {now!r}"
        for cell, value in self._cells:
            now = _content(cell)
            if now is not value and not (_is_plain(value) and now == value):
                return f"a variable of an enclosing function: {value!r} -> {now!r}"
        return None

    def swapped(self, replacement: dict[Tensor, Tensor]) -> "_Swapped":
        """A context in which the programs find these tensors in place of their own."""
        return _Swapped(self._slots, replacement)


class _Swapped:
    def __init__(self, slots: list[tuple[MutableMapping, str]], replacement: dict[Tensor, Tensor]) -> None:
        self._slots = [(holder, name, holder[name]) for holder, name in slots]
        self._replacement = replacement

    def __enter__(self) -> None:
        for holder, name, own in self._slots:
            holder[name] = self._replacement[own]

    def __exit__(self, *_: object) -> None:
        for holder, name, own in self._slots:
            holder[name] = own


def _watchable(value: object) -> bool:
    return _is_plain(value) or isinstance(value, Tensor)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names that a function and the functions inside of it may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _reachable(roots: tuple[object, ...]) -> Iterator[object]:
    """Modules, ELBO objects and the user's functions, through closures, globals and partial applications."""
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, functools.partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            todo += [thing.__self__, thing.__func__]
        elif isinstance(thing, types.FunctionType):
            if (thing.__module__ or "").split(".")[0] in _LIBRARIES:
                todo += [_content(cell) for cell in thing.__closure__ or ()]
                continue
            yield thing
            todo += [_content(cell) for cell in thing.__closure__ or ()]
            named = (thing.__globals__.get(name) for name in _names(thing.__code__))
            todo += [v for v in named if isinstance(v, nn.Module | types.FunctionType)]
        elif isinstance(thing, nn.Module):
            yield thing
            todo.append(type(thing).forward)
        elif isinstance(thing, ELBO):
            yield thing
            todo += [value for value in vars(thing).values() if isinstance(value, ELBO)]
        elif type(thing).__module__.split(".")[0] not in _LIBRARIES and callable(thing):
            yield thing
            todo.append(type(thing).__call__)
