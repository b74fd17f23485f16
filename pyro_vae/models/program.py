"""What every pair does before its first sample site: make its parameters known, and look at its data.

Two traps of Pyro are dealt with here. A plain ``nn.Module`` that never calls ``pyro.module`` trains nothing
under ``pyro.infer.SVI``, without an error; and one that calls it with a fixed name shares the parameters of
the first instance that used this name in the process. So each *instance* registers under a name of its own.
"""

import itertools
import weakref

import pyro
from torch import Tensor, nn

from pyro_vae.distributions import SupportError

_counter = itertools.count()
_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def register(module: nn.Module) -> None:
    """Put the module's parameters into Pyro's store, unless parameters are local to modules.

    Under ``pyro.settings.context(module_local_params=True)``, as in :class:`pyro_vae.SVI` and all estimators,
    parameters belong to the modules and to torch's optimisers, and the store stays empty. A deep copy is
    another instance, so it gets another name.
    """
    if not pyro.settings.get("module_local_params"):
        name = _names.setdefault(module, f"{type(module).__name__}_{next(_counter)}")
        pyro.module(name, module)


def validating() -> bool:
    """Whether Pyro is to check values (``pyro.enable_validation``, on by default).

    This asks Pyro's own switch: importing some libraries turns the one of torch's distributions off.
    """
    return pyro.settings.get("validate_poutine")


def check_data(x: Tensor, *, missing: bool = False) -> None:
    """Raise ``SupportError`` unless ``x`` holds finite floating-point numbers (or nan, if ``missing``)."""
    if not x.is_floating_point():
        raise SupportError(
            f"x holds {x.dtype}; programs take floating-point data. The x of a data split, and what "
            "pyro_vae.batches yields, are converted already; else use x.float()"
        )
    bad = int((x.isinf() if missing else ~x.isfinite()).sum())
    if bad:
        kind = "infinite" if missing else "nan or infinite"
        raise SupportError(
            f"x holds {bad} {kind} numbers of {x.numel()}: remove or fill them in"
            + ("" if missing else "; or, if nan says that a number is missing, vae(..., missing=True)")
        )
