"""Whether a guide can draw all that a model can: what it leaves out no weight tells of."""

import contextlib

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.blocks import evaluation
from pyro_vae.traces import Program
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import latent_names, sample_sites

_SAMPLES = 100


def left_out(model: Program, guide: Program, *batch: Tensor) -> list[str]:
    """A note, if there are draws from the model outside of the guide's support; for a few data."""
    few, names = tuple(argument[:3] for argument in batch), []
    with torch.random.fork_rng(), evaluation(model, guide), pyro.validation_enabled(False):
        drawn = trace_of(model, few, _SAMPLES)
        latents = {name: drawn.nodes[name]["value"] for name in latent_names(drawn)}
        trace = trace_of(guide, few, _SAMPLES, lambda program: poutine.condition(program, data=latents))
        for name, site in sample_sites(trace):
            with contextlib.suppress(NotImplementedError, AttributeError):  # no support is known
                if name in latents and not bool(site["fn"].support.check(latents[name]).all()):
                    names.append(repr(name))
    return [
        f"the guide draws {' and '.join(names)} from a part of the model's support only: what lies outside "
        "of it is missing in every value, and no error tells of it; give a guide with the model's support"
    ] * bool(names)
