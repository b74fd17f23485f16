r"""Latents with constraints, reached from unconstrained space.

A sparse prior keeps its mass where numbers end: of Beta(0.1, 0.1) a tenth lies within :math:`10^{-7}` of 1,
where float32 has no number, and of Gamma(0.01) two fifths lie below :math:`10^{-38}`. In the coordinates
:math:`u = T^{-1}(z)` no mass is near an end. So densities and draws are made there: z is for the likelihood
only, which does not change where z can no longer tell.
"""

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints, transforms
from torch.nn.functional import logsigmoid

from pyro_vae.distributions import base_distribution
from pyro_vae.traces.densities import LogJoint, draw_latents, joint_of, log_guide
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import Program, check_proper, enumerated, sample_count

Position = dict[str, Tensor]


class Unconstrained(NamedTuple):
    r"""A point :math:`u \in \mathbb R^n` under the model, for :math:`z = T(u)`.

    Attributes:
        latents: z of every site.
        log_joint: Parts of :math:`\log p(x, z)`.
        log_jacobian: :math:`\log |\det \partial T / \partial u|`: a log-density of z plus this is that of u.
        transforms: T of every site.
    """

    latents: dict[str, Tensor]
    log_joint: LogJoint
    log_jacobian: Float[Tensor, "samples batch"]
    transforms: dict[str, transforms.Transform]


def at_unconstrained(model: Program, position: Position, *batch: Tensor) -> Unconstrained:
    """Score the model at unconstrained latents, shape ``(samples, batch, *event)``; as :func:`log_joint`."""
    num_samples = sample_count(position, batch)
    with _Placed(position) as placed:
        trace = trace_of(model, batch, num_samples, enumerated)
    joint = joint_of(trace, placed.latents, num_samples)
    log_jacobian = placed.log_jacobian.expand(num_samples, -1)
    return Unconstrained(placed.latents, joint, log_jacobian, placed.transforms)


def log_guide_at(
    guide: Program, position: Position, point: Unconstrained, *batch: Tensor
) -> Float[Tensor, "samples batch"]:
    r""":math:`\log q(z \mid x)` at a point under the model, in nats; raises as :func:`log_guide`."""
    with _Placed(position, point.transforms):
        return log_guide(guide, point.latents, *batch)


def unconstrain(
    model: Program, latents: dict[str, Tensor], *batch: Tensor, drawn: Position | None = None
) -> Position:
    """Find latents in unconstrained space: the inverse of :func:`at_unconstrained`.

    Args:
        model: A Pyro program that keeps the contract.
        latents: A value for every continuous latent site, shape ``(samples, batch, *event)``.
        *batch: Its arguments.
        drawn: Positions that :class:`DrawUnconstrained` found for them; they know u better than z can tell.
    """
    with _Found(latents, drawn or {}) as found:
        check_proper(trace_of(model, batch, sample_count(latents, batch), enumerated))
    return found.position


def draw_unconstrained(
    model: Program, *batch: Tensor, num_samples: int, guide: Program | None = None
) -> Position:
    """Draw the continuous latents from the prior, or from a guide; raises as :func:`draw_latents`."""
    with DrawUnconstrained() as draws:
        latents = draw_latents(guide or model, *batch, num_samples=num_samples)
    return unconstrain(model, latents, *batch, drawn=draws.position)


class DrawUnconstrained(Messenger):
    """Handler that draws continuous latent sites in unconstrained space; ``position`` keeps where."""

    def __init__(self) -> None:
        super().__init__()
        self.position: Position = {}

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        is_latent = not (msg["is_observed"] or msg["infer"].get("was_observed") or site_is_subsample(msg))
        if not is_latent or msg["value"] is not None or fn.support.is_discrete:
            return
        try:
            transform = biject_to(_support(fn))
        except NotImplementedError:  # a site of a guide; that of a model is refused later
            return
        u = _draw(fn, transform)
        if u is not None:
            self.position[msg["name"]] = u
            msg["value"] = _value(transform, u)


class _Placed(Messenger):
    """Handler that gives latent sites values and densities at a position in unconstrained space."""

    def __init__(self, position: Position, given: dict[str, transforms.Transform] | None = None) -> None:
        super().__init__()
        self.position, self.given = position, given
        self.latents: dict[str, Tensor] = {}
        self.transforms: dict[str, transforms.Transform] = {}
        self.log_jacobian = torch.zeros(())

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name not in self.position:
            return
        fn, u = msg["fn"], self.position[name]
        transform = _transform(name, fn) if self.given is None else self.given[name]
        z = _value(transform, u)
        _check_axes(name, z, u)
        log_jacobian = _log_jacobian(transform, u, z)
        events = fn.event_dim - transform.codomain.event_dim
        log_jacobian = log_jacobian.sum(list(range(-events, 0))) if events else log_jacobian
        log_density = _log_density(fn, transform, u)
        if log_density is not None:
            msg["infer"] = {**msg["infer"], "_log_prob": log_density - log_jacobian}
        self.log_jacobian = self.log_jacobian + log_jacobian
        self.latents[name], self.transforms[name] = z, transform
        # A latent that is masked is not there: it must integrate to 1, and the data do not depend on it.
        msg["value"], msg["is_observed"], msg["mask"] = z, True, None


class _Found(Messenger):
    """Handler that finds the position of values of latent sites in unconstrained space."""

    def __init__(self, latents: dict[str, Tensor], drawn: Position) -> None:
        super().__init__()
        self.latents, self.drawn = latents, drawn
        self.position: Position = {}

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name not in self.latents:
            return
        z, transform = self.latents[name], _transform(name, msg["fn"])
        u = transform.inv(z)
        _check_axes(name, u, z)
        drawn = self.drawn.get(name)
        if drawn is not None and drawn.shape[2:] == u.shape[2:]:
            same = _value(transform, drawn) == z  # else a guide has another support
            u = torch.where(same.all(-1, keepdim=True) if transform.codomain.event_dim else same, drawn, u)
        self.position[name] = u
        msg["value"], msg["is_observed"] = z, True


def _transform(name: str, fn: Distribution) -> transforms.Transform:
    try:
        return biject_to(_support(fn))
    except NotImplementedError:
        raise ValueError(
            f"the support of the model's site {name!r}, {fn.support}, cannot be mapped to all "
            "real numbers, which Hamiltonian Monte Carlo and quadrature need; use importance_sampling"
        ) from None


def _check_axes(name: str, found: Tensor, given: Tensor) -> None:
    if found.dim() > given.dim():
        raise ValueError(
            f"the support of the model's site {name!r} depends on a discrete site that is summed out: "
            "use importance_sampling with a guide that samples both"
        )


def _support(distribution: Distribution) -> constraints.Constraint:
    """Return the support; that of their components for mixtures, and one circle for angles."""
    if isinstance(base_distribution(distribution), dist.VonMises):
        return constraints.interval(-math.pi, math.pi)
    support = distribution.support
    is_mixture = isinstance(support, constraints.MixtureSameFamilyConstraint)
    return support.base_constraint if is_mixture else support


# ------------------------------------------------------------------------------------ tails


def _of_numbers(transform: transforms.Transform) -> transforms.Transform:
    """Return the transform of one number that is applied to many; exp(u) + 0 is exp(u)."""
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    parts = transform.parts if isinstance(transform, transforms.ComposeTransform) else [None, None]
    if len(parts) == 2 and isinstance(parts[1], transforms.AffineTransform):
        loc, scale = parts[1].loc, parts[1].scale
        if not isinstance(loc, Tensor) and not isinstance(scale, Tensor) and (loc, scale) == (0, 1):
            return parts[0]
    return transform


def _is_identity(transform: transforms.Transform) -> bool:
    return isinstance(transform, transforms.ComposeTransform) and not transform.parts


def _value(transform: transforms.Transform, u: Tensor) -> Tensor:
    """Return the number T(u), but neither 0 nor infinity where the support ends there."""
    number, limits = _of_numbers(transform), torch.finfo(u.dtype)
    if isinstance(number, transforms.StickBreakingTransform):
        return transform(u).clamp(min=limits.tiny)
    if _is_identity(number) or number.domain.event_dim:
        return transform(u)
    far = -math.log(limits.tiny)
    return transform(u.clamp(-far, far))


def _log_jacobian(transform: transforms.Transform, u: Tensor, z: Tensor) -> Tensor:
    if isinstance(transform, transforms.StickBreakingTransform):  # Pyro's takes the log of what underflows
        t, rest = _sticks(u)
        return (logsigmoid(t) + rest * logsigmoid(-t)).sum(-1)
    return transform.log_abs_det_jacobian(u, z)


def _sticks(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of the shares that are broken off, and the number of shares left before each."""
    rest = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    return u - rest.log(), rest


def _sticks_of(fn: Distribution, number: transforms.Transform) -> tuple[Tensor, Tensor] | None:
    """Return both parameters of the Beta variables that a distribution is made of, through their logits."""
    if isinstance(fn, torch.distributions.Beta) and isinstance(number, transforms.SigmoidTransform):
        return fn.concentration1, fn.concentration0
    if isinstance(fn, torch.distributions.Dirichlet) and isinstance(
        number, transforms.StickBreakingTransform
    ):
        a = fn.concentration
        return a[..., :-1], a.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return None


def _before(fn: Distribution, number: transforms.Transform) -> Distribution | None:
    """Return the distribution of u of one that ends with the transform."""
    fixed = transforms.ExpTransform, transforms.SigmoidTransform, transforms.StickBreakingTransform
    if not isinstance(fn, torch.distributions.TransformedDistribution) or type(number) not in fixed:
        return None
    *others, last = fn.transforms
    if type(_of_numbers(last)) is not type(number):
        return None
    return dist.TransformedDistribution(fn.base_dist, others) if others else fn.base_dist


def _tails(number: transforms.Transform, dtype: torch.dtype) -> tuple[float, float]:
    """Return the ends of u beyond which a density of z is a power of the distance to the support's end."""
    near = 10.0 if dtype == torch.float32 else 20.0  # z still tells how far it is from an end that is not 0
    ends_at_0 = not isinstance(number, transforms.ComposeTransform)
    first = number if ends_at_0 else number.parts[0]
    return -80.0 if ends_at_0 else -near, near if isinstance(first, transforms.SigmoidTransform) else 80.0


def _log_density(fn: Distribution, transform: transforms.Transform, u: Tensor) -> Tensor | None:
    r""":math:`\log p(z) + \log |\partial z / \partial u|`, right in the tails; None if z tells as much."""
    if isinstance(fn, dist.ExpandedDistribution):
        return _log_density(fn.base_dist, transform, u)
    if isinstance(fn, torch.distributions.Independent):
        each = _log_density(fn.base_dist, transform, u)
        axes = list(range(-fn.reinterpreted_batch_ndims, 0))
        return None if each is None else each.sum(axes)
    number = _of_numbers(transform)
    if _is_identity(number):
        return None
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        axis = -1 - fn.event_dim
        each = _log_density(fn.component_distribution, transform, u.unsqueeze(axis))
        log_shares = fn.mixture_distribution.logits.log_softmax(-1)
        return None if each is None else (each + log_shares).logsumexp(-1)
    if (before := _before(fn, number)) is not None:
        return before.log_prob(u)
    if (parameters := _sticks_of(fn, number)) is not None:
        a, b = parameters
        t = _sticks(u)[0] if fn.event_dim else u
        each = a * logsigmoid(t) + b * logsigmoid(-t) + (a + b).lgamma() - a.lgamma() - b.lgamma()
        return each.sum(-1) if fn.event_dim else each
    if fn.event_dim or number.domain.event_dim:
        return None

    def log_density(u: Tensor) -> Tensor:
        z = number(u)
        return fn.log_prob(z) + number.log_abs_det_jacobian(u, z)

    # In between in double precision; beyond, log p is linear in u, and a step back tells how steep.
    wide = u.double()
    inner = wide.clamp(*_tails(number, torch.float64))
    beyond = wide - inner
    at = log_density(inner)
    return (at + beyond.abs() * (at - log_density(inner - beyond.sign()))).to(u.dtype)


def _draw(fn: Distribution, transform: transforms.Transform) -> Tensor | None:
    """Draw u, right in the tails; None if z tells as much."""
    if isinstance(fn, torch.distributions.Independent):
        return _draw(fn.base_dist, transform)
    number = _of_numbers(transform)
    if _is_identity(number):
        return None
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        axis = -1 - fn.event_dim
        each = _draw(fn.component_distribution, transform)
        if each is None:
            return None
        chosen = fn.mixture_distribution.sample().reshape(*fn.batch_shape, *(1,) * -axis)
        return each.take_along_dim(chosen, axis).squeeze(axis)
    if (before := _before(fn, number)) is not None:
        return before.sample()
    if (parameters := _sticks_of(fn, number)) is not None:
        a, b = (_draw_log_gamma(parameter) for parameter in parameters)
        return a - b + _sticks(a)[1].log() if fn.event_dim else a - b
    if fn.event_dim or number.domain.event_dim:
        return None
    z = fn.sample()
    u = number.inv(z.double())
    for edge, inwards in zip(_tails(number, z.dtype), (1.0, -1.0), strict=True):
        at = torch.full_like(u, edge)
        rate = _log_density(fn, number, at + inwards) - _log_density(fn, number, at)
        tail = edge - inwards * torch.empty_like(u).exponential_() / rate
        u = torch.where(((u - edge) * inwards < 0) & (rate > 0), tail, u)
    return u.to(z.dtype)


def _draw_log_gamma(concentration: Tensor) -> Tensor:
    r"""Log of a Gamma variable, by :math:`G_a = G_{a+1} U^{1/a}`, where that itself would underflow."""
    uniform = torch.rand_like(concentration).clamp(min=torch.finfo(concentration.dtype).tiny)
    return torch._standard_gamma(concentration + 1).log() + uniform.log() / concentration
