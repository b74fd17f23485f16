r"""Estimates of :math:`\log p(x)`, one for every datum, never without an error.

*Importance sampling.* With weights :math:`w_s = p(x, z_s) / q(z_s \mid x)`, :math:`z_s \sim q(z \mid x)`,

.. math:: \hat L_S = \log \tfrac1S \sum_{s=1}^S w_s, \qquad E\,\hat L_S \le \log p(x),

and the bound tightens as S grows (Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, 2016).
Its standard error follows from the delta method, :math:`\mathrm{se}^2 = 1/\mathrm{ESS} - 1/S` with
:math:`\mathrm{ESS} = (\sum w)^2 / \sum w^2`. Both mean little where the weights have no finite variance; the
Pareto k-hat of their right tail tells (Vehtari et al., *Pareto Smoothed Importance Sampling*, 2024): below
0.5 the variance is finite, above 0.7 the value is not to be relied on.

Two errors, never merged: the Monte Carlo error, which more samples make smaller, and the error of having
seen these test data and no others.
"""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_vae.compiled import CompiledFunction
from pyro_vae.distributions import BernoulliCrossEntropy, base_distribution
from pyro_vae.files import write_atomically
from pyro_vae.progress import progress_bar
from pyro_vae.traces import Program, draw, log_weights, model_distributions

MIN_SAMPLES_FOR_KHAT = 30  # below, the tail has fewer than the six weights that a Pareto fit needs


@dataclasses.dataclass(frozen=True)
class LogMarginal:
    r"""Estimates of :math:`\log p(x)` for every datum.

    Attributes:
        values: Estimates, nats.
        std_error: Their Monte Carlo standard errors, nats; nan for a single sample.
        ess: Effective number of samples, between 1 and ``settings["num_samples"]``.
        khat: Pareto k-hat of the weights' tail; None with fewer than 30 samples.
        method: How they were estimated.
        settings: With what: sample sizes, what the data are, what was scored.
    """

    values: Float[Tensor, " batch"]
    std_error: Float[Tensor, " batch"]
    ess: Float[Tensor, " batch"]
    khat: Float[Tensor, " batch"] | None
    method: str
    settings: dict[str, Any]

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

    def summary(self) -> str:
        """The result in words: value, both errors, diagnostics, and what was measured."""
        num_samples = self.settings["num_samples"]
        what = self.settings["scores"]
        lines = [
            f"{what} = {self.mean:.2f} nats per datum "
            f"± {self.monte_carlo_error:.2g} (Monte Carlo) "
            f"± {self.data_error:.2g} ({len(self.values):,} data)",
            f"{self.method.replace('_', ' ')}, {num_samples:,} samples a datum: a lower bound in "
            f"expectation; median effective sample size {self.ess.median().item():.0f}",
        ]
        if self.khat is None:
            lines.append(f"Pareto k-hat needs {MIN_SAMPLES_FOR_KHAT} samples a datum")
        else:
            lines.append(
                f"Pareto k-hat above 0.7 for {100 * self.unreliable_share:.1f} % of the data"
                + (", whose values are too low, nobody knows by how much" * (self.unreliable_share > 0))
            )
        lines.append(f"data: {self.settings['data']}")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write JSON; raises ``WriteError`` and keeps what was there if it cannot."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in _PER_DATUM:
            if record[name] is not None:  # JSON has neither nan nor infinity
                record[name] = [v if math.isfinite(v) else None for v in record[name].tolist()]
        record["summary"] = self.summary().splitlines()
        write_atomically(json.dumps(record).encode(), Path(path))

    @classmethod
    def load(cls, path: Path) -> "LogMarginal":
        """Read what :meth:`save` wrote."""
        record = json.loads(Path(path).read_text())
        del record["summary"]
        for name, missing in _PER_DATUM.items():
            if record[name] is not None:
                numbers = [missing if v is None else v for v in record[name]]
                record[name] = torch.tensor(numbers, dtype=torch.float64)
        return cls(**record)


# What is stored for every datum, and what a number that JSON cannot hold was.
_PER_DATUM = {"values": -math.inf, "std_error": math.nan, "ess": math.nan, "khat": math.inf}


def importance_sampling(
    model: Program,
    guide: Program,
    *batch: Tensor,
    num_samples: int = 5000,
    data: str | None = None,
    progress: bool = True,
) -> LogMarginal:
    r"""The importance-weighted bound :math:`\hat L_S` of every datum, with its errors (see the module).

    Memory is bounded whatever the number of data and samples: weights are drawn in blocks, and of each
    datum only running sums and the largest :math:`18 \sqrt S` weights are kept.

    Args:
        model: A Pyro program that keeps the contract (``traces.log_weights``).
        guide: Its guide; the better it covers the posterior, the smaller the errors.
        *batch: Arguments of both programs for all data, first axis the data; taken apart into blocks.
        num_samples: S, draws for every datum.
        data: What the data are, for the summary: which, and how they were binarised. A data split
            says it: ``importance_sampling(model, guide, test.x, data=test.description)``.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no data or samples, the arguments differ in length, or as
            ``traces.log_weights``; SupportError if the likelihood does not cover the data.
    """
    num_data = _check_sizes(batch, num_samples)
    tail = _tail_length(num_samples)
    keep = min(num_samples, 6 * tail)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("values", "std_error", "ess", "khat")}
    bar = progress_bar(num_data * num_samples, "importance sampling", "sample", show=progress)
    score = CompiledFunction(
        lambda *block, count: {"log_weights": log_weights(model, guide, *block, num_samples=count)},
        roots=(model, guide),
    )
    score.planned_calls = sum(len(list(_counts(num_samples, block))) for block in _blocks(batch, num_samples))
    with bar, _evaluation(model, guide):
        scores = _what_is_scored(model, guide, *(argument[:1] for argument in batch))
        for block in _blocks(batch, num_samples):
            size = len(block[0])
            if score.is_compiled:  # and no longer checks the data
                with torch.random.fork_rng():
                    log_weights(model, guide, *block, num_samples=1)
            log_sum = log_sum_squares = torch.full((size,), -math.inf, dtype=torch.float64)
            largest = [torch.empty((size, 0))]
            for count in _counts(num_samples, block):
                weights = score(*block, count=count)[0]["log_weights"].T.cpu()
                log_w = weights.double()
                log_sum = torch.logaddexp(log_sum, log_w.logsumexp(1))
                log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_w).logsumexp(1))
                if num_samples >= MIN_SAMPLES_FOR_KHAT:
                    largest.append(weights)
                    if sum(part.shape[1] for part in largest) > 2 * keep:  # sorting is slow, so rarely
                        largest = [_largest(largest, keep)]
                bar.update(size * count)
            ess = (2 * log_sum - log_sum_squares).exp()
            columns["values"].append(log_sum - math.log(num_samples))
            columns["ess"].append(ess)
            variance = (1 / ess - 1 / num_samples).clamp(min=0)
            # One sample says nothing about its own error.
            columns["std_error"].append(variance.sqrt() if num_samples > 1 else variance + math.nan)
            columns["khat"].append(pareto_khat(_largest(largest, keep), num_samples))
    result = {name: torch.cat(parts) for name, parts in columns.items()}
    if num_samples < MIN_SAMPLES_FOR_KHAT:
        result["khat"] = None
    settings = {
        "num_samples": num_samples,
        "num_data": num_data,
        "data": data or "not said (nor how they were binarised)",
        "scores": scores,
    }
    return LogMarginal(**result, method="importance_sampling", settings=settings)


class Bound(NamedTuple):
    r"""The ELBO of every datum and its parts, in nats: ``elbo = log_likelihood - kl``.

    Attributes:
        elbo: :math:`E_q[\log p(x, z) - \log q(z \mid x)]`.
        log_likelihood: :math:`E_q[\log p(x \mid z)]`, minus the reconstruction error.
        kl: :math:`KL(q(z \mid x) \| p(z))`.
    """

    elbo: Float[Tensor, " batch"]
    log_likelihood: Float[Tensor, " batch"]
    kl: Float[Tensor, " batch"]


def elbo(model: Program, guide: Program, *batch: Tensor, num_samples: int = 1) -> Bound:
    """The evidence lower bound of every datum, by Monte Carlo: unbiased for any pair.

    Args:
        model: A Pyro program that keeps the contract (``traces.log_weights``).
        guide: Its guide.
        *batch: Arguments of both programs for all data, first axis the data; taken apart into blocks.
        num_samples: Draws for every datum.

    Raises:
        ValueError: As :func:`importance_sampling`.
    """
    _check_sizes(batch, num_samples)
    blocks = []
    with _evaluation(model, guide):
        for block in _blocks(batch, num_samples):
            total = torch.zeros(2, len(block[0]), dtype=torch.float64)
            for count in _counts(num_samples, block):
                draws = draw(model, guide, *block, num_samples=count)
                kl = draws.log_guide - draws.log_joint.log_prior
                parts = torch.stack([draws.log_joint.log_likelihood, kl])
                total += parts.double().sum(1).cpu()
            blocks.append(total / num_samples)
    log_likelihood, kl = torch.cat(blocks, 1)
    return Bound(log_likelihood - kl, log_likelihood, kl)


def bits_per_dim(
    log_prob: Float[Tensor, "*batch"] | float, data_dim: int, bin_width: float
) -> Float[Tensor, "*batch"] | float:
    r"""Log-densities in nats as bits per dimension of data in bins, :math:`-(\log p / D + \log h) / \log 2`.

    Args:
        log_prob: :math:`\log p(x)`, nats per datum.
        data_dim: D, numbers in a datum.
        bin_width: h, the distance of neighbouring values in the unit of x: 1/255 for bytes scaled to
            [0, 1]; 1 gives the differential entropy in the unit of x itself. Unless the data were
            dequantised with noise of this width, this is not the length of a code and may be negative.
    """
    return -(log_prob / data_dim + math.log(bin_width)) / math.log(2)


# ----------------------------------------------------------------------------------------- blocks


def _check_sizes(batch: tuple[Tensor, ...], num_samples: int) -> int:
    """The number of data."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    lengths = {len(argument) for argument in batch}
    if len(lengths) != 1:
        raise ValueError(f"the programs' arguments must have one length, not {sorted(lengths)}")
    if lengths == {0}:
        raise ValueError("there are no data to estimate log p(x) of")
    return lengths.pop()


def _rows(batch: tuple[Tensor, ...]) -> int:
    """How many rows (samples times data) to score at once: a CPU is fastest while they fit its cache."""
    most, numbers = (4096, 2**22) if batch[0].device.type == "cpu" else (2**18, 2**27)
    return max(1, min(most, numbers // max(1, batch[0][0].numel())))


def _blocks(batch: tuple[Tensor, ...], num_samples: int) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _rows(batch) // min(32, num_samples))
    return zip(*(argument.split(size) for argument in batch), strict=True)


def _counts(num_samples: int, block: tuple[Tensor, ...]) -> Iterator[int]:
    """Sizes of the parts in which num_samples are drawn for this block."""
    most = max(1, _rows(block) // len(block[0]))
    for start in range(0, num_samples, most):
        yield min(most, num_samples - start)


def _largest(parts: list[Tensor], count: int) -> Tensor:
    """The largest numbers of every row of all parts."""
    row = torch.cat(parts, 1)
    return row.topk(min(count, row.shape[1]), 1).values


@contextlib.contextmanager
def _evaluation(*programs: Program) -> Iterator[None]:
    """Neither gradients nor dropout; leaves the modes of the programs as they were."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _what_is_scored(model: Program, guide: Program, *batch: Tensor) -> str:
    sites = model_distributions(model, guide, *batch).values()
    if any(isinstance(base_distribution(site), BernoulliCrossEntropy) for site in sites):
        return "minus the cross-entropy of grey values (not a log-likelihood)"
    return "log p(x)"


# ----------------------------------------------------------------------------------------- k-hat


def _tail_length(num_samples: int) -> int:
    """Weights in the tail to which the Pareto distribution is fitted (Vehtari et al. 2024, eq. 13)."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def pareto_khat(log_weights: Float[Tensor, "batch kept"], num_samples: int) -> Float[Tensor, " batch"]:
    """Pareto k-hat of each row, fitted by ArviZ.

    Args:
        log_weights: The largest log-weights of every datum; at least six times the tail, in any order.
        num_samples: How many there were altogether.

    Returns:
        k-hat; 0 where the weights are equal but for rounding (within 0.001), which have no tail; infinite
        where the fit fails.
    """
    kept = log_weights.shape[1]
    rows = log_weights.double().numpy()
    khat = np.full(len(rows), np.inf)
    if kept:
        tail = _tail_length(num_samples) if kept < num_samples else None
        khat = np.array([0.0 if np.ptp(row) < 1e-3 else _psis_khat(row, tail) for row in rows])
    return torch.from_numpy(khat)


def _psis_khat(log_weights: np.ndarray, tail: int | None) -> float:
    """ArviZ's k-hat of one datum, in both of its lines, from a tail of the given length.

    ArviZ derives the length from the number n of weights and their relative efficiency r as
    min(n / 5, 3 sqrt(n / r)), rounded up by 0.23 and down by 1.x. Where only the largest weights are at hand,
    r is chosen so that the length is that of all of them.
    """
    count = len(log_weights)
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # announces version 1 at import
            from arviz import psislw
        efficiency = 9 * count / (tail - 0.5) ** 2 if tail else 1.0
        with np.errstate(all="ignore"):  # a failed fit shows in its result
            khat = psislw(log_weights.copy(), reff=efficiency)[1]
    else:
        efficiency = 9 * count / (tail + 0.5) ** 2 if tail else 1.0
        try:
            with np.errstate(all="ignore"):
                # 1.x negates what it is given
                khat = array_stats.psislw(-log_weights, r_eff=efficiency)[1]
        except ValueError:  # all weights of the tail are equal
            return np.inf
    return float(khat) if np.isfinite(khat) else np.inf
