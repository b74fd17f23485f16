"""Choice of the right way to run a program: tried on a few data, before anything is estimated."""

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

from pyro_vae.compiled import Survey
from pyro_vae.distributions import QuantizedPoint, base_distribution, is_point_mass
from pyro_vae.traces.folding import Batch, folded_trace
from pyro_vae.traces.sites import MasksOutside, Program, RowsAsGiven, sample_sites, shapes_in_words, sum_sites
from pyro_vae.traces.unmoved import unmoved

_SAMPLES, _FEWEST, _MOST = 2, 3, 6
_LOOKED_AT = 1_000  # data from which those are chosen
# Errors of programs that meet shapes they were not made for. Others, such as an interruption, go on.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def fits(program: Program, batch: Batch) -> bool:
    """Return whether a plate of samples gives the values of one sample after the other.

    Raises:
        ValueError: If values depend on the other rows of the batch, or the program does not take batches of
            another size.
    """
    index = _rows_to_try(batch)
    few = tuple(a[index] if isinstance(a, Tensor) and len(a) == len(batch[0]) else a for a in batch)
    with on_trial(batch), unmoved(program):
        try:
            singly = [_run(program, few, seed) for seed in range(_SAMPLES)]
        except MISFITS:  # said in its own words where the program is used
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
        except MISFITS:
            in_a_plate = {}
        try:
            together = found(folded_trace)
        except MISFITS as error:
            if "intermediates cache" in str(error):
                return True  # a flow of Pyro's without an inverse, which cannot score what it has not drawn
            if _agree(in_a_plate, expected):
                return True  # made for one number of data
            culprit = _first_that_differs(program, few, values)
            raise ValueError(
                f"{culprit} takes batches of one size only, and fails for {_SAMPLES * len(index)} rows "
                f"({str(error).strip().splitlines()[0][:200]}): let it take any number of data"
            ) from error
        if not _agree(found(folded_trace), together):
            raise ValueError(
                f"{_first_that_differs(program, few, values)} gives other values when it is run again on the "
                "same data with the same random numbers: it keeps something that moves in evaluation mode as "
                "well, such as a running mean, or draws from elsewhere than torch. Let it move in training "
                "mode only (if self.training)"
            )
        rows = range(-len(few[0]), 0)
        dependent = [row for row in rows if not _is_by_itself(program, few, values, together, row)]
        if not dependent:
            if _agree(together, expected):
                return _agree(in_a_plate, expected)
            # Rounding hangs on the size of a batch, and what is badly conditioned makes it large; or the
            # program draws random numbers in its networks. It does not hang on what other rows are.
            if _agree(together, expected, leniency=100.0) or not _agree(found(folded_trace, 1), together):
                return _agree(in_a_plate, together)
        culprit = _first_that_differs(program, few, values, *dependent[:1])
        raise ValueError(
            f"what {culprit} makes of a datum depends on the other rows of its batch, also in evaluation "
            "mode (as softmax or a mean over dim=0, or batch normalisation without running statistics, do): "
            "no datum has a density of its own then, and no log p(x). Let each row depend on itself alone"
        )


def _rows_to_try(batch: Batch) -> Tensor:
    """Choose a few data, among them those of every argument that stand out: they may change the others."""
    count = len(batch[0])
    looked_at = torch.linspace(0, count - 1, min(count, _LOOKED_AT), device=batch[0].device).long()
    rows = [0]
    for argument in batch:
        if isinstance(argument, Tensor) and len(argument) == count and argument.numel():
            flat = argument[looked_at].detach().reshape(len(looked_at), -1).double().nan_to_num(0.0)
            direction = torch.arange(1.0, 1.0 + flat.shape[-1], dtype=flat.dtype, device=flat.device).sin()
            for score in flat.amax(1), flat @ direction:
                rows += looked_at[[int(score.argmax()), int(score.argmin())]].tolist()
    rows = list(dict.fromkeys(rows))[:_MOST]
    rows += [row % count for row in range(1, 1 + _FEWEST - len(rows))]
    return torch.tensor(rows, device=batch[0].device)


def _is_by_itself(
    program: Program, few: Batch, values: dict[str, Tensor], together: dict[str, Tensor], row: int
) -> bool:
    """Return whether a datum has the density that it has in a batch, as large, of copies of itself."""
    among = _run(program, _copies(few, row), 0, _of_one_datum(values, row))
    of_row = {name: scored[:, row] for name, (_, scored) in among.items()}
    return _agree(of_row, {name: scored[:, row] for name, scored in together.items()})


@contextlib.contextmanager
def on_trial(batch: Batch) -> Iterator[None]:
    """Run programs here unnoticed: by random generators, gradients, validation, and the handlers around."""
    devices = [batch[0].device] if batch[0].device.type == "cuda" else []
    around = list(_PYRO_STACK)  # Pyro's own list, as of 1.9.2
    with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(False):
        _PYRO_STACK.clear()
        try:
            yield
        finally:
            _PYRO_STACK[:] = around


def trace_in_a_plate(
    program: Program, batch: Batch, num_samples: int, around: Callable[[Program], Program]
) -> poutine.Trace:
    """Trace the program in a plate of samples."""
    tracer = poutine.trace(around(MasksOutside()(program)))
    with shapes_in_words(tracer), RowsAsGiven(batch), pyro.plate("samples", num_samples, dim=-2):
        return tracer.get_trace(*batch)


def _run(
    program: Program,
    batch: Batch,
    seed: int,
    values: dict[str, Tensor] | None = None,
    way: Callable[..., poutine.Trace] = folded_trace,
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Return value (if latent) and log-density of every site, (samples, data, ...); none if one is global.

    A site that has all of its mass at one point has the point in place of the density.
    """
    num_samples = 1 if values is None else _SAMPLES
    _seed(seed, batch[0].device)
    given = values or {}
    trace = way(program, batch, num_samples, Given(given, batch[0].device))
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


class Given(Messenger):
    """Handler that gives latent sites these values, or has them drawn; those of flat priors from a normal."""

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
    """Return whether all are the same but for rounding, of the coarsest of them (data may be finer)."""
    floating = [value.dtype for value in expected.values() if value.is_floating_point()]
    coarsest = max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)
    return found.keys() == expected.keys() and all(
        _close(found[name], expected[name], leniency, coarsest) for name in expected
    )


def _close(
    found: Tensor, expected: Tensor, leniency: float = 1.0, precision: torch.dtype | None = None
) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 200 * leniency * torch.finfo(precision or expected.dtype).eps
    return torch.allclose(found, expected, rtol=tolerance, atol=10 * tolerance, equal_nan=True)


def _first_that_differs(program: Program, batch: Batch, values: dict[str, Tensor], row: int = -1) -> str:
    """Name the innermost network whose output for a row differs in another batch."""
    names: dict[int, str] = {}
    for root in Survey((program,)).modules:
        for name, module in root.named_modules():
            names[id(module)] = max(name, names.get(id(module), ""), key=len)
    calls: list[tuple[nn.Module, list[Any]]] = []

    def note(module: nn.Module, inputs: tuple, out: Any) -> None:
        calls.append((module, [out, *inputs]))

    last = {name: value[-1:] for name, value in values.items()}
    runs = []
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        for rows, given in (batch, last), (batch, values), (_copies(batch, row), _of_one_datum(last, row)):
            _seed(0, batch[0].device)
            num_samples = len(next(iter(given.values()))) if given else 1
            with contextlib.suppress(*MISFITS):
                folded_trace(program, rows, num_samples, Given(given, batch[0].device))
            runs.append(list(calls))
            calls.clear()
    finally:
        hook.remove()
    alone, *others = runs
    for number, (module, tensors) in enumerate(alone):
        for other in others:
            if number >= len(other) or _differs(tensors, other[number][1], len(batch[0]), row):
                return f"network {names.get(id(module), '')!r} ({type(module).__name__})"
    return "the program itself"


def _differs(few: list[Any], many: list[Any], count: int, row: int) -> bool:
    """Return whether a row of an output, counted from the end, differs while that of the inputs does not."""
    same = [
        one.shape[1:] == other.shape[1:] and _close(other[row], one[row])
        for one, other in zip(few, many, strict=False)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape[:1] == (count,)
    ]
    return bool(same) and not same[0] and all(same[1:])


def _copies(batch: Batch, row: int) -> Batch:
    """Fill a batch with copies of one of its data."""
    count = len(batch[0])
    return tuple(a[[row] * count] if isinstance(a, Tensor) and len(a) == count else a for a in batch)


def _of_one_datum(values: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[:, [row] * value.shape[1]] for name, value in values.items()}
