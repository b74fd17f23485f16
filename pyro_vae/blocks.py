"""Data in blocks: bounded memory, progress, and long work that can be interrupted and resumed."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.compiled.survey import Survey
from pyro_vae.errors import UserError
from pyro_vae.files import write_atomically
from pyro_vae.progress import progress_bar
from pyro_vae.traces import Program
from pyro_vae.traces.sites import sample_sites, trace_of

Batch = tuple[Tensor, ...]
Columns = dict[str, Tensor]  # numbers of every datum, on the CPU, first axis the data


class ResumeError(UserError):
    """A file of unfinished work that does not belong to what is asked for."""


def check_sizes(batch: Batch, **sizes: int) -> int:
    """The number of data.

    Raises:
        TypeError: If an argument is no tensor with a first axis.
        ValueError: For arguments of several lengths, and for sizes below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
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
    """How many rows (samples times data) to score at once: a CPU is fastest while they fit its cache."""
    most, numbers = (4096, 2**22) if batch[0].device.type == "cpu" else (2**18, 2**27)
    return max(1, min(most, numbers // max(1, batch[0][0].numel(), _largest_row(model, batch))))


def _largest_row(model: Program, batch: Batch) -> int:
    """Numbers that a datum more adds to the largest tensor that the program makes."""
    sizes = []
    with torch.random.fork_rng(), torch.no_grad():
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
    """Neither gradients nor dropout; leaves the modes of the programs as they were."""
    modules = modules_of(*programs)
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def checksum(*tensors: Tensor) -> str:
    """What tells whether two estimates are of the same data."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def modules_of(*programs: Program | None) -> list[nn.Module]:
    """All modules that the programs can reach: in attributes, handlers, closures, ``pyro.module``."""
    return list({id(m): m for root in Survey(programs).modules for m in root.modules()}.values())


def programs_checksum(*programs: Program) -> str:
    """Of all parameters and buffers that the programs can reach, and of Pyro's parameter store."""
    tensors = [t for module in modules_of(*programs) for t in module.state_dict().values()]
    stored = [pyro.get_param_store()[name] for name in sorted(pyro.get_param_store())]
    return checksum(*(t for t in tensors if isinstance(t, Tensor)), *stored)


def _behaviour(programs: tuple[Program, ...], block: Batch) -> Tensor:
    """Numbers that differ where the programs do: what they draw from one seed, and its log-density."""
    numbers = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for program in programs:
            for _, site in sample_sites(trace_of(program, block, 1)):
                log_prob = site["fn"].log_prob(site["value"])
                numbers += [site["value"].double().sum(), log_prob.double().sum()]
    return torch.stack(numbers).cpu()


def by_blocks(
    estimate: Callable[[Batch, Callable[[int], None]], Columns],
    batch: Batch,
    size: int,
    *,
    programs: tuple[Program, ...],
    method: str,
    settings: dict[str, Any],
    work: int,
    unit: str,
    progress: bool,
    checkpoint: Path | None,
) -> Columns:
    """Run ``estimate(block, advance)`` on blocks of data and join its columns.

    Args:
        estimate: From a block to numbers of every datum; calls ``advance(n)`` as it gets on.
        batch: All data.
        size: Of a block.
        programs: Whose parameters the result depends on.
        method: For the progress bar.
        settings: What the result depends on besides.
        work: Units of work for a datum.
        unit: Of work.
        progress: Show a bar.
        checkpoint: File that keeps finished blocks and the state of the random generators: when it is there
            already, work goes on where it ended, with the same result.

    Raises:
        ResumeError: If the file is of other data, programs or settings.
    """
    blocks = split(batch, size)
    finished: list[Columns] = []
    if checkpoint:
        identity = repr((method, sorted(settings.items()), size, checksum(*batch)))
        with evaluation(*programs):
            behaviour = _behaviour(programs, blocks[0])
        finished = _load(Path(checkpoint), identity, behaviour)
    bar = progress_bar(work * len(batch[0]), method.replace("_", " "), unit, show=progress)
    with bar, evaluation(*programs):
        bar.update(work * sum(len(next(iter(columns.values()))) for columns in finished))
        for block in blocks[len(finished) :]:
            columns = estimate(block, bar.update)
            finished.append(columns)
            if "values" in columns:
                bar.set_postfix_str(f"mean {torch.cat([c['values'] for c in finished]).mean():.2f}")
            if checkpoint:
                _save(Path(checkpoint), identity, behaviour, finished)
    return {name: torch.cat([columns[name] for columns in finished]) for name in finished[0]}


def _save(path: Path, identity: str, behaviour: Tensor, finished: list[Columns]) -> None:
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    record = {"identity": identity, "behaviour": behaviour, "finished": finished, "states": states}
    buffer = io.BytesIO()
    torch.save(record, buffer)
    write_atomically(buffer.getvalue(), path)


def _load(path: Path, identity: str, behaviour: Tensor) -> list[Columns]:
    if not path.exists():
        return []
    try:
        record = torch.load(path, weights_only=True)
        known, earlier = record["identity"], record["behaviour"]
    except Exception as error:  # torch raises whatever the content leads it to
        raise ResumeError(
            f"{path} is no file of unfinished estimates ({type(error).__name__}): give another name"
        ) from error
    same = earlier.shape == behaviour.shape and torch.allclose(earlier, behaviour, rtol=1e-4, equal_nan=True)
    if known != identity or not same:
        raise ResumeError(
            f"{path} holds unfinished work with other data, weights or settings: go on with those, or remove "
            "the file to start anew"
        )
    cpu, devices = record["states"]
    torch.set_rng_state(cpu)
    for device, state in enumerate(devices[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    return record["finished"]
