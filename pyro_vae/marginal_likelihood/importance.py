r"""Importance sampling: the guide proposes, the model weighs.

With weights :math:`w_s = p(x, z_s) / q(z_s \mid x)`, :math:`z_s \sim q(z \mid x)`,

.. math:: \hat L_S = \log \tfrac1S \sum_{s=1}^S w_s, \qquad E\,\hat L_S \le \log p(x),

and the bound tightens as S grows (Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, 2016).
By the delta method its variance is :math:`\mathrm{se}^2 = 1/\mathrm{ESS} - 1/S` with
:math:`\mathrm{ESS} = (\sum w)^2 / \sum w^2`, and its bias :math:`-\mathrm{se}^2 / 2` (Nowozin, *Debiasing
Evidence Approximations*, 2018). All of these mean little where the weights have no finite variance; the
Pareto k-hat of their tail tells (:mod:`pyro_vae.mcmc.diagnostics`). Nothing tells of a mode that no sample
has seen.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.compiled import CompiledFunction
from pyro_vae.distributions import QuantizedPoint, base_distribution
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.marginal_likelihood.runner import CURVE, Estimator
from pyro_vae.mcmc.diagnostics import MIN_SAMPLES_FOR_KHAT, pareto_smooth, tail_length
from pyro_vae.traces import Program, draw_pair, guide_distributions, log_weights
from pyro_vae.traces.blocks import (
    Advance,
    Batch,
    PerDatum,
    Work,
    check_sizes,
    check_whole,
    evaluation,
    rows_at_once,
    split,
)


@checked
def importance_sampling(
    model: Program,
    guide: Program,
    *batch: Tensor,
    num_samples: Count = 5000,
    tolerance: Positive | None = None,
    data: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> LogMarginal:
    r"""The importance-weighted bound :math:`\hat L_S` of every datum, with its errors (see the module).

    Discrete sites are summed out where ``traces.log_weights`` does.

    Memory is bounded whatever the number of data and samples: weights are drawn in blocks, and of each
    datum only running sums and the largest :math:`18 \sqrt S` weights are kept.

    Args:
        model: A Pyro program that keeps the contract (``traces.log_weights``).
        guide: Its guide; the better it covers the posterior, the smaller the errors.
        *batch: Arguments of both programs for all data, first axis the data; taken apart into blocks.
        num_samples: S, draws for every datum; the most, if a tolerance is given.
        tolerance: Stop drawing for a block of data once it holds for the mean of the block that the bias,
            estimated by the delta method, is below this many nats, and for the mean of all data that so is
            the Monte Carlo error. Looked at after 200, 400, 800, ... samples. Where even an error that
            falls as 1/S would need more than ``num_samples``, sampling stops at once; the notes in the
            summary say for how many data the tolerance was not reached, and what it would take.
        data: Words on the data for the summary: which, and how they were binarised. A data split
            says it: ``importance_sampling(model, guide, test.x, data=test.description)``.
        progress: Show a progress bar.
        checkpoint: File that keeps what is done; an interrupted call with the same file goes on there, and
            one that was finished returns what it returned.

    Returns:
        Lower bounds. Diagnostics ``ess``, ``num_samples``, and with 30 or more samples ``khat`` and
        ``smoothed``, the estimate with Pareto-smoothed weights. The curve has :math:`\hat L_K` of the first K
        samples, K = 10, 20, 50, 100, ... S.

    Raises:
        ValueError: If there are no data or samples, the arguments differ in length, or as
            ``traces.log_weights``; SupportError if the likelihood does not cover the data; ResumeError if
            the checkpoint is of something else.
    """
    return _ImportanceSampling(model, guide, batch, num_samples, tolerance).estimate(
        data, progress, checkpoint
    )


class _ImportanceSampling(Estimator):
    name, bound, unit = "importance_sampling", "lower", "sample"

    def __init__(
        self, model: Program, guide: Program, batch: Batch, num_samples: int, tolerance: float | None
    ) -> None:
        super().__init__(model, guide, batch)
        self.num_samples = self.amount = num_samples
        self.tolerance = tolerance
        self.settings = {"num_samples": num_samples, "tolerance": tolerance}
        self.rows = rows_at_once(model, batch)
        self.size = _block_size(self.rows, num_samples)
        self.score = CompiledFunction(
            lambda *block, count: {"log_weights": log_weights(model, guide, *block, num_samples=count)},
            roots=(model, guide),
        )
        counts = [_counts(num_samples, block, self.rows) for block in split(batch, self.size)]
        self.score.planned_calls = sum(map(len, counts))

    @functools.cached_property
    def is_of_codes(self) -> bool:
        """True if the guide is that of a VQ-VAE."""
        with evaluation(self.guide), torch.random.fork_rng():
            sites = guide_distributions(self.guide, *(part[:1] for part in self.batch))
        return any(isinstance(base_distribution(fn), QuantizedPoint) for fn in sites.values())

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        if self.score.is_compiled:  # and no longer checks the data
            with torch.random.fork_rng():
                log_weights(self.model, self.guide, *block, num_samples=1)
        sums = _RunningSums(len(block[0]), self.num_samples)
        for count in _counts(self.num_samples, block, self.rows):
            weights = self.score(*block, count=count)[0]["log_weights"].T.cpu()
            check_whole(weights, block)
            sums.add(weights)
            advance(len(block[0]) * count)
            if self.tolerance is not None and sums.is_enough(self.tolerance, len(self.batch[0])):
                advance(len(block[0]) * (self.num_samples - sums.count))
                break
        return sums.columns()

    def effort(self, columns: PerDatum) -> str:
        if self.tolerance is None:
            return f"{self.num_samples:,} samples a datum"
        return f"{columns['num_samples'].mean().item():,.0f} samples a datum on average"

    def notes(self, columns: PerDatum) -> list[str]:
        notes = [] if self.tolerance is None else [_verdict_on_tolerance(columns, self.tolerance)]
        if impossible := int((columns["values"] == -math.inf).sum()):
            notes.append(
                f"of {impossible:,} data all draws of the guide are impossible for the model: do their "
                "latents have the same support (a VQ-VAE's the same codebook)?"
            )
        return notes


class _RunningSums:
    """Sums and largest weights of a block of data: all that is kept."""

    def __init__(self, num_data: int, num_samples: int) -> None:
        self.count = 0
        self.num_samples = num_samples
        self.log_sum = self.log_sum_squares = torch.full((num_data,), -math.inf, dtype=torch.float64)
        self.largest = [torch.empty((num_data, 0))]
        self.keep = min(num_samples, 6 * tail_length(num_samples))
        sizes = [m * 10**n for n in range(1, 12) for m in (1, 2, 5) if m * 10**n < num_samples]
        self.curve = dict.fromkeys([*sizes, num_samples], self.log_sum + math.nan)
        self.next_look = 200

    def add(self, log_weights: Float[Tensor, "data samples"]) -> None:
        log_w = log_weights.double()
        new = log_w.shape[1]
        for size in self.curve:
            if self.count < size <= self.count + new:
                first = log_w[:, : size - self.count].logsumexp(1)
                self.curve[size] = torch.logaddexp(self.log_sum, first) - math.log(size)
        self.log_sum = torch.logaddexp(self.log_sum, log_w.logsumexp(1))
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares, (2 * log_w).logsumexp(1))
        self.count += new
        if self.num_samples >= MIN_SAMPLES_FOR_KHAT:
            self.largest.append(log_weights)
            if sum(part.shape[1] for part in self.largest) > 2 * self.keep:  # sorting is slow, so rarely
                self.largest = [self._largest(self.keep)]

    def is_enough(self, tolerance: float, num_data: int) -> bool:
        """True if the tolerance is reached, or will not be."""
        if self.count < self.next_look:
            return False
        self.next_look = 2 * self.count
        variance = self.variance().mean().item()
        allowed = min(2 * tolerance, num_data * tolerance**2)
        return variance <= allowed or self.count * variance > self.num_samples * allowed

    def variance(self) -> Float[Tensor, " data"]:
        ess = (2 * self.log_sum - self.log_sum_squares).exp()
        return (1 / ess - 1 / self.count).clamp(min=0)

    def columns(self) -> PerDatum:
        values = self.log_sum - math.log(self.count)
        variance = self.variance()
        columns = {
            "values": values,
            # One sample says nothing about its own error.
            "std_error": variance.sqrt() if self.count > 1 else variance + math.nan,
            "ess": (2 * self.log_sum - self.log_sum_squares).exp(),
            "num_samples": torch.full_like(values, self.count),
        }
        if self.num_samples >= MIN_SAMPLES_FOR_KHAT:
            # The tail is that of the samples drawn, and all of it is among those kept.
            kept = self._largest(min(self.count, 6 * tail_length(self.count))).double()
            columns["khat"], smoothed = pareto_smooth(kept, self.count)
            rest = 1 - (kept.logsumexp(1) - self.log_sum).exp().clamp(max=1)
            whole = torch.logaddexp(self.log_sum + rest.log(), smoothed.logsumexp(1))
            columns["smoothed"] = whole - math.log(self.count)
        return columns | {f"{CURVE}{size}": bound for size, bound in self.curve.items()}

    def _largest(self, count: int) -> Float[Tensor, "data kept"]:
        row = torch.cat(self.largest, 1)
        return row.topk(min(count, row.shape[1]), 1).values


def _verdict_on_tolerance(columns: PerDatum, tolerance: float) -> str:
    variance, count = columns["std_error"].square(), columns["num_samples"]
    allowed, bias = min(2 * tolerance, len(variance) * tolerance**2), -variance.mean().item() / 2
    if -2 * bias <= allowed:
        return f"stopped at the tolerance of {tolerance:g} nats: estimated bias {bias:.2g}"
    needed = (count * variance).mean().item() / allowed
    return (
        f"the tolerance of {tolerance:g} nats was not reached: estimated bias {bias:.2g}. It would take some "
        f"{needed:,.0f} samples a datum if the error fell as 1/S"
    )


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


@checked
def elbo(model: Program, guide: Program, *batch: Tensor, num_samples: Count = 1) -> Bound:
    """The evidence lower bound of every datum, by Monte Carlo: unbiased for any pair.

    Args:
        model: A Pyro program that keeps the contract (``traces.log_weights``).
        guide: Its guide.
        *batch: Arguments of both programs for all data, first axis the data; taken apart into blocks.
        num_samples: Draws for every datum.

    Raises:
        ValueError: If :func:`importance_sampling` would raise it.
    """
    check_sizes(batch)
    parts = _Elbo(model, guide, batch, num_samples).run(batch)
    return Bound(parts["log_likelihood"] - parts["kl"], **parts)


class _Elbo(Work):
    name, unit = "elbo", "sample"

    def __init__(self, model: Program, guide: Program, batch: Batch, num_samples: int) -> None:
        self.programs = (model, guide)
        self.num_samples = self.amount = num_samples
        self.rows = rows_at_once(model, batch)
        self.size = _block_size(self.rows, num_samples)

    def columns(self, block: Batch, advance: Advance) -> PerDatum:
        total = torch.zeros(2, len(block[0]), dtype=torch.float64)
        for count in _counts(self.num_samples, block, self.rows):
            draws = draw_pair(*self.programs, *block, num_samples=count)
            kl = draws.log_guide - draws.log_joint.log_prior
            check_whole(kl.T, block)
            total += torch.stack([draws.log_joint.log_likelihood, kl]).double().sum(1).cpu()
        return dict(zip(("log_likelihood", "kl"), total / self.num_samples, strict=True))


def _block_size(rows: int, num_samples: int) -> int:
    return max(1, rows // min(32, num_samples))


def _counts(num_samples: int, block: Batch, rows: int) -> list[int]:
    """Sizes of the parts in which num_samples are drawn for this block."""
    most = max(1, rows // len(block[0]))
    return [min(most, num_samples - start) for start in range(0, num_samples, most)]


@checked
def bits_per_dim(
    log_prob: Float[Tensor, "*batch"] | float, data_dim: Count, bin_width: Positive
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
