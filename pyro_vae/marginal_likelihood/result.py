r"""The result of every estimator of :math:`\log p(x)`, and its words.

Two errors, never merged: the Monte Carlo error, which more samples make smaller, and the error of having seen
these test data and no others. And a third, which no error bar shows: the side on which an estimate is wrong.
The logarithm of an unbiased estimate of p(x) is too low in the mean, the negative logarithm of one of 1 /
p(x) too high, by half the Monte Carlo variance while that is small.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.mcmc.diagnostics import MIN_SAMPLES_FOR_KHAT, to_arviz

BOUNDS = {
    "lower": "a lower bound in expectation",
    "upper": "an upper bound in expectation, if the draws are from the posterior",
    "exact": "exact but for the stated error",
}
_CROSS_ENTROPY = "minus the cross-entropy of grey values (not a log-likelihood)"
_ERROR_OF = {"quadrature": "quadrature"}  # what std_error is, where not of Monte Carlo
_SIDES = {(True, False): "low", (False, True): "high", (True, True): "low or too high"}


class Diagnosis(NamedTuple):
    """One thing that diagnostics say of an estimate.

    Attributes:
        words: Words in a sentence.
        brief: Words in a table; empty where it is in none.
        may_be_low: True if the mean may be too low, by an unknown amount.
        may_be_high: True if it may be too high.
        advice: Remedy.
    """

    words: str
    brief: str = ""
    may_be_low: bool = False
    may_be_high: bool = False
    advice: str = ""

    @property
    def doubt(self) -> str:
        """Side on which the mean may be wrong, in words; empty if it can be relied on."""
        sides = self.may_be_low, self.may_be_high
        return f"may be too {_SIDES[sides]}, nobody knows by how much" if any(sides) else ""

    def in_full(self) -> str:
        """A line: the words, what follows from them, and what to do."""
        follows = f": the mean {self.doubt}" if self.doubt else ""
        return self.words + follows + (f"; {self.advice}" if self.advice else "")


class EstimatesError(UserError, ValueError):
    """Estimates that cannot be read, or not be compared."""


@dataclasses.dataclass(frozen=True)
class LogMarginal:
    r"""Estimates of :math:`\log p(x)` for every datum.

    Attributes:
        values: Estimates, nats.
        std_error: Their Monte Carlo standard errors, nats; of quadrature its estimated error; nan for a
            single sample.
        method: Name of the function that estimated them.
        bound: ``"lower"``, ``"upper"`` (both in expectation) or ``"exact"``.
        settings: With what: sample sizes, what the data are, which weights.
        diagnostics: Other numbers of every datum, by name; what they are is said by the estimator.
        curve: The importance-weighted bound of every datum by number of samples.
        is_simulated: True for data that were simulated from the model.
        is_of_codes: True for the bound of a VQ-VAE, whose guide has one code for a datum; no draws raise it.
        is_density: True for a log p(x); grey values under a Bernoulli have a cross-entropy only.
    """

    values: Float[Tensor, " batch"]
    std_error: Float[Tensor, " batch"]
    method: str
    bound: str
    settings: dict[str, Any]
    diagnostics: dict[str, Float[Tensor, " batch"]] = dataclasses.field(default_factory=dict)
    curve: dict[int, Float[Tensor, " batch"]] = dataclasses.field(default_factory=dict)
    is_simulated: bool = False
    is_of_codes: bool = False
    is_density: bool = True

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
        return mean_error(self.std_error)

    @property
    def upper_error(self) -> float | None:
        """Standard error of the mean of :attr:`upper` from drawing latents, nats."""
        return None if self.upper is None else mean_error(self.diagnostics["upper_std_error"])

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
    def scores(self) -> str:
        """Name of the values: log p(x), or something else."""
        return "log p(x)" if self.is_density else _CROSS_ENTROPY

    @property
    def data_checksum(self) -> str | None:
        """Digest that is the same for two estimates of the same data; None of simulated ones."""
        return None if self.is_simulated else self.settings["data_checksum"]

    @property
    def doubts(self) -> list[Diagnosis]:
        """Diagnoses that speak against it, or their lack; empty if it can be relied on."""
        return [diagnosis for diagnosis in self.diagnoses if diagnosis.doubt]

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """Its diagnostics in words."""
        if self.is_of_codes:
            words = "the bound of the one code that the guide has for a datum, which more draws do not raise"
            return [Diagnosis(words, may_be_low=True)]
        found: list[Diagnosis] = []
        one_side = (True, False) if self.bound == "lower" else (False, True)

        def say(words: str, brief: str = "", sides: tuple[bool, ...] = (), advice: str = "") -> None:
            found.append(Diagnosis(words, brief, *(sides or (False, False)), advice if sides else ""))

        if self.khat is not None:
            share = 100 * self.unreliable_share
            words = f"k-hat above 0.7 for {share:.1f} % of the data"
            say(words, f"k-hat > 0.7: {share:.1f} %", one_side if share else (), "estimate with ais")
        elif self.settings.get("num_samples", math.inf) < MIN_SAMPLES_FOR_KHAT:
            say(f"k-hat needs {MIN_SAMPLES_FOR_KHAT} samples a datum", sides=one_side)
        if self.ess is not None:
            median = self.ess.median().item()
            say(f"median effective sample size {median:.0f}", f"median ESS {median:.0f}")
        if (smoothed := self.diagnostics.get("smoothed")) is not None:
            say(f"with Pareto-smoothed weights {smoothed.mean().item():.2f}")
        if self.upper is not None:
            upper = self.upper.mean().item()
            say(f"upper bound {upper:.2f}: a gap of {self.gap:.2g} nats", f"gap {self.gap:.2g}")
        if (rhat := self.diagnostics.get("rhat")) is not None:
            if (share := self.unmixed_share) is None:
                say("one chain cannot tell whether it gets everywhere", sides=(True, True))
            else:
                share, largest = 100 * share, rhat.max().item()
                words = f"R-hat above 1.01 for {share:.1f} % of the data, largest {largest:.3f}"
                say(words, f"R-hat > 1.01: {share:.1f} %", (True, True) if share else ())
        if (divergences := self.diagnostics.get("divergences")) is not None:
            say(f"{int(divergences.sum())} divergent transitions")
        if (acceptance := self.diagnostics.get("acceptance")) is not None:
            mean, least = acceptance.mean().item(), acceptance.min().item()
            say(f"mean acceptance {mean:.2f}, least {least:.2f}", f"acceptance {mean:.2f}")
        if (converged := self.diagnostics.get("converged")) is not None:
            missed = 100 * (converged == 0).double().mean().item()
            words = f"not converged for {missed:.1f} % of the data" if missed else "converged for all data"
            sides = (True, True) if missed else ()
            say(words, f"converged: {100 - missed:.1f} %", sides, "give more max_nodes, or use ais")
        if self.method in ("ais", "bidirectional") and self.ess is not None:
            # The weight of such a datum is that of one chain, whose error is not known.
            lone = (~(self.ess >= 2)).double().mean().item()
            words = f"one chain has most of the weight of {100 * lone:.1f} % of the data"
            if lone:
                say(words, sides=one_side, advice="give more num_temperatures")
        return found

    @property
    def gap(self) -> float | None:
        """Mean over data of the upper minus the lower bound, nats; None where the method has no upper one."""
        return None if self.upper is None else (self.upper - self.values).mean().item()

    def stated(self, unit: str = "") -> str:
        """The mean with its errors, in words."""
        error = _ERROR_OF.get(self.method, "Monte Carlo")
        mean = f"= {self.mean:.2f}{unit} ± {self.monte_carlo_error:.2g} ({error})"
        if self.is_of_codes:
            mean = f"≥ {self.mean:.2f}{unit}"
        return f"{self.scores} {mean} ± {self.data_error:.2g} ({len(self.values):,} data)"

    def summary(self) -> str:
        """The result in words: value, both errors, diagnostics, and what was measured."""
        bound = BOUNDS[self.bound]
        if self.bound == "exact" and (unknown := int(self.std_error.isinf().sum())):
            known = len(self.values) - unknown
            bound = f"not known for {unknown:,} data" + f", for the others {bound}" * (known > 0)
        lines = [
            self.stated(" nats per datum"),
            f"{self.method.replace('_', ' ')}, {self.settings['effort']}: {bound}",
            *(diagnosis.in_full() for diagnosis in self.diagnoses),
            *self.settings.get("notes", []),
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
        return to_arviz(groups, dims={"x": ["datum"]})

    def save(self, path: Path) -> None:
        """Write JSON; raises ``WriteError`` and keeps what was there if it cannot."""
        from pyro_vae.marginal_likelihood.files import save_estimates

        save_estimates({self.method: self}, path)

    @classmethod
    def load(cls, path: Path) -> "LogMarginal":
        """Read what :meth:`save` wrote; raises ``EstimatesError`` if it holds several estimates."""
        from pyro_vae.marginal_likelihood.files import load_estimates

        estimates = load_estimates(path)
        if len(estimates) != 1:
            raise EstimatesError(f"{path} holds {', '.join(estimates)}: read them with load_estimates")
        return next(iter(estimates.values()))


def mean_error(std_error: Float[Tensor, " batch"]) -> float:
    """Standard error of a mean, from those of independent values."""
    return std_error.square().sum().sqrt().item() / len(std_error)


def check_alike(estimates: Mapping[str, LogMarginal]) -> None:
    """Raise ``EstimatesError`` unless estimates are of the same given data, and score the same thing."""
    if any(estimate.is_simulated for estimate in estimates.values()):
        raise EstimatesError(
            "estimates of data simulated from a model, each of its own, cannot be put together: estimate "
            "with ais instead of bidirectional"
        )
    for what in ("data_checksum", "scores"):
        seen = {name: getattr(estimate, what) for name, estimate in estimates.items()}
        if len(set(seen.values())) > 1:
            raise EstimatesError(
                f"estimates of different data or kinds cannot be put together: their "
                f"{what.replace('_', ' ')} differ: {seen}"
            )
