"""Figure 5 of the paper: samples from models of MNIST with 2, 5, 10 and 20 latents.

    python scripts/paper/figure5.py

Trains the models that are not trained yet, as in figure 2, and draws results/figures/paper_figure5.png: the
means of p(x|z) at draws from the prior.
"""

import dataclasses
from typing import Annotated

import curves
import figure2
import tyro
from reproduction import Common, Setting

from pyro_vae.lab import cli, jobs

_SIDE = 10  # images


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Figure 5 of the paper: samples from models of MNIST."""

    latent_dim: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (2, 5, 10, 20)
    """Numbers of latents."""
    seed: int = 0
    """Seed of the initial weights, the minibatches and the noise."""
    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


def main() -> None:
    """Train and draw."""
    arguments = tyro.cli(Arguments)
    common = arguments.common
    settings = [Setting("mnist", dim, "aevb", 500, seed=arguments.seed) for dim in arguments.latent_dim]
    jobs.run_all(figure2.make_curve, settings, common)
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(settings), 3.5), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        model, (height, width) = figure2.trained_model(setting, common)
        torch.manual_seed(arguments.seed)
        with torch.no_grad():
            images = model.likelihood(model.prior().sample((_SIDE**2,))).mean.cpu()
        sheet = images.reshape(_SIDE, _SIDE, height, width).movedim(2, 1).reshape(_SIDE * height, -1)
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"{setting.latent_dim} latents")
    print(f"figure in {curves.save_figure(figure, common, 'figure5')}")


if __name__ == "__main__":
    cli.run(main)
