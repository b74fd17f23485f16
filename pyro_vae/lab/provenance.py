"""Origin of a number: the command, the commit, the machine."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """The command, the commit and the machine, as plain values for JSON."""
    root = Path(__file__).resolve().parents[1]
    script = Path(sys.argv[0]).resolve()

    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
        commit += " and changes"
    import torch

    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": shlex.join(["python", name, *_without_paths()]),
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
