"""Several estimates of the same data together: a table, and a verdict in words."""

import math
from collections.abc import Mapping

from pyro_vae.marginal_likelihood.result import BOUNDS, LogMarginal, check_alike, mean_error

_BOUND_WORDS = {"lower": "lower bound", "upper": "upper bound", "exact": "exact"}


def best_estimate(estimates: Mapping[str, LogMarginal]) -> LogMarginal:
    """Estimate of given data to be relied on most: an exact one, else the highest lower bound.

    Of noisy bounds the highest is that with the highest value minus its Monte Carlo error.

    Raises:
        ValueError: If there is none of these data: ``bidirectional`` is of simulated ones.
    """
    candidates = [e for e in estimates.values() if not e.is_simulated]
    if not candidates:
        raise ValueError("there is no estimate of given data, only of simulated ones")
    return max(candidates, key=_rank)


def _rank(estimate: LogMarginal) -> tuple[bool, bool, float]:
    is_converged = bool((estimate.diagnostics.get("converged", estimate.values) != 0).all())
    height = estimate.mean - estimate.monte_carlo_error
    height = -math.inf if math.isnan(height) else height  # one chain says nothing about its error
    return estimate.bound == "exact" and is_converged, estimate.bound == "lower", height


def table(estimates: Mapping[str, LogMarginal]) -> str:
    """Table of a line a method: value, Monte Carlo error, side of log p(x), diagnostics, seconds."""
    rows = [("method", "nats", "± Monte Carlo", "bound", "diagnostics", "seconds")]
    for name, estimate in estimates.items():
        seconds = estimate.settings.get("seconds")
        rows.append(
            (
                name + " (simulated data)" * estimate.is_simulated,
                f"{estimate.mean:.3f}",
                f"{estimate.monte_carlo_error:.2g}",
                _BOUND_WORDS[estimate.bound],
                ", ".join(diagnosis.brief for diagnosis in estimate.diagnoses if diagnosis.brief),
                "" if seconds is None else f"{seconds:.0f}",
            )
        )
        if estimate.upper is not None:
            upper, error = estimate.upper.mean().item(), estimate.upper_error
            rows.append(("", f"{upper:.3f}", f"{error:.2g}", "upper bound", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def verdict(estimates: Mapping[str, LogMarginal]) -> str:
    """Value to be quoted, its errors, and how far it can be trusted, in a few sentences.

    Args:
        estimates: By name of the method, of the same data; ``bidirectional`` of simulated ones.
    """
    if not estimates:
        raise ValueError("there are no estimates to judge")
    given = {name: e for name, e in estimates.items() if not e.is_simulated}
    check_alike(given)
    sentences = []
    if given:
        best = best_estimate(given)
        sentences.append(f"{best.stated()}, by {_words(best.method)}, {BOUNDS[best.bound]}")
        annealed = any(estimate.method == "ais" for estimate in given.values())
        for doubt in best.doubts:
            doubt = doubt._replace(advice="") if annealed and "ais" in doubt.advice else doubt
            sentences.append(doubt.in_full())
        sentences += [_relation(other, best) for other in given.values() if other is not best]
    for simulated in estimates.values():
        if simulated.is_simulated:
            error = math.hypot(simulated.monte_carlo_error, simulated.upper_error)
            sentences.append(
                f"on {len(simulated.values):,} data simulated from the model, annealing is at most "
                f"{simulated.gap:.2g} ± {error:.1g} nats too low (bidirectional Monte Carlo)"
            )
    return "; ".join(sentences) + "."


def _relation(other: LogMarginal, best: LogMarginal) -> str:
    words = _words(other.method)
    known = other.std_error.isfinite() & best.std_error.isfinite()
    if not known.any():
        return f"{words} does not know its error"
    mean = (other.values - best.values)[known].double().mean().item()
    error = math.hypot(mean_error(other.std_error[known]), mean_error(best.std_error[known]))
    if abs(mean) <= max(0.01, 2 * error):
        agrees = f"{words} agrees ({mean:+.3f} ± {error:.1g})"
    else:
        # A lower bound that is higher than the best one says that the best is not tight.
        is_certain = best.bound == "exact" or (mean < 0 and other.bound == "lower")
        low, high = ("too low", "too high") if is_certain else ("lower", "higher")
        agrees = f"{words} is {abs(mean):.2g} nats {low if mean < 0 else high} (± {error:.1g})"
    if not known.all():
        agrees += f" on the {int(known.sum()):,} data of which both know their error"
    return ", but ".join([agrees, *(doubt.words for doubt in other.doubts)])


def _words(method: str) -> str:
    names = {"ais": "annealed importance sampling", "hmc": "the paper's Appendix D (hmc)"}
    return names.get(method, method.replace("_", " "))
