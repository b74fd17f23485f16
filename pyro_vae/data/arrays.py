"""From what users give to checked numpy arrays, split the same way everywhere."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import UserError

SPLIT_SEED = 0

T = TypeVar("T")
Arrays = dict[str, tuple[np.ndarray, np.ndarray | None]]  # split name -> data, labels


class DataError(UserError, ValueError):
    """Data that cannot be found, read or used; the message says what to do."""


def as_array(x: object, name: str, *, missing: bool = False) -> np.ndarray:
    """A non-empty array of bytes or finite floats, first axis the data; DataError if it cannot be one.

    If ``missing``, floats may be nan.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()  # which numpy does not know
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise DataError(f"{name} is no array: its rows differ in length ({error})") from error
    if x.dtype == bool:
        x = x.astype(np.uint8)
    if not (np.issubdtype(x.dtype, np.integer) or np.issubdtype(x.dtype, np.floating)):
        raise DataError(f"{name} holds {x.dtype}, not numbers: give bytes, 0/1 or floats")
    if x.ndim < 2 or x.size == 0:
        raise DataError(
            f"{name} has shape {x.shape}; it needs at least two axes, (data, numbers of a datum...), and "
            "none of them empty"
        )
    if x.dtype == np.uint8 or ((x == 0) | (x == 1)).all():
        return x.astype(np.uint8)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    bad = np.argwhere(np.isinf(x) if missing else ~np.isfinite(x))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise DataError(
            f"{name}[{where}] is {x[tuple(bad[0])]} as a 32-bit float ({len(bad)} of {x.size} numbers are "
            "not finite): remove these data or fill them in"
            + (
                ""
                if missing
                else "; or, where nan says that a number is missing, from_array(x, missing=True)"
            )
        )
    return x


def as_labels(labels: object, name: str) -> np.ndarray:
    """Whole numbers, one a datum; DataError if they are something else."""
    labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"the labels of {name} must be whole numbers, one a datum, not {labels.dtype} of shape "
            f"{labels.shape}"
        )
    if (labels < 0).any():
        raise DataError(f"the labels of {name} hold {labels.min()}: number the classes from 0")
    return labels.astype(np.int64)


def shuffled(
    x: np.ndarray,
    labels: np.ndarray | None,
    name: str,
    sizes: Mapping[str, int] | None = None,
) -> Arrays:
    """Splits of these sizes (80/10/10 by default) after a shuffle that is the same everywhere."""
    if len(x) < 3:
        raise DataError(f"{name} has {len(x)} data: too few for training, validation and test")
    if labels is not None and len(labels) != len(x):
        raise DataError(f"{name} has {len(x)} data but {len(labels)} labels")
    if sizes is None:
        tenth = max(1, len(x) // 10)
        sizes = {"train": len(x) - 2 * tenth, "valid": tenth, "test": tenth}
    order = np.random.RandomState(SPLIT_SEED).permutation(len(x))
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(order, ends[:-1])
    return {
        part: (x[index], None if labels is None else labels[index])
        for part, index in zip(sizes, parts, strict=True)
    }


def check_splits(splits: Arrays, name: str) -> tuple[Arrays, tuple[int, ...]]:
    """Splits that fit each other, and the shape of a datum; DataError if they do not."""
    shapes = {part: x.shape[1:] for part, (x, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the splits of {name} differ in the shape of a datum: {shapes}")
    for part, (x, labels) in splits.items():
        if labels is not None and len(labels) != len(x):
            raise DataError(f"{name}:{part} has {len(x)} data but {len(labels)} labels")
    if len({x.dtype for x, _ in splits.values()}) > 1:
        if any(x.dtype == np.uint8 and x.max() > 1 for x, _ in splits.values()):
            raise DataError(f"some splits of {name} hold bytes and others floats: give all in one unit")
        splits = {part: (x.astype(np.float32), labels) for part, (x, labels) in splits.items()}
    return splits, shapes["train"]


def reading(path: Path, what: str, read: Callable[[], T]) -> T:
    """Call ``read``; whatever a foreign format's reader raises becomes one message about the file."""
    try:
        return read()
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} does not fit in memory ({error})") from error
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as {what}; it may be empty, truncated or of another format "
            f"({type(error).__name__}: {error})"
        ) from error
