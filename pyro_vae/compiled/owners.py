"""Whose code it is: what the user wrote is watched, what a library does is its own affair.

A library is what is installed: the standard library, what a registered distribution requires, and packages
with compiled code. All else is the user's: what requires torch or Pyro, for programs may be written there;
what lies in a folder or a notebook or is installed as editable; a package of the user's own, wherever it is;
and what is unknown. Whoever has code that stands around programs, or that programs are made of and nobody
changes, registers it here.
"""

import functools
import importlib.machinery
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
_registered = {"torch", "pyro-ppl"}
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


def register_requirements(distribution: str) -> None:
    """Declare what a distribution requires, with its extras and what they require, to be libraries."""
    _registered.add(distribution)
    forget()


def _register(kind: set[str], modules: Iterable[str]) -> None:
    kind.update(modules)
    forget()


def forget() -> None:
    """Ask anew for every module whose it is."""
    for known in is_discreet, is_library, is_registered, is_fixed, _is_installed, _required:
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
    return package in sys.stdlib_module_names or _is_known(package)


def _is_known(package: str) -> bool:
    """Return True if all a package is of is required by a registered distribution, or holds compiled code."""
    names = [package]
    if _requirements(package) is None:
        names = importlib.metadata.packages_distributions().get(package, [])  # takes 0.3 s
    return bool(names) and all(
        not any(map(_BUILDS_ON_TORCH.match, _requirements(name) or []))
        and (_plain(name) in _required() or _is_compiled(name))
        for name in names
    )


def _is_compiled(distribution: str) -> bool:
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return any(file.name.endswith(suffixes) for file in importlib.metadata.files(distribution) or ())


@functools.cache
def _required() -> set[str]:
    """Return the names of all distributions that the registered ones require, directly or not."""
    found, todo = set(), list(_registered)
    while todo:
        for line in _requirements(todo.pop()) or ():
            name = _plain(re.match(r"[\w.-]+", line)[0])
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


def _requirements(distribution: str) -> list[str] | None:
    """Return what a distribution requires; None if it is not installed."""
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(distribution: str) -> str:
    """Return a name as PyPA's specification compares them."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
