"""``train``: train a model, say how good it is, and keep the run in a folder."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pyro_vae.lab import cli, runs
from pyro_vae.lab.config import Config, ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a model, say how good it is, and keep the run in a folder.

    The folder holds config.json; metrics.jsonl, a row an epoch and a last one with test/elbo; checkpoint.pt,
    the last epoch; best.pt, the epoch with the best bound on validation data; log_marginal.json; and figures.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder; default: runs/DATA, or the first of runs/DATA-2, ... that is free."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with the run in this folder; its configuration is kept, but --epochs may be raised and --patience
    and --test-samples be others. It then goes on as if it had been started so."""
    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)


def parse(words: Sequence[str], program: str) -> Arguments:
    """Read the command line; with --resume, what it does not say is taken from the run."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", type=Path)
    resume = peek.parse_known_args(words)[0].resume
    config = runs.load_config(resume) if resume else Config()
    return tyro.cli(Arguments, prog=program, args=words, default=Arguments(resume=resume, config=config))


def main(arguments: Arguments) -> None:
    """Train; interrupted, say how to go on."""
    if arguments.resume and arguments.out:
        raise ConfigError("--resume goes on in the folder of its run: leave out --out")
    from pyro_vae.lab.train import train

    folder = arguments.resume or arguments.out or runs.free_folder(arguments.config)
    try:
        train(arguments.config, folder, resume=bool(arguments.resume))
    except KeyboardInterrupt:
        again = f"{cli.program('train')} --resume {folder}"
        cli.exit_interrupted(f"interrupted; go on from the last whole epoch by\n    {again}")
