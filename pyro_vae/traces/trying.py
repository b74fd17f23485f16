"""Which way of running a program is right: tried on a few data, before anything is estimated."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.compiled.survey import Survey
from pyro_vae.distributions import QuantizedPoint, base_distribution, is_point_mass
from pyro_vae.traces.folding import Batch, folded_trace
from pyro_vae.traces.sites import Program, RowsAsGiven, sample_sites, shapes_in_words, sum_sites
from pyro_vae.traces.unmoved import unmoved

_SAMPLES, _DATA = 2, 3
# What programs raise for shapes that they were not made for. Others, such as an interruption, go on.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def fits(program: Program, batch: Batch) -> bool:
    """Whether a plate of samples gives what the program gives for one sample after the other.

    Raises:
        ValueError: If values depend on the other rows of the batch, or the program does not take batches of
            another size.
    """
    index = torch.arange(_DATA, device=batch[0].device) % len(batch[0])
    few = tuple(a[index] if isinstance(a, Tensor) and len(a) == len(batch[0]) else a for a in batch)
    devices = [batch[0].device] if batch[0].device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(unmoved(program))
        stack.enter_context(_without_handlers())
        try:
            singly = [_run(program, few, seed) for seed in range(_SAMPLES)]
        except _MISFITS:  # said in its own words where the program is used
            return True
        if not all(singly):
            return True
        latent = [name for name, (value, _) in singly[0].items() if value is not None]
        values = {name: torch.cat([one[name][0] for one in singly]) for name in latent}
        expected = {name: torch.cat([one[name][1] for one in singly]) for name in singly[0]}

        def found(way: Callable, seed: int = 0) -> dict[str, Tensor]:
            return {name: scored for name, (_, scored) in _run(program, few, seed, values, way).items()}

        try:
            in_a_plate = found(trace_in_a_plate)
        except _MISFITS:
            in_a_plate = {}
        try:
            together = found(folded_trace)
        except _MISFITS as error:
            if "intermediates cache" in str(error):
                return True  # a flow of Pyro's without an inverse, which cannot score what it has not drawn
            if _agree(in_a_plate, expected):
                return True  # made for one number of data
            culprit = _first_that_differs(program, few, values)
            raise ValueError(
                f"{culprit} takes batches of one size only, and fails for {_SAMPLES * _DATA} rows "
                f"({str(error).strip().splitlines()[0][:200]}): let it take any number of data"
            ) from error
        # Copies of the same data in one batch do not tell what depends on their mean: the last among others.
        among = _run(program, _same_rows(few, values)[0], 0, _of_one_datum(values))
        last, last_among, last_together = (
            {name: scored[:, -1] for name, scored in each.items()}
            for each in (expected, {name: scored for name, (_, scored) in among.items()}, together)
        )
        if _agree(together, expected) and _agree(last_among, last):
            return _agree(in_a_plate, expected)
        # Rounding hangs on the size of a batch, and what is badly conditioned makes it large. It does not
        # hang on what other rows are.
        if _agree(last_among, last_together) and _agree(together, expected, leniency=100.0):
            return _agree(in_a_plate, together)
        if not _agree(found(folded_trace, 1), together):
            return _agree(in_a_plate, together)  # it draws random numbers in its networks
        raise ValueError(
            f"what {_first_that_differs(program, few, values)} makes of a datum depends on the other rows of "
            "its batch, also in evaluation mode (as softmax or a mean over dim=0, or batch normalisation "
            "without running statistics, do): no datum has a density of its own then, and no log p(x). Let "
            "each row depend on itself alone"
        )


@contextlib.contextmanager
def _without_handlers() -> Iterator[None]:
    """Handlers that are active around, such as one that gives latents values, do not see what is tried."""
    around = list(_PYRO_STACK)  # Pyro's own list, as of 1.9.2
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = around


def trace_in_a_plate(
    program: Program, batch: Batch, num_samples: int, around: Callable[[Program], Program]
) -> poutine.Trace:
    """A trace of the program in a plate of samples."""
    tracer = poutine.trace(around(program))
    with shapes_in_words(tracer), RowsAsGiven(batch), pyro.plate("samples", num_samples, dim=-2):
        return tracer.get_trace(*batch)


def _run(
    program: Program,
    batch: Batch,
    seed: int,
    values: dict[str, Tensor] | None = None,
    way: Callable[..., poutine.Trace] = folded_trace,
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Value (if latent) and log-density of every site, (samples, data, ...); none if one is global.

    Of a site that has all of its mass at one point, the point is given in place of the density.
    """
    num_samples = 1 if values is None else _SAMPLES
    _seed(seed, batch[0].device)
    given = values or {}
    trace = way(program, batch, num_samples, _Given(given, batch[0].device))
    found = {}
    for name, site in sample_sites(trace):
        if {frame.name for frame in site["cond_indep_stack"] if frame.vectorized} != {"samples", "data"}:
            if site["is_observed"]:
                continue
            return {}
        shape = (num_samples, len(batch[0]), *site["fn"].event_shape)
        value = None if site["is_observed"] else site["value"].expand(shape)
        if is_point_mass(site["fn"]) or isinstance(base_distribution(site["fn"]), QuantizedPoint):
            scored = site["fn"].mean.expand(shape)  # where it is, for rounding makes its density 0
        else:
            scored = sum_sites([(trace, name)], num_samples)
        found[name] = value, scored
    return found


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack for every GPU: 3 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Given(Messenger):
    """Latent sites have these values, or are drawn; those of flat priors from a normal."""

    def __init__(self, values: dict[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.values, self.device = values, device

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        elif isinstance(base_distribution(msg["fn"]), dist.ImproperUniform):
            msg["value"] = torch.randn(msg["fn"].shape(), device=self.device)


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor], leniency: float = 1.0) -> bool:
    """Whether they are the same but for rounding, nats."""
    return found.keys() == expected.keys() and all(
        _close(found[name], expected[name], leniency) for name in expected
    )


def _close(found: Tensor, expected: Tensor, leniency: float = 1.0) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 200 * leniency * torch.finfo(expected.dtype).eps
    return torch.allclose(found, expected, rtol=tolerance, atol=10 * tolerance, equal_nan=True)


def _first_that_differs(program: Program, batch: Batch, values: dict[str, Tensor]) -> str:
    """In words, the innermost network that makes other rows of the same rows in a larger batch."""
    names: dict[int, str] = {}
    for root in Survey((program,)).modules:
        for name, module in root.named_modules():
            names[id(module)] = max(name, names.get(id(module), ""), key=len)
    calls: list[tuple[nn.Module, list[Any]]] = []

    def note(module: nn.Module, inputs: tuple, out: Any) -> None:
        calls.append((module, [out, *inputs]))

    same, last = _same_rows(batch, values)
    runs = []
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        for rows, given in (batch, last), (batch, values), (same, _of_one_datum(last)):
            _seed(0, batch[0].device)
            num_samples = len(next(iter(given.values()))) if given else 1
            with contextlib.suppress(*_MISFITS):
                folded_trace(program, rows, num_samples, _Given(given, batch[0].device))
            runs.append(list(calls))
            calls.clear()
    finally:
        hook.remove()
    alone, *others = runs
    for number, (module, tensors) in enumerate(alone):
        for other in others:
            if number >= len(other) or _differs(tensors, other[number][1]):
                return f"network {names.get(id(module), '')!r} ({type(module).__name__})"
    return "the program itself"


def _differs(few: list[Any], many: list[Any]) -> bool:
    """Whether the last row of an output differs while that of the inputs does not."""
    same = [
        one.shape[1:] == other.shape[1:] and _close(other[-1:], one[-1:])
        for one, other in zip(few, many, strict=False)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape[:1] == (_DATA,)
    ]
    return bool(same) and not same[0] and all(same[1:])


def _same_rows(batch: Batch, values: dict[str, Tensor]) -> tuple[Batch, dict[str, Tensor]]:
    """A batch that holds its last datum only, as often; and of latents the last sample."""
    index = [-1] * _DATA
    same = tuple(a[index] if isinstance(a, Tensor) and len(a) == _DATA else a for a in batch)
    return same, {name: value[-1:] for name, value in values.items()}


def _of_one_datum(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:, [-1] * _DATA] for name, value in values.items()}
