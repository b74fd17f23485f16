r"""Draws from the posterior p(z | x) of every datum, by Hamiltonian Monte Carlo, for ArviZ.

Posteriors of nonlinear models have several modes, and a chain seldom finds from one to another. So the chains
do not start where a guide says, but where particles get to that were annealed from the prior (or, if one is
given, from a guide), each chosen with the probability that its weight gives it (Neal, *Annealed importance
sampling*, 2001).
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Range, Share, check_fields, checked
from pyro_vae.mcmc import diagnostics
from pyro_vae.mcmc.hmc import Position, init, jittered, step, tune
from pyro_vae.mcmc.tempering import Annealing, TemperedDensity, pilot_run
from pyro_vae.traces import Program, at_unconstrained
from pyro_vae.traces.blocks import Advance, Batch, PerDatum, Work, block_size, check_sizes

_NUM_PARTICLES = 16


class BlockOfDraws(NamedTuple):
    r"""Draws from the posteriors of a block of data.

    Attributes:
        position: Unconstrained, of every site ``(chains, samples, batch, *event)``.
        log_joint: :math:`\log p(x, z) + \log |\partial z / \partial u|` there, ``(chains, samples, batch)``.
        acceptance: Mean acceptance of every datum.
        divergences: Number of divergent transitions of every datum.
    """

    position: Position
    log_joint: Float[Tensor, "chains samples batch"]
    acceptance: Float[Tensor, " batch"]
    divergences: Float[Tensor, " batch"]

    def diagnostics(self) -> PerDatum:
        """Worst R-hat and ESS over the coordinates of every datum, and what the steps did."""
        draws = coordinates(self.position)
        return {
            "rhat": diagnostics.rhat(draws).amax(-1),
            "ess": diagnostics.effective_sample_size(draws).amin(-1),
            "acceptance": self.acceptance.cpu(),
            "divergences": self.divergences.cpu(),
        }


@dataclasses.dataclass(frozen=True)
class Chains:
    """Settings with which posteriors are drawn from; the arguments of :func:`sample_posterior`."""

    num_chains: Count
    num_samples: Annotated[int, Range(4)]  # of fewer nobody can tell whether they agree
    num_warmup: Count
    num_leapfrog: Count
    target_acceptance: Share

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def annealing(self) -> Annealing:
        """Settings that bring particles to where chains start, in half of the warmup."""
        particles, temperatures = max(_NUM_PARTICLES, self.num_chains), max(2, self.num_warmup // 6)
        return Annealing(particles, temperatures, self.num_leapfrog, self.target_acceptance)

    @property
    def num_tuning(self) -> int:
        """Steps of each of the two tunings."""
        return max(2, self.num_warmup // 4)

    @property
    def num_transitions(self) -> int:
        """Transitions of every chain, warmup included."""
        return self.annealing.pilot_steps + 2 * self.num_tuning + self.num_samples

    def block_size(self, model: Program, batch: Batch) -> int:
        """Data whose particles fit one evaluation."""
        return block_size(model, batch, self.annealing.num_chains)

    def density(self, model: Program, batch: Batch, guide: Program | None = None) -> TemperedDensity:
        """Density of the model, to be evaluated as often as drawing from all posteriors takes."""
        num_blocks = math.ceil(len(batch[0]) / self.block_size(model, batch))
        planned_calls = num_blocks * self.num_transitions * self.num_leapfrog
        return TemperedDensity(model, guide, planned_calls=planned_calls)


def draw_posterior(density: TemperedDensity, block: Batch, chains: Chains, advance: Advance) -> BlockOfDraws:
    """Anneal, choose where chains start, tune, freeze and run them."""
    log_density = density.at(1.0, *block)
    pilot = pilot_run(density, block, chains.annealing, lambda: advance(len(block[0])))
    log_weights = pilot.log_weights.nan_to_num(-math.inf, neginf=-math.inf)
    if (impossible := torch.isneginf(log_weights).all(0)).any():
        raise ValueError(
            f"{int(impossible.sum())} of {len(impossible)} data have probability 0 at all latents that were "
            f"tried, so that their posterior cannot be found; the first such is "
            f"{block[0][impossible][0].flatten()[:5].tolist()} ..."
        )
    weights = log_weights.softmax(0)
    chosen = torch.multinomial(weights.T, chains.num_chains, replacement=True).T
    data = torch.arange(len(block[0]), device=chosen.device)
    state = init(log_density, {name: u[chosen, data] for name, u in pilot.state.position.items()})
    step_size, scale = torch.full_like(state.at.log_density, 0.5), pilot.frozen(1.0)[1]
    tuned = functools.partial(
        tune,
        log_density,
        num_steps=chains.num_tuning,
        num_leapfrog=chains.num_leapfrog,
        target_acceptance=chains.target_acceptance,
    )
    # Scales are known after a first run, and what step sizes they need after a second.
    state, step_size, scale = tuned(state, step_size, scale=scale)
    state, step_size, _ = tuned(state, step_size, scale=scale)
    advance(2 * chains.num_tuning * len(block[0]))
    positions, log_joint, acceptance, divergences = [], [], 0.0, 0.0
    for _ in range(chains.num_samples):
        state, info = step(log_density, state, jittered(step_size), chains.num_leapfrog, scale)
        positions.append(state.position)
        log_joint.append(state.at.log_density)
        acceptance = acceptance + info.acceptance.mean(0) / chains.num_samples
        divergences = divergences + info.is_divergent.sum(0)
        advance(len(block[0]))
    return BlockOfDraws(
        {name: torch.stack([position[name] for position in positions], 1) for name in state.position},
        torch.stack(log_joint, 1),
        acceptance,
        divergences.to(acceptance.dtype),
    )


def coordinates(position: Position) -> Float[Tensor, "chains samples batch dim"]:
    """The coordinates of all sites in one axis, of positions ``(chains, samples, batch, *event)``."""
    return torch.cat([v.flatten(3) if v.dim() > 3 else v.unsqueeze(3) for v in position.values()], 3)


@dataclasses.dataclass(frozen=True)
class PosteriorDraws:
    r"""Draws from :math:`p(z \mid x)` of every datum.

    Attributes:
        latents: Draws of every site, shape ``(chains, samples, batch, *event)``.
        rhat: The worst R-hat over the coordinates of every datum; the chains agree below 1.01. nan of one
            chain.
        ess: The least effective sample size over them.
        acceptance: Mean acceptance of every datum.
        divergences: Number of divergent transitions of every datum; each one says that the chains do not
            get everywhere.
    """

    latents: dict[str, Tensor]
    rhat: Float[Tensor, " batch"]
    ess: Float[Tensor, " batch"]
    acceptance: Float[Tensor, " batch"]
    divergences: Float[Tensor, " batch"]

    def to_arviz(self, datum: Any = None) -> Any:
        """``arviz.InferenceData`` with the group ``posterior``.

        Every site has dimensions ``chain``, ``draw``, ``datum`` and, for vectors, ``z_dim`` (``<site>_dim``).

        Args:
            datum: Labels of the data; by default their numbers.

        Raises:
            ValueError: If a site has the name of a dimension.
        """
        for name in {"chain", "draw", "datum"} & self.latents.keys():
            raise ValueError(f"ArviZ needs the name {name!r} for a dimension: rename the model's site")
        values = {name: value.cpu().numpy() for name, value in self.latents.items()}
        dims = {
            name: ["datum", *(f"{name}_dim" + (f"_{i}" if i else "") for i in range(value.ndim - 3))]
            for name, value in values.items()
        }
        count = next(iter(values.values())).shape[2]
        coords = {"datum": np.arange(count) if datum is None else np.asarray(datum)}
        return diagnostics.to_arviz({"posterior": values}, dims=dims, coords=coords)


@checked
def sample_posterior(
    model: Program,
    *batch: Tensor,
    guide: Program | None = None,
    num_chains: int = 8,
    num_samples: int = 250,
    num_warmup: int = 300,
    num_leapfrog: int = 10,
    target_acceptance: Share = 0.8,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> PosteriorDraws:
    r"""Draws from the posterior :math:`p(z \mid x)` of every datum, by Hamiltonian Monte Carlo.

    Args:
        model: A Pyro program that keeps the contract. Its discrete sites are summed out.
        *batch: Its arguments for all data, first axis the data.
        guide: Where particles are annealed from, instead of the prior. That takes less warmup where it is
            near the posterior; modes far from all that it proposes are missed.
        num_chains: Chains of every datum.
        num_samples: Draws of every chain that are kept.
        num_warmup: Steps before them: half to anneal particles, half to tune step sizes and
            scales.
        num_leapfrog: Gradients for every draw.
        target_acceptance: Acceptance that step sizes are tuned to.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Raises:
        ValueError: If a size is below 1, ``num_samples`` below 4, or a latent site is discrete and cannot be
            summed out, or has a support that is not the image of all real numbers.
    """
    check_sizes(batch)
    chains = Chains(num_chains, num_samples, num_warmup, num_leapfrog, target_acceptance)
    columns = _Draws(model, guide, batch, chains).run(batch, progress=progress, checkpoint=checkpoint)
    latents = {
        name.removeprefix(_SITE): columns.pop(name).movedim(0, 2)
        for name in list(columns)
        if name.startswith(_SITE)
    }
    return PosteriorDraws(latents, **columns)


_SITE = "z/"  # begins the names of columns that are draws


class _Draws(Work):
    name, unit = "posterior draws", "draw"

    def __init__(self, model: Program, guide: Program | None, batch: Batch, chains: Chains) -> None:
        self.model, self.chains = model, chains
        self.programs = (model,) if guide is None else (model, guide)
        self.settings = dataclasses.asdict(chains)
        self.size = chains.block_size(model, batch)
        self.amount = chains.num_transitions
        self.density = chains.density(model, batch, guide)

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        draws = draw_posterior(self.density, block, self.chains, advance)
        chains_first = {name: value.flatten(0, 1) for name, value in draws.position.items()}
        shape = self.chains.num_chains, self.chains.num_samples
        kept = {
            f"{_SITE}{name}": value.unflatten(0, shape).movedim(2, 0).cpu()
            for name, value in at_unconstrained(self.model, chains_first, *block).latents.items()
        }
        return kept | draws.diagnostics()
