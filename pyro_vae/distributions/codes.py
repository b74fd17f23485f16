r"""Vector quantisation: latents that are sequences of vectors of a codebook, and priors of such sequences.

z is L vectors of D numbers, each one of the K vectors :math:`e_1 \dots e_K` of a :class:`Codebook`, flattened
to L D numbers. There are :math:`K^L` such z: they are discrete, and have probabilities. An encoder's output
is replaced by the nearest z (:class:`NearestCodes`), whose gradient is passed to it as if nothing had been
replaced, *straight through* (van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*,
2017). That guide is a distribution of one value, :math:`q(z \mid x) = 1`, so that

.. math:: \log p(x) = \log \sum_z p(z)\, p(x \mid z) \ge \log p(z(x)) + \log p(x \mid z(x)) :

the importance weight of a VQ-VAE is a lower bound on log p(x) in nats, tight where no other z explains x.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import Count, checked
from pyro_vae.distributions.base import UncheckedDistribution

_RESTART_BELOW = 0.03  # of an even share of the encodings
_JITTER = 0.01  # of their standard deviations


class Codebook(nn.Module):
    r"""K vectors of D numbers, which follow the encodings that are nearest to them.

    By default as exponential moving averages (van den Oord et al. 2017, appendix A.1): of the n_k encodings
    of a batch that are nearest to :math:`e_k`, with sum s_k,

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma)\, n_k, \qquad
              e_k \leftarrow \big(\gamma N_k e_k + (1 - \gamma)\, s_k\big) / N_k .

    A vector whose :math:`N_k` falls below 3 % of an even share is *dead*, and put where a random encoding of
    the batch is, with an even share to live on. At the first step all are, so they start at encodings.

    Args:
        num_codes: K.
        code_dim: D.
        decay: :math:`\gamma`; None makes the vectors a parameter, to be trained by the codebook loss
            :math:`|\mathrm{sg}(z_e) - e|^2`, without restarts.
    """

    @checked
    def __init__(self, num_codes: Count, code_dim: Count, decay: float | None = 0.99) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), or None for the codebook loss, not {decay}")
        self.num_codes, self.code_dim, self.decay = num_codes, code_dim, decay
        vectors = (2 * torch.rand(num_codes, code_dim) - 1) / num_codes  # as the authors' code starts
        if decay is None:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
            self.register_buffer("counts", torch.zeros(num_codes))

    def nearest(self, z: Float[Tensor, "*batch latent"]) -> Int[Tensor, "*batch length"]:
        """Return, for each of the L vectors of z, the code whose vector is nearest to it."""
        return _nearest(z.detach().unflatten(-1, (-1, self.code_dim)), self.vectors.detach())

    def forward(self, codes: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch latent"]:
        """Return the vectors of codes, side by side."""
        return self.vectors[codes].flatten(-2)

    @torch.no_grad()
    def follow(self, z: Float[Tensor, "*batch latent"]) -> None:
        """Restart dead vectors, and move all towards these encodings (see the class)."""
        rows = z.detach().reshape(-1, self.code_dim)
        even_share = len(rows) / self.num_codes
        is_dead = self.counts < _RESTART_BELOW * even_share
        chosen = rows[torch.randint(len(rows), (self.num_codes,), device=rows.device)]
        # Equal encodings, as of empty patches, would make equal vectors, of which one stays dead.
        chosen = chosen + _JITTER * rows.std(0, correction=0) * torch.randn_like(chosen)
        vectors = torch.where(is_dead.unsqueeze(1), chosen, self.vectors)
        counts = torch.where(is_dead, even_share, self.counts)
        codes = _nearest(rows, vectors).unsqueeze(1)
        is_of = (codes == torch.arange(self.num_codes, device=rows.device)).to(rows.dtype)
        new = self.decay * counts + (1 - self.decay) * is_of.sum(0)
        sums = (self.decay * counts).unsqueeze(1) * vectors + (1 - self.decay) * is_of.T @ rows
        self.vectors.copy_(sums / new.unsqueeze(1))
        self.counts.copy_(new)


def _nearest(z: Float[Tensor, "*batch code"], vectors: Float[Tensor, "codes code"]) -> Int[Tensor, "*batch"]:
    return (vectors.square().sum(-1) - 2 * z @ vectors.T).argmin(-1)  # |z|^2 is the same for all


def perplexity(codes: Int[Tensor, "*batch"], num_codes: int) -> Float[Tensor, ""]:
    r"""Perplexity of codes, :math:`\exp H` of their shares: K if all are used alike, 1 if one alone is."""
    is_of = codes.reshape(-1, 1) == torch.arange(num_codes, device=codes.device)
    return torch.special.entr(is_of.double().mean(0)).sum().exp().to(torch.get_default_dtype())


class _CodeVectors(constraints.Constraint):
    """Sequences of vectors of a codebook."""

    is_discrete = True
    event_dim = 1

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        # Straight-through values are off by rounding.
        error = (value - self.codebook(self.codebook.nearest(value))).abs().amax(-1)
        return error <= 1e-4 * (1 + self.codebook.vectors.abs().max())


class QuantizedPoint(UncheckedDistribution):
    r"""The one value :math:`e = \mathrm{nearest}(z_e)`; draws are e, with the gradient of :math:`z_e`.

    Args:
        encoding: :math:`z_e`, shape ``(*batch, L D)``.
        codebook: Codebook that e is taken from.
    """

    has_rsample = True

    def __init__(self, encoding: Tensor, codebook: Codebook) -> None:
        self.encoding, self.codebook = encoding, codebook
        self.vectors = codebook(codebook.nearest(encoding)).detach()
        super().__init__(encoding.shape[:-1], encoding.shape[-1:])

    @property
    def support(self) -> constraints.Constraint:
        """Sequences of vectors of the codebook."""
        return _CodeVectors(self.codebook)

    @property
    def mean(self) -> Tensor:
        """The value, without a gradient."""
        return self.vectors

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return the value; its gradient by the encoding is 1."""
        value = self.encoding + (self.vectors - self.encoding).detach()
        return value.expand(*sample_shape, *value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return 0 for the value, minus infinity for any other."""
        same = self.codebook.nearest(value) == self.codebook.nearest(self.vectors)
        is_it = same.all(-1) & self.support.check(value)
        return torch.where(is_it, 0.0, -math.inf)


class _CodeSequences(UncheckedDistribution):
    r"""Sequences of codes, one after the other: :math:`p(z) = \prod_l p(k_l \mid k_1 \dots k_{l-1})`."""

    def __init__(self, prior: "CodePrior") -> None:
        self.prior = prior
        super().__init__((), (prior.length * prior.codebook.code_dim,))

    @property
    def support(self) -> constraints.Constraint:
        return _CodeVectors(self.prior.codebook)

    def log_prob(self, value: Tensor) -> Tensor:
        codes = self.prior.codebook.nearest(value)
        each = self.prior.logits(codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.support.check(value), each.sum(-1), -math.inf)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        codebook, length = self.prior.codebook, self.prior.length
        codes = codebook.vectors.new_zeros((*sample_shape, length), dtype=torch.long)
        for place in range(length):
            probabilities = self.prior.logits(codes)[..., place, :].softmax(-1)
            drawn = probabilities.reshape(-1, probabilities.shape[-1]).multinomial(1)
            codes[..., place] = drawn.reshape(codes.shape[:-1])
        return codebook(codes)


class CodePrior(nn.Module):
    r"""p(z) of sequences of L codes: even, or autoregressive.

    .. code-block:: python

        model, guide = vq_vae(784, num_codes=64, length=16)
        ...  # train the pair, then the prior alone, with a codebook that stays as it is
        guide.eval()
        model.prior = CodePrior(guide.codebook, 16, CausalTransformer(64, 16))
        SVI(model, guide, torch.optim.Adam(model.prior.net.parameters(), lr=1e-3))

    Args:
        codebook: Codebook of the guide.
        length: L.
        net: From codes, ``(*, L)``, to logits, ``(*, L, K)``, those at a place from the codes before it
            alone, such as :class:`~pyro_vae.nets.CausalTransformer`. By default all codes have probability
            1 / K.
    """

    @checked
    def __init__(self, codebook: Codebook, length: Count, net: nn.Module | None = None) -> None:
        super().__init__()
        self.codebook, self.length, self.net = codebook, length, net

    def logits(self, codes: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch length codes"]:
        """Logits of every code at every place, given those before."""
        if self.net is None:
            return self.codebook.vectors.new_zeros((*codes.shape, self.codebook.num_codes))
        logits = self.net(codes)
        if logits.shape != (*codes.shape, self.codebook.num_codes):
            raise ValueError(
                f"the prior's net gives logits of shape {tuple(logits.shape)} for codes of shape "
                f"{tuple(codes.shape)}; it must give {self.codebook.num_codes} for every code"
            )
        return logits

    def forward(self) -> Distribution:
        """Distribution of z; batch shape (), event shape ``(L D,)``."""
        return _CodeSequences(self)
