"""Everything that a program can reach, as it was: what running it has changed, and how to put that back.

A graph does what torch does and nothing else, so a program that also counts its calls, fills a list or keeps
a result must not be captured. Whose class an object is of does not matter, but who writes: what the user's
code writes counts wherever it lies, what PyTorch and Pyro keep to themselves does not.
"""

import collections
import functools
import itertools
import sys
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.compiled import private
from pyro_vae.compiled.names import ANY, MAKERS, names_in
from pyro_vae.compiled.owners import is_discreet, is_library
from pyro_vae.compiled.things import (
    BARE_BASES,
    BUFFERS,
    MISSING,
    PLAIN,
    attributes_of,
    content,
    is_closed,
    owner_of,
    same,
    slots,
    wrapped,
)

_MAX_OBJECTS = 100_000
_MAX_COPIED = 1_000_000  # numbers of a tensor
_MAX_DIGESTED = 1 << 26  # bytes of an array
_CONTAINERS = (dict, list, set, collections.deque)
_LEAVES = (
    *PLAIN,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.GeneratorType,
    range,
    slice,
)
_ATTRIBUTES = object()  # by which a thing was reached
Found = Iterator[tuple[str, Any, Any]]


class Change(NamedTuple):
    """Something that was set to something else.

    Attributes:
        label: In words.
        place: Whose content it is, by ``id``, and under which key.
        counts: True if the user's code wrote it, as far as can be told.
        may_settle: True if nothing was there before, as before a first run.
    """

    label: str
    place: tuple[int, object]
    counts: bool
    may_settle: bool


class _Kept(NamedTuple):
    """One thing that can change, how to read and to set its content, and what that was.

    ``via``: the attribute of an object of a library's by which it was reached; None if it is the user's.
    """

    label: str
    thing: Any
    read: Callable[[], dict]
    put: Callable[[dict], None]
    was: dict
    via: object


class Heap:
    """Everything that can be reached from some roots, with copies of what it holds.

    Args:
        roots: Modules, functions, objects: programs, and all that they hold.
        ran: Code that ran, with its global names.

    Attributes:
        codes: The code of all functions that were found.
    """

    def __init__(self, roots: Iterable[object], ran: Iterable[tuple[types.CodeType, dict]] = ()) -> None:
        self.codes: set[types.CodeType] = set()
        self._kept: list[_Kept] = []
        self._tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._memory: list[tuple[str, Tensor, int, int]] = []  # tensors, where their numbers lie, versions
        self._seen: dict[int, object] = {}
        self._written: set[str] = set()
        self._mentioned: set[str] = set()
        self._keep("Pyro's parameter store", private.stored(), None)
        todo: collections.deque[tuple[str, Any, Any]] = collections.deque(
            ("a program", r, None) for r in roots
        )
        for code, space in ran:
            todo.extend(self._visit_code(code, space))
        while todo and len(self._seen) < _MAX_OBJECTS:
            label, thing, via = todo.popleft()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                todo.extend(found for found in self._visit(label, thing, via) if not _is_leaf(found[1]))

    # ------------------------------------------------------------------------------------ following

    def _keep(
        self,
        label: str,
        thing: Any,
        via: object,
        names: Iterable[str] = (),
        read: Any = None,
        put: Any = None,
    ) -> None:
        parts = (thing, names) if read else (thing,)
        read, put = functools.partial(read or _content, *parts), functools.partial(put or _put, thing)
        self._kept.append(_Kept(label, thing, read, put, read(), via))

    def _visit(self, label: str, thing: Any, via: object) -> Found:
        """Note a thing; what it leads to."""
        if isinstance(thing, Tensor):
            self.keep_tensors([thing], _MAX_COPIED)
            if type(thing) in (Tensor, nn.Parameter) and thing.layout is torch.strided:
                self._memory.append((label, thing, thing.data_ptr(), private.version(thing)))
            if type(thing) not in (Tensor, nn.Parameter):
                yield type(thing).__name__, type(thing), None
            if vars(thing):
                yield from self._visit_attributes("a tensor", thing, vars(thing), is_foreign=True)
        elif isinstance(thing, np.ndarray) and thing.dtype.hasobject:
            yield from ((label, value, via) for value in thing.ravel().tolist())
        elif isinstance(thing, (np.ndarray, *BUFFERS)):
            if not isinstance(thing, np.ndarray) or thing.nbytes <= _MAX_DIGESTED:
                self._keep(label, thing, via)
        elif isinstance(thing, types.FunctionType):
            yield from self._visit_function(thing)
        elif (parts := wrapped(thing)) is not None:
            yield from ((label, part, via) for part in parts)
            if isinstance(thing, functools.partial):
                yield label, vars(thing), via
        elif isinstance(thing, ContextVar | types.CellType):
            self._keep(label, thing, via)
            yield from ((label, value, via) for value in _content(thing).values())
        elif isinstance(thing, type | types.ModuleType):
            yield from self._visit_space(thing)
        elif isinstance(thing, itertools.count | itertools.cycle):
            self._keep(label, thing, via)
        elif not is_closed(thing):
            yield from self._visit_value(label, thing, via)

    def _visit_value(self, label: str, thing: Any, via: object) -> Found:
        if isinstance(thing, _CONTAINERS):
            self._keep(label, thing, via)
        if isinstance(thing, dict):
            yield from ((f"{key} of {label}", value, via) for key, value in list(thing.items()))
            yield from ((label, key, via) for key in list(thing) if not _is_leaf(key))
        elif isinstance(thing, (list, set, collections.deque, tuple, frozenset)):
            yield from ((label, value, via) for value in list(thing))
        kind = type(thing)
        is_foreign = any(is_discreet(base.__module__) and base not in BARE_BASES for base in kind.__mro__)
        if kind not in (*_CONTAINERS, tuple, frozenset):
            yield kind.__name__, kind, None
        attributes = attributes_of(thing)
        if isinstance(attributes, dict):
            yield from self._visit_attributes(kind.__name__, thing, attributes, is_foreign=is_foreign)
        names = slots(kind)
        if names:
            self._keep(
                kind.__name__, thing, _ATTRIBUTES if is_foreign else None, names, _slots_of, _put_slots
            )
            held = _slots_of(thing, names).items()
            yield from ((f"{k} of {kind.__name__}", v, k if is_foreign else None) for k, v in held)

    def _visit_attributes(self, name: str, thing: Any, attributes: dict, *, is_foreign: bool) -> Found:
        self._seen[id(attributes)] = attributes
        self._keep(name, attributes, _ATTRIBUTES if is_foreign else None)
        for key, value in list(attributes.items()):
            if isinstance(thing, nn.Module) and key.startswith("_") and isinstance(value, dict):
                # Parameters, buffers, modules and hooks: attributes that lie elsewhere. Libraries change
                # tensors in place; who puts another in their place is the user.
                is_theirs = is_foreign and key not in private.PARAMETERS
                yield from self._visit_attributes(name, None, value, is_foreign=is_theirs)
            else:
                yield f"{key} of {name}", value, key if is_foreign else None

    def _visit_space(self, thing: Any) -> Found:
        """Note a class or a module; a library's is not followed, but the user's code may write there."""
        is_class = isinstance(thing, type)
        is_foreign = is_library(thing.__module__ if is_class else thing.__name__)
        self._keep(thing.__name__, thing, _ATTRIBUTES if is_foreign else None)
        if not is_foreign:
            skipped = {"__dict__", "__weakref__", "__builtins__", "__loader__", "__spec__"}
            for key, value in list(vars(thing).items()):
                if key not in skipped:
                    yield f"{key} of {thing.__name__}", value, None
            yield from ((base.__name__, base, None) for base in (thing.__bases__ if is_class else ()))

    def _visit_function(self, function: types.FunctionType) -> Found:
        name = function.__name__
        is_foreign = is_library(function.__globals__.get("__name__"))
        for cell in function.__closure__ or ():
            via = "a variable of a library's" if is_foreign else None
            yield "a variable of an enclosing function", cell, via
        yield from self._visit_attributes(name, function, vars(function), is_foreign=is_foreign)
        if is_foreign:
            return
        self._keep(name, function, None)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield f"a default of {name}", value, None
        yield from self._visit_code(function.__code__, function.__globals__)

    def _visit_code(self, code: types.CodeType, space: dict) -> Found:
        """Note what code says of global names, and of attributes."""
        if code in self.codes:
            return
        codes, names, attributes, written, imports = names_in(code)
        self.codes |= codes
        self._mentioned |= {name for _, name in attributes}
        if code.co_name not in MAKERS:
            self._written |= written
        yield from ((f"module {name}", sys.modules.get(name), None) for name in imports)
        if names:
            self._keep("a global", space, None, names, _globals_of, dict.update)
            yield from ((f"global {name}", space[name], None) for name in names & space.keys())

    def keep_tensors(self, tensors: Iterable[Tensor | None], max_size: int | None = None) -> None:
        """Remember the values of tensors, to put them back."""
        for tensor in tensors:
            if tensor is None or id(tensor) in self._tensors or tensor.is_inference():
                continue
            if tensor.layout is torch.strided and (max_size is None or tensor.numel() <= max_size):
                with torch.no_grad():
                    self._tensors[id(tensor)] = (tensor, tensor.detach().clone(), private.version(tensor))

    # ------------------------------------------------------------------------------------ comparing

    def changes(self) -> list[Change]:
        """Return what is no longer what it was."""
        found = []
        for kept in self._kept:
            now, then = kept.read(), kept.was
            if len(now) == len(then) and all(map(_is_same_item, now.items(), then.items())):
                continue
            for key in {**then, **now}:
                before, after = then.get(key, MISSING), now.get(key, MISSING)
                if not same(after, before):
                    label = f"{key} of {kept.label}" if isinstance(key, str) else kept.label
                    label = f"global {key}" if kept.label == "a global" else label
                    counts = self._counts(kept.via, key)
                    # No library counts what the user has not asked it to, as by step() of a scheduler.
                    is_count = kept.via is _ATTRIBUTES and {type(before), type(after)} <= {int, float}
                    settles = before is MISSING or before is None or (is_count and not counts)
                    place = (id(kept.thing), key)
                    found.append(Change(label, place, counts or is_count, settles))
        return found

    def lost(self) -> str | None:
        """Return a tensor, in words, whose numbers changed or moved and were not kept, if there is one."""
        for label, tensor, place, version in self._memory:
            is_kept = id(tensor) in self._tensors or private.version(tensor) == version
            if tensor.data_ptr() != place or not is_kept:
                return label
        return None

    def _counts(self, via: object, key: object) -> bool:
        if via is None:
            return True
        if via is _ATTRIBUTES:
            return key in self._written or (ANY in self._written and not str(key).startswith("_"))
        return via in self._mentioned or via in self._written

    # ------------------------------------------------------------------------------------ putting back

    def restore(self) -> None:
        """Put everything back."""
        for kept in self._kept:
            now = kept.read()
            if len(now) != len(kept.was) or not all(map(_is_identical_item, now.items(), kept.was.items())):
                kept.put(kept.was)
        self.restore_tensors()

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return what a tensor was; None if that was not kept."""
        return self._tensors.get(id(tensor), (None, None))[1]

    @torch.no_grad()
    def restore_tensors(self, others: Iterable[Tensor] = ()) -> list[tuple[Tensor, Tensor]]:
        """Put back tensors that changed, and ``others``; which these are, and what they had become."""
        others = {id(tensor) for tensor in others}
        # Running statistics of a batch normalisation change without a new version.
        changed = [
            (tensor, tensor.detach().clone(), value)
            for tensor, value, version in self._tensors.values()
            if id(tensor) in others or private.version(tensor) != version or not torch.equal(tensor, value)
        ]
        for tensor, _, value in changed:  # after all were looked at: one may be a view of another
            tensor.copy_(value)
        return [(tensor, now) for tensor, now, _ in changed]


def _is_same_item(now: tuple, then: tuple) -> bool:
    return same(now[0], then[0]) and same(now[1], then[1])


def _is_identical_item(now: tuple, then: tuple) -> bool:
    return same(now[0], then[0]) and now[1] is then[1]


def _is_leaf(thing: object) -> bool:
    return isinstance(thing, _LEAVES) and owner_of(thing) is None


def _content(thing: Any) -> dict:
    """Return what a thing holds."""
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, type | types.ModuleType):
        return dict(vars(thing))
    if isinstance(thing, types.FunctionType):
        return {name: getattr(thing, name) for name in ("__code__", "__defaults__", "__kwdefaults__")}
    if isinstance(thing, types.CellType):
        return {0: content(thing, MISSING)}
    if isinstance(thing, ContextVar):
        return {0: thing.get(MISSING)}
    if isinstance(thing, itertools.count | itertools.cycle):
        return {0: repr(thing)}
    if isinstance(thing, np.ndarray):
        return {0: zlib.crc32(thing.tobytes())}
    if isinstance(thing, BUFFERS):
        return {0: zlib.crc32(bytes(thing))}
    return dict(enumerate(thing))


def _put(thing: Any, was: dict) -> None:
    """Give a thing its content back."""
    if isinstance(thing, dict):
        if list(thing) != list(was):
            thing.clear()
        thing.update(was)
    elif isinstance(thing, list):
        thing[:] = was.values()
    elif isinstance(thing, set | collections.deque):
        thing.clear()
        (thing.extend if isinstance(thing, collections.deque) else thing.update)(was.values())
    elif isinstance(thing, types.CellType):
        if was[0] is not MISSING:
            thing.cell_contents = was[0]
    elif isinstance(thing, type | types.ModuleType | types.FunctionType):
        now = _content(thing)
        for key in now.keys() - was.keys():
            delattr(thing, key)
        for key, value in was.items():
            if now.get(key, MISSING) is not value:
                setattr(thing, key, value)


def _globals_of(space: dict, names: Iterable[str]) -> dict:
    return {name: space[name] for name in names if name in space}


def _slots_of(thing: Any, names: Iterable[str]) -> dict:
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def _put_slots(thing: Any, was: dict) -> None:
    for name, value in was.items():
        setattr(thing, name, value)
