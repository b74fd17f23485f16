"""Algorithms, one file each: how theta and phi move. Each has ``step(*batch) -> metrics``.

| algorithm | theta climbs | phi climbs |
|---|---|---|
| :class:`SVI` (AEVB) | a bound, at draws of the guide | the same bound, through the draws |
| :func:`WakeSleep` | log p(x, z), at draws of the guide | log q(z given x), at draws of the model |
| :class:`MCEM` | log p(x, z), at draws of the posterior | there is no guide |

:class:`PyroSVI` is ``pyro.infer.SVI``, compiled. :func:`WakeSleep` makes an ``SVI`` whose loss it is
(:class:`pyro_vae.objectives.WakeSleepPhases`), as reweighted wake-sleep is another one
(:class:`pyro_vae.objectives.ReweightedWakeSleep`).
"""

from pyro_vae.algorithms.mcem import MCEM
from pyro_vae.algorithms.pyro_svi import PyroSVI
from pyro_vae.algorithms.svi import SVI
from pyro_vae.algorithms.wake_sleep import WakeSleep

__all__ = ["MCEM", "SVI", "PyroSVI", "WakeSleep"]
