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

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Share, checked
from pyro_vae.marginal_likelihood.result import LogMarginal, log_marginal
from pyro_vae.mcmc.hmc import HMCState, Position, init, jittered, step
from pyro_vae.mcmc.tempering import Frozen, TemperedDensity, pilot_run, pilot_steps, schedule, tempered
from pyro_vae.traces import DrawUnconstrained, Program, log_weights, simulate, unconstrain
from pyro_vae.traces.blocks import Batch, Columns, block_size, by_blocks, check_sizes, evaluation

_FEW_CHAINS = 2  # effective ones


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
        target_acceptance: What the pilot run tunes step sizes to.
        data: What the data are, for the summary.
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
    sizes = {
        "num_chains": num_chains,
        "num_temperatures": num_temperatures,
        "num_leapfrog": num_leapfrog,
    }
    return _anneal(
        model, batch, guide, sizes, target_acceptance, data, progress, checkpoint, is_simulated=False
    )


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
        model: As of :func:`ais`.
        *batch: Its arguments; of the data only the number counts, their values are drawn anew.
        guide: As of :func:`ais`, like the rest.
        num_chains: In each direction.
        num_temperatures: T.
        num_leapfrog: Gradients for every transition.
        target_acceptance: What the pilot run tunes step sizes to.
        progress: Show a progress bar.
        checkpoint: As of :func:`ais`.

    Returns:
        ``values`` are the lower bounds, ``upper`` the upper ones, of each simulated datum.

    Raises:
        ValueError: As :func:`ais`.
    """
    sizes = {
        "num_chains": num_chains,
        "num_temperatures": num_temperatures,
        "num_leapfrog": num_leapfrog,
    }
    return _anneal(
        model, batch, guide, sizes, target_acceptance, None, progress, checkpoint, is_simulated=True
    )


def _anneal(
    model: Program,
    batch: Batch,
    guide: Program | None,
    sizes: dict[str, int],
    target_acceptance: float,
    data: str | None,
    progress: bool,
    checkpoint: Path | None,
    *,
    is_simulated: bool,
) -> LogMarginal:
    check_sizes(batch, **sizes)
    programs = (model,) if guide is None else (model, guide)
    num_chains, num_leapfrog = sizes["num_chains"], sizes["num_leapfrog"]
    betas = schedule(sizes["num_temperatures"])
    pilot_temperatures = max(20, sizes["num_temperatures"] // 10)
    transitions = pilot_steps(pilot_temperatures) + (1 + is_simulated) * (len(betas) - 1)
    size = block_size(model, batch, num_chains)
    density = TemperedDensity(
        model, guide, planned_calls=math.ceil(len(batch[0]) / size) * transitions * num_leapfrog
    )

    def estimate(block: Batch, advance: Callable[[int], None]) -> Columns:
        def advance_one() -> None:
            advance(len(block[0]))

        if guide is not None:  # raises where the two do not fit each other
            log_weights(model, guide, *(argument[:1] for argument in block), num_samples=1)
        latents: dict[str, Tensor] = {}
        if is_simulated:
            with DrawUnconstrained() as drawn:
                latents, block = simulate(model, *block)
        frozen = pilot_run(
            density,
            block,
            num_particles=num_chains,
            num_temperatures=pilot_temperatures,
            num_leapfrog=num_leapfrog,
            target_acceptance=target_acceptance,
            advance=advance_one,
        ).frozen
        start = density.start(num_chains, *block)
        log_w, acceptance = _run(density, block, start, betas, frozen, num_leapfrog, advance_one)
        values, std_error, ess = _log_mean(log_w)
        columns = {"values": values, "std_error": std_error, "ess": ess, "acceptance": acceptance}
        if is_simulated:
            latents = {name: latents[name] for name in start}
            start = unconstrain(model, latents, *block, drawn=drawn.position)
            start = {name: u.expand(num_chains, *u.shape[1:]) for name, u in start.items()}
            log_w, _ = _run(density, block, start, betas.flip(0), frozen, num_leapfrog, advance_one)
            values, std_error, _ = _log_mean(log_w)
            columns |= {"upper": -values, "upper_std_error": std_error}
        return {name: column.cpu() for name, column in columns.items()}

    method = "bidirectional" if is_simulated else "ais"
    columns = by_blocks(
        estimate,
        batch,
        size,
        programs=programs,
        method=method,
        settings={**sizes, "target_acceptance": target_acceptance},
        work=transitions,
        unit="transition",
        progress=progress,
        checkpoint=checkpoint,
    )
    base = "prior" if guide is None else "guide"
    few = int((columns["ess"] < min(_FEW_CHAINS, num_chains / 2)).sum()) if num_chains > 1 else 0
    note = (
        f"of {few:,} data all weight is with one or two chains: their values are too low, by more than the "
        "errors say; give more num_temperatures"
    )
    with evaluation(*programs):
        return log_marginal(
            columns,
            model=model,
            guide=guide,
            batch=batch,
            method=method,
            bound="lower",
            effort=f"from the {base}, {num_chains} chains, {len(betas) - 1:,} temperatures, "
            f"{num_leapfrog} leapfrog steps each",
            data=f"{len(batch[0]):,} simulated from the model" if is_simulated else data,
            base=base,
            **sizes,
            **({"data_checksum": "simulated"} if is_simulated else {}),
            notes=[note] * bool(few),
        )


def _run(
    density: TemperedDensity,
    block: Batch,
    position: Position,
    betas: Float[Tensor, " temperatures"],
    frozen: Frozen,
    num_leapfrog: int,
    advance: Callable[[], None],
) -> tuple[Float[Tensor, "chains batch"], Float[Tensor, " batch"]]:
    """Log-weights of chains along the temperatures, in their order, and the mean acceptance."""
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


def _log_mean(log_w: Float[Tensor, "chains batch"]) -> tuple[Tensor, Tensor, Tensor]:
    """The log of the mean weight, its standard error and the effective number of chains."""
    count = len(log_w)
    log_sum = log_w.logsumexp(0)
    ess = (2 * log_sum - (2 * log_w).logsumexp(0)).exp()
    variance = ((count / ess - 1) / (count - 1)).clamp(min=0) if count > 1 else ess + math.nan
    return log_sum - math.log(count), variance.sqrt(), ess
