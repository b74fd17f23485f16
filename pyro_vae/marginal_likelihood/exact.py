r"""Exact values: enumeration of discrete latents, and quadrature in up to three continuous ones.

Sums and integrals depend on no guide and need not find any mode, so that they are a check on all that does.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.compiled import CompiledFunction
from pyro_vae.marginal_likelihood.lattices import Lattices, log_density
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.marginal_likelihood.runner import Estimator
from pyro_vae.traces import Program, log_joint
from pyro_vae.traces.blocks import Advance, Batch, PerDatum, rows_at_once

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
        data: Words on the data, for the summary.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is a continuous latent site, or a discrete one that cannot be enumerated.
    """
    return _Enumeration(model, batch).estimate(data, progress, None)


class _Enumeration(Estimator):
    name, bound = "enumeration", "exact"

    def __init__(self, model: Program, batch: Batch) -> None:
        super().__init__(model, None, batch)
        self.size = rows_at_once(model, batch)

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        values = sum(log_joint(self.model, {}, *block))[0].double().cpu()
        advance(len(values))
        return {"values": values, "std_error": torch.zeros_like(values)}

    def effort(self, columns: PerDatum) -> str:
        return "all values"


@checked
def quadrature(
    model: Program,
    *batch: Tensor,
    tolerance: Positive = 1e-3,
    max_nodes: Count = 1_000_000,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Exact log p(x) of a model of up to three latent dimensions, by an adaptive lattice.

    The rule is in :mod:`pyro_vae.marginal_likelihood.lattices`. Discrete sites are summed out.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        tolerance: Refine a datum's lattice until its value changes by less, nats, and before by less than ten
            times as much.
        max_nodes: Stop where the lattice of a datum would get larger.
        data: Words on the data, for the summary.
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
    return _Quadrature(model, batch, tolerance, max_nodes).estimate(data, progress, checkpoint)


class _Quadrature(Estimator):
    name, bound, size = "quadrature", "exact", _BLOCK

    def __init__(self, model: Program, batch: Batch, tolerance: float, max_nodes: int) -> None:
        super().__init__(model, None, batch)
        self.allowed = max(tolerance, _MASS)
        self.settings = {"tolerance": tolerance, "max_nodes": max_nodes}
        self.score = CompiledFunction(
            lambda position, *rows: log_density(model, position, *rows), roots=(model,)
        )

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        lattices = Lattices(self.model, self.score, block, **self.settings)
        columns, mass = lattices.integrate(), lattices.prior_mass()
        columns["converged"] *= (mass - 1).abs() <= self.allowed
        columns["std_error"][columns["converged"] == 0] = math.inf
        advance(len(block[0]))
        return columns | {"prior_mass": mass}

    def effort(self, columns: PerDatum) -> str:
        nodes, tolerance = columns["nodes"].mean().item(), self.settings["tolerance"]
        return f"{nodes:,.0f} nodes a datum, tolerance {tolerance:g} nats"

    def notes(self, columns: PerDatum) -> list[str]:
        unseen = columns["prior_mass"][(columns["prior_mass"] - 1).abs() > self.allowed]
        if not len(unseen):
            return []
        return [
            f"not exact for {len(unseen):,} data: the prior integrates to {unseen[0].item():.3g} and not to "
            "1. It is not normalised, or has mass where its numbers end (try float64)"
        ]
