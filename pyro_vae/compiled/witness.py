"""Deeds of a program beside torch while it runs: who calls what, seen by the interpreter's own profiler.

A file that is written, a clock, a seed leave no trace in what a program holds. They are calls, and calls are
seen, with the line of the user's code that made them.
"""

import datetime
import gc
import io
import sys
import types
from contextvars import ContextVar
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.compiled.owners import is_discreet, is_registered, is_users
from pyro_vae.compiled.private import PYTHONS_GENERATOR

# Libraries whose own files, clocks and streams are their business; what they are called with is not.
_QUIET = {"numpy", "scipy", "_pytest"}  # and all that is discreet or registered
_PASSING = {"importlib", "warnings", "linecache"}  # what happens once
_FRAMES = {"pandas", "polars", "xarray", "pyarrow", "sklearn"}
_SYSTEM = {"posix", "nt", "_socket", "socket", "_posixsubprocess", "select"}
_HARMLESS = {"fspath", "fsdecode", "fsencode"}
_STREAMS = {"write", "writelines", "read", "readline", "readlines", "readinto", "seek", "truncate", "flush"}
_FILES = {"load", "loadtxt", "genfromtxt", "fromfile", "save", "savez", "savetxt", "tofile"}
_SEEDS = {"manual_seed", "set_state", "seed"}


class Witness:
    """Context in which a program runs.

    Args:
        known: Code that need not be noted.

    Attributes:
        said: Deed of it that a graph would not do, and where; None if nothing.
        ran: Other code of the user's that ran, with its global names.
        held: What that code found in its arguments and in enclosing functions.
    """

    def __init__(self, known: set[types.CodeType]) -> None:
        self.said: str | None = None
        self.ran: list[tuple[types.CodeType, dict]] = []
        self.held: list[object] = []
        self._known = set(known)

    def __enter__(self) -> "Witness":
        self._is_watching = sys.getprofile() is None  # not beside another profiler
        self._collects = gc.isenabled()
        gc.disable()  # what it calls whenever it collects, for whomever, is not the program's
        if self._is_watching:
            sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_watching:
            sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _note(self, frame: types.FrameType, event: str, function: Any) -> None:
        if event == "call":
            self._note_call(frame)
        elif event == "c_call" and self.said is None:
            self._note_builtin(frame, function)

    def _note_call(self, frame: types.FrameType) -> None:
        code, space = frame.f_code, frame.f_globals
        if code in self._known:
            return
        name = space.get("__name__") or ""
        root = name.split(".")[0]
        if root == "os" and code.co_qualname in ("_Environ.__getitem__", "_Environ.__contains__", "getenv"):
            self._say("reads the environment", frame.f_back)
        elif root in _FRAMES:
            if frame.f_back is not None and _is_users(frame.f_back):
                self._say(f"reads a table of {root}", frame.f_back)
        elif name != "pyro.params.param_store":
            self._known.add(code)
            if _is_users(frame) and not code.co_filename.startswith("<"):
                self.ran.append((code, space))
                self.held += [value for value in frame.f_locals.values() if not _is_passing(value)]
        elif frame.f_back is not None and _is_users(frame.f_back):
            self._say("reads Pyro's parameter store itself, not by pyro.param", frame.f_back)

    def _note_builtin(self, frame: types.FrameType, function: Any) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        home = getattr(function, "__module__", None) or (
            owner.__name__ if isinstance(owner, types.ModuleType) else ""
        )
        if name in ("print", "open", "input") and home in ("builtins", "io", "_io"):
            self._say("prints" if name == "print" else f"calls {name}", frame)
        elif name in _STREAMS and isinstance(owner, io.IOBase | type(sys.__stdout__)):
            self._say(f"has a stream {name}", frame)
        elif home == "time" or (isinstance(owner, type) and issubclass(owner, datetime.date)):
            self._say("looks at the time", frame)
        elif home in _SYSTEM and name not in _HARMLESS:
            self._say(f"asks the system ({name})", frame)
        elif isinstance(owner, ContextVar):
            if _is_users(frame):
                self._say("reads or sets a context variable", frame)
        elif name in _SEEDS and isinstance(owner, torch.Generator):
            self._say("seeds the random generator", frame, through=("torch", "pyro"))
        elif owner is PYTHONS_GENERATOR:
            self._say("draws from Python's random generator", frame)

    def _say(self, what: str, frame: types.FrameType | None, through: tuple[str, ...] = ()) -> None:
        """Note that the user's code does something, if it is the user's."""
        is_theirs = False
        while frame is not None:
            home = frame.f_globals.get("__name__") or ""
            root, file = home.split(".")[0], frame.f_code.co_filename
            if root in _PASSING or file.startswith(("<frozen importlib", "<@beartype")):
                return
            if _is_users(frame):
                if not is_theirs:
                    self.said = self.said or f"it {what} at {file}:{frame.f_lineno}"
                return
            if frame.f_code.co_name in _FILES:  # of these libraries, what users give files to
                is_theirs = False
            elif root not in through and (root in _QUIET or is_discreet(home) or is_registered(home)):
                is_theirs = True
            frame = frame.f_back


def _is_passing(value: object) -> bool:
    """Return True if it is made anew in every run: a tensor, a message of Pyro's, or a trace."""
    is_message = isinstance(value, dict) and {"cond_indep_stack", "fn"} <= value.keys()
    return is_message or isinstance(value, Tensor | Trace)


def _is_users(frame: types.FrameType) -> bool:
    return is_users(frame.f_globals.get("__name__"))
