"""Figure 4 of the paper: the manifolds that AEVB learns with two latents, of MNIST and of Frey Face.

    python scripts/paper/figure4.py

Trains the models that are not trained yet, as in figure 2, and draws
results/figures/paper_figure4_*.png: the mean of p(x|z) on a grid that is even in probability.
"""

import dataclasses
from typing import Annotated

import curves
import figure2
import tyro
from reproduction import Common, Setting

from pyro_vae.lab import cli, jobs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Figure 4 of the paper: the manifolds that AEVB learns with two latents."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("mnist", "frey_face")
    """mnist, frey_face or both."""
    seed: int = 0
    """Seed of the initial weights, the minibatches and the noise."""
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train and draw."""
    arguments = tyro.cli(Arguments)
    figure2.check_data(arguments.data)
    common = arguments.common
    settings = [
        Setting(data, 2, "aevb", figure2.HIDDEN[data], seed=arguments.seed) for data in arguments.data
    ]
    jobs.run_all(figure2.make_curve, settings, common)
    import torch

    from pyro_vae.lab import plots

    for setting in settings:
        model, shape = figure2.trained_model(setting, common)
        with torch.no_grad():
            figure = plots.manifold(lambda z, model=model: model.likelihood(z).mean, shape)
        print(f"figure in {curves.save_figure(figure, common, f'figure4_{setting.data}')}")


if __name__ == "__main__":
    cli.run(main)
