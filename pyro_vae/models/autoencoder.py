r"""Autoencoder and VQ-VAE, as pairs: the guide of a datum has all of its mass at one z.

An *autoencoder* maximises :math:`\log p(x \mid z(x))`: it is the pair of a flat prior and a point mass,

.. math:: p(x, z) \propto p(x \mid z), \qquad q(z \mid x) = \delta(z - z(x)),

which has no log p(x), and says so. A *VQ-VAE* (van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete
Representation Learning*, 2017) has latents that are vectors of a codebook
(:mod:`pyro_vae.distributions.codes`). They have probabilities, so that it is a generative model with a lower
bound on log p(x):

.. math:: \log p(x) \ge \log p(z(x)) + \log p(x \mid z(x)) .

The prior is even while the pair is trained, and fitted to the codes afterwards
(:class:`~pyro_vae.distributions.CodePrior`).
"""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from pyro_vae.arguments import Count, Weight, checked
from pyro_vae.distributions import (
    Bernoulli,
    Codebook,
    CodePrior,
    Conditional,
    Family,
    Flat,
    PointMass,
    QuantizedPoint,
    outputs_of,
    perplexity,
)
from pyro_vae.models.program import check_inputs, register, validating
from pyro_vae.models.vae import VAEGuide, VAEModel, vae
from pyro_vae.nets import MLP


@checked
def autoencoder(
    data_dim: Count,
    latent_dim: Count,
    *,
    hidden: Sequence[Count] = (500,),
    family: Family | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
) -> tuple[VAEModel, VAEGuide]:
    r"""An autoencoder's model and guide; train it by ``SVI`` as any other pair.

    Its metric is ``log_joint``, :math:`\log p(x \mid z(x))` in nats per datum. ``log_weights`` and all
    estimators of log p(x) refuse it, with the reason. Where codes are likely is fitted afterwards, by a
    density of ``latents``.

    Args:
        data_dim: Numbers in a datum.
        latent_dim: Dimensions of z.
        hidden: Units of the hidden layers of the encoder; the decoder has them in reverse order.
        family: The family of p(x | z); by default ``Bernoulli()``.
        encoder: ``(*, data_dim) -> (*, latent_dim)``; by default an MLP of tanh units.
        decoder: ``(*, latent_dim) -> (*, family.num_params(data_dim))``; by default an MLP of tanh units.

    Raises:
        TypeError, ValueError: As :func:`~pyro_vae.models.vae.vae`.
    """
    return vae(
        data_dim,
        latent_dim,
        hidden=hidden,
        prior=Flat(latent_dim),
        posterior=PointMass(),
        family=family,
        encoder=encoder,
        decoder=decoder,
    )


class VQGuide(nn.Module):
    r"""q(z | x) of a VQ-VAE: all mass at the vectors of the codebook that are nearest to the encoding.

    A factor beside the site is what training adds to minus the bound, for every datum:

    .. math:: \beta\, |z_e - \mathrm{sg}(e)|^2

    (sg: without gradient), the *commitment cost*, and :math:`|\mathrm{sg}(z_e) - e|^2` if the codebook has
    no decay. While the module trains (``train()``, and gradients are recorded), the codebook follows the
    encodings.

    Args:
        encoder: From x to :math:`z_e`, L vectors side by side.
        codebook: The model's own; it is the model that has its parameters.
        commitment: :math:`\beta`.
        length: L, if the number of outputs of the encoder is to be checked.
    """

    @checked
    def __init__(
        self, encoder: nn.Module, codebook: Codebook, commitment: Weight = 0.25, length: Count | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._codebook = (codebook,)  # in a tuple, which nn.Module does not look into
        self.commitment = commitment
        self.outputs = None if length is None else length * codebook.code_dim

    @property
    def codebook(self) -> Codebook:
        """The codebook, of which ``codebook.nearest(z)`` are the codes."""
        return self._codebook[0]

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> None:
        """Sample site ``z`` in the plate ``data``; auxiliary sites ``commitment`` and ``perplexity``."""
        register(self)
        if validating():
            check_inputs(self, x)
        codebook = self.codebook
        encoding = outputs_of(
            self.encoder, x, self.outputs, "encoder", f"a Codebook of {codebook.code_dim} numbers"
        )
        learns = self.training and torch.is_grad_enabled()
        if learns and codebook.decay is not None:
            codebook.follow(encoding)
        codes = codebook.nearest(encoding)
        vectors = codebook(codes)
        cost = self.commitment * (encoding - vectors.detach()).square().sum(-1)
        if codebook.decay is None:
            cost = cost + (encoding.detach() - vectors).square().sum(-1)
        used = perplexity(codes, codebook.num_codes)
        pyro.sample("perplexity", dist.Delta(used).mask(False), obs=used, infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", QuantizedPoint(encoding, codebook))
            pyro.factor("commitment", cost, has_rsample=True)


@checked
def vq_vae(
    data_dim: Count,
    *,
    num_codes: Count = 64,
    code_dim: Count = 8,
    length: Count = 16,
    hidden: Sequence[Count] = (500,),
    family: Family | None = None,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    commitment: Weight = 0.25,
    decay: float | None = 0.99,
) -> tuple[VAEModel, VQGuide]:
    r"""A VQ-VAE's model and guide, with an even prior over codes; train it by ``SVI`` with ``Trace_ELBO``.

    The metric ``elbo`` is the bound, without the ``commitment`` cost that is trained as well; ``perplexity``
    says how many codes are in use. Then fit a prior to the codes, which the bound gains by:

    .. code-block:: python

        guide.eval()  # or the codebook goes on following the encodings
        model.prior = CodePrior(guide.codebook, length, CausalTransformer(num_codes, length))
        SVI(model, guide, torch.optim.Adam(model.prior.net.parameters(), lr=1e-3))

    Args:
        data_dim: Numbers in a datum.
        num_codes: K, vectors in the codebook.
        code_dim: D, numbers of each.
        length: L, codes of a datum; z has L D numbers.
        hidden: Units of the hidden layers of the encoder; the decoder has them in reverse order.
        family: The family of p(x | z); by default ``Bernoulli()``.
        encoder: ``(*, data_dim) -> (*, L D)``; by default an MLP of tanh units. For a grid of codes
            :class:`~pyro_vae.nets.GridEncoder`, whose ``places`` are L.
        decoder: ``(*, L D) -> (*, family.num_params(data_dim))``; by default an MLP of tanh units. For a grid
            :class:`~pyro_vae.nets.GridDecoder`.
        commitment: Weight of the commitment cost, :math:`\beta`.
        decay: Decay of the codebook's moving averages; None trains it by the codebook loss.

    Raises:
        TypeError: If the family is something else, such as a class instead of an instance.
        ValueError: If a size is below 1, or the decay no number in [0, 1).
    """
    family = Bernoulli() if family is None else family
    prior = CodePrior(Codebook(num_codes, code_dim, decay), length)
    if encoder is None:
        encoder = MLP(data_dim, length * code_dim, hidden)
    if decoder is None:
        decoder = MLP(length * code_dim, family.num_params(data_dim), hidden[::-1])
    model = VAEModel(prior, Conditional(decoder, family, data_dim, role="decoder"))
    return model, VQGuide(encoder, prior.codebook, commitment, length)
