"""Work of a call, counted instead of timed, so that what hangs on it is the same at every run."""

from typing import Any, NamedTuple

from torch.utils.flop_counter import flop_registry

from pyro_vae.compiled.private import TorchDispatchMode

# In seconds, fitted to 784-500-20 and five others on two cores with torch 2.14. Compiling takes 4 s where
# Inductor's cache has the graph, 7 to 10 s where it has not, and 30 s with an empty cache.
_SAVED_OF_OPERATOR, _SAVED_OF_FLOP = 18e-6, 2.7e-12
_PRICE, _PRICE_OF_OPERATOR = 5.0, 12e-3


class Work(NamedTuple):
    """Seconds that a compiled call saves, and that compiling takes, both about."""

    saved: float
    price: float


class Counting(TorchDispatchMode):
    """Context that counts operators of torch, and the floating-point operations of products in them."""

    def __init__(self) -> None:
        super().__init__()
        self._num_operators = 0
        self._num_flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._num_operators += 1
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self._num_flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def work(self) -> Work:
        """Return what was counted, in seconds."""
        saved = self._num_operators * _SAVED_OF_OPERATOR + self._num_flops * _SAVED_OF_FLOP
        return Work(saved, _PRICE + self._num_operators * _PRICE_OF_OPERATOR)
