"""Things that programs hold: which kinds there are, what they are made of, when two are the same."""

import array
import ctypes
import functools
import inspect
import mmap
import reprlib
import types
import weakref

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_vae.compiled.owners import is_in
from pyro_vae.compiled.private import PYTHONS_GENERATOR

MISSING = object()
PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device)
BUFFERS = (bytearray, memoryview, array.array, mmap.mmap, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
BARE_BASES = {object, nn.Module, PyroModule}
# Objects of these are worlds of their own, which no program of Pyro is about; what compiles others is, too.
_CLOSED = {"_pytest", "pytest", "IPython", "ipykernel", "nicegui", "asyncio", "threading", "logging", "tqdm"}
_CLOSED |= {"concurrent", "multiprocessing", "matplotlib", "optuna", "_abc", "_io", "unittest", "pluggy"}
_CLOSED |= {__package__}


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


def owner_of(thing: object) -> object:
    """Return the owner of a method that is written in C, as ``append`` of a list; None for a function."""
    if not isinstance(thing, types.BuiltinMethodType | types.MethodWrapperType):
        return None
    owner = thing.__self__
    # Functions of a module, and of torch, have it or a class.
    return None if isinstance(owner, types.ModuleType | type) or owner is PYTHONS_GENERATOR else owner


def content(cell: types.CellType, default: object = None) -> object:
    """Return what a variable of an enclosing function holds."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return default


def attributes_of(thing: object) -> dict | None:
    """Return the dict of an object's attributes, not what its class makes up; None if it has none."""
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None


def slots(kind: type) -> list[str]:
    """Return names of attributes that objects of a class keep elsewhere than in a dict."""
    found = set()
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            found.add(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return sorted(found - {"__dict__", "__weakref__"})


def same(now: object, then: object) -> bool:
    """Return True if two values are one, or plain and equal."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, tuple | frozenset):
        return len(now) == len(then) and all(map(same, now, then))
    if isinstance(now, types.MethodType):
        return now.__func__ is then.__func__ and now.__self__ is then.__self__
    return isinstance(now, PLAIN) and bool(now == then or (now != now and then != then))


def words(value: object) -> str:
    """Return a value as it stands in a message."""
    return "nothing" if value is MISSING else reprlib.repr(value).replace("\n", " ")
