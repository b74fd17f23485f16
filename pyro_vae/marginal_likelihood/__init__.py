r"""Estimates of :math:`\log p(x)`, one for every datum, never without an error.

| estimator | bound | for |
|---|---|---|
| :func:`importance_sampling` | lower | a first look, and a guide that covers the posterior: see k-hat |
| :func:`ais` | lower | any model with continuous latents; the more temperatures, the tighter |
| :func:`bidirectional` | both | a certificate for ``ais``, on data simulated from the model |
| :func:`hmc` | upper | the paper's own, for up to about five latent dimensions |
| :func:`quadrature` | exact | up to three continuous latent dimensions |
| :func:`enumeration` | exact | discrete latents alone; all others sum discrete ones out |

All take any pair of Pyro programs that keeps the contract (:mod:`pyro_vae.traces`), in bounded memory, on the
device of the data, compiled where that pays; all but enumeration can be interrupted and resumed by a
``checkpoint``. :func:`compare` ranks models by paired differences, :func:`inference_gap` says what the guide
loses, :func:`average` is over models whose weights are random.
"""

from pyro_vae.marginal_likelihood.annealing import ais, bidirectional
from pyro_vae.marginal_likelihood.averaging import average
from pyro_vae.marginal_likelihood.comparison import Comparison, arviz_comparison, compare
from pyro_vae.marginal_likelihood.exact import enumeration, quadrature
from pyro_vae.marginal_likelihood.files import (
    load_estimates,
    load_estimates_by_data,
    merge_estimates,
    save_estimates,
)
from pyro_vae.marginal_likelihood.gap import InferenceGap, inference_gap
from pyro_vae.marginal_likelihood.importance import Bound, bits_per_dim, elbo, importance_sampling
from pyro_vae.marginal_likelihood.reciprocal import fit_kernel_density, fit_normal, hmc
from pyro_vae.marginal_likelihood.result import Diagnosis, EstimatesError, LogMarginal
from pyro_vae.marginal_likelihood.verdict import best_estimate, table, verdict

__all__ = [
    "Bound",
    "Comparison",
    "Diagnosis",
    "EstimatesError",
    "InferenceGap",
    "LogMarginal",
    "ais",
    "arviz_comparison",
    "average",
    "best_estimate",
    "bidirectional",
    "bits_per_dim",
    "compare",
    "elbo",
    "enumeration",
    "fit_kernel_density",
    "fit_normal",
    "hmc",
    "importance_sampling",
    "inference_gap",
    "load_estimates",
    "load_estimates_by_data",
    "merge_estimates",
    "quadrature",
    "save_estimates",
    "table",
    "verdict",
]
