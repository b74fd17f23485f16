r"""Training: the one loop, and the callbacks that watch it.

:func:`fit` runs ``algorithm.step(*batch)`` over the batches, epoch after epoch, and makes a row of metrics of
each. Everything else is a callback: held-out evaluation, schedules, early stopping, TensorBoard, and
:class:`Checkpoint`, which keeps a run folder:

- ``metrics.jsonl``: the rows;
- ``checkpoint.pt``: the state after the last whole epoch: parameters, optimiser, random generators, and what
  the callbacks remember. On a CPU a run that goes on from it gives, bit for bit, what an uninterrupted one
  gives;
- ``best.pt``: the same of the epoch with the best held-out metric.

Files are written under another name and then renamed, so that whatever happens the last good one is there.
"""

from pyro_vae.training.callbacks import EarlyStopping, Evaluate, KLWarmup, LearningRate, TensorBoard
from pyro_vae.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    append_row,
    load_best,
    load_checkpoint,
    load_parameters,
    lock_run,
    read_metrics,
    save_checkpoint,
)
from pyro_vae.training.loop import Algorithm, Callback, NonFiniteError, Row, Training, fit

__all__ = [
    "Algorithm",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "EarlyStopping",
    "Evaluate",
    "KLWarmup",
    "LearningRate",
    "NonFiniteError",
    "Row",
    "TensorBoard",
    "Training",
    "append_row",
    "fit",
    "load_best",
    "load_checkpoint",
    "load_parameters",
    "lock_run",
    "read_metrics",
    "save_checkpoint",
]
