"""Systems: kinds of pairs, each a value that knows what can be asked of it.

A new system is a pair in :mod:`pyro_vae.models` and one row in ``SYSTEMS``; nothing else asks for its name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.data import Dataset
    from pyro_vae.lab.config import Config, Facts
    from pyro_vae.lab.runs import Run

Metrics = dict[str, int | float]


@dataclass(frozen=True)
class System:
    """A kind of pair.

    Attributes:
        help: Line of ``--help``.
        noun: Name in sentences, with its article.
        prior: Default prior.
        build: ``build(config, facts, dataset or None)``, a pair with initial weights.
        usage: ``usage(run, batch)``, how much of the latents is in use: metrics, and the same in words.
        metric: Quantity that is maximised: the ELBO, or the log-joint at the one z of a datum.
        has_log_prob: Whether there is a log p(x).
        draws: Whether q(z | x) is a density, whose draws differ.
        misfits: ``misfits(config)``, settings that do not go with it, and why.
    """

    help: str
    noun: str
    prior: str
    build: "Callable[[Config, Facts, Dataset | None], tuple[nn.Module, nn.Module]]"
    usage: "Callable[[Run, tuple[Tensor, ...]], tuple[Metrics, str]]"
    metric: str = "elbo"
    has_log_prob: bool = True
    draws: bool = True
    misfits: "Callable[[Config], Iterator[str]]" = lambda config: iter(())

    def check_log_prob(self, what: object) -> None:
        """Raise :class:`ConfigError` if there is no log p(x) of ``what``, a run of this system."""
        from pyro_vae.lab.config import ConfigError

        if not self.has_log_prob:
            raise ConfigError(
                f"{what} holds {self.noun}: its guide has no density and its prior none either, so there is "
                "no log p(x) to estimate. plot draws it"
            )


def _vae(config: "Config", facts: "Facts", dataset: "Dataset | None") -> "tuple[nn.Module, nn.Module]":
    from pyro_vae import distributions
    from pyro_vae.lab import build, choices
    from pyro_vae.lab.config import ConfigError
    from pyro_vae.models import vae

    family = build.family(config, facts)
    posterior = choices.POSTERIORS[config.chosen_posterior].make(distributions, config.latent_dim)
    encoder, decoder = build.nets(config, facts, family, posterior, dataset)
    prior = choices.PRIORS[config.chosen_prior]
    model, guide = vae(
        facts.data_dim,
        config.latent_dim,
        prior=prior.make and prior.make(distributions, config),
        family=family,
        posterior=posterior,
        encoder=encoder,
        decoder=decoder,
        context_dim=facts.num_classes,
        missing=config.missing,
    )
    if prior.make is None:  # a mixture of the guide's own posterior
        import torch

        inputs = torch.zeros(config.components, facts.data_dim)
        if dataset is not None:
            inputs = dataset.train.x[: config.components]
        if len(inputs) < config.components:
            raise ConfigError(f"{config.components} pseudo-inputs are more than there are training data")
        learned = config.chosen_prior == "vamp"
        model.prior = distributions.VampPrior(guide.posterior, inputs, learned=learned)
    return model, guide


def _vq_vae(config: "Config", facts: "Facts", dataset: "Dataset | None") -> "tuple[nn.Module, nn.Module]":
    from pyro_vae import nets
    from pyro_vae.distributions import CodePrior
    from pyro_vae.lab import build
    from pyro_vae.models import vq_vae

    family = build.family(config, facts)
    encoder, decoder = build.nets(config, facts, family, None, dataset)
    length = config.latent_dim // config.code_dim
    model, guide = vq_vae(
        facts.data_dim,
        num_codes=config.num_codes,
        code_dim=config.code_dim,
        length=length,
        family=family,
        encoder=encoder,
        decoder=decoder,
    )
    if config.chosen_prior == "transformer":
        model.prior = CodePrior(guide.codebook, length, nets.CausalTransformer(config.num_codes, length))
    return model, guide


def _active_units(run: "Run", batch: "tuple[Tensor, ...]") -> tuple[Metrics, str]:
    from pyro_vae.latents import active_units

    active = int(active_units(run.guide, *batch).sum())
    return {"test/active_units": active}, f"{active} of {run.config.latent_dim} latent dimensions are active"


def _codes_used(run: "Run", batch: "tuple[Tensor, ...]") -> tuple[Metrics, str]:
    from pyro_vae.latents import code_usage

    usage = code_usage(run.guide, *batch)
    text = (
        f"{100 * usage.share:.0f} % of {run.config.num_codes} codes are in use, perplexity "
        f"{usage.perplexity:.1f}"
    )
    return {"test/perplexity": usage.perplexity, "test/codes_used": usage.share}, text


def _misfits_of_one_z(config: "Config", **others: bool) -> Iterator[str]:
    """Settings that need draws of z; of ``others`` those that are asked for do not fit, either."""
    asked = {
        f"objective {config.chosen_objective}": config.chosen_objective != "elbo",
        f"algorithm {config.algorithm}": config.algorithm != "svi",
        "a weight of the KL term": config.beta != 1 or config.kl_warmup > 0,
        "more than one particle": config.num_particles != 1,
        **others,
    }
    for what in (what for what, is_asked in asked.items() if is_asked):
        yield (
            f"prior {config.chosen_prior} makes {config.system.noun}, whose guide has one z for every datum: "
            f"{what} does not go with it; take objective elbo by svi"
        )


def _misfits_of_codes(config: "Config") -> Iterator[str]:
    yield from _misfits_of_one_z(
        config, condition_on_labels=config.condition_on_labels, missing=config.missing
    )
    if config.latent_dim % config.code_dim:
        yield f"latent_dim {config.latent_dim} is no multiple of code_dim {config.code_dim}"


SYSTEMS = {
    "vae": System(
        "prior, likelihood and posterior are densities", "a VAE", "standard_normal", _vae, _active_units
    ),
    "autoencoder": System(
        "one z for every datum and no prior, so no log p(x) either",
        "an autoencoder",
        "flat",
        _vae,
        _active_units,
        metric="log_joint",
        has_log_prob=False,
        draws=False,
        misfits=_misfits_of_one_z,
    ),
    "vq_vae": System(
        "z are vectors of a codebook, the nearest to what the encoder says",
        "a VQ-VAE",
        "codes",
        _vq_vae,
        _codes_used,
        draws=False,
        misfits=_misfits_of_codes,
    ),
}
