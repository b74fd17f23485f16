"""Records of runs: a small JSON file for each curve, with its origin, and the figures."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduction import Common, Setting

from pyro_vae.files import write_atomically
from pyro_vae.lab.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def file_of(setting: Setting, common: Common, figure: str) -> Path:
    """Path of the file of a curve."""
    return common.out / "paper" / figure / f"{setting.name}.json"


def save(path: Path, setting: Setting, **content: Any) -> None:
    """Keep a curve. A curve that is there already, and to which nothing was added, keeps its origin."""
    record = {"setting": dataclasses.asdict(setting), **content, "made_by": provenance()}
    if path.exists() and _without_origin(load(path)) == _without_origin(json.loads(json.dumps(record))):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n  ".join(json.dumps(row) for row in record.pop("curve"))
    head = json.dumps(record, indent=1).removesuffix("\n}")
    write_atomically(f'{head},\n "curve": [\n  {rows}\n ]\n}}\n'.encode(), path)


def _without_origin(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "made_by"}


def load(path: Path) -> dict[str, Any]:
    """Read a record that :func:`save` wrote."""
    record = json.loads(path.read_text())
    return record | {"setting": dataclasses.asdict(Setting(**record["setting"]))}


def load_all(common: Common, figure: str) -> list[dict[str, Any]]:
    """Read all curves of a figure that exist."""
    return [load(path) for path in sorted((common.out / "paper" / figure).glob("*.json"))]


def save_figure(figure: "Figure", common: Common, name: str) -> Path:
    """Write figures/paper_NAME.png."""
    path = common.out / "figures" / f"paper_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def value_at(curve: Sequence[tuple[float, float]], samples: float) -> float | None:
    """Value of a curve, interpolated on a logarithmic axis; None outside of the curve."""
    for x, y in curve:
        if math.isclose(x, samples, rel_tol=1e-2):
            return y
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= samples <= x1:
            return y0 + (y1 - y0) * math.log(samples / x0) / math.log(x1 / x0)
    return None
