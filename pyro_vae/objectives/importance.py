r"""Objectives that weigh several draws of every datum, :math:`w_k = p(x, z_k) / q(z_k \mid x)`."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, Finite, checked
from pyro_vae.objectives.base import Objective, check_reparameterised
from pyro_vae.traces import Program, draw_latents, draw_pair, log_guide, log_joint, log_weights


def log_mean_exp(log_weights: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"]:
    """Logarithm of the mean over samples."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


class ImportanceWeightedELBO(Objective):
    r"""The importance-weighted bound, :math:`E \log \frac1K \sum_k w_k \leq \log p(x)`.

    Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders*, 2016. It tightens as K grows, but the
    signal of its plain gradient by :math:`\phi` fades (Rainforth et al., *Tighter Variational Bounds are Not
    Necessarily Better*, 2018). With :math:`\tilde w_k = w_k / \sum_j w_j`, the gradients by :math:`\phi` are

    - ``"plain"``: :math:`\sum_k \tilde w_k \frac{d}{d\phi} \log w_k`, that of the estimate;
    - ``"dreg"``, doubly reparameterised: :math:`\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k}
      \frac{dz_k}{d\phi}`, unbiased, and with a signal that does not fade (Tucker et al., *Doubly
      Reparameterized Gradient Estimators for Monte Carlo Objectives*, 2019);
    - ``"stl"``, sticking the landing: :math:`\sum_k \tilde w_k \frac{\partial \log w_k}{\partial z_k}
      \frac{dz_k}{d\phi}`, whose variance vanishes where q is the posterior (Roeder, Wu & Duvenaud,
      *Sticking the Landing*, 2017). Unbiased for K = 1, where it is the ELBO's and the same as ``"dreg"``;
      biased for more.

    The gradient by :math:`\theta` is :math:`\sum_k \tilde w_k \frac{d}{d\theta} \log p(x, z_k)` in all
    three. The last two score draws under the guide a second time: for flows this takes their inverse.

    Args:
        num_particles: K, draws of every datum.
        gradient: One of the three.

    Metrics: ``iwae``, the bound, and ``elbo``, the mean of :math:`\log w`; nats per datum.

    Raises:
        ValueError: If there is no such gradient; while running, if the guide's draws carry none.
    """

    @checked
    def __init__(
        self, num_particles: Count = 50, gradient: Literal["plain", "stl", "dreg"] = "plain"
    ) -> None:
        super().__init__(num_particles)
        self.gradient = gradient

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        check_reparameterised(guide, *batch)
        if self.gradient == "plain":
            log_w = log_weights(model, guide, *batch, num_samples=self.num_particles)
        else:
            log_w = self._along_the_path(model, guide, *batch)
        bound = log_mean_exp(log_w)
        metrics = {"iwae": bound.mean().detach(), "elbo": log_w.mean().detach()}
        return -bound.sum(), metrics

    def _along_the_path(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> Float[Tensor, "samples batch"]:
        """Return log-weights whose gradient by the guide's parameters goes through the draws alone."""
        latents = draw_latents(guide, *batch, num_samples=self.num_particles)
        # Views: weights below change the gradient of what is scored, not of what later sites are drawn from.
        scored = {name: value.view_as(value) for name, value in latents.items()}
        log_q = log_guide(guide, scored, *batch)
        score = log_guide(guide, {name: value.detach() for name, value in latents.items()}, *batch)
        log_w = sum(log_joint(model, scored, *batch)) - (log_q - score + score.detach())
        if self.gradient == "dreg":
            weights = log_w.detach().softmax(0)
            for value in scored.values():
                if value.requires_grad:
                    factor = weights.reshape(*weights.shape, *[1] * (value.dim() - 2))
                    value.register_hook(lambda gradient, factor=factor: factor * gradient)
        return log_w


class RenyiELBO(Objective):
    r"""The variational Renyi bound, :math:`\frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}`.

    Li & Turner, *Renyi Divergence Variational Inference*, 2016. :math:`\alpha = 0` is the importance-weighted
    bound, :math:`\alpha = 1` the ELBO; the larger :math:`\alpha`, the more q seeks one mode. For
    :math:`\alpha < 0` and many draws it lies above log p(x). (``pyro.infer.RenyiELBO`` is the same without a
    ``differentiable_loss``.)

    Args:
        alpha: :math:`\alpha`.
        num_particles: K, draws of every datum.

    Metrics: ``renyi``, the bound, and ``elbo``, the mean of :math:`\log w`; nats per datum.
    """

    @checked
    def __init__(self, alpha: Finite = 0.5, num_particles: Count = 50) -> None:
        super().__init__(num_particles)
        self.alpha = alpha

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        check_reparameterised(guide, *batch)
        log_w = log_weights(model, guide, *batch, num_samples=self.num_particles)
        if self.alpha == 1:
            bound = log_w.mean(0)
        else:
            mean, order = log_w.mean(0), 1 - self.alpha
            exponent = order * (log_w - mean)
            # The logarithm of the mean exponential; near alpha = 1 that of a number near 1.
            log_mean = exponent.expm1().mean(0).log1p() if abs(order) < 1e-3 else log_mean_exp(exponent)
            bound = mean + log_mean / order
        return -bound.sum(), {"renyi": bound.mean().detach(), "elbo": log_w.mean().detach()}


class ReweightedWakeSleep(Objective):
    r"""Reweighted wake-sleep of every datum, with its wake phase for both programs.

    The gradients are :math:`\sum_k \tilde w_k \nabla_\theta \log p(x, z_k)` and :math:`\sum_k \tilde w_k
    \nabla_\phi \log q(z_k \mid x)` with :math:`\tilde w_k = w_k / \sum_j w_j`: the model climbs the
    importance-weighted bound, the guide descends an estimate of :math:`KL(p(z \mid x) \| q(z \mid x))`. Draws
    need no gradient, so they may be discrete. Bornschein & Bengio, *Reweighted Wake-Sleep*, 2015; Le et al.,
    *Revisiting Reweighted Wake-Sleep*, 2019. (``pyro.infer.ReweightedWakeSleep`` has one weight for the whole
    batch.) The loss is a surrogate: its gradients mean something, its value nothing.

    Args:
        num_particles: K, draws of every datum.

    Metrics: ``iwae``, the importance-weighted bound, and ``elbo``; nats per datum.
    """

    def __init__(self, num_particles: Count = 50) -> None:
        super().__init__(num_particles)

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""
        with torch.no_grad():
            latents = draw_pair(model, guide, *batch, num_samples=self.num_particles).latents
        log_p = sum(log_joint(model, latents, *batch))
        log_q = log_guide(guide, latents, *batch)
        log_w = (log_p - log_q).detach()
        loss = -(log_w.softmax(0) * (log_p + log_q)).sum()
        return loss, {"iwae": log_mean_exp(log_w).mean(), "elbo": log_w.mean()}
