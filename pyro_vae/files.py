"""Files that are whole or not there, whatever happens while they are written, and locks of processes."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pyro_vae.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


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

_held: dict[tuple[Path, int], int] = {}  # by threads of this process: how often


@contextlib.contextmanager
def locked(path: Path, what: object, seconds: float = 5.0) -> Iterator[None]:
    """Hold a lock, the file ``path``, which others wait for; this thread may take it again.

    The system frees it when the process ends, however it ends: a file that was left behind locks nothing.

    Args:
        path: Of the file, there only while it is held; its folder is made if need be.
        what: Is locked, for the message.
        seconds: To wait for it. Who was killed may take a moment to end.

    Raises:
        InUseError: If another process still holds it then, naming that.
        WriteError: If the file cannot be made.
    """
    path = Path(os.path.abspath(path))
    key = path, threading.get_ident()
    descriptor = None if key in _held else _acquired(path, what, seconds)
    _held[key] = _held.get(key, 0) + 1
    try:
        yield
    finally:
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
        if descriptor is not None:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()
            os.close(descriptor)


def _acquired(path: Path, what: object, seconds: float) -> int:
    """A descriptor of the locked file."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise WriteError(path, error) from error
        if _lock(descriptor):
            with contextlib.suppress(OSError):
                # Who held it may have removed the file between our opening and locking it.
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, json.dumps(_myself()).encode())
                    return descriptor
        elif time.monotonic() > deadline:
            holder = os.read(descriptor, 10_000).decode(errors="replace")
            os.close(descriptor)
            raise InUseError(
                f"{what} is in use by {_described(holder)}: wait until that has ended, or end it"
            )
        os.close(descriptor)
        time.sleep(0.05)


def _lock(descriptor: int) -> bool:
    """Whether the file could be locked, or its file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # behind what others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        return False
    except OSError as error:
        print(f"warning: there are no locks here ({error.strerror}): start nothing twice", file=sys.stderr)
    return True


def _myself() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv),
    }


def _described(holder: str) -> str:
    """Who holds a lock, in words."""
    try:
        return "process {pid} on {host} since {since} ({command})".format(**json.loads(holder))
    except (ValueError, KeyError, TypeError):  # it is just writing its name
        return "another process"
