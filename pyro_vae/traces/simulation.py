"""Draws from a model: latents, observations, and data in place of those given."""

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.arguments import Count, checked
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import Program, check_plates, check_proper, sample_sites


@checked
def sample(
    model: Program, *batch: Tensor, num_samples: Count = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw from the model itself: (latents, observations), each ``(samples, batch, *event)`` by site.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments; only the number of data counts, their values are drawn anew.
        num_samples: Draws for every row of the batch.

    Raises:
        ValueError: If a prior is flat, as an autoencoder's.
    """
    latents, observations = {}, {}
    trace = trace_of(model, batch, num_samples, poutine.uncondition)
    check_proper(trace)
    for name, site in sample_sites(trace):
        values = observations if site["infer"].get("was_observed") else latents
        values[name] = site["value"]
    return latents, observations


def simulate(model: Program, *batch: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Draw data from the model in place of those given, and the latents that they come from.

    Args:
        model: A Pyro program that keeps the contract.
        *batch: Its arguments; those that it observes are replaced.

    Returns:
        Latents by site, shape ``(1, batch, *event)``, and the new arguments.

    Raises:
        ValueError: If a site observes something else than one of the arguments, or (while Pyro validates) a
            density depends on the data that it shall draw.
    """
    latents, arguments, drawn = {}, list(batch), {}
    trace = trace_of(model, batch, 1, poutine.uncondition)
    check_proper(trace)
    check_plates(trace, [name for name, _ in sample_sites(trace)], len(batch[0]))
    for name, site in sample_sites(trace):
        drawn[name] = site["value"]
        if not site["infer"].get("was_observed"):
            latents[name] = site["value"].expand(1, len(batch[0]), *site["fn"].event_shape)
            continue
        places = [i for i, argument in enumerate(batch) if site["infer"]["obs"] is argument]
        if not places or arguments[places[0]] is not batch[places[0]]:
            raise ValueError(
                f"data cannot be simulated: what the model's site {name!r} observes is none of its arguments "
                "as they are, or one that another site observes as well. Pass obs=x, without changing x"
            )
        value = site["value"].expand(1, *batch[places[0]].shape)[0]
        arguments[places[0]] = value.to(batch[places[0]].dtype)
    if pyro.settings.get("validate_poutine"):
        _check_simulated(model, trace, drawn, tuple(arguments))
    return latents, tuple(arguments)


def _check_simulated(
    model: Program, trace: poutine.Trace, drawn: dict[str, Tensor], arguments: tuple[Tensor, ...]
) -> None:
    """Raise ``ValueError`` if, given the drawn data, the model would have drawn from another density."""
    again = trace_of(
        model, arguments, 1, lambda program: poutine.condition(poutine.uncondition(program), data=drawn)
    )
    for name, _ in sample_sites(trace):
        before, after = (t.nodes[name]["fn"].log_prob(drawn[name]) for t in (trace, again))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"data cannot be simulated: the density of the model's site {name!r} depends on the data "
                "that it shall draw (an autoregressive model, or a prior given x)"
            )
