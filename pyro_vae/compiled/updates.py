"""One call of torch's fused kernels updates all parameters; the state stays in the optimisers.

SGD, Adagrad, Adam and AdamW of ``torch.optim`` have such kernels. Their state lives where it always does, so
``state_dict``, checkpoints and schedulers work as before; every other optimiser takes its own ``step``.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_STATES = {
    SGD: ("momentum_buffer",),
    Adagrad: ("sum", "step"),
    Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
}


def has_fused_update(optimizer: Optimizer) -> bool:
    """Whether :class:`FusedUpdate` does what this optimiser's next ``step`` would do."""
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    return (
        type(optimizer) in _STATES
        and len(set(params)) == len(params)  # one that is there twice is updated twice
        and not _has_hooks(optimizer)
        and not _is_wrapped(optimizer)
        and all(_is_ready(optimizer, group) for group in optimizer.param_groups)
    )


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_wrapped(optimizer: Optimizer) -> bool:
    """Whether somebody has put another ``step`` in its place; torch's schedulers do, to count."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def _is_ready(optimizer: Optimizer, group: dict) -> bool:
    """Of contiguous floats only, and after the first step, which makes the state (plain SGD has none)."""
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
    """The step of several optimisers in one call for all groups of equal settings.

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
            optimizer._opt_called = True  # what schedulers that are made later look for
        groups: dict[tuple, list] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if id(p) in position]
                if own:
                    key = (type(optimizer), own[0].device, own[0].dtype, str(_settings(group)))
                    groups.setdefault(key, []).append((optimizer, group, own))
        self._groups = []
        self.state: list[Tensor] = []
        for members in groups.values():
            own = [p for _, _, params in members for p in params]
            states = [optimizer.state.get(p, {}) for optimizer, _, params in members for p in params]
            columns = {
                name: [state[name] for state in states]
                for name in _STATES[type(members[0][0])]
                if (name != "momentum_buffer" or members[0][1]["momentum"])
                and all(isinstance(state.get(name), Tensor) for state in states)
            }
            steps = _share_steps(states, own[0].device) if "step" in columns else None
            if steps is not None:
                columns["step"] = [state["step"] for state in states]
            self.state += [tensor for column in columns.values() for tensor in column]
            index = [position[id(p)] for p in own]
            self._groups.append((type(members[0][0]), [m[1] for m in members], own, index, columns, steps))
        self._contents = self._content()

    def is_current(self, optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> bool:
        """False for other optimisers or parameters, and once an optimiser was changed.

        That is: the state of a parameter was replaced, as by ``load_state_dict``, it got or lost
        parameters or hooks, or settings other than the learning rate are not what they were.
        """
        now = self._content()
        return (
            len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and len(optimizers) == len(self._optimizers)
            and all(map(operator.is_, optimizers, self._optimizers))
            and len(now) == len(self._contents)
            and all(map(operator.is_, now, self._contents))
            and not any(map(_has_hooks, optimizers))
            and not any(map(_is_wrapped, optimizers))
            and all(group["lr"] == groups[0]["lr"] for _, groups, *_ in self._groups for group in groups[1:])
        )

    def _content(self) -> list:
        """States, parameters and their layout, and settings other than the learning rate."""
        found = [fact for param in self._params for fact in (param.dtype, param.is_contiguous())]
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                found += state.values()
            for group in optimizer.param_groups:
                found += group["params"]
                found += [value for name, value in group.items() if name not in ("params", "lr")]
        return found

    @property
    def settings(self) -> list[dict]:
        """Learning rates and all else that the optimisers' groups say."""
        return [_settings(groups[0]) for _, groups, *_ in self._groups]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Update the parameters in place."""
        for kind, (group, *_), params, index, columns, steps in self._groups:
            grads = [gradients[i] for i in index]
            common = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
            if steps is not None:
                steps.add_(1)
            if kind is SGD:
                torch._fused_sgd_(
                    params,
                    grads,
                    columns.get("momentum_buffer", []),
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    nesterov=group["nesterov"],
                    is_first_step=False,
                    **common,
                )
            elif kind is Adagrad:
                torch._fused_adagrad_(
                    params,
                    grads,
                    columns["sum"],
                    columns["step"],
                    lr_decay=group["lr_decay"],
                    eps=group["eps"],
                    **common,
                )
            else:
                decoupled = kind is AdamW or group.get("decoupled_weight_decay", False)
                (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
                    params,
                    grads,
                    columns["exp_avg"],
                    columns["exp_avg_sq"],
                    columns.get("max_exp_avg_sq", []),
                    columns["step"],
                    amsgrad=group["amsgrad"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    **common,
                )


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}


def _share_steps(states: Sequence[dict], device: torch.device) -> Tensor:
    """Let the step counters be views of one vector on the device, which takes one operation to raise."""
    steps = torch.stack([state["step"].to(device) for state in states])
    for state, step in zip(states, steps.unbind(), strict=True):
        state["step"] = step
    return steps
