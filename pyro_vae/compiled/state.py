"""Everything that a Pyro program depends on besides its arguments, compared at every call with what it was.

A captured graph stands for a program only while this stays what it was. Tensors are read anew at every call,
so their values may change; a *replaced* tensor, module, function or number, another memory layout, a hook,
``train()``/``eval()``, ``requires_grad`` are noticed, mostly by identity, which takes some 10 µs.
"""

import contextlib
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pyro_vae.compiled import private
from pyro_vae.compiled.survey import MAX_CONTENT, Survey
from pyro_vae.compiled.things import MISSING, content, same, words

_STORE = "Pyro's parameter store"


class CaptureError(Exception):
    """Program that has no graph: why, and where."""


class ProgramState:
    """Tensors that programs read, and all that decides their path.

    Args:
        survey: What they reach.
        params: Names of the parameters in Pyro's store that they use.
        volatile: What libraries set anew in every run: whose content, by ``id``, and under which key.

    Attributes:
        names: Every tensor that is kept in a module or in Pyro's store, with a name for messages.
    """

    def __init__(
        self, survey: Survey, params: Iterable[str], volatile: Iterable[tuple[int, object]] = ()
    ) -> None:
        self._survey = survey
        self._volatile = set(volatile)
        self._found: list[Tensor] = []
        store = private.stored()
        self._stored_names = [name for name in params if name in store]
        self._slots: list[tuple[MutableMapping, str]] = [(store, name) for name in self._stored_names]
        self.names: dict[Tensor, str] = {store[name]: f"{name!r} of the store" for _, name in self._slots}
        paths: dict[int, str] = {}
        for module in survey.modules:
            for path, inner in module.named_modules():
                paths[id(inner)] = max(path, paths.get(id(inner), ""), key=len)
        for module in survey.modules:
            owner = f"{type(module).__name__} {paths[id(module)]}".rstrip()
            for holder in (vars(module)[name] for name in private.PARAMETERS):
                for name, value in holder.items():
                    if value is not None:
                        self._slots.append((holder, name))
                        self.names.setdefault(value, f"{name} of {owner}")
        self.remember()

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors kept in modules and in the store, each once."""
        return list(self.names)

    def remember(self) -> None:
        """Take the present values as those to compare with."""
        survey, store = self._survey, private.stored()
        places = [p for p in survey.places() if (id(p.mapping), p.key) not in self._volatile]
        self._known = {(id(place.mapping), place.key) for place in places}
        watched: list[tuple[Callable, Any, str]] = [(partial(_asked, private.stored), None, _STORE)]
        watched += [(place.mapping.get, place.key, place.label) for place in places]
        watched += [(store.get, name, f"{name!r} of the store") for name in self._stored_names]
        watched += [(partial(_variable, c), None, "an enclosing function's variable") for c in survey.cells]
        watched += [(partial(getattr, o), key, f"{key} of {words(o)}") for o, key in survey.attributes]
        watched += [(partial(_asked, ask), None, label) for label, ask in survey.asked]
        self._getters = [(get, key) for get, key, _ in watched]
        self._labels = [label for _, _, label in watched]
        contents = {content for content, _ in self._volatile}
        held = [h for h in survey.holders if h.by_name or id(h.content) not in contents]
        # A counter of torch's says whether hooks were added.
        self._holders = [h for h in held if h.content or not h.holds_hooks]
        self._no_hooks = [h for h in held if h.holds_hooks and not h.content]
        self._contents = [holder.content for holder in self._holders]
        few = [holder for holder in self._holders if 0 < len(holder.content) <= MAX_CONTENT]
        inside = [holder.content for holder in few if not holder.by_name]
        self._iterators = [held.values if isinstance(held, dict) else held.__iter__ for held in inside]
        # A name that was not there may be what a program asks for.
        keyed = [h for h in few if isinstance(h.content, dict) and (h.is_users or not h.by_name)]
        self._mappings = [holder.content for holder in keyed]
        self._held_keys = [(holder.content, set(holder.content)) for holder in keyed if not holder.by_name]
        self._arrays = [(array, array.tobytes()) for array in survey.arrays]
        self._layouts = [_layout(tensor) for tensor in (*self.names, *self._found)]
        self._hooked = self.hook()
        self._take(self._read())

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Also compare these, which a graph takes from elsewhere."""
        self._found = list(tensors)
        self.remember()

    def _read(self) -> tuple[list[int], list, list, list]:
        """Return lengths and entries of containers, values under names, and names that there are."""
        return (
            list(map(len, self._contents)),
            [item for iterate in self._iterators for item in iterate()],
            [get(key, MISSING) for get, key in self._getters],
            list(itertools.chain.from_iterable(self._mappings)),
        )

    def _take(self, read: tuple[list[int], list, list, list]) -> None:
        self._then = read
        tensors = [*self.tensors, *self._found]
        sizes, strides = ([list(part(t)) for t in tensors] for part in (Tensor.size, Tensor.stride))
        guards = private.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._is_as_guarded = partial(guards.check, *tensors)
        self._num_hooks = RemovableHandle.next_id

    def changed(self) -> tuple[str, bool] | None:
        """Return what is no longer what it was, in words, and whether it is a tensor that was replaced."""
        now = lengths, items, values, keys = self._read()
        old_lengths, old_items, old_values, old_keys = self._then
        if (
            all(map(operator.is_, values, old_values))
            and lengths == old_lengths
            and all(map(operator.is_, items, old_items))
            and len(keys) == len(old_keys)
            and all(map(operator.is_, keys, old_keys))
            and self._is_as_guarded()
            and RemovableHandle.next_id == self._num_hooks
            and all(array.tobytes() == saved for array, saved in self._arrays)
        ):
            return None
        change = self._first_change(now)
        if change is None:  # equal, but not identical
            self._take(now)
        return change

    def _first_change(self, now: tuple[list[int], list, list, list]) -> tuple[str, bool] | None:
        (lengths, items, values, _), (old_lengths, old_items, old_values, _) = now, self._then
        for value, then, label in zip(values, old_values, self._labels, strict=True):
            if not same(value, then):
                is_replaced = isinstance(then, Tensor) or label is _STORE
                return f"{label}: {words(then)} -> {words(value)}", is_replaced
        for place in self._survey.places():
            key = (id(place.mapping), place.key)
            if key not in self._known and key not in self._volatile:
                return f"{place.label} is new", False
        for holder, length, then in zip(self._holders, lengths, old_lengths, strict=True):
            if length != then and not holder.by_name:
                return f"{holder.label}: {then} entries -> {length}", False
        # Of attributes, what is read was looked at above.
        if any(mapping.keys() != then for mapping, then in self._held_keys):
            return "keys of a dict", False
        for item, then in zip(items, old_items, strict=True):
            if not same(item, then):
                return f"an entry of a container: {words(then)} -> {words(item)}", isinstance(then, Tensor)
        for tensor, then in zip((*self.names, *self._found), self._layouts, strict=True):
            if _layout(tensor) != then:
                name = self.names.get(tensor, "a tensor that is no parameter or buffer")
                return f"type, layout or requires_grad of {name}", False
        if self.hook() != self._hooked or any(holder.content for holder in self._no_hooks):
            return "a hook was added", False
        for array, saved in self._arrays:
            if array.tobytes() != saved:
                return f"values of an array of NumPy of shape {array.shape}", False
        return None

    def hook(self) -> str | None:
        """Return a tensor whose gradient somebody looks at or changes, in words."""
        return next((self.names[tensor] for tensor in self.names if private.has_gradient_hook(tensor)), None)

    @contextlib.contextmanager
    def swapped(self, replacement: dict[Tensor, Tensor]) -> Iterator[None]:
        """Let the programs find these tensors in place of their own."""
        slots = [(holder, name, holder[name]) for holder, name in self._slots]
        try:
            for holder, name, own in slots:
                holder[name] = replacement[own]
            yield
        finally:
            for holder, name, own in slots:
                holder[name] = own


def _layout(tensor: Tensor) -> tuple:
    return tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Raise ``CaptureError`` in place of what objects raise that are looked at: any may be there."""
    try:
        yield
    except Exception as error:
        raise CaptureError(
            f"what it reads cannot be followed ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def readable(roots: Sequence[object], ran: Sequence[tuple[types.CodeType, dict]] = ()) -> Survey:
    """Return what programs reach; raise ``CaptureError`` if it cannot be followed or compared."""
    with following():
        survey = Survey(roots, ran)
    if survey.refused is not None:
        raise CaptureError(survey.refused)
    return survey


def _variable(cell: types.CellType, _: None, default: object) -> object:
    return content(cell, default)


def _asked(ask: Callable[[], object], _: None, default: object) -> object:
    return ask()
