"""What a Pyro program depends on besides its arguments, compared at every call with what it was.

A captured graph stands for a program only while this stays what it was. Tensors are read anew at every call,
so their values may change; a *replaced* tensor, module, function or number, another memory layout, a hook,
``train()``/``eval()``, ``requires_grad`` are noticed, mostly by identity, which takes some 10 µs.
"""

import collections
import contextlib
import operator
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.utils.hooks import RemovableHandle

from pyro_vae.compiled.survey import MAX_CONTENT, PLAIN, Holder, Survey, content

T = TypeVar("T")

_MISSING = object()
_MAX_COPIED = 1_000_000
_STORE = "Pyro's parameter store"


class CaptureError(Exception):
    """A program that has no graph: why, and where."""


class ProgramState:
    """The tensors that programs read, and all that decides their path.

    Args:
        survey: What they reach.
        params: Names of the parameters in Pyro's store that they use.

    Attributes:
        names: Every tensor that is kept in a module or in Pyro's store, with a name for messages.
        stored: Those in the store.
    """

    def __init__(self, survey: Survey, params: Iterable[str]) -> None:
        self._survey = survey
        self._volatile: set[tuple[int, object]] = set()  # what libraries set anew in every run
        self._store = pyro.get_param_store()
        store = self._store._params
        self._stored_names = [name for name in params if name in store]
        self._slots: list[tuple[MutableMapping, str]] = [(store, name) for name in self._stored_names]
        self.names: dict[Tensor, str] = {store[name]: f"{name!r} of the store" for _, name in self._slots}
        self.stored = set(self.names)
        paths: dict[int, str] = {}
        for module in survey.modules:
            for path, inner in module.named_modules():
                paths[id(inner)] = max(path, paths.get(id(inner), ""), key=len)
        for module in survey.modules:
            owner = f"{type(module).__name__} {paths[id(module)]}".rstrip()
            for holder in module._parameters, module._buffers:
                for name, value in holder.items():
                    if value is not None:
                        self._slots.append((holder, name))
                        self.names.setdefault(value, f"{name} of {owner}")
        self.remember()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors kept in modules and in the store, each once."""
        return list(self.names)

    def remember(self) -> None:
        """Take the present values as those to compare with."""
        survey = self._survey
        places = [p for p in survey.places() if (id(p.mapping), p.key) not in self._volatile]
        self._known = {(id(place.mapping), place.key) for place in places}
        watched = [(vars(self._store).get, "_params", _STORE)]
        watched += [(place.mapping.get, place.key, place.label) for place in places]
        watched += [(self._store._params.get, name, f"{name!r} of the store") for name in self._stored_names]
        watched += [(partial(_variable, c), None, "an enclosing function's variable") for c in survey.cells]
        watched += [(partial(getattr, o), key, f"{key} of {_words(o)}") for o, key in survey.attributes]
        self._getters = [(get, key) for get, key, _ in watched]
        self._labels = [label for _, _, label in watched]
        self._values = [get(key, _MISSING) for get, key in self._getters]
        held = [h for h in survey.holders if (id(h.content), None) not in self._volatile]
        # A counter of torch's says whether hooks were added.
        self._holders = [h for h in held if h.content or not h.holds_hooks]
        self._no_hooks = [h for h in held if h.holds_hooks and not h.content]
        self._contents = [holder.content for holder in self._holders]
        self._lengths = list(map(len, self._contents))
        inside = [h.content for h in self._holders if not h.by_name and 0 < len(h.content) <= MAX_CONTENT]
        self._iterators = [held.values if isinstance(held, dict) else held.__iter__ for held in inside]
        self._items = [item for iterate in self._iterators for item in iterate()]
        arrays = [v for v in (*self._values, *self._items) if isinstance(v, np.ndarray) and v.size <= 1_000]
        self._arrays = [(array, array.tobytes()) for array in arrays]
        self._layouts = [_layout(tensor) for tensor in self.names]
        self._hooked = self.hook()
        self._guard()

    def _guard(self) -> None:
        tensors = self.tensors
        self._is_as_guarded = partial(
            TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
                dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
            ).check,
            *tensors,
        )
        self._num_hooks = RemovableHandle.next_id

    def changed(self) -> tuple[str, bool] | None:
        """What is no longer what it was, in words, and whether it is a tensor that was replaced."""
        values = [get(key, _MISSING) for get, key in self._getters]
        items = [item for iterate in self._iterators for item in iterate()]
        lengths = list(map(len, self._contents))
        if (
            all(map(operator.is_, values, self._values))
            and lengths == self._lengths
            and all(map(operator.is_, items, self._items))
            and self._is_as_guarded()
            and RemovableHandle.next_id == self._num_hooks
            and all(array.tobytes() == saved for array, saved in self._arrays)
        ):
            return None
        for now, then, label in zip(values, self._values, self._labels, strict=True):
            if not _same(now, then):
                is_replaced = isinstance(then, Tensor) or label is _STORE
                return f"{label}: {_words(then)} -> {_words(now)}", is_replaced
        for place in self._survey.places():
            key = (id(place.mapping), place.key)
            if key not in self._known and key not in self._volatile:
                return f"{place.label} is new", False
        for holder, now, then in zip(self._holders, lengths, self._lengths, strict=True):
            if now != then and not holder.by_name:
                return f"{holder.label}: {then} entries -> {now}", False
        for now, then in zip(items, self._items, strict=True):
            if not _same(now, then):
                return f"an entry of a container: {_words(then)} -> {_words(now)}", isinstance(then, Tensor)
        for tensor, then in zip(self.names, self._layouts, strict=True):
            if _layout(tensor) != then:
                return f"type, layout or requires_grad of {self.names[tensor]}", False
        if self.hook() != self._hooked or any(holder.content for holder in self._no_hooks):
            return "a hook was added", False
        for array, saved in self._arrays:
            if array.tobytes() != saved:
                return f"values of an array of NumPy of shape {array.shape}", False
        self._values, self._items, self._lengths = values, items, lengths  # equal, but not identical
        self._guard()
        return None

    def hook(self) -> str | None:
        """A tensor whose gradient somebody looks at or changes."""
        hooked = (t for t in self.names if t._backward_hooks or t._post_accumulate_grad_hooks)
        return next((self.names[tensor] for tensor in hooked), None)

    def swapped(self, replacement: dict[Tensor, Tensor]) -> "_Swapped":
        """A context in which the programs find these tensors in place of their own."""
        return _Swapped(self._slots, replacement)

    def snapshot(self) -> "Snapshot":
        """What the programs could change."""
        return Snapshot(self._survey)

    def settle(self, before: "Snapshot") -> str | None:
        """What of the user's a run has changed, in words; what libraries change is no longer compared."""
        for label, holder, key in before.differences():
            if holder is None or holder.is_users:
                return label
            self._volatile.add((id(holder.content), key if holder.by_name else None))
        self.remember()
        return None

    @classmethod
    @contextlib.contextmanager
    def found_by(cls, roots: tuple[object, ...], run: Callable[[], T]) -> Iterator["tuple[ProgramState, T]"]:
        """The state of programs, found by running them twice, and what the second run returned.

        Buffers that the runs change are put back when the context ends: autograd may need them before.

        Args:
            roots: Model, guide, objective: modules, functions, bound methods, ELBO objects.
            run: Runs the programs, eagerly.

        Raises:
            CaptureError: If a run changes more than buffers, or reads what no graph can.
        """
        before = Snapshot(_readable(roots))
        called: list[nn.Module] = []

        def note(module: nn.Module, _: object) -> None:
            called.append(module)
            before.keep(module.buffers())

        try:
            hook = nn.modules.module.register_module_forward_pre_hook(note)
            try:
                with poutine.trace(param_only=True) as params:
                    run()
            finally:
                hook.remove()
            end = torch.get_rng_state()
            state = cls(_readable((*roots, *called)), params.trace.param_nodes)
            middle = state.snapshot()
            torch.rand(1)  # the second run starts with other random numbers
            result = run()
            if words := state.settle(middle):
                raise CaptureError(
                    f"running it changes {words}, which a graph would not do: make it a buffer and change "
                    "that in place, or let pyro.deterministic keep it"
                )
            if torch.get_rng_state().equal(end):
                raise CaptureError("it seeds the random generator, and draws the same numbers again")
        except BaseException:
            before.restore()
            raise
        try:
            yield state, result
        finally:
            before.restore_tensors()


class Snapshot:
    """What a survey found, to see what a run changes, and to put it back."""

    def __init__(self, survey: Survey) -> None:
        self._holders = [(holder, _copied(holder.content)) for holder in survey.holders]
        self._cells = [(cell, content(cell, _MISSING)) for cell in survey.cells]
        self._globals = [(place, place.mapping[place.key]) for place in survey.globals.values()]
        self._tensors: dict[Tensor, Tensor] = {}
        for module in survey.modules:
            self.keep(module._buffers.values())
        found = [value for _, value in (*self._cells, *self._globals)]
        for _, kept in self._holders:
            found += kept.values() if isinstance(kept, dict) else kept
        self.keep(v for v in found if isinstance(v, Tensor) and v.numel() <= _MAX_COPIED)

    def keep(self, tensors: Iterable[Tensor | None]) -> None:
        """Remember the values of tensors that do not require gradients."""
        for tensor in tensors:
            if tensor is None or tensor.requires_grad or tensor.is_inference() or tensor in self._tensors:
                continue
            self._tensors[tensor] = tensor.detach().clone()

    def differences(self) -> Iterator[tuple[str, Holder | None, object]]:
        """What was set to something else: in words, and in which holder under which key."""
        for cell, then in self._cells:
            if not _same(content(cell, _MISSING), then):
                yield "a variable of an enclosing function", None, None
        for place, then in self._globals:
            if not _same(place.mapping.get(place.key, _MISSING), then):
                yield place.label, None, None
        for holder, then in self._holders:
            now = _copied(holder.content)
            if not isinstance(now, dict):
                if len(now) != len(then) or not all(map(_same, now, then)):
                    yield holder.label, holder, None
                continue
            for key in {**then, **now}:
                if not _same(now.get(key, _MISSING), then.get(key, _MISSING)):
                    yield f"{key} of {holder.label}", holder, key

    def restore(self) -> None:
        """Put everything back."""
        for cell, value in self._cells:
            if value is not _MISSING:
                cell.cell_contents = value
        for place, value in self._globals:
            place.mapping[place.key] = value
        for holder, value in self._holders:
            now = holder.content
            if isinstance(now, types.MappingProxyType) or _is_as(now, value):
                continue
            if isinstance(now, list):
                now[:] = value
            else:
                now.clear()
                (now.extend if isinstance(now, collections.deque) else now.update)(value)
        self.restore_tensors()

    @torch.no_grad()
    def restore_tensors(self) -> None:
        """Put values of tensors back."""
        for tensor, value in self._tensors.items():
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def _layout(tensor: Tensor) -> tuple:
    return tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class _Swapped:
    def __init__(self, slots: list[tuple[MutableMapping, str]], replacement: dict[Tensor, Tensor]) -> None:
        self._slots = [(holder, name, holder[name]) for holder, name in slots]
        self._replacement = replacement

    def __enter__(self) -> None:
        for holder, name, own in self._slots:
            holder[name] = self._replacement[own]

    def __exit__(self, *_: object) -> None:
        for holder, name, own in self._slots:
            holder[name] = own


def _readable(roots: Sequence[object]) -> Survey:
    try:
        survey = Survey(roots)
    except Exception as error:  # any object of the user's may be in it
        raise CaptureError(
            f"what it reads cannot be followed ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if survey.refused is not None:
        raise CaptureError(survey.refused)
    return survey


def _variable(cell: types.CellType, _: None, default: object) -> object:
    return content(cell, default)


def _copied(held: Any) -> dict | list:
    return dict(held) if isinstance(held, Mapping) else list(held)


def _is_as(held: Any, copy: dict | list) -> bool:
    now = _copied(held)
    if isinstance(now, dict):
        return list(now) == list(copy) and all(map(operator.is_, now.values(), copy.values()))
    return len(now) == len(copy) and all(map(operator.is_, now, copy))


def _same(now: object, then: object) -> bool:
    """Whether two values are one, or plain and equal."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, tuple | frozenset):
        return len(now) == len(then) and all(map(_same, now, then))
    return isinstance(now, PLAIN) and bool(now == then or (now != now and then != then))


def _words(value: object) -> str:
    return "nothing" if value is _MISSING else reprlib.repr(value).replace("\n", " ")
