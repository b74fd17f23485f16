r"""Monte Carlo EM without a guide (Kingma & Welling 2013, appendix E).

The expectation step draws :math:`z_n \sim p_\theta(z \mid x_n)` by Hamiltonian Monte Carlo, the maximisation
step climbs :math:`\log p_\theta(x_n, z_n)` in theta (Wei & Tanner, *A Monte Carlo Implementation of the EM
Algorithm*, 1990). Every training datum has one chain, which goes on where it was when the datum was last
seen: theta moves slowly, so that a chain that was in equilibrium nearly is. An iteration on a minibatch is
one trajectory of its chains and some updates at the draws. Nothing is amortised: the memory of the chains
grows with the data, and log p(x) of other data takes an estimator without a guide.
"""

import math
from typing import Any, Literal

import pyro
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pyro_vae.algorithms.svi import SVI
from pyro_vae.arguments import Count, Share, check, check_arguments, checked
from pyro_vae.compiled import CompiledFunction, Outputs
from pyro_vae.mcmc import hmc
from pyro_vae.objectives import MAP, Objective
from pyro_vae.traces import Program, at_unconstrained, draw_unconstrained, training_step

_FIRST_STEP_SIZE = 0.1
_ADAPTATION = 0.5  # of the logarithm of the step size, for acceptances that are 1 too high


class MCEM:
    """Trajectories of the data's chains, and updates of theta at their ends.

    Args:
        model: A Pyro program; an ``nn.Module`` that keeps the contract. Its discrete sites are summed out.
        optimizer: Any optimiser of ``torch.optim`` over its parameters.
        num_data: N, the number of training data, each of which gets a chain.
        weight_prior: Maximum a posteriori with a standard normal prior on the weights, as in the paper
            (:class:`~pyro_vae.objectives.MAP`), instead of maximum likelihood.
        num_leapfrog: Steps of a trajectory.
        target_acceptance: Acceptance to which the step size, the same for all data, is tuned all the time.
        num_updates: Updates of theta in each iteration, at the same draws.
        compile: See :class:`SVI`.

    Attributes:
        guide: None.
        chains: Unconstrained latents of all training data by site, ``(num_data, *event)``; empty before the
            first step.

    Raises:
        TypeError: As :class:`SVI`.
        ValueError: If a number is below 1.
    """

    guide = None

    @checked
    def __init__(
        self,
        model: Any,
        optimizer: Any,
        num_data: Count,
        *,
        weight_prior: bool = False,
        num_leapfrog: Count = 10,
        target_acceptance: Share = 0.9,
        num_updates: Count = 5,
        compile: bool | Literal["always"] = True,  # noqa: A002
    ) -> None:
        self.num_data = num_data
        self.num_leapfrog = num_leapfrog
        self.target_acceptance = target_acceptance
        self.num_updates = num_updates
        self.chains: hmc.Position = {}
        self._complete = _CompleteData()
        objective = MAP(num_data, self._complete) if weight_prior else self._complete
        self._updates = SVI(model, nn.Module(), optimizer, objective, compile=compile)
        self._graph = CompiledFunction(self._trajectories, roots=(model,), always=compile == "always")
        self._compile = compile

    @property
    def model(self) -> nn.Module:
        """p(x, z)."""
        return self._updates.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Optimiser of theta."""
        return self._updates.optimizer

    def step(self, *batch: Tensor) -> dict[str, Tensor]:
        r"""One iteration: a trajectory of the chains of a minibatch, then ``num_updates`` updates of theta.

        Args:
            *batch: The model's arguments, the first of them the data; and behind them the positions of these
                data among the training data, shape ``(batch,)``, every one at most once:
                ``batches(split, context=torch.arange(len(split)))`` yields such.

        Returns:
            ``log_joint``, :math:`\log p_\theta(x, z)` at the new draws before the updates, in nats per datum;
            ``acceptance``, of the trajectories; ``step_size``.

        Raises:
            SupportError, ValueError: On the first step, if the data do not suit the model, or the positions
                are none.
        """
        with training_step():
            return self._step(*batch)

    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        *arguments, index = batch
        if not self.chains:
            check_arguments(batch)
            check("the last argument, the positions of the data,", index, Tensor)
            self._make_chains(arguments, index)
        chains = {name: chain[index][None] for name, chain in self.chains.items()}
        inputs = chains, self._started[index], self._log_step_size.exp(), *arguments
        moved = self._graph(*inputs)[0] if self._compile else self._trajectories(*inputs)
        acceptance = moved["acceptance"]
        ends = [moved[f"end/{name}"] for name in self.chains]
        for chain, end in zip(self.chains.values(), ends, strict=True):
            chain[index] = end[0]
        self._started[index] = True
        updates = [self._updates.step(*arguments, *ends) for _ in range(self.num_updates)]
        metrics = {"acceptance": acceptance, "step_size": self._log_step_size.exp()}
        change = _ADAPTATION * (acceptance - self.target_acceptance)
        self._log_step_size = (self._log_step_size + change).clamp(max=hmc.LARGEST_LOG_STEP)
        return updates[0] | metrics

    def _make_chains(self, arguments: list[Tensor], index: Tensor) -> None:
        if not arguments or index.shape != arguments[0].shape[:1] or index.is_floating_point():
            raise ValueError(
                "the last argument of a step of MCEM must be the positions of its data among the training "
                "data, one whole number each: batches(split, context=torch.arange(len(split))) yields them"
            )
        if not 0 <= int(index.min()) <= int(index.max()) < self.num_data:
            raise ValueError(
                f"positions run from {int(index.min())} to {int(index.max())}, but num_data={self.num_data}"
            )
        x = arguments[0]
        self.chains = {
            name: u.new_zeros(self.num_data, *u.shape[2:])
            for name, u in _from_prior(self.model, *arguments).items()
        }
        self._complete.names = tuple(self.chains)
        self._started = torch.zeros(self.num_data, dtype=torch.bool, device=x.device)
        self._log_step_size = torch.tensor(math.log(_FIRST_STEP_SIZE), device=x.device)

    def _trajectories(
        self,
        chains: hmc.Position,
        started: Bool[Tensor, " batch"],
        step_size: Float[Tensor, ""],
        *arguments: Tensor,
    ) -> Outputs:
        """Move the chains, from where they were or else from draws of the prior."""

        def log_density(position: hmc.Position) -> hmc.Evaluation:
            with torch.enable_grad():
                position = {name: u.detach().requires_grad_() for name, u in position.items()}
                point = at_unconstrained(self.model, position, *arguments)
                value = sum(point.log_joint) + point.log_jacobian
                gradient = torch.autograd.grad(value.sum(), list(position.values()))
            return hmc.Evaluation(value.detach(), dict(zip(position, gradient, strict=True)), {})

        with torch.no_grad(), pyro.validation_enabled(False):
            start = {
                name: torch.where(started.reshape(-1, *(1,) * (u.dim() - 2)), chains[name], u)
                for name, u in _from_prior(self.model, *arguments).items()
            }
            step_sizes = hmc.jittered(step_size.expand(1, len(started)))
            state, info = hmc.step(log_density, hmc.init(log_density, start), step_sizes, self.num_leapfrog)
        ends = {f"end/{name}": u for name, u in state.position.items()}
        return {"acceptance": info.acceptance.mean(), **ends}

    def state_dict(self) -> dict:
        """Return the state of :meth:`SVI.state_dict`, and the chains."""
        state = self._updates.state_dict() | {"moves": self._graph.state_dict(), "chains": dict(self.chains)}
        if self.chains:
            state |= {"started": self._started, "log_step_size": self._log_step_size}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._updates.load_state_dict(state)
        self._graph.load_state_dict(state["moves"])
        device = next(self.model.parameters()).device
        self.chains = {name: chain.to(device) for name, chain in state["chains"].items()}
        self._complete.names = tuple(self.chains)
        if self.chains:
            self._started = state["started"].to(device)
            self._log_step_size = state["log_step_size"].to(device)

    def expect(self, num_steps: int | None) -> None:
        """See :meth:`SVI.expect`."""
        self._updates.expect(None if num_steps is None else num_steps * self.num_updates)
        self._graph.planned_calls = num_steps


def _from_prior(model: Program, *arguments: Tensor) -> hmc.Position:
    """Draws of the continuous latents from the prior, unconstrained, one of every datum."""
    with torch.no_grad():
        return draw_unconstrained(model, *arguments, num_samples=1)


class _CompleteData(Objective):
    r"""Minus :math:`\log p_\theta(x, z)` at given latents, which stand behind the model's arguments.

    Attributes:
        names: Sites of the latents.
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()

    def loss_and_metrics(
        self, model: Program, guide: Program, *batch: Tensor
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See ``objectives.loss_and_metrics``; positions are unconstrained."""
        count = len(batch) - len(self.names)
        position = dict(zip(self.names, batch[count:], strict=True))
        log_joint = sum(at_unconstrained(model, position, *batch[:count]).log_joint)
        return -log_joint.sum(), {"log_joint": log_joint.detach().mean()}
