"""Bounds with terms that are weighted, bounded, or added."""

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.arguments import Count, Weight, checked
from pyro_vae.objectives.base import Objective, Wrapper, check_reparameterised, loss_and_metrics
from pyro_vae.traces import Program, kl_by_dimension


class MAP(Wrapper):
    r"""A bound plus a standard normal log-prior on the networks' weights, as in the paper's experiments.

    The objective for N data is :math:`\sum_n L(x_n) + \log N(w; 0, I)`; a minibatch of M data contributes
    :math:`\sum_{m} L(x_m) + \frac{M}{N} \log N(w; 0, I)`. The weights *w* are the parameters of both programs
    whose name ends in ``weight``: those of linear and convolutional layers (of a flow's, too), not biases,
    nor the means and scales of a prior (Kingma & Welling 2013, section 5; which weights, from the authors'
    code).

    Args:
        num_data: N, the number of training data. (A magic weight-decay number would hide it.)
        bound: The ELBO object it is added to.

    Metrics: those of ``bound``, and ``log_weight_prior`` :math:`= \log N(w; 0, I)` in nats.
    """

    @checked
    def __init__(self, num_data: Count, bound: ELBO | None = None) -> None:
        super().__init__(bound)
        self.num_data = num_data

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        for program in (model, guide):
            if not isinstance(program, nn.Module):
                raise TypeError(f"MAP looks for weights in modules, and {program!r} is none")
        loss, metrics = loss_and_metrics(self.bound, model, guide, *batch)
        log_prior = sum(
            torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(parameter).sum()
            for module in (model, guide)
            for name, parameter in module.named_parameters()
            if name.endswith("weight")
        )
        metrics["log_weight_prior"] = torch.as_tensor(log_prior, device=loss.device).detach()
        return loss - len(batch[0]) / self.num_data * log_prior, metrics


class BetaELBO(Wrapper):
    r"""The bound with its divergence weighted, :math:`E_q \log p(x \mid z) - \beta KL(q(z \mid x) \| p(z))`.

    For :math:`\beta < 1` this is not a bound on log p(x); it is how training is warmed up (Bowman et al.,
    *Generating Sentences from a Continuous Space*, 2015). The metric ``elbo`` is that of :math:`\beta = 1`;
    while the two differ it is estimated by draws of its own.

    Args:
        beta: Weight of every latent site; may be set between steps, see ``training.KLWarmup``.
        bound: The ELBO object of Pyro whose latent sites are weighted.
    """

    @checked
    def __init__(self, beta: Weight = 1.0, bound: ELBO | None = None) -> None:
        super().__init__(bound)
        if isinstance(bound, Objective):
            raise TypeError(
                f"BetaELBO weights the latent sites of Pyro's own bounds, such as Trace_ELBO, and "
                f"{type(bound).__name__} has terms of its own: weight those of Trace_ELBO"
            )
        # A tensor, changed in place: steps that were compiled go on with the new value.
        self._weight = torch.ones((), dtype=torch.float64)
        self.beta = beta

    @property
    def beta(self) -> float:
        """Weight of every latent site."""
        return self._weight.item()

    @beta.setter
    def beta(self, value: float) -> None:
        if value < 0:
            raise ValueError(f"beta must not be negative: {value}")
        self._weight.fill_(value)
        self._is_bound = value == 1

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        if self._is_bound:
            return loss_and_metrics(self.bound, model, guide, *batch)
        with _ScaleLatents(self._weight):
            loss, _ = loss_and_metrics(self.bound, model, guide, *batch)
        with torch.no_grad():
            _, metrics = loss_and_metrics(self.bound, model, guide, *batch)
        return loss, metrics


class _ScaleLatents(Messenger):
    """Handler that scales the log-probability of every site that is not observed, in both programs."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.factor = scale

    def _pyro_sample(self, msg: dict) -> None:
        # Replayed sites count as latent: only data given by obs= are observed.
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.factor


class FreeBitsELBO(Objective):
    r"""The bound with a KL term that costs nothing below a threshold: no dimension gains by being unused.

    .. math:: E_q \log p(x \mid z) - \sum_j \max\Big(\lambda,\ \frac1M \sum_m KL_j(x_m)\Big)

    with :math:`KL_j` the divergence of dimension j (of the whole site, where prior or posterior are not
    independent over dimensions), in closed form where torch has one and at draws else; Kingma et al.,
    *Improving Variational Inference with Inverse Autoregressive Flow*, 2016, appendix C.8. The metric
    ``elbo`` is the bound itself.

    Args:
        free_nats: :math:`\lambda`, nats a dimension.
        num_particles: Draws of z for every datum.

    Raises:
        ValueError: If ``free_nats`` is negative; while running, if the guide's draws carry no gradients.
    """

    @checked
    def __init__(self, free_nats: Weight = 0.5, num_particles: Count = 1) -> None:
        super().__init__(num_particles)
        self.free_nats = free_nats

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        check_reparameterised(guide, *batch)
        log_likelihood, kl = kl_by_dimension(model, guide, *batch, num_samples=self.num_particles)
        means = torch.cat([site.flatten(end_dim=1).mean(0) for site in kl.values()])
        fit = log_likelihood.mean()
        loss = len(batch[0]) * (means.clamp(min=self.free_nats).sum() - fit)
        return loss, {"elbo": (fit - means.sum()).detach()}
