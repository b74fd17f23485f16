"""Traces of one program: its sites, their sums, and sums over those that are enumerated."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import opt_einsum
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.ops.packed import pack
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.distributions import SupportError, base_distribution

Program = Callable[..., object]
ENUMERATION_DIM = -3  # left of the data and the samples


@contextlib.contextmanager
def shapes_in_words(tracer: Any) -> Iterator[None]:
    """Reword errors about shapes and plates that arise while a program is traced."""
    try:
        yield
    except NotImplementedError as error:
        if "ImproperUniform" in str(error):  # Pyro 1.9, where it is drawn
            raise ValueError(f"the prior of a site is flat: {_FLAT}") from None
        if "total count" in str(error):  # as of a Binomial whose number of trials differs between data
            raise ValueError(
                f"a discrete site cannot be summed out ({error}): use importance_sampling with a guide that "
                "samples it"
            ) from None
        raise
    except (IndexError, RuntimeError):  # perhaps from shapes of a site that the program does not expect
        check_plates(tracer.trace, [name for name, _ in sample_sites(tracer.trace)])
        raise
    except ValueError as error:
        # Pyro 1.9 has no types for these, and no word of the way out.
        message = str(error)
        if collision := re.search(r'plates "(.*)" and "(.*)", collide', message):
            names = sorted(set(collision.groups()) - {"samples"})
            raise ValueError(
                f"the plate {' or '.join(map(repr, names))} of the program is at dim=-2, which is kept for "
                f"samples: the only plate must be 'data', at dim=-1. {_WAY_OUT}"
            ) from None
        if "inside plate" in message:
            check_plates(tracer.trace, [name for name, _ in sample_sites(tracer.trace)])
        if "subsample_size does not match" in message:
            raise ValueError(f"{SUBSAMPLED} ({message.splitlines()[0]})") from None
        raise


_FLAT = (
    "nothing can be drawn from it, and log p(x) is not defined. An autoencoder does not say which codes are "
    "likely; to draw from it, fit a density to its codes (latents.fitted_normal, fitted_box, fitted_mixture)"
)
_WAY_OUT = (
    "What every datum has of its own is sampled in the plate 'data', several numbers by to_event; what all "
    "data share is a parameter (pyro.param), or given to the program"
)
SUBSAMPLED = (
    "a plate of the program draws some of the data that it is given, and log p(x) is wanted of all: leave "
    "out its subsample_size, or let it be the number of rows that the program is given"
)


class MasksOutside(Messenger):
    """Handler that moves a mask from the distribution of a latent site to the site, as ``poutine.mask``."""

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        fn = msg["fn"]
        while isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask  # where Pyro keeps it, as of 1.9.2
            fn, msg["mask"] = fn.base_dist, mask if msg["mask"] is None else mask & msg["mask"]
        msg["fn"] = fn
        while hasattr(fn, "base_dist") and isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
            if isinstance(fn, dist.MaskedDistribution):
                raise ValueError(
                    f"some numbers of the latent site {msg['name']!r} are masked by its distribution, inside "
                    "of to_event: sample them by a site of their own, in poutine.mask"
                )


class RowsAsGiven(Messenger):
    """Handler by which a plate whose ``subsample_size`` is the rows given takes any number of them."""

    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.batch = batch

    def _pyro_sample(self, msg: dict) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None or not self.batch:
            return
        size, rows = msg["fn"].size, msg["fn"].subsample_size
        if rows is not None and rows > size and rows == len(self.batch[0]):
            msg["value"] = torch.arange(rows, device=msg["fn"].device) % size


def check_plates(trace: poutine.Trace, names: Sequence[str], count: int | None = None) -> None:
    """Raise ``ValueError`` if one of these sites is not in the plate of data alone, with ``count`` data."""
    for name in names:
        frames = [f for f in trace.nodes[name]["cond_indep_stack"] if f.name != "samples"]
        if [(f.name, f.dim) for f in frames] != [("data", -1)]:
            found = ", ".join(f"{f.name!r}" + f" at dim={f.dim}" * f.vectorized for f in frames)
            raise ValueError(
                f"site {name!r} must lie in the plate 'data' at dim=-1 and in no other plate, but it lies in "
                f"{found or 'none'}: log p(x) of a datum needs data that are independent given the "
                f"parameters. {_WAY_OUT}"
            )
        if count not in (None, frames[0].size):
            raise ValueError(f"{SUBSAMPLED}: of {count} it took {frames[0].size}")


def sample_sites(trace: poutine.Trace) -> list[tuple[str, dict]]:
    """Return names and sites of all that is sampled or observed."""
    sites = [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]
    return [(n, s) for n, s in sites if not (site_is_subsample(s) or s["infer"].get("_deterministic"))]


def latent_names(trace: poutine.Trace) -> list[str]:
    """Return the names of the sites that are not observed."""
    return [name for name, site in sample_sites(trace) if not site["is_observed"]]


def check_proper(trace: poutine.Trace) -> None:
    """Raise ``ValueError`` if a latent site has a flat prior, which has no draws and makes no p(x)."""
    for name, site in sample_sites(trace):
        if isinstance(base_distribution(site["fn"]), dist.ImproperUniform):
            raise ValueError(f"the prior of the model's site {name!r} is flat: {_FLAT}")


def sample_count(latents: dict[str, Tensor], batch: tuple[Tensor, ...]) -> int:
    """Return the number of samples of all latents; raise ``ValueError`` if their shapes do not fit."""
    shapes = {name: tuple(value.shape[:2]) for name, value in latents.items()}
    num_samples = next(iter(shapes.values()), (1,))[0]
    if latents and set(shapes.values()) != {(num_samples, len(batch[0]))}:
        raise ValueError(
            f"latents must have shape (samples, {len(batch[0])} data, ...), the same for all; their first "
            f"two axes are {shapes}"
        )
    return num_samples


def conditioned(latents: dict[str, Tensor]) -> Callable[[Program], Program]:
    """Return a handler that gives sites these values, and enumerates the discrete ones that have none."""
    return lambda program: enumerated(poutine.condition(program, data=latents))


def enumerated(program: Program) -> Program:
    """Give every discrete latent site all of its values, on an axis of its own to the left."""
    return poutine.enum(config_enumerate(program, "parallel"), first_available_dim=ENUMERATION_DIM)


def is_enumerated(site: dict) -> bool:
    """Return whether the site holds all of its values, on an axis of its own."""
    return site["infer"].get("_enumerate_dim") is not None


def check_known(trace: poutine.Trace, latents: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless every latent site has a value or is summed over."""
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


def _log_prob(name: str, site: dict) -> Tensor:
    try:
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        if "within the support" not in str(error):  # the words of torch 2
            raise
        raise SupportError(
            f"site {name!r} holds numbers, such as nan, that are outside of the support of its "
            f"{type(site['fn']).__name__}, {site['fn'].support}. Where data are masked, fill in any that are "
            "inside"
        ) from error


_Sites = Sequence[tuple[poutine.Trace, str]]


def sum_sites(sites: _Sites, num_samples: int, minus: _Sites = ()) -> Float[Tensor, "samples batch"]:
    r"""Sum the log-densities of sites, :math:`\log \sum_y \prod p` over those that are enumerated."""
    terms: list[Tensor] = []
    for trace, name in (*sites, *minus):
        site = trace.nodes[name]
        check_plates(trace, [name])
        data = next(frame for frame in site["cond_indep_stack"] if frame.name == "data")
        log_prob = site["infer"].get("_log_prob")  # more exact than from the value
        if log_prob is None:
            log_prob = _log_prob(name, site)
        try:
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
        except RuntimeError as error:
            raise ValueError(
                f"site {name!r} is masked by shape {tuple(site['mask'].shape)}, but its log-density of shape "
                f"{tuple(log_prob.shape)} is one number a datum: mask the numbers of a datum before "
                "to_event, dist.Normal(...).mask(mask).to_event(1)"
            ) from error
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
