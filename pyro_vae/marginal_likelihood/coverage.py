"""Whether a guide can draw all that a model can: what it leaves out no weight tells of."""

import contextlib

from pyro import poutine
from torch import Tensor

from pyro_vae.traces import Program
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import latent_names, sample_sites

_DRAWS = 100


def left_out(guide: Program, drawn: poutine.Trace, *batch: Tensor) -> list[str]:
    """A note, if draws from the sites of the model's trace lie outside of the guide's support."""
    sites = {name: drawn.nodes[name] for name in latent_names(drawn)}
    latents = {name: site["value"] for name, site in sites.items()}
    trace = trace_of(guide, batch, 1, lambda program: poutine.condition(program, data=latents))
    names = []
    for name, site in sample_sites(trace):
        with contextlib.suppress(NotImplementedError, AttributeError):  # no support is known
            if name in sites and not site["fn"].support.check(sites[name]["fn"].sample((_DRAWS,))).all():
                names.append(repr(name))
    return [
        f"the guide draws {' and '.join(names)} from a part of the model's support only: what lies outside "
        "of it is missing in every value, and no error tells of it; give a guide with the model's support"
    ] * bool(names)
