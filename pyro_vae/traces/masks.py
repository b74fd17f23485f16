"""Masked sites: a latent that is masked is not there, and nothing may depend on it."""

import contextlib
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import Program, sample_sites, sum_sites
from pyro_vae.traces.trying import MISFITS, Given, without_handlers

_SAMPLES = 2


def mask_alike(guide_trace: poutine.Trace, model_trace: poutine.Trace, names: list[str]) -> None:
    """Mask the guide's sites where the model's are: what is not there has no density in either program.

    Elsewhere the guide's density is that of what was drawn, whether the guide masks it or not.
    """
    for name in names:
        guide_trace.nodes[name]["mask"] = model_trace.nodes[name]["mask"]


def check_masked(model: Program, *batch: Any) -> bool:
    """Whether the model masks some of its latent sites.

    Raises:
        ValueError: If another site depends on one where that is masked, which is to say not there.
    """
    devices = [batch[0].device] if batch[0].device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(without_handlers())
        try:
            values, there, expected = _masked(model, batch, {})
            for dims in ((0,), (1,), (0, 1)) if there else ():
                moved = {
                    name: torch.where(mask, values[name], values[name].roll([1] * len(dims), dims))
                    for name, mask in there.items()
                }
                _, _, found = _masked(model, batch, values | moved)
                dependent = [name for name in expected if not _agree(found[name], expected[name])]
                if dependent:
                    break
            else:
                return bool(there)
        except MISFITS:  # said in its own words where the program is used
            return False
    raise ValueError(
        f"the model masks {', '.join(map(repr, there))}, so that it is not there, but {dependent[0]!r} "
        "depends on it where it is masked: p(x, z) is no density, and there is no log p(x). Mask what "
        "depends on it as well, or sample it without a mask"
    )


def _masked(
    model: Program, batch: tuple[Any, ...], values: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Values of latent sites, where those that are masked are there, and what all sites are scored."""
    torch.manual_seed(0)
    trace = trace_of(model, batch, _SAMPLES, Given(values, batch[0].device))
    found, there, scored = {}, {}, {}
    for name, site in sample_sites(trace):
        scored[name] = sum_sites([(trace, name)], _SAMPLES)
        if site["is_observed"]:
            continue
        shape = scored[name].shape
        found[name] = site["value"].expand(*shape, *site["fn"].event_shape)
        if site["mask"] is not None:
            mask = torch.as_tensor(site["mask"], device=batch[0].device).expand(shape)
            there[name] = mask.reshape(*shape, *(1,) * site["fn"].event_dim)
    return found, there, scored


def _agree(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
