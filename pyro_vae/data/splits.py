"""Data sets, their splits, and the minibatches drawn from them."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pyro_vae.arguments import Count, check_device, checked, found
from pyro_vae.data.arrays import PARTS, Arrays, DataError, as_array, as_labels, shuffled, stored_type
from pyro_vae.errors import unknown

BINARIZATIONS = ("dynamic", "fixed", "threshold", "dequantize", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        stored: Data as they were stored: bytes, bits or floats.
        labels: Class of every datum, if the data set has any.
        levels: x is ``stored / levels``: 255 for bytes; dequantised, (stored + noise) / (levels + 1).
        binarization: One of ``BINARIZATIONS``; under "fixed" and "threshold" ``stored`` holds the bits.
        seed: Seed of the draw that ``x`` is, where batches are binarised or dequantised anew.
        description: Name of these data and of their binarisation, for reports.
        dtype: Floating-point type of x.
    """

    stored: Shaped[Tensor, "split data"]
    labels: Int[Tensor, " split"] | None
    levels: float
    binarization: str
    seed: int
    description: str
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def x(self) -> Float[Tensor, "split data"]:
        """All data, converted and binarised; the same at every call, on every machine."""
        if (draw := {"dynamic": _draw_bits, "dequantize": _draw_in_bins}.get(self.binarization)) is None:
            return self._convert(self.stored)
        drawn = draw(self.stored.cpu().numpy(), self.levels, self.seed)
        return torch.from_numpy(drawn).to(self.stored.device, self.dtype)

    @property
    def bin_width(self) -> float:
        """Distance of neighbouring values that were stored, in the unit of x."""
        return 1 / (self.levels + (self.binarization == "dequantize"))

    def minibatch(
        self, index: Int[Tensor, " batch"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch data"]:
        """The data at ``index``, converted and binarised; what is drawn at random is drawn anew."""
        x = self._convert(self.stored[index])
        if self.binarization not in ("dynamic", "dequantize"):
            return x
        noise = torch.empty_like(x).uniform_(generator=generator)
        if self.binarization == "dequantize":
            return (x * self.levels + noise) * self.bin_width
        # torch.bernoulli draws the same distribution in four times the time on a CPU.
        return noise.lt_(x)

    def to(self, device: Any) -> "Split":
        """Return the data on another device; raises as ``arguments.check_device``."""
        device = check_device(device)
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, stored=self.stored.to(device), labels=labels)

    def _convert(self, stored: Tensor) -> Tensor:
        return stored.to(self.dtype) / self.levels


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Fixed splits of one data set.

    Attributes:
        name: Name or path that was asked for.
        train: Data to train on.
        valid: Data to choose between checkpoints and settings; None if the data set has none.
        test: Data to look at once, at the end.
        shape: Shape of a datum, such as (28, 28); ``x`` holds it flattened, row by row.
        provenance: Source of the data.
        checksum: sha256 of all data as they are stored, before anything is binarised or dequantised.
    """

    name: str
    train: Split
    valid: Split | None
    test: Split
    shape: tuple[int, ...]
    provenance: str
    checksum: str

    @property
    def data_dim(self) -> int:
        """Numbers in a datum."""
        return self.train.stored.shape[1]

    def to(self, device: Any) -> "Dataset":
        """Return the data on another device; raises as ``arguments.check_device``."""
        valid = None if self.valid is None else self.valid.to(device)
        return dataclasses.replace(self, train=self.train.to(device), valid=valid, test=self.test.to(device))


@checked
def from_array(
    x: object,
    labels: object = None,
    *,
    binarization: str = "none",
    name: str = "array",
    missing: bool = False,
    dtype: torch.dtype | None = None,
) -> Dataset:
    """A data set of your own: shuffled with a fixed seed and split 80/10/10.

    Args:
        x: Array, tensor, table (of pandas, polars, Arrow) or rows, first axis the data; other axes are
            flattened. Bytes are read as grey values 0..255, 0 and 1 as bits, anything else as it is.
        labels: Whole numbers, one a datum.
        binarization: One of ``BINARIZATIONS``.
        name: Name of it in reports.
        missing: Numbers of x may be missing, for a pair that takes it (``vae(..., missing=True)``): by nan, a
            mask (``numpy.ma``), None, NA or null. They are nan in the data set.
        dtype: Floating-point type of x, by default torch's default dtype (float32). Reals are rounded to it;
            whole numbers are not: above 2^24 they need ``torch.float64``, above 2^53 there is no type.

    Raises:
        DataError: If ``x`` is empty, not numeric, not finite, not what the binarisation needs, or holds whole
            numbers that would be rounded.
    """
    check_binarization(binarization, missing=missing)
    dtype = check_dtype(dtype)
    x = as_array(x, name, missing=missing, dtype=dtype)
    labels = None if labels is None else as_labels(labels, name, len(x))
    return build(name, shuffled(x, labels, name), x.shape[1:], "an array", binarization, dtype=dtype)


class Batches:
    """An epoch of minibatches ``(x,)`` at every iteration, in a new order; the last may be smaller.

    They are drawn and converted on the device of the split (``split.to("cuda")``), with no worker processes.

    Args:
        split: The data.
        batch_size: Data in a batch.
        seed: Seed of the order and of what is drawn anew (``Split.minibatch``).
        context: Condition that the programs are given besides x, a row for every datum, such as
            ``one_hot(split.labels).float()``: minibatches are then ``(x, c)``.
        epoch_size: Draw data with replacement, so many in an epoch; by default every datum comes once.
        drop_last: Leave the last minibatch of an epoch out if it is smaller.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a size is below 1, the context has another number of rows, or no batch is left.
    """

    @checked
    def __init__(
        self,
        split: object,
        batch_size: Count = 100,
        *,
        seed: int = 0,
        context: Tensor | None = None,
        epoch_size: Count | None = None,
        drop_last: bool = False,
    ) -> None:
        if not isinstance(split, Split):
            raise TypeError(
                f"batches takes a split of a data set, such as load(...).train or from_array(x).train, not a "
                f"{type(split).__name__}"
            )
        if context is not None and context.shape[:1] != (len(split),):
            raise ValueError(
                f"context is {found(context)}, but must have a row for each of {len(split)} data"
            )
        if drop_last and batch_size > (epoch_size or len(split)):
            raise ValueError(
                f"batch_size {batch_size} is more than the {epoch_size or len(split)} data of an epoch: with "
                "drop_last there would be no batch"
            )
        self.split = split
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch_size = epoch_size
        self.context = None if context is None else context.to(split.stored.device)
        self.generator = torch.Generator(split.stored.device)
        self.generator.manual_seed(seed)

    def __len__(self) -> int:
        size = self.epoch_size or len(self.split)
        return size // self.batch_size if self.drop_last else math.ceil(size / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return map(self.draw, self.indices())

    def indices(self) -> tuple[Int[Tensor, " batch"], ...]:
        """Positions in the split of an epoch's minibatches, drawn anew."""
        options = {"generator": self.generator, "device": self.generator.device}
        if self.epoch_size is None:
            order = torch.randperm(len(self.split), **options)
        else:
            order = torch.randint(len(self.split), (self.epoch_size,), **options)
        return order.split(self.batch_size)[: len(self)]

    def draw(self, index: Int[Tensor, " batch"]) -> tuple[Tensor, ...]:
        """The minibatch of these positions: (x,), or (x, c)."""
        x = self.split.minibatch(index, self.generator)
        return (x,) if self.context is None else (x, self.context[index])

    def state_dict(self) -> dict[str, Tensor]:
        """State of the random generator: what a resumed run needs to draw the same batches."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.generator.set_state(state["generator"].cpu())


batches = Batches  # as a function's name, since it is called like one


def check_binarization(binarization: str, *, missing: bool = False) -> None:
    """Raise :class:`DataError` if there is no such binarisation, or numbers that are missing forbid it."""
    if binarization not in BINARIZATIONS:
        raise DataError(unknown("binarization", binarization, BINARIZATIONS))
    if missing and binarization != "none":
        raise DataError(f"data with missing numbers are taken as they are, not binarised ({binarization!r})")


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The floating-point type, by default torch's; ``TypeError`` if it is another."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type, such as torch.float64, not {dtype!r}")
    return dtype


def build(
    name: str,
    splits: Arrays,
    shape: tuple[int, ...],
    provenance: str,
    binarization: str,
    levels: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """The data set of checked arrays; x is ``stored / levels``, by default 255 for bytes and 1 otherwise."""
    levels = levels or _levels([x for x, _ in splits.values()])
    bits = levels == 1 and all(x.dtype == np.uint8 for x, _ in splits.values())
    if bits and binarization == "dequantize":
        raise DataError(
            f"{name} holds bits, which have no grey levels to dequantise: use binarization 'none'"
        )
    if bits:
        binarization = "none"
    how = "stored as bits" if bits else f"binarization {binarization}"
    built, checksum = dict.fromkeys(PARTS), hashlib.sha256()
    for part, (x, labels) in splits.items():
        x = x if x.dtype == np.uint8 else x.astype(stored_type(dtype), copy=False)
        seed = PARTS.index(part)
        draw = f" (one draw, seed {seed})" if binarization in ("dynamic", "fixed", "dequantize") else ""
        checksum.update(f"{part} {x.shape} {x.dtype} {levels}".encode() + np.ascontiguousarray(x).tobytes())
        stored, split_levels = _binarize(x.reshape(len(x), -1), levels, binarization, seed, name)
        built[part] = Split(
            stored=torch.tensor(stored),
            labels=None if labels is None else torch.from_numpy(labels),
            levels=split_levels,
            binarization=binarization,
            seed=seed,
            description=f"{name} {part}, {len(x):,} data, {how}{draw}",
            dtype=dtype,
        )
    return Dataset(name, **built, shape=tuple(shape), provenance=provenance, checksum=checksum.hexdigest())


def _levels(arrays: list[np.ndarray]) -> float:
    """255 for bytes, 1 for bits and for everything else."""
    is_grey = all(x.dtype == np.uint8 for x in arrays) and max(x.max() for x in arrays) > 1
    return 255.0 if is_grey else 1.0


def _binarize(
    x: np.ndarray, levels: float, binarization: str, seed: int, name: str
) -> tuple[np.ndarray, float]:
    """Check and binarise what is stored, once and for all where it is not drawn anew; and its levels."""
    if binarization == "dequantize" and x.dtype != np.uint8 and levels == 1:
        raise DataError(f"{name}: only grey levels can be dequantised, and these data are real numbers")
    if binarization in ("none", "dequantize"):
        return x, levels
    low, high = x.min() / levels, x.max() / levels
    if low < 0 or high > 1:
        raise DataError(
            f"{name}: binarization {binarization!r} needs grey values in [0, 1], but these run from {low:g} "
            f"to {high:g}: divide by the largest, or use binarization 'none' with a family for such data"
        )
    if binarization == "dynamic":
        return x, levels
    bits = _draw_bits(x, levels, seed) if binarization == "fixed" else (x > levels / 2).astype(np.uint8)
    return bits, 1.0


def _draw_in_bins(stored: np.ndarray, levels: float, seed: int) -> np.ndarray:
    noise = np.random.RandomState(seed).random_sample(stored.shape)
    return (stored + noise) / (levels + 1)


def _draw_bits(stored: np.ndarray, levels: float, seed: int) -> np.ndarray:
    # RandomState's stream is frozen for ever, unlike those of torch and of numpy's Generator.
    random = np.random.RandomState(seed)
    bits = np.empty(stored.shape, np.uint8)
    for start in range(0, len(stored), 1000):
        rows = slice(start, start + 1000)
        bits[rows] = random.random_sample(stored[rows].shape) * levels < stored[rows]
    return bits
