"""Samples and data folded into one axis, for programs that are made for one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import runtime
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.distributions.unfolded import unfolded
from pyro_vae.traces.sites import MasksOutside, Program

Batch = tuple[Tensor, ...]


def folded_trace(
    program: Program, batch: Batch, num_samples: int, around: Callable[[Program], Program]
) -> poutine.Trace:
    """Trace the program on one axis of samples and data.

    Sites that handlers enumerate put axes of their own to the left of the samples. How many values they have
    is found by running the program once; then it is run at all of them.
    """
    program = MasksOutside()(program)
    fold = _Fold((), num_samples, len(batch[0]))
    # Pyro's allocator of such axes, as of 1.9.2, goes on where the first run ended.
    free = getattr(runtime._ENUM_ALLOCATOR, "next_available_dim", None)
    trace = poutine.trace(around(fold(program))).get_trace(*map(fold.argument, batch))
    if fold.found:
        runtime._ENUM_ALLOCATOR.next_available_dim = free
        fold = _Fold(fold.found, num_samples, len(batch[0]))
        trace = poutine.trace(around(fold(program))).get_trace(*map(fold.argument, batch))
    return trace


_MOST_VALUES = 10_000


class _Fold(Messenger):
    """Handler that runs a program on one axis of all samples and data, and shows its sites with one for each.

    Args:
        values: Sizes of the axes of enumerated sites, from the left; those that come later in the program
            are further to the left.
        num_samples: Size of the axis of samples.
        num_data: Size of the axis of data.
    """

    def __init__(self, values: tuple[int, ...], num_samples: int, num_data: int) -> None:
        super().__init__()
        self.axes = (*values, num_samples, num_data)
        self.rows = math.prod(self.axes)
        self.found: tuple[int, ...] = ()
        self._enumerated: set[int] = set()
        self._mine: set[str] = set()

    def argument(self, value: Any) -> Any:
        """Repeat an argument for all rows."""
        if not isinstance(value, Tensor) or value.shape[:1] != self.axes[-1:] or self.rows == len(value):
            return value
        return value.expand(*self.axes[:-1], *value.shape).flatten(0, len(self.axes) - 1)

    def _apart(self, value: Any) -> Any:
        """Give a tensor with a number for every row an axis for each that matters so far."""
        is_of_rows = isinstance(value, Tensor) and value.shape[:1] == (self.rows,)
        if not is_of_rows or self.rows == self.axes[-1]:
            return value
        return value.unflatten(0, self.axes)[(0,) * self._hidden]

    @property
    def _hidden(self) -> int:
        """Number of axes of sites that are still to come."""
        return len(self.axes) - 2 - len(self.found)

    def _pyro_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            msg["stop"] = True  # replayed, it would be that of another number of rows
            return
        frames = {frame.name: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
        is_ours = not msg["infer"].get("_deterministic")
        data = frames.get("data")
        if not is_ours or set(frames) != {"data"} or data.dim != -1 or len(msg["fn"].batch_shape) != 1:
            return  # what scores the sites says what is wrong
        if data.size != self.rows:
            raise ValueError(
                f"the plate 'data' has size {data.size} where the program is given {self.rows} data: make it "
                "pyro.plate('data', len(x))"
            )
        self._mine.add(msg["name"])
        msg["fn"] = unfolded(msg["fn"], self.axes, self._hidden)
        samples = CondIndepStackFrame("samples", -2, self.axes[-2], 0)
        msg["cond_indep_stack"] = (data._replace(size=self.axes[-1]), samples)
        msg["value"], msg["mask"], msg["scale"] = map(self._apart, (msg["value"], msg["mask"], msg["scale"]))

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] not in self._mine:
            return
        value, event = msg["value"], msg["fn"].event_shape
        shape = value.shape[: value.dim() - len(event)]
        dim = msg["infer"].get("_enumerate_dim")
        if dim in self._enumerated:
            raise ValueError(
                f"site {msg['name']!r} is summed over in a sequence, and the networks take (batch, features) "
                "only: let them take any leading shape, as with dim=-1 in place of dim=1"
            )
        self._enumerated |= {dim} - {None}
        left = shape[:-2]
        if left:
            self.found = tuple(torch.broadcast_shapes(self.found, left))
            if math.prod(self.found) > _MOST_VALUES:
                raise ValueError(
                    f"the discrete sites have {math.prod(self.found):,} values together, and the networks "
                    "take (batch, features) only, which takes a row for each: let them take any leading "
                    "shape, as with dim=-1 in place of dim=1"
                )
        if len(left) > len(self.axes) - 2:  # in the first run, which is to find them
            value = value[(0,) * len(left)]
        msg["value"] = value.expand(*self.axes, *value.shape[value.dim() - len(event) :]).reshape(
            self.rows, *value.shape[value.dim() - len(event) :]
        )
