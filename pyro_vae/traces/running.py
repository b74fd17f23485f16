"""Runs of a program: as it was written, for many samples at once.

Pyro vectorises over samples by a plate at ``dim=-2``, so that networks meet tensors of shape (samples, batch,
features). Many are made for (batch, features): ``softmax(dim=1)``, ``view(-1, n)``, a convolution. So before
a program is run in that way, some samples of some data are scored in it and one by one
(:mod:`pyro_vae.traces.trying`). Where they differ, samples and data are folded into one axis: the program
then runs on as many data as there are samples times data, exactly as it was written, and its sites are taken
apart again (:mod:`pyro_vae.traces.folding`). Where a value depends on the other rows of its batch neither is
right, and there is an error that names the network.
"""

import contextlib
import contextvars
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vae.compiled.things import PLAIN
from pyro_vae.traces.folding import Batch, folded_trace
from pyro_vae.traces.sites import Program
from pyro_vae.traces.trying import fits, trace_in_a_plate
from pyro_vae.traces.unmoved import (
    Known,
    decided,
    in_a_step,
    local_parameters,
    looks_in_the_store,
    modules_of,
    scope,
    unmoved,
)


class _Found(NamedTuple):
    """Facts found last, with the modules and the state that they were found for."""

    parts: tuple
    state: tuple | None
    known: Known


# By program: looking anew would cost as much as a step of training. In a variable that no graph guards.
_found = contextvars.ContextVar("found", default=weakref.WeakKeyDictionary())  # noqa: B039


def trace_of(
    program: Program,
    batch: Batch,
    num_samples: int,
    around: Callable[[Program], Program] = lambda program: program,
) -> poutine.Trace:
    """Trace the program with everything drawn ``num_samples`` times.

    Args:
        program: The program as the user gave it.
        batch: Its arguments.
        num_samples: Number of samples; sites have batch shape (samples, batch), whichever way it is run.
        around: Puts handlers around the program, which see such sites.
    """
    with contextlib.ExitStack() as stack:
        if scope.get() is not None or not in_a_step.get():
            stack.enter_context(unmoved(program))
        known = _known(program, batch)
        if not decided.get():
            stack.enter_context(local_parameters(in_the_store=known.in_the_store))
        way = trace_in_a_plate if known.takes_samples else folded_trace
        return way(program, batch, num_samples, around)


def takes_samples(program: Program, batch: Batch) -> bool:
    """Return whether the program may run in a plate of samples; raise ``ValueError`` if no way is right."""
    with unmoved(program):
        return _known(program, batch).takes_samples


def _known(program: Program, batch: Batch) -> Known:
    """Return facts about the program: in a step those found before, else those found in this state."""
    shapes = tuple(a.shape[1:] if isinstance(a, Tensor) else None for a in batch)
    unmoved_now = scope.get()
    key = (id(program), shapes)
    if unmoved_now is not None and key in unmoved_now.known:
        return unmoved_now.known[key]
    owner, name = (program.__self__, program.__func__) if inspect.ismethod(program) else (program, None)
    parts = tuple(map(id, owner.modules())) if isinstance(owner, nn.Module) else ()
    try:
        found = _found.get().setdefault(owner, {})
    except TypeError:  # an object that cannot be a key
        found = {}
    last = found.get((name, shapes))
    if last is not None and last.parts == parts and (in_a_step.get() or get_proxy_mode() is not None):
        return last.known
    modules = modules_of(program)
    # Of a function nobody knows what else it reads; it is tried anew.
    state = tuple(map(_state, modules)) if isinstance(owner, nn.Module) else None
    if last is not None and state is not None and last.state == state:
        known = last.known
    else:
        in_the_store = any(map(looks_in_the_store, modules))
        with contextlib.ExitStack() as stack:
            if not decided.get():
                stack.enter_context(local_parameters(in_the_store=in_the_store))
            known = Known(in_the_store, not batch or fits(program, batch))
        found[name, shapes] = _Found(parts, state, known)
    if unmoved_now is not None:
        unmoved_now.known[key] = known
    return known


def _state(module: nn.Module) -> tuple:
    """Return all that decides how a network behaves: code, attributes, and whether its tensors moved."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return (
        id(module),
        getattr(type(module), "forward", None),
        tuple((k, _identity(v)) for k, v in vars(module).items() if k != "training"),
        tuple((id(t), None if t.is_inference() else t._version) for t in tensors if t is not None),
    )


def _identity(value: Any) -> Any:
    """Return the value if it is plain; else its identity, and those of the values in it."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        value = (*value, *value.values())
    inside = value if isinstance(value, list | tuple) else ()
    return id(value) if not inside else tuple(v if isinstance(v, PLAIN) else id(v) for v in inside)
