"""Files that are whole or not there, whatever happens while they are written."""

import os
from pathlib import Path

from pyro_vae.errors import UserError


class WriteError(UserError):
    """A file could not be written, as when the disk is full; what was there before is kept."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path} ({error.strerror}); what was there before is kept. Make room, or give a "
            "folder that can be written, and go on"
        )


def write_atomically(content: bytes, path: Path) -> None:
    """Write a file so that it is the old or the new one, whole.

    Raises:
        WriteError: If it cannot be written; the old file is kept.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error


def append_line(line: str, path: Path) -> None:
    """Add a line to a text file; it is on the disk when this returns.

    Raises:
        WriteError: If it cannot be written; part of the line may be there.
    """
    try:
        with path.open("a") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise WriteError(path, error) from error
