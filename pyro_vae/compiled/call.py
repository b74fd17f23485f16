"""Arguments of a call of a compiled function, and what a graph for such arguments is good for."""

import argparse
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.compiled.private import pytree

_PLAIN = (bool, int, float, str, type(None), np.generic, torch.dtype, torch.device)
_OPEN = (types.SimpleNamespace, argparse.Namespace)  # in which users keep numbers, tensors and functions


class Call(NamedTuple):
    """Arguments of a call, and as leaves of their tree; ``key`` is what a graph for them is good for."""

    args: tuple
    kwargs: dict[str, Any]
    leaves: Sequence[Any]
    spec: pytree.TreeSpec | None
    key: tuple

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among them."""
        return [leaf.contiguous() for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def objects(self) -> list[object]:
        """Objects among them in which users keep things."""
        return [leaf for leaf in self.leaves if isinstance(leaf, _OPEN)]

    @property
    def containers(self) -> list[object]:
        """Dictionaries, lists and tuples among them."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, dict | list | tuple)]

    def run(self, function: Callable[..., Any]) -> Any:
        """Return ``function`` of them."""
        return function(*self.args, **self.kwargs)

    def run_on(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Return ``function`` of other tensors in their place."""
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = (filled, {}) if self.spec is None else pytree.tree_unflatten(filled, self.spec)
        return function(*args, **kwargs)

    def unfit(self, differentiate: bool) -> str | None:
        """Return why there is no graph for one of them, if so."""
        return next(filter(None, (_unfit(leaf, differentiate) for leaf in self.leaves)), None)


def key_of(leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> tuple:
    """Return what a graph is good for: shapes and types of tensors, and other values."""
    described = [
        (*(t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg(), t.is_conj()), t.is_contiguous())
        if isinstance(t, Tensor) and t.layout is torch.strided
        else (id(t) if isinstance(t, (Tensor, *_OPEN)) else repr(t))
        for t in leaves
    ]
    tensors = [id(t) for t in leaves if isinstance(t, Tensor)]
    if len(set(tensors)) < len(tensors):  # one that is there twice
        described.append(str(list(map(tensors.index, tensors))))
    described += [repr(vars(t)) for t in leaves if isinstance(t, Tensor) and vars(t)]  # what users note there
    return (torch.get_default_dtype(), spec, *described)


def shapes_in(key: tuple) -> list[tuple]:
    """Return what a key says of tensors."""
    return [part for part in key if isinstance(part, tuple)]


def _unfit(leaf: object, differentiate: bool) -> str | None:
    if not isinstance(leaf, (Tensor, *_PLAIN, *_OPEN)):
        return f"is a {type(leaf).__name__}: pass tensors and plain values"
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_neg() or leaf.is_conj():
            return "is a sparse, nested, negated or conjugated view: pass a dense tensor"
        if leaf.requires_grad and differentiate:
            return "requires gradients: make it an nn.Parameter of the model or the guide"
    return None
