"""Everything that a program can read besides its arguments: what its code reaches by names it mentions.

Modules, attributes, containers, closures, globals, classes and the functions that they hold are followed,
from the user's code only into names that this code reads, so that a list of losses beside a model is not
taken for a part of it.
"""

import argparse
import array
import collections
import ctypes
import datetime
import dis
import functools
import inspect
import logging
import mmap
import operator
import random
import re
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compiled.owners import is_fixed, is_in, is_library
from pyro_vae.compiled.private import (
    HOOKS_OF_ALL_MODULES,
    MODULE_CONTAINERS,
    MODULE_HOOKS,
    MODULE_INTERNALS,
    PYTHONS_GENERATOR,
)

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device)
BUFFERS = (bytearray, memoryview, array.array, mmap.mmap, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
# Of the libraries: what users keep numbers, tensors and functions in.
OPEN_ARGUMENTS = (types.SimpleNamespace, argparse.Namespace)
# Objects of these are worlds of their own, which no program of Pyro is about; what compiles others is, too.
_CLOSED = {"_pytest", "pytest", "IPython", "ipykernel", "nicegui", "asyncio", "threading", "logging", "tqdm"}
_CLOSED |= {"concurrent", "multiprocessing", "matplotlib", "optuna", "_abc", "_io", "unittest", "pluggy"}
_CLOSED |= {__package__}
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_CLOCKS = (time, datetime, datetime.datetime, datetime.date)
BARE_BASES = {object, nn.Module, PyroModule}
# What a compiled step may compare at every call, which takes 0.1 ms.
MAX_BYTES = 1 << 20
ANY = "any name"  # which a program makes up while it runs
_LOOKS_UP = {"getattr", "hasattr", "attrgetter", "vars", "__dict__", "globals", "eval", "exec"}
MAX_CONTENT = 1_000


def is_closed(thing: object) -> bool:
    """Return True for what is a world of its own, which no program of Pyro is about."""
    return is_in(type(thing).__module__, _CLOSED)


def wrapped(thing: object) -> list[object] | None:
    """Return what a function-like thing is made of, if it is one that only wraps others."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, thing.keywords]
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, property | functools.cached_property | staticmethod | classmethod):
        parts = (getattr(thing, name, None) for name in ("fget", "fset", "fdel", "func", "__func__"))
        return [part for part in parts if part is not None]
    if isinstance(thing, weakref.ReferenceType):
        return [thing()]
    owner = owner_of(thing)
    return None if owner is None else [owner]


class Place(NamedTuple):
    """Place where a value is found: ``mapping[key]``, in words ``label``."""

    label: str
    mapping: Mapping
    key: Any
    is_users: bool


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
                if key in _MAKERS:
                    is_read = holder.label in self._made
                else:
                    is_read = anything or not holder.is_users or key in self._reads or _is_special(key)
                if is_read:
                    yield Place(f"{key} of {holder.label}", holder.content, key, holder.is_users)

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
                used = [value for key, value in vars(thing).items() if key not in _MAKERS]
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
        try:
            attributes = object.__getattribute__(thing, "__dict__")  # not by what a class makes up
        except AttributeError:
            attributes = None
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
        held = sorted({slot for kind in kinds if is_users for slot in slots(kind)})
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
        self.codes |= {code, *inner_codes(code)}
        global_names, attributes = read_names(code)
        for base, attribute in attributes:
            of_library = base is not None and isinstance(space.get(base), types.ModuleType)
            if not (of_library and is_library(space[base].__name__)):
                self._reads.add(attribute)
        if "globals" in global_names or ("sys", "modules") in attributes:
            global_names |= {name for base, name in attributes if base is None}
        leads: list[tuple[str, Any]] = [(f"module {name}", sys.modules.get(name)) for name in imports(code)]
        for key in global_names & space.keys():
            if is_own:
                leads.append((f"global {key}", space[key]))
            else:
                self.globals[id(space), key] = Place(f"global {key}", space, key, True)
        return leads


def owner_of(thing: object) -> object:
    """Return the owner of a method that is written in C, as ``append`` of a list; None for a function."""
    if not isinstance(thing, types.BuiltinMethodType | types.MethodWrapperType):
        return None
    owner = thing.__self__
    # Functions of a module, and of torch, have it or a class.
    return None if isinstance(owner, types.ModuleType | type) or owner is PYTHONS_GENERATOR else owner


def inner_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of all functions inside a function."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from inner_codes(constant)


def content(cell: types.CellType, default: object = None) -> object:
    """Return what a variable of an enclosing function holds."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return default


@functools.cache
def read_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[tuple[str | None, str]]]:
    """Return names of globals, and of attributes with the global that they may be of, in a function.

    Strings count as attributes where the function looks names up, and names that it makes up as any.
    """
    names: set[str] = set()
    attributes: set[tuple[str | None, str]] = set()
    strings: set[str] = set()
    base, looks_up, makes_up = None, False, False  # looks_up: after getattr, before a string was found
    constant: object = None
    for instruction in dis.get_instructions(code):
        name, kind = instruction.argval, instruction.opname
        if isinstance(name, types.CodeType):
            inner = read_names(name)
            names |= inner[0]
            attributes |= inner[1]
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            names.add(name)
            base = name
            looks_up = looks_up or name == "getattr"
        elif kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "IMPORT_FROM"):
            attributes.add((base, name))
        elif kind not in ("EXTENDED_ARG", "PUSH_NULL", "CACHE"):
            base = None
            if kind == "LOAD_CONST" and isinstance(name, str):
                strings.add(name)
                attributes |= {(None, part) for part in _formatted(name)}
                looks_up = False
            elif kind == "MATCH_CLASS" and isinstance(constant, tuple):
                attributes |= {(None, part) for part in constant}
            elif kind.startswith("CALL"):
                makes_up, looks_up = makes_up or looks_up, False
            elif kind == "BUILD_STRING" and "getattr" in names:
                makes_up = True
        if kind == "LOAD_CONST":
            constant = name
    mentioned = names | {attribute for _, attribute in attributes}
    if mentioned & _LOOKS_UP:
        attributes |= {(None, text) for text in strings}
        if makes_up or mentioned & (_LOOKS_UP - {"getattr", "hasattr"}):
            attributes.add((None, ANY))
    return frozenset(names), frozenset(attributes)


def _formatted(text: str) -> list[str]:
    """Return attributes that ``text.format(...)`` would look up."""
    if "{" not in text or "." not in text:
        return []
    return re.findall(r"\.([A-Za-z_]\w*)", text)


@functools.cache
def written_names(code: types.CodeType) -> frozenset[str]:
    """Return names of attributes that a function sets; :data:`ANY` if it makes them up."""
    names: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
            names.add(instruction.argval)
        elif isinstance(instruction.argval, types.CodeType):
            names |= written_names(instruction.argval)
    if {"setattr", "delattr", "__dict__", "vars", "__setattr__"} & set(code.co_names):
        names |= {text for text in code.co_consts if isinstance(text, str)} | {ANY}
    return frozenset(names)


@functools.cache
def imports(code: types.CodeType) -> frozenset[str]:
    """Return modules that a function imports when it runs."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    inner = (imports(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(found.union(*inner))


def _is_special(key: object) -> bool:
    return isinstance(key, str) and key.startswith("__") and key.endswith("__")


_MAKERS = ("__init__", "__new__", "__post_init__")
_CLASS_INTERNALS = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__builtins__"}
_CLASS_INTERNALS |= {"__static_attributes__", "__firstlineno__", "__annotate__", "__annotations_cache__"}


def slots(kind: type) -> Sequence[str]:
    """Return names of attributes that objects of a class keep elsewhere than in a dict."""
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else names
    return [_mangled(kind, name) for name in names if name not in ("__dict__", "__weakref__")]


def _mangled(kind: type, name: str) -> str:
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if is_private else name


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
