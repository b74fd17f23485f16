r"""Densities between a base that one can draw from and the posterior, and how to move among them.

.. math:: f_\beta(z) = b(z)^{1-\beta}\, p(x, z)^\beta, \qquad 0 \le \beta \le 1,

with the prior p(z) or the guide q(z | x) as the base b. A :func:`pilot_run` carries particles along the
temperatures and tunes step sizes and scales of Hamiltonian transitions on the way; annealed importance
sampling then freezes them, and chains for the posterior start where the pilot run ended.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Share, check_fields
from pyro_vae.compiled import CompiledFunction, Outputs
from pyro_vae.mcmc.hmc import (
    LARGEST_LOG_STEP,
    Evaluation,
    HMCState,
    LogDensity,
    Position,
    init,
    jittered,
    step,
)
from pyro_vae.traces import Program, at_unconstrained, draw_unconstrained, log_guide_at
from pyro_vae.traces.blocks import Batch

_PILOT_STEPS = 3  # at each of its temperatures
_FIRST_STEPS = 20  # more of them at the first
_MIN_CHAINS_FOR_SCALES = 8


@dataclasses.dataclass(frozen=True)
class Annealing:
    """Settings with which chains are annealed.

    Attributes:
        num_chains: Independent chains of every datum.
        num_temperatures: Densities after the base.
        num_leapfrog: Gradients for every transition.
        target_acceptance: Acceptance that step sizes are tuned to.
    """

    num_chains: Count
    num_temperatures: Count
    num_leapfrog: Count
    target_acceptance: Share

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def pilot_steps(self) -> int:
        """Transitions of a :func:`pilot_run`."""
        return _FIRST_STEPS + (self.num_temperatures + 1) * _PILOT_STEPS


class TemperedDensity:
    r""":math:`\log f_\beta(u) = (1 - \beta) \log b(z) + \beta \log p(x, z) + \log |\partial z / \partial u|`.

    The base b is the prior p(z), or the guide q(z | x) if one is given; at :math:`\beta = 1` the target is
    the posterior, up to its constant p(x). Evaluated as a compiled graph where that pays.

    Args:
        model: A Pyro program that keeps the contract.
        guide: Its guide, or None.
        planned_calls: Number of evaluations to come.
    """

    def __init__(
        self, model: Program, guide: Program | None = None, *, planned_calls: int | None = None
    ) -> None:
        self.model, self.guide = model, guide
        roots = (model,) if guide is None else (model, guide)
        self._score = CompiledFunction(lambda position, *batch: self._evaluate(position, *batch), roots=roots)
        self._score.planned_calls = planned_calls

    def _evaluate(self, position: Position, *batch: Tensor) -> Outputs:
        # Trajectories that go astray leave the support by overflow, and are rejected; the data were checked.
        with pyro.validation_enabled(False), torch.enable_grad():
            position = {name: u.detach().requires_grad_() for name, u in position.items()}
            point = at_unconstrained(self.model, position, *batch)
            log_joint = sum(point.log_joint) + point.log_jacobian
            log_base = point.log_joint.log_prior
            if self.guide is not None:
                log_base = log_guide_at(self.guide, position, point, *batch)
            log_base = log_base + point.log_jacobian
            wanted = list(position.values())
            base = [torch.zeros_like(u) for u in wanted]
            if log_base.requires_grad:  # not that of a guide with one density for all z, such as a box
                base = torch.autograd.grad(log_base.sum(), wanted, retain_graph=True, materialize_grads=True)
            joint = torch.autograd.grad(log_joint.sum(), wanted)
        outputs = {"log_base": log_base, "log_joint": log_joint}
        for name, in_base, in_joint in zip(position, base, joint, strict=True):
            outputs |= {f"base/{name}": in_base, f"joint/{name}": in_joint}
        return {name: value.detach() for name, value in outputs.items()}

    def at(self, beta: float, *batch: Tensor) -> LogDensity:
        """Density of given data at an inverse temperature."""

        def log_density(position: Position) -> Evaluation:
            outputs, _ = self._score(position, *batch)
            return tempered(outputs, beta)

        return log_density

    def start(self, num_chains: int, *batch: Tensor) -> Position:
        """Draws from the base, unconstrained."""
        return draw_unconstrained(self.model, *batch, num_samples=num_chains, guide=self.guide)


def tempered(parts: dict[str, Tensor], beta: float) -> Evaluation:
    """Evaluation at another inverse temperature, from the parts of one."""

    def mixed(base: Tensor, joint: Tensor) -> Tensor:
        return joint if beta == 1 else base + beta * (joint - base)

    names = [name.removeprefix("base/") for name in parts if name.startswith("base/")]
    gradient = {name: mixed(parts[f"base/{name}"], parts[f"joint/{name}"]) for name in names}
    return Evaluation(mixed(parts["log_base"], parts["log_joint"]), gradient, parts)


def schedule(num_temperatures: int, steepness: float = 4.0) -> Float[Tensor, " temperatures"]:
    r"""Inverse temperatures from 0 to 1, dense at both ends: a stretched sigmoid."""
    grid = torch.linspace(-steepness, steepness, num_temperatures + 1, dtype=torch.float64).sigmoid()
    return (grid - grid[0]) / (grid[-1] - grid[0])


class Frozen:
    """Step sizes and scales by inverse temperature, linear between those of the pilot run."""

    def __init__(self, betas: Tensor, step_sizes: list[Tensor], scales: list[Position]) -> None:
        self.betas, self.step_sizes, self.scales = betas, step_sizes, scales

    def __call__(self, beta: float) -> tuple[Tensor, Position]:
        """Step sizes and scales at an inverse temperature."""
        right = int(torch.searchsorted(self.betas, beta).clamp(1, len(self.betas) - 1))
        low, high = self.betas[right - 1].item(), self.betas[right].item()
        weight = (beta - low) / (high - low)
        below, above = self.scales[right - 1], self.scales[right]
        return (
            torch.lerp(self.step_sizes[right - 1], self.step_sizes[right], weight),
            {name: torch.lerp(below[name], above[name], weight) for name in below},
        )


class Pilot(NamedTuple):
    """Findings of a pilot run.

    Attributes:
        frozen: Step sizes and scales by inverse temperature.
        state: Where its particles got to.
        log_weights: Those of annealed importance sampling, up to a constant.
    """

    frozen: Frozen
    state: HMCState
    log_weights: Float[Tensor, "chains batch"]


def pilot_run(
    density: TemperedDensity, block: Batch, annealing: Annealing, advance: Callable[[], None]
) -> Pilot:
    """Carry particles along the temperatures; tune the step sizes of every datum, and scales by their spread.

    Takes ``annealing.pilot_steps`` transitions, and calls ``advance`` after each.
    """
    betas = schedule(annealing.num_temperatures)
    position = density.start(annealing.num_chains, *block)
    state = init(density.at(0.0, *block), position)
    log_size = torch.full_like(state.at.log_density[:1], math.log(0.2))
    log_weights = torch.zeros_like(state.at.log_density)
    variances = _spread(position)
    step_sizes, scales, before = [], [], 0.0
    for i, beta in enumerate(betas.tolist()):
        log_weights += (beta - before) * (state.at.parts["log_joint"] - state.at.parts["log_base"])
        before = beta
        state = HMCState(state.position, tempered(state.at.parts, beta))
        for k in range(_PILOT_STEPS + (_FIRST_STEPS if i == 0 else 0)):
            scale = {name: variance.sqrt() for name, variance in variances.items()}
            log_density, step_size = density.at(beta, *block), jittered(log_size.exp())
            state, info = step(log_density, state, step_size, annealing.num_leapfrog, scale)
            gain = max(0.3, (k + 1) ** -0.6) if i == 0 else 0.3
            log_size = log_size + gain * (info.acceptance.mean(0, keepdim=True) - annealing.target_acceptance)
            log_size = log_size.clamp(max=LARGEST_LOG_STEP)  # a flat density accepts any
            new = _spread(state.position)
            variances = {name: torch.lerp(variances[name], new[name], 0.2) for name in new}
            advance()
        step_sizes.append(log_size.exp())
        scales.append(scale)
    return Pilot(Frozen(betas, step_sizes, scales), state, log_weights)


def _spread(position: Position) -> Position:
    """Variances over chains; 1 where there are too few."""
    if next(iter(position.values())).shape[0] < _MIN_CHAINS_FOR_SCALES:
        return {name: torch.ones_like(u[:1]) for name, u in position.items()}
    return {name: u.var(0, keepdim=True).clamp(min=1e-8) for name, u in position.items()}
