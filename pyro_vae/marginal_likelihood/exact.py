r"""Exact values: enumeration of discrete latents, and quadrature in up to three continuous ones.

Sums and integrals depend on no guide and need not find any mode, so that they are a check on all that does.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.compiled import CompiledFunction
from pyro_vae.marginal_likelihood.lattices import Lattices, log_density
from pyro_vae.marginal_likelihood.result import LogMarginal, log_marginal
from pyro_vae.traces import Program, log_joint
from pyro_vae.traces.blocks import Batch, Columns, by_blocks, check_sizes, evaluation, rows_at_once

_MASS = 1e-3  # by which a prior may seem to miss or exceed 1
_BLOCK = 8  # data whose lattices are refined together


@checked
def enumeration(
    model: Program,
    *batch: Tensor,
    data: str | None = None,
    progress: bool = True,
) -> LogMarginal:
    r"""Exact :math:`\log p(x) = \log \sum_y p(x, y)` of a model all of whose latents are discrete.

    Sums are carried out site by site (Pyro's variable elimination), so that chains of sites cost no more than
    their length. Where there are continuous latents as well, the other estimators sum out the discrete ones.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        data: What the data are, for the summary.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is a continuous latent site, or a discrete one that cannot be enumerated.
    """
    check_sizes(batch)

    def estimate(block: Batch, advance: Callable[[int], None]) -> Columns:
        values = sum(log_joint(model, {}, *block))[0].double().cpu()
        advance(len(values))
        return {"values": values, "std_error": torch.zeros_like(values)}

    columns = by_blocks(
        estimate,
        batch,
        rows_at_once(model, batch),
        programs=(model,),
        method="enumeration",
        settings={},
        work=1,
        unit="datum",
        progress=progress,
        checkpoint=None,
    )
    with evaluation(model):
        return log_marginal(
            columns,
            model=model,
            batch=batch,
            method="enumeration",
            bound="exact",
            effort="all values",
            data=data,
        )


@checked
def quadrature(
    model: Program,
    *batch: Tensor,
    tolerance: float = 1e-3,
    max_nodes: int = 1_000_000,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Exact log p(x) of a model of up to three latent dimensions, by an adaptive lattice.

    How is in :mod:`pyro_vae.marginal_likelihood.lattices`. Discrete sites are summed out.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        tolerance: Refine a datum's lattice until its value changes by less, nats, and before by less than ten
            times as much.
        max_nodes: Stop where the lattice of a datum would get larger.
        data: What the data are, for the summary.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Returns:
        ``std_error`` is the last change of every value, or a tenth of the one before, far above its
        error, and what the rounding of nodes and densities may add; infinite where it has not converged.
        Diagnostics ``nodes``, ``converged`` (1 or 0) and ``prior_mass``, what the prior integrates to by the
        same rule: where it is not 1, there is mass that the lattice does not see, and the value counts as
        not converged. What no error tells of is a spike of the likelihood that is far narrower than the
        posterior and has no slope at the nodes around it.

    Raises:
        ValueError: If there are more than three latent dimensions, or a latent site is discrete and cannot be
            summed out, or has a support that is not the image of all real numbers.
    """
    check_sizes(batch, max_nodes=max_nodes)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive (nats), not {tolerance}")
    score = CompiledFunction(lambda position, *rows: log_density(model, position, *rows), roots=(model,))

    def estimate(block: Batch, advance: Callable[[int], None]) -> Columns:
        lattices = Lattices(model, score, block, tolerance, max_nodes)
        columns, mass = lattices.integrate(), lattices.prior_mass()
        columns["converged"] *= (mass - 1).abs() <= max(tolerance, _MASS)
        columns["std_error"][columns["converged"] == 0] = math.inf
        advance(len(block[0]))
        return columns | {"prior_mass": mass}

    columns = by_blocks(
        estimate,
        batch,
        _BLOCK,
        programs=(model,),
        method="quadrature",
        settings={"tolerance": tolerance, "max_nodes": max_nodes},
        work=1,
        unit="datum",
        progress=progress,
        checkpoint=checkpoint,
    )
    mass = columns["prior_mass"]
    unseen = (mass - 1).abs() > max(tolerance, _MASS)
    missed = int(((columns["converged"] == 0) & ~unseen).sum())
    notes = []
    if missed:
        notes.append(f"not converged for {missed:,} data: give more max_nodes, or use ais")
    if unseen.any():
        notes.append(
            f"not exact for {int(unseen.sum()):,} data: the prior integrates to {mass[unseen][0].item():.3g} "
            "and not to 1. It is not normalised, or has mass where its numbers end (try float64)"
        )
    with evaluation(model):
        return log_marginal(
            columns,
            model=model,
            batch=batch,
            method="quadrature",
            bound="exact",
            effort=f"{columns['nodes'].mean().item():,.0f} nodes a datum, tolerance {tolerance:g} nats",
            data=data,
            tolerance=tolerance,
            notes=notes,
        )
