r"""Densities: modules whose ``forward`` returns a Pyro distribution.

There is one type for every density, and three roles. A *prior* :math:`p(z)` takes nothing; a *likelihood*
:math:`p(x \mid z)` and a *posterior* :math:`q(z \mid x)` are :class:`Conditional` densities: a network
computes the parameters :math:`\eta` and a :class:`Family` turns them into a distribution,

.. math:: p(x \mid c) = \mathrm{family}(x;\ \eta = \mathrm{net}(c)) .

A family of which nothing is a condition is :class:`Unconditional`, so every family over real numbers is a
prior, a likelihood and a posterior.

Parameters live in the module (``.to``, ``state_dict`` and optimisers see them); densities live in the
short-lived distribution (``log_prob``, ``rsample`` and the registry of KL divergences see them). The event is
the datum, always one axis here, so ``batch_shape`` is that of the plates and nothing else.
"""

from pyro_vae.distributions.base import (
    Conditional,
    Family,
    ScaleBounds,
    SupportError,
    Unconditional,
    base_distribution,
    bounds,
    check_support,
    is_point_mass,
    outputs_of,
    same_support,
    soft_clamp,
)
from pyro_vae.distributions.codes import Codebook, CodePrior, QuantizedPoint, perplexity
from pyro_vae.distributions.columns import Columns, Missing, Observed, scores_cross_entropy
from pyro_vae.distributions.continuous import (
    DiagNormal,
    FixedScaleNormal,
    FullNormal,
    Laplace,
    LowRankNormal,
    SharedScaleNormal,
    StudentT,
)
from pyro_vae.distributions.counts import (
    Categorical,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from pyro_vae.distributions.flows import (
    Flow,
    affine_coupling,
    inverse_autoregressive,
    masked_autoregressive,
    planar,
    spline_autoregressive,
    spline_coupling,
    sylvester,
)
from pyro_vae.distributions.grey import (
    Bernoulli,
    BernoulliCrossEntropy,
    BetaBinomial,
    ContinuousBernoulli,
    DiscretizedLogistic,
    GreyCategorical,
)
from pyro_vae.distributions.posteriors import LogitNormal, NormalMixture, PointMass, ProjectedNormal
from pyro_vae.distributions.priors import Flat, MixtureOfNormals, StandardNormal, UniformBox, VampPrior

__all__ = [
    "Bernoulli",
    "BernoulliCrossEntropy",
    "BetaBinomial",
    "Categorical",
    "CodePrior",
    "Codebook",
    "Columns",
    "Conditional",
    "ContinuousBernoulli",
    "DiagNormal",
    "DiscretizedLogistic",
    "Family",
    "FixedScaleNormal",
    "Flat",
    "Flow",
    "FullNormal",
    "GreyCategorical",
    "Laplace",
    "LogitNormal",
    "LowRankNormal",
    "Missing",
    "MixtureOfNormals",
    "NegativeBinomial",
    "NormalMixture",
    "Observed",
    "PointMass",
    "Poisson",
    "ProjectedNormal",
    "QuantizedPoint",
    "ScaleBounds",
    "SharedScaleNormal",
    "StandardNormal",
    "StudentT",
    "SupportError",
    "Unconditional",
    "UniformBox",
    "VampPrior",
    "ZeroInflatedNegativeBinomial",
    "affine_coupling",
    "base_distribution",
    "bounds",
    "check_support",
    "inverse_autoregressive",
    "is_point_mass",
    "masked_autoregressive",
    "outputs_of",
    "perplexity",
    "planar",
    "same_support",
    "scores_cross_entropy",
    "soft_clamp",
    "spline_autoregressive",
    "spline_coupling",
    "sylvester",
]
