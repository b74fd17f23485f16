"""Masked sites: a latent that is masked is not there, and nothing may depend on it."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import Program, sample_sites, sum_sites
from pyro_vae.traces.trying import MISFITS, Given, on_trial

_SAMPLES = 2


def check_masked(model: Program, *batch: Any) -> bool:
    """Return whether the model masks some of its latent sites.

    Raises:
        ValueError: If another site depends on one where that is masked, which is to say not there.
    """
    with on_trial(batch):
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
    """Return values of latent sites, masks of those that have one, and log-densities of all sites."""
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
