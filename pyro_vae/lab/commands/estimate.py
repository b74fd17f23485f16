"""``estimate``: estimate log p(x) of a trained run, with errors, bounds and a verdict."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from pyro_vae.lab import cli, estimates, runs
from pyro_vae.lab.choices import ESTIMATORS
from pyro_vae.lab.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Estimate log p(x) of a trained run in one or several ways, with errors, bounds and a verdict.

    Writes log_marginal.json (log_marginal_train.json, ... for other splits), with a value and an error for
    every datum and method, and figures into the run folder. Estimates of other data (--limit) are kept beside
    each other; of the same data by the same method the one that took more work stays. Interrupted, it goes on
    when started again.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run."""
    method: tuple[Literal[(*ESTIMATORS, "all")], ...] = ("importance_sampling",)
    """Estimators; several may be given. quadrature is exact, for up to 3 latent dimensions; ais and
    importance_sampling are lower bounds; hmc (the paper's Appendix D) is an upper bound, for few dimensions;
    bidirectional certifies ais on simulated data. all: those that fit the latent dimensions."""
    settings: tyro.conf.OmitArgPrefixes[estimates.Settings] = dataclasses.field(
        default_factory=estimates.Settings
    )
    split: Literal["train", "valid", "test"] = "test"
    """Part of the data."""
    data_dir: Path | None = None
    """Folder of the data files, if not where they were."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def parse(words: Sequence[str], program: str) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, prog=program, args=words)


def main(arguments: Arguments) -> None:
    """Load the run, estimate, write, draw and judge."""
    from pyro_vae.lab import reports

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir, device=arguments.device)
    run.config.system.check_log_prob(arguments.run)
    split = getattr(run.dataset, arguments.split)
    if split is None:
        raise ConfigError(f"{run.dataset.name} has no split {arguments.split!r}")
    methods = estimates.chosen(arguments.method, run.config)
    reports.check_files(arguments.run)
    print(f"{arguments.run}, weights of epoch {run.epoch}")
    print(reports.assess(run, split, arguments.settings.limit).text, flush=True)
    name = "log_marginal" if arguments.split == "test" else f"log_marginal_{arguments.split}"
    try:
        estimates.estimate_all(run, split, methods, arguments.settings, arguments.run / f"{name}.json", print)
    except KeyboardInterrupt:
        words = sys.argv[1:] if sys.argv[0].endswith("estimate.py") else sys.argv[2:]
        again = f"{cli.program('estimate')} {shlex.join(words)}"
        cli.exit_interrupted(f"interrupted; go on by the same command:\n    {again}")
    print(f"figures in {reports.save_figures(arguments.run, run)}")
