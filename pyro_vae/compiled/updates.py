"""One call of torch's fused kernels updates all parameters; the state stays in the optimisers.

SGD, Adagrad, Adam and AdamW of ``torch.optim`` have such kernels. Their state lives where it always does, so
``state_dict``, checkpoints and schedulers work as before; every other optimiser takes its own ``step``.
"""

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
# Kernels are private, as of torch 2.14: the public step() costs ten times as much as they do. With each the
# state that it takes of a parameter, and the settings that it takes from a group, besides those of all.
_KERNELS: dict[type, tuple] = {
    SGD: (torch._fused_sgd_, ("momentum_buffer",), ("momentum", "dampening", "nesterov")),
    Adagrad: (torch._fused_adagrad_, ("sum", "step"), ("lr_decay", "eps")),
    Adam: (torch._fused_adam_, _MOMENTS, ("amsgrad", "eps")),
    AdamW: (torch._fused_adamw_, _MOMENTS, ("amsgrad", "eps")),
}


def has_fused_update(optimizer: Optimizer) -> bool:
    """Return True if :class:`FusedUpdate` does what this optimiser's next ``step`` would do."""
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    return (
        type(optimizer) in _KERNELS
        and len(set(params)) == len(params)  # one that is there twice is updated twice
        and not _has_hooks(optimizer)
        and not _is_wrapped(optimizer)
        and all(_is_ready(optimizer, group) for group in optimizer.param_groups)
    )


def _has_hooks(optimizer: Optimizer) -> bool:
    # Private, as of torch 2.14: a public step() calls them, the kernels do not.
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_wrapped(optimizer: Optimizer) -> bool:
    """Return True if somebody has put another ``step`` in its place; torch's schedulers do, to count."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def _is_ready(optimizer: Optimizer, group: dict) -> bool:
    """Return True for contiguous floats, after the first step, which makes the state (plain SGD has none)."""
    plain = type(optimizer) is SGD and not group["momentum"]
    settings = [group.get("differentiable"), *map(torch.is_tensor, _settings(group).values())]
    return not any(settings) and all(
        p.is_floating_point()
        and p.is_contiguous()
        and p.device.type in ("cpu", "cuda")
        and (plain or any(map(torch.is_tensor, optimizer.state.get(p, {}).values())))
        for p in group["params"]
        if p.requires_grad
    )


class FusedUpdate:
    """Step of several optimisers in one call for all groups of equal settings.

    Args:
        optimizers: Each has taken a step before, so that its state exists.
        params: Parameters with gradients, in the order of the gradients that will come.

    Attributes:
        state: Tensors that an update changes, besides the parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> None:
        self._params = params
        position = {id(param): i for i, param in enumerate(params)}
        self._optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer._opt_called = True  # private, as of torch 2.14: later schedulers would warn
        groups: dict[tuple, list] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if id(p) in position]
                if own:
                    key = (type(optimizer), own[0].device, own[0].dtype, str(_settings(group)))
                    groups.setdefault(key, []).append((optimizer, group, own))
        self._groups = []
        self.state: list[Tensor] = []
        for (kind, *_), members in groups.items():
            fused, names, settings = _KERNELS[kind]
            group = members[0][1]
            own = [p for _, _, params in members for p in params]
            states = [optimizer.state.get(p, {}) for optimizer, _, params in members for p in params]
            columns = {
                name: [state[name] for state in states]
                for name in names
                if (name != "momentum_buffer" or group["momentum"])
                and all(isinstance(state.get(name), Tensor) for state in states)
            }
            steps = _share_steps(states, own[0].device) if "step" in columns else None
            if steps is not None:
                columns["step"] = [state["step"] for state in states]
            self.state += [tensor for column in columns.values() for tensor in column]
            if kind is Adam and group.get("decoupled_weight_decay", False):
                fused = torch._fused_adamw_
            fixed = {name: group[name] for name in ("weight_decay", "maximize", *settings)}
            if "betas" in group:
                fixed["beta1"], fixed["beta2"] = group["betas"]
            if kind is SGD:
                fixed["is_first_step"] = False
            lists = [columns.get(name, []) for name in names]
            update = functools.partial(fused, own, **fixed)
            index = [position[id(p)] for p in own]
            self._groups.append(([m[1] for m in members], update, index, lists, steps))
        self._contents = self._content()

    def is_current(self, optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> bool:
        """Return False for other optimisers or parameters, and once an optimiser was changed.

        That is: the state of a parameter was replaced, as by ``load_state_dict``, it got or lost
        parameters or hooks, or settings other than the learning rate are not what they were.
        """
        return (
            _are_same(params, self._params)
            and _are_same(optimizers, self._optimizers)
            and _are_same(self._content(), self._contents)
            and not any(map(_has_hooks, optimizers))
            and not any(map(_is_wrapped, optimizers))
            and all(group["lr"] == groups[0]["lr"] for groups, *_ in self._groups for group in groups[1:])
        )

    def _content(self) -> list:
        """Return states, parameters and their layout, and settings other than the learning rate."""
        found = [fact for param in self._params for fact in (param.dtype, param.is_contiguous())]
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                found += state.values()
            for group in optimizer.param_groups:
                found += group["params"]
                found += [value for name, value in group.items() if name not in ("params", "lr")]
                found += group.get("betas", ())  # which may be a list
        return found

    @property
    def settings(self) -> list[dict]:
        """Return learning rates and all else that the optimisers' groups say."""
        return [_settings(groups[0]) for groups, *_ in self._groups]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Update the parameters in place."""
        for (group, *_), update, index, lists, steps in self._groups:
            if steps is not None:
                steps.add_(1)
            update([gradients[i] for i in index], *lists, lr=group["lr"])


def _are_same(now: Sequence[object], then: Sequence[object]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}


def _share_steps(states: Sequence[dict], device: torch.device) -> Tensor:
    """Let the step counters be views of one vector on the device, which takes one operation to raise."""
    steps = torch.stack([state["step"].to(device) for state in states])
    for state, step in zip(states, steps.unbind(), strict=True):
        state["step"] = step
    return steps
