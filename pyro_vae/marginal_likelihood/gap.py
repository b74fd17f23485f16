r"""Losses of the bound: the gap between log p(x) and the ELBO, split into its two causes.

.. math:: \log p(x) - L(q_\phi) =
          \underbrace{\log p(x) - L(q^*)}_{\text{approximation}} +
          \underbrace{L(q^*) - L(q_\phi)}_{\text{amortisation}},

with :math:`q^*` the best density of the guide's family for this very datum (Cremer, Li & Duvenaud, *Inference
Suboptimality in Variational Autoencoders*, 2018). A richer family closes the first, a better encoder the
second.

:math:`q^*` is found by optimising, for every datum, offsets to the parameters of the guide's densities (in
their unconstrained space: locations, logarithms of scales, ...). Where a site does not depend on other
latents this is the whole family; where it does, the dependence itself stays that of the guide.
"""

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, transform_to

from pyro_vae.arguments import Count, checked
from pyro_vae.compiled import CompiledFunction
from pyro_vae.distributions import base_distribution
from pyro_vae.marginal_likelihood.importance import elbo, importance_sampling
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.traces import Program, guide_distributions, log_weights
from pyro_vae.traces.blocks import (
    Advance,
    Batch,
    PerDatum,
    Work,
    check_sizes,
    checksum,
    evaluation,
    rows_at_once,
)

_STEPS = 250  # of a round of optimisation
_WORTH = 0.01  # nats per datum that a round must gain for another one


class InferenceGap(NamedTuple):
    r"""The gap of every datum and its parts, nats.

    Attributes:
        log_marginal: log p(x).
        elbo: :math:`L(q_\phi)`, the guide's bound.
        best_elbo: :math:`L(q^*)`, the bound of the best density of its family.
    """

    log_marginal: LogMarginal
    elbo: Float[Tensor, " batch"]
    best_elbo: Float[Tensor, " batch"]

    @property
    def approximation(self) -> Float[Tensor, " batch"]:
        r""":math:`\log p(x) - L(q^*)`."""
        return self.log_marginal.values - self.best_elbo

    @property
    def amortisation(self) -> Float[Tensor, " batch"]:
        r""":math:`L(q^*) - L(q_\phi)`."""
        return self.best_elbo - self.elbo

    def summary(self) -> str:
        """Means over data, in words."""
        whole = (self.log_marginal.values - self.elbo).mean().item()
        return (
            f"log p(x) - ELBO = {whole:.2f} nats per datum: "
            f"approximation gap {self.approximation.mean().item():.2f} (the family), "
            f"amortisation gap {self.amortisation.mean().item():.2f} (the encoder)\n"
            f"log p(x) by {self.log_marginal.method.replace('_', ' ')}, "
            f"± {self.log_marginal.monte_carlo_error:.2g}; data: {self.log_marginal.settings['data']}"
        )


@checked
def inference_gap(
    model: Program,
    guide: Program,
    *batch: Tensor,
    log_marginal: LogMarginal | None = None,
    num_particles: Count = 8,
    num_rounds: Count = 20,
    num_samples: Count = 200,
    data: str | None = None,
    progress: bool = True,
) -> InferenceGap:
    r"""Gap between log p(x) and the ELBO, and how much of it is due to the family and to the encoder.

    Args:
        model: A Pyro program that keeps the contract.
        guide: Its guide; every site a reparameterised density given by parameters, such as a normal.
        *batch: Arguments of both for all data, first axis the data.
        log_marginal: Estimates of log p(x) of the same data; by default importance sampling with 5,000
            samples from :math:`q^*`.
        num_particles: Draws for the bound at every step of the optimisation.
        num_rounds: The most rounds of 250 steps of Adam. In each the learning rate falls from 0.1 to 0 along
            a cosine; the last is the first that gains less than 0.01 nats per datum.
        num_samples: Draws for the two bounds that are reported.
        data: Words on the data, for the summary.
        progress: Show progress bars.

    Raises:
        ValueError: If a guide site has no parameters to optimise, or no reparameterised draws.
    """
    num_data = check_sizes(batch)
    if log_marginal is not None and len(log_marginal.values) != num_data:
        raise ValueError(f"log_marginal is of {len(log_marginal.values)} data, but there are {num_data}")
    with evaluation(guide):
        names = list(_parameters(guide, *(argument[:1] for argument in batch)))
    own_model, best_guide = _FirstArguments(model, len(batch)), _Shifted(guide, len(batch), names)
    search = _BestDensities((own_model, best_guide), guide, names, batch, num_particles, num_rounds)
    offsets = search.run(batch, progress=progress)
    extended = (*batch, *offsets.values())
    if log_marginal is None:
        log_marginal = importance_sampling(own_model, best_guide, *extended, data=data, progress=progress)
        log_marginal.settings["data_checksum"] = checksum(*batch)
    amortised = elbo(model, guide, *batch, num_samples=num_samples)
    best = elbo(own_model, best_guide, *extended, num_samples=num_samples)
    return InferenceGap(log_marginal, amortised.elbo, best.elbo)


_Name = tuple[str, str]  # of a site, and of a parameter of its density


class _BestDensities(Work):
    """Offsets to the parameters of the guide's densities, for the highest bound of every datum."""

    name, unit = "best densities", "step"

    def __init__(
        self,
        pair: tuple[Program, Program],
        guide: Program,
        names: list[_Name],
        batch: Batch,
        num_particles: int,
        num_rounds: int,
    ) -> None:
        self.programs, self.guide, self.names, self.num_rounds = pair, guide, names, num_rounds
        self.size = max(1, rows_at_once(pair[0], batch) // num_particles)
        self.amount = num_rounds * _STEPS

        def differentiated(offsets: list[Tensor], *block: Tensor) -> dict[str, Tensor]:
            with torch.enable_grad():
                offsets = [offset.detach().requires_grad_() for offset in offsets]
                weights = log_weights(*pair, *block, *offsets, num_samples=num_particles)
                gradients = torch.autograd.grad(-weights.mean(0).sum(), offsets)
            return {"bound": weights.detach().mean()} | {str(i): g for i, g in enumerate(gradients)}

        self.gradients = CompiledFunction(differentiated, roots=pair)
        self.gradients.planned_calls = -(-len(batch[0]) // self.size) * self.amount

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        parameters = _parameters(self.guide, *block)
        offsets = [torch.zeros_like(parameters[name][0]) for name in self.names]
        reached = -math.inf
        for left in reversed(range(self.num_rounds)):
            optimizer = torch.optim.Adam(offsets, lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
            bounds = []
            for _ in range(_STEPS):
                found, _ = self.gradients(offsets, *block)
                bounds.append(found["bound"])
                for i, offset in enumerate(offsets):
                    offset.grad = found[str(i)].clone()
                optimizer.step()
                schedule.step()
                advance(len(block[0]))
            before, reached = reached, torch.stack(bounds[-_STEPS // 5 :]).mean().item()
            if not reached - before > _WORTH:
                advance(left * _STEPS * len(block[0]))
                break
        return dict(zip(("/".join(name) for name in self.names), offsets, strict=True))


class _FirstArguments(nn.Module):
    """The model, called with arguments behind its own."""

    def __init__(self, model: Program, count: int) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, *arguments: Tensor) -> None:
        self.model(*arguments[: self.count])


class _Shifted(nn.Module):
    """The guide with offsets to the parameters of its densities, which are arguments behind its own."""

    def __init__(self, guide: Program, count: int, names: list[_Name]) -> None:
        super().__init__()
        self.guide, self.count, self.names = guide, count, names

    def forward(self, *arguments: Tensor) -> None:
        with _Shift(dict(zip(self.names, arguments[self.count :], strict=True))):
            self.guide(*arguments[: self.count])


class _Shift(Messenger):
    def __init__(self, offsets: dict[_Name, Tensor]) -> None:
        super().__init__()
        self.offsets = offsets

    def _pyro_sample(self, msg: dict) -> None:
        own = {name: offset for (site, name), offset in self.offsets.items() if site == msg["name"]}
        if own:
            msg["fn"] = _shifted(msg["fn"], own)


def _shifted(distribution: Distribution, offsets: dict[str, Tensor]) -> Distribution:
    """Distribution with its parameters moved in their unconstrained space."""
    if isinstance(distribution, dist.MaskedDistribution):
        return _shifted(distribution.base_dist, offsets).mask(distribution._mask)
    if isinstance(distribution, dist.Independent):
        base = _shifted(distribution.base_dist, offsets)
        return dist.Independent(base, distribution.reinterpreted_batch_ndims)
    moved = {}
    for name, offset in offsets.items():
        transform = transform_to(distribution.arg_constraints[name])
        moved[name] = transform(transform.inv(getattr(distribution, name)) + offset)
    return type(distribution)(**moved)


def _parameters(guide: Program, *batch: Tensor) -> dict[_Name, Tensor]:
    """Parameters of the guide's densities in their unconstrained space, ``(1, batch, ...)``."""
    found = {}
    for site, distribution in guide_distributions(guide, *batch).items():
        base = base_distribution(distribution)
        constraints = getattr(base, "arg_constraints", {})
        names = [name for name in constraints if isinstance(vars(base).get(name), Tensor)]
        if not names or not base.has_rsample or isinstance(base, dist.TransformedDistribution):
            raise ValueError(
                f"the guide's site {site!r} is a {type(base).__name__}, which is not a reparameterised "
                "density given by parameters: its family cannot be searched for the best member"
            )
        for name in names:
            value = transform_to(constraints[name]).inv(vars(base)[name])
            found[site, name] = value.expand(1, len(batch[0]), *value.shape[2:])
    return found
