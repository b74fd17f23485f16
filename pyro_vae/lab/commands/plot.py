"""``plot``: draw a run: learning curves, reconstructions, samples, latent space, log p(x)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from pyro_vae.lab import runs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw a run: learning curves, reconstructions, samples, latent space, log p(x).

    Reads the run folder and the data, and writes PNG files into RUN/figures.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run."""
    data_dir: Path | None = None
    """Folder of the data files, if not where they were."""


def parse(words: Sequence[str], program: str) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, prog=program, args=words)


def main(arguments: Arguments) -> None:
    """Load the run and draw it."""
    from pyro_vae.lab import reports

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir)
    target = reports.save_figures(arguments.run, run)
    for path in sorted(target.glob("*.png")):
        print(path)
