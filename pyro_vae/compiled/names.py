"""Names in code: globals, attributes and modules that a function, or one inside of it, mentions."""

import dis
import functools
import re
import types
from typing import NamedTuple

ANY = "any name"  # which a program makes up while it runs
MAKERS = ("__init__", "__new__", "__post_init__")
_LOOKS_UP = {"getattr", "hasattr", "attrgetter", "vars", "__dict__", "globals", "eval", "exec"}
_SETS = {"setattr", "delattr", "__dict__", "vars", "__setattr__"}


class Names(NamedTuple):
    """Names that a function mentions.

    Attributes:
        codes: Its code, and that of the functions inside of it.
        globals: Names of globals.
        attributes: Names of attributes that it reads, with the global that each may be of. Strings count
            where the function looks names up, and :data:`ANY` stands for names that it makes up.
        written: Names of attributes that it sets; :data:`ANY` if it makes them up.
        imports: Modules that it imports when it runs.
    """

    codes: frozenset[types.CodeType]
    globals: frozenset[str]
    attributes: frozenset[tuple[str | None, str]]
    written: frozenset[str]
    imports: frozenset[str]


@functools.cache
def names_in(code: types.CodeType) -> Names:
    """Return the names that a function mentions."""
    found = _, names, attributes, written, imports = {code}, set(), set(), set(), set()
    strings: set[str] = set()
    base, looks_up, makes_up = None, False, False  # looks_up: after getattr, before a string was found
    constant: object = None
    for instruction in dis.get_instructions(code):
        name, kind = instruction.argval, instruction.opname
        if isinstance(name, types.CodeType):
            for own, inner in zip(found, names_in(name), strict=True):
                own |= inner
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
            elif kind in ("STORE_ATTR", "DELETE_ATTR"):
                written.add(name)
            elif kind == "IMPORT_NAME":
                imports.add(name)
        if kind == "LOAD_CONST":
            constant = name
    mentioned = names | {attribute for _, attribute in attributes}
    if mentioned & _LOOKS_UP:
        attributes |= {(None, text) for text in strings}
        if makes_up or mentioned & (_LOOKS_UP - {"getattr", "hasattr"}):
            attributes.add((None, ANY))
    if not _SETS.isdisjoint(code.co_names):
        written |= {text for text in code.co_consts if isinstance(text, str)} | {ANY}
    return Names(*map(frozenset, found))


def _formatted(text: str) -> list[str]:
    """Return attributes that ``text.format(...)`` would look up."""
    if "{" not in text or "." not in text:
        return []
    return re.findall(r"\.([A-Za-z_]\w*)", text)
