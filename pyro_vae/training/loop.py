"""The loop, its state, and what a callback is."""

import contextlib
import dataclasses
import inspect
import math
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyro_vae.arguments import NonNegative, check_arguments, checked, found
from pyro_vae.errors import UserError
from pyro_vae.progress import progress_bar
from pyro_vae.traces import check_batch, first_nonfinite

Row = dict[str, Any]  # metric -> number


@runtime_checkable
class Algorithm(Protocol):
    """Algorithm that moves the parameters: one file each in :mod:`pyro_vae.algorithms`."""

    model: nn.Module
    guide: nn.Module | None

    def step(self, *batch: Tensor) -> dict[str, Tensor]:
        """One update; returns metrics in nats per datum, without waiting for the device."""

    def state_dict(self) -> dict:
        """Return all that it needs to go on: tensors, numbers and strings."""

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss or the parameters became nan or infinite; the message names the step and the site."""


class Callback:
    """Watches training. A subclass overrides what it needs.

    What must survive an interruption goes into ``state_dict``, as numbers, strings and tensors.
    """

    def start(self, training: "Training") -> None:
        """Called before the first epoch of this call of ``fit``."""

    def epoch_start(self, training: "Training") -> None:
        """Called before every epoch; ``training.epoch`` counts those that are complete."""

    def epoch_end(self, training: "Training") -> None:
        """Called after every epoch; may add to ``training.row`` and set ``training.stop``."""

    def restored(self, training: "Training") -> None:
        """Called after a checkpoint was restored; may change ``training.stop``."""

    def end(self, training: "Training") -> None:
        """Called at the end of this call of ``fit``, however it ends."""

    def state_dict(self) -> dict:
        """Return what to remember."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore it."""


@dataclasses.dataclass
class Training:
    """State of a training, which callbacks see and change.

    Attributes:
        algorithm: Algorithm that takes the steps.
        batches: An epoch of batches at every iteration.
        num_epochs: Epochs altogether.
        callbacks: All callbacks, in the order in which they are called.
        epoch: Complete epochs.
        samples: Data seen so far, counted with repetition (the paper's x axis).
        seconds: Time spent in training so far, without evaluation.
        row: Metrics of the last complete epoch.
        history: All rows.
        stop: Reason to end training, once there is one.
    """

    algorithm: Algorithm
    batches: Iterable[Any]
    num_epochs: int
    callbacks: Sequence[Callback] = ()
    epoch: int = 0
    samples: int = 0
    seconds: float = 0.0
    row: Row = dataclasses.field(default_factory=dict)
    history: list[Row] = dataclasses.field(default_factory=list)
    stop: str | None = None

    def state_dict(self) -> dict:
        """The state between two epochs: tensors, numbers and strings, no objects."""
        return {
            "epoch": self.epoch,
            "samples": self.samples,
            "seconds": self.seconds,
            "stop": self.stop,
            "algorithm": self.algorithm.state_dict(),
            "batches": self.batches.state_dict() if hasattr(self.batches, "state_dict") else {},
            "callbacks": {name: callback.state_dict() for name, callback in self._named_callbacks()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned; callbacks that were not there then start afresh."""
        self.algorithm.load_state_dict(state["algorithm"])
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["batches"])
        for name, callback in self._named_callbacks():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        torch.set_rng_state(state["random"])
        if len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.epoch, self.samples = state["epoch"], state["samples"]
        self.seconds, self.stop = state["seconds"], state["stop"]

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        """Callbacks by class, the second of a class with a number behind."""
        classes = [type(callback).__name__ for callback in self.callbacks]
        numbers = [classes[:i].count(name) for i, name in enumerate(classes)]
        names = [f"{name}{number or ''}" for name, number in zip(classes, numbers, strict=True)]
        return list(zip(names, self.callbacks, strict=True))


@checked
def fit(
    algorithm: Any,
    batches: Any,
    num_epochs: NonNegative,
    callbacks: Sequence[Callback] = (),
    *,
    progress: bool = True,
) -> list[Row]:
    """Train: ``algorithm.step(*batch)`` for every batch of ``num_epochs`` epochs.

    Args:
        algorithm: Algorithm that takes the steps, such as ``SVI``.
        batches: Tuples of the programs' arguments, an epoch at every iteration: ``data.batches(...)``, a
            ``DataLoader``, a list; a stream without a length, or a function that returns one, such as a
            generator function: the epoch ends when it does. If it has ``state_dict``, that is part of
            checkpoints.
        num_epochs: Epochs altogether, with those a restored checkpoint has behind it.
        callbacks: Called in this order; a ``Checkpoint`` comes last, to keep what the others did.
        progress: Show a progress bar.

    Returns:
        A row an epoch: ``epoch``, ``samples``, ``seconds`` of training so far, ``train/...`` for every metric
        of the algorithm (means over the epoch's data, each as it was just before the update), and what
        callbacks added.

    Raises:
        TypeError: If the algorithm is none, or a batch is no tuple of arguments.
        ValueError: If an epoch has no batches: an iterator gives those of one epoch.
        NonFiniteError: If a metric or a parameter becomes nan or infinite.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"fit takes an algorithm such as pyro_vae.SVI (step, state_dict, ...), not {type(algorithm)!r}"
        )
    batches = _repeatable(batches)
    training = Training(algorithm, batches, num_epochs, callbacks)
    for callback in callbacks:
        callback.start(training)
    if inspect.isgenerator(batches) and num_epochs - training.epoch > 1:
        raise ValueError(f"batches is a generator: {_ONE_EPOCH}")
    steps = _length(batches)
    if hasattr(algorithm, "expect"):
        algorithm.expect(None if steps is None else (num_epochs - training.epoch) * steps)
    total = None if steps is None else num_epochs * steps
    with (
        contextlib.ExitStack() as ending,
        progress_bar(total, "training", "step", show=progress) as bar,
    ):
        for callback in callbacks:
            ending.callback(callback.end, training)
        bar.n = bar.initial = training.epoch * (steps or 0)
        while training.epoch < num_epochs and training.stop is None:
            for callback in callbacks:
                callback.epoch_start(training)
            training.row = _epoch(training, bar)
            for callback in callbacks:
                callback.epoch_end(training)
            training.history.append(training.row)
            bar.set_postfix(_shown(training.row), refresh=False)
        if training.stop is not None:
            bar.write(f"stopped: {training.stop}", file=sys.stderr)
    return training.history


class _Calls:
    """Iterable of what a function returns, anew at every iteration."""

    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self.function())


def _repeatable(batches: Any) -> Iterable[Any]:
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches must yield tuples of the programs' arguments, such as (x,), not {found(batches)}"
        )
    if hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"):
        return batches
    if callable(batches):
        return _Calls(batches)
    raise TypeError(
        f"batches must be minibatches, such as pyro_vae.batches(dataset.train), not {found(batches)}"
    )


def _length(batches: Iterable[Any]) -> int | None:
    """Batches in an epoch, if it is known: a ``DataLoader`` of a stream has ``__len__``, which raises."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def _epoch(training: Training, bar: Any) -> Row:
    started = time.perf_counter()
    algorithm, metrics, unseen, sizes, num_seen = training.algorithm, [], [], [], 0
    for taken, batch in _steps(algorithm, training.batches):
        num_steps = len(next(iter(taken.values())))
        metrics.append(taken)
        unseen.append(taken)
        sizes += [len(batch[0])] * num_steps
        # Looking at a number of the GPU waits for it, so there this is done rarely.
        if batch[0].device.type == "cpu" or len(sizes) - num_seen >= 100:
            _check_finite(training, unseen, num_seen, batch)
            unseen, num_seen = [], len(sizes)
        bar.update(num_steps)
    if not metrics:
        is_short = getattr(training.batches, "drop_last", False) and training.epoch == 0
        raise ValueError(
            f"batches is empty in epoch {training.epoch + 1}: "
            + ("drop_last leaves nothing of fewer data than batch_size" if is_short else _ONE_EPOCH)
        )
    _check_finite(training, unseen, num_seen, batch)
    for module in filter(None, (algorithm.model, algorithm.guide)):
        for name, parameter in module.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"parameter {name} of {type(module).__name__} became nan or infinite in epoch "
                    f"{training.epoch + 1}: {_ADVICE}"
                )
    weights = torch.tensor(sizes, dtype=torch.float64)
    means = {
        f"train/{name}": float(torch.cat([m[name] for m in metrics]).double().cpu() @ weights / weights.sum())
        for name in metrics[0]
    }
    training.epoch += 1
    training.samples += sum(sizes)
    training.seconds += time.perf_counter() - started
    return {
        "epoch": training.epoch,
        "samples": training.samples,
        **means,
        "seconds": round(training.seconds, 3),
    }


_ONE_EPOCH = (
    "an iterator gives one epoch only. Give what can be repeated: a list, a DataLoader, or the function that "
    "makes the iterator"
)
_ADVICE = (
    "try a smaller learning rate, a larger min_scale, or gradient clipping; the last checkpoint, if one was "
    "kept, is from before this"
)


def _steps(algorithm: Any, batches: Iterable[Any]) -> Iterator[tuple[dict[str, Tensor], Sequence[Tensor]]]:
    """Metrics of one or several steps at a time, a vector for each, and a batch of as many data as theirs."""
    drawn = all(hasattr(batches, name) for name in ("indices", "draw", "generator"))
    if drawn and hasattr(algorithm, "steps"):
        yield from algorithm.steps(batches)
        return
    for batch in batches:
        if isinstance(batch, tuple | list):
            check_arguments(batch)
            if isinstance(batch[0], Tensor) and not len(batch[0]):
                raise ValueError("batches yields a batch without data: leave empty ones out")
        else:
            raise TypeError(
                "batches must yield tuples of the programs' arguments, such as (x,), not a "
                f"{type(batch).__name__}"
            )
        yield {name: value[None] for name, value in algorithm.step(*batch).items()}, batch


def _check_finite(
    training: Training, metrics: Sequence[dict[str, Tensor]], first: int, batch: Sequence[Tensor]
) -> None:
    """Raise if one of these metrics, of step ``first`` and later, is not finite, naming step and site."""
    values = {name: torch.cat([m[name] for m in metrics]).tolist() for name in (metrics or [{}])[0]}
    bad = [
        (step, name, value)
        for name, column in values.items()
        for step, value in enumerate(column, first)
        if not math.isfinite(value)
    ]
    if bad:
        step, name, value = min(bad, key=operator.itemgetter(0))
        what = f"{name} became {value} at step {step + 1} of epoch {training.epoch + 1}"
        programs = training.algorithm.model, training.algorithm.guide
        if programs[1] is None:
            raise NonFiniteError(f"{what}; {_ADVICE}")
        try:  # steps after the first do not look at their data
            check_batch(*programs, *batch)
        except UserError as error:
            raise NonFiniteError(f"{what}: {error}") from error
        site = first_nonfinite(*programs, *batch)
        raise NonFiniteError(f"{what}: {site or 'all sites are finite by now'}; {_ADVICE}")


def _shown(row: Row) -> dict[str, str]:
    shown = {key: f"{row[key]:.2f}" for key in ("train/elbo", "train/log_joint", "valid/elbo") if key in row}
    return {"epoch": str(row["epoch"]), **shown}
