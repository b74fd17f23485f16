r"""Stochastic variational inference: gradient ascent on a bound in :math:`\theta` and :math:`\phi` at once.

With an amortised guide and :class:`pyro.infer.Trace_ELBO` or :class:`pyro.infer.TraceMeanField_ELBO` this is
Auto-Encoding Variational Bayes, algorithm 1 of Kingma & Welling 2013: draw a minibatch and noise, estimate
the gradient of the bound, update. It differs from ``pyro.infer.SVI`` in using one torch optimiser for all
parameters, which stay in their modules, and in checking values on the first step only.
"""

import contextlib
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_vae.objectives import loss_and_metrics
from pyro_vae.traces import local_parameters


class SVI:
    """One gradient step on an objective for a pair of Pyro programs.

    Args:
        model: A Pyro program; an ``nn.Module`` that keeps the contract.
        guide: The same, for q(z | x).
        optimizer: Any optimiser of ``torch.optim`` over the parameters of both (or of one, to keep the
            other as it is).
        loss: A Pyro ELBO object, from ``pyro.infer`` or :mod:`pyro_vae.objectives`; its ``num_particles`` is
            the paper's L.

    Raises:
        TypeError: If one of them is something else.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        optimizer: Any,
        loss: Any = None,
    ) -> None:
        for program in (model, guide):
            if not isinstance(program, nn.Module):
                raise TypeError(
                    f"model and guide must be modules, not {program!r}: put the parameters into an "
                    "nn.Module, where torch's optimiser sees them, or use pyro.infer.SVI"
                )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be one of torch.optim over parameters, not {optimizer!r}")
        if loss is not None and not hasattr(loss, "differentiable_loss"):
            raise TypeError(f"loss must be an ELBO object, such as pyro.infer.Trace_ELBO(), not {loss!r}")
        self.model = model
        self.guide = guide
        self.optimizer = optimizer
        self.loss = Trace_ELBO() if loss is None else loss
        self._validate = True

    def step(self, *batch: Tensor) -> dict[str, Tensor]:
        """One update.

        Args:
            *batch: Arguments of both programs; the first is the data.

        Returns:
            Metrics as they were before the update, detached and still on the device, in nats per datum:
            ``elbo``, the bound itself, and what else the objective reports.

        Raises:
            SupportError, ValueError: On the first step, if the data do not suit the programs, or a program
                has a ``pyro.param`` that the optimiser does not see.
        """
        self.optimizer.zero_grad()
        with (
            local_parameters(self.model, self.guide),
            pyro.validation_enabled(self._validate),
            poutine.trace(param_only=True) if self._validate else contextlib.nullcontext() as parameters,
        ):
            loss, metrics = loss_and_metrics(self.loss, self.model, self.guide, *batch)
        if parameters is not None:
            self._check_store(parameters.trace)
        if loss.device.type == "cpu" and not bool(torch.isfinite(loss)):
            return metrics  # without an update: whoever looks at them finds the parameters that led here
        loss.backward()
        self.optimizer.step()
        self._validate = False
        return metrics

    def _check_store(self, trace: poutine.Trace) -> None:
        """Parameters of the store that nobody would train are an error, not a surprise."""
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        known |= {id(parameter) for module in (self.model, self.guide) for parameter in module.parameters()}
        for name in trace.param_nodes:
            value = trace.nodes[name]["value"]
            if id(value.unconstrained() if hasattr(value, "unconstrained") else value) not in known:
                raise ValueError(
                    f"parameter {name!r} lives in Pyro's store, where the optimiser does not see it: make it "
                    "an nn.Parameter of the module, or use pyro.infer.SVI"
                )

    def state_dict(self) -> dict:
        """Parameters and optimiser state: tensors, numbers and strings only."""
        return {
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])
        self.optimizer.load_state_dict(state["optimizer"])
