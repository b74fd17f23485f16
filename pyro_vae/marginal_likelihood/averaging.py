"""Predictive probability of a distribution of models, such as that of full variational Bayes."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from pyro_vae.arguments import checked
from pyro_vae.marginal_likelihood.result import EstimatesError, LogMarginal, check_alike


@checked
def average(estimates: Sequence[LogMarginal]) -> LogMarginal:
    r"""Logarithm of the mean probability over models that were drawn at random, by datum.

    .. math:: \log \frac1S \sum_s p_s(x) \approx \log E_{q(\theta)}\, p_\theta(x),

    the predictive probability if :math:`q(\theta)` is the posterior of the weights::

        average([importance_sampling(*draw(model, guide), x) for _ in range(20)])

    Args:
        estimates: Estimates of the same data by the same method, one for each draw of a model.

    Returns:
        Lower bounds in expectation (by Jensen's inequality, also where the estimates are exact). Errors are
        from the spread of the probabilities over models, which contains the estimates' own. Of the
        diagnostics those that tell what cannot be relied on: of every datum the worst over models.

    Raises:
        EstimatesError: If there is none, they are of different data or methods, or upper bounds.
    """
    if not estimates:
        raise EstimatesError("there are no estimates to average")
    first = estimates[0]
    check_alike({str(number): estimate for number, estimate in enumerate(estimates)})
    if len(methods := {estimate.method for estimate in estimates}) > 1:
        raise EstimatesError(f"estimates to average must agree in their method, not be by {sorted(methods)}")
    if any(estimate.bound == "upper" for estimate in estimates):
        raise EstimatesError(
            f"{first.method} bounds log p(x) from above, and the mean over models from below: together they "
            "bound nothing. Take importance_sampling, ais or quadrature"
        )
    count = len(estimates)
    values = torch.stack([estimate.values for estimate in estimates])
    mean = values.logsumexp(0) - math.log(count)
    std_error = first.std_error if count == 1 else (values - mean).exp().std(0) / math.sqrt(count)
    # An average of these models is told from others, and from each of them.
    behaviours = [estimate.settings.get("model_behaviour") for estimate in estimates]
    which = {
        "model_checksum": "+".join(sorted(str(e.settings.get("model_checksum")) for e in estimates)),
        "model_behaviour": None if None in behaviours else [number for one in behaviours for number in one],
    }
    effort = f"mean over {count} models, {first.settings['effort']} each"
    diagnostics = {
        name: worst(torch.stack([estimate.diagnostics[name] for estimate in estimates]), 0)
        for name, worst in _WORST.items()
        if all(name in estimate.diagnostics for estimate in estimates)
    }
    return dataclasses.replace(
        first,
        values=mean,
        std_error=std_error,
        bound="lower",
        settings=first.settings | {"effort": effort, "num_models": count} | which,
        diagnostics=diagnostics,
        curve={},
    )


_WORST = {"khat": torch.amax, "rhat": torch.amax, "converged": torch.amin, "ess": torch.amin}
