"""The wake-sleep algorithm: both phases in one step (:mod:`pyro_vae.objectives.wake_sleep`)."""

from typing import Any, Literal

from pyro_vae.algorithms.svi import SVI
from pyro_vae.arguments import Count, checked
from pyro_vae.objectives import MAP, WakeSleepPhases


@checked
def WakeSleep(  # noqa: N802  (called as the other algorithms are)
    model: Any,
    guide: Any,
    optimizer: Any,
    *,
    num_data: Count | None = None,
    compile: bool | Literal["always"] = True,  # noqa: A002
) -> SVI:
    r"""``SVI`` whose loss has the gradients of both phases (:class:`~pyro_vae.objectives.WakeSleepPhases`).

    Args:
        model: A Pyro program; an ``nn.Module`` that keeps the contract.
        guide: Another one, for q(z | x).
        optimizer: Any optimiser of ``torch.optim`` over the parameters of both.
        num_data: N, the number of training data, for maximum a posteriori with a standard normal prior on the
            weights of both programs, as in the paper (:class:`~pyro_vae.objectives.MAP`); by default maximum
            likelihood.
        compile: See :class:`SVI`.

    Raises:
        TypeError: As :class:`SVI`.
    """
    phases = WakeSleepPhases()
    return SVI(
        model, guide, optimizer, phases if num_data is None else MAP(num_data, phases), compile=compile
    )
