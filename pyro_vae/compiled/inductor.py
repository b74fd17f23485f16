"""Graphs compiled by torch's Inductor, whatever state its cache on disk is in.

Inductor keeps sources and shared objects under names that say what they were made of, and takes what it
finds there unread: a shared object that was cut short, as when a machine or a compiler was killed, ends the
process at its first use (SIGBUS), and a changed source computes something else. So graphs of equal inputs
have a folder of their own within the cache, with a *seal*: the digests of all files, written once a graph has
been compiled and loaded. A folder that is not as its seal says is deleted, and the graph is compiled anew. A
lock lets one process at a time into the folder.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiled.state import CaptureError

_LOCK_SECONDS = 600.0
_ONE_AT_A_TIME = threading.Lock()  # Inductor finds its cache by an environment variable
_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO),
)
# The last two are words of the compiler and of Python.
_UNWRITABLE = [*map(os.strerror, _ERRORS), "File size limit exceeded", "No usable temporary directory"]


def check_cache_folder() -> None:
    """Find out whether there is a cache folder, which parts of torch make that run before Inductor does.

    Raises:
        CaptureError: If it cannot be made.
    """
    try:
        if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CaptureError(
            f"torch cannot make its cache folder {folder} ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR to "
            "a folder that can be written"
        ) from error


def compile_graph(
    module: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """Return the graph as a function that Inductor compiled for such inputs.

    Args:
        module: The graph.
        inputs: Tensors such as it will be called with.
        options: Settings of ``torch._inductor.config``.

    Raises:
        CaptureError: If it cannot be compiled; says why, and which setting to change.
    """
    try:
        with _ONE_AT_A_TIME, _without_word_of_cuda(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of modules of torch among themselves
            # On GPUs files are read at the first launches, too. They are Triton's, which replaces them whole.
            is_on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
            with _own_folder(inputs) if is_on_cpu else contextlib.nullcontext():
                return _compile(module, inputs, options)
    except Exception as error:
        raise CaptureError(f"torch's Inductor could not compile its graph {_reason(error)}") from error


def _compile(module: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> Callable:
    # Private, as of torch 2.14: the public torch.compile traces Python anew and would not take a graph.
    import torch._inductor
    from torch._guards import TracingContext, tracing
    from torch._inductor import codecache
    from torch._inductor.exc import CppCompileError
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor's cache of whole graphs is used only with an environment of shapes, which stays empty.
    fake = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [fake.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    with tracing(TracingContext(fake)):
        try:
            return torch._inductor.compile(module, fakes, options=options)
        except Exception as error:
            if not any(isinstance(e, CppCompileError | OSError) for e in _causes(error)):
                raise
            # Headers are kept elsewhere, for all graphs: if it goes without them, then they are damaged.
            without = {**options, "cpp_cache_precompile_headers": False}
            compiled = torch._inductor.compile(module, fakes, options=without)
            shutil.rmtree(codecache._HEADER_DIR, ignore_errors=True)
            return compiled


@contextlib.contextmanager
def _own_folder(inputs: list[Tensor]) -> Iterator[None]:
    """Let Inductor keep its files in a folder for such inputs, which is empty or as it was sealed."""
    import filelock
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # private, as in torch 2.14

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # Not of the graph itself: which library computes a product may change from run to run, and little else.
    made_for = [torch.__version__, "fixed shapes", *((tuple(t.shape), t.stride(), t.dtype) for t in inputs)]
    root = Path(cache_dir(), "compiled_programs")
    folder = root / hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]
    lock, seal = folder.with_suffix(".lock"), folder.with_suffix(".json")
    root.mkdir(exist_ok=True)
    if lock.is_dir():
        _remove(lock)
    try:
        with filelock.FileLock(lock, timeout=_LOCK_SECONDS):
            if not _is_sealed(folder, seal):
                _remove(folder)
            _remove(seal)  # until all is done again
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
            yield
            _write_seal(folder, seal)
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _is_sealed(folder: Path, seal: Path) -> bool:
    try:
        return seal.is_file() and json.loads(seal.read_bytes()) == _digests(folder)
    except (OSError, ValueError):
        return False


def _write_seal(folder: Path, seal: Path) -> None:
    unfinished = seal.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(_digests(folder)))
    unfinished.replace(seal)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_word_of_cuda() -> Iterator[None]:
    """Drop what torch says at the first use of a compiler: that there are headers of CUDA and no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")

    def is_else(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No CUDA runtime is found")

    logger.addFilter(is_else)
    try:
        yield
    finally:
        logger.removeFilter(is_else)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """Return what went wrong in one line, and what to do."""
    lines = [line.strip() for e in _causes(error) for line in f"{type(e).__name__}: {e}".splitlines()]
    if any("InvalidCxxCompiler" in line for line in lines):
        return f"({lines[0]}); install g++ or clang++"
    if unwritable := next((line for line in lines if any(word in line for word in _UNWRITABLE)), None):
        return (
            f"({unwritable}): set TORCHINDUCTOR_CACHE_DIR{_now('TORCHINDUCTOR_CACHE_DIR')} and, for the "
            f"compiler, TMPDIR{_now('TMPDIR')} to folders that can be written and have space left"
        )
    return f"({next((line for line in lines if 'error: ' in line), lines[0])})"


def _now(variable: str) -> str:
    return f" (now {os.environ[variable]})" if variable in os.environ else ""


def _keep_here_only() -> None:
    """Let torch, which makes its cache folder with the first optimiser, have one elsewhere if it cannot."""
    try:
        check_cache_folder()
    except CaptureError as error:
        other = tempfile.mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, other, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = other
        warnings.warn(f"{error}; what is compiled is kept for this process only", stacklevel=2)


_keep_here_only()
