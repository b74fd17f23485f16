"""What a configuration builds: data, pairs, objectives, trainings. Nothing heavy is imported before."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_vae.errors import unknown
from pyro_vae.experiment.config import Config, ConfigError
from pyro_vae.experiment.names import CATEGORICAL, COUNTS, ESTIMATORS, OPTIMIZERS

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO
    from torch import Tensor, nn

    from pyro_vae.algorithms import SVI
    from pyro_vae.data import Dataset, Split
    from pyro_vae.distributions import Family
    from pyro_vae.marginal_likelihood import LogMarginal
    from pyro_vae.models import VAEGuide, VAEModel, VQGuide
    from pyro_vae.training import Callback


def load_data(config: Config) -> "Dataset":
    """The data set, on the CPU, binarised as configured."""
    from pyro_vae import data

    dataset = data.load(
        config.data,
        binarization=config.chosen_binarization,
        data_dir=config.data_dir,
        missing=config.missing,
    )
    if config.condition_on_labels:
        for split in (dataset.train, dataset.valid, dataset.test):
            if split is not None and split.labels is None:
                raise ConfigError(f"condition_on_labels needs labels, and {split.description} has none")
            if split is not None and int(split.labels.max()) >= num_classes(config, dataset):
                raise ConfigError(f"{split.description} has labels that the training data do not have")
    return dataset


def device(config: Config) -> "torch.device":
    """The device; raises :class:`ConfigError` if it is not there."""
    import torch

    from pyro_vae.arguments import check_device

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return check_device(name)
    except ValueError as error:
        raise ConfigError(f"{error}: try --device auto") from error


# ------------------------------------------------------------------------------------------- pairs


def num_classes(config: Config, dataset: "Dataset") -> int:
    """Classes that the programs are given; 0 if they are given none."""
    return 1 + int(dataset.train.labels.max()) if config.condition_on_labels else 0


def context(config: Config, dataset: "Dataset", split: "Split") -> "Tensor | None":
    """What both programs are given besides x of every datum of a split: labels, one-hot, or nothing."""
    import torch

    if not config.condition_on_labels:
        return None
    return torch.nn.functional.one_hot(split.labels, num_classes(config, dataset)).to(split.dtype)


def build_pair(config: Config, dataset: "Dataset") -> "tuple[VAEModel, VAEGuide]":
    """Model and guide, sized for these data, with initial weights from ``config.seed``."""
    import pyro

    from pyro_vae.models import vae

    pyro.set_rng_seed(config.seed)
    if config.has_codes:
        return _build_vq_vae(config, dataset)
    family, posterior = build_family(config, dataset), build_posterior(config)
    encoder, decoder = _build_nets(config, dataset, family, posterior)
    prior = None if config.prior.startswith("vamp") else build_prior(config)
    model, guide = vae(
        dataset.data_dim,
        config.latent_dim,
        prior=prior,
        family=family,
        posterior=posterior,
        encoder=encoder,
        decoder=decoder,
        context_dim=num_classes(config, dataset),
        missing=config.missing,
    )
    if config.prior.startswith("vamp"):
        from pyro_vae.distributions import VampPrior

        inputs = dataset.train.x[: config.components]
        if len(inputs) < config.components:
            raise ConfigError(f"{config.components} pseudo-inputs are more than there are training data")
        model.prior = VampPrior(guide.posterior, inputs, learned=config.prior == "vamp")
    return model, guide


def _build_vq_vae(config: Config, dataset: "Dataset") -> "tuple[VAEModel, VQGuide]":
    from pyro_vae import nets
    from pyro_vae.distributions import CodePrior
    from pyro_vae.models import vq_vae

    family = build_family(config, dataset)
    encoder, decoder = _build_nets(config, dataset, family, None)
    length = config.latent_dim // config.code_dim
    model, guide = vq_vae(
        dataset.data_dim,
        num_codes=config.num_codes,
        code_dim=config.code_dim,
        length=length,
        family=family,
        encoder=encoder,
        decoder=decoder,
    )
    if config.prior == "transformer":
        model.prior = CodePrior(guide.codebook, length, nets.CausalTransformer(config.num_codes, length))
    return model, guide


def build_prior(config: Config) -> "nn.Module":
    """p(z), if it is neither a VampPrior nor one of codes."""
    from pyro_vae import distributions as d

    dim = config.latent_dim
    return {
        "standard_normal": lambda: d.StandardNormal(dim),
        "learned_normal": lambda: d.Unconditional(d.DiagNormal(), dim, learned=True),
        "mixture_of_normals": lambda: d.MixtureOfNormals(dim, config.components),
        "laplace": lambda: d.Unconditional(d.Laplace(), dim),
        "student_t": lambda: d.Unconditional(d.StudentT(), dim),
        "uniform_box": lambda: d.UniformBox(dim, -1.0, 1.0),
        "sphere": lambda: d.Unconditional(d.ProjectedNormal(), dim),
        "affine_coupling": lambda: d.Unconditional(d.affine_coupling(dim), dim),
        "spline_coupling": lambda: d.Unconditional(d.spline_coupling(dim), dim),
        "masked_autoregressive": lambda: d.Unconditional(d.masked_autoregressive(dim), dim),
        "flat": lambda: d.Flat(dim),
    }[config.prior]()


def build_posterior(config: Config) -> "Family":
    """The family of q(z | x)."""
    from pyro_vae import distributions as d

    dim = config.latent_dim
    return {
        "diag_normal": d.DiagNormal,
        "full_normal": d.FullNormal,
        "mixture": lambda: d.NormalMixture(5),
        "iaf": lambda: d.inverse_autoregressive(dim),
        "spline": lambda: d.spline_autoregressive(dim),
        "planar": lambda: d.planar(dim),
        "sylvester": lambda: d.sylvester(dim),
        "logit_normal": lambda: d.LogitNormal(-1.0, 1.0),
        "projected_normal": d.ProjectedNormal,
        "point_mass": d.PointMass,
    }[config.chosen_posterior]()


def build_family(config: Config, dataset: "Dataset") -> "Family":
    """The family of p(x | z)."""
    from pyro_vae import distributions as d

    if config.family == "columns":
        return d.Columns(_families_of_columns(config, dataset))
    levels = round(dataset.train.levels) + 1
    return {
        "bernoulli": d.Bernoulli,
        "continuous_bernoulli": d.ContinuousBernoulli,
        "diag_normal": d.DiagNormal,
        "sigmoid_normal": lambda: d.DiagNormal(squash_loc=True),
        "fixed_scale_normal": lambda: d.FixedScaleNormal(config.scale),
        "shared_scale_normal": d.SharedScaleNormal,
        "low_rank_normal": lambda: d.LowRankNormal(config.rank),
        "laplace": d.Laplace,
        "student_t": d.StudentT,
        "discretized_logistic": lambda: d.DiscretizedLogistic(levels),
        "logistic_mixture": lambda: d.DiscretizedLogistic(levels, 5),
        "grey_categorical": lambda: d.GreyCategorical(levels),
        "beta_binomial": lambda: d.BetaBinomial(levels),
        "poisson": d.Poisson,
        "negative_binomial": d.NegativeBinomial,
        "zero_inflated_negative_binomial": d.ZeroInflatedNegativeBinomial,
        "bernoulli_cross_entropy": lambda: d.Bernoulli(cross_entropy=True),
    }[config.family]()


def _families_of_columns(config: Config, dataset: "Dataset") -> "list[Family]":
    """One family for every column, the same object for columns of one kind."""
    from pyro_vae import distributions as d

    if len(config.columns) != dataset.data_dim:
        raise ConfigError(
            f"columns names {len(config.columns)} families, but the data have {dataset.data_dim}"
        )
    largest = dataset.train.x.nan_to_num(0.0).max(0).values.tolist()
    categories = [
        max(2, round(most) + 1) if name == CATEGORICAL else 0
        for name, most in zip(config.columns, largest, strict=True)
    ]
    kinds = list(zip(config.columns, categories, strict=True))
    binarization = config.chosen_binarization  # of a table; bits alone would be drawn by default
    families = {
        (name, count): d.Categorical(count)
        if name == CATEGORICAL
        else build_family(
            dataclasses.replace(config, family=name, columns=(), binarization=binarization), dataset
        )
        for name, count in set(kinds)
    }
    return [families[kind] for kind in kinds]


def _build_nets(
    config: Config, dataset: "Dataset", family: "Family", posterior: "Family | None"
) -> "tuple[nn.Module, nn.Module]":
    """Encoder and decoder; without a posterior from and to codes."""
    from torch import nn

    from pyro_vae import nets

    data_dim, classes = dataset.data_dim, num_classes(config, dataset)
    num_codes = posterior.num_params(config.latent_dim) if posterior else config.latent_dim
    num_params = family.num_params(data_dim)
    bias = None
    if config.bias_from_data:
        bias = family.bias(dataset.train.x.nanmean(0).nan_to_num(0.0))  # of a column without any number: 0
    if config.net in ("mlp", "gated"):
        options = {
            "activation": {"mlp": nn.Tanh, "gated": nn.GLU}[config.net],
            "init": {"glorot": nets.glorot, "small_normal": nets.small_normal}[config.init],
        }
        inputs = (1 + config.missing) * (data_dim + classes)
        encoder = nets.MLP(inputs, num_codes, config.hidden, **options)
        backwards = tuple(reversed(config.hidden))
        decoder = nets.MLP(config.latent_dim + classes, num_params, backwards, output_bias=bias, **options)
    else:
        shape, channels = dataset.shape, config.channels
        options = {"blocks": {"conv": 0, "residual_conv": 2}[config.net]}
        try:
            if posterior is None:
                encoder = nets.GridEncoder(shape, config.code_dim, channels, **options)
            else:
                encoder = nets.ConvEncoder(shape, num_codes, channels, context_dim=classes, **options)
        except ValueError as error:
            raise ConfigError(f"net {config.net}: {error}") from None
        options["output_bias"] = bias
        if posterior is None:
            if encoder.places * config.code_dim != config.latent_dim:
                raise ConfigError(
                    f"net {config.net} with channels {channels} makes a grid of {encoder.places} codes of "
                    f"these data: latent_dim must be that times code_dim, {encoder.places * config.code_dim}"
                )
            decoder = nets.GridDecoder(config.code_dim, shape, family.params_per_dim, channels, **options)
        else:
            inputs = config.latent_dim + classes
            decoder = nets.ConvDecoder(inputs, shape, family.params_per_dim, channels, **options)
    if config.family in COUNTS:
        encoder = nets.Log1p(encoder)
    return encoder, decoder


def check_data(model: "VAEModel", config: Config, dataset: "Dataset") -> None:
    """Raise ``SupportError`` if any datum of any split is outside the likelihood's support."""
    import torch

    from pyro_vae.distributions import check_support

    likelihood = model.likelihood(torch.zeros(1, config.latent_dim + num_classes(config, dataset)))
    for split in (dataset.train, dataset.valid, dataset.test):
        if split is not None:
            check_support(likelihood, split.x, site=split.description)


# ------------------------------------------------------------------------------------------- training


def build_objective(config: Config) -> "ELBO":
    """What is maximised, without warm-up and weight prior."""
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from pyro_vae import objectives

    particles = config.num_particles
    of_pyro = {
        "num_particles": particles,
        "vectorize_particles": particles > 1,
        "max_plate_nesting": 1,
    }
    return {
        "elbo": lambda: Trace_ELBO(**of_pyro),
        "elbo_analytic_kl": lambda: TraceMeanField_ELBO(**of_pyro),
        "free_bits": lambda: objectives.FreeBitsELBO(config.free_nats, particles),
        "iwae": lambda: objectives.ImportanceWeightedELBO(particles, config.gradient),
        "renyi": lambda: objectives.RenyiELBO(config.alpha, particles),
        "reweighted_wake_sleep": lambda: objectives.ReweightedWakeSleep(particles),
    }[config.chosen_objective]()


def build_training(
    config: Config, model: "VAEModel", guide: "VAEGuide", dataset: "Dataset", folder: Path
) -> "tuple[SVI, list[Callback]]":
    """The algorithm, and the callbacks up to but without the checkpoint."""
    import torch

    from pyro_vae import objectives, training
    from pyro_vae.algorithms import SVI, WakeSleep

    objective = build_objective(config)
    callbacks: list[Callback] = []
    if config.kl_warmup or config.beta != 1:
        objective = objectives.BetaELBO(config.beta, objective)
    if config.kl_warmup:
        callbacks.append(training.KLWarmup(objective, config.kl_warmup))
    if config.weight_prior:
        objective = objectives.MAP(len(dataset.train), objective)
    make_optimizer = getattr(torch.optim, OPTIMIZERS[config.optimizer].rpartition(".")[2])
    parameters = [*model.parameters(), *guide.parameters()]
    if config.refit_prior:
        parameters = list(model.prior.parameters())
        guide.eval()  # a codebook stays where it is
    if not parameters:
        raise ConfigError(f"prior {config.prior} has no parameters to be fitted: take a mixture or a flow")
    optimizer = make_optimizer(parameters, lr=config.learning_rate)
    if config.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        callbacks.append(training.LearningRate(scheduler))
    if dataset.valid is not None:
        # Few data make a noisy bound; a few draws of each cost nothing then.
        num_samples = max(1, 2000 // len(dataset.valid))
        callbacks.append(
            training.Evaluate(*arguments(config, dataset, dataset.valid), num_samples=num_samples)
        )
        # Without patience, too: a run that goes on with another one knows how long it has waited.
        callbacks.append(training.EarlyStopping(config.patience or math.inf, f"valid/{config.bound}"))
    elif config.patience:
        raise ConfigError(f"--patience needs validation data, and {dataset.name} has none")
    if config.tensorboard:
        callbacks.append(training.TensorBoard(folder / "tensorboard"))
    if config.algorithm == "wake_sleep":
        num_data = len(dataset.train) if config.weight_prior else None
        return WakeSleep(model, guide, optimizer, num_data=num_data), callbacks
    return SVI(model, guide, optimizer, objective), callbacks


def arguments(
    config: Config, dataset: "Dataset", split: "Split", limit: int | None = None
) -> "tuple[Tensor, ...]":
    """What both programs are called with, for a split or ``limit`` of its data.

    These are drawn at random, since data may be sorted by class, but the same ones each time; fewer are the
    first of more.
    """
    import numpy as np
    import torch

    given = context(config, dataset, split)
    values = (split.x,) if given is None else (split.x, given)
    if limit is None or limit >= len(split):
        return values
    drawn = torch.from_numpy(np.random.RandomState(0).permutation(len(split))[:limit]).to(values[0].device)
    return tuple(value[drawn] for value in values)


def estimator(name: str) -> "Callable[..., LogMarginal]":
    """The function of ``marginal_likelihood`` that has this name among ``ESTIMATORS``."""
    from pyro_vae import marginal_likelihood

    if name not in ESTIMATORS:
        raise ConfigError(unknown("estimator", name, ESTIMATORS))
    return getattr(marginal_likelihood, name)
