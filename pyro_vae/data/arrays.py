"""Arrays, tables and lists of users as checked numpy arrays, split the same way everywhere."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import found
from pyro_vae.errors import UserError

SPLIT_SEED = 0
PARTS = ("train", "valid", "test")

Arrays = dict[str, tuple[np.ndarray, np.ndarray | None]]  # split name -> data, labels


_KEEP = "keep them by dtype=torch.float64 here and model.double(), guide.double()"


class DataError(UserError, ValueError):
    """Data that cannot be found, read or used; the message says what to do."""


def as_array(x: object, name: str, *, missing: bool = False, dtype: torch.dtype | None = None) -> np.ndarray:
    """A non-empty array of bytes or finite floats, first axis the data; DataError if it cannot be one.

    Floats may be nan if ``missing``, which they then are wherever ``x`` says that a number is missing: by a
    mask, None, NA, null or nan. They have the type ``dtype``, by default torch's default; whole numbers are
    not rounded to it.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    x = _numbers(x, name)
    if x.ndim < 2 or x.size == 0:
        raise DataError(
            f"{name} has shape {x.shape}; it needs at least two axes, (data, numbers of a datum...), and "
            "none of them empty"
        )
    if x.dtype == np.uint8 or ((x == 0) | (x == 1)).all():
        return x.astype(np.uint8)
    _check_finite(x, name, dtype, missing=missing)
    _check_whole(x, name, dtype)
    _check_spread(x, name, dtype)
    with np.errstate(over="ignore"):
        return x.astype(stored_type(dtype))


def stored_type(dtype: torch.dtype) -> type[np.floating]:
    """Type that floats are stored as: numpy has no shorter types that torch has."""
    return np.float64 if dtype == torch.float64 else np.float32


def _place(name: str, index: Iterable[object]) -> str:
    return f"{name}[{', '.join(map(str, index))}]"


def _check_finite(x: np.ndarray, name: str, dtype: torch.dtype, *, missing: bool) -> None:
    gaps = np.isnan(x)
    if gaps.all():
        raise DataError(f"all {x.size:,} numbers of {name} are missing (nan): there is nothing to learn from")
    if gaps.any() and not missing:
        raise DataError(
            f"{_place(name, np.argwhere(gaps)[0])} is nan, so missing, as {gaps.sum():,} of {x.size:,} "
            "numbers are: remove these data, fill them in, or learn from the rest: by missing=True here and "
            "vae(..., missing=True), on the command line by --missing"
        )
    with np.errstate(over="ignore"):
        bad = np.argwhere(np.abs(x) > torch.finfo(dtype).max)
        if len(bad):
            value = x[tuple(bad[0])].astype(stored_type(dtype))
            raise DataError(
                f"{_place(name, bad[0])} is {value} as a {torch.finfo(dtype).bits}-bit float ({len(bad):,} "
                f"of {x.size:,} numbers are not finite): remove these data, fill them in, or give them in a "
                "larger unit"
            )


def _check_whole(x: np.ndarray, name: str, dtype: torch.dtype) -> None:
    """Refuse to round whole numbers: counts, or columns of floats that hold nothing else."""
    if x.dtype == stored_type(dtype):
        return
    large = np.abs(x.astype(np.float64, copy=False)) >= largest_whole(dtype)
    if not large.any():
        return
    kept = x.astype(stored_type(dtype))
    if x.dtype.kind == "f":
        is_whole = (np.isnan(x) | (np.floor(x) == x)).all(0)
        rounded = large & is_whole & (kept.astype(x.dtype) != x) & (np.abs(x) <= largest_whole(torch.float64))
    else:
        info = np.iinfo(x.dtype)
        inside = (kept >= info.min) & (kept < float(info.max) + 1)  # or the way back would be undefined
        rounded = ~inside | (np.where(inside, kept, 0).astype(x.dtype) != x)
    if rounded.any():
        first = tuple(np.argwhere(rounded)[0])
        others = f", as it does {rounded.sum():,} of {x.size:,} numbers"
        raise _rounds(f"{_place(name, first)} is {int(x[first])}", others, dtype)


def _rounds(what: str, others: str = "", dtype: torch.dtype = torch.float64) -> DataError:
    bits, advice = torch.finfo(dtype).bits, "subtract an offset, or count in a larger unit"
    if dtype != torch.float64:
        advice = f"{_KEEP}; or divide them by a unit"
    return DataError(f"{what}, a whole number that a {bits}-bit float rounds{others}: {advice}")


def _check_spread(x: np.ndarray, name: str, dtype: torch.dtype) -> None:
    """Refuse columns that vary by little more than what they are rounded by."""
    if x.dtype.kind != "f" or x.dtype.itemsize <= np.dtype(stored_type(dtype)).itemsize:
        return
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns of nan
        spread, mean = np.nanstd(x, axis=0), np.nanmean(x, axis=0)
        rounding = np.nanmax(np.abs(x.astype(stored_type(dtype)) - x), axis=0)
        # What varies by the rounding of 64 bits is constant.
        is_lost = (rounding > 0.01 * spread) & (spread > 1e4 * np.finfo(x.dtype).eps * np.abs(mean))
    if is_lost.any():
        first = tuple(np.argwhere(is_lost)[0])
        raise DataError(
            f"{_place(name, (':', *first))} varies by {spread[first]:.2g} about {mean[first]:.10g}, and a "
            f"{torch.finfo(dtype).bits}-bit float rounds it by up to {rounding[first]:.2g}: subtract an "
            f"offset, such as the mean, or {_KEEP}"
        )


def largest_whole(dtype: torch.dtype) -> float:
    """Number up to which all whole ones are floats of this type: 2^24 for 32 bits, 2^53 for 64."""
    return 2 / torch.finfo(dtype).eps


# ------------------------------------------------------------------ what users hold numbers in


def _numbers(x: Any, name: str) -> np.ndarray:
    """An array of bytes (grey values), whole numbers or floats; nan where ``x`` says that one is missing."""
    if isinstance(x, Tensor):
        x = _of_tensor(x, name)
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise DataError(f"{name} is a sparse {type(x).__name__}: give x.toarray()")
    if (columns := _columns(x)) is not None:
        if not columns:
            raise DataError(f"{name} is a {type(x).__name__} without columns")
        parts = [_numbers(column, f"{name}[{key!r}]") for key, column in columns]
        # Columns may have axes of their own, and a row of a structured array has none.
        parts = [part.reshape(len(part), math.prod(part.shape[1:])) if part.ndim else part for part in parts]
        return _join(parts, name, np.hstack)
    if isinstance(x, list | tuple):
        if any(map(_is_array, x)):
            return _join([_numbers(row, f"{name}[{i}]") for i, row in enumerate(x)], name, np.stack)
        x = _of_row(x)
    if (masked := _masked(x)) is not None:
        return _filled(masked, name)
    x = np.asarray(x)
    if x.dtype.kind == "O":
        return _of_objects(x, name)
    if x.dtype.kind in "US":
        raise DataError(_where_text(x, name))
    if x.dtype.kind not in "biuf":
        advice = {"M": "dates as numbers, such as days since the first", "c": "real and imaginary parts"}
        raise DataError(
            f"{name} holds {x.dtype}, not numbers: give {advice.get(x.dtype.kind, 'bytes, 0/1 or floats')}"
        )
    if x.dtype == np.float16:  # whose largest number is less than those that others are compared with
        return x.astype(np.float32)
    return x.astype(np.int8) if x.dtype == bool else x  # beside a column of bytes they are no grey values


def _of_tensor(x: Tensor, name: str) -> np.ndarray:
    if torch.masked.is_masked_tensor(x):
        return np.ma.MaskedArray(_of_tensor(x.get_data(), name), ~x.get_mask().cpu().numpy())
    for is_so, kind, advice in (
        (x.is_nested, "nested", "rows of one length"),
        (x.layout is not torch.strided, "sparse", "x.to_dense()"),
        (x.is_quantized, "quantised", "x.dequantize()"),
        (x.is_meta, "meta", "a tensor that has values"),
    ):
        if is_so:
            raise DataError(f"{name} is a {kind} tensor: give {advice}")
    x = x.detach().cpu().resolve_conj().resolve_neg()
    return (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy()  # numpy lacks bfloat16


def _columns(x: Any) -> list[tuple[Any, Any]] | None:
    """Names and columns of a table: of pandas, polars, Arrow, a structured array, a dictionary."""
    if isinstance(x, np.ndarray | np.void) and x.dtype.names:
        return [(key, x[key]) for key in x.dtype.names]
    if isinstance(x, Mapping) or (hasattr(x, "items") and getattr(x, "ndim", 0) == 2):
        return list(x.items())
    if hasattr(x, "column_names") or (hasattr(x, "columns") and hasattr(x, "get_columns")):
        return [(key, x[key]) for key in getattr(x, "column_names", x.columns)]
    return None


def _is_array(x: Any) -> bool:
    return x is not np.ma.masked and (
        isinstance(x, list | tuple | Mapping) or (hasattr(x, "__array__") and not isinstance(x, np.generic))
    )


def _of_row(x: Sequence[Any]) -> np.ndarray:
    """Plain numbers as numpy takes them, if it does not round them; else objects."""
    if all(issubclass(kind, float | int | np.number | np.bool_) for kind in set(map(type, x))):
        array = np.asarray(x)
        if array.dtype.kind in "biu" or not (np.abs(array) >= largest_whole(torch.float64)).any():
            return array
    objects = np.empty(len(x), object)
    objects[:] = x
    return objects


def _masked(x: Any) -> np.ma.MaskedArray | None:
    """A masked array of what has missing numbers by other means than nan: numpy, pandas, polars, Arrow."""
    if isinstance(x, np.ma.MaskedArray):
        return x
    for is_missing, without in ("isna", "dropna"), ("is_null", "drop_nulls"), ("is_null", "drop_null"):
        if hasattr(x, is_missing) and hasattr(x, without):
            mask = np.asarray(getattr(x, is_missing)()).astype(bool)
            if not mask.any():
                return None
            values = np.asarray(getattr(x, without)())
            masked = np.ma.masked_all(mask.shape, values.dtype)
            masked[~mask] = values
            return masked
    return None


def _filled(x: np.ma.MaskedArray, name: str) -> np.ndarray:
    """The numbers of a masked array, nan where they are masked."""
    mask = np.ma.getmaskarray(x)
    values = np.asarray(x.data)
    if not mask.any():
        return _numbers(values, name)
    if values.dtype.kind in "OUS":
        values = values.astype(object)
        values[mask] = None
        return _numbers(values, name)
    known = _numbers(values[~mask], name)
    if values.dtype == np.uint8 and (known > 1).any():
        raise DataError(
            f"{name} holds bytes: bytes are read as grey values k / 255, and here some are missing: give "
            "floats, x.astype(float) / 255 for grey values or x.astype(float) for other numbers"
        )
    if known.dtype.kind != "f":
        _check_whole(known, name, torch.float64)
        known = known.astype(np.float64)
    filled = np.full(mask.shape, np.nan, known.dtype)
    filled[~mask] = known
    return filled


def _join(parts: Sequence[np.ndarray], name: str, join: Callable[..., np.ndarray]) -> np.ndarray:
    """Rows or columns as one array."""
    try:
        joined = join(parts)
    except ValueError as error:
        raise DataError(f"{name} is no array: its rows differ in length ({error})") from error
    for part in parts:
        if joined.dtype.kind == "f" and part.dtype.kind in "iu":
            _check_whole(part, name, torch.float64)
    return joined


def _of_objects(x: np.ndarray, name: str) -> np.ndarray:
    """Floats of Python's objects."""
    floats = np.empty(x.shape)
    for index, value in np.ndenumerate(x):
        where = _place(name, index) if index else name
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        if isinstance(value, str | bytes):
            raise DataError(_where_text(x, name))
        if _is_gap(value):
            floats[index] = np.nan
            continue
        if not isinstance(value, numbers.Real | np.bool_ | Decimal):
            advice = ": do its rows differ in length?" if _is_array(value) else ""
            raise DataError(f"{where} is {found(value)}, not a number{advice}")
        try:
            floats[index] = number = float(value)
        except OverflowError:
            floats[index] = number = math.inf
        if isinstance(value, numbers.Integral) and number != int(value):
            raise _rounds(f"{where} is {value}")
    return floats


def _is_gap(value: Any) -> bool:
    """Return True if a value says that there is none: None, nan, NaT, pandas' NA, numpy's masked."""
    if isinstance(value, float | Decimal | np.generic):
        return bool(value != value)
    return value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType")


def _where_text(x: np.ndarray, name: str) -> str:
    """Say where text is that is no number."""
    columns = np.moveaxis(x, -1, 0) if x.ndim == 2 else [x]
    found = {i: text for i, column in enumerate(columns) if (text := next(_text(column), None)) is not None}
    if not found:
        return f"{name} holds numbers that are written as text, such as {x.flat[0]!r}: give x.astype(float)"
    if x.ndim != 2:
        where = f", such as {found[0]!r}, not numbers"
    else:
        which = [f"column {i} ({text!r})" for i, text in found.items()]
        where = f", not numbers, in {', '.join(which[:5])}{' and others' * (len(which) > 5)}"
    return (
        f"{name} holds text{where}: number its categories, as pandas.factorize does (for a family such as "
        "Categorical), or leave it out"
    )


def _text(column: np.ndarray) -> Iterator[str | bytes]:
    """The values that no number can be read from."""
    for value in column.flat:
        if isinstance(value, str | bytes):
            try:
                float(value)
            except ValueError:
                yield value if isinstance(value, bytes) else str(value)


def as_labels(labels: object, name: str, num_data: int) -> np.ndarray:
    """Whole numbers, one a datum; DataError if they are something else."""
    labels = _numbers(labels, f"the labels of {name}")
    if labels.dtype.kind == "f" and (gaps := np.isnan(labels)).any():
        raise DataError(
            f"{gaps.sum():,} of {gaps.size:,} labels of {name} are missing: leave these data out, or number "
            "them as a class of their own"
        )
    if labels.ndim != 1 or (labels != np.floor(labels)).any():
        raise DataError(
            f"the labels of {name} must be whole numbers, one a datum, not {labels.dtype} of shape "
            f"{labels.shape}"
        )
    if (labels < 0).any():
        raise DataError(f"the labels of {name} hold {labels.min()}: number the classes from 0")
    if len(labels) != num_data:
        raise DataError(f"{name} has {num_data} data but {len(labels)} labels")
    return labels.astype(np.int64)


def shuffled(
    x: np.ndarray, labels: np.ndarray | None, name: str, sizes: Mapping[str, int] | None = None
) -> Arrays:
    """Splits of these sizes (80/10/10 by default) after a shuffle that is the same everywhere."""
    if len(x) < 3:
        raise DataError(f"{name} has {len(x)} data: too few for training, validation and test")
    if sizes is None:
        tenth = max(1, len(x) // 10)
        sizes = {"train": len(x) - 2 * tenth, "valid": tenth, "test": tenth}
    order = np.random.RandomState(SPLIT_SEED).permutation(len(x))
    parts = dict(zip(sizes, np.split(order, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    return {part: (x[i], None if labels is None else labels[i]) for part, i in parts.items()}
