"""Run folders: metrics, the last checkpoint and the best one, each whole or not there."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from pyro_vae import records
from pyro_vae.arguments import Count, checked
from pyro_vae.errors import UserError
from pyro_vae.files import append_line, locked, write_atomically
from pyro_vae.training.loop import Callback, Row, Training


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, written or used; the message says what to do."""


class Checkpoint(Callback):
    """Keeps ``metrics.jsonl``, ``checkpoint.pt`` and ``best.pt`` in a run folder; put it last.

    While ``fit`` runs, the folder is locked for other processes.

    Args:
        folder: The run folder, made if need be.
        resume: Go on from the checkpoint in it, if there is one; otherwise there must be none.
        monitor: The metric by which an epoch is the best, higher is better. ``best.pt`` is not written
            while rows do not have it.
        every: Epochs between two checkpoints, where epochs are short; the last epoch always has one.
        run: Mark of this run, which checkpoints then bear; those of others are refused.

    Raises:
        ValueError: If ``every`` is below 1.
        CheckpointError: In ``start``, if the folder holds a checkpoint and ``resume`` is not set, or one that
            is damaged or does not fit.
        InUseError: In ``start``, if another process trains in the folder.
        WriteError: If the disk is full; the last good checkpoint is kept.
    """

    @checked
    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        monitor: str = "valid/elbo",
        every: Count = 1,
        run: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.every = every
        self.resume = resume
        self.monitor = monitor
        self.run = run
        self.best = -math.inf
        self._num_rows, self._rows = 0, hashlib.sha256()  # in metrics.jsonl
        self._lock = contextlib.ExitStack()

    def start(self, training: Training) -> None:
        """Restores the checkpoint, and keeps one of the untrained state otherwise."""
        self._lock.enter_context(lock_run(self.folder))
        try:
            self._start(training)
        except BaseException:
            self._lock.close()
            raise

    def _start(self, training: Training) -> None:
        path = self.folder / "checkpoint.pt"
        exists = os.path.lexists(path)
        if exists and not self.resume:
            raise CheckpointError(
                f"{self.folder} holds a checkpoint already: resume it, or use another folder"
            )
        if not exists and (read_metrics(self.folder) or (self.folder / "best.pt").exists()):
            raise CheckpointError(
                f"{self.folder} holds metrics or best.pt but no checkpoint.pt to go on from: put it back, or "
                "use another folder"
            )
        if exists:
            state = load_checkpoint(path, self.run)
            _check_best(self.folder, state)
            rows = read_metrics(self.folder, state)
            _restore(training, state, path)
            # Rows are written before the checkpoint, so those it knows of are whole; the row of a test has
            # no seconds.
            training.history = [row for row in rows if row["epoch"] <= training.epoch and "seconds" in row]
            for callback in training.callbacks:
                callback.restored(training)
        content = "".join(_line(row) for row in training.history).encode()
        self._num_rows, self._rows = len(training.history), hashlib.sha256(content)
        write_atomically(content, self.folder / METRICS)
        if not exists:
            save_checkpoint(self._state(training), path)

    def epoch_end(self, training: Training) -> None:
        """Writes the row, then the best and the last checkpoint."""
        append_row(training.row, self.folder)
        self._num_rows += 1
        self._rows.update(_line(training.row).encode())
        value = training.row.get(self.monitor, -math.inf)
        is_best, self.best = value > self.best, max(value, self.best)
        is_last = training.epoch >= training.num_epochs or training.stop is not None
        is_due = is_last or training.epoch % self.every == 0
        if is_best or is_due:
            state = self._state(training)
        if is_best:
            save_checkpoint(state, self.folder / "best.pt")
        if is_due:
            save_checkpoint(state, self.folder / "checkpoint.pt")

    def _state(self, training: Training) -> dict[str, Any]:
        """State of the training, with a checksum of what ``metrics.jsonl`` holds."""
        rows = {"count": self._num_rows, "checksum": self._rows.hexdigest()}
        return training.state_dict() | {"metrics": rows} | ({"run": self.run} if self.run else {})

    def end(self, training: Training) -> None:
        """Unlocks the folder."""
        self._lock.close()

    def state_dict(self) -> dict:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Restore it."""
        self.best = state["best"]


def lock_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a run folder against other processes that would train in it; see ``files.locked``."""
    return locked(Path(folder) / ".lock", folder)


# ------------------------------------------------------------------------------------------- checkpoints

_REPLACE = "put back a copy of it, or start anew in another folder"
_Count = Annotated[int, Field(ge=0, strict=True)]


# State of a compiled function; more names may come.
_Compiled = dict[str, list[str] | dict[str, str] | dict[str, int] | int] | None


@dataclasses.dataclass
class _Progress:
    """Plain values in every checkpoint, besides its tensors."""

    epoch: _Count
    samples: _Count
    seconds: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
    stop: Annotated[str | None, Field(strict=True)]
    callbacks: dict[str, dict[str, Any]]


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a state of tensors, numbers and strings atomically."""
    records.save_tensors(state, path)


def load_checkpoint(path: Path, run: str | None = None) -> dict[str, Any]:
    """Read a checkpoint; tensors come to the CPU, and nothing in the file is executed.

    Raises:
        CheckpointError: If there is none, or it is truncated, damaged, of another ``run`` or something else.
    """
    try:
        state = records.load_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: {_REPLACE}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}. {_REPLACE}") from None
    if run is not None and state.get("run", run) != run:
        raise CheckpointError(f"{path} is of a run of another configuration than config.json: {_REPLACE}")
    if not isinstance(state.get("algorithm"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a training: {_REPLACE}")
    try:
        TypeAdapter(_Progress).validate_python(state)
        for name in {"compiled", "moves"} & set(state["algorithm"]):
            TypeAdapter(_Compiled).validate_python(state["algorithm"][name], strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged ({records.in_words(error)}): {_REPLACE}") from None
    return state


def load_best(folder: Path, run: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint with the best held-out metric, else the last; raises as :func:`load_checkpoint`."""
    best, last = folder / "best.pt", folder / "checkpoint.pt"
    if os.path.lexists(best):
        return best, load_checkpoint(best, run)
    state = load_checkpoint(last, run)
    _check_best(folder, state)
    return last, state


def _check_best(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` if there was a best epoch whose weights are gone."""
    best = state.get("callbacks", {}).get(Checkpoint.__name__, {}).get("best")
    if best not in (None, -math.inf) and not os.path.lexists(folder / "best.pt"):
        raise CheckpointError(
            f"{folder} has lost best.pt, the weights of its best epoch: put it back, or copy checkpoint.pt "
            "to best.pt to go on with those of the last"
        )


def load_parameters(
    checkpoint: Mapping[str, Any], path: Path, model: nn.Module | None, guide: nn.Module | None
) -> None:
    """Put the parameters of a checkpoint into a pair, or into one of both.

    Raises:
        CheckpointError: If they do not fit; nothing is loaded then.
    """
    parts = {name: module for name, module in (("model", model), ("guide", guide)) if module is not None}
    for name, module in parts.items():
        wrong = records.misfit(checkpoint["algorithm"].get(name), module.state_dict(), name)
        if wrong:
            raise CheckpointError(f"{path} does not fit this {name}: {wrong}. {_REPLACE}")
    for name, module in parts.items():
        module.load_state_dict(checkpoint["algorithm"][name])


def _restore(training: Training, state: Mapping[str, Any], path: Path) -> None:
    """Load a state, once it has the form of the one that this training would write."""
    expected = training.state_dict()
    if (wrong := next(_misfits(state, expected, training.algorithm), None)) is None:
        try:
            training.load_state_dict(state)
            return
        except Exception as error:  # of algorithms, batches and callbacks of others
            wrong = str(error).strip().partition("\n")[0] or type(error).__name__
    raise CheckpointError(f"{path} does not fit this training: {wrong}. {_REPLACE}")


def _misfits(state: Mapping[str, Any], expected: Mapping[str, Any], algorithm: Any) -> Iterator[str]:
    """Say what of a state has another form than is expected."""
    yield from (f"{name} is missing" for name in expected if name not in state)
    found, whole = state["algorithm"], expected["algorithm"]
    parts = [(found.get(name), whole[name], name, True) for name in ("model", "guide") if name in whole]
    parts.append((state["random"], expected["random"], "random", True))
    # Others may keep what they like; of ours all has the same form from the start.
    parts += [(state[name], expected[name], name, False) for name in ("batches", "callbacks", "random_cuda")]
    for part, form, name, exact in parts:
        if wrong := records.misfit(part, form, name, exact=exact):
            yield wrong
    if isinstance(optimizer := getattr(algorithm, "optimizer", None), torch.optim.Optimizer):
        yield from _misfits_of_optimizer(found.get("optimizer"), optimizer)


def _misfits_of_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    form = optimizer.state_dict()
    if wrong := records.misfit(found, form | {"state": {}}, "optimizer", exact=False):
        yield wrong
        return
    groups = [group.get("params") for group in found.get("param_groups", [])]
    if groups != [group["params"] for group in form["param_groups"]] or "state" not in found:
        yield "optimizer is of other parameters"
        return
    trial = copy.deepcopy(optimizer)  # takes a step, since it has no state before
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        trial.step()
    except Exception:  # one of others, which may need a closure
        return
    states = trial.state_dict()["state"]
    for index, of_parameter in found["state"].items():
        where = f"optimizer.state.{index}"
        if not isinstance(of_parameter, Mapping) or index not in states:
            yield f"{where} is of no parameter"
        elif wrong := records.misfit(_tensors(of_parameter), _tensors(states[index]), where):
            yield wrong


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------- metrics

METRICS = "metrics.jsonl"
_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers: they are words


def read_metrics(folder: Path, state: Mapping[str, Any] | None = None) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``, without a last line that was cut off in the writing.

    Args:
        folder: The run folder.
        state: Its checkpoint, by which the rows are checked; by default that in the folder, if there is one.

    Raises:
        CheckpointError: If the file, or the checkpoint, is damaged.
    """
    path = Path(folder) / METRICS
    if not os.path.lexists(path):
        return []
    checkpoint = path.with_name("checkpoint.pt")
    if state is None and os.path.lexists(checkpoint):
        state = load_checkpoint(checkpoint)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(_row(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        _check_order(rows, state)
        if not _are_known(lines, state):
            raise ValueError("its rows are not those that checkpoint.pt knows of")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): {_REMOVE}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_REMOVE}") from None
    return rows


_REMOVE = "put back a copy of it, or remove it to go on without the rows before"


def _row(line: bytes) -> Row:
    row = records.parse(line, dict[str, Any])
    row.pop(records.CHECKSUM, None)
    if type(row.get("epoch")) is not int or row["epoch"] < 0:
        raise ValueError(f"epoch cannot be {row.get('epoch')!r}")
    for name, value in row.items():
        if value in _NOT_FINITE:
            row[name] = value = float(value)
        is_number = type(value) in (int, float)
        if (name in ("samples", "seconds") or name.startswith("train/")) and not (
            is_number and abs(value) < math.inf
        ):
            raise ValueError(f"{name} cannot be {value!r}")
        if name.startswith("valid/") and not is_number:
            raise ValueError(f"{name} cannot be {value!r}")
    return row


def _check_order(rows: Sequence[Row], state: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` unless epochs follow one another, as far as the checkpoint counts them."""
    last = math.inf if state is None else state["epoch"]
    trained = [row for row in rows if "seconds" in row and row["epoch"] <= last]
    for before, after in itertools.pairwise(trained):
        if after["epoch"] != before["epoch"] + 1 or not after.get("samples", 0) > before.get("samples", 0):
            raise ValueError(f"epoch {after['epoch']} comes after epoch {before['epoch']}")
    if trained and state is not None and trained[-1]["epoch"] != last:
        raise ValueError(f"it ends with epoch {trained[-1]['epoch']}, checkpoint.pt with {last}")


def _are_known(lines: Sequence[bytes], state: Mapping[str, Any] | None) -> bool:
    """Return True if the first lines are those that the checkpoint has a checksum of, or it has none."""
    match (state or {}).get("metrics"):
        case {"count": int(count), "checksum": str(checksum)}:
            return hashlib.sha256(b"".join(lines[:count])).hexdigest() == checksum
    return True


def append_row(row: Row, folder: Path) -> None:
    """Add a row to a run's ``metrics.jsonl``, on the disk when this returns.

    The checkpoint knows the rows of epochs; others, which have no seconds, get a checksum.
    """
    if "seconds" not in row:
        row = {**row, records.CHECKSUM: records.checksum(json.loads(_line(row)))}
    append_line(_line(row).removesuffix("\n"), folder / METRICS)


def _line(row: Row) -> str:
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(plain) + "\n"
