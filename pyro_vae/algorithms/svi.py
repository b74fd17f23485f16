r"""Stochastic variational inference: gradient ascent on a bound in :math:`\theta` and :math:`\phi` at once.

With an amortised guide and :class:`pyro.infer.Trace_ELBO` or :class:`pyro.infer.TraceMeanField_ELBO` this is
Auto-Encoding Variational Bayes, algorithm 1 of Kingma & Welling 2013: draw a minibatch and noise, estimate
the gradient of the bound, update. It differs from ``pyro.infer.SVI`` in using one torch optimiser for all
parameters, which stay in their modules, in checking values on the first step only, and in running long
trainings as compiled graphs.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.arguments import check_arguments, checked, found
from pyro_vae.compiled import CompiledStep, Survey, can_update
from pyro_vae.objectives import loss_and_metrics
from pyro_vae.traces import local_parameters, made_for_the_store, modules_of


class _Observing(Messenger):
    """Notes which of two modules observes something, to tell model and guide that were swapped."""

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.programs = model, guide
        self.running: list[nn.Module] = []
        self.ran: set[int] = set()
        self.sampled: set[int] = set()
        self.observed: set[int] = set()
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Observing":
        for program in self.programs:
            self.hooks += [
                program.register_forward_pre_hook(lambda module, _: self._begin(module)),
                program.register_forward_hook(lambda *_: self.running.remove(_[0])),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def _begin(self, module: nn.Module) -> None:
        self.running.append(module)
        self.ran.add(id(module))

    def _pyro_sample(self, message: dict) -> None:
        if self.running:
            self.sampled.add(id(self.running[-1]))
            if message["is_observed"]:
                self.observed.add(id(self.running[-1]))

    def check(self) -> None:
        """Raise ``ValueError`` if the model samples nothing, or the guide alone observes."""
        model, guide = self.programs
        if id(model) in self.ran and id(model) not in self.sampled:
            raise ValueError(
                f"the model ({type(model).__name__}) has no pyro.sample site, so that there is nothing to "
                "infer: a model is a Pyro program, such as vae(...) makes, not a network alone"
            )
        if model is not guide and id(guide) in self.observed and id(model) not in self.observed:
            raise ValueError(
                f"the model ({type(model).__name__}) observes nothing and the guide ({type(guide).__name__}) "
                "does: they are swapped; the model comes first, as in SVI(model, guide, ...)"
            )


class SVI:
    """One gradient step on an objective for a pair of Pyro programs.

    Args:
        model: A Pyro program; an ``nn.Module`` that keeps the contract.
        guide: Another one, for q(z | x).
        optimizer: Any optimiser of ``torch.optim`` over the parameters of both (or of one, to keep the
            other as it is).
        loss: A Pyro ELBO object, from ``pyro.infer`` or :mod:`pyro_vae.objectives`; its ``num_particles`` is
            the paper's L.
        compile: Run the step as one compiled graph (:mod:`pyro_vae.compiled`) once that is worth the seconds
            it costs; ``"always"`` from the second step on, False never. The numbers drawn are the same, and
            the parameters agree to rounding; ``grad`` of parameters is None after a compiled step.

    Raises:
        TypeError: If one of them is something else.
    """

    @checked
    def __init__(
        self,
        model: Any,
        guide: Any,
        optimizer: Any,
        loss: Any = None,
        *,
        compile: bool | Literal["always"] = True,  # noqa: A002
    ) -> None:
        for program in (model, guide):
            if not isinstance(program, nn.Module):
                raise TypeError(
                    f"model and guide must be modules, not {found(program)}: put the parameters into an "
                    "nn.Module, where torch's optimiser sees them, or use pyro_vae.PyroSVI"
                )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be one of torch.optim over parameters, such as "
                f"torch.optim.Adam([*model.parameters(), *guide.parameters()]), not {found(optimizer)}"
                + "; those of pyro.optim go with pyro_vae.PyroSVI"
                * isinstance(optimizer, PyroOptim)
            )
        if loss is not None and (isinstance(loss, type) or not hasattr(loss, "differentiable_loss")):
            raise TypeError(
                f"loss must be an ELBO object, such as pyro.infer.Trace_ELBO(), not {found(loss)}"
            )
        self._check_moves(optimizer, model, guide, loss)
        self.model = model
        self.guide = guide
        self.optimizer = optimizer
        self.loss = Trace_ELBO() if loss is None else loss
        self._validate = True
        self._known_parts: list[Any] = []
        self._compile = compile
        self._compiled = self._make_compiled()

    @staticmethod
    def _check_moves(optimizer: torch.optim.Optimizer, *roots: Any) -> None:
        """Raise ``ValueError`` if the optimiser has parameters of something else only."""
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        reached = (p for module in Survey(roots).modules for p in module.parameters())
        if moved.isdisjoint(map(id, reached)):
            raise ValueError(
                "the optimizer moves no parameter of model or guide, so that nothing would be trained: make "
                "it of theirs, torch.optim.Adam([*model.parameters(), *guide.parameters()])"
            )

    def _make_compiled(self) -> CompiledStep | None:
        if not self._compile:
            return None
        return CompiledStep(
            self._metrics,
            (self.model, self.guide, self.loss),
            self._optimizers,
            self._update_by,
            self._eager_step,
            always=self._compile == "always",
            clears_gradients=True,
        )

    @property
    def _current(self) -> CompiledStep | None:
        """Compiled step of the present model, guide and loss."""
        if self._compiled is not None and not self._compiled.is_of(self.model, self.guide, self.loss):
            self._compiled = self._make_compiled()
        return self._compiled

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
        compiled = self._current
        metrics = (compiled.step if compiled else self._eager_step)(*batch)
        metrics.pop("loss")
        return metrics

    def steps(self, batches: Any) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, ...]]]:
        """``step`` for every batch of an epoch.

        On a GPU, with ``COMPILED_CUDA_GRAPHS=1`` in the environment, several in one launch once compiled.

        Args:
            batches: Minibatches that are drawn by operations of torch on the device, such as
                :func:`pyro_vae.batches`: ``indices()`` are the positions of an epoch's data,
                ``draw(index)`` makes arguments of both programs of them, and ``generator`` is where it
                takes random numbers from.

        Yields:
            Metrics of one or several steps, a vector for each, and a batch of as many data as theirs.
        """
        compiled = self._current
        if compiled is None:
            for batch in batches:
                yield {name: value[None] for name, value in self.step(*batch).items()}, batch
            return
        taken = compiled.steps(self.step, batches.draw, batches.indices(), [batches.generator])
        for metrics, batch in taken:
            metrics.pop("loss", None)
            yield metrics, batch

    def _metrics(self, *batch: Tensor) -> dict[str, Tensor]:
        if self._validate:
            return self._first_metrics(*batch)
        with self._local(), pyro.validation_enabled(False):
            loss, metrics = loss_and_metrics(self.loss, self.model, self.guide, *batch)
        return {"loss": loss, **metrics}

    def _local(self) -> contextlib.AbstractContextManager:
        parts = [*self.model.modules(), *self.guide.modules(), self.loss]
        if parts != self._known_parts:  # what they reach is looked for once, for it takes 3 ms
            self._known_parts = parts
            self._in_the_store = made_for_the_store(self.model, self.guide, self.loss)
        return local_parameters(in_the_store=self._in_the_store)

    def _first_metrics(self, *batch: Tensor) -> dict[str, Tensor]:
        check_arguments(batch)
        with (
            self._local(),
            pyro.validation_enabled(True),
            poutine.trace(param_only=True) as parameters,
            _Observing(self.model, self.guide) as observing,
        ):
            loss, metrics = loss_and_metrics(self.loss, self.model, self.guide, *batch)
        observing.check()
        self._check_store(parameters.trace)
        self._validate = False
        return {"loss": loss, **metrics}

    def _eager_step(self, *batch: Tensor) -> dict[str, Tensor]:
        metrics = self._metrics(*batch)
        self.optimizer.zero_grad()
        metrics["loss"].backward()
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if can_update(metrics, gradients):
            self.optimizer.step()
        return metrics

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def _update_by(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.optimizer.zero_grad()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        self.optimizer.step()

    def _check_store(self, trace: poutine.Trace) -> None:
        """Parameters of the store that nobody would train are an error, not a surprise."""
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        modules = (self.model, self.guide, *modules_of(self.loss))  # a loss may have a kernel
        known |= {id(parameter) for module in modules for parameter in module.parameters()}
        for name in trace.param_nodes:
            value = trace.nodes[name]["value"]
            if id(value.unconstrained() if hasattr(value, "unconstrained") else value) not in known:
                raise ValueError(
                    f"parameter {name!r} lives in Pyro's store, where the optimiser does not see it: make it "
                    "an nn.Parameter of the module, or use pyro_vae.PyroSVI"
                )

    def state_dict(self) -> dict:
        """Parameters, optimiser state, and what is compiled: tensors, numbers and strings only."""
        return {
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "compiled": self._compiled and self._compiled.function.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._compiled is not None and state.get("compiled"):
            self._compiled.function.load_state_dict(state["compiled"])

    def expect(self, num_steps: int | None) -> None:
        """Say how many steps are to come, by which it is decided whether compiling is worth it.

        Args:
            num_steps: None if nobody knows: as many as there were, then.
        """
        if self._compiled is not None:
            self._compiled.function.planned_calls = num_steps
