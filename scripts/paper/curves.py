"""What is kept of a run: a small JSON file a curve, with what made it, and the figures."""

import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduction import Common, Setting

from pyro_vae.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def provenance() -> dict[str, Any]:
    """The command, the commit and the machine."""
    import torch

    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
        commit += " and changes"
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": shlex.join(["python", f"scripts/paper/{Path(sys.argv[0]).name}", *_without_paths()]),
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {processor}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "pyro-ppl")},
    }


def _without_paths() -> list[str]:
    """The command line without what only says where things are."""
    arguments = sys.argv[1:]
    places = {"--runs", "--out", "--data-dir"}
    kept = zip(["", *arguments], arguments, strict=False)
    return [argument for before, argument in kept if not places & {before, argument}]


def file_of(setting: Setting, common: Common, figure: str) -> Path:
    """Where a curve is kept."""
    return common.out / "paper" / figure / f"{setting.name}.json"


def save(path: Path, setting: Setting, **content: Any) -> None:
    """Keep a curve. One that is there already, and to which nothing was added, stays that of who made it."""
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
    """What :func:`save` kept."""
    record = json.loads(path.read_text())
    return record | {"setting": dataclasses.asdict(Setting(**record["setting"]))}


def load_all(common: Common, figure: str) -> list[dict[str, Any]]:
    """All curves of a figure that there are."""
    return [load(path) for path in sorted((common.out / "paper" / figure).glob("*.json"))]


def save_figure(figure: "Figure", common: Common, name: str) -> Path:
    """Write figures/paper_NAME.png."""
    path = common.out / "figures" / f"paper_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def value_at(curve: Sequence[tuple[float, float]], samples: float) -> float | None:
    """The value of a curve, interpolated on a logarithmic axis; None outside of it."""
    for x, y in curve:
        if math.isclose(x, samples, rel_tol=1e-2):
            return y
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= samples <= x1:
            return y0 + (y1 - y0) * math.log(samples / x0) / math.log(x1 / x0)
    return None
