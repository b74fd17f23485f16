"""Annotations are checked by beartype in the first calls of every function in a test, and in no others.

Checks of all calls take twice the time of all else in loops of thousands. So does the making of checks for a
function that is defined inside of another, whenever that runs.
"""

import collections
import functools
import sys

import jaxtyping
from jaxtyping import _decorator  # private, as in 0.3.11: where a call asks whether it is to be checked

__name__ = "jaxtyping"  # the compiler looks for state of programs, such as these counts, in no library

FIRST = 20
calls = collections.Counter()


class _Settings:
    @property
    def jaxtyping_disable(self):
        code = sys._getframe(1).f_locals["fn"].__code__
        calls[code] += 1
        return calls[code] > FIRST

    def __getattr__(self, name):
        return getattr(jaxtyping.config, name)


def _jaxtyped(fn=None, *, typechecker):
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        calls[fn.__module__, fn.__qualname__] += 1
        if calls[fn.__module__, fn.__qualname__] > FIRST:
            return fn
    return _decorator.jaxtyped(fn, typechecker=typechecker)


def check(rooms):
    """Check the annotations of these modules of the package, as they are imported."""
    jaxtyping.install_import_hook([f"pyro_vae.{room}" for room in rooms], "beartype.beartype")
    jaxtyping.jaxtyped, _decorator.config = _jaxtyped, _Settings()
