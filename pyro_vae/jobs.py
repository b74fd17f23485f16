"""Long work one after another or several at once, each in a process of its own that ends with the first."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from typing import Protocol, runtime_checkable

from pyro_vae.errors import UserError


@runtime_checkable
class Setting(Protocol):
    """What is to be done, by a name."""

    name: str


@runtime_checkable
class Common(Protocol):
    """What is common to all: among it, how many are done at once."""

    jobs: int


class FailedError(UserError):
    """Some of the work could not be done."""


def run_all(work: Callable[..., str], settings: Sequence[Setting], common: Common) -> None:
    """Call ``work(setting, common, progress)`` for every setting, some at once, and print what it says.

    Raises:
        FailedError: At the end, if some failed; without --jobs the first that fails is the end.
    """
    if common.jobs == 1:
        for number, setting in enumerate(settings, 1):
            print(f"{number} of {len(settings)}: {setting.name}", file=sys.stderr)
            print(work(setting, common, progress=True), flush=True)
        return
    failed = []
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # of the processes to come
    cores = max(1, (os.cpu_count() or 1) // common.jobs)
    with get_context("spawn").Pool(common.jobs, _start_job, (cores,)) as pool:
        jobs = pool.imap_unordered(functools.partial(_attempt, work, common), settings, chunksize=1)
        for number, (setting, said, error) in enumerate(jobs, 1):
            print(f"{number} of {len(settings)}: {said or f'{setting.name} failed: {error}'}", flush=True)
            if error:
                failed.append(setting.name)
        pool.close()
        pool.join()
    if failed:
        raise FailedError(f"{len(failed)} of {len(settings)} failed: {', '.join(failed)}")


def _start_job(cores: int) -> None:
    import torch
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own would be missed when the process is ended
    torch.set_num_threads(cores)


def _end_with_parent() -> None:
    """Nobody would wait for this process, which may have hours to go, if its parent was killed."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _attempt(work: Callable[..., str], common: Common, setting: Setting) -> tuple[Setting, str, str]:
    """The setting, and what its work said or else what went wrong."""
    try:
        return setting, work(setting, common, progress=False), ""
    except UserError as error:
        return setting, "", str(error)
