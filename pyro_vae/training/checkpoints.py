"""Run folders: metrics, the last checkpoint and the best one, each whole or not there."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_vae.errors import UserError
from pyro_vae.files import append_line, write_atomically
from pyro_vae.training.loop import Callback, Row, Training


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, written or used; the message says what to do."""


class Checkpoint(Callback):
    """Keeps ``metrics.jsonl``, ``checkpoint.pt`` and ``best.pt`` in a run folder; put it last.

    Args:
        folder: The run folder, made if need be.
        resume: Go on from the checkpoint in it, if there is one; otherwise there must be none.
        monitor: The metric by which an epoch is the best, higher is better. ``best.pt`` is not written
            while rows do not have it.
        every: Epochs between two checkpoints, where epochs are short; the last epoch always has one.

    Raises:
        ValueError: If ``every`` is below 1.
        CheckpointError: In ``start``, if the folder holds a checkpoint and ``resume`` is not set, or one that
            does not fit.
        WriteError: If the disk is full; the last good checkpoint is kept.
    """

    def __init__(
        self, folder: str | Path, *, resume: bool = False, monitor: str = "valid/elbo", every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.folder = Path(folder)
        self.every = every
        self.resume = resume
        self.monitor = monitor
        self.best = -math.inf

    def start(self, training: Training) -> None:
        """Restores the checkpoint, and keeps one of the untrained state otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "checkpoint.pt"
        if path.exists() and not self.resume:
            raise CheckpointError(
                f"{self.folder} holds a checkpoint already: resume it, or use another folder"
            )
        if not path.exists() and (read_metrics(self.folder) or (self.folder / "best.pt").exists()):
            raise CheckpointError(
                f"{self.folder} holds metrics or best.pt but no checkpoint.pt to go on from: put it back, or "
                "use another folder"
            )
        if path.exists():
            state = load_checkpoint(path)
            try:
                training.load_state_dict(state)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} does not fit this training: {error}") from error
            # Rows are written before the checkpoint, so those it knows of are whole; the row of a test has
            # no seconds.
            training.history = [
                row
                for row in read_metrics(self.folder)
                if row["epoch"] <= training.epoch and "seconds" in row
            ]
        rows = "".join(json.dumps(row) + "\n" for row in training.history)
        write_atomically(rows.encode(), self.folder / "metrics.jsonl")
        if not path.exists():
            save_checkpoint(training.state_dict(), path)

    def epoch_end(self, training: Training) -> None:
        """Writes the row, then the best and the last checkpoint."""
        append_row(training.row, self.folder)
        value = training.row.get(self.monitor, -math.inf)
        is_best, self.best = value > self.best, max(value, self.best)
        is_last = training.epoch >= training.num_epochs or training.stop is not None
        is_due = is_last or training.epoch % self.every == 0
        if is_best or is_due:
            state = training.state_dict()
        if is_best:
            save_checkpoint(state, self.folder / "best.pt")
        if is_due:
            save_checkpoint(state, self.folder / "checkpoint.pt")

    def state_dict(self) -> dict:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Restore it."""
        self.best = state["best"]


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a state of tensors, numbers and strings atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(buffer.getvalue(), path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors come to the CPU, and nothing in the file is executed.

    Raises:
        CheckpointError: If there is none, or it is truncated or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint; it may be truncated or another kind of file "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or "algorithm" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of a training")
    return state


def load_parameters(checkpoint: Mapping[str, Any], path: Path, model: nn.Module, guide: nn.Module) -> None:
    """Put the parameters of a checkpoint into a pair.

    Raises:
        CheckpointError: If they do not fit.
    """
    for module, name in (model, "model"), (guide, "guide"):
        try:
            module.load_state_dict(checkpoint["algorithm"][name])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not fit this {name}: {error}") from error


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``, without a last line that was cut off in the writing."""
    path = folder / "metrics.jsonl"
    rows = []
    if path.exists():
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise CheckpointError(f"line {number} of {path} is not JSON: {error}") from error
    return rows


def append_row(row: Row, folder: Path) -> None:
    """Add a row to a run's ``metrics.jsonl``, on the disk when this returns."""
    append_line(json.dumps(row), folder / "metrics.jsonl")
