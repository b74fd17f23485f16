"""Data in blocks: bounded memory, progress, and long work that can be interrupted and resumed."""

import abc
import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae import records
from pyro_vae.errors import UserError
from pyro_vae.progress import progress_bar
from pyro_vae.traces import Program, modules_of, takes_samples, unmoved
from pyro_vae.traces.masks import check_masked
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import SUBSAMPLED, sample_sites

Batch = tuple[Tensor, ...]
Advance = Callable[[int], None]  # says how many units of work are done
PerDatum = dict[str, Tensor]  # numbers of every datum, by name, on the CPU, first axis the data


class ResumeError(UserError):
    """Unfinished work in a file that does not belong to what is asked for."""


def check_sizes(batch: Batch) -> int:
    """Number of data.

    Raises:
        TypeError: If an argument is no tensor with a first axis.
        ValueError: For arguments of several lengths, or without rows.
    """
    for number, argument in enumerate(batch):
        if not isinstance(argument, Tensor) or argument.dim() == 0:
            found = "a single number" if isinstance(argument, Tensor) else f"a {type(argument).__name__}"
            raise TypeError(
                f"argument {number} of the programs is {found}, but must be a tensor with one row a datum; "
                "torch.as_tensor makes one of arrays and lists"
            )
    lengths = {len(argument) for argument in batch}
    if len(lengths) > 1:
        raise ValueError(f"the programs' arguments must have one length, not {sorted(lengths)}")
    if not lengths or lengths == {0}:
        raise ValueError("there are no data: the arguments of the programs have no rows")
    return lengths.pop()


def rows_at_once(model: Program, batch: Batch) -> int:
    """Rows (samples times data) to score at once: a CPU is fastest while they fit its cache."""
    most, numbers = (4096, 2**22) if batch[0].device.type == "cpu" else (2**18, 2**27)
    return max(1, min(most, numbers // max(1, batch[0][0].numel(), _largest_row(model, batch))))


def _largest_row(model: Program, batch: Batch) -> int:
    """Numbers that a datum more adds to the largest tensor that the program makes."""
    sizes = []
    with unmoved(model), torch.random.fork_rng(), torch.no_grad():
        takes_samples(model, batch)  # finds out before sizes are noted
        for rows in ([0], [0, 0]):
            with _SizesOfResults() as results:
                trace_of(model, tuple(argument[rows] for argument in batch), 1)
            sizes.append(results.sizes)
    return max((two - one for one, two in zip(*sizes, strict=False)), default=0)


class _SizesOfResults(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.sizes.append(result.numel())
        return result


def block_size(model: Program, batch: Batch, num_chains: int) -> int:
    """Data whose chains fit one evaluation; few, so that an interruption loses little."""
    return max(1, rows_at_once(model, batch) // 4 // num_chains)


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in blocks of ``size`` data."""
    return list(zip(*(argument.split(size) for argument in batch), strict=True))


@contextlib.contextmanager
def evaluation(*programs: Program | None) -> Iterator[None]:
    """Neither gradients nor dropout; leaves modes and buffers of the programs as they were."""
    with unmoved(*programs), torch.inference_mode(False), torch.no_grad():
        yield


def checksum(*tensors: Tensor) -> str:
    """Digest that tells whether two estimates are of the same data."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def programs_checksum(*programs: Program) -> str:
    """Digest of all parameters and buffers that the programs can reach, and of Pyro's parameter store."""
    tensors = [t for module in modules_of(*programs) for t in module.state_dict().values()]
    stored = [pyro.get_param_store()[name] for name in sorted(pyro.get_param_store())]
    return checksum(*(t for t in tensors if isinstance(t, Tensor)), *stored)


def _behaviour(programs: tuple[Program, ...], block: Batch) -> Tensor:
    """Numbers that differ where the programs do: what they draw from one seed, and its log-density."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):  # data may be impossible at these latents
        torch.manual_seed(0)
        sites = [site for p in programs for _, site in sample_sites(trace_of(p, block, 1))]
    return behaviour_of(sites)


def behaviour_of(sites: list[dict]) -> Tensor:
    """Sums of values and log-densities of sites: finite numbers, whatever is missing or impossible."""
    numbers = []
    for site in sites:
        log_prob = site["fn"].log_prob(site["value"])
        numbers += [site["value"].double().nansum(), log_prob.double().sum()]
    return torch.stack(numbers).cpu().nan_to_num()


class Work(abc.ABC):
    """Work on data that is done one block after the other.

    Attributes:
        name: For the progress bar.
        programs: Whose parameters the result depends on, first the model.
        size: Data in a block.
        settings: All else that the result depends on.
        amount: Units of work for a datum.
        unit: Unit of work.
    """

    name: str
    programs: tuple[Program, ...]
    size: int
    settings: Mapping[str, Any] = {}
    amount = 1
    unit = "datum"

    @abc.abstractmethod
    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        """Numbers of every datum of a block; calls ``advance(n)`` as it gets on."""

    def run(self, batch: Batch, *, progress: bool = False, checkpoint: Path | None = None) -> PerDatum:
        """The columns of all data.

        Args:
            batch: All data.
            progress: Show a bar.
            checkpoint: File that keeps finished blocks and the state of the random generators: when it is
                there already, work goes on where it ended, with the same result.

        Raises:
            ResumeError: If the file is of other data, programs or settings.
        """
        blocks = split(batch, self.size)
        finished: list[PerDatum] = []
        if checkpoint:
            settings = sorted(self.settings.items())
            identity = repr((self.name, settings, self.size, checksum(*batch)))
            with evaluation(*self.programs):
                behaves = _behaviour(self.programs, blocks[0])
            finished = _load(Path(checkpoint), identity, behaves)
        bar = progress_bar(self.amount * len(batch[0]), self.name.replace("_", " "), self.unit, show=progress)
        with bar, evaluation(*self.programs):
            bar.update(self.amount * sum(len(next(iter(columns.values()))) for columns in finished))
            masks = True
            for block in blocks[len(finished) :]:
                masks = masks and check_masked(self.programs[0], *block)
                columns = self.columns(block, bar.update)
                check_whole(next(iter(columns.values())), block)
                finished.append(columns)
                _give_back_memory()
                if "values" in columns:
                    bar.set_postfix_str(f"mean {torch.cat([c['values'] for c in finished]).mean():.2f}")
                if checkpoint:
                    _save(Path(checkpoint), identity, behaves, finished)
        return {name: torch.cat([columns[name] for columns in finished]) for name in finished[0]}


def _give_back_memory() -> None:
    """Let go of what glibc's allocator keeps: pieces between what lives on, more of them with every block."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another library of C has no such function
        ctypes.CDLL(None).malloc_trim(0)


def check_whole(numbers: Tensor, block: Batch) -> None:
    """Raise ``ValueError`` if a program left out some of the data that it was given."""
    if len(numbers) != len(block[0]):
        raise ValueError(f"{SUBSAMPLED}: of {len(block[0])} it took {len(numbers)}")


def _save(path: Path, identity: str, behaves: Tensor, finished: list[PerDatum]) -> None:
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    record = {"identity": identity, "behaviour": behaves, "finished": finished, "states": states}
    records.save_tensors(record, path)


def _load(path: Path, identity: str, behaves: Tensor) -> list[PerDatum]:
    if not os.path.lexists(path):
        return []
    try:
        record = records.load_tensors(path)
        known, earlier = record["identity"], record["behaviour"]
        (cpu, devices), finished = record["states"], record["finished"]
    except (OSError, ValueError, KeyError) as error:
        raise ResumeError(
            f"{path} is no file of unfinished estimates ({error}): remove it to start anew, or give another "
            "name"
        ) from None
    same = earlier.shape == behaves.shape and torch.allclose(earlier, behaves, rtol=1e-4, equal_nan=True)
    if known != identity or not same:
        raise ResumeError(
            f"{path} holds unfinished work with other data, weights or settings: go on with those, or remove "
            "the file to start anew"
        )
    torch.set_rng_state(cpu)
    for device, state in enumerate(devices[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    return finished
