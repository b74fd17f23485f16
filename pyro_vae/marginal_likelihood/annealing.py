r"""Annealed importance sampling: from a density one can draw from to the posterior, in small steps.

Between a base b, the prior p(z) or the guide q(z | x), and the joint lie the densities

.. math:: f_\beta(z) = b(z)^{1-\beta}\, p(x, z)^\beta, \qquad 0 = \beta_0 < \beta_1 < \dots < \beta_T = 1 .

A chain starts at :math:`z_0 \sim b` and moves by transitions that leave :math:`f_{\beta_t}` invariant; with

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{b(z_{t-1})}

:math:`E\,w = p(x)` whatever T (Neal, *Annealed importance sampling*, 2001), so that the log of the mean of w
over chains is a lower bound of log p(x) in expectation, which T makes as tight as one likes. From the guide
it takes about a tenth of the temperatures (Wu, Burda, Salakhutdinov & Grosse, *On the quantitative analysis
of decoder-based generative models*, 2017).

The same chain run backwards from an exact draw of the posterior gives an unbiased estimate of 1 / p(x), hence
an upper bound. Exact draws are there for data simulated from the model: the z that made x (Grosse, Ghahramani
& Adams, *Sandwiching the marginal likelihood using bidirectional Monte Carlo*, 2015).

Both bounds hold only if nothing about the transitions is tuned while they run: step sizes and scales are
found by a pilot run with fewer temperatures, and then frozen.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Share, checked
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.marginal_likelihood.runner import Estimator
from pyro_vae.mcmc.hmc import HMCState, Position, init, jittered, step
from pyro_vae.mcmc.tempering import Annealing, Frozen, TemperedDensity, pilot_run, schedule, tempered
from pyro_vae.traces import DrawUnconstrained, Program, log_weights, simulate, unconstrain
from pyro_vae.traces.blocks import Advance, Batch, PerDatum, block_size


@checked
def ais(
    model: Program,
    *batch: Tensor,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 3,
    target_acceptance: Share = 0.65,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Annealed importance sampling of every datum (see the module). Discrete sites are summed out.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments for all data, first axis the data; taken apart into blocks.
        guide: Where chains start; by default at the prior, which takes more temperatures.
        num_chains: Independent chains of every datum.
        num_temperatures: T, of densities after the base; each but the last has one transition. A pilot run of
            a tenth of them comes first.
        num_leapfrog: Gradients for every transition. At the same cost, more temperatures are better than
            more of these.
        target_acceptance: Acceptance that the pilot run tunes step sizes to.
        data: Words on the data, for the summary.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Returns:
        Lower bounds. The errors are by the delta method from the weights of the chains, and too small where
        few of them carry the weight. Diagnostics ``ess`` (of chains) and ``acceptance`` (mean over the
        temperatures; nan of one).

    Raises:
        ValueError: If a size is below 1, the sites of model and guide differ, or a latent site is discrete
            and cannot be summed out, or has a support that is not the image of all real numbers.
    """
    annealing = Annealing(num_chains, num_temperatures, num_leapfrog, target_acceptance)
    return _Annealed("ais", model, guide, batch, annealing).estimate(data, progress, checkpoint)


@checked
def bidirectional(
    model: Program,
    *batch: Tensor,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 3,
    target_acceptance: Share = 0.65,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""Bounds of :math:`\log p(x)` from both sides, for data *simulated from the model*, by annealing.

    The gap, on these data, is a certificate of what :func:`ais` with the same settings does: its error is at
    most the gap in expectation. That this transfers to real data is an assumption, the better the more they
    look alike to the model.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments; of the data only the number counts, their values are drawn anew.
        guide: Start of the chains; by default they start at the prior.
        num_chains: Chains of every datum in each direction.
        num_temperatures: T, of densities after the base.
        num_leapfrog: Gradients for every transition.
        target_acceptance: Acceptance that the pilot run tunes step sizes to.
        progress: Show a progress bar.
        checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.

    Returns:
        ``values`` are the lower bounds, ``upper`` the upper ones, of each simulated datum.

    Raises:
        ValueError: If :func:`ais` would raise it, or the data cannot be simulated.
    """
    annealing = Annealing(num_chains, num_temperatures, num_leapfrog, target_acceptance)
    data = f"{len(batch[0]):,} simulated from the model"
    return _Annealed("bidirectional", model, guide, batch, annealing).estimate(data, progress, checkpoint)


class _Annealed(Estimator):
    """Annealing from the base; of ``"bidirectional"`` also back to it, from what simulated the data."""

    bound, unit = "lower", "transition"

    def __init__(
        self, name: str, model: Program, guide: Program | None, batch: Batch, annealing: Annealing
    ) -> None:
        super().__init__(model, guide, batch)
        self.name, self.annealing = name, annealing
        self.is_simulated = name == "bidirectional"
        self.base = "prior" if guide is None else "guide"
        self.settings = {"base": self.base, **dataclasses.asdict(annealing)}
        self.betas = schedule(annealing.num_temperatures)
        self.pilot = dataclasses.replace(
            annealing, num_temperatures=max(20, annealing.num_temperatures // 10)
        )
        self.size = block_size(model, batch, annealing.num_chains)
        runs = 1 + self.is_simulated
        self.amount = self.pilot.pilot_steps + runs * annealing.num_temperatures
        planned_calls = math.ceil(len(batch[0]) / self.size) * self.amount * annealing.num_leapfrog
        self.density = TemperedDensity(model, guide, planned_calls=planned_calls)

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        def advance_one() -> None:
            advance(len(block[0]))

        annealing, latents = self.annealing, {}
        if self.guide is not None:  # raises where the two do not fit each other
            log_weights(self.model, self.guide, *(argument[:1] for argument in block), num_samples=1)
        if self.is_simulated:
            with DrawUnconstrained() as drawn:
                latents, block = simulate(self.model, *block)
        frozen = pilot_run(self.density, block, self.pilot, advance_one).frozen
        start = self.density.start(annealing.num_chains, *block)
        log_w, acceptance = self._chains(block, start, self.betas, frozen, advance_one)
        values, std_error, ess = _log_mean(log_w)
        columns = {"values": values, "std_error": std_error, "ess": ess, "acceptance": acceptance}
        if self.is_simulated:
            latents = {name: latents[name] for name in start}
            start = unconstrain(self.model, latents, *block, drawn=drawn.position)
            start = {name: u.expand(annealing.num_chains, *u.shape[1:]) for name, u in start.items()}
            log_w, _ = self._chains(block, start, self.betas.flip(0), frozen, advance_one)
            values, std_error, _ = _log_mean(log_w)
            columns |= {"upper": -values, "upper_std_error": std_error}
        return {name: column.cpu() for name, column in columns.items()}

    def _chains(
        self,
        block: Batch,
        position: Position,
        betas: Float[Tensor, " temperatures"],
        frozen: Frozen,
        advance: Callable[[], None],
    ) -> tuple[Float[Tensor, "chains batch"], Float[Tensor, " batch"]]:
        """Log-weights of chains along the temperatures, in their order, and the mean acceptance."""
        density, num_leapfrog = self.density, self.annealing.num_leapfrog
        state = init(density.at(betas[0].item(), *block), position)
        log_w = torch.zeros_like(state.at.log_density, dtype=torch.float64)
        acceptance = 0.0 if len(betas) > 2 else math.nan  # of one temperature there are no transitions
        for before, beta in zip(betas[:-1].tolist(), betas[1:].tolist(), strict=True):
            parts = state.at.parts
            log_w += (beta - before) * (parts["log_joint"] - parts["log_base"]).double()
            advance()
            if beta == betas[-1]:
                break
            step_size, scale = frozen(beta)
            state = HMCState(state.position, tempered(parts, beta))
            state, info = step(density.at(beta, *block), state, jittered(step_size), num_leapfrog, scale)
            acceptance = acceptance + info.acceptance.mean(0) / (len(betas) - 2)
        return log_w, acceptance + torch.zeros_like(log_w[0])

    def effort(self, columns: PerDatum) -> str:
        annealing = self.annealing
        return (
            f"from the {self.base}, {annealing.num_chains} chains, {annealing.num_temperatures:,} "
            f"temperatures, {annealing.num_leapfrog} leapfrog steps each"
        )


def _log_mean(log_w: Float[Tensor, "chains batch"]) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the mean weight, its standard error and the effective number of chains."""
    count = len(log_w)
    log_sum = log_w.logsumexp(0)
    ess = (2 * log_sum - (2 * log_w).logsumexp(0)).exp()
    variance = ((count / ess - 1) / (count - 1)).clamp(min=0) if count > 1 else ess + math.nan
    return log_sum - math.log(count), variance.sqrt(), ess
