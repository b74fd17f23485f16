"""``pyro.infer.SVI`` for programs written for Pyro's parameter store, compiled."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import Delta, Independent, MaskedDistribution, Unit, constraints
from pyro.infer import ELBO
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.utils import lazy_property

from pyro_vae.compiled import CaptureError, CompiledStep, NotCompiledWarning, Outputs
from pyro_vae.compiled.owners import is_users
from pyro_vae.traces import parameters_in_the_store, training_step


class PyroSVI(pyro.infer.SVI):
    """The drop-in for ``pyro.infer.SVI(model, guide, pyro.optim.Adam({...}), Trace_ELBO())``, compiled.

    Model and guide are any Pyro programs: functions with ``pyro.param`` and ``pyro.module``, bound methods,
    modules. Parameters stay in Pyro's store and their optimisers in ``optim``, where ``optim.get_state()``
    and ``pyro.get_param_store().save()`` find them. See :mod:`pyro_vae.compiled` for what can be captured.

    Args:
        model: The model.
        guide: The guide, with the same arguments.
        optim: An optimiser of ``pyro.optim``.
        loss: Loss as ``pyro.infer.SVI`` takes it; compiled if it is an ELBO object with
            ``differentiable_loss``, whose ``loss_and_grads`` is the library's.
        loss_and_grads: Function as in ``pyro.infer.SVI``, for a ``loss`` that is a function; runs eagerly.
        compile: Compile once that is worth the seconds it costs; ``"always"`` from the second step on, False
            never.

    Raises:
        TypeError: If the optimiser is something else.

    Warns:
        UserWarning: If ``pyro.module`` found other parameters of that name in the store, so that those of the
            module are not trained; once for every name.
        NotCompiledWarning: If the programs run eagerly although they were to be compiled.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        compile: bool | Literal["always"] = True,  # noqa: A002
        **kwargs: Any,
    ) -> None:
        if not isinstance(optim, PyroOptim):
            raise TypeError(
                f"optim must be one of pyro.optim, such as pyro.optim.Adam({{'lr': 1e-3}}), not {optim!r}; "
                "with an optimiser of torch.optim use pyro_vae.SVI"
            )
        super().__init__(model, guide, optim, loss, loss_and_grads, **kwargs)
        self._elbo = loss
        self._given = self.loss, self.loss_and_grads
        self._compile = compile
        self._checked: set[str] = set()  # names of sites
        self._store_names = _StoreNames()
        self._compiled = self._make_compiled()

    def _make_compiled(self) -> CompiledStep | None:
        if not self._compile:
            return None
        if (reason := _uncompiled(self._elbo)) is not None:
            warnings.warn(f"not compiled, running eagerly: {reason}", NotCompiledWarning, stacklevel=4)
            return None
        return CompiledStep(
            self._losses,
            (self.model, self.guide, self._elbo),
            self._optimizers,
            self._update,
            self._eager_step,
            always=self._compile == "always",
            traced_only=True,
        )

    def expect(self, num_steps: int) -> None:
        """Say how many steps are to come, by which it is decided whether compiling is worth it."""
        if self._compiled is not None:
            self._compiled.function.planned_calls = num_steps

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update; returns the loss before it as a number: minus the ELBO, summed over the batch, in nats.

        Values and parameters of distributions are checked against their supports and constraints as by Pyro,
        whose error is raised; on a CPU before an update, and where the loss is nan Pyro itself decides. One
        that is infinite, or nan without checks, updates nothing on a CPU once steps are compiled, unless all
        of its gradients are finite.
        """
        if self._compiled is not None and not self._compiled.is_of(self.model, self.guide, self._elbo):
            self._compiled = self._make_compiled()
        # Somebody may have set others.
        is_replaced = (self.loss, self.loss_and_grads) != self._given
        if self._compiled is None or is_replaced:
            with self._store_names:
                return super().step(*args, **kwargs)
        drawn = torch.get_rng_state()
        outputs = self._compiled.step(*args, **kwargs)
        loss = outputs["loss"].item()
        if math.isnan(loss) and math.isnan(outputs.get("inside", 1.0)):
            torch.set_rng_state(drawn)
            with torch.no_grad():
                self._elbo.loss(self.model, self.guide, *args, **kwargs)  # raises, if Pyro does
            torch.set_rng_state(drawn)
            checked = set(self._checked)
            self._checked.clear()
            loss = self._eager_step(*args, **kwargs)["loss"].item()
            if self._checked != checked:  # as when checks are off now
                self._compiled = self._make_compiled()
        return loss

    def _eager_step(self, *args: Any, **kwargs: Any) -> Outputs:
        with self._store_names, _Supports(self._checked):
            return {"loss": torch.as_tensor(super().step(*args, **kwargs))}

    def _losses(self, *args: Any, **kwargs: Any) -> Outputs:
        inside: list[Tensor] = []
        looks = _Supports(self._checked, inside)
        with self._store_names, looks, parameters_in_the_store(), training_step():
            try:
                loss = self._elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
            except ValueError as error:
                if "cannot be differentiated" not in str(error):  # TraceEnum_ELBO's words, as in Pyro 1.9.2
                    raise
                raise CaptureError("there is nothing to train: the ELBO depends on no parameter") from error
        loss = torch.as_tensor(loss)
        if not self._checked:
            return {"loss": loss}
        is_inside = torch.stack([~loss.isnan(), *(each.to(loss.device) for each in inside)]).all()
        weight = torch.where(is_inside, torch.ones_like(loss), math.nan).detach()
        return {"loss": loss * weight, "inside": weight}

    def _optimizers(self) -> list[Any] | None:
        own = self.optim.optim_objs
        params = self._compiled.function.trainable
        is_pyros = type(self.optim).__call__ in (PyroOptim.__call__, PyroLRScheduler.__call__)
        if not is_pyros or any(self.optim.grad_clip.values()) or any(p not in own for p in params):
            return None
        return [getattr(own[p], "optimizer", own[p]) for p in params]  # schedulers have one

    def _update(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        self.optim(params)
        pyro.infer.util.zero_grads(params)


def _uncompiled(loss: Any) -> str | None:
    """Why such a loss is not compiled: ``pyro.infer.SVI`` asks its ``loss_and_grads``, a graph does not."""
    kind = type(loss)
    if not (isinstance(loss, ELBO) and hasattr(loss, "differentiable_loss")):
        return f"{kind.__name__} has no differentiable_loss"
    homes = {
        name: next(base for base in kind.__mro__ if name in vars(base)).__module__
        for name in ("loss_and_grads", "differentiable_loss")
    }
    own = {name: name in vars(loss) or is_users(home) for name, home in homes.items()}
    if own["loss_and_grads"]:
        return f"{kind.__name__} has a loss_and_grads of its own, which a graph would not ask"
    if own["differentiable_loss"] and not homes["loss_and_grads"].startswith("pyro_vae."):
        return f"{kind.__name__} has a differentiable_loss that its loss_and_grads does not ask"
    return None


class _Supports(Messenger):
    """Notes which sites Pyro checks while it runs eagerly; then looks whether what it checks is right."""

    def __init__(self, checked: set[str], inside: list[Tensor] | None = None) -> None:
        super().__init__()
        self._checked, self._inside = checked, inside
        self._given: set[str] = set()  # sites that have not drawn their value themselves

    def _pyro_sample(self, msg: Any) -> None:
        (self._given.discard if msg["value"] is None else self._given.add)(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while isinstance(fn, Independent | MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, Delta | Unit) or not hasattr(fn, "_validate_args"):  # of these any value is scored
            return
        if self._inside is None and fn._validate_args:
            self._checked.add(msg["name"])
        if self._inside is not None and msg["name"] in self._checked:
            self._inside += _checks(fn, msg["value"] if msg["name"] in self._given else None)


def _checks(fn: Any, value: Tensor | None) -> Iterator[Tensor]:
    """Return True if parameters lie in their constraints, and a value in the support, if that is known."""
    for name, constraint in fn.arg_constraints.items():
        is_set = name in vars(fn) or not isinstance(getattr(type(fn), name, None), lazy_property)
        if is_set and not constraints.is_dependent(constraint) and not _is_all(constraint):
            yield constraint.check(getattr(fn, name)).all()
    with contextlib.suppress(NotImplementedError):  # it has no support
        if value is not None and not _is_all(fn.support):
            yield fn.support.check(value).all()


def _is_all(constraint: Any) -> bool:
    """Return True if all real numbers are right."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


class _StoreNames(Messenger):
    """Looks whether ``pyro.module`` finds the module's parameters in the store, or others of its name."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = set()

    def _pyro_post_param(self, msg: Any) -> None:
        name, given = msg["name"], msg["args"][1] if len(msg["args"]) > 1 else None
        if "$$$" not in name or not isinstance(given, nn.Parameter) or name in self._known:
            return
        value = msg["value"]
        if (value.unconstrained() if hasattr(value, "unconstrained") else value) is not given:
            self._known.add(name)
            module, parameter = name.split("$$$", 1)
            warnings.warn(
                f"pyro.module({module!r}, ...) found another parameter {parameter!r} in Pyro's store, as "
                "when a cell of a notebook is run again, a store was loaded or a layer replaced: the "
                "optimiser has the store's, and the module's is used and not trained. Call "
                "pyro.clear_param_store() before, give the module another name, or load by "
                "pyro.module(..., update_module_params=True)",
                UserWarning,
                stacklevel=2,
            )
