"""Log-densities of model and guide, and draws from them."""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_vae.arguments import Count, checked
from pyro_vae.distributions import QuantizedPoint, SupportError, base_distribution, is_point_mass
from pyro_vae.distributions.unfolded import is_unfolded
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import (
    ENUMERATION_DIM,
    Program,
    check_known,
    check_plates,
    check_proper,
    conditioned,
    is_enumerated,
    latent_names,
    sample_count,
    sample_sites,
    sum_sites,
)


class LogJoint(NamedTuple):
    r"""The two parts of :math:`\log p(x, z)`, in nats.

    Attributes:
        log_prior: Sum over all latent sites.
        log_likelihood: Sum over all observed sites.
    """

    log_prior: Float[Tensor, "samples batch"]
    log_likelihood: Float[Tensor, "samples batch"]


class Draws(NamedTuple):
    r"""Draws of the latent sites from the guide, scored under model and guide.

    Attributes:
        latents: Value of every latent site, shape ``(samples, batch, *event)``.
        log_joint: Parts of :math:`\log p(x, z)`.
        log_guide: :math:`\log q(z \mid x)`, nats.
    """

    latents: dict[str, Tensor]
    log_joint: LogJoint
    log_guide: Float[Tensor, "samples batch"]


@checked
def log_joint(model: Program, latents: dict[str, Tensor], *batch: Tensor) -> LogJoint:
    r""":math:`\log p(z)` and :math:`\log p(x \mid z)` at given latents, in nats.

    Args:
        model: A Pyro program that keeps the contract.
        latents: A value for every latent site, shape ``(samples, batch, *event)``. Discrete sites may be
            left out, and are summed over.
        *batch: The program's arguments.

    Raises:
        ValueError: If a latent site has no value or one of a wrong shape, or a site lies outside the plate
            ``"data"``.
    """
    num_samples = sample_count(latents, batch)
    trace = trace_of(model, batch, num_samples, conditioned(latents))
    return joint_of(trace, latents, num_samples)


@checked
def log_guide(guide: Program, latents: dict[str, Tensor], *batch: Tensor) -> Float[Tensor, "samples batch"]:
    r""":math:`\log q(z \mid x)` at given latents, in nats; as :func:`log_joint`."""
    num_samples = sample_count(latents, batch)
    trace = trace_of(guide, batch, num_samples, conditioned(latents))
    names = [name for name, site in sample_sites(trace) if not site["infer"].get("is_auxiliary")]
    for name in names:
        fn = trace.nodes[name]["fn"]
        if is_point_mass(fn) or isinstance(base_distribution(fn), QuantizedPoint):
            raise ValueError(
                f"the guide's site {name!r} has one value for every datum and cannot score others, as "
                "wake-sleep, annealing from the guide and the aggregate posterior need; an autoencoder or a "
                "VQ-VAE is trained by SVI, and has no aggregate density"
            )
    check_known(trace, latents)
    try:
        return sum_sites([(trace, name) for name in names], num_samples)
    except KeyError as error:
        if "intermediates cache" not in str(error):  # Pyro's words for a flow without an inverse
            raise
        raise ValueError(
            "the guide's density is known for its own draws only: it is a flow without an inverse, "
            "such as planar or sylvester. Use another flow, such as inverse_autoregressive"
        ) from error


def joint_of(trace: poutine.Trace, latents: dict[str, Tensor], num_samples: int) -> LogJoint:
    """Return the parts of log p(x, z) of a trace at these latents; enumerated sites are summed out."""
    check_known(trace, latents)
    sites = sample_sites(trace)
    priors = [(trace, name) for name, site in sites if name in latents or is_enumerated(site)]
    others = [(trace, name) for name, _ in sites if (trace, name) not in priors]
    log_prior = sum_sites(priors, num_samples)
    if not any(is_enumerated(site) for _, site in sites):
        return LogJoint(log_prior, sum_sites(others, num_samples))
    return LogJoint(log_prior, sum_sites(priors + others, num_samples) - log_prior)


def draw_latents(program: Program, *batch: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Draw the continuous latent sites: from the prior of a model, or from a guide.

    Raises:
        ValueError: If there is none.
    """
    trace = trace_of(program, batch, num_samples)
    sites = {name: trace.nodes[name] for name in latent_names(trace)}
    check_plates(trace, list(sites), len(batch[0]))
    latents = {name: site["value"] for name, site in sites.items() if not site["fn"].support.is_discrete}
    if not sites:
        raise ValueError("the program has no latent site: give one that samples z, as vae(...) makes")
    if not latents:
        can = all(getattr(site["fn"], "has_enumerate_support", False) for site in sites.values())
        raise ValueError(
            f"this takes continuous latent sites, and all ({', '.join(sites)}) are discrete: "
            + ("enumeration(model, x) sums them out" if can else "importance_sampling bounds log p(x)")
        )
    return {
        name: value.expand(num_samples, len(batch[0]), *value.shape[2:]) for name, value in latents.items()
    }


def draw_guide(
    guide: Program, *batch: Tensor, num_samples: int
) -> tuple[dict[str, Tensor], Float[Tensor, "samples batch"]]:
    r"""Draw all latent sites from the guide; return them and :math:`\log q(z \mid x)`, in nats."""
    trace = trace_of(guide, batch, num_samples)
    names = latent_names(trace)
    log_q = sum_sites([(trace, name) for name in names], num_samples)
    return {name: trace.nodes[name]["value"] for name in names}, log_q


def draw_pair(model: Program, guide: Program, *batch: Tensor, num_samples: int) -> Draws:
    """Draw latents from the guide and score them; differentiable in the parameters of both programs.

    Discrete sites of the model that the guide leaves out are summed over.

    Raises:
        ValueError: As :func:`log_weights`.
    """
    guide_trace, model_trace, names = _at_draws(model, guide, batch, num_samples)
    values = {name: guide_trace.nodes[name]["value"] for name in names}
    return Draws(
        values,
        joint_of(model_trace, values, num_samples),
        sum_sites([(guide_trace, name) for name in names], num_samples),
    )


def _at_draws(
    model: Program, guide: Program, batch: tuple[Tensor, ...], num_samples: int, *, sums_out: bool = False
) -> tuple[poutine.Trace, poutine.Trace, list[str]]:
    """Trace the guide, and the model at its draws; return both traces and the names of the guide's sites.

    Discrete sites that the guide leaves out are enumerated, and with ``sums_out`` those that it marks, too.
    """
    around = EnumMessenger(ENUMERATION_DIM) if sums_out else lambda program: program
    guide_trace = trace_of(guide, batch, num_samples, around)
    names = latent_names(guide_trace)
    for name in names:
        if guide_trace.nodes[name]["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide samples {name!r} besides the model's sites, as Pyro's autoguides do, so that the "
                "density of those is not known: give a guide that samples each from a density"
            )
        if is_point_mass(guide_trace.nodes[name]["fn"]):
            raise ValueError(
                f"the guide's site {name!r} is a point mass: it has no density, so there are no "
                "importance weights and no bound on log p(x). An autoencoder has no likelihood; use a "
                "guide with a density"
            )
    goes_on = any(is_enumerated(guide_trace.nodes[name]) for name in names)
    enum = EnumMessenger(None if goes_on else ENUMERATION_DIM)  # left of the axes that the guide enumerates

    def config(site: dict) -> dict:
        left_out = site["name"] not in names and getattr(site["fn"], "has_enumerate_support", False)
        return {"enumerate": "parallel" if left_out else None}

    def replayed(program: Program) -> Program:
        return poutine.replay(enum(poutine.infer_config(program, config_fn=config)), trace=guide_trace)

    model_trace = trace_of(model, batch, num_samples, replayed)
    check_proper(model_trace)
    observed = [
        {name for name, site in sample_sites(trace) if site["is_observed"]}
        for trace in (model_trace, guide_trace)
    ]
    if observed[1] and not observed[0]:
        raise ValueError(
            f"the model observes nothing, and the guide {', '.join(sorted(observed[1]))}: they are swapped; "
            "the model comes first"
        )
    known = {name for name, site in sample_sites(model_trace) if is_enumerated(site)} | set(names)
    latents = set(latent_names(model_trace))
    if not set(names) <= latents <= known:
        raise ValueError(
            f"the model's latent sites are {sorted(latents)}, the guide's are {sorted(names)}: they "
            "must have the same names (the guide may leave out discrete sites that can be enumerated)"
        )
    for name in names:  # what the model masks is not there, and has no density in either program
        guide_trace.nodes[name]["mask"] = model_trace.nodes[name]["mask"]
    return guide_trace, model_trace, names


@checked
def log_weights(
    model: Program, guide: Program, *batch: Tensor, num_samples: Count
) -> Float[Tensor, "samples batch"]:
    r""":math:`\log p(x, z) - \log q(z \mid x)` for :math:`z \sim q(z \mid x)`, in nats.

    Their mean over samples is the ELBO, their log-mean-exp the importance-weighted bound (Burda, Grosse &
    Salakhutdinov 2016). Differentiable in the parameters of model and guide where the guide's sites are
    reparameterised. Where the model masks a latent site it is not there, in the guide as well; elsewhere the
    guide's density counts, masked or not. Like all of this module it is taken in evaluation mode and leaves
    buffers as they were, except within a step of training (of ``SVI``, or of an objective of this package).

    Args:
        model: A Pyro program that keeps the contract.
        guide: A Pyro program with the same arguments and the model's latent sites.
        *batch: Arguments of both; the first is the data.
        num_samples: Draws for every datum.

    Raises:
        ValueError: If a guide site is a point mass, the latent sites of the two programs differ, or a
            site lies outside the plate ``"data"``; if what a network makes of a datum depends on the other
            rows of its batch.
    """
    guide_trace, model_trace, names = _at_draws(model, guide, batch, num_samples, sums_out=True)
    drawn = [(guide_trace, name) for name in names if not is_enumerated(guide_trace.nodes[name])]
    return sum_sites([(model_trace, name) for name, _ in sample_sites(model_trace)], num_samples, minus=drawn)


def guide_distributions(guide: Program, *batch: Tensor) -> dict[str, Distribution]:
    """Return the guide's distribution of every latent site, batch shape (1, batch).

    A site that depends on another one is conditioned on a draw of it.
    """
    sites = sample_sites(trace_of(guide, batch, 1))
    observed = [
        repr(name)
        for name, site in sites
        if site["is_observed"]
        and not site["infer"].get("is_auxiliary")
        and not isinstance(base_distribution(site["fn"]), dist.Unit)
    ]
    if observed:
        raise ValueError(
            f"this takes the guide, but {', '.join(observed)} is observed, as data of a model are"
        )
    return {name: site["fn"] for name, site in sites if not site["is_observed"]}


def decode(model: Program, latents: dict[str, Tensor], *batch: Tensor) -> Float[Tensor, "samples batch data"]:
    r""":math:`E[x \mid z]` at given latents.

    Args:
        model: A Pyro program that keeps the contract, with one observed site.
        latents: A value for every latent site, shape ``(samples, batch, *event)``.
        *batch: Arguments of the program; only the number of data counts.
    """
    return likelihood(model, latents, *batch).mean


def likelihood(model: Program, latents: dict[str, Tensor], *batch: Tensor) -> Distribution:
    r""":math:`p(x \mid z)` at given latents, as :func:`decode`; batch shape (samples, batch).

    Raises:
        ValueError: If the model observes several sites, or none.
    """
    num_samples = sample_count(latents, batch)
    with pyro.validation_enabled(False):  # the data do not matter here
        trace = trace_of(model, batch, num_samples, lambda p: poutine.condition(p, data=latents))
    check_known(trace, latents)
    observed = [site["fn"] for name, site in sample_sites(trace) if name not in latents]
    if len(observed) != 1:
        raise ValueError(f"the model must observe one site, but observes {len(observed)}")
    shape = torch.Size([num_samples, len(batch[0])])
    return observed[0] if observed[0].batch_shape == shape else observed[0].expand(shape)


def at_point_masses(model: Program, guide: Program, *batch: Tensor) -> LogJoint | None:
    r""":math:`\log p(x, z)` where the guide of an autoencoder has all of its mass; None if it has a density.

    Shape (1, batch), nats. It is no bound on log p(x).
    """
    guide_trace = trace_of(guide, batch, 1)
    sites = {name: guide_trace.nodes[name] for name in latent_names(guide_trace)}
    if not any(is_point_mass(site["fn"]) for site in sites.values()):
        return None
    return log_joint(model, {name: site["value"] for name, site in sites.items()}, *batch)


def factors(program: Program, *batch: Tensor) -> list[str]:
    """Return the names of the program's ``pyro.factor`` statements."""
    trace = trace_of(program, batch, 1)
    return [
        name for name, site in sample_sites(trace) if isinstance(base_distribution(site["fn"]), dist.Unit)
    ]


def model_distributions(model: Program, guide: Program, *batch: Tensor) -> dict[str, Distribution]:
    """Return the model's distribution of every site, batch shape (1, batch), at one draw from the guide."""
    return {name: site["fn"] for name, site in sample_sites(_at_a_draw(model, guide, batch)[1])}


def _at_a_draw(
    model: Program, guide: Program, batch: tuple[Tensor, ...]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Trace guide and model at one draw from the guide."""
    drawn = trace_of(guide, batch, 1)
    return drawn, trace_of(model, batch, 1, lambda program: poutine.replay(program, trace=drawn))


def kl_by_dimension(
    model: Program, guide: Program, *batch: Tensor, num_samples: int = 1
) -> tuple[Float[Tensor, "samples batch"], dict[str, Tensor]]:
    r""":math:`\log p(x \mid z)` at draws from the guide, and the divergence of every latent site; nats.

    Returns:
        The log-likelihood; and by site :math:`KL(q_j \| p_j)` of every sample, datum and dimension j, in
        closed form or as :math:`\log q_j - \log p_j` at the draw. Where prior or posterior is not
        independent over dimensions the whole site is one.
    """
    guide_trace, model_trace, names = _at_draws(model, guide, batch, num_samples)
    values = {name: guide_trace.nodes[name]["value"] for name in names}
    joint = joint_of(model_trace, values, num_samples)
    kl = {}
    for name, z in values.items():
        q, p = guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]
        each = None
        if not (is_unfolded(q) or is_unfolded(p)):
            each = _kl_of_numbers(base_distribution(q), base_distribution(p), z)
        if each is None:
            each = (q.log_prob(z) - p.log_prob(z)).unsqueeze(-1)
        if (mask := model_trace.nodes[name]["mask"]) is not None:
            there = torch.as_tensor(mask, device=each.device)
            each = torch.where(there.reshape(*there.shape, *(1,) * (each.dim() - 2)), each, 0.0)
        kl[name] = each.expand(num_samples, len(batch[0]), *each.shape[2:]).flatten(2)
    return joint.log_likelihood, kl


def _kl_of_numbers(q: Distribution, p: Distribution, z: Tensor) -> Tensor | None:
    """Return the divergence of independent numbers; None if they are not independent."""
    if q.event_shape or p.event_shape:
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(z) - p.log_prob(z)


def check_batch(model: Program, guide: Program, *batch: Tensor) -> None:
    """Raise ``SupportError`` if one of the programs refuses this batch."""
    with pyro.validation_enabled(True), torch.no_grad():
        try:
            _at_a_draw(model, guide, batch)
        except SupportError:
            raise
        except ValueError:  # from Pyro, about parameters that became nan
            pass


def first_nonfinite(model: Program, guide: Program, *batch: Tensor) -> str | None:
    """Describe the first sample site of guide or model that is not finite; None if all are."""
    with pyro.validation_enabled(False), torch.no_grad():
        guide_trace, model_trace = _at_a_draw(model, guide, batch)
        for program, trace in ("guide", guide_trace), ("model", model_trace):
            for name, site in sample_sites(trace):
                log_prob = site["fn"].log_prob(site["value"])
                for what, numbers in ("value", site["value"]), ("log-probability", log_prob):
                    if bad := int((~torch.isfinite(numbers)).sum()):
                        return (
                            f"the {what} of the {program}'s site {name!r} is not finite "
                            f"({bad} of {numbers.numel()} numbers)"
                        )
    return None
