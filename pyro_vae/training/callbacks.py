"""Callbacks: what happens between epochs."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import Count, check_arguments, checked, found
from pyro_vae.errors import UserError
from pyro_vae.marginal_likelihood import elbo
from pyro_vae.traces import at_point_masses
from pyro_vae.traces.blocks import evaluation
from pyro_vae.training.checkpoints import CheckpointError
from pyro_vae.training.loop import Callback, Row, Training


class Evaluate(Callback):
    """The ELBO of held-out data, as ``{name}/elbo``, nats per datum; of an autoencoder ``{name}/log_joint``.

    It draws the same noise every time, from a generator of its own: differences between epochs are not noise,
    and training is the same with and without it.

    Args:
        *batch: Arguments of the programs: the data.
        name: Prefix of the metric.
        num_samples: Draws of the latents for every datum.
        epochs: After which epochs, counted from 1; by default after every one.
    """

    @checked
    def __init__(
        self,
        *batch: Tensor,
        name: str = "valid",
        num_samples: Count = 1,
        epochs: Collection[int] | None = None,
    ) -> None:
        check_arguments(batch)
        self.batch = batch
        self.name = name
        self.num_samples = num_samples
        self.epochs = epochs

    def epoch_end(self, training: Training) -> None:
        """Adds the metric to the row."""
        if self.epochs is not None and training.epoch not in self.epochs:
            return
        device = self.batch[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            pair = training.algorithm.model, training.algorithm.guide
            with evaluation(*pair):
                joint = at_point_masses(*pair, *self.batch)
            if joint is None:
                name, bound = "elbo", elbo(*pair, *self.batch, num_samples=self.num_samples).elbo
            else:
                name, bound = "log_joint", sum(joint)
        training.row[f"{self.name}/{name}"] = bound.mean().item()


class EarlyStopping(Callback):
    """Stops when a metric has not risen above its best for ``patience`` epochs.

    Args:
        patience: Epochs without improvement; ``math.inf``: never. It may be another one when a training goes
            on from a checkpoint, which is then as if it had had that patience from the start.
        monitor: The metric; higher is better.

    Raises:
        ValueError: If ``patience`` is below 1.
        CheckpointError: When a training goes on, if with that patience it would have stopped before.
    """

    @checked
    def __init__(self, patience: int | float, monitor: str = "valid/elbo") -> None:
        if not patience >= 1:
            raise ValueError(f"patience must be at least 1 epoch, not {patience}")
        self.patience = patience
        self.monitor = monitor
        self.best = -math.inf
        self.waited = 0

    def epoch_end(self, training: Training) -> None:
        """Sets ``training.stop``."""
        self._look_at(_monitored(training.row, self.monitor))
        self._decide(training)

    def _look_at(self, value: float) -> None:
        self.waited = 0 if value > self.best else self.waited + 1
        self.best = max(self.best, value)

    def _decide(self, training: Training) -> None:
        if self.waited >= self.patience:
            training.stop = (
                f"{self._reason} {self.best:.4g} for {self.patience} epochs; resumed with a larger patience, "
                "it goes on"
            )

    @property
    def _reason(self) -> str:
        return f"{self.monitor} did not rise above"

    def restored(self, training: Training) -> None:
        """Decides anew, since another patience may have stopped it."""
        if training.stop is not None and training.stop.startswith(self._reason):
            training.stop = None
        values = [row[self.monitor] for row in training.history if self.monitor in row]
        if len(values) == training.epoch:  # otherwise what the checkpoint remembers must do
            self.best, self.waited = -math.inf, 0
            for epoch, value in enumerate(values, 1):
                self._look_at(value)
                if self.waited >= self.patience and epoch < training.epoch:
                    raise CheckpointError(
                        f"with a patience of {self.patience} this training would have stopped after epoch "
                        f"{epoch}, and it has {training.epoch} behind it: give a larger patience"
                    )
        self._decide(training)

    def state_dict(self) -> dict:
        """The best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self.best, self.waited = state["best"], state["waited"]


class LearningRate(Callback):
    """Steps a scheduler of ``torch.optim.lr_scheduler`` after every epoch; ``learning_rate`` in the row.

    Args:
        scheduler: Counts in epochs.
        monitor: The metric given to ``ReduceLROnPlateau``, which wants ``mode="max"`` for bounds.
    """

    @checked
    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler, monitor: str = "valid/elbo") -> None:
        self.scheduler = scheduler
        self.monitor = monitor

    def epoch_end(self, training: Training) -> None:
        """Reports the rate of this epoch and sets that of the next."""
        training.row["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(_monitored(training.row, self.monitor))
        else:
            self.scheduler.step()

    def state_dict(self) -> dict:
        """Return the scheduler's state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore it."""
        self.scheduler.load_state_dict(state)


class KLWarmup(Callback):
    r"""Raises the weight of the KL term over the first epochs: :math:`\beta \min(1, \mathrm{epoch} / n)`.

    Args:
        objective: Objective that has ``beta``, such as ``objectives.BetaELBO``.
        num_epochs: n; from epoch n on the objective is as it was made.
    """

    @checked
    def __init__(self, objective: Any, num_epochs: Count) -> None:
        if isinstance(objective, type) or not hasattr(objective, "beta"):
            raise TypeError(
                f"objective must have a weight beta, as BetaELBO() has, which is also the loss of the "
                f"algorithm; not {found(objective)}"
            )
        self.objective = objective
        self.beta = objective.beta
        self.num_epochs = num_epochs

    def epoch_start(self, training: Training) -> None:
        """Sets ``objective.beta``."""
        self.objective.beta = self.beta * min(1.0, (training.epoch + 1) / self.num_epochs)

    def epoch_end(self, training: Training) -> None:
        """Reports ``beta``."""
        training.row["beta"] = self.objective.beta


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message says how to get it."""


class TensorBoard(Callback):
    """Writes every row for TensorBoard (``pip install 'pyro_vae[tensorboard]'``); the step is ``samples``."""

    @checked
    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoard is not installed: pip install 'pyro_vae[tensorboard]'"
            ) from error
        self._open = SummaryWriter
        self.folder = Path(folder)
        self.writer = None

    def epoch_end(self, training: Training) -> None:
        """Writes the row."""
        if self.writer is None:
            # What an interrupted run wrote beyond its checkpoint is overwritten.
            self.writer = self._open(str(self.folder), purge_step=training.samples)
        for key, value in training.row.items():
            if key not in ("epoch", "samples"):
                self.writer.add_scalar(key, value, training.samples)
        self.writer.flush()


def _monitored(row: Row, monitor: str) -> float:
    if monitor not in row:
        raise ValueError(
            f"rows have no {monitor!r} to monitor, only {sorted(row)}: add an Evaluate callback before"
        )
    return row[monitor]
