"""Traces of one program: its sites, what they add up to, and sums over those that are enumerated."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import opt_einsum
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from pyro.ops.packed import pack
from torch import Tensor, nn

from pyro_vae.distributions import base_distribution

Program = Callable[..., object]
ENUMERATION_DIM = -3  # left of the data and the samples


_in_the_store = contextvars.ContextVar("in_the_store", default=False)


@contextlib.contextmanager
def parameters_in_the_store() -> Iterator[None]:
    """Parameters are looked for in Pyro's store here, as ``pyro.infer.SVI`` expects of an objective."""
    token = _in_the_store.set(True)
    try:
        yield
    finally:
        _in_the_store.reset(token)


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


def trace_of(program: Program, batch: tuple[Tensor, ...], num_samples: int) -> poutine.Trace:
    """A trace of the program with everything drawn ``num_samples`` times."""
    local = contextlib.nullcontext() if _in_the_store.get() else local_parameters(_module_of(program))
    with local, pyro.plate("samples", num_samples, dim=-2):
        return poutine.trace(program).get_trace(*batch)


def _module_of(program: Program) -> Program:
    """What is inside of Pyro's handlers, which are partial applications."""
    while isinstance(program, functools.partial):
        program = program.args[-1] if program.args else program.func
    return program


def sample_sites(trace: poutine.Trace) -> list[tuple[str, dict]]:
    """Names and sites of what is sampled or observed."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not poutine.util.site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    ]


def latent_names(trace: poutine.Trace) -> list[str]:
    """Names of the sites that are not observed."""
    return [name for name, site in sample_sites(trace) if not site["is_observed"]]


def check_proper(trace: poutine.Trace) -> None:
    """Raise ``ValueError`` if a latent site has a flat prior, which has no draws and makes no p(x)."""
    for name, site in sample_sites(trace):
        if isinstance(base_distribution(site["fn"]), dist.ImproperUniform):
            raise ValueError(
                f"the prior of the model's site {name!r} is flat: nothing can be drawn from it, and log p(x) "
                "is not defined. An autoencoder does not say which codes are likely; to draw from it, fit a "
                "density to its codes (latents.fitted_normal, fitted_box, fitted_mixture)"
            )


def sample_count(latents: dict[str, Tensor], batch: tuple[Tensor, ...]) -> int:
    """The number of samples that all latents have; raises ``ValueError`` if their shapes do not fit."""
    shapes = {name: tuple(value.shape[:2]) for name, value in latents.items()}
    num_samples = next(iter(shapes.values()), (1,))[0]
    if latents and set(shapes.values()) != {(num_samples, len(batch[0]))}:
        raise ValueError(
            f"latents must have shape (samples, {len(batch[0])} data, ...), the same for all; their first "
            f"two axes are {shapes}"
        )
    return num_samples


def enumerated(program: Program) -> Program:
    """Every discrete latent site takes all of its values, on an axis of its own to the left."""
    return poutine.enum(config_enumerate(program, "parallel"), first_available_dim=ENUMERATION_DIM)


def is_enumerated(site: dict) -> bool:
    """Whether the site holds all of its values, on an axis of its own."""
    return site["infer"].get("_enumerate_dim") is not None


def check_known(trace: poutine.Trace, latents: dict[str, Tensor]) -> None:
    """Every latent site must have a value, or be summed over."""
    for name, site in sample_sites(trace):
        if name not in latents and not site["is_observed"] and not is_enumerated(site):
            discrete = (
                f": it is discrete, but a {type(site['fn']).__name__} cannot be enumerated. Make it several "
                "sites without to_event, or use importance_sampling with a guide that samples it"
            )
            raise ValueError(
                f"latents has no value for the model's site {name!r}"
                + discrete * site["fn"].support.is_discrete
            )


_Sites = Sequence[tuple[poutine.Trace, str]]


def sum_sites(sites: _Sites, num_samples: int, minus: _Sites = ()) -> Float[Tensor, "samples batch"]:
    r"""Sum of the log-densities of sites, :math:`\log \sum_y \prod p` over those that are enumerated."""
    terms: list[Tensor] = []
    for trace, name in (*sites, *minus):
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
        log_prob = scale_and_mask(log_prob, mask=site["mask"])
        if is_enumerated(site) and site["mask"] is not None:
            # Where it is masked the site is not there: its values must sum to 1, not to their number.
            count = site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim]
            mask = torch.as_tensor(site["mask"], device=log_prob.device)
            log_prob = torch.where(mask, log_prob, -math.log(count))
        terms.append(log_prob if len(terms) < len(sites) else -log_prob)
    if not terms:
        raise ValueError("the program has no latent or no observed site; both are needed")
    if max(term.dim() for term in terms) <= 2:  # nothing is enumerated
        return sum(term.expand(num_samples, data.size) for term in terms)
    symbols: dict[str, str] = {}
    for trace in {id(trace): trace for trace, _ in (*sites, *minus)}.values():
        trace.symbolize_dims(symbols)
    packed = [
        pack(term, trace.nodes[name]["infer"]["_dim_to_symbol"])
        for term, (trace, name) in zip(terms, (*sites, *minus), strict=True)
    ]
    inputs = [term._pyro_dims for term in packed]
    output = "".join(symbols[plate] for plate in ("samples", "data") if symbols[plate] in "".join(inputs))
    equation = f"{','.join(inputs)}->{output}"
    total = opt_einsum.contract(equation, *packed, backend="pyro.ops.einsum.torch_log")
    shape = [
        size if symbols[plate] in output else 1
        for plate, size in (("samples", num_samples), ("data", data.size))
    ]
    return total.reshape(shape).expand(num_samples, data.size)
