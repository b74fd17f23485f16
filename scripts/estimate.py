"""Estimate log p(x) of a trained run, with its errors.

    python scripts/estimate.py runs/mnist --num-samples 5000 --limit 1000

Writes log_marginal.json (log_marginal_train.json, ... for other splits), with a value and an error for every
datum, in place of an earlier one, and figures into the run folder.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pyro_vae import command_line, experiment, runs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Estimate log p(x) of a trained run, with its errors.

    Writes log_marginal.json (log_marginal_train.json, ... for other splits), with a value and an error for
    every datum, in place of an earlier one, and figures into the run folder.
    """

    run: tyro.conf.Positional[Path]
    """Folder that train.py made."""
    num_samples: int = 5000
    """Importance samples for every datum."""
    limit: int | None = None
    """Take only the first so many data."""
    split: Literal["train", "valid", "test"] = "test"
    """Of which data."""
    data_dir: Path | None = None
    """Where the files are, if not where they were."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main() -> None:
    """Load the run, estimate, write and draw."""
    arguments = tyro.cli(Arguments)
    if arguments.num_samples < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise experiment.ConfigError("--num-samples and --limit must be at least 1")

    from pyro_vae import reports

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir, device=arguments.device)
    split = getattr(run.dataset, arguments.split)
    if split is None:
        raise experiment.ConfigError(f"{run.dataset.name} has no split {arguments.split!r}")
    print(f"{arguments.run}, weights of epoch {run.epoch}")
    quality = reports.assess(run, split, arguments.num_samples, arguments.limit)
    name = "log_marginal" if arguments.split == "test" else f"log_marginal_{arguments.split}"
    quality.log_marginal.save(arguments.run / f"{name}.json")
    print(quality.text)
    print(f"figures in {reports.save_figures(arguments.run, run)}")


if __name__ == "__main__":
    command_line.run(main)
