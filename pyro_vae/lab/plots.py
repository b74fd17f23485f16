r"""Figures: from metrics, pairs and estimates to matplotlib figures.

Each function returns a new :class:`matplotlib.figure.Figure`, which a notebook shows and ``savefig`` writes;
none touches pyplot's state or the disk.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.marginal_likelihood import LogMarginal, best_estimate

Decode = Callable[[Tensor], Tensor]  # latents (*, latent) -> E[x | z] (*, data)


def learning_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Bounds against the number of training data seen, on a log axis as in the paper's figure 2.

    Of an autoencoder, which has none, the log-likelihood at its codes.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    metric = "elbo" if any("train/elbo" in row for row in history) else "log_joint"
    for part, style in ("train", "-"), ("valid", "--"), ("test", "o"):
        rows = [row for row in history if f"{part}/{metric}" in row]
        if rows:
            samples = [row["samples"] for row in rows]
            axes.plot(samples, [row[f"{part}/{metric}"] for row in rows], style, label=part)
    _clip_to_late_values(axes, [row.get(f"train/{metric}") for row in history])
    words = {"elbo": "ELBO", "log_joint": "log p(x, z) at the code"}[metric]
    axes.set(xscale="log", xlabel="training data seen", ylabel=f"{words} (nats per datum)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _clip_to_late_values(axes: Axes, values: Sequence[float | None]) -> None:
    """The first epochs are far below the rest; leave the worst of a long history out of the picture."""
    values = np.array([value for value in values if value is not None])
    if len(values) >= 20:
        low, high = np.quantile(values, 0.02), axes.dataLim.y1
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def is_image(shape: tuple[int, ...]) -> bool:
    """Return whether data of this shape can be drawn: (height, width), or (height, width, 1 or 3)."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))


def image_grid(
    rows: Sequence[Float[Tensor, "_ data"]], shape: tuple[int, ...], titles: Sequence[str] = ()
) -> Figure:
    """Rows of images on one grey scale from 0 to 1, each row with its title.

    Images that are mostly 0, such as digits, are drawn dark on white; others, such as faces, as they are.

    Args:
        rows: Data, flattened.
        shape: Of a datum: (height, width), or (height, width, 3) for colour.
        titles: One a row.
    """
    if not is_image(shape):
        raise ValueError(f"data of shape {tuple(shape)} are no images")
    figure = Figure(
        figsize=(0.6 * len(rows[0]), 0.6 * len(rows) * shape[0] / shape[1] + 0.25 * len(titles)),
        layout="constrained",
    )
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        images = row.detach().cpu().reshape(len(row), *shape).clamp(0, 1)
        axes.imshow(torch.cat(list(images), dim=1).numpy(), cmap=_grey(rows[0]), vmin=0, vmax=1)
        axes.axis("off")
    for axes, title in zip(figure.axes, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=8)
    return figure


def manifold(decode: Decode, shape: tuple[int, ...], size: int = 20) -> Figure:
    r"""The means of p(x|z) on a grid of two latents, as in figure 4 of Kingma & Welling 2013.

    The grid is even in probability under N(0, I): :math:`z = \Phi^{-1}(u)`, :math:`u = (i - 1/2) / size`.

    Args:
        decode: From z, (grid, 2), to E[x | z].
        shape: Of a datum.
        size: Images a side.
    """
    quantiles = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    z = torch.cartesian_prod(-quantiles, quantiles)
    images = decode(z).detach().cpu().reshape(size, size, *shape).clamp(0, 1)
    figure = Figure(figsize=(8, 8 * shape[0] / shape[1]), layout="constrained")
    axes = figure.subplots()
    rows = [torch.cat(list(row), dim=1) for row in images]
    axes.imshow(torch.cat(rows).numpy(), cmap=_grey(images), vmin=0, vmax=1)
    axes.axis("off")
    return figure


def _grey(images: Tensor) -> str:
    return "gray_r" if images.mean() < 0.5 else "gray"


def scatter(codes: Float[Tensor, "data 2"], labels: Int[Tensor, " data"] | None = None) -> Figure:
    """Posterior means in the plane of two latents, coloured by class."""
    codes = codes.detach().cpu()
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    if labels is None:
        axes.scatter(*codes.T.numpy(), s=6)
    else:
        few = len(labels.unique()) <= 10
        points = axes.scatter(
            *codes.T.numpy(), c=labels.cpu().numpy(), s=6, cmap="tab10" if few else "viridis"
        )
        if few:
            axes.legend(*points.legend_elements(), title="class", loc="best", fontsize=7)
    axes.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    axes.grid(alpha=0.3)
    return figure


def log_marginal(result: LogMarginal) -> Figure:
    """The histogram of log p(x) over data, with the mean and its two errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = result.values.cpu().numpy()
    axes.hist(values, bins=min(50, max(5, len(values) // 10)), color="tab:blue", alpha=0.6)
    both = np.hypot(result.monte_carlo_error, np.nan_to_num(result.data_error))
    axes.axvspan(result.mean - both, result.mean + both, color="tab:red", alpha=0.3)
    axes.axvline(
        result.mean,
        color="tab:red",
        label=f"{result.mean:.2f} ± {result.monte_carlo_error:.2g} (Monte Carlo) "
        f"± {result.data_error:.2g} (data)",
    )
    axes.set(xlabel=f"{result.scores} (nats)", ylabel="data")
    axes.set_title(result.settings["data"], fontsize=8)
    axes.legend(fontsize=8)
    return figure


def sandwich(estimates: Mapping[str, LogMarginal]) -> Figure:
    """Bounds from both sides: of the mean over the number of importance samples, and of every datum.

    Left, the importance-weighted bound over K and the other estimates as lines with their Monte Carlo errors;
    right, every datum's estimates minus its most reliable one (``marginal_likelihood.best_estimate``), in the
    order of the importance-sampling error.

    Args:
        estimates: By name of the method, all of the same data; simulated ones are left out.
    """
    estimates = {n: e for n, e in estimates.items() if not e.is_simulated}
    best = best_estimate(estimates)
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_k, per_datum = figure.subplots(1, 2)
    colours = {name: f"C{i}" for i, name in enumerate(estimates)}
    for name, estimate in estimates.items():
        colour, label = colours[name], f"{name} ({estimate.bound})"
        if estimate.curve:
            sizes = sorted(estimate.curve)
            means = [estimate.curve[size].mean().item() for size in sizes]
            over_k.plot(sizes, means, "o-", color=colour, label=label)
        else:
            over_k.axhline(estimate.mean, color=colour, label=label)
            if math.isfinite(error := estimate.monte_carlo_error):
                over_k.axhspan(estimate.mean - error, estimate.mean + error, color=colour, alpha=0.2)
    over_k.set(xscale="log", xlabel="importance samples K", ylabel=f"mean {best.scores} (nats)")
    first = estimates.get("importance_sampling", next(iter(estimates.values())))
    order = (first.values - best.values).argsort()
    for name, estimate in estimates.items():
        if estimate is not best:
            difference = (estimate.values - best.values)[order].numpy()
            per_datum.plot(difference, ".", ms=3, color=colours[name], label=f"{name} ({estimate.bound})")
    per_datum.axhline(0, color=colours[_name_of(best, estimates)], label=f"{best.method} ({best.bound})")
    per_datum.set(
        xlabel=f"data, by the error of {first.method.replace('_', ' ')}", ylabel=f"minus {best.method} (nats)"
    )
    per_datum.set_yscale("symlog", linthresh=0.1)
    for axes in (over_k, per_datum):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(best.settings["data"], fontsize=8)
    return figure


def _name_of(estimate: LogMarginal, estimates: Mapping[str, LogMarginal]) -> str:
    return next(name for name, other in estimates.items() if other is estimate)


def certificate(result: LogMarginal) -> Figure:
    """Lower and upper bounds of every simulated datum, by their gap (bidirectional Monte Carlo)."""
    if result.upper is None:
        raise ValueError("these estimates have no upper bounds: make them with bidirectional")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    gaps = (result.upper - result.values).sort().values.numpy()
    axes.plot(gaps, ".", ms=4)
    axes.axhline(0, color="0.6")
    axes.axhline(result.gap, color="tab:red", label=f"mean {result.gap:.3f} nats")
    axes.set(xlabel="simulated data", ylabel="upper - lower bound (nats)", title=result.settings["effort"])
    axes.title.set_fontsize(8)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def khat(result: LogMarginal) -> Figure:
    """Pareto k-hat and Monte Carlo error of every datum; to the right of 0.7 values are unreliable."""
    if result.khat is None:
        raise ValueError("these estimates have no k-hat: take more samples")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    finite = torch.isfinite(result.khat)
    axes.scatter(result.khat[finite].cpu(), result.std_error[finite].cpu(), s=6, alpha=0.5)
    axes.axvline(0.5, color="tab:orange", linestyle=":", label="0.5: infinite variance above")
    axes.axvline(0.7, color="tab:red", linestyle="--", label="0.7: unreliable above")
    axes.set(
        xlabel=r"Pareto $\hat k$",
        ylabel="Monte Carlo error (nats)",
        title=f"{100 * result.unreliable_share:.1f} % of {len(result.khat):,} data above 0.7",
    )
    if finite.any() and (result.std_error[finite] > 0).all():
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure
