"""Long work, several pieces at once, each in a process of its own that ends with the one that started it."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pyro_vae.errors import UserError


@runtime_checkable
class Setting(Protocol):
    """A piece of work, by its name."""

    name: str


@runtime_checkable
class Common(Protocol):
    """Settings that are common to all pieces: among them, how many are done at once."""

    jobs: int


class FailedError(UserError):
    """A piece of work that could not be done."""


class Jobs:
    """Processes for several pieces of work at once.

    Args:
        at_once: How many; they share the cores.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.interrupted = False
        self._children: set[Any] = set()
        self._lock = threading.Lock()

    def each(
        self, function: Callable[[Any], Any], todo: Iterable[Any], done: Callable[[Any], object]
    ) -> None:
        """Call ``function`` for everything, so many at once in threads, and ``done`` for each result.

        Interrupted, it ends the processes that :meth:`call` started, and starts no others.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                for future in as_completed([pool.submit(function, item) for item in todo]):
                    done(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    self.interrupted = True
                    for child in self._children:
                        child.terminate()
                raise

    def call(self, work: Callable[..., Any], *arguments: Any, log: Path | None = None) -> Any:
        """Call a function of a module in a process of its own, and return what it returns.

        Args:
            work: The function.
            *arguments: Its arguments.
            log: File for all that it prints.

        Raises:
            FailedError: If it fails, with what it said last.
        """
        cores = max(1, (os.cpu_count() or 1) // self.at_once)
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(cores)}  # of processes to come
        context = get_context("spawn")
        ours, its = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(its, cores, log, work, arguments))
        with self._lock:
            if self.interrupted:
                raise FailedError("interrupted")
            child.start()
            self._children.add(child)
        its.close()
        try:
            result, said = ours.recv()
        except EOFError:
            child.join()
            result, said = None, f"it ended with code {child.exitcode}"
        child.join()
        self._children.discard(child)
        if said:
            raise FailedError(said)
        return result


def _work(
    pipe: Any, cores: int, log: Path | None, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it, by the other
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its locks are removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own would be missed when the process is ended
    torch.set_num_threads(cores)
    result, said = None, ""
    try:
        result = work(*arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    except UserError as error:
        said = str(error)
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    sys.stdout.flush()
    pipe.send((result, said))


def _end_with_parent() -> None:
    """End this process, which may have hours to go, when its parent was killed."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def run_all(work: Callable[..., str], settings: Sequence[Setting], common: Common) -> None:
    """Call ``work(setting, common, progress=...)`` for every setting, some at once, and print what it says.

    Raises:
        FailedError: At the end, if some failed; without --jobs the first that fails is the end.
    """
    if common.jobs == 1:
        for number, setting in enumerate(settings, 1):
            print(f"{number} of {len(settings)}: {setting.name}", file=sys.stderr)
            print(work(setting, common, progress=True), flush=True)
        return
    jobs, failed, finished = Jobs(common.jobs), [], 0

    def attempt(setting: Setting) -> str:
        try:
            return jobs.call(_quietly, work, setting, common)
        except FailedError as error:
            failed.append(setting.name)
            return f"{setting.name} failed: {error}"

    def report(said: str) -> None:
        nonlocal finished
        finished += 1
        print(f"{finished} of {len(settings)}: {said}", flush=True)

    jobs.each(attempt, settings, report)
    if failed:
        raise FailedError(f"{len(failed)} of {len(settings)} failed: {', '.join(failed)}")


def _quietly(work: Callable[..., str], setting: Setting, common: Common) -> str:
    return work(setting, common, progress=False)
