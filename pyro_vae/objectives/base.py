"""What an objective is, and how its value and metrics are asked for."""

import abc
from typing import Any, NoReturn

import pyro
import torch
from jaxtyping import Float
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.traces import Program, guide_distributions, parameters_in_the_store


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


def check_reparameterised(guide: Program, *batch: Tensor) -> None:
    """Raise ``ValueError`` if draws of the guide carry no gradient (while Pyro validates)."""
    if pyro.settings.get("validate_poutine"):
        with torch.random.fork_rng(), torch.no_grad():
            sites = guide_distributions(guide, *batch)
        for name, distribution in sites.items():
            if not distribution.has_rsample:
                raise ValueError(
                    f"this objective needs draws that carry gradients; those of the guide's site {name!r} do "
                    "not: leave discrete sites out of the guide, so that they are summed over, or use "
                    "ReweightedWakeSleep"
                )


class Objective(ELBO, abc.ABC):
    """An ELBO object of ours: a loss, and metrics beside it.

    Args:
        num_particles: Draws of z for every datum.
    """

    def __init__(self, num_particles: int = 1) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}")
        super().__init__(
            num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )

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
