r"""Markov chains for many data at once: one kernel, and what stands on it.

Every datum has chains of its own, and all of them move in the same operations of tensors: positions are of
shape ``(chains, batch, *event)``, in unconstrained space.

- :mod:`~pyro_vae.mcmc.hmc`: the kernel, Hamiltonian Monte Carlo as two functions, :func:`init` and
  :func:`step`, and :func:`tune`, which finds step sizes and scales and then leaves them alone.
- :mod:`~pyro_vae.mcmc.tempering`: the densities
  :math:`f_\beta(z) = b(z)^{1-\beta} p(x, z)^\beta` between a base and the posterior, and how to move among
  them.
- :mod:`~pyro_vae.mcmc.posterior`: :func:`sample_posterior`, draws from p(z | x), for ArviZ.
- :mod:`~pyro_vae.mcmc.diagnostics`: R-hat, effective sample sizes, Pareto k-hat.
"""

from pyro_vae.mcmc.diagnostics import effective_sample_size, pareto_smooth, rhat
from pyro_vae.mcmc.hmc import Evaluation, HMCInfo, HMCState, Position, init, jittered, step, tune
from pyro_vae.mcmc.posterior import PosteriorDraws, sample_posterior
from pyro_vae.mcmc.tempering import Annealing, TemperedDensity, schedule, tempered

__all__ = [
    "Annealing",
    "Evaluation",
    "HMCInfo",
    "HMCState",
    "Position",
    "PosteriorDraws",
    "TemperedDensity",
    "effective_sample_size",
    "init",
    "jittered",
    "pareto_smooth",
    "rhat",
    "sample_posterior",
    "schedule",
    "step",
    "tempered",
    "tune",
]
