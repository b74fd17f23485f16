r"""Completeness and continuity: can a latent space be drawn from, and walked through?

*Completeness*: draws from the prior decode to something like the data. *Continuity*: latents that are near
each other decode to data that are. Both are claimed of VAEs and denied of autoencoders; here they
are measured. An autoencoder has no prior, so its codes get one afterwards: a box, a normal, or a mixture.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.traces import unmoved

Decode = Callable[[Tensor], Tensor]  # latents (*, latent) -> E[x | z] (*, data)
Classify = Callable[[Tensor], Tensor]  # data (batch, data) -> probabilities (batch, classes)
Curve = Callable[[Tensor, Tensor, Tensor], Tensor]  # start, end, t in [0, 1] -> point

_ROWS = 1024


# ---------------------------------------------------------------------------- densities of codes


def fitted_box(codes: Float[Tensor, "data latent"]) -> Distribution:
    """Fit a uniform distribution: the smallest box that holds all codes."""
    low, high = codes.detach().aminmax(dim=0)
    return dist.Uniform(low, high, validate_args=False).to_event(1)


def fitted_normal(codes: Float[Tensor, "data latent"]) -> Distribution:
    """Fit a normal: mean and covariance matrix of the codes."""
    codes = codes.detach()
    jitter = 1e-6 * codes.var() * torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
    return dist.MultivariateNormal(codes.mean(0), torch.atleast_2d(codes.T.cov()) + jitter)


def fitted_mixture(codes: Float[Tensor, "data latent"], components: int = 10, seed: int = 0) -> Distribution:
    """Fit a mixture of normals with full covariance matrices, by scikit-learn's expectation maximisation.

    Raises:
        ValueError: If there are fewer codes than components.
    """
    if not 1 <= components <= len(codes):
        raise ValueError(f"components must be from 1 to the {len(codes)} codes, not {components}")
    fitted = GaussianMixture(components, random_state=seed).fit(codes.detach().cpu().double().numpy())

    def like(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values).to(codes)

    normals = dist.MultivariateNormal(like(fitted.means_), like(fitted.covariances_))
    return dist.MixtureSameFamily(dist.Categorical(like(fitted.weights_)), normals)


# ---------------------------------------------------------------------------- completeness


def nearest_distances(x: Float[Tensor, "batch data"], data: Float[Tensor, "data2 data"]) -> Tensor:
    """Return the Euclidean distance of every x from the nearest datum, shape ``(batch,)``."""
    return torch.cat([torch.cdist(part, data).amin(1) for part in x.split(_ROWS)])


class Completeness(NamedTuple):
    """Shares of decoded samples.

    Attributes:
        sure: Share that a classifier of real data is sure of.
        close: Share that is as near to a training datum as real data are.
        both: Share for which both are true.
    """

    sure: float
    close: float
    both: float


@torch.no_grad()
def completeness(
    decoded: Float[Tensor, "batch data"],
    classify: Classify,
    data: Float[Tensor, "data2 data"],
    limit: float,
    *,
    confidence: float = 0.9,
) -> Completeness:
    """Measure the share of decoded samples that is like the data.

    Args:
        decoded: E[x | z] of latents from the prior.
        classify: Function from data to probabilities of classes, trained on real data.
        data: Training data.
        limit: Distance from the nearest training datum up to which a sample is close, such as the 95 %
            quantile of held-out data: ``nearest_distances(held_out, data).quantile(0.95)``.
        confidence: Least probability of a class of which the classifier is sure.

    Raises:
        ValueError: If the classifier gives something else, such as logits.
    """
    with unmoved(classify):
        probabilities = torch.cat([classify(part) for part in decoded.split(_ROWS)])
    sums = probabilities.sum(1)
    if not (probabilities >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError(
            "classify must give probabilities, which are not negative and sum to 1 for every datum; of "
            "logits take softmax(-1)"
        )
    is_sure = probabilities.amax(1) >= confidence
    is_close = nearest_distances(decoded, data) <= limit
    return Completeness(*(c.double().mean().item() for c in (is_sure, is_close, is_sure & is_close)))


# ---------------------------------------------------------------------------- continuity


def straight(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    r"""Return a point of the line :math:`(1 - t)\, z_0 + t\, z_1`."""
    return torch.lerp(start, end, t)


def spherical(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    r"""Return a point of the arc :math:`(\sin((1 - t) \omega)\, z_0 + \sin(t \omega)\, z_1) / \sin \omega`.

    Under N(0, I) in many dimensions all z are about :math:`\sqrt d` from 0, and a straight line passes where
    there is no mass; this one does not (White, *Sampling Generative Networks*, 2016).
    """
    cosine = torch.cosine_similarity(start, end, -1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    along = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / sine
    return torch.where(sine.abs() < 1e-4, straight(start, end, t), along)  # the same or opposite directions


def along(
    path: Curve, start: Float[Tensor, "pairs latent"], end: Tensor, num_steps: int
) -> Float[Tensor, "steps pairs latent"]:
    """Return points of paths from one z to another, both ends included.

    Raises:
        ValueError: If there are fewer than two points, or not as many ends as starts.
    """
    if start.shape != end.shape:
        raise ValueError(
            f"paths need as many ends as starts: ends have shape {tuple(end.shape)}, starts "
            f"{tuple(start.shape)}"
        )
    if num_steps < 2:
        raise ValueError(f"a path has two ends, so num_steps must be at least 2, not {num_steps}")
    t = torch.linspace(0, 1, num_steps, dtype=start.dtype, device=start.device)
    return torch.stack([path(start, end, part) for part in t])


class Continuity(NamedTuple):
    """Qualities of the walks from one z to another, for every pair.

    Attributes:
        path_length: Length of the decoded path over the distance of its ends: 1 if it is straight; nan if
            they are one point.
        detours: Changes of class beyond the one that two ends of different classes need.
        largest_step: Longest step over the mean of all: much above 1 where the path jumps.
    """

    path_length: Float[Tensor, " pairs"]
    detours: Int[Tensor, " pairs"]
    largest_step: Float[Tensor, " pairs"]


@torch.no_grad()
def continuity(
    decode: Decode,
    classify: Classify,
    start: Float[Tensor, "pairs latent"],
    end: Float[Tensor, "pairs latent"],
    *,
    path: Curve = straight,
    num_steps: int = 50,
) -> Continuity:
    """Walk between pairs of latents, and look at what is decoded on the way.

    Args:
        decode: Function from latents to E[x | z].
        classify: Function from data to probabilities of classes.
        start: Starts of walks, such as codes of data.
        end: Ends of walks.
        path: :func:`straight` or :func:`spherical`.
        num_steps: Points of a walk.
    """
    with unmoved(decode, classify):
        x = torch.stack([decode(z) for z in along(path, start, end, num_steps)])
        classes = torch.stack([classify(part).argmax(1) for part in x])
    steps = (x[1:] - x[:-1]).norm(dim=-1)
    changes = (classes[1:] != classes[:-1]).sum(0)
    is_point = (start == end).all(-1)
    return Continuity(
        (steps.sum(0) / (x[-1] - x[0]).norm(dim=-1)).masked_fill(is_point, math.nan),
        changes - (classes[0] != classes[-1]).long(),
        steps.amax(0) / steps.mean(0),
    )


def lipschitz(
    decode: Decode, z: Float[Tensor, "points latent"], scale: Float[Tensor, " latent"] | None = None
) -> Float[Tensor, " points"]:
    r"""Return the largest singular value of :math:`\partial E[x \mid z] / \partial z` at every point.

    Its largest value over points is a lower bound on the Lipschitz constant of the decoder.

    Args:
        decode: Function from latents to E[x | z].
        z: Points.
        scale: Units of z, such as the standard deviations of codes, without which decoders of codes of
            different sizes do not compare.
    """
    unit = torch.ones_like(z[0]) if scale is None else scale
    found = []
    jvp = torch.autograd.functional.jvp
    with unmoved(decode):
        for part in z.detach().split(_ROWS):
            # Points do not depend on each other: one derivative along an axis is that of them all.
            columns = [jvp(decode, part, axis.expand_as(part))[1] for axis in unit.diag()]
            found.append(torch.linalg.matrix_norm(torch.stack(columns, -1), 2))
    return torch.cat(found)
