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

from pyro_vae.distributions.base import Conditional as Conditional
from pyro_vae.distributions.base import Family as Family
from pyro_vae.distributions.base import ScaleBounds as ScaleBounds
from pyro_vae.distributions.base import SupportError as SupportError
from pyro_vae.distributions.base import Unconditional as Unconditional
from pyro_vae.distributions.base import base_distribution as base_distribution
from pyro_vae.distributions.base import bounds as bounds
from pyro_vae.distributions.base import check_support as check_support
from pyro_vae.distributions.base import is_point_mass as is_point_mass
from pyro_vae.distributions.base import outputs_of as outputs_of
from pyro_vae.distributions.base import same_support as same_support
from pyro_vae.distributions.base import soft_clamp as soft_clamp
from pyro_vae.distributions.codes import Codebook as Codebook
from pyro_vae.distributions.codes import CodePrior as CodePrior
from pyro_vae.distributions.codes import QuantizedPoint as QuantizedPoint
from pyro_vae.distributions.codes import perplexity as perplexity
from pyro_vae.distributions.columns import Columns as Columns
from pyro_vae.distributions.columns import Missing as Missing
from pyro_vae.distributions.columns import Observed as Observed
from pyro_vae.distributions.columns import scores_cross_entropy as scores_cross_entropy
from pyro_vae.distributions.continuous import DiagNormal as DiagNormal
from pyro_vae.distributions.continuous import FixedScaleNormal as FixedScaleNormal
from pyro_vae.distributions.continuous import FullNormal as FullNormal
from pyro_vae.distributions.continuous import Laplace as Laplace
from pyro_vae.distributions.continuous import LocationScale as LocationScale
from pyro_vae.distributions.continuous import LowRankNormal as LowRankNormal
from pyro_vae.distributions.continuous import SharedScaleNormal as SharedScaleNormal
from pyro_vae.distributions.continuous import StudentT as StudentT
from pyro_vae.distributions.counts import Categorical as Categorical
from pyro_vae.distributions.counts import NegativeBinomial as NegativeBinomial
from pyro_vae.distributions.counts import Poisson as Poisson
from pyro_vae.distributions.counts import ZeroInflatedNegativeBinomial as ZeroInflatedNegativeBinomial
from pyro_vae.distributions.flows import Flow as Flow
from pyro_vae.distributions.flows import affine_coupling as affine_coupling
from pyro_vae.distributions.flows import inverse_autoregressive as inverse_autoregressive
from pyro_vae.distributions.flows import masked_autoregressive as masked_autoregressive
from pyro_vae.distributions.flows import planar as planar
from pyro_vae.distributions.flows import spline_autoregressive as spline_autoregressive
from pyro_vae.distributions.flows import spline_coupling as spline_coupling
from pyro_vae.distributions.flows import sylvester as sylvester
from pyro_vae.distributions.grey import Bernoulli as Bernoulli
from pyro_vae.distributions.grey import BernoulliCrossEntropy as BernoulliCrossEntropy
from pyro_vae.distributions.grey import BetaBinomial as BetaBinomial
from pyro_vae.distributions.grey import ContinuousBernoulli as ContinuousBernoulli
from pyro_vae.distributions.grey import DiscretizedLogistic as DiscretizedLogistic
from pyro_vae.distributions.grey import GreyCategorical as GreyCategorical
from pyro_vae.distributions.posteriors import LogitNormal as LogitNormal
from pyro_vae.distributions.posteriors import NormalMixture as NormalMixture
from pyro_vae.distributions.posteriors import PointMass as PointMass
from pyro_vae.distributions.posteriors import ProjectedNormal as ProjectedNormal
from pyro_vae.distributions.priors import Flat as Flat
from pyro_vae.distributions.priors import MixtureOfNormals as MixtureOfNormals
from pyro_vae.distributions.priors import StandardNormal as StandardNormal
from pyro_vae.distributions.priors import UniformBox as UniformBox
from pyro_vae.distributions.priors import VampPrior as VampPrior
