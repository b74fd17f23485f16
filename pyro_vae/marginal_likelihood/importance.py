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

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.compiled import CompiledFunction
from pyro_vae.distributions import QuantizedPoint, base_distribution
from pyro_vae.marginal_likelihood.result import LogMarginal, log_marginal
from pyro_vae.mcmc.diagnostics import MIN_SAMPLES_FOR_KHAT, pareto_smooth, tail_length
from pyro_vae.traces import Program, draw, guide_distributions, log_weights
from pyro_vae.traces.blocks import (
    Batch,
    Columns,
    by_blocks,
    check_sizes,
    check_whole,
    evaluation,
    rows_at_once,
    split,
)
from pyro_vae.traces.masks import check_masked


@checked
def importance_sampling(
    model: Program,
    guide: Program,
    *batch: Tensor,
    num_samples: int = 5000,
    tolerance: float | None = None,
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
        data: What the data are, for the summary: which, and how they were binarised. A data split
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
    num_data = check_sizes(batch, num_samples=num_samples)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive (nats), not {tolerance}")
    score = CompiledFunction(
        lambda *block, count: {"log_weights": log_weights(model, guide, *block, num_samples=count)},
        roots=(model, guide),
    )
    rows = rows_at_once(model, batch)
    size = _block_size(rows, num_samples)
    score.planned_calls = sum(len(list(_counts(num_samples, block, rows))) for block in split(batch, size))

    def estimate(block: Batch, advance: Callable[[int], None]) -> Columns:
        if score.is_compiled:  # and no longer checks the data
            with torch.random.fork_rng():
                log_weights(model, guide, *block, num_samples=1)
        sums = _RunningSums(len(block[0]), num_samples)
        for count in _counts(num_samples, block, rows):
            weights = score(*block, count=count)[0]["log_weights"].T.cpu()
            check_whole(weights, block)
            sums.add(weights)
            advance(len(block[0]) * count)
            if tolerance is not None and sums.is_enough(tolerance, num_data):
                advance(len(block[0]) * (num_samples - sums.count))
                break
        return sums.columns()

    columns = by_blocks(
        estimate,
        batch,
        size,
        programs=(model, guide),
        method="importance_sampling",
        settings={"num_samples": num_samples, "tolerance": tolerance},
        work=num_samples,
        unit="sample",
        progress=progress,
        checkpoint=checkpoint,
    )
    found = [name for name in columns if name.startswith(_CURVE)]
    curve = {int(name.removeprefix(_CURVE)): columns.pop(name) for name in found}
    notes = []
    if tolerance is not None:
        notes.append(_verdict_on_tolerance(columns, tolerance))
    if impossible := int((columns["values"] == -math.inf).sum()):
        notes.append(
            f"of {impossible:,} data all draws of the guide are impossible for the model: do their latents "
            "have the same support (a VQ-VAE's the same codebook)?"
        )
    is_of_codes = _has_codes(guide, *batch)
    if is_of_codes:
        columns["std_error"] = torch.zeros_like(columns["std_error"])
    with evaluation(model, guide):
        return log_marginal(
            columns,
            model=model,
            guide=None if is_of_codes else guide,
            batch=batch,
            method="importance_sampling",
            bound="lower",
            effort=f"{num_samples:,} samples a datum"
            if tolerance is None
            else f"{columns['num_samples'].mean().item():,.0f} samples a datum on average",
            data=data,
            curve={size: bound for size, bound in curve.items() if not bound.isnan().any()},
            num_samples=num_samples,
            **({} if tolerance is None else {"tolerance": tolerance}),
            notes=notes,
            **({"is_of_codes": True} if is_of_codes else {}),
        )


def _has_codes(guide: Program, *batch: Tensor) -> bool:
    """Whether the guide is that of a VQ-VAE, with one code for a datum."""
    with evaluation(guide), torch.random.fork_rng():
        sites = guide_distributions(guide, *(part[:1] for part in batch))
    return any(isinstance(base_distribution(fn), QuantizedPoint) for fn in sites.values())


_CURVE = "bound of samples: "  # names the columns of the curve


class _RunningSums:
    """What is kept of the weights of a block of data."""

    def __init__(self, num_data: int, num_samples: int) -> None:
        self.count = 0
        self.num_samples = num_samples
        self.log_sum = self.log_sum_squares = torch.full((num_data,), -math.inf, dtype=torch.float64)
        self.largest = [torch.empty((num_data, 0))]
        self.keep = min(num_samples, 6 * tail_length(num_samples))
        self.sizes = [m * 10**n for n in range(1, 12) for m in (1, 2, 5) if m * 10**n < num_samples]
        self.curve = {size: torch.full((num_data,), math.nan, dtype=torch.float64) for size in self.sizes}
        self.next_look = 200

    def add(self, log_weights: Float[Tensor, "data samples"]) -> None:
        log_w = log_weights.double()
        new = log_w.shape[1]
        for size in self.sizes:
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
        """Whether the tolerance is reached, or will not be."""
        if self.count < self.next_look:
            return False
        self.next_look = 2 * self.count
        variance = self.variance().mean().item()
        allowed = min(2 * tolerance, num_data * tolerance**2)
        return variance <= allowed or self.count * variance > self.num_samples * allowed

    def variance(self) -> Float[Tensor, " data"]:
        ess = (2 * self.log_sum - self.log_sum_squares).exp()
        return (1 / ess - 1 / self.count).clamp(min=0)

    def columns(self) -> Columns:
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
        curve = {
            **self.curve,
            self.num_samples: values if self.count == self.num_samples else values + math.nan,
        }
        return columns | {f"{_CURVE}{size}": bound for size, bound in curve.items()}

    def _largest(self, count: int) -> Float[Tensor, "data kept"]:
        row = torch.cat(self.largest, 1)
        return row.topk(min(count, row.shape[1]), 1).values


def _verdict_on_tolerance(columns: Columns, tolerance: float) -> str:
    variance, count = columns["std_error"].square(), columns["num_samples"]
    allowed = min(2 * tolerance, len(variance) * tolerance**2)
    bias = variance.mean().item() / 2
    reached = variance.mean().item() <= allowed
    doubt = 0.0 if "khat" not in columns else (columns["khat"] > 0.7).double().mean().item()
    if reached and doubt == 0:
        return f"stopped at the tolerance of {tolerance:g} nats: estimated bias {-bias:.2g}"
    unreliable = f"k-hat is above 0.7 for {100 * doubt:.1f} % of the data, so that this cannot be relied on"
    if reached:
        return (
            f"the estimated bias, {-bias:.2g}, is within the tolerance, {tolerance:g} nats, but {unreliable}"
        )
    needed = (count * variance).mean().item() / allowed
    return (
        f"the tolerance of {tolerance:g} nats was not reached: estimated bias {-bias:.2g}. It would take "
        f"some {needed:,.0f} samples a datum if the error fell as 1/S"
        + (f"; {unreliable}. Annealed importance sampling (ais) may do" if doubt else "")
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
    check_sizes(batch, num_samples=num_samples)
    blocks = []
    with evaluation(model, guide):
        rows = rows_at_once(model, batch)
        masks = True
        for block in split(batch, _block_size(rows, num_samples)):
            masks = masks and check_masked(model, *block)
            total = torch.zeros(2, len(block[0]), dtype=torch.float64)
            for count in _counts(num_samples, block, rows):
                draws = draw(model, guide, *block, num_samples=count)
                kl = draws.log_guide - draws.log_joint.log_prior
                parts = torch.stack([draws.log_joint.log_likelihood, kl])
                check_whole(kl.T, block)
                total += parts.double().sum(1).cpu()
            blocks.append(total / num_samples)
    log_likelihood, kl = torch.cat(blocks, 1)
    return Bound(log_likelihood - kl, log_likelihood, kl)


def _block_size(rows: int, num_samples: int) -> int:
    return max(1, rows // min(32, num_samples))


def _counts(num_samples: int, block: Batch, rows: int) -> Iterator[int]:
    """Sizes of the parts in which num_samples are drawn for this block."""
    most = max(1, rows // len(block[0]))
    for start in range(0, num_samples, most):
        yield min(most, num_samples - start)


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
