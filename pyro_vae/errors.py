"""Errors whose message is all that a user needs: scripts print it without a stack trace."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    def __init__(self, *args: object) -> None:
        # Pyro raises errors of a program again with a table of shapes behind the message.
        super().__init__(*(a.split("\nTrace Shapes:")[0].strip() if isinstance(a, str) else a for a in args))


class NetworkError(UserError, ValueError, RuntimeError):
    """A network that does not fit what it is given, or what is made of its outputs."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which of the known names was probably meant; nothing if none is near."""
    found = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is no ``kind``, which one was probably meant, and which there are."""
    known = sorted(known)
    return f"there is no {kind} {name!r}.{nearest(name, known)} There are: {', '.join(known)}"
