r"""What every estimator of :math:`\log p(x)` returns, and how results are told apart, kept and compared.

Two errors, never merged: the Monte Carlo error, which more samples make smaller, and the error of having seen
these test data and no others. And a third, which no error bar shows: the side on which an estimate is wrong.
The logarithm of an unbiased estimate of p(x) is too low in the mean, the negative logarithm of one of 1 /
p(x) too high, by half the Monte Carlo variance while that is small.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae import records
from pyro_vae.arguments import checked
from pyro_vae.distributions import scores_cross_entropy
from pyro_vae.errors import UserError
from pyro_vae.files import locked
from pyro_vae.marginal_likelihood.coverage import left_out
from pyro_vae.mcmc import diagnostics as stats
from pyro_vae.traces import Program
from pyro_vae.traces.blocks import Batch, Columns, behaviour_of, checksum, programs_checksum
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import sample_sites

_BOUNDS = {
    "lower": "a lower bound in expectation",
    "upper": "an upper bound in expectation, if the draws are from the posterior",
    "exact": "exact but for the stated error",
}
SIMULATED = "simulated"  # in place of a checksum of data
_ERROR_OF = {"quadrature": "quadrature"}  # what std_error is, where not of Monte Carlo


class Doubt(NamedTuple):
    """Why the mean of an estimate may be wrong by an unknown amount.

    Attributes:
        may_be_low: It may be too low.
        may_be_high: It may be too high.
        words: What says so.
    """

    may_be_low: bool
    may_be_high: bool
    words: str


class EstimatesError(UserError, ValueError):
    """Estimates that cannot be read, or not be compared."""


@dataclasses.dataclass(frozen=True)
class LogMarginal:
    r"""Estimates of :math:`\log p(x)` for every datum.

    Attributes:
        values: Estimates, nats.
        std_error: Their Monte Carlo standard errors, nats; of quadrature its estimated error; nan for a
            single sample.
        method: How they were estimated: the name of the function.
        bound: ``"lower"``, ``"upper"`` (both in expectation) or ``"exact"``.
        settings: With what: sample sizes, what the data are, what was scored.
        diagnostics: Other numbers of every datum, by name; what they are is said by the estimator.
        curve: The importance-weighted bound of every datum by number of samples.
    """

    values: Float[Tensor, " batch"]
    std_error: Float[Tensor, " batch"]
    method: str
    bound: str
    settings: dict[str, Any]
    diagnostics: dict[str, Float[Tensor, " batch"]] = dataclasses.field(default_factory=dict)
    curve: dict[int, Float[Tensor, " batch"]] = dataclasses.field(default_factory=dict)

    @property
    def khat(self) -> Float[Tensor, " batch"] | None:
        """Pareto k-hat of the weights' tail; None where the method has none, or fewer than 30 weights."""
        return self.diagnostics.get("khat")

    @property
    def ess(self) -> Float[Tensor, " batch"] | None:
        """Effective number of samples; None where the method has none."""
        return self.diagnostics.get("ess")

    @property
    def upper(self) -> Float[Tensor, " batch"] | None:
        """Upper bounds (in expectation) of every datum, nats; None where the method has none."""
        return self.diagnostics.get("upper")

    @property
    def mean(self) -> float:
        """Mean over data, nats."""
        return self.values.mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of :attr:`mean` from drawing latents: what more samples reduce, nats."""
        return self.std_error.square().sum().sqrt().item() / len(self.values)

    @property
    def data_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate for unseen data, nats; nan for one datum."""
        if len(self.values) < 2:
            return math.nan
        return self.values.std().item() / math.sqrt(len(self.values))

    @property
    def unreliable_share(self) -> float | None:
        """Share of the data whose k-hat is above 0.7."""
        return None if self.khat is None else (self.khat > 0.7).double().mean().item()

    @property
    def unmixed_share(self) -> float | None:
        """Share of the data whose chains disagree (R-hat above 1.01) or never moved; None of one chain."""
        rhat = self.diagnostics.get("rhat")
        if rhat is None or self.settings["num_chains"] == 1:
            return None
        return (~(rhat <= 1.01)).double().mean().item()

    @property
    def size(self) -> tuple[int, float]:
        """Work: the data, and for each of them draws times steps and so on; of quadrature 1 / tolerance."""
        if self.method == "quadrature":
            return len(self.values), 1 / self.settings.get("tolerance", math.inf)
        if "num_samples" in self.diagnostics:  # of importance sampling to a tolerance
            return len(self.values), self.diagnostics["num_samples"].mean().item()
        sizes = [v for name, v in self.settings.items() if name.startswith("num_") and name != "num_data"]
        return len(self.values), float(math.prod(sizes))

    @property
    def doubts(self) -> list[Doubt]:
        """What its diagnostics, or the lack of them, say against it; empty if it can be relied on."""
        if self.is_of_codes:
            return [Doubt(True, False, "the bound of one code a datum, which no draws can raise")]
        low = self.bound == "lower"
        found = []
        if self.unreliable_share:
            share = f"k-hat above 0.7 for {100 * self.unreliable_share:.1f} % of the data"
            found.append(Doubt(low, not low, share))
        elif self.khat is None and self.settings.get("num_samples", math.inf) < stats.MIN_SAMPLES_FOR_KHAT:
            few = f"k-hat is not known with fewer than {stats.MIN_SAMPLES_FOR_KHAT} samples"
            found.append(Doubt(low, not low, few))
        if "rhat" in self.diagnostics and self.unmixed_share != 0:
            share = "R-hat is not known of one chain"
            if self.unmixed_share is not None:
                share = f"R-hat above 1.01 for {100 * self.unmixed_share:.1f} % of the data"
            found.append(Doubt(True, True, share))
        converged = self.diagnostics.get("converged")
        if converged is not None and (missed := (converged == 0).double().mean().item()):
            found.append(Doubt(True, True, f"not converged for {100 * missed:.1f} % of the data"))
        if self.method in ("ais", "bidirectional") and self.ess is not None:
            # The weight of a datum is that of one chain, whose error is not known.
            lone = (~(self.ess >= 2)).double().mean().item()
            if lone:
                words = f"one chain has most of the weight of {100 * lone:.1f} % of the data"
                found.append(Doubt(low, not low, words))
        return found

    @property
    def is_of_codes(self) -> bool:
        """Whether the guide has one code for a datum: the bound of a VQ-VAE, which no draws can raise."""
        return self.settings.get("is_of_codes", False)

    @property
    def gap(self) -> float | None:
        """Mean over data of the upper minus the lower bound, nats; None where the method has no upper one."""
        return None if self.upper is None else (self.upper - self.values).mean().item()

    def summary(self) -> str:
        """The result in words: value, both errors, diagnostics, and what was measured."""
        what = self.settings["scores"]
        error = _ERROR_OF.get(self.method, "Monte Carlo")
        bound = _BOUNDS[self.bound]
        if self.bound == "exact" and (unknown := int(self.std_error.isinf().sum())):
            known = len(self.values) - unknown
            bound = f"not known for {unknown:,} data" + f", for the others {bound}" * (known > 0)
        how = f"{self.method.replace('_', ' ')}, {self.settings['effort']}: {bound}"
        stated = f"{what} = {self.mean:.2f} nats per datum ± {self.monte_carlo_error:.2g} ({error})"
        if self.is_of_codes:
            how = "the bound of the one code that the guide has for a datum: more draws do not raise it"
            stated = f"{what} ≥ {self.mean:.2f} nats per datum"
        lines = [
            f"{stated} ± {self.data_error:.2g} ({len(self.values):,} data)",
            how,
            *_diagnoses(self),
            f"data: {self.settings['data']}",
        ]
        return "\n".join(lines)

    def to_arviz(self) -> Any:
        r"""The values as pointwise log-likelihoods, for ``az.loo`` and ``az.compare``.

        Both take draws :math:`\ell` of a log-likelihood and average :math:`e^{-\ell}`. A trained model has
        one value, with a Monte Carlo error: the draws are its normal quantiles, shifted so that the average
        is the value. So ``elpd_loo`` of a datum is log p(x), and ``p_loo`` tells of nothing but Monte Carlo
        error, of which those that are not known or above 0.5 nats count as 0.5.

        Returns:
            ``arviz.InferenceData`` with the groups ``log_likelihood``
            (variable ``x`` with dimensions ``chain``, ``draw`` and ``datum``) and ``posterior`` (their mean).
        """
        draws = 400
        quantiles = torch.special.ndtri((torch.arange(draws, dtype=torch.float64) + 0.5) / draws)
        spread = self.std_error.double().nan_to_num(0.5).clamp(1e-4, 0.5)
        values = self.values.double() + spread * quantiles[:, None]
        values = values + self.values + (-values).logsumexp(0) - math.log(draws)
        # az.loo estimates how many independent draws these are, so they come in random order.
        order = torch.randperm(draws, generator=torch.Generator().manual_seed(0))
        values = values[order].unsqueeze(0).numpy()
        groups = {"posterior": {"log_marginal": values.mean(-1)}, "log_likelihood": {"x": values}}
        return stats.to_arviz(groups, dims={"x": ["datum"]})

    def save(self, path: Path) -> None:
        """Write JSON; raises ``WriteError`` and keeps what was there if it cannot."""
        save_estimates({self.method: self}, path)

    @classmethod
    def load(cls, path: Path) -> "LogMarginal":
        """Read what :meth:`save` wrote; raises ``EstimatesError`` if it holds several estimates."""
        estimates = load_estimates(path)
        if len(estimates) != 1:
            raise EstimatesError(f"{path} holds {', '.join(estimates)}: read them with load_estimates")
        return next(iter(estimates.values()))


def _diagnoses(result: LogMarginal) -> list[str]:
    """What the diagnostics say, in words."""
    if result.is_of_codes:  # of one weight there is nothing to diagnose
        return result.settings.get("notes", [])
    lines = []
    if result.ess is not None:
        lines.append(f"median effective sample size {result.ess.median().item():.0f}")
    if result.method == "importance_sampling" and result.khat is None:
        lines.append(f"Pareto k-hat needs {stats.MIN_SAMPLES_FOR_KHAT} samples a datum")
    if result.khat is not None:
        side = "low" if result.bound == "lower" else "high"
        lines.append(
            f"Pareto k-hat above 0.7 for {100 * result.unreliable_share:.1f} % of the data"
            + (f", whose values are too {side}, nobody knows by how much" * (result.unreliable_share > 0))
        )
    if (smoothed := result.diagnostics.get("smoothed")) is not None:
        lines.append(f"with Pareto-smoothed weights {smoothed.mean().item():.2f}")
    if result.upper is not None:
        lines.append(f"upper bound {result.upper.mean().item():.2f}: a gap of {result.gap:.2g} nats")
    if (share := result.unmixed_share) is not None:
        largest = result.diagnostics["rhat"].max().item()
        lines.append(f"R-hat above 1.01 for {100 * share:.1f} % of the data, largest {largest:.3f}")
    if (divergences := result.diagnostics.get("divergences")) is not None:
        lines.append(f"{int(divergences.sum())} divergent transitions")
    if (acceptance := result.diagnostics.get("acceptance")) is not None:
        lines.append(f"mean acceptance {acceptance.mean().item():.2f}, least {acceptance.min().item():.2f}")
    lines += result.settings.get("notes", [])
    return lines


# ------------------------------------------------------------------------------------ making


def log_marginal(
    columns: Columns,
    *,
    model: Program,
    batch: Batch,
    method: str,
    bound: str,
    effort: str,
    data: str | None,
    guide: Program | None = None,
    curve: dict[int, Tensor] | None = None,
    notes: Sequence[str] = (),
    **settings: Any,
) -> LogMarginal:
    """The result of an estimator from its columns ``values``, ``std_error`` and diagnostics."""
    columns = dict(columns)
    described = {
        "effort": effort,
        "num_data": len(batch[0]),
        "data": data or "not said (nor how they were binarised)",
        "data_checksum": checksum(*batch),
        "model_checksum": programs_checksum(model),
        **_of_the_programs(model, guide, list(notes), *(argument[:3] for argument in batch)),
        **settings,
    }
    return LogMarginal(
        columns.pop("values"), columns.pop("std_error"), method, bound, described, columns, curve or {}
    )


def _of_the_programs(model: Program, guide: Program | None, notes: list[str], *batch: Tensor) -> dict:
    """What is scored, what tells models apart whose weights are no tensors, and what to keep in mind."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):  # data may be impossible at these latents
        torch.manual_seed(0)
        trace = trace_of(model, batch, 1)
        notes += [] if guide is None else left_out(guide, trace, *batch)
    sites = [site for _, site in sample_sites(trace)]
    is_entropy = any(scores_cross_entropy(site["fn"]) for site in sites)
    scores = "minus the cross-entropy of grey values (not a log-likelihood)" if is_entropy else "log p(x)"
    return {"scores": scores, "model_behaviour": behaviour_of(sites).tolist(), "notes": notes}


# ------------------------------------------------------------------------------------ files

_Numbers = list[float | Literal["nan", "inf", "-inf"]]  # JSON has no such numbers: they are words


@dataclasses.dataclass(frozen=True)
class _Record:
    """An estimate in a file; ``others`` are smaller ones by the same method, of other data."""

    __pydantic_config__ = records.STRICT

    values: _Numbers
    std_error: _Numbers
    method: str
    bound: Literal["lower", "upper", "exact"]
    settings: dict[str, Any]
    diagnostics: dict[str, _Numbers]
    curve: dict[str, _Numbers]
    summary: list[str]
    others: list["_Record"] = dataclasses.field(default_factory=list)
    file_checksum: str | None = None

    def __post_init__(self) -> None:
        for name in ("effort", "data", "data_checksum", "model_checksum", "scores"):
            if not isinstance(self.settings.get(name), str):
                raise ValueError(f"settings.{name} cannot be {self.settings.get(name)!r}")
        columns = {"std_error": self.std_error, **self.diagnostics, **self.curve}
        for name, column in columns.items():
            if len(column) != len(self.values) or not column:
                raise ValueError(f"{name} has {len(column)} numbers of {len(self.values)} data")
        if not all(size.isdecimal() for size in self.curve):
            raise ValueError(f"curve is by numbers of samples, not {sorted(self.curve)}")


@checked
def save_estimates(estimates: Mapping[str, LogMarginal], path: str | Path) -> None:
    """Write estimates by name as JSON; raises ``WriteError`` and keeps what was there if it cannot."""
    _write({name: [estimate] for name, estimate in estimates.items()}, Path(path))


def load_estimates(path: Path) -> dict[str, LogMarginal]:
    """Read what :func:`save_estimates` or :func:`merge_estimates` wrote: of every name that of most data.

    Raises:
        EstimatesError: If there is no such file, or it is damaged.
    """
    return {name: estimates[0] for name, estimates in _read(Path(path)).items()}


def load_estimates_by_data(path: Path) -> dict[str, dict[str, LogMarginal]]:
    """All estimates of a file by their data's checksum, or ``"simulated"``, and name; raises the same."""
    found: dict[str, dict[str, LogMarginal]] = {}
    for name, estimates in _read(Path(path)).items():
        for estimate in estimates:
            found.setdefault(estimate.settings["data_checksum"], {})[name] = estimate
    return found


def merge_estimates(estimates: Mapping[str, LogMarginal], path: Path) -> dict[str, LogMarginal]:
    """Add estimates by name to a file, in which a smaller one never takes the place of a larger one.

    The file keeps, of every method and set of data, the estimate that took the most work
    (:attr:`LogMarginal.size`), the latest of equal ones; first that of most data. Estimates of other weights
    are of the past, and dropped. Other processes may do the same at the same time.

    Returns:
        What the file now has of the data of the last one, and of simulated data.

    Raises:
        EstimatesError: If the file is damaged.
        WriteError: If it cannot be written; the old one is kept.
    """
    path = Path(path)
    *_, latest = estimates.values()
    weights = latest.settings["model_checksum"]
    with locked(path.with_name(f"{path.name}.lock"), path, seconds=60.0):
        stored = _read(path) if os.path.lexists(path) else {}
        kept = {
            name: [e for e in stored.get(name, []) if e.settings["model_checksum"] == weights]
            for name in {**stored, **estimates}
        }
        for name, estimate in estimates.items():
            data = estimate.settings["data_checksum"]
            same = [e for e in kept[name] if e.settings["data_checksum"] == data]
            larger = [e for e in same if e.size > estimate.size] or [estimate]
            kept[name] = [e for e in kept[name] if e.settings["data_checksum"] != data] + larger
        _write({name: found for name, found in kept.items() if found}, path)
    of_data = load_estimates_by_data(path)
    return of_data[latest.settings["data_checksum"]] | of_data.get(SIMULATED, {})


def _write(estimates: Mapping[str, Sequence[LogMarginal]], path: Path) -> None:
    record = {}
    for name, found in estimates.items():
        first, *others = sorted(found, key=lambda estimate: estimate.size, reverse=True)
        record[name] = _encode(first) | ({"others": list(map(_encode, others))} if others else {})
    records.write_json(record, path, in_parts=True)


def _read(path: Path) -> dict[str, list[LogMarginal]]:
    """By name, first that of most data."""
    advice = "remove it and make them again with scripts/estimate.py"
    try:
        found = records.read_json(path, dict[str, _Record], EstimatesError, advice)
    except FileNotFoundError:
        raise EstimatesError(f"there are no estimates {path}: make them with scripts/estimate.py") from None
    if not found:
        raise EstimatesError(f"{path} is damaged (it holds nothing): {advice}")
    return {name: [_decode(record), *map(_decode, record.others)] for name, record in found.items()}


def _encode(result: LogMarginal) -> dict[str, Any]:
    return {
        "values": _to_json(result.values),
        "std_error": _to_json(result.std_error),
        "method": result.method,
        "bound": result.bound,
        "settings": result.settings,
        "diagnostics": {name: _to_json(numbers) for name, numbers in result.diagnostics.items()},
        "curve": {str(size): _to_json(numbers) for size, numbers in result.curve.items()},
        "summary": result.summary().splitlines(),
    }


def _decode(record: _Record) -> LogMarginal:
    return LogMarginal(
        _from_json(record.values),
        _from_json(record.std_error),
        record.method,
        record.bound,
        record.settings,
        {name: _from_json(values) for name, values in record.diagnostics.items()},
        {int(size): _from_json(values) for size, values in record.curve.items()},
    )


def _to_json(numbers: Tensor) -> list[float | str]:
    return [v if math.isfinite(v) else str(v) for v in numbers.tolist()]


def _from_json(numbers: _Numbers) -> Tensor:
    return torch.tensor([float(v) for v in numbers], dtype=torch.float64)
