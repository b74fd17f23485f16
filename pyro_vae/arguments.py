"""Rules of arguments, read from annotations and checked where things are made.

:func:`checked` looks at the arguments of a constructor or function before it runs. Numbers have their range
in the annotation (:data:`Count`), so that what ``help`` shows is what is checked.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from jaxtyping import AbstractArray
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.errors import unknown

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless it is ``open``; finite where there is an end."""

    low: float | int = -math.inf
    high: float | int = math.inf
    open: bool = False

    def __contains__(self, value: Any) -> bool:
        if self.open:
            return self.low < value < self.high
        return self.low <= value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.high == math.inf and self.low == -math.inf:
            return "finite"
        if self.high == math.inf:
            if self.open:
                return "positive and finite" if self.low == 0 else f"above {self.low:g} and finite"
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


Count = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
Share = Annotated[float, Range(0, 1, open=True)]
Weight = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]


def checked(function: F) -> F:
    """Look at what a function is given: an error of :func:`check` unless it is what the annotations say."""
    signature = inspect.signature(function)
    annotated = {n: p for n, p in signature.parameters.items() if p.annotation is not p.empty}

    @functools.wraps(function)
    def look_first(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # missing or unknown: Python's words name the function and the argument
            return function(*args, **kwargs)
        for name, parameter in annotated.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                items = bound.arguments.get(name, ())
                if name == "batch":
                    check_arguments(items)
                for number, item in enumerate(items):
                    check(f"argument {number} of the programs", item, parameter.annotation)
            elif parameter.kind is not parameter.VAR_KEYWORD and name in bound.arguments:
                value = bound.arguments[name]
                if value is not parameter.default:
                    check(name, value, parameter.annotation)
        return function(*args, **kwargs)

    # The checks of types in the tests are inside, and are to stay there when they are unwrapped.
    look_first.__signature__ = signature  # type: ignore[attr-defined]
    del look_first.__wrapped__
    return look_first


def check_fields(settings: Any) -> None:
    """Look at the fields of a dataclass: an error of :func:`check` unless they are what it says."""
    for field in dataclasses.fields(settings):
        check(field.name, getattr(settings, field.name), field.type)


def check(name: str, value: Any, annotation: Any) -> None:
    """Raise unless ``value`` is what the annotation says.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is a number out of range, or none of the names that there are.
    """
    if name in ("model", "guide"):
        _check_program(name, value)
    options = list(_options(annotation))
    misfits = [_misfit(name, value, option) for option in options]
    if None in misfits:
        return
    for misfit in misfits:
        if isinstance(misfit, Exception):
            raise misfit
    wanted = " or ".join(dict.fromkeys(misfits))
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an instance, as in {name}={EXAMPLES.get(name, f'{value.__name__}(...)')}, not "
            f"the class {value.__name__} itself"
        )
    if wanted == "a tensor":
        raise TypeError(f"{name} is {found(value)}, but must be a tensor{_advice(value, options)}")
    raise TypeError(f"{name} must be {wanted}, not {found(value)}{_advice(value, options)}")


def found(value: Any) -> str:
    """Say what a value is, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | bytes | numbers.Number | None):
        return repr(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        return f"a tensor of a single number, {value.item() if not value.is_meta else 'of no value'}"
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, Distribution):
        return f"the distribution {type(value).__name__}"
    return f"a {type(value).__name__}"


EXAMPLES = {
    "prior": "StandardNormal(5)",
    "family": "Bernoulli()",
    "posterior": "DiagNormal()",
    "encoder": "MLP(784, 10)",
    "decoder": "MLP(5, 784)",
    "net": "MLP(784, 10)",
    "likelihood": "Conditional(MLP(5, 784), Bernoulli())",
    "codebook": "Codebook(64, 8)",
    "bound": "Trace_ELBO()",
    "loss": "Trace_ELBO()",
    "dtype": "torch.float64",
}
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}


def _options(annotation: Any) -> Iterator[Any]:
    """The parts of a union."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _options(part)
    else:
        yield annotation


def _misfit(name: str, value: Any, option: Any) -> str | Exception | None:
    """Say what is wanted instead, or return an error that says more; None if the value fits."""
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Annotated:
        kind, limits = arguments
        if (misfit := _misfit(name, value, kind)) is not None:
            return misfit if isinstance(misfit, Exception) else f"{misfit}, {limits}"
        return None if value in limits else ValueError(f"{name} must be {limits}, not {value}")
    if option is None or option is types.NoneType:
        return None if value is None else "None"
    if option is Any:
        return None
    if option is float and isinstance(value, numbers.Real) and math.isnan(value):
        return ValueError(f"{name} must be a number, not {value}")
    if option in _KINDS:
        return None if _is_plain(value, option) else _KINDS[option]
    if origin is typing.Literal:
        if value in arguments:
            return None
        return ValueError(unknown(name, value, arguments)) if isinstance(value, str) else repr(arguments[0])
    if origin is collections.abc.Callable or option is collections.abc.Callable:
        return None if callable(value) else "a function"
    if option is Tensor or (isinstance(option, type) and issubclass(option, AbstractArray)):
        return None if is_plain_tensor(value) else "a tensor"
    if origin in (collections.abc.Sequence, list, tuple):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return f"a list of {_words(arguments[0])}" if arguments else "a list"
        for number, item in enumerate(value if arguments else ()):
            check(f"{name}[{number}]", item, arguments[0])
        return None
    if origin in (dict, collections.abc.Mapping) and isinstance(value, collections.abc.Mapping):
        for key, item in value.items():
            check(f"{name}[{key!r}]", item, arguments[1])
        return None
    kind = origin or option
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return None if isinstance(value, kind) else _words(kind, name)
    return None  # anything


def _words(kind: Any, name: str = "") -> str:
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if kind in _KINDS:
        return f"{_KINDS[kind].removeprefix('a ')}s" if not name else _KINDS[kind]
    noun = "module" if kind is nn.Module else getattr(kind, "__name__", str(kind))
    article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"{article} {noun}" + (f", such as {EXAMPLES[name]}" if name in EXAMPLES else "")


def _is_plain(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, os.PathLike if kind is Path else str)


def is_plain_tensor(value: Any) -> bool:
    """Return True for a tensor of numbers that all are there: dense, without a mask, with values."""
    if not isinstance(value, Tensor) or torch.masked.is_masked_tensor(value):
        return False
    return value.layout is torch.strided and not value.is_nested and not value.is_quantized


def check_arguments(batch: Sequence[Any]) -> None:
    """Raise ``TypeError`` unless these can be a program's arguments, of which the first is the data."""
    for number, value in enumerate(batch):
        if isinstance(value, Tensor | np.ma.MaskedArray) or number == 0:
            check(f"argument {number} of the programs", value, Tensor)
        if number == 0 and value.dim() == 0:
            raise TypeError(
                f"argument 0 of the programs is {found(value)}, but must be a tensor with one row a datum"
            )
    if not batch:
        raise TypeError("the programs need arguments, of which the first is the data")


def check_device(device: Any) -> torch.device:
    """The device, if this machine has it.

    Raises:
        TypeError: If it is no device.
        ValueError: If there is none of this name.
    """
    if isinstance(device, torch.dtype):
        raise TypeError(
            f"device must be one such as 'cpu' or 'cuda', not {device}: data get their dtype when they are "
            "made, as in from_array(x, dtype=torch.float64)"
        )
    check("device", device, str | torch.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"device {str(device)!r} cannot be used: this machine has {', '.join(there)}"
        ) from error
    return torch.device(device)


def _check_program(name: str, value: Any) -> None:
    if isinstance(value, type | Distribution) or not callable(value):
        raise TypeError(
            f"{name} must be a Pyro program, as in model, guide = vae(784, 10), not {found(value)}"
            + (f": give model and guide one by one, {name}=..." * isinstance(value, tuple))
        )


def _advice(value: Any, options: Sequence[Any]) -> str:
    """Say what to do about the commonest mistakes."""
    if isinstance(value, Distribution) and nn.Module in options:
        return (
            ": a prior is a module whose forward() returns the distribution; for other families "
            "Unconditional(Laplace(), 5)"
        )
    if not any(o is Tensor or (isinstance(o, type) and issubclass(o, AbstractArray)) for o in options):
        return ""
    if isinstance(value, np.ma.MaskedArray) or torch.masked.is_masked_tensor(value):
        return (
            ": where it is masked a number is missing. from_array(x, missing=True) makes nan of it, which "
            "vae(..., missing=True) takes"
        )
    if isinstance(value, Tensor):
        return " that is neither sparse, nested nor quantised: give x.to_dense()"
    if hasattr(value, "x") or hasattr(value, "train"):
        return ": give its numbers, such as dataset.test.x"
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        return ": torch.as_tensor makes one of arrays and lists, from_array a data set of tables"
    return ""
