r"""Objectives: what is maximised, as Pyro ELBO objects.

``differentiable_loss(model, guide, *batch)`` is *minus* the objective, summed over the batch, in nats. Pyro's
own objects are used where they are right:

- ``pyro.infer.Trace_ELBO`` is the paper's estimator A,
  :math:`\log p(x, z) - \log q(z \mid x)` at draws of z (Kingma & Welling 2013, equation 6);
- ``pyro.infer.TraceMeanField_ELBO`` is its estimator B,
  :math:`\log p(x \mid z) - KL(q(z \mid x) \| p(z))` with the divergence in closed form (equation 7);
  where Pyro knows no closed form, as for a mixture prior, it falls back on A for this site.

The objects here wrap one of those. They are ELBO objects again, so ``pyro.infer.SVI`` takes them too.
"""

import abc
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.traces import Program


def loss_and_metrics(
    objective: ELBO, model: Program, guide: Program, *batch: Tensor
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Minus the objective summed over the batch, and what to report of it.

    Returns:
        The loss, differentiable, in nats; and detached metrics, among them ``elbo``: the bound itself in
        nats per datum, higher is better, whatever else the objective adds or weights.
    """
    if isinstance(objective, Objective):
        return objective.loss_and_metrics(model, guide, *batch)
    loss = objective.differentiable_loss(model, guide, *batch)
    return loss, {"elbo": -loss.detach() / len(batch[0])}


class Objective(ELBO, abc.ABC):
    """An objective built around another one, ``bound``."""

    def __init__(self, bound: ELBO | None = None) -> None:
        super().__init__()
        self.bound = Trace_ELBO() if bound is None else bound

    @abc.abstractmethod
    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See :func:`loss_and_metrics`."""

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Minus the objective, summed over the batch, in nats."""
        return self.loss_and_metrics(model, guide, *batch)[0]

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """The value of ``differentiable_loss`` as a number (Pyro's ELBO interface)."""
        return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """The same, with gradients accumulated in the parameters (Pyro's ELBO interface)."""
        loss = self.differentiable_loss(model, guide, *batch)
        loss.backward()
        return loss.item()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.bound._get_trace(model, guide, args, kwargs)


class MAP(Objective):
    r"""A bound plus a standard normal log-prior on the networks' weights, as in the paper's experiments.

    The objective for N data is :math:`\sum_n L(x_n) + \log N(w; 0, I)`; a minibatch of M data contributes
    :math:`\sum_{m} L(x_m) + \frac{M}{N} \log N(w; 0, I)`. The weights *w* are the parameters of both programs
    whose name ends in ``weight``: those of linear and convolutional layers, not biases, not a prior's own
    parameters (Kingma & Welling 2013, section 5; which weights, from the authors' code).

    Args:
        num_data: N, the number of training data. (A magic weight-decay number would hide it.)
        bound: The ELBO object it is added to.

    Metrics: those of ``bound``, and ``log_weight_prior`` :math:`= \log N(w; 0, I)` in nats.
    """

    def __init__(self, num_data: int, bound: ELBO | None = None) -> None:
        super().__init__(bound)
        self.num_data = num_data

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See :func:`loss_and_metrics`."""
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


class BetaELBO(Objective):
    r"""The bound with its divergence weighted, :math:`E_q \log p(x \mid z) - \beta KL(q(z \mid x) \| p(z))`.

    For :math:`\beta < 1` this is not a bound on log p(x); it is how training is warmed up (Bowman et al.,
    *Generating Sentences from a Continuous Space*, 2015). The metric ``elbo`` is that of :math:`\beta = 1`;
    while the two differ it is estimated by draws of its own.

    Args:
        beta: Weight of every latent site; may be set between steps, see ``training.KLWarmup``.
        bound: The ELBO object whose latent sites are weighted.
    """

    def __init__(self, beta: float = 1.0, bound: ELBO | None = None) -> None:
        super().__init__(bound)
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
        """See :func:`loss_and_metrics`."""
        if self._is_bound:
            return loss_and_metrics(self.bound, model, guide, *batch)
        with _ScaleLatents(self._weight):
            loss, _ = loss_and_metrics(self.bound, model, guide, *batch)
        with torch.no_grad():
            _, metrics = loss_and_metrics(self.bound, model, guide, *batch)
        return loss, metrics


class _ScaleLatents(Messenger):
    """Scales the log-probability of every site that is not observed, in model and guide alike."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.factor = scale

    def _pyro_sample(self, msg: dict) -> None:
        # Replayed sites count as latent: only data given by obs= are observed.
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.factor
