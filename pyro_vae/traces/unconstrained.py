"""Latents with constraints, reached from unconstrained space."""

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.distributions import base_distribution
from pyro_vae.traces.densities import LogJoint, joint_of
from pyro_vae.traces.sites import Program, check_proper, enumerated, sample_count, trace_of


class Unconstrained(NamedTuple):
    r"""A point :math:`u \in \mathbb R^n` under the model, for :math:`z = T(u)`.

    Attributes:
        latents: z of every site.
        log_joint: Parts of :math:`\log p(x, z)`.
        log_jacobian: :math:`\log |\det \partial T / \partial u|`: what added to a log-density of z gives that
            of u.
    """

    latents: dict[str, Tensor]
    log_joint: LogJoint
    log_jacobian: Float[Tensor, "samples batch"]


def at_unconstrained(model: Program, position: dict[str, Tensor], *batch: Tensor) -> Unconstrained:
    """The model at unconstrained latents of shape ``(samples, batch, *event)``; as :func:`log_joint`."""
    num_samples = sample_count(position, batch)
    with _Transform(position, inverse=False) as transform:
        trace = trace_of(enumerated(model), batch, num_samples)
    joint = joint_of(trace, transform.result, num_samples)
    return Unconstrained(transform.result, joint, transform.log_jacobian.expand(num_samples, -1))


def unconstrain(model: Program, latents: dict[str, Tensor], *batch: Tensor) -> dict[str, Tensor]:
    """Where in unconstrained space latents are: the inverse of :func:`at_unconstrained`."""
    with _Transform(latents, inverse=True) as transform:
        check_proper(trace_of(enumerated(model), batch, sample_count(latents, batch)))
    return transform.result


class _Transform(Messenger):
    """Gives latent sites values by the transform between their support and unconstrained space."""

    def __init__(self, values: dict[str, Tensor], *, inverse: bool) -> None:
        super().__init__()
        self.values, self.inverse = values, inverse
        self.result: dict[str, Tensor] = {}
        self.log_jacobian = torch.zeros(())

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name not in self.values:
            return
        try:
            transform = biject_to(_support(msg["fn"]))
        except NotImplementedError:
            raise ValueError(
                f"the support of the model's site {name!r}, {msg['fn'].support}, cannot be mapped to all "
                "real numbers, which Hamiltonian Monte Carlo and quadrature need; use importance_sampling"
            ) from None
        given = self.values[name]
        u, z = (transform.inv(given), given) if self.inverse else (given, transform(given))
        if z.dim() > given.dim() or u.dim() > given.dim():
            raise ValueError(
                f"the support of the model's site {name!r} depends on a discrete site that is summed out: "
                "use importance_sampling with a guide that samples both"
            )
        self.result[name] = u if self.inverse else z
        log_jacobian = transform.log_abs_det_jacobian(u, z)
        events = msg["fn"].event_dim - transform.codomain.event_dim
        self.log_jacobian = (
            self.log_jacobian + log_jacobian.sum(list(range(-events, 0)))
            if events
            else (self.log_jacobian + log_jacobian)
        )
        msg["value"], msg["is_observed"] = z, True


def _support(distribution: dist.Distribution) -> constraints.Constraint:
    """The support, of mixtures that of their components; angles are taken from one circle."""
    if isinstance(base_distribution(distribution), dist.VonMises):
        return constraints.interval(-math.pi, math.pi)
    support = distribution.support
    is_mixture = isinstance(support, constraints.MixtureSameFamilyConstraint)
    return support.base_constraint if is_mixture else support
