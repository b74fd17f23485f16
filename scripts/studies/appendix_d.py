"""Failure of the paper's estimator of log p(x) as latents are added, where the answer is known.

    python scripts/studies/appendix_d.py --out results

Appendix D of Auto-Encoding Variational Bayes (Kingma & Welling 2013) fits a density to posterior draws and
averages its ratio to p(x, z) over others. Here the model is linear and Gaussian, so that the posterior draws
are exact and independent, and so is log p(x): what is left is the error of the estimator itself. Prints a
Markdown table, and writes figures/appendix_d.png into the folder.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pyro_vae.lab import cli

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

DIMENSIONS = (2, 3, 5, 10, 20)
DRAWS = (25, 250, 2500)  # for the fit, and as many for the mean


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Failure of the paper's estimator of log p(x) as latents are added, where the answer is known."""

    out: Path = Path("results")
    """Folder for figures/appendix_d.png."""
    images: int = 100
    """Data for every number."""
    data_dim: int = 30
    """Dimensions of a datum."""
    seed: int = 0
    """Seed of the models, the data and the draws."""


def main() -> None:
    """Measure, print and draw."""
    arguments = tyro.cli(Arguments)
    import torch

    from pyro_vae.marginal_likelihood import fit_kernel_density, fit_normal

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(arguments.seed)
    fits = {
        "normal": fit_normal,
        "the authors' kernels": fit_kernel_density,
        "kernels, Scott": fit_scott,
        "prior: harmonic mean": lambda draws: standard_normal_log_prob,
    }
    errors = {}
    for latent_dim in DIMENSIONS:
        for draws in DRAWS:
            for name, error in measured(arguments, latent_dim, draws, fits).items():
                errors[latent_dim, draws, name] = error
    print("| latents | draws, fit + mean | " + " | ".join(fits) + " |")
    print("|" + "---|" * (2 + len(fits)))
    for latent_dim in DIMENSIONS:
        for draws in DRAWS:
            cells = [errors[latent_dim, draws, name] for name in fits]
            numbers = [f"{error.mean():+.2f} ({error.std():.2f})" for error in cells]
            print(f"| {latent_dim} | {draws} + {draws} | " + " | ".join(numbers) + " |")
    path = arguments.out / "figures" / "appendix_d.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(errors, list(fits)).savefig(path, dpi=150)
    print(f"figure in {path}")


def standard_normal_log_prob(z: "torch.Tensor") -> "torch.Tensor":
    """Log N(z; 0, I)."""
    import torch

    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def fit_scott(draws: "torch.Tensor") -> Callable:
    """SciPy's kernel density with Scott's bandwidth, which does without the authors' choice of one."""
    import torch
    from scipy.stats import gaussian_kde

    fitted = [gaussian_kde(one.T.numpy()) for one in draws.unbind(1)]
    return lambda points: torch.stack(
        [
            torch.from_numpy(kde.logpdf(one.T.numpy()))
            for kde, one in zip(fitted, points.unbind(1), strict=True)
        ],
        1,
    )


def measured(
    arguments: Arguments, latent_dim: int, draws: int, fits: dict[str, Callable]
) -> "dict[str, torch.Tensor]":
    """Estimate minus log p(x) of every datum, by fit."""
    import torch

    from pyro_vae.marginal_likelihood.reciprocal import reciprocal_importance
    from pyro_vae.oracles import LinearGaussian

    oracle = LinearGaussian.random(arguments.data_dim, latent_dim, scale=1.0)
    x = oracle.sample(arguments.images)
    z = oracle.posterior(x).sample((2, draws))
    likelihood = torch.distributions.Normal(z @ oracle.weight.T + oracle.mean, oracle.scale)
    log_joint = standard_normal_log_prob(z) + likelihood.log_prob(x).sum(-1)
    exact = oracle.log_prob(x)
    return {name: reciprocal_importance(log_joint, z, fit)[0] - exact for name, fit in fits.items()}


def drawn(errors: "dict[tuple[int, int, str], torch.Tensor]", names: list[str]) -> "Figure":
    """Mean error and its spread over data against the number of latents, one panel a fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for i, draws in enumerate(DRAWS):
            means = [errors[dim, draws, name].mean().item() for dim in DIMENSIONS]
            spread = [errors[dim, draws, name].std().item() for dim in DIMENSIONS]
            label = f"{draws} + {draws} draws"
            axes.errorbar(DIMENSIONS, means, spread, fmt="o-", capsize=3, color=f"C{i}", label=label)
        axes.axhline(0, color="0.6")
        axes.set(title=f"density: {name}", xlabel="latent dimensions", ylabel="estimate - log p(x) (nats)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    cli.run(main)
