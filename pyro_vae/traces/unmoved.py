"""Contexts that leave a pair as it was, and that say where parameters are looked for.

All but a step of training is done in evaluation mode and leaves parameters, buffers and modes as they were
(:func:`unmoved`). In a step (:func:`training_step`) modes are those that the user set.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.parameter import is_lazy

from pyro_vae.compiled import Survey
from pyro_vae.traces.sites import Program


class Known(NamedTuple):
    """Facts about a program.

    Attributes:
        in_the_store: It reaches a ``PyroModule`` that was made for Pyro's parameter store.
        takes_samples: It may run in a plate of samples.
    """

    in_the_store: bool
    takes_samples: bool


class Scope:
    """Programs that are unmoved at present, and facts about them."""

    def __init__(self, programs: tuple[Program, ...]) -> None:
        self.programs = programs
        self.known: dict[tuple, Known] = {}

    def covers(self, programs: tuple[Program, ...]) -> bool:
        """Return whether all of these are among them."""
        return all(any(program is one for one in self.programs) for program in programs)


scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("scope", default=None)
in_a_step = contextvars.ContextVar("in_a_step", default=False)
decided = contextvars.ContextVar("decided", default=False)  # where parameters are looked for


def modules_of(*programs: Program | None) -> list[nn.Module]:
    """Return all modules that programs can reach: in attributes, handlers, closures, ``pyro.module``."""
    return list({id(m): m for root in Survey(programs).modules for m in root.modules()}.values())


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def training_step() -> contextlib.AbstractContextManager[None]:
    """Mark a step of training: modes are as the user set them, and buffers may move."""
    return _set(in_a_step, True)


@contextlib.contextmanager
def unmoved(*programs: Program | None) -> Iterator[None]:
    """Set evaluation mode; afterwards modes and tensors of all modules that programs reach are as they were.

    Raises:
        ValueError: At the end, if a program has changed one of its parameters, which is put back as well.
    """
    found = tuple(program for program in programs if program is not None)
    around = scope.get()
    if around is not None and around.covers(found):
        yield
        return
    modules = modules_of(*found)
    modes = [module.training for module in modules]
    before = _Tensors(modules)
    try:
        for module in modules:
            module.training = False
        with _set(scope, Scope(found)):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        before.restore()
    before.check()


class _Tensors:
    """Buffers and other tensors of modules, to be put back, and parameters, which must not have changed."""

    def __init__(self, modules: list[nn.Module]) -> None:
        if get_proxy_mode() is not None:  # a graph is being made; around its calls this is done
            modules = []
        self._held, names = [], {}
        for module in modules:
            names |= {t: f"{name} of {type(module).__name__}" for name, t in module._parameters.items()}
            for holder in module._parameters, module._buffers, vars(module):
                held = {name: value for name, value in holder.items() if _is_kept(value)}
                self._held.append((holder, held))
        tensors = {tensor for _, held in self._held for tensor in held.values()}
        self._values = [(tensor, tensor.detach().clone(), names.get(tensor)) for tensor in tensors]
        self._changed: str | None = None

    @torch.no_grad()
    def restore(self) -> None:
        for holder, held in self._held:
            for name, tensor in held.items():
                if (now := holder.get(name)) is not tensor:
                    if now is not None and isinstance(tensor, nn.Parameter):
                        self._changed = f"{name} of a network"
                    holder[name] = tensor
        for tensor, value, name in self._values:
            if not torch.equal(tensor, value):
                if name is not None and not bool(((tensor == value) | (value != value)).all()):
                    self._changed = name
                tensor.copy_(value)

    def check(self) -> None:
        if self._changed is not None:
            raise ValueError(
                f"running the programs in evaluation mode changes their parameter {self._changed}: an "
                "estimate must not move what it judges, so it is as it was. Change it in training mode only "
                "(if self.training), or make it a buffer, which is put back"
            )


def _is_kept(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not (is_lazy(value) or value.is_inference() or value.is_nested)
    )


# ------------------------------------------------------------------------------------ parameters


def parameters_in_the_store() -> contextlib.AbstractContextManager[None]:
    """Look for parameters in Pyro's store, as ``pyro.infer.SVI`` expects of an objective."""
    return _set(decided, True)


def made_for_the_store(*programs: object) -> bool:
    """Return whether one reaches a ``PyroModule`` that looks for its parameters in Pyro's store.

    Pyro decides that when the module is made (``pyro.settings.set(module_local_params=True)`` before makes it
    local); it works in no other way.
    """
    return any(map(looks_in_the_store, modules_of(*programs)))


def looks_in_the_store(module: nn.Module) -> bool:
    """Return whether it is a ``PyroModule`` that was made for the store."""
    # _pyro_context is Pyro's own, as of 1.9.2: with local parameters it has param_state.
    return isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state")


@contextlib.contextmanager
def local_parameters(*programs: object, in_the_store: bool | None = None) -> Iterator[None]:
    """Leave parameters to their modules, not to Pyro's store.

    Programs that reach a ``PyroModule`` that was :func:`made_for_the_store` go on in the store.

    Args:
        *programs: Model, guide, objective.
        in_the_store: Whether one was made for the store, if that is known.
    """
    if in_the_store is None:
        in_the_store = made_for_the_store(*programs)
    with _set(decided, True), pyro.settings.context(module_local_params=not in_the_store):
        yield
