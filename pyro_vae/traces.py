r"""The seam: from a pair of Pyro programs and a batch to log-densities, one for every sample and datum.

Objectives, algorithms and estimators meet models only here. A program keeps the contract if its per-datum
sites lie in one plate called ``"data"`` at ``dim=-1``; a plate ``"samples"`` put around it at ``dim=-2`` then
draws everything ``num_samples`` times at once. From the two traces come

.. math:: \log w_s = \log p(x, z_s) - \log q(z_s \mid x), \qquad z_s \sim q(z \mid x),

of shape (samples, batch). Pyro's own importance weights are one number for the whole *batch*; log-likelihoods
per datum need this shape. ``poutine.mask`` is respected, ``poutine.scale`` is left out: it weights a loss and
is not part of a density.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.distributions import base_distribution

Program = Callable[..., object]


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


@contextlib.contextmanager
def local_parameters(*programs: Program) -> Iterator[None]:
    """Parameters belong to their modules here, not to Pyro's store.

    Except where a program holds a ``PyroModule`` that was made for the store. Pyro decides that when it is
    made (``pyro.settings.set(module_local_params=True)`` before makes it local); it works in no other way.
    """
    modules = [m for program in programs if isinstance(program, nn.Module) for m in program.modules()]
    made_for_the_store = any(
        isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state")
        for module in modules
    )
    with pyro.settings.context(module_local_params=not made_for_the_store):
        yield


def log_joint(model: Program, latents: dict[str, Tensor], *batch: Tensor) -> LogJoint:
    r""":math:`\log p(z)` and :math:`\log p(x \mid z)` at given latents, in nats.

    Args:
        model: A Pyro program that keeps the contract.
        latents: A value for every latent site, shape ``(samples, batch, *event)``.
        *batch: The program's arguments.

    Raises:
        ValueError: If a latent site has no value or one of a wrong shape, or a site lies outside the plate
            ``"data"``.
    """
    shapes = {name: tuple(value.shape[:2]) for name, value in latents.items()}
    num_samples = next(iter(shapes.values()), (1,))[0]
    if set(shapes.values()) != {(num_samples, len(batch[0]))}:
        raise ValueError(
            f"latents must have shape (samples, {len(batch[0])} data, ...), the same for all; their first "
            f"two axes are {shapes}"
        )
    trace = _trace(poutine.condition(model, data=latents), batch, num_samples)
    return _log_joint(trace, latents, num_samples)


def draw(model: Program, guide: Program, *batch: Tensor, num_samples: int) -> Draws:
    """Draw latents from the guide and score them; differentiable in the parameters of both programs.

    Raises:
        ValueError: As :func:`log_weights`.
    """
    guide_trace = _trace(guide, batch, num_samples)
    names = [name for name, site in _sample_sites(guide_trace) if not site["is_observed"]]
    for name in names:
        if isinstance(base_distribution(guide_trace.nodes[name]["fn"]), dist.Delta):
            raise ValueError(
                f"the guide's site {name!r} is a point mass: it has no density, so there are no "
                "importance weights and no bound on log p(x). An autoencoder has no likelihood; use a "
                "guide with a density"
            )
    model_trace = _trace(poutine.replay(model, trace=guide_trace), batch, num_samples)
    latents = [name for name, site in _sample_sites(model_trace) if not site["is_observed"]]
    if set(latents) != set(names):
        raise ValueError(
            f"the model's latent sites are {sorted(latents)}, the guide's are {sorted(names)}: they "
            "must have the same names"
        )
    values = {name: guide_trace.nodes[name]["value"] for name in names}
    return Draws(
        values,
        _log_joint(model_trace, values, num_samples),
        _sum_sites(guide_trace, names, num_samples),
    )


def log_weights(
    model: Program, guide: Program, *batch: Tensor, num_samples: int
) -> Float[Tensor, "samples batch"]:
    r""":math:`\log p(x, z) - \log q(z \mid x)` for :math:`z \sim q(z \mid x)`, in nats.

    Their mean over samples is the ELBO, their log-mean-exp the importance-weighted bound (Burda, Grosse &
    Salakhutdinov 2016). Differentiable in the parameters of model and guide where the guide's sites are
    reparameterised.

    Args:
        model: A Pyro program that keeps the contract.
        guide: A Pyro program with the same arguments and the model's latent sites.
        *batch: Arguments of both; the first is the data.
        num_samples: Draws for every datum.

    Raises:
        ValueError: If a guide site is a point mass, the latent sites of the two programs differ, or a
            site lies outside the plate ``"data"``.
    """
    draws = draw(model, guide, *batch, num_samples=num_samples)
    return sum(draws.log_joint) - draws.log_guide


def sample(
    model: Program, *batch: Tensor, num_samples: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws from the model itself: (latents, observations), each ``(samples, batch, *event)`` by site.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments; of the data only the number counts, their values are drawn anew.
        num_samples: Draws for every row of the batch.
    """
    latents, observations = {}, {}
    for name, site in _sample_sites(_trace(poutine.uncondition(model), batch, num_samples)):
        values = observations if site["infer"].get("was_observed") else latents
        values[name] = site["value"]
    return latents, observations


def guide_distributions(guide: Program, *batch: Tensor) -> dict[str, Distribution]:
    """The guide's distribution of every latent site, batch shape (1, batch).

    A site that depends on another one is conditioned on a draw of it.
    """
    sites = _sample_sites(_trace(guide, batch, 1))
    return {name: site["fn"] for name, site in sites if not site["is_observed"]}


def model_distributions(model: Program, guide: Program, *batch: Tensor) -> dict[str, Distribution]:
    """The model's distribution of every site, batch shape (1, batch), at one draw from the guide."""
    replayed = poutine.replay(model, trace=_trace(guide, batch, 1))
    return {name: site["fn"] for name, site in _sample_sites(_trace(replayed, batch, 1))}


def first_nonfinite(model: Program, guide: Program, *batch: Tensor) -> str | None:
    """In words, the first sample site of guide or model that is not finite; None if all are."""
    with pyro.validation_enabled(False), torch.no_grad():
        guide_trace = _trace(guide, batch, 1)
        model_trace = _trace(poutine.replay(model, trace=guide_trace), batch, 1)
        for program, trace in ("guide", guide_trace), ("model", model_trace):
            for name, site in _sample_sites(trace):
                log_prob = site["fn"].log_prob(site["value"])
                for what, numbers in ("value", site["value"]), ("log-probability", log_prob):
                    bad = int((~torch.isfinite(numbers)).sum())
                    if bad:
                        return (
                            f"the {what} of the {program}'s site {name!r} is not finite "
                            f"({bad} of {numbers.numel()} numbers)"
                        )
    return None


def _trace(program: Program, batch: tuple[Tensor, ...], num_samples: int) -> poutine.Trace:
    with local_parameters(_module_of(program)), pyro.plate("samples", num_samples, dim=-2):
        return poutine.trace(program).get_trace(*batch)


def _module_of(program: Program) -> Program:
    """What is inside of Pyro's handlers, which are partial applications."""
    while isinstance(program, functools.partial):
        program = program.args[-1] if program.args else program.func
    return program


def _sample_sites(trace: poutine.Trace) -> list[tuple[str, dict]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]


def _log_joint(trace: poutine.Trace, latents: dict[str, Tensor], num_samples: int) -> LogJoint:
    names = [name for name, _ in _sample_sites(trace)]
    for name, site in _sample_sites(trace):
        if name not in latents and not site["is_observed"]:
            raise ValueError(f"latents has no value for the model's site {name!r}")
    return LogJoint(
        _sum_sites(trace, [name for name in names if name in latents], num_samples),
        _sum_sites(trace, [name for name in names if name not in latents], num_samples),
    )


def _sum_sites(trace: poutine.Trace, names: list[str], num_samples: int) -> Float[Tensor, "samples batch"]:
    total = None
    for name in names:
        site = trace.nodes[name]
        plates = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        data = plates.get("data")
        if set(plates) != {"samples", "data"} or data.dim != -1:
            raise ValueError(
                f"site {name!r} must lie in the plate 'data' at dim=-1 and in no other plate, but its "
                f"plates are {sorted(set(plates) - {'samples'})}: log p(x) of a datum needs data that "
                "are independent given the parameters"
            )
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        log_prob = scale_and_mask(log_prob, mask=site["mask"]).expand(num_samples, data.size)
        total = log_prob if total is None else total + log_prob
    if total is None:
        raise ValueError("the program has no latent or no observed site; both are needed")
    return total
