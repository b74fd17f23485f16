"""Private names that several modules need, as of torch 2.14, Pyro 1.9.2 and Python 3.13.

Each is here because nothing public tells the same. Those that one module alone needs stand at its top:
:mod:`~pyro_vae.compiled.inductor` and :mod:`~pyro_vae.compiled.updates`.
"""
# ruff: noqa: F401 (names for others)

import random

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK  # active handlers
from torch import Tensor, nn
from torch._C import _len_torch_function_stack as num_function_modes
from torch._C._dynamo.guards import TensorGuards  # compares layouts of many tensors in microseconds
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx  # the tracer
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils import _pytree as pytree  # as make_fx and Inductor flatten arguments
from torch.utils._device import DeviceContext  # of torch.set_default_device, the only harmless mode
from torch.utils._python_dispatch import TorchDispatchMode

PYTHONS_GENERATOR = random._inst  # what functions of the module draw from
PARAMETERS = ("_parameters", "_buffers")  # dicts of a module, which the public methods copy
MODULE_CONTAINERS = (*PARAMETERS, "_modules", "_pyro_params", "_pyro_samples")
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MODULE_INTERNALS = set(vars(nn.Module())) - {"training"}
HOOKS_OF_ALL_MODULES = tuple(
    vars(nn.modules.module)[f"_global_{name}_hooks"] for name in ("forward", "forward_pre", "backward")
)
# Inside of a trace: checks for nan in hooks of the backward pass, where no mode of torch is on.
PYROS_CHECKS = ("pyro.util.torch_isnan", "pyro.util.torch_isinf")
SUMS_OF_PYRO = "pyro.infer.util"  # where terms of probability 0 are left out


def stored() -> dict[str, Tensor]:
    """Return Pyro's unconstrained parameters; its public methods make new ones at every call."""
    return pyro.get_param_store()._params


def own_tensors(module: nn.Module) -> list[Tensor | None]:
    """Return parameters and buffers of a module itself."""
    return [*module._parameters.values(), *module._buffers.values()]


def version(tensor: Tensor) -> int:
    """Return the number of changes in place so far; 0 where torch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def memory(tensor: Tensor) -> int:
    """Return what tells memory of a tensor without values from that of others."""
    return tensor.untyped_storage()._cdata


def has_gradient_hook(tensor: Tensor) -> bool:
    """Return True if somebody looks at the gradient of a tensor or changes it."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def mark_parameter(fake: Tensor, tensor: Tensor) -> None:
    """Let a tensor without values be to ``isinstance`` what the tensor is that it stands for."""
    fake._is_param = isinstance(tensor, nn.Parameter)


def default_generator(device: torch.device) -> torch.Generator:
    """Return what a GPU draws from by default."""
    return torch.cuda.default_generators[device.index]
