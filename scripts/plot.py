"""Draw a run: learning curves, reconstructions, samples, latent space, log p(x).

    python scripts/plot.py runs/mnist

Reads the run folder and the data, and writes PNG files into RUN/figures.
"""

import dataclasses
from pathlib import Path

import tyro

from pyro_vae import command_line, runs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw a run: learning curves, reconstructions, samples, latent space, log p(x).

    Reads the run folder and the data, and writes PNG files into RUN/figures.
    """

    run: tyro.conf.Positional[Path]
    """Folder that train.py made."""
    data_dir: Path | None = None
    """Where the files are, if not where they were."""


def main() -> None:
    """Load the run and draw it."""
    arguments = tyro.cli(Arguments)

    from pyro_vae import reports

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir)
    target = reports.save_figures(arguments.run, run)
    for path in sorted(target.glob("*.png")):
        print(path)


if __name__ == "__main__":
    command_line.run(main)
