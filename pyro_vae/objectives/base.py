"""Base of objectives, and how to get their value and metrics."""

import abc
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.arguments import Count, checked
from pyro_vae.distributions import base_distribution, is_point_mass
from pyro_vae.traces import (
    Program,
    factors,
    guide_distributions,
    parameters_in_the_store,
    training_step,
    unmoved,
)


def loss_and_metrics(
    objective: ELBO, model: Program, guide: Program, *batch: Tensor
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    r"""Return minus the objective summed over the batch, and metrics.

    Returns:
        The loss, differentiable, in nats; and detached metrics, among them ``elbo``: the bound itself in
        nats per datum, higher is better, whatever else the objective adds or weights. For a guide of point
        masses, such as an autoencoder's, it is ``log_joint``, :math:`\log p(x, z)` there, which bounds
        nothing. Auxiliary sites of the guide are reported under their names: a ``pyro.factor``, such as the
        commitment cost of a VQ-VAE, as nats per datum that the loss has besides the bound; an observed value
        as it is.
    """
    if isinstance(objective, Objective):
        with training_step():
            return objective.loss_and_metrics(model, guide, *batch)
    watch = _Watch(len(batch[0]))
    with training_step():
        loss = objective.differentiable_loss(model, watch(guide), *batch)
    factors = {name: torch.stack(runs).mean() for name, runs in watch.factors.items()}
    bound = -loss.detach() / len(batch[0]) + sum(factors.values())
    name = "log_joint" if watch.is_point_mass else "elbo"  # without a density there is no bound
    return loss, {name: bound, **factors, **watch.values}


class _Watch(Messenger):
    """Handler that notes a guide's factors, nats per datum, and the values that it reports."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.factors: dict[str, list[Tensor]] = {}  # one for each run
        self.values: dict[str, Tensor] = {}
        self.is_point_mass = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if not msg["is_observed"]:
            self.is_point_mass |= is_point_mass(msg["fn"])
        elif isinstance(base_distribution(msg["fn"]), dist.Unit):
            log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"]).detach()
            num_samples = log_prob.shape[-2] if log_prob.dim() > 1 else 1
            runs = self.factors.setdefault(msg["name"], [])
            runs.append(log_prob.sum() / (num_samples * self.num_data))
        elif msg["infer"].get("is_auxiliary"):
            self.values[msg["name"]] = msg["value"].detach().mean()


def check_reparameterised(guide: Program, *batch: Tensor) -> None:
    """Raise ``ValueError`` if draws have no gradient or the guide has factors (while Pyro validates)."""
    if pyro.settings.get("validate_poutine"):
        with unmoved(guide), torch.random.fork_rng(), torch.no_grad():
            sites = guide_distributions(guide, *batch)
            extra = factors(guide, *batch)
        if extra:
            raise ValueError(
                f"this objective would leave out the guide's factors ({', '.join(extra)}), such as the "
                "commitment cost of a VQ-VAE: train it by pyro.infer.Trace_ELBO()"
            )
        for name, distribution in sites.items():
            if not distribution.has_rsample:
                raise ValueError(
                    f"this objective needs draws that carry gradients; those of the guide's site {name!r} do "
                    "not: leave discrete sites out of the guide, so that they are summed over, or use "
                    "ReweightedWakeSleep"
                )


class Objective(ELBO, abc.ABC):
    """ELBO object with metrics beside its loss.

    Args:
        num_particles: Draws of z for every datum.
    """

    @checked
    def __init__(self, num_particles: Count = 1) -> None:
        super().__init__(
            num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )

    @abc.abstractmethod
    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return loss and metrics as :func:`loss_and_metrics`."""

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return minus the objective, summed over the batch, in nats."""
        with training_step():
            return self.loss_and_metrics(model, guide, *batch)[0]

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return ``differentiable_loss`` as a number (Pyro's ELBO interface)."""
        return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return the same, and accumulate gradients in the parameters (Pyro's ELBO interface)."""
        with parameters_in_the_store():
            loss = self.differentiable_loss(model, guide, *batch)
        loss.backward()
        return loss.item()

    def _get_trace(self, *_: Any) -> NoReturn:
        raise NotImplementedError("this objective has no traces of its own")


class Wrapper(Objective):
    """An objective built around another one, ``bound``."""

    def __init__(self, bound: ELBO | None = None) -> None:
        super().__init__()
        self.bound = Trace_ELBO() if bound is None else bound

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.bound._get_trace(model, guide, args, kwargs)
