r"""Full variational Bayes (Kingma & Welling 2013, appendix F): theta becomes a random variable.

Any pair p(x, z), q(z | x) turns into the pair

.. math:: p(\theta) \prod_{n=1}^N p(x_n, z_n \mid \theta), \qquad
          q(\theta) \prod_{n=1}^N q(z_n \mid x_n), \qquad p(\theta) = N(0, I),

whose q(theta) is normal, independent over weights. Weights are global sites, outside of the plate ``"data"``.
Of a minibatch of M data they count M / N times, so that the bound summed over a batch is M / N times an
unbiased estimate of the bound on the evidence of all data, equation (24),

.. math:: \sum_m L(x_m) - \frac{M}{N} KL(q(\theta) \| p(\theta)) .

phi, the parameters of the guide, are those of q(z | x) and the means and scales of q(theta); the model has
none that are trained.
"""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from pyro_vae.arguments import Count, Positive, checked
from pyro_vae.distributions import ScaleBounds
from pyro_vae.models.program import register


class BayesianModel(nn.Module):
    r""":math:`p(\theta) \prod_m p(x_m, z_m \mid \theta)`, sites ``theta.<name of the parameter>`` first.

    Args:
        template: The model whose parameters theta is; their values do not count.
        num_data: N, the number of training data.
    """

    def __init__(self, template: nn.Module, num_data: int) -> None:
        super().__init__()
        self.template = template.requires_grad_(False)
        self.num_data = num_data

    def forward(self, *batch: Tensor) -> None:
        """Sample the weights from N(0, I), then whatever the template samples."""
        theta = {}
        with poutine.scale(scale=len(batch[0]) / self.num_data):
            for name, value in self.template.named_parameters():
                prior = dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())
                drawn = pyro.sample(f"theta.{name}", prior)
                if drawn.numel() != value.numel():
                    raise ValueError(
                        "weights are drawn once for all data and samples: with num_particles leave "
                        "vectorize_particles out; for what takes a datum by itself, such as estimators of "
                        "log p(x), draw an ordinary pair by pyro_vae.draw(model, guide)"
                    )
                theta[name] = drawn.reshape(value.shape)  # Predictive puts axes of size 1 in front
        # The template is not to register weights that are draws.
        with pyro.settings.context(module_local_params=True):
            functional_call(self.template, theta, batch)


class BayesianGuide(nn.Module):
    r""":math:`q(\theta) \prod_m q(z_m \mid x_m)`.

    Args:
        guide: q(z | x).
        model: The model, for names and shapes of theta, and N; the means of q(theta) start at its template's
            values.
        scale: Standard deviations of q(theta) to start from.
        min_scale: Lower bound of the standard deviations.
        max_scale: Upper bound of the standard deviations.
    """

    def __init__(
        self,
        guide: nn.Module,
        model: BayesianModel,
        scale: float = 0.01,
        min_scale: float = 1e-4,
        max_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.guide = guide
        self.num_data = model.num_data
        self.scale = ScaleBounds(min_scale, max_scale)
        if not min_scale < scale < max_scale:
            raise ValueError(f"scale must lie between {min_scale} and {max_scale}, not at {scale}")
        named = dict(model.template.named_parameters())
        self.names = tuple(named)
        self.locs = nn.ParameterList(value.detach().clone() for value in named.values())
        self.log_variances = nn.ParameterList(
            torch.full_like(value, self.scale.log_variance(scale)) for value in named.values()
        )

    def posterior(self) -> dict[str, Distribution]:
        """q(theta) of every parameter of the model."""
        return {
            name: dist.Normal(loc, self.scale(log_variance)).to_event(loc.dim())
            for name, loc, log_variance in zip(self.names, self.locs, self.log_variances, strict=True)
        }

    def forward(self, *batch: Tensor) -> None:
        """Sample the weights, then whatever the guide of the latents samples."""
        register(self)
        with poutine.scale(scale=len(batch[0]) / self.num_data):
            for name, distribution in self.posterior().items():
                pyro.sample(f"theta.{name}", distribution)
        # Its parameters are registered already, as parts of this module.
        with pyro.settings.context(module_local_params=True):
            self.guide(*batch)

    @torch.no_grad()
    def to_arviz(self, num_draws: int = 1000) -> Any:
        """Draws of all weights in ArviZ' own type, with the group ``posterior``, one variable a parameter.

        Args:
            num_draws: All are in one chain; they are independent.
        """
        import arviz  # takes a second, and is needed here alone

        draws = {name: q.sample((1, num_draws)).cpu().numpy() for name, q in self.posterior().items()}
        return arviz.from_dict(posterior=draws)


@checked
def bayesian(
    model: nn.Module, guide: nn.Module, num_data: Count, *, scale: Positive = 0.01
) -> tuple[BayesianModel, BayesianGuide]:
    r"""The pair of full variational Bayes of any pair of modules; train it by ``SVI`` as any other.

    Use ``TraceMeanField_ELBO()``, which has :math:`KL(q(\theta) \| p(\theta))` in closed form, as equation
    (24) has. All data of a step share one draw of theta; ``num_particles`` draws several in turn. What takes
    a datum by itself, such as ``log_weights`` and estimators of log p(x), takes an ordinary pair:
    :func:`draw`.

    Args:
        model: p(x, z); copied. All of its parameters become random, with the prior N(0, I).
        guide: q(z | x); copied.
        num_data: N, the number of training data, by which minibatches weigh theta.
        scale: Standard deviations of q(theta) to start from; its means start at the model's parameters.

    Raises:
        TypeError: If model or guide is no module.
        ValueError: If ``num_data`` is below 1, the model has no parameters, or the scale is out of range.
    """
    if not list(model.parameters()):
        raise ValueError(f"the model {type(model).__name__} has no parameters that could become random")
    model, guide = copy.deepcopy((model, guide))  # together, for a VampPrior refers to the guide
    model = BayesianModel(model, num_data)
    return model, BayesianGuide(guide, model, scale)


@checked
@torch.no_grad()
def draw(model: BayesianModel, guide: BayesianGuide) -> tuple[nn.Module, nn.Module]:
    r"""An ordinary pair with :math:`\theta \sim q(\theta)`; the guide is the trained one itself.

    The mean of p(x) over such pairs is the predictive probability of new data
    (``marginal_likelihood.average``).

    Args:
        model: From :func:`bayesian`.
        guide: Its guide.
    """
    drawn, posterior = copy.deepcopy(model.template), guide.posterior()
    for name, parameter in drawn.named_parameters():
        parameter.copy_(posterior[name].sample())
    return drawn.requires_grad_(True), guide.guide
