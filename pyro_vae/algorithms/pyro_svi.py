"""``pyro.infer.SVI`` for programs written for Pyro's parameter store, compiled."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.compiled import CompiledStep, NotCompiledWarning, Outputs


class PyroSVI(pyro.infer.SVI):
    """The drop-in for ``pyro.infer.SVI(model, guide, pyro.optim.Adam({...}), Trace_ELBO())``, compiled.

    Model and guide are any Pyro programs: functions with ``pyro.param`` and ``pyro.module``, bound methods,
    modules. Parameters stay in Pyro's store and their optimisers in ``optim``, where ``optim.get_state()``
    and ``pyro.get_param_store().save()`` find them. See :mod:`pyro_vae.compiled` for what can be captured.

    Args:
        model: The model.
        guide: The guide, with the same arguments.
        optim: An optimiser of ``pyro.optim``.
        loss: What ``pyro.infer.SVI`` takes; compiled if it is an ELBO object with ``differentiable_loss``.
        compile: Compile once that is worth the seconds it costs; ``"always"`` from the second step on, False
            never.

    Raises:
        TypeError: If the optimiser is something else.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        *,
        compile: bool | Literal["always"] = True,  # noqa: A002
    ) -> None:
        if not isinstance(optim, PyroOptim):
            raise TypeError(
                f"optim must be one of pyro.optim, such as pyro.optim.Adam({{'lr': 1e-3}}), not {optim!r}; "
                "with an optimiser of torch.optim use pyro_vae.SVI"
            )
        super().__init__(model, guide, optim, loss)
        self._elbo = loss
        self._compile = compile
        self._compiled = self._make_compiled()
        self._is_first = True

    def _make_compiled(self) -> CompiledStep | None:
        if not self._compile:
            return None
        if not (isinstance(self._elbo, ELBO) and hasattr(self._elbo, "differentiable_loss")):
            warnings.warn(
                f"not compiled, running eagerly: {type(self._elbo).__name__} has no differentiable_loss",
                NotCompiledWarning,
                stacklevel=3,
            )
            return None
        return CompiledStep(
            self._losses,
            (self.model, self.guide, self._elbo),
            self._optimizers,
            self._update,
            self._eager_step,
            always=self._compile == "always",
        )

    def step(self, *args: Any, **kwargs: Any) -> float | Tensor:
        """One update; returns the loss before it: minus the ELBO, summed over the batch, in nats.

        From the second step on it is a tensor that has not been looked at yet; ``float()`` does. Values are
        checked as long as steps are eager, and a loss that is nan or infinite then updates nothing on a CPU.
        """
        if self._compiled is not None and not self._compiled.is_of(self.model, self.guide, self._elbo):
            self._compiled = self._make_compiled()
        if self._is_first or self._compiled is None:
            self._is_first = False  # makes the parameters and their optimisers, and checks the programs
            return super().step(*args, **kwargs)
        return self._compiled.step(*args, **kwargs)["loss"]

    def _eager_step(self, *args: Any, **kwargs: Any) -> Outputs:
        return {"loss": torch.as_tensor(super().step(*args, **kwargs))}

    def _losses(self, *args: Any, **kwargs: Any) -> Outputs:
        with pyro.validation_enabled(False):
            loss = self._elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        return {"loss": torch.as_tensor(loss)}

    def _optimizers(self) -> list[Any] | None:
        own = self.optim.optim_objs
        params = self._compiled.function.trainable
        if any(self.optim.grad_clip.values()) or any(p not in own for p in params):
            return None
        return [getattr(own[p], "optimizer", own[p]) for p in params]  # schedulers have one

    def _update(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        self.optim(params)
        pyro.infer.util.zero_grads(params)
