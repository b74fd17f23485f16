r"""What every estimator of :math:`\log p(x)` returns, and how results are told apart, kept and compared.

Two errors, never merged: the Monte Carlo error, which more samples make smaller, and the error of having seen
these test data and no others. And a third, which no error bar shows: the side on which an estimate is wrong.
The logarithm of an unbiased estimate of p(x) is too low in the mean, the negative logarithm of one of 1 /
p(x) too high, by half the Monte Carlo variance while that is small.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae import diagnostics as stats
from pyro_vae.blocks import Batch, Columns, checksum, programs_checksum
from pyro_vae.distributions import scores_cross_entropy
from pyro_vae.errors import UserError
from pyro_vae.files import write_atomically
from pyro_vae.traces import Program
from pyro_vae.traces.sites import sample_sites, trace_of

_BOUNDS = {
    "lower": "a lower bound in expectation",
    "upper": "an upper bound in expectation, if the draws are from the posterior",
    "exact": "exact but for the stated error",
}
_ERROR_OF = {"quadrature": "quadrature"}  # what std_error is, where not of Monte Carlo


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
        how = f"{self.method.replace('_', ' ')}, {self.settings['effort']}: {_BOUNDS[self.bound]}"
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
            ArviZ' own type (``InferenceData``, in 1.x a ``DataTree``) with the groups ``log_likelihood``
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
    curve: dict[int, Tensor] | None = None,
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
        "scores": _what_is_scored(model, *(argument[:1] for argument in batch)),
        **settings,
    }
    return LogMarginal(
        columns.pop("values"), columns.pop("std_error"), method, bound, described, columns, curve or {}
    )


def _what_is_scored(model: Program, *batch: Tensor) -> str:
    sites = sample_sites(trace_of(model, batch, 1))
    if any(scores_cross_entropy(site["fn"]) for _, site in sites):
        return "minus the cross-entropy of grey values (not a log-likelihood)"
    return "log p(x)"


# ------------------------------------------------------------------------------------ files


def save_estimates(estimates: Mapping[str, LogMarginal], path: Path) -> None:
    """Write estimates by name as JSON; raises ``WriteError`` and keeps what was there if it cannot."""
    record = {name: _encode(estimate) for name, estimate in estimates.items()}
    write_atomically(json.dumps(record).encode(), Path(path))


def load_estimates(path: Path) -> dict[str, LogMarginal]:
    """Read what :func:`save_estimates` wrote.

    Raises:
        EstimatesError: If it is no such file.
    """
    try:
        return {name: _decode(record) for name, record in json.loads(Path(path).read_text()).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EstimatesError(
            f"{path} does not hold estimates as this version writes them ({type(error).__name__}: {error}): "
            "make them again with scripts/estimate.py"
        ) from None


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


def _decode(record: dict[str, Any]) -> LogMarginal:
    numbers = {name: _from_json(record[name]) for name in ("values", "std_error")}
    diagnostics = {name: _from_json(values) for name, values in record["diagnostics"].items()}
    curve = {int(size): _from_json(values) for size, values in record["curve"].items()}
    return LogMarginal(
        **numbers,
        method=record["method"],
        bound=record["bound"],
        settings=record["settings"],
        diagnostics=diagnostics,
        curve=curve,
    )


def _to_json(numbers: Tensor) -> list[float | str]:
    """JSON has neither nan nor infinity: they become words that ``float`` reads."""
    return [v if math.isfinite(v) else str(v) for v in numbers.tolist()]


def _from_json(numbers: list[float | str]) -> Tensor:
    return torch.tensor([float(v) for v in numbers], dtype=torch.float64)
