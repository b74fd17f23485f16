r"""Integrals over latents by the trapezoidal rule on an adaptive lattice.

Quadrature integrates :math:`p(x) = \int p(x, z)\, dz` in unconstrained space by the trapezoidal rule on a
lattice,

.. math:: p(x) \approx h^d \sum_k p(x, z(u_k)) \left| \frac{\partial z}{\partial u} \right|, \qquad
          u_k = c + h k,

whose error for smooth integrands that vanish far out falls faster than any power of h: for a normal of
standard deviation s it is :math:`2 e^{-2 \pi^2 s^2 / h^2}`, :math:`5 \cdot 10^{-9}` at h = s (Trefethen &
Weideman, *The exponentially convergent trapezoidal rule*, 2014). The lattice is adaptive: it starts coarse
over the prior, keeps the nodes near which there may be mass, grows there where they are at its border, and is
halved until the value no longer changes. It is bent, :math:`u = c + s \sinh(v / 2)`, so that it is as good
as even over the bulk of the prior, and reaches its tails in few steps, however heavy they are. By the same
rule the prior must integrate to 1.

Near a node of a coarse lattice there may be far more mass than at it. What counts is how far :math:`\log f`
would rise towards the neighbouring nodes along its gradient, which is above its maximum among them wherever
it is concave, and at most the prior (with the same allowance) times the largest likelihood. Far outside of
draws from the prior, where the lattice is as wide as it is far away, :math:`\log f` itself counts. Nothing
depends on a guide or on finding one mode, so that it is a check on everything that does. A slope says nothing
of a likelihood that oscillates from node to node: in few dimensions all nodes of the first lattices are kept
(``_WHOLE``), and mass that quasi-random points find where nodes were left counts as error. A peak with heavy
tails may stand between two nodes far out, where neither is near it: its height counts as error, as a climb
from the node beside it finds it. What that can miss is a spike narrower than the distance between these
points, without tails that rise to it.

Where :math:`\log f` is far from what the slopes at two neighbours say, f jumps: half of the interval between
them counts as its error. Where it is nan or infinite beside a node that carries mass, there is no value.
"""

import copy
import math
from typing import NamedTuple

import pyro
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_vae.compiled import CompiledFunction
from pyro_vae.mcmc.posterior import coordinates
from pyro_vae.traces import Program, at_unconstrained, draw_unconstrained
from pyro_vae.traces.blocks import Batch, PerDatum, rows_at_once

MAX_DIMENSIONS = 3
_QUARTILES, _BETWEEN_QUARTILES = torch.tensor([0.25, 0.5, 0.75]), 1.349  # of a standard normal
_BEND = 0.5  # u = c + s sinh(b v) / b: as good as linear over the bulk, and exponentially far in the tails
_START = 4.0  # the lattice starts over so many standard deviations of the prior to both sides,
_SPACING = 0.5  # with this spacing, in the same unit
_WHOLE = {1: 5, 2: 1}  # halvings, by dimensions, before any node is left: 513 and 33 x 33 nodes
_PROBES = 1024  # points that look for mass where nodes were left
_KEPT = 30.0  # nats below the maximum that are kept
_UNSEEN = 15.0  # nats by which the likelihood may be larger between the nodes than at them
_FAR = 6.0  # times as far as the farthest of draws: of exponential tails e**-30 lie beyond
_CARRIES = 1e-5  # of the largest, the density at a node beside which nothing may be unknown
_SEEN = 1e-9  # of the largest, what a node is worth whose rounding counts
_FINEST = 60  # halvings, where neighbouring nodes are one number
_CLIMB = 20  # halvings on the way up to a peak between nodes
_JUMP = 1.0  # nats by which log f differs from what the slopes at two neighbours say, where it jumps


def log_density(model: Program, position: dict[str, Tensor], *rows: Tensor) -> dict[str, Tensor]:
    """Log p(x, z) + log |dz/du| and the part of it that is the prior's, with their gradients by u."""
    with pyro.validation_enabled(False), torch.enable_grad():
        position = {name: u.detach().requires_grad_() for name, u in position.items()}
        point = at_unconstrained(model, position, *rows)
        log_prior = point.log_joint.log_prior + point.log_jacobian
        log_density = log_prior + point.log_joint.log_likelihood
        found = {"log_density": log_density.detach(), "log_prior": log_prior.detach()}
        for name, value in ("prior_gradient", log_prior), ("gradient", log_density):
            gradients = torch.autograd.grad(
                value.sum(), list(position.values()), retain_graph=True, materialize_grads=True
            )
            flat = [g.flatten(2) if g.dim() > 2 else g.unsqueeze(2) for g in gradients]
            found[name] = torch.cat(flat, 2)
    return found


class _Nodes(NamedTuple):
    """Nodes: log f, its prior's part, how far both may rise nearby, and what rounding does to log f.

    ``slope`` is that of log f by the coordinates; ``unknown`` are those where log f is nan or infinite.
    """

    datum: Int[Tensor, " nodes"]
    coords: Int[Tensor, "nodes dim"]
    log_f: Float[Tensor, " nodes"]
    log_prior: Float[Tensor, " nodes"]
    highest: Float[Tensor, " nodes"]
    highest_prior: Float[Tensor, " nodes"]
    rounding: Float[Tensor, " nodes"]
    slope: Float[Tensor, "nodes dim"]
    unknown: Bool[Tensor, " nodes"]

    def joined(self, other: "_Nodes") -> "_Nodes":
        """These and others."""
        return _Nodes(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class _Index:
    """Nodes by their keys."""

    def __init__(self, key: Int[Tensor, " nodes"]) -> None:
        self.key, self.order = key.sort()

    def find(self, key: Int[Tensor, " wanted"]) -> tuple[Bool[Tensor, " wanted"], Int[Tensor, " wanted"]]:
        """Return which of the keys are there, and the numbers of their nodes."""
        place = torch.searchsorted(self.key, key).clamp(max=len(self.key) - 1)
        return self.key[place] == key, self.order[place]


class Lattices:
    """The lattices of a block of data: nodes are pairs of a datum and whole-numbered coordinates.

    Args:
        model: A Pyro program with up to three continuous latent dimensions.
        score: :func:`log_density` of it, from positions and rows.
        block: Its arguments.
        tolerance: That of ``quadrature``, nats.
        max_nodes: The same.

    Raises:
        ValueError: If there are more dimensions.
    """

    def __init__(
        self, model: Program, score: CompiledFunction, block: Batch, tolerance: float, max_nodes: int
    ) -> None:
        self.score, self.block, self.tolerance, self.max_nodes = score, block, tolerance, max_nodes
        self.is_of_prior = False
        position = draw_unconstrained(model, *block, num_samples=256)
        self.shapes = {name: value.shape[2:] for name, value in position.items()}
        prior = coordinates({name: value.unsqueeze(1) for name, value in position.items()})[:, 0]
        self.dim = prior.shape[-1]
        self.prior_of_first = prior[:, 0]
        if self.dim > MAX_DIMENSIONS:
            raise ValueError(
                f"the model has {self.dim} latent dimensions, but quadrature takes at most {MAX_DIMENSIONS}: "
                "use ais"
            )
        low, self.centre, high = prior.quantile(_QUARTILES.to(prior), 0)
        self.scale = ((high - low) / _BETWEEN_QUARTILES).clamp(min=1e-6)
        self.far = _FAR * (prior - self.centre).abs().amax(0)
        self.rows = rows_at_once(model, block)
        self.side = 2 ** (57 // self.dim)  # coordinates along an axis, as far as keys can tell them
        self.strides = [self.side ** (self.dim - 1 - axis) for axis in range(self.dim)]  # between keys
        steps = torch.arange(-1, 2, device=prior.device)
        self.neighbours = torch.cartesian_prod(*[steps] * self.dim).reshape(-1, self.dim)

    def prior_mass(self) -> Float[Tensor, " data"]:
        """Integral of the prior of every datum; once for all if they are the same."""
        count, draws = len(self.block[0]), self.prior_of_first
        datum = torch.arange(count, device=draws.device).repeat_interleave(len(draws))
        log_prior = self._scores(datum, draws.repeat(count, 1))["log_prior"].reshape(count, -1)
        is_shared = torch.allclose(log_prior, log_prior[:1], rtol=1e-4, atol=1e-4)
        alone = copy.copy(self)
        alone.is_of_prior = True
        if is_shared:
            alone.block = tuple(argument[:1] for argument in self.block)
        columns = alone.integrate()
        mass = torch.where(columns["converged"] == 1, columns["values"].exp(), math.nan)
        return mass.expand(count)

    def integrate(self) -> PerDatum:
        """Log-integrals, nats, with errors, numbers of nodes and whether they have converged."""
        count = len(self.block[0])
        values = torch.full((count,), -math.inf, dtype=torch.float64)
        change, nodes = torch.full_like(values, math.inf), torch.zeros_like(values)
        error = change
        converged, active = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
        reach = round(_START / _SPACING)
        line = torch.arange(-reach, reach + 1, device=self.centre.device)
        grid = torch.cartesian_prod(*[line] * self.dim).reshape(-1, self.dim)
        datum = torch.arange(count, device=grid.device).repeat_interleave(len(grid))
        nodes_of = self._grown(datum, grid.repeat(count, 1))
        level = 0
        while True:
            total, spread, size, rounding = self._sums(nodes_of, _SPACING / 2**level)
            before, change = change, torch.where(active, (total - values).abs().nan_to_num(0.0), change)
            values = torch.where(active, total, values)
            nodes += size
            # A lattice too coarse for the mass has it all on a few nodes, and may agree with another such.
            # And two may agree by chance, but not with the one before as well: its change counts a tenth.
            doubt = change if self.is_of_prior else torch.maximum(change, before / 10)
            ready = active & (doubt < self.tolerance) & (spread > 3.0**self.dim)
            if not self.is_of_prior:
                doubt = torch.maximum(doubt, self._beyond(nodes_of, ready, _SPACING / 2**level))
            error = torch.where(active, doubt + rounding, error)
            converged |= ready & (error.isfinite() & (doubt < self.tolerance))
            kept = self._kept(nodes_of) | (level < _WHOLE.get(self.dim, 0))
            children = torch.bincount(nodes_of.datum[kept].cpu(), minlength=count) * 2**self.dim
            active &= ~converged & (size <= self.max_nodes) & (children <= self.max_nodes)
            active &= rounding.isfinite() & (level < _FINEST)
            if not active.any():
                break
            kept &= active.to(kept.device)[nodes_of.datum]
            level += 1
            around = (2 * nodes_of.coords[kept].unsqueeze(1) + self.neighbours).flatten(0, 1)
            around_of = nodes_of.datum[kept].repeat_interleave(len(self.neighbours))
            nodes_of = self._evaluated(*self._unique(around_of, around), _SPACING / 2**level)
            if not len(nodes_of.datum):  # no node has a probability above 0
                break
        error = torch.where(converged, error, math.inf)
        return {"values": values, "std_error": error, "nodes": nodes, "converged": converged.double()}

    def _grown(self, datum: Tensor, coords: Tensor) -> _Nodes:
        """The coarsest nodes, and more of them around those at the border that carry mass."""
        found = self._evaluated(datum, coords, _SPACING)
        while True:
            kept = self._kept(found)
            counts = torch.bincount(found.datum, minlength=len(self.block[0]))
            kept &= (counts <= self.max_nodes)[found.datum]
            new = self._new_around(found, kept, self.neighbours)
            if not len(new[0]):
                return found
            found = found.joined(self._evaluated(*new, _SPACING))

    def _new_around(self, nodes: _Nodes, chosen: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours of the chosen nodes that are not among the nodes."""
        around = (nodes.coords[chosen].unsqueeze(1) + neighbours).flatten(0, 1)
        around_of = nodes.datum[chosen].repeat_interleave(len(neighbours))
        both = torch.cat([nodes.datum, around_of]), torch.cat([nodes.coords, around])
        return self._unique(*both, known=len(nodes.datum))

    def _unique(self, datum: Tensor, coords: Tensor, known: int = 0) -> tuple[Tensor, Tensor]:
        """Every node once; without those among the first ``known``."""
        key = self._key(datum, coords)
        unique, inverse = key.unique(return_inverse=True)
        first = torch.full_like(unique, len(key)).scatter_reduce(
            0, inverse, torch.arange(len(key), device=key.device), "amin"
        )
        first = first[first >= known]
        return datum[first], coords[first]

    def _key(self, datum: Tensor, coords: Tensor) -> Tensor:
        """A number for every node."""
        for column in coords.T:
            datum = datum * self.side + column + self.side // 2
        return datum

    def _beyond(self, nodes: _Nodes, ready: Tensor, spacing: float) -> Tensor:
        """Error of the integrals, nats, by jumps of f and by what cannot be computed.

        Where log f jumps between two nodes, nobody knows on which side of it the interval between them lies.
        Where it is nan or infinite beside a node that carries mass, there may be any.
        """
        chosen = ready.to(nodes.datum.device)[nodes.datum]
        if not bool(chosen.any()):
            return torch.zeros_like(ready, dtype=torch.float64)
        nodes = _Nodes(*(column[chosen] for column in nodes))
        datum, log_f = nodes.datum, nodes.log_f
        highest = self._maxima(datum, log_f)
        weight = (log_f - highest[datum]).exp().nan_to_num(0.0)
        mass = self._totals(datum, weight)
        off = self._left(nodes, ready, highest, spacing) + self._between(nodes, highest, spacing)
        # Nodes at the border that carry mass, as at the end of a support, and what lies beyond.
        known, beside = len(datum), self.neighbours[self.neighbours.abs().sum(-1) == 1]
        new = self._new_around(nodes, weight > _CARRIES, beside)
        nodes = nodes.joined(self._evaluated(*new, spacing))
        datum, log_f = nodes.datum, nodes.log_f
        weight = (log_f - highest[datum]).exp().nan_to_num(0.0)
        is_missed = (weight > _CARRIES)[known:]
        off += self._totals(datum[known:], torch.where(is_missed, math.inf, 0.0).to(off.dtype))
        index = _Index(self._key(datum, nodes.coords))
        for axis, stride in enumerate(self.strides):
            is_there, place = index.find(index.key + stride)
            one, other = index.order[is_there], place[is_there]
            rise = log_f[other] - log_f[one]
            expected = (nodes.slope[one, axis] + nodes.slope[other, axis]) / 2
            jumps = ~((rise - expected).abs() < _JUMP)
            lost = torch.where(jumps, (weight[one] - weight[other]).abs() / 2, 0.0)
            is_unknown = nodes.unknown[one] | nodes.unknown[other]
            is_unknown &= torch.maximum(weight[one], weight[other]) > _CARRIES
            off.scatter_add_(0, datum[one], torch.where(is_unknown, math.inf, lost))
        return (off / mass).nan_to_num(0.0, posinf=math.inf).cpu().double()

    def _left(self, nodes: _Nodes, ready: Tensor, highest: Tensor, spacing: float) -> Float[Tensor, " data"]:
        """Mass next to nodes that were left, as quasi-random points find it, in weights of nodes."""
        points = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=0).draw(_PROBES).to(self.centre)
        width = 2 * _START / spacing
        datum = ready.nonzero()[:, 0].to(nodes.datum.device).repeat_interleave(_PROBES)
        at = (width * (points.double() - 0.5)).repeat(int(ready.sum()), 1)
        is_left = ~torch.isin(self._key(datum, at.round().long()), self._key(nodes.datum, nodes.coords))
        found = self._evaluated(datum[is_left], at[is_left], spacing)
        weight = (found.log_f - highest[found.datum]).exp().nan_to_num(0.0)
        return self._totals(found.datum, weight * width**self.dim / _PROBES)

    def _between(self, nodes: _Nodes, highest: Tensor, spacing: float) -> Float[Tensor, " data"]:
        """Mass of peaks that stand between nodes, at most, in weights of nodes.

        From nodes above their neighbours that are steep all the same, by halved steps up the slope.
        """
        start = (nodes.slope.abs().amax(-1) > _JUMP).nonzero()[:, 0]
        key = self._key(nodes.datum, nodes.coords)
        index = _Index(key)
        is_highest = torch.ones_like(start, dtype=torch.bool)
        for stride in self.strides:
            for step in (stride, -stride):
                is_there, place = index.find(key[start] + step)
                is_highest &= ~(is_there & (nodes.log_f[place] > nodes.log_f[start]))
        start = start[is_highest]  # of most posteriors, none
        datum, at = nodes.datum[start], nodes.coords[start].double()
        top, slope = nodes.log_f[start], nodes.slope[start]
        for k in range(1, _CLIMB + 1) if len(start) else ():
            at = at + slope.sign() / 2**k
            found = self._evaluated(datum, at, spacing)
            top, slope = torch.maximum(top, found.log_f), found.slope
        is_peak = top > nodes.log_f[start] + self.dim * _JUMP
        weight = torch.where(is_peak, (top - highest[datum]).exp(), 0.0)
        return self._totals(datum, weight)

    def _evaluated(self, datum: Tensor, coords: Tensor, spacing: float) -> _Nodes:
        """The nodes with what they are worth."""
        step, v = _BEND * spacing, _BEND * spacing * coords.double()
        scale, log_stretch = self.scale[datum].double() / _BEND, v.cosh().log().sum(-1)
        u = (self.centre[datum] + scale * v.sinh()).to(self.centre.dtype)
        found = self._scores(datum, u)
        if self.is_of_prior:
            found |= {"log_density": found["log_prior"], "gradient": found["prior_gradient"]}
        unknown = found["log_density"].isnan() | (found["log_density"] == math.inf)
        log_f, log_prior = (
            (found[name] + log_stretch).nan_to_num(-math.inf, neginf=-math.inf)
            for name in ("log_density", "log_prior")
        )
        up, down = (scale * ((v + h).sinh() - v.sinh()) for h in (step, -step))
        stretched = (v.abs() + step).cosh().log().sum(-1) - log_stretch
        is_far = ((u - self.centre[datum]).abs() > self.far[datum]).any(-1)
        highest, highest_prior = (
            value + torch.where(is_far, 0.0, rise.sum(-1) + stretched).nan_to_num(0.0, posinf=0.0)
            for value, rise in (
                (log_f, torch.maximum(found["gradient"] * up, found["gradient"] * down)),
                (log_prior, torch.maximum(found["prior_gradient"] * up, found["prior_gradient"] * down)),
            )
        )
        rounding = (found["log_density"].abs() + (found["gradient"] * u).norm(dim=-1)).nan_to_num(
            0.0, posinf=0.0
        )
        eps = torch.finfo(u.dtype).eps
        # Neighbours that are nearly one number say nothing of what lies between them.
        is_one = (torch.minimum(up.abs(), down.abs()) < 4 * eps * u.abs()).any(-1)
        rounding = torch.where(is_one, math.inf, eps * rounding)
        slope = step * (found["gradient"] * scale * v.cosh() + v.tanh())
        return _Nodes(datum, coords, log_f, log_prior, highest, highest_prior, rounding, slope, unknown)

    def _scores(self, datum: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Log-densities of data at points and gradients by u, in pieces of one size."""
        numbers, vectors = ("log_density", "log_prior"), ("gradient", "prior_gradient")
        found = {name: [u.new_empty(0).double()] for name in numbers}
        found |= {name: [u.new_empty(0, self.dim).double()] for name in vectors}
        for piece, at in zip(datum.split(self.rows), u.split(self.rows), strict=True):
            count = len(piece)
            if count < self.rows:  # a compiled graph is for one size
                piece = torch.nn.functional.pad(piece, (0, self.rows - count))
                at = torch.nn.functional.pad(at, (0, 0, 0, self.rows - count))
            position, start = {}, 0
            for name, shape in self.shapes.items():
                position[name] = at[:, start : start + shape.numel()].reshape(1, len(piece), *shape)
                start += shape.numel()
            outputs, _ = self.score(position, *(argument[piece] for argument in self.block))
            for name, parts in found.items():
                parts.append(outputs[name][0, :count].double())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _totals(self, datum: Tensor, numbers: Tensor) -> Tensor:
        return numbers.new_zeros(len(self.block[0])).scatter_add(0, datum, numbers)

    def _maxima(self, datum: Tensor, numbers: Tensor) -> Tensor:
        empty = torch.full((len(self.block[0]),), -math.inf, dtype=torch.float64, device=datum.device)
        return empty.scatter_reduce(0, datum, numbers, "amax")

    def _kept(self, nodes: _Nodes) -> Tensor:
        """Nodes within whose distance to the next there may be mass."""
        datum = nodes.datum
        # There cannot be more than the prior times the largest likelihood, some of it still unseen.
        likelihood = self._maxima(datum, (nodes.log_f - nodes.log_prior).nan_to_num(-math.inf))
        highest = torch.minimum(nodes.highest, nodes.highest_prior + likelihood[datum] + _UNSEEN)
        return highest > self._maxima(datum, nodes.log_f)[datum] - _KEPT

    def _sums(self, nodes: _Nodes, spacing: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Integral of every datum, number of nodes its mass is spread over, all nodes, and rounding."""
        datum, log_f = nodes.datum, nodes.log_f
        count = len(self.block[0])
        top = self._maxima(datum, log_f)
        weight = (log_f - top[datum]).exp().nan_to_num(0.0)  # where all are -inf
        mass, energy = self._totals(datum, weight), self._totals(datum, torch.xlogy(weight, weight))
        spread = (mass.log() - energy / mass).exp()  # exp of the entropy of weight / mass
        log_volume = self.dim * math.log(spacing) + self.scale[:count].double().log().sum(-1)
        size = torch.bincount(datum, minlength=count).to(log_f.dtype)
        rounding = torch.where(weight > _SEEN, weight * nodes.rounding, 0.0)
        rounding = (self._totals(datum, rounding) / mass).nan_to_num(0.0, posinf=math.inf)
        return tuple(t.cpu() for t in (top + mass.log() + log_volume, spread, size, rounding))
