r"""Exact values: enumeration of discrete latents, and quadrature in up to three continuous ones.

*Quadrature* integrates :math:`p(x) = \int p(x, z)\, dz` in unconstrained space by the trapezoidal rule on a
lattice,

.. math:: p(x) \approx h^d \sum_k p(x, z(u_k)) \left| \frac{\partial z}{\partial u} \right|, \qquad u_k = c +
h k,

whose error for smooth integrands that vanish far out falls faster than any power of h: for a normal of
standard deviation s it is :math:`2 e^{-2 \pi^2 s^2 / h^2}`, :math:`5 \cdot 10^{-9}` at h = s (Trefethen &
Weideman, *The exponentially convergent trapezoidal rule*, 2014). The lattice is adaptive: it starts coarse
over the prior, keeps what lies within some 10 standard deviations of posterior mass, grows there where mass
is at its border, and is halved until the value no longer changes. Nothing depends on a guide or on finding
one mode, so that it is a check on everything that does.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from pyro_vae.blocks import Batch, Columns, by_blocks, check_sizes, evaluation, rows_at_once
from pyro_vae.compiled import CompiledFunction
from pyro_vae.marginal_likelihood.result import LogMarginal, log_marginal
from pyro_vae.posterior import coordinates
from pyro_vae.traces import Program, at_unconstrained, draw_latents, log_joint, unconstrain

MAX_DIMENSIONS = 3
_START = 4.0  # the lattice starts over so many standard deviations of the prior to both sides,
_SPACING = 0.5  # with this spacing, in the same unit
_KEPT = (60.0, 45.0, 35.0, 30.0)  # nats below the maximum that are kept, from the coarsest level on
_BLOCK = 32  # data whose lattices are refined together


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
        rows_at_once(batch),
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


def quadrature(
    model: Program,
    *batch: Tensor,
    tolerance: float = 1e-3,
    max_nodes: int = 200_000,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Exact log p(x) of a model of up to three latent dimensions, by an adaptive lattice (see the module).

    Discrete sites are summed out.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        tolerance: Refine a datum's lattice until its value changes by less, nats.
        max_nodes: Stop where the lattice of a datum would get larger.
        data: What the data are, for the summary.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Returns:
        ``std_error`` is the last change of every value, far above its error where the rule has converged.
        Diagnostics ``nodes`` and ``converged`` (1 or 0).

    Raises:
        ValueError: If there are more than three latent dimensions, or a latent site is discrete and cannot be
            summed out, or has a support that is not the image of all real numbers.
    """
    check_sizes(batch, max_nodes=max_nodes)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive (nats), not {tolerance}")
    score = CompiledFunction(lambda position, *rows: _log_density(model, position, *rows), roots=(model,))

    def estimate(block: Batch, advance: Callable[[int], None]) -> Columns:
        columns = _Lattices(model, score, block, tolerance, max_nodes).integrate()
        advance(len(block[0]))
        return columns

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
    missed = int((columns["converged"] == 0).sum())
    note = f"not converged for {missed:,} data: give more max_nodes, or use ais"
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
            **({"notes": [note]} if missed else {}),
        )


def _log_density(model: Program, position: dict[str, Tensor], *rows: Tensor) -> dict[str, Tensor]:
    point = at_unconstrained(model, position, *rows)
    return {"log_density": sum(point.log_joint) + point.log_jacobian}


class _Lattices:
    """The lattices of a block of data: nodes are pairs of a datum and whole-numbered coordinates."""

    def __init__(
        self, model: Program, score: CompiledFunction, block: Batch, tolerance: float, max_nodes: int
    ) -> None:
        self.score, self.block, self.tolerance, self.max_nodes = score, block, tolerance, max_nodes
        position = unconstrain(model, draw_latents(model, *block, num_samples=256), *block)
        self.shapes = {name: value.shape[2:] for name, value in position.items()}
        prior = coordinates({name: value.unsqueeze(1) for name, value in position.items()})[:, 0]
        self.dim = prior.shape[-1]
        if self.dim > MAX_DIMENSIONS:
            raise ValueError(
                f"the model has {self.dim} latent dimensions, but quadrature takes at most {MAX_DIMENSIONS}: "
                "use ais"
            )
        self.centre, self.scale = prior.mean(0), prior.std(0).clamp(min=1e-6)
        self.rows = rows_at_once(block)
        steps = torch.arange(-1, 2, device=prior.device)
        self.neighbours = torch.cartesian_prod(*[steps] * self.dim).reshape(-1, self.dim)

    def integrate(self) -> Columns:
        count = len(self.block[0])
        values = torch.full((count,), -math.inf, dtype=torch.float64)
        change, nodes = torch.full_like(values, math.inf), torch.zeros_like(values)
        converged, active = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
        reach = round(_START / _SPACING)
        line = torch.arange(-reach, reach + 1, device=self.centre.device)
        grid = torch.cartesian_prod(*[line] * self.dim).reshape(-1, self.dim)
        datum = torch.arange(count, device=grid.device).repeat_interleave(len(grid))
        datum, coords, log_f = self._grown(datum, grid.repeat(count, 1), _SPACING, _KEPT[0])
        level = 0
        while True:
            total, spread, size = self._sums(datum, log_f, _SPACING / 2**level)
            change = torch.where(active, (total - values).abs(), change)
            values = torch.where(active, total, values)
            nodes += size
            # A lattice too coarse for the mass has it all on a few nodes, and may agree with another such.
            converged |= active & (change < self.tolerance) & (spread > 3.0**self.dim)
            kept = self._kept(datum, log_f, _KEPT[min(level, len(_KEPT) - 1)])
            children = torch.bincount(datum[kept].cpu(), minlength=count) * 2**self.dim
            active &= ~converged & (children <= self.max_nodes)
            if not active.any():
                break
            kept &= active.to(datum.device)[datum]
            level += 1
            datum, coords = self._unique(
                datum[kept].repeat_interleave(len(self.neighbours)),
                (2 * coords[kept].unsqueeze(1) + self.neighbours).flatten(0, 1),
            )
            log_f = self._evaluate(datum, coords, _SPACING / 2**level)
        return {"values": values, "std_error": change, "nodes": nodes, "converged": converged.double()}

    def _grown(
        self, datum: Tensor, coords: Tensor, spacing: float, cutoff: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes, and more of them around those at the border that carry mass."""
        log_f = self._evaluate(datum, coords, spacing)
        while True:
            kept = self._kept(datum, log_f, cutoff)
            around = (coords[kept].unsqueeze(1) + self.neighbours).flatten(0, 1)
            new = self._unique(
                torch.cat([datum, datum[kept].repeat_interleave(len(self.neighbours))]),
                torch.cat([coords, around]),
                known=len(datum),
            )
            if not len(new[0]):
                return datum, coords, log_f
            log_f = torch.cat([log_f, self._evaluate(*new, spacing)])
            datum, coords = torch.cat([datum, new[0]]), torch.cat([coords, new[1]])

    def _unique(self, datum: Tensor, coords: Tensor, known: int = 0) -> tuple[Tensor, Tensor]:
        """Every node once; without those among the first ``known``."""
        side = 2 ** (57 // self.dim)
        key = datum
        for column in coords.T:
            key = key * side + column + side // 2
        unique, inverse = key.unique(return_inverse=True)
        first = torch.full_like(unique, len(key)).scatter_reduce(
            0, inverse, torch.arange(len(key), device=key.device), "amin"
        )
        first = first[first >= known]
        return datum[first], coords[first]

    def _evaluate(
        self, datum: Int[Tensor, " nodes"], coords: Int[Tensor, "nodes dim"], spacing: float
    ) -> Tensor:
        """Log p(x, z(u)) + log |dz/du| at the nodes, in pieces of one size."""
        pieces = []
        for piece, at in zip(datum.split(self.rows), coords.split(self.rows), strict=True):
            count = len(piece)
            if count < self.rows:  # a compiled graph is for one size
                piece = torch.nn.functional.pad(piece, (0, self.rows - count))
                at = torch.nn.functional.pad(at, (0, 0, 0, self.rows - count))
            u = self.centre[piece] + spacing * self.scale[piece] * at
            position, start = {}, 0
            for name, shape in self.shapes.items():
                position[name] = u[:, start : start + shape.numel()].reshape(1, len(piece), *shape)
                start += shape.numel()
            rows = [argument[piece] for argument in self.block]
            pieces.append(self.score(position, *rows)[0]["log_density"][0, :count].double())
        return torch.cat(pieces)

    def _maxima(self, datum: Tensor, log_f: Tensor) -> Tensor:
        empty = torch.full((len(self.block[0]),), -math.inf, dtype=log_f.dtype, device=log_f.device)
        return empty.scatter_reduce(0, datum, log_f, "amax")

    def _kept(self, datum: Tensor, log_f: Tensor, cutoff: float) -> Tensor:
        return log_f > self._maxima(datum, log_f)[datum] - cutoff

    def _sums(self, datum: Tensor, log_f: Tensor, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of every datum the integral, the number of nodes that its mass is spread over, and of all nodes."""
        count = len(self.block[0])
        top = self._maxima(datum, log_f)
        weight = (log_f - top[datum]).exp()
        zeros = torch.zeros(count, dtype=log_f.dtype, device=log_f.device)
        mass = zeros.scatter_add(0, datum, weight)
        energy = zeros.scatter_add(0, datum, torch.xlogy(weight, weight))
        spread = (mass.log() - energy / mass).exp()  # exp of the entropy of weight / mass
        log_volume = self.dim * math.log(spacing) + self.scale.double().log().sum(-1)
        size = torch.bincount(datum, minlength=count).to(log_f.dtype)
        return tuple(t.cpu() for t in (top + mass.log() + log_volume, spread, size))
