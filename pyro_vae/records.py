"""Records of a run, checked in one place: what is read is what was written.

A file is damaged if it cannot be parsed, has not the types of what is written, or does not fit its checksum.
The last is what finds a changed digit. Files of versions that wrote no checksum are read without it.
"""

import functools
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.errors import UserError, unknown
from pyro_vae.files import write_atomically

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

CHECKSUM = "file_checksum"  # of all the rest of a file
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}  # ``__pydantic_config__`` of dataclasses


# ------------------------------------------------------------------------------------------- JSON


def checksum(value: object) -> str:
    """Return a digest of plain values and tensors, nested in mappings and lists."""
    digest = hashlib.sha256()
    _take_in(value, digest)
    return digest.hexdigest()[:16]


def _take_in(value: object, digest: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(f"{len(value)} by name".encode())
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _take_in(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} in order".encode())
        for item in value:
            _take_in(item, digest)
    elif hasattr(value, "untyped_storage"):  # a tensor; this module is imported without torch
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        import torch

        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())


def write_json(
    record: dict[str, Any], path: Path, *, in_parts: bool = False, indent: int | None = None
) -> None:
    """Write plain values with their checksum, beside them or ``in_parts``, in each of them; atomically."""
    record = json.loads(json.dumps(record))
    written = {CHECKSUM: checksum(record)}
    # First, so that its line can be removed by who edits the file: after the last there is no comma.
    record = {name: written | part for name, part in record.items()} if in_parts else written | record
    write_atomically(json.dumps(record, indent=indent).encode(), path)


def _check_sum(record: object) -> None:
    """Raise ``ValueError`` if plain values that were read have a checksum, which is not theirs."""
    if not isinstance(record, dict):
        return
    written = [record.pop(CHECKSUM)] if CHECKSUM in record else []
    written += [part.pop(CHECKSUM) for part in record.values() if isinstance(part, dict) and CHECKSUM in part]
    if written and any(found != checksum(record) for found in written):
        raise ValueError("its checksum differs: it was changed after it was written")


def read_json(path: Path, kind: Any, error: type[UserError], advice: str) -> Any:
    """A JSON file as a value of this type.

    Args:
        path: File.
        kind: Type of its content: a dataclass with ``STRICT``, or a type of such.
        error: Class of the error that is raised.
        advice: Way out, for its message.

    Raises:
        FileNotFoundError: If there is none.
        error: If it cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
        if not path.is_file():
            raise OSError("it is no file")
        return parse(content, kind)
    except FileNotFoundError:
        raise
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror or reason}): {advice}") from None
    except ValueError as reason:
        raise error(f"{path} is damaged ({reason}): {advice}") from None


def parse(content: bytes | str, kind: Any) -> Any:
    """JSON as a value of a type; raises ``ValueError``, in one line, if it is none."""
    from pydantic import ValidationError

    try:
        text = content.decode() if isinstance(content, bytes) else content
        record = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
        value = _adapter(kind).validate_json(text)
        _check_sum(record)
        return value
    except UnicodeDecodeError as reason:
        raise ValueError(f"byte {reason.start} is no UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as reason:
        raise ValueError(in_words(reason, kind)) from None


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def in_words(reason: "ValidationError", kind: Any = None) -> str:
    """The first thing that is wrong."""
    found = reason.errors()[0]
    if isinstance(raised := found.get("ctx", {}).get("error"), Exception):  # by a class of ours
        return str(raised)
    *place, name = found["loc"] or ("it",)
    where = ".".join(map(str, [*place, name]))
    if found["type"] == "unexpected_keyword_argument":
        known = getattr(kind, "__dataclass_fields__", {})
        return unknown("setting", name, known) if not place and known else f"{where} is unknown"
    if found["type"].startswith("missing"):
        return f"{where} is missing"
    shown = repr(found["input"])
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    return f"{where} cannot be {shown}: {found['msg'][:1].lower()}{found['msg'][1:]}"


# ------------------------------------------------------------------------------------------- tensors


def save_tensors(record: Mapping[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings, lists and dictionaries of these, with a checksum, atomically."""
    import torch

    buffer = io.BytesIO()
    torch.save({**record, CHECKSUM: checksum(record)}, buffer)
    write_atomically(buffer.getvalue(), path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a record of :func:`save_tensors`, on the CPU; nothing is executed. Empty if it is no record.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it holds something else, in one line.
    """
    import torch

    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises whatever the content leads it to
        raise ValueError(f"it may be truncated or another kind of file ({type(error).__name__})") from None
    if not isinstance(record, dict):
        return {}
    written = record.pop(CHECKSUM, None)
    try:
        unchanged = written in (None, checksum(record))
    except Exception as error:  # of tensors that are none
        raise ValueError(f"it holds rubbish ({type(error).__name__})") from None
    if not unchanged:
        raise ValueError("its checksum differs: it was changed after it was written")
    return record


def misfit(found: object, expected: object, where: str, *, exact: bool = True) -> str | None:
    """The first place, in words, where something has not the form of what is expected; None if there is none.

    Args:
        found: Tensors and plain values, nested in mappings and lists.
        expected: Values of the right form, nested in the same way.
        where: Name for them, for the message.
        exact: Names and lengths must be the same; otherwise only what is in both must fit, and None stands
            for anything.
    """
    if hasattr(expected, "materialize") or (not exact and (expected is None or found is None)):
        return None  # a lazy parameter may have any shape
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{where} is a {type(found).__name__}, not a dictionary"
        if exact and (lacking := [name for name in expected if name not in found]):
            return f"{where}.{lacking[0]} is missing"
        if exact and (more := [name for name in found if name not in expected]):
            return f"{where}.{more[0]} is not part of it"
        places = [(name, found[name], expected[name]) for name in expected if name in found]
    elif isinstance(expected, list | tuple):
        if type(found) is not type(expected) or (exact and len(found) != len(expected)):
            return f"{where} is {_form(found)}, not {_form(expected)}"
        places = [(number, *pair) for number, pair in enumerate(zip(found, expected, strict=False))]
    else:
        numbers = (int, float)
        loosely = not exact and type(found) in numbers and type(expected) in numbers
        fits = loosely or _form(found) == _form(expected)
        return None if fits else f"{where} is {_form(found)}, not {_form(expected)}"
    problems = (misfit(a, b, f"{where}.{name}", exact=exact) for name, a, b in places)
    return next(filter(None, problems), None)


def _form(value: object) -> str:
    if hasattr(value, "untyped_storage"):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"
