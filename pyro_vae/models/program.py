"""The start of every program, before its first sample site: parameters are made known, and data looked at.

Two traps of Pyro are dealt with here. A plain ``nn.Module`` that never calls ``pyro.module`` trains nothing
under ``pyro.infer.SVI``, without an error; and one that calls it with a fixed name shares the parameters of
the first instance that used this name in the process. So each *instance* registers under a name of its own.
"""

import itertools
import weakref

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import check
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
    """Return True if Pyro is to check values (``pyro.enable_validation``, on by default).

    This asks Pyro's own switch: importing some libraries turns the one of torch's distributions off.
    """
    return pyro.settings.get("validate_poutine")


def _check_dtype(name: str, value: Tensor, wanted: torch.dtype) -> None:
    """Raise ``SupportError`` unless they are numbers of this type, as which nothing need be rounded."""
    if value.dtype == wanted and wanted.is_floating_point:
        return
    wanted = wanted if wanted.is_floating_point else torch.get_default_dtype()
    if not value.is_complex() and not torch.equal(value.to(wanted).double(), value.double()):
        way = f"{name}.double(), model.double() and guide.double(), or numbers that {wanted} does not round"
    else:
        way = f"{name}.to({wanted})"
    raise SupportError(
        f"{name} holds {value.dtype}, but the programs take {wanted}, as their weights: use {way}. The x of "
        "a data split, and what pyro_vae.batches yields, have the type that the data set was made with"
    )


def check_inputs(module: nn.Module, x: Tensor, c: Tensor | None = None, *, missing: bool = False) -> None:
    """Raise ``SupportError`` unless ``x`` is a batch of finite numbers of the type of the parameters.

    If ``missing``, they may be nan. A context ``c`` must have as many rows.
    """
    check("x", x, Tensor)
    check("c", c, Tensor | None)
    if x.dim() < 2 or len(x) == 0:
        raise SupportError(
            f"x has shape {tuple(x.shape)}; programs take a batch of at least one datum, (data, numbers of a "
            "datum): a single datum x is the batch x[None]"
        )
    if c is not None and (c.dim() != 2 or len(c) != len(x)):
        raise SupportError(
            f"c has shape {tuple(c.shape)}, but a context is one row of numbers for each of {len(x)} data"
        )
    parameter = next(module.parameters(), x)
    for name, value in ("x", x), ("c", c):
        if value is not None and (value.is_floating_point() or name == "x"):
            _check_dtype(name, value, parameter.dtype)
    bad = int((x.isinf() if missing else ~x.isfinite()).sum())
    if bad:
        kind = "infinite" if missing else "nan or infinite"
        raise SupportError(
            f"x holds {bad} {kind} numbers of {x.numel()}: remove or fill them in"
            + ("" if missing else "; or, if nan says that a number is missing, vae(..., missing=True)")
        )


def check_rows(x: Tensor, posterior: Distribution) -> None:
    """Raise ``SupportError`` if the posterior has more than one code for a datum."""
    if len(posterior.batch_shape) > 1:
        raise SupportError(
            f"x has shape {tuple(x.shape)}, and the posterior makes {tuple(posterior.batch_shape)} codes of "
            "it: a datum is one row of numbers, x.flatten(1)"
        )
