"""Estimates in files: JSON with a checksum, in which a smaller estimate never takes a larger one's place."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae import records
from pyro_vae.arguments import checked
from pyro_vae.files import locked
from pyro_vae.marginal_likelihood.result import EstimatesError, LogMarginal

_Numbers = list[float | Literal["nan", "inf", "-inf"]]  # JSON has no such numbers: they are words


@dataclasses.dataclass(frozen=True)
class _Record:
    """An estimate in a file; ``others`` are smaller ones by the same method, of other data."""

    __pydantic_config__ = records.STRICT

    values: _Numbers
    std_error: _Numbers
    method: str
    bound: Literal["lower", "upper", "exact"]
    settings: dict[str, Any]
    diagnostics: dict[str, _Numbers]
    curve: dict[str, _Numbers]
    summary: list[str]
    is_simulated: bool = False
    is_of_codes: bool = False
    is_density: bool = True
    others: list["_Record"] = dataclasses.field(default_factory=list)
    file_checksum: str | None = None

    def __post_init__(self) -> None:
        for name in ("effort", "data", "data_checksum", "model_checksum"):
            if not isinstance(self.settings.get(name), str):
                raise ValueError(f"settings.{name} cannot be {self.settings.get(name)!r}")
        columns = {"std_error": self.std_error, **self.diagnostics, **self.curve}
        for name, column in columns.items():
            if len(column) != len(self.values) or not column:
                raise ValueError(f"{name} has {len(column)} numbers of {len(self.values)} data")
        if not all(size.isdecimal() for size in self.curve):
            raise ValueError(f"curve is by numbers of samples, not {sorted(self.curve)}")


@checked
def save_estimates(estimates: Mapping[str, LogMarginal], path: str | Path) -> None:
    """Write estimates by name as JSON; raises ``WriteError`` and keeps what was there if it cannot."""
    _write({name: [estimate] for name, estimate in estimates.items()}, Path(path))


def load_estimates(path: Path) -> dict[str, LogMarginal]:
    """Read what :func:`save_estimates` or :func:`merge_estimates` wrote: of every name that of most data.

    Raises:
        EstimatesError: If there is no such file, or it is damaged.
    """
    return {name: estimates[0] for name, estimates in _read(Path(path)).items()}


def load_estimates_by_data(path: Path) -> dict[str | None, dict[str, LogMarginal]]:
    """All estimates of a file by their data's checksum (None of simulated ones) and name; raises the same."""
    found: dict[str | None, dict[str, LogMarginal]] = {}
    for name, estimates in _read(Path(path)).items():
        for estimate in estimates:
            found.setdefault(estimate.data_checksum, {})[name] = estimate
    return found


def merge_estimates(estimates: Mapping[str, LogMarginal], path: Path) -> dict[str, LogMarginal]:
    """Add estimates by name to a file, in which a smaller one never takes the place of a larger one.

    The file keeps, of every method and set of data, the estimate that took the most work
    (:attr:`LogMarginal.size`), the latest of equal ones; first that of most data. Estimates of other weights
    are of the past, and dropped. Other processes may do the same at the same time.

    Returns:
        What the file now has of the data of the last one, and of simulated data.

    Raises:
        EstimatesError: If the file is damaged.
        WriteError: If it cannot be written; the old one is kept.
    """
    path = Path(path)
    *_, latest = estimates.values()
    weights = latest.settings["model_checksum"]
    with locked(path.with_name(f"{path.name}.lock"), path, seconds=60.0):
        stored = _read(path) if os.path.lexists(path) else {}
        kept = {
            name: [e for e in stored.get(name, []) if e.settings["model_checksum"] == weights]
            for name in {**stored, **estimates}
        }
        for name, estimate in estimates.items():
            data = estimate.data_checksum
            same = [e for e in kept[name] if e.data_checksum == data]
            larger = [e for e in same if e.size > estimate.size] or [estimate]
            kept[name] = [e for e in kept[name] if e.data_checksum != data] + larger
        _write({name: found for name, found in kept.items() if found}, path)
    of_data = load_estimates_by_data(path)
    return of_data[latest.data_checksum] | of_data.get(None, {})


def _write(estimates: Mapping[str, Sequence[LogMarginal]], path: Path) -> None:
    record = {}
    for name, found in estimates.items():
        first, *others = sorted(found, key=lambda estimate: estimate.size, reverse=True)
        record[name] = _encode(first) | ({"others": list(map(_encode, others))} if others else {})
    records.write_json(record, path, in_parts=True)


def _read(path: Path) -> dict[str, list[LogMarginal]]:
    """By name, first that of most data."""
    advice = "remove it and make them again with scripts/estimate.py"
    try:
        found = records.read_json(path, dict[str, _Record], EstimatesError, advice)
    except FileNotFoundError:
        raise EstimatesError(f"there are no estimates {path}: make them with scripts/estimate.py") from None
    if not found:
        raise EstimatesError(f"{path} is damaged (it holds nothing): {advice}")
    return {name: [_decode(record), *map(_decode, record.others)] for name, record in found.items()}


_KINDS = ("method", "bound", "settings", "is_simulated", "is_of_codes", "is_density")


def _encode(result: LogMarginal) -> dict[str, Any]:
    return {
        "values": _to_json(result.values),
        "std_error": _to_json(result.std_error),
        "diagnostics": {name: _to_json(numbers) for name, numbers in result.diagnostics.items()},
        "curve": {str(size): _to_json(numbers) for size, numbers in result.curve.items()},
        "summary": result.summary().splitlines(),
        **{name: getattr(result, name) for name in _KINDS},
    }


def _decode(record: _Record) -> LogMarginal:
    result = LogMarginal(
        values=_from_json(record.values),
        std_error=_from_json(record.std_error),
        diagnostics={name: _from_json(values) for name, values in record.diagnostics.items()},
        curve={int(size): _from_json(values) for size, values in record.curve.items()},
        **{name: getattr(record, name) for name in _KINDS},
    )
    if "scores" not in record.settings:
        return result
    # Version 0.1 said in settings what a result is.
    settings = dict(record.settings)
    return dataclasses.replace(
        result,
        is_density=settings.pop("scores") == "log p(x)",
        is_of_codes=settings.pop("is_of_codes", False),
        is_simulated=settings["data_checksum"] == "simulated",
        settings=settings,
    )


def _to_json(numbers: Tensor) -> list[float | str]:
    return [v if math.isfinite(v) else str(v) for v in numbers.tolist()]


def _from_json(numbers: _Numbers) -> Tensor:
    return torch.tensor([float(v) for v in numbers], dtype=torch.float64)
