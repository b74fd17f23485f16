"""Files that are whole or not there, whatever happens while they are written, and locks of processes."""

import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from pyro_vae.errors import UserError


class WriteError(UserError):
    """A file could not be written, as when the disk is full; what was there before is kept."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path} ({error.strerror}); what was there before is kept. Make room, or give a "
            "folder that can be written, and go on"
        )


class InUseError(UserError):
    """Another process works on the same files."""


def write_atomically(content: bytes, path: Path) -> None:
    """Write a file so that it is the old or the new one, whole.

    Raises:
        WriteError: If it cannot be written; the old file is kept.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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


# ------------------------------------------------------------------------------------------- locks

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def locked(path: Path, what: object, seconds: float = 5.0) -> Iterator[None]:
    """Hold a lock, the file ``path``, which others wait for; this thread may take it again.

    The system frees it when the process ends, however it ends: a file that was left behind locks nothing.

    Args:
        path: File that is there only while it is held; its folder is made if need be.
        what: Name of what is locked, for the message.
        seconds: Time to wait for it. A process that was killed may take a moment to end.

    Raises:
        InUseError: If another process still holds it then, naming that.
        WriteError: If the file cannot be made.
    """
    path = Path(os.path.abspath(path))
    holder = path.with_name(f"{path.name}.holder")
    lock = filelock.FileLock(path, is_singleton=True)
    is_first = not lock.is_locked
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        raise InUseError(
            f"{what} is in use by {_described(holder)}: wait until that has ended, or end it"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise WriteError(path, error) from error
        print(f"warning: there are no locks here ({error}): start nothing twice", file=sys.stderr)
    try:
        if is_first:
            with contextlib.suppress(OSError):  # a full disk: only the message is less kind
                holder.write_text(json.dumps(_myself()))
        yield
    finally:
        if is_first:
            for file in holder, path:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    file.unlink()
        lock.release()


def _myself() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv),
    }


def _described(holder: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        return "process {pid} on {host} since {since} ({command})".format(**json.loads(holder.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name
        return "another process"
