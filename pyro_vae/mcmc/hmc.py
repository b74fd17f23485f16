r"""Hamiltonian Monte Carlo for many data at once: one independent chain for every (chain, datum).

Pyro's own kernels accept or reject a whole trace, hence the whole batch. Here every datum has chains, steps
and decisions of its own, and all of them move in the same operations of tensors. A position u is a dictionary
of unconstrained latents, each of shape ``(chains, batch, *event)``. With momentum :math:`p \sim N(0, I)` and
a scale s for every coordinate (the square root of an inverse diagonal mass matrix), a step of the leapfrog
integrator is

.. math:: p \mathrel{+}= \tfrac\epsilon2 s \nabla \log f(u), \quad u \mathrel{+}= \epsilon s p, \quad
          p \mathrel{+}= \tfrac\epsilon2 s \nabla \log f(u),

and the end of a trajectory is accepted with probability :math:`\min(1, e^{-\Delta H})`,
:math:`H = -\log f(u) + |p|^2 / 2` (Neal, *MCMC using Hamiltonian dynamics*, 2011).

The kernel is two functions, :func:`init` and :func:`step`. Step sizes are tuned by a pilot run, :func:`tune`,
and then kept: a chain that goes on adapting has not the target as its stationary distribution. Latents with
constraints are reached by Pyro's transforms (``traces.at_unconstrained``); discrete ones are summed out.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Position = dict[str, Tensor]  # of every site, (chains, batch, *event), unconstrained

LARGEST_LOG_STEP = 3.0  # in units of the scale
_DIVERGENT = 1000.0  # as in Stan: an error of the energy that no step size in use would make


class Evaluation(NamedTuple):
    r"""A log-density at a position.

    Attributes:
        log_density: :math:`\log f(u)`, nats.
        gradient: By u, of every site.
        parts: Whatever else is wanted at the positions of the chain; first axes ``(chains, batch)``.
    """

    log_density: Float[Tensor, "chains batch"]
    gradient: Position
    parts: dict[str, Tensor]


class HMCState(NamedTuple):
    """Positions of the chains, and what is known there.

    Attributes:
        position: Unconstrained latents.
        at: The log-density there.
    """

    position: Position
    at: Evaluation


class HMCInfo(NamedTuple):
    """Record of a step.

    Attributes:
        acceptance: Probability with which the end of the trajectory was accepted.
        is_accepted: True where it was.
        is_divergent: True where the energy changed by more than 1,000 nats, or is no number.
    """

    acceptance: Float[Tensor, "chains batch"]
    is_accepted: Bool[Tensor, "chains batch"]
    is_divergent: Bool[Tensor, "chains batch"]


LogDensity = Callable[[Position], Evaluation]


def init(log_density: LogDensity, position: Position) -> HMCState:
    """Start the chains at a position."""
    return HMCState(position, log_density(position))


def step(
    log_density: LogDensity,
    state: HMCState,
    step_size: Float[Tensor, "#chains #batch"],
    num_leapfrog: int,
    scale: Position | None = None,
) -> tuple[HMCState, HMCInfo]:
    """One trajectory of every chain, and its decision.

    Args:
        log_density: The target.
        state: Where the chains are.
        step_size: Step size of every chain.
        num_leapfrog: Steps of the trajectory, each of which takes one gradient.
        scale: s of every coordinate, shape ``(#chains, #batch, *event)``; 1 by default.
    """
    sizes = {name: _like(step_size, value).to(value.dtype) for name, value in state.position.items()}
    if scale is not None:
        sizes = {name: size * scale[name] for name, size in sizes.items()}
    momentum = {name: torch.randn_like(value) for name, value in state.position.items()}
    before = _kinetic_energy(momentum) - state.at.log_density
    position, at = state
    for _ in range(num_leapfrog):
        momentum = {n: p + sizes[n] / 2 * at.gradient[n] for n, p in momentum.items()}
        position = {n: u + sizes[n] * momentum[n] for n, u in position.items()}
        at = log_density(position)
        momentum = {n: p + sizes[n] / 2 * at.gradient[n] for n, p in momentum.items()}
    change = _kinetic_energy(momentum) - at.log_density - before
    acceptance = torch.nan_to_num((-change).exp(), nan=0.0).clamp(max=1.0)
    is_accepted = torch.rand_like(acceptance) < acceptance
    new, old = HMCState(position, at), state
    chosen = HMCState(
        _choose(is_accepted, new.position, old.position),
        Evaluation(
            torch.where(is_accepted, new.at.log_density, old.at.log_density),
            _choose(is_accepted, new.at.gradient, old.at.gradient),
            _choose(is_accepted, new.at.parts, old.at.parts),
        ),
    )
    return chosen, HMCInfo(acceptance, is_accepted, ~(change.abs() < _DIVERGENT))


def _like(numbers: Shaped[Tensor, "#chains #batch"], value: Tensor) -> Tensor:
    """The numbers with axes of size 1 for the event."""
    return numbers.reshape(*numbers.shape, *(1,) * (value.dim() - 2))


def _kinetic_energy(momentum: Position) -> Float[Tensor, "chains batch"]:
    return sum(p.square().flatten(2).sum(2) if p.dim() > 2 else p.square() for p in momentum.values()) / 2


def _choose(condition: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.where(_like(condition, new[name]), new[name], old[name]) for name in new}


def jittered(step_size: Tensor) -> Tensor:
    """Step sizes times random factors in (0.8, 1.2), which keeps trajectories from closing on themselves."""
    return step_size * (0.8 + 0.4 * torch.rand_like(step_size))


def tune(
    log_density: LogDensity,
    state: HMCState,
    step_size: Float[Tensor, "chains batch"],
    num_steps: int,
    num_leapfrog: int,
    *,
    target_acceptance: float,
    scale: Position | None = None,
) -> tuple[HMCState, Float[Tensor, "chains batch"], Position]:
    r"""A pilot run: where the chains got to, step sizes that reach the target, and the scale of the draws.

    Log step sizes of every chain follow a Robbins-Monro recursion,
    :math:`\log\epsilon \mathrel{+}= k^{-0.6} (a - a^*)` with the acceptance a averaged over the chains of a
    datum, which have the same target; the result is their mean over the second half of the run. The scales
    are standard deviations over chains and the second half.
    """
    log_size, log_sizes = step_size.log(), []
    count, mean, squares = 0, None, None
    for k in range(1, num_steps + 1):
        state, info = step(log_density, state, jittered(log_size.exp()), num_leapfrog, scale)
        acceptance = info.acceptance.mean(0, keepdim=True)
        log_size = (log_size + k**-0.6 * (acceptance - target_acceptance)).clamp(max=LARGEST_LOG_STEP)
        if k > num_steps // 2:
            log_sizes.append(log_size)
            count += 1
            mean = _add(mean, state.position)
            squares = _add(squares, {n: u.square() for n, u in state.position.items()})
    scales = {
        name: (
            squares[name].mean(0, keepdim=True) / count - (mean[name].mean(0, keepdim=True) / count).square()
        )
        .clamp(min=1e-8)
        .sqrt()
        for name in state.position
    }
    return state, torch.stack(log_sizes).mean(0).exp(), scales


def _add(total: Position | None, position: Position) -> Position:
    return position if total is None else {name: total[name] + value for name, value in position.items()}
