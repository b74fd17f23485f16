"""Models compared on the same data: paired differences of log p(x), which vary far less than its values."""

import dataclasses
import math
import warnings
from collections.abc import Mapping

import numpy as np

from pyro_vae.arguments import checked
from pyro_vae.marginal_likelihood.result import Diagnosis, EstimatesError, LogMarginal, check_alike
from pyro_vae.mcmc.diagnostics import arviz

_REPLICATES = 10_000


@dataclasses.dataclass(frozen=True)
class Difference:
    """Model against the best one.

    Attributes:
        name: Name of the model.
        mean: Mean log p(x), nats.
        difference: Mean of its values minus those of the best model, nats; 0 for the best itself.
        data_error: Standard error of the difference from having seen these data: paired bootstrap.
        interval: Where 95 % of the bootstrap's differences lie; without end on a side on which an estimate
            may be wrong by an unknown amount.
        monte_carlo_error: Standard error of the difference from drawing latents.
        doubts: Diagnoses for which its own estimate cannot be relied on.
    """

    name: str
    mean: float
    difference: float
    data_error: float
    interval: tuple[float, float]
    monte_carlo_error: float
    doubts: tuple[Diagnosis, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models from the best to the worst; ``print`` shows a table.

    Attributes:
        rows: One a model.
        notes: Sentences to keep in mind when they are read.
    """

    rows: list[Difference]
    notes: list[str]

    def __str__(self) -> str:
        width = max(5, *(len(row.name) for row in self.rows))
        lines = [
            f"{'model':<{width}}  {'log p(x)':>9}  {'difference':>10}  ± data  ± Monte Carlo  95 % interval"
        ]
        for row in self.rows:
            low, high = row.interval
            lines.append(
                f"{row.name:<{width}}  {row.mean:9.2f}  {row.difference:10.2f}  {row.data_error:6.2g}  "
                f"{row.monte_carlo_error:13.2g}  [{low:.2f}, {high:.2f}]"
            )
        return "\n".join([*lines, *self.notes])


@checked
def compare(estimates: Mapping[str, LogMarginal]) -> Comparison:
    r"""Paired differences between models on the same test data.

    With :math:`d_n = \log p_a(x_n) - \log p_b(x_n)` the mean difference is that of the :math:`d_n`, and its
    error comes from resampling the :math:`d_n` (bootstrap, 10,000 replicates): the data that both models find
    hard cancel. Where an estimate has doubts (``LogMarginal.doubts``) the notes say so, and intervals have no
    end on that side: the order is then that of the estimates, not of the models.

    Args:
        estimates: Results by name of the model, at least two.

    Raises:
        EstimatesError: If they are of different data, or score different things.
    """
    if len(estimates) < 2:
        raise EstimatesError("compare needs at least two estimates")
    check_alike(estimates)
    best = max(estimates, key=lambda name: estimates[name].mean)
    reference = estimates[best]
    rng = np.random.RandomState(0)
    count = len(reference.values)
    rows = []
    for name in sorted(estimates, key=lambda name: -estimates[name].mean):
        estimate = estimates[name]
        doubts = tuple(estimate.doubts)
        if name == best:
            rows.append(Difference(name, estimate.mean, 0.0, 0.0, (0.0, 0.0), 0.0, doubts))
            continue
        d = (estimate.values - reference.values).double().numpy()
        means = np.concatenate(
            [d[rng.randint(count, size=(n, count))].mean(1) for n in _portions(_REPLICATES, count)]
        )
        low, high = np.quantile(means, [0.025, 0.975])
        if any(doubt.may_be_low for doubt in doubts) or any(doubt.may_be_high for doubt in reference.doubts):
            high = math.inf
        if any(doubt.may_be_high for doubt in doubts) or any(doubt.may_be_low for doubt in reference.doubts):
            low = -math.inf
        error = math.hypot(estimate.monte_carlo_error, reference.monte_carlo_error)
        rows.append(Difference(name, estimate.mean, d.mean(), means.std(), (low, high), error, doubts))
    notes = [f"{row.name} {doubt.doubt}: {doubt.words}" for row in rows for doubt in row.doubts]
    notes += [
        f"{' and '.join(names)} are estimates of one model: they differ as estimates, not as models"
        for names in _of_one_model(estimates)
    ]
    if len({estimate.method for estimate in estimates.values()}) > 1:
        methods = ", ".join(f"{name} by {estimate.method}" for name, estimate in estimates.items())
        notes.append(f"estimated in different ways, which may differ by more than the models: {methods}")
    return Comparison(rows, notes)


def _of_one_model(estimates: Mapping[str, LogMarginal]) -> list[list[str]]:
    """Names of those that are of the same model: it draws and scores the same from the same seed."""
    groups: list[tuple[np.ndarray, list[str]]] = []
    for name, estimate in estimates.items():
        numbers = estimate.settings.get("model_behaviour")
        if numbers is None:
            continue
        numbers = np.asarray(numbers)
        for known, names in groups:
            same = known.shape == numbers.shape and np.allclose(known, numbers, 1e-5, 0, equal_nan=True)
            if same and estimates[names[0]].settings["model_checksum"] == estimate.settings["model_checksum"]:
                names.append(name)
                break
        else:
            groups.append((numbers, [name]))
    return [names for _, names in groups if len(names) > 1]


def arviz_comparison(estimates: Mapping[str, LogMarginal]) -> str:
    """``az.compare`` of the same estimates as a table: expected log-densities, summed over the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of k-hats of the draws that only stand for Monte Carlo errors
        return arviz().compare({name: e.to_arviz() for name, e in estimates.items()}).to_string()


def _portions(replicates: int, count: int) -> list[int]:
    """Replicates to draw at once, so that memory stays bounded."""
    most = max(1, 2**22 // count)
    return [min(most, replicates - start) for start in range(0, replicates, most)]
