"""Everything that a program can read besides its arguments: what its code reaches by names it mentions.

Modules, attributes, containers, closures, globals, classes and the functions that they hold are followed,
from the user's code only into names that this code reads, so that a list of losses beside a model is not
taken for a part of it.
"""

import collections
import datetime
import logging
import operator
import random
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.compiled.names import ANY, MAKERS, names_in
from pyro_vae.compiled.owners import is_fixed, is_library
from pyro_vae.compiled.private import (
    HOOKS_OF_ALL_MODULES,
    MODULE_CONTAINERS,
    MODULE_HOOKS,
    MODULE_INTERNALS,
)
from pyro_vae.compiled.things import (
    BARE_BASES,
    BUFFERS,
    PLAIN,
    attributes_of,
    content,
    is_closed,
    slots,
    wrapped,
)

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_CLOCKS = (time, datetime, datetime.datetime, datetime.date)
# What a compiled step may compare at every call, which takes 0.1 ms.
MAX_BYTES = 1 << 20
MAX_CONTENT = 1_000


class Place(NamedTuple):
    """Place where a value is found: ``mapping[key]``, in words ``label``."""

    label: str
    mapping: Mapping
    key: Any


class Holder(NamedTuple):
    """Dict, list or set that is read; ``by_name``: only under names that the code mentions."""

    label: str
    content: Any
    is_users: bool
    by_name: bool = False
    holds_hooks: bool = False


class Survey:
    """Everything that code reachable from ``roots`` can read.

    Args:
        roots: Modules, functions, bound methods, ELBO objects.
        ran: Other code that ran, with its global names.

    Attributes:
        modules: The modules among it.
        holders: Attributes of objects, and containers.
        cells: Variables of enclosing functions.
        globals: Global names that functions mention.
        attributes: Objects and the names of what they keep elsewhere than in a dict.
        arrays: Arrays of NumPy, whose numbers may be read.
        asked: What else may change, in words, and a function that tells what it is.
        codes: The code of all functions that were found.
        refused: Why no graph can stand for such a program, if so.
    """

    def __init__(self, roots: Sequence[object], ran: Sequence[tuple[types.CodeType, dict]] = ()) -> None:
        self.modules: list[nn.Module] = []
        self.holders: list[Holder] = []
        self.cells: list[types.CellType] = []
        self.attributes: list[tuple[object, str]] = []
        self.arrays: list[np.ndarray] = []
        self.asked: list[tuple[str, Callable[[], object]]] = []
        self.codes: set[types.CodeType] = set()
        self.refused: str | None = None
        self.globals: dict[tuple[int, str], Place] = {}
        self._reads = {"forward", "backward", "setup_context"}
        self._made: set[str] = set()  # classes that the code names, and may make objects of
        self._seen: dict[int, object] = {}
        todo = [("a program", root) for root in roots]
        for code, space in ran:
            todo += self._visit_code(code, space, is_own=is_fixed(space.get("__name__")))
        for hooks in HOOKS_OF_ALL_MODULES:
            todo += self._hold("hooks of all modules", hooks, holds_hooks=True)
        while todo:
            while todo:
                label, thing = todo.pop()
                todo += self._visit(label, thing)
            for place in list(self.places()):  # what has been named since it was found
                value = place.mapping[place.key]
                is_new = id(value) not in self._seen and not isinstance(value, PLAIN)
                if isinstance(value, type) and value.__name__ not in self._made:
                    self._made |= {kind.__name__ for kind in value.__mro__}
                    is_new = True
                if is_new:
                    todo.append((place.label, value))

    def places(self) -> Iterator[Place]:
        """Yield attributes and globals that are read."""
        yield from self.globals.values()
        anything = ANY in self._reads
        for holder in self.holders:
            for key in list(holder.content) if holder.by_name else ():
                if key in MODULE_INTERNALS or key in _CLASS_INTERNALS:
                    continue
                if key in MAKERS:
                    is_read = holder.label in self._made
                else:
                    is_read = anything or not holder.is_users or key in self._reads or _is_special(key)
                if is_read:
                    yield Place(f"{key} of {holder.label}", holder.content, key)

    def _visit(self, label: str, thing: Any) -> list[tuple[str, Any]]:
        """Note a thing; return what it leads to."""
        if id(thing) in self._seen or isinstance(thing, PLAIN):
            return []
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):  # users note something there
            is_noted = type(thing) in (Tensor, nn.Parameter) and vars(thing)
            return self._hold(label, vars(thing), by_name=True) if is_noted else []
        if reason := _refusal(thing):
            self.refused = self.refused or f"{reason} ({label})"
        elif isinstance(thing, np.ndarray):
            if thing.dtype.hasobject:
                self.asked.append((label, lambda: tuple(thing.ravel().tolist())))
                return [(label, value) for value in thing.ravel().tolist()]
            self.arrays.append(thing)
            if sum(array.nbytes for array in self.arrays) > MAX_BYTES:
                self.refused = self.refused or f"it reads large arrays of NumPy: make them tensors ({label})"
        elif (parts := wrapped(thing)) is not None:
            return [(label, part) for part in parts]
        elif isinstance(thing, types.FunctionType):
            return self._visit_function(thing)
        elif isinstance(thing, (types.MappingProxyType, *BUFFERS)):
            is_buffer = isinstance(thing, BUFFERS)
            self.asked.append((label, lambda: bytes(thing) if is_buffer else tuple(thing.items())))
        elif isinstance(thing, operator.attrgetter | operator.methodcaller):
            _, names = thing.__reduce__()
            self._reads.update(part for name in names if isinstance(name, str) for part in name.split("."))
        elif isinstance(thing, type):
            if is_fixed(thing.__module__):
                used = [value for key, value in vars(thing).items() if key not in MAKERS]
                return [(thing.__name__, value) for value in (*used, *thing.__bases__)]
            if not is_library(thing.__module__):
                self._hold(thing.__name__, vars(thing), by_name=True)
                return [(base.__name__, base) for base in thing.__bases__]
        elif isinstance(thing, types.ModuleType):
            if not is_library(thing.__name__):
                self._hold(thing.__name__, vars(thing), by_name=True)
        elif isinstance(thing, dict | list | set | collections.deque):
            makes = [(label, thing.default_factory)] if isinstance(thing, collections.defaultdict) else []
            return makes + self._hold(label, thing)
        elif isinstance(thing, tuple | frozenset):
            return [(label, v) for v in thing] if len(thing) <= MAX_CONTENT else []
        elif isinstance(thing, logging.Logger):  # what it writes is seen when it does
            self.asked.append((f"level of logger {thing.name!r}", thing.getEffectiveLevel))
            self.asked.append((f"logger {thing.name!r}", lambda: (thing.disabled, thing.manager.disable)))
        elif hasattr(thing, "cache_info") and hasattr(thing, "__wrapped__"):  # of functools.lru_cache
            self.asked.append(
                (f"the cache of {label}", lambda: (i := thing.cache_info()).misses + i.currsize)
            )
            return [(label, thing.__wrapped__)]
        elif not is_closed(thing):
            return self._visit_object(thing)
        return []

    def _hold(
        self,
        label: str,
        content: Any,
        *,
        is_users: bool = True,
        by_name: bool = False,
        holds_hooks: bool = False,
    ) -> list[tuple[str, Any]]:
        """Note a dict, list or set; return what it leads to, unless it is read by name."""
        self._seen[id(content)] = content
        self.holders.append(Holder(label, content, is_users, by_name, holds_hooks))
        if by_name or len(content) > MAX_CONTENT:
            return []
        if isinstance(content, dict):
            return [(f"{key} of {label}", value) for key, value in content.items()]
        return [(label, value) for value in content]

    def _visit_object(self, thing: Any) -> list[tuple[str, Any]]:
        name, kinds = type(thing).__name__, type(thing).__mro__
        foreign = [kind for kind in kinds if is_library(kind.__module__) and kind not in BARE_BASES]
        # What code of a library reads of the user's class has no names here.
        is_users = not is_library(type(thing).__module__)
        leads: list[tuple[str, Any]] = [(name, type(thing))]
        attributes = attributes_of(thing)
        if isinstance(thing, nn.Module):
            self.modules.append(thing)
            for key in (*MODULE_CONTAINERS, *MODULE_HOOKS):
                if isinstance(attributes.get(key), dict):
                    hooks = key in MODULE_HOOKS
                    leads += self._hold(name, attributes[key], is_users=is_users, holds_hooks=hooks)
        if attributes is not None:
            self._hold(name, attributes, is_users=is_users and not foreign, by_name=True)
            if foreign and is_users:
                leads += [(f"{k} of {name}", v) for k, v in attributes.items() if k not in MODULE_INTERNALS]
        if is_users:
            self.attributes.append((thing, "__class__"))
        held = slots(type(thing)) if is_users else []
        self.attributes += [(thing, slot) for slot in held]
        return leads + [(f"{slot} of {name}", getattr(thing, slot, None)) for slot in held]

    def _visit_function(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        cells = function.__closure__ or ()
        if not is_fixed(function.__module__):  # which sets no variable of an enclosing function
            self.cells += cells
        leads = [("a variable of an enclosing function", content(cell)) for cell in cells]
        if is_library(function.__module__):
            return leads
        name, is_own = function.__name__, is_fixed(function.__module__)
        leads += self._visit_code(function.__code__, function.__globals__, is_own=is_own)
        if not is_own:
            self._hold(name, vars(function), by_name=True)
            self.attributes += [(function, key) for key in ("__code__", "__defaults__", "__kwdefaults__")]
        defaults = [(f"a default of {name}", value) for value in function.__defaults__ or ()]
        return [*leads, *defaults, (f"defaults of {name}", function.__kwdefaults__)]

    def _visit_code(self, code: types.CodeType, space: dict, *, is_own: bool) -> list[tuple[str, Any]]:
        codes, global_names, attributes, _, imports = names_in(code)
        self.codes |= codes
        for base, attribute in attributes:
            of_library = base is not None and isinstance(space.get(base), types.ModuleType)
            if not (of_library and is_library(space[base].__name__)):
                self._reads.add(attribute)
        if "globals" in global_names or ("sys", "modules") in attributes:
            global_names |= {name for base, name in attributes if base is None}
        leads: list[tuple[str, Any]] = [(f"module {name}", sys.modules.get(name)) for name in imports]
        for key in global_names & space.keys():
            if is_own:
                leads.append((f"global {key}", space[key]))
            else:
                self.globals[id(space), key] = Place(f"global {key}", space, key)
        return leads


def _is_special(key: object) -> bool:
    return isinstance(key, str) and key.startswith("__") and key.endswith("__")


_CLASS_INTERNALS = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__builtins__"}
_CLASS_INTERNALS |= {"__static_attributes__", "__firstlineno__", "__annotate__", "__annotations_cache__"}


def _refusal(thing: object) -> str | None:
    if isinstance(thing, torch.jit.ScriptModule):
        return "a module of torch.jit has no Python code to be captured"
    if isinstance(thing, ELBO) and type(thing).__name__.startswith("Jit"):
        return f"{type(thing).__name__} compiles by itself: use {type(thing).__name__.removeprefix('Jit')}"
    if isinstance(thing, _GENERATORS):
        return "it draws from a random generator of its own: draw by pyro.sample or torch"
    if isinstance(thing, Iterator):
        return "it reads from an iterator, which has moved on at the next call"
    if any(thing is clock for clock in _CLOCKS) or getattr(thing, "__module__", None) == "time":
        return "it looks at the time"
    return None
