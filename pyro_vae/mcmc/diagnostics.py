r"""Diagnostics of Monte Carlo, computed by ArviZ.

*Importance weights* are judged by their right tail: a generalised Pareto distribution is fitted to the
largest :math:`M = \min(S / 5, 3 \sqrt S)` of S weights, and its shape k-hat tells how many moments they have
(Vehtari, Simpson, Gelman, Yao & Gabry, *Pareto Smoothed Importance Sampling*, 2024): below 0.5 the variance
is finite, above 0.7 no practical number of samples gives a value to be relied on. Replacing these weights by
quantiles of the fitted distribution gives the smoothed estimate, of less variance and a little more bias.

*Markov chains* are judged by the rank-normalised split R-hat, below 1.01 where they agree, and by their
effective sample size (Vehtari, Gelman, Simpson, Carpenter & Bürkner, *Rank-normalization, folding, and
localization*, 2021).
"""

import functools
import math
import types
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MIN_SAMPLES_FOR_KHAT = 30  # below, the tail has fewer than the six weights that a Pareto fit needs


@functools.cache
def arviz() -> types.ModuleType:
    """ArviZ, without what 0.23 prints when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # announces version 1
        import arviz

        return arviz


# ------------------------------------------------------------------------------------ weights


def tail_length(num_samples: int) -> int:
    """Weights in the tail to which the Pareto distribution is fitted (Vehtari et al. 2024, eq. 13)."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def pareto_smooth(
    log_weights: Float[Tensor, "batch kept"], num_samples: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch kept"]]:
    """Pareto k-hat of each row, and its weights with the tail replaced by the fitted distribution.

    Args:
        log_weights: The largest log-weights of every datum; at least six times the tail, in any order.
        num_samples: Number of all of them.

    Returns:
        k-hat: 0 where the weights are equal but for rounding (within 0.001), which have no tail; infinite
        where the fit fails. And the log-weights on their own scale, not normalised; as they were where there
        is no fit.
    """
    tail = tail_length(num_samples) if log_weights.shape[1] < num_samples else None
    found = [(0.0, row) if np.ptp(row) < 1e-3 else _psis(row, tail) for row in log_weights.double().numpy()]
    khat, smoothed = zip(*found, strict=True)
    return torch.tensor(khat, dtype=torch.float64), torch.from_numpy(np.stack(smoothed))


def _psis(log_weights: np.ndarray, tail: int | None) -> tuple[float, np.ndarray]:
    """ArviZ's k-hat and smoothed log-weights of one datum, from a tail of the given length.

    ArviZ derives the length from the number n of weights and their relative efficiency r as
    min(n / 5, 3 sqrt(n / r)), rounded up. Where only the largest weights are at hand, r is chosen so that the
    length is that of all of them.
    """
    efficiency = 9 * len(log_weights) / (tail - 0.5) ** 2 if tail else 1.0
    with np.errstate(all="ignore"):  # a failed fit shows in its result
        smoothed, khat = arviz().psislw(log_weights.copy(), reff=efficiency, normalize=False)
    if not np.isfinite(khat):
        return np.inf, log_weights
    return float(khat), np.asarray(smoothed)


# ------------------------------------------------------------------------------------ chains


def rhat(draws: Float[Tensor, "chains samples *shape"]) -> Float[Tensor, "*shape"]:
    """Rank-normalised split R-hat; nan of one chain, which agrees with nobody."""
    if len(draws) == 1:
        return torch.full(draws.shape[2:], math.nan, dtype=torch.float64)
    return _of_chains("rhat", draws)


def effective_sample_size(
    draws: Float[Tensor, "chains samples *shape"], *, method: str = "bulk"
) -> Float[Tensor, "*shape"]:
    """Effective sample size, ``"bulk"`` or for the ``"mean"``."""
    return _of_chains("ess", draws, method=method)


def _of_chains(name: str, draws: Tensor, **settings: str) -> Tensor:
    array = draws.double().cpu().numpy()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of chains that never moved, whose R-hat is nan
        result = getattr(arviz(), name)({"x": array}, **settings)["x"].values
    return torch.as_tensor(np.asarray(result, dtype=np.float64))


def to_arviz(groups: dict[str, dict[str, np.ndarray]], **labels: Any) -> Any:
    """Groups of variables of shape ``(chains, draws, ...)`` as ``arviz.InferenceData``.

    Labels are ``dims`` and ``coords``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # looks at which of the first two axes is longer
        return arviz().from_dict(**groups, **labels)
