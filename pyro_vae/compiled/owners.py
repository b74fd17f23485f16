"""Whose code it is: what the user wrote is watched, what a library does is its own affair.

A library is what is installed: the standard library, and packages among the installed ones. Packages that
require torch or Pyro are none, for programs may be written there; nor is what is installed as editable, lies
in a folder or a notebook, or is unknown. Whoever has code that stands around programs, or that programs are
made of and nobody changes, registers it here.
"""

import functools
import importlib.metadata
import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# What programs are built on, wherever it is installed.
_FOUNDATION = ("torch", "torchvision", "pyro", "jaxtyping", "beartype", "funsor", "opt_einsum")
_around = {__package__}
_fixed: set[str] = set()
_PLACES = {*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
_PLACES |= {*site.getsitepackages(), site.getusersitepackages()}
_BUILDS_ON_TORCH = re.compile(r"(torch|pyro[-_]ppl)\b(?!.*\bextra\b)")


def register_library(*modules: str) -> None:
    """Declare modules, and what is inside of them, to stand around programs, as an optimiser does.

    Their code is not followed, and what their objects keep from run to run is of no concern, unless the
    user's code names it.
    """
    _register(_around, modules)


def register_programs(*modules: str) -> None:
    """Declare modules, and what is inside of them, to be what programs are made of and nobody changes.

    Their code is followed to what it reads, but is not compared itself at every call.
    """
    _register(_fixed, modules)


def _register(kind: set[str], modules: Iterable[str]) -> None:
    kind.update(modules)
    for known in is_discreet, is_library, is_registered, is_fixed:
        known.cache_clear()


@functools.cache
def is_discreet(module: str | None) -> bool:
    """Return True if what objects of this module keep is of no concern, unless the user's code names it."""
    return is_in(module, (*_around, *_FOUNDATION))


@functools.cache
def is_library(module: str | None) -> bool:
    """Return True if the code of this module is not followed: it is no part of a program."""
    return bool(module) and (is_discreet(module) or _is_installed(module.partition(".")[0]))


@functools.cache
def is_registered(module: str | None) -> bool:
    """Return True if somebody registered it, as a library or as what programs are made of."""
    return is_in(module, (*_around, *_fixed))


@functools.cache
def is_fixed(module: str | None) -> bool:
    """Return True if the code of this module is followed, but nobody changes it."""
    return is_in(module, _fixed) and not is_in(module, _around)


def is_users(module: str | None) -> bool:
    """Return True if the code of this module is watched: it is neither a library's nor fixed."""
    return not is_library(module) and not is_registered(module)


def is_in(module: str | None, packages: Iterable[str]) -> bool:
    """Return True if a module is one of these, or inside of one."""
    return bool(module) and any(module == one or module.startswith(f"{one}.") for one in packages)


@functools.cache
def _is_installed(package: str) -> bool:
    module = sys.modules.get(package)
    file = next(iter(getattr(module, "__path__", ())), None) or getattr(module, "__file__", None)
    if file is None or package == "__main__":  # whose file may be that of pytest or of a notebook's kernel
        return package in sys.stdlib_module_names
    if not any(Path(file).is_relative_to(place) for place in _PLACES):
        return False
    return package in sys.stdlib_module_names or not any(map(_BUILDS_ON_TORCH.match, _required_by(package)))


def _required_by(package: str) -> list[str]:
    """Return what a package requires; by its own name, or else by all that are installed (which takes 0.3 s).

    One that nobody knows could require anything.
    """
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        found = importlib.metadata.packages_distributions().get(package, [])
        required = [line for name in found for line in importlib.metadata.requires(name) or []]
        return required if found else ["torch"]
