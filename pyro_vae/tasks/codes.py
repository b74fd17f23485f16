"""Uses of codes and densities: strange data, and points between data."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.arguments import Count, checked
from pyro_vae.latents import along, posterior_mean, straight
from pyro_vae.latents.regularity import Curve
from pyro_vae.marginal_likelihood import importance_sampling
from pyro_vae.traces import Program, decode, unmoved


class AnomalyScore(NamedTuple):
    r"""Strangeness of data to a model.

    Attributes:
        score: :math:`-\log p(x)`, nats: higher is stranger.
        std_error: Monte Carlo error.
        rank: Share of the reference data that are at least as strange; nan without any.
    """

    score: Float[Tensor, " batch"]
    std_error: Float[Tensor, " batch"]
    rank: Float[Tensor, " batch"]


@checked
def anomaly_score(
    model: Program,
    guide: Program,
    *batch: Tensor,
    reference: Tensor | tuple[Tensor, ...] | None = None,
    num_samples: Count = 1000,
    progress: bool = True,
) -> AnomalyScore:
    r"""Estimate :math:`-\log p(x)` by importance sampling, and how many ordinary data are as strange.

    A low density is not the same as being of another kind: simple images of another data set may have a
    *higher* density than those that a model was trained on (Nalisnick et al., *Do Deep Generative Models Know
    What They Don't Know?*, 2019).

    Args:
        model: p(x, z).
        guide: q(z | x).
        *batch: Arguments of both programs, first the data.
        reference: Ordinary data that were not trained on, or all arguments of the programs for them.
        num_samples: Importance samples for every datum.
        progress: Show a progress bar.
    """
    settings = {"num_samples": num_samples, "progress": progress}
    found = importance_sampling(model, guide, *batch, **settings)
    rank = torch.full_like(found.values, math.nan)
    if reference is not None:
        others = (reference,) if isinstance(reference, Tensor) else reference
        ordinary = importance_sampling(model, guide, *others, **settings).values.sort().values
        rank = torch.searchsorted(ordinary, found.values, right=True).to(found.values) / len(ordinary)
    return AnomalyScore(-found.values, found.std_error, rank)


@checked
@torch.no_grad()
def interpolate(
    model: Program,
    guide: Program,
    first: Float[Tensor, "batch data"],
    second: Tensor,
    *context: Tensor,
    num_steps: int = 10,
    path: Curve = straight,
) -> Float[Tensor, "steps batch data"]:
    """Decode points between the codes of two data, both included.

    Args:
        model: p(x, z), with the latent site ``z``.
        guide: q(z | x), whose means are the codes.
        first: Data to start from.
        second: Data to end at, as many; shape ``(batch, data)``.
        *context: Further arguments of both programs, the same all the way.
        num_steps: Points of every path, at least 2.
        path: ``latents.straight``, or ``latents.spherical`` for codes under N(0, I).

    Raises:
        ValueError: If there are not as many of both, or fewer than two steps.
    """
    with unmoved(model, guide):
        codes = posterior_mean(guide, first, *context), posterior_mean(guide, second, *context)
        return decode(model, {"z": along(path, *codes, num_steps)}, first, *context)


@checked
@torch.no_grad()
def mix(
    model: Program, guide: Program, x: Float[Tensor, "batch data"], weights: Tensor
) -> Float[Tensor, "mixes data"]:
    """Decode weighted sums of the codes of data; each row of weights, ``(mixes, batch)``, should sum to 1.

    Pairs with a context are not for this: no sum of codes says which context a mix has.

    Rows such as (1, -1, 1) do arithmetic: the first without what the second has, with what the third has.

    Raises:
        ValueError: If a row has not one finite weight for every datum.
    """
    if weights.dim() != 2 or weights.shape[1] != len(x) or not weights.isfinite().all():
        raise ValueError(
            f"weights must have a row for every mix, of one finite number for each of the {len(x)} data; "
            f"their shape is {tuple(weights.shape)}, and {int((~weights.isfinite()).sum())} are not finite"
        )
    codes = posterior_mean(guide, x)
    codes = weights.to(codes) @ codes
    return decode(model, {"z": codes.unsqueeze(0)}, x[:1].expand(len(codes), -1)).squeeze(0)
