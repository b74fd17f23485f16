"""Things built from a configuration: data, pairs, objectives, trainings. Nothing heavy is imported before."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_vae.lab import choices
from pyro_vae.lab.config import Config, ConfigError, Facts

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO
    from torch import Tensor, nn

    from pyro_vae.algorithms import SVI
    from pyro_vae.data import Dataset, Split
    from pyro_vae.distributions import Family
    from pyro_vae.models import VAEGuide, VAEModel
    from pyro_vae.training import Callback


def load_data(config: Config) -> "Dataset":
    """Load the data set, on the CPU, binarised as configured."""
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
            if split is not None and int(split.labels.max()) > int(dataset.train.labels.max()):
                raise ConfigError(f"{split.description} has labels that the training data do not have")
    return dataset


def device(config: Config) -> "torch.device":
    """Choose the device; raises :class:`ConfigError` if it is not there."""
    import torch

    from pyro_vae.arguments import check_device

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return check_device(name)
    except ValueError as error:
        raise ConfigError(f"{error}: try --device auto") from error


def context(split: "Split", facts: Facts) -> "Tensor | None":
    """Argument of both programs besides x: labels, one-hot, where they are given them."""
    import torch

    if not facts.num_classes:
        return None
    return torch.nn.functional.one_hot(split.labels, facts.num_classes).to(split.dtype)


def arguments(split: "Split", facts: Facts, limit: int | None = None) -> "tuple[Tensor, ...]":
    """Arguments that both programs are called with, for a split or ``limit`` of its data: x, and the labels.

    These are drawn at random, since data may be sorted by class, but the same ones each time; fewer are the
    first of more.
    """
    import numpy as np
    import torch

    given = context(split, facts)
    values = (split.x,) if given is None else (split.x, given)
    if limit is None or limit >= len(split):
        return values
    drawn = torch.from_numpy(np.random.RandomState(0).permutation(len(split))[:limit]).to(split.x.device)
    return tuple(value[drawn] for value in values)


# ------------------------------------------------------------------------------------------- pairs


def build_pair(config: Config, data: "Dataset | Facts") -> "tuple[VAEModel, VAEGuide]":
    """Build model and guide for these data, with initial weights from ``config.seed``.

    Of the facts alone, weights that start at data (``bias_from_data``, pseudo-inputs) start elsewhere: enough
    where others are loaded in their place.
    """
    import pyro

    pyro.set_rng_seed(config.seed)
    if isinstance(data, Facts):
        return config.system.build(config, data, None)
    return config.system.build(config, Facts.of(config, data), data)


def family(config: Config, facts: Facts) -> "Family":
    """Build the family of p(x | z)."""
    from pyro_vae import distributions

    return choices.FAMILIES[config.family].make(distributions, config, facts)


def nets(
    config: Config, facts: Facts, family: "Family", posterior: "Family | None", dataset: "Dataset | None"
) -> "tuple[nn.Module, nn.Module]":
    """Build encoder and decoder; without a posterior from and to codes."""
    from torch import nn

    from pyro_vae import nets

    data_dim, classes = facts.data_dim, facts.num_classes
    num_codes = posterior.num_params(config.latent_dim) if posterior else config.latent_dim
    num_params = family.num_params(data_dim)
    bias = None
    if config.bias_from_data and dataset is not None:
        bias = family.bias(dataset.train.x.nanmean(0).nan_to_num(0.0))  # of a column without any number: 0
    if config.net in ("mlp", "gated"):
        options = {
            "activation": {"mlp": nn.Tanh, "gated": nn.GLU}[config.net],
            "init": choices.INITS[config.init].make(nets),
        }
        inputs = (1 + config.missing) * (data_dim + classes)
        encoder = nets.MLP(inputs, num_codes, config.hidden, **options)
        backwards = tuple(reversed(config.hidden))
        decoder = nets.MLP(config.latent_dim + classes, num_params, backwards, output_bias=bias, **options)
    else:
        shape, channels = facts.shape, config.channels
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
    if choices.FAMILIES[config.family].values == "counts":
        encoder = nets.Log1p(encoder)
    return encoder, decoder


def check_dataset(model: "VAEModel", config: Config, dataset: "Dataset") -> None:
    """Raise ``SupportError`` if any datum of any split is outside the likelihood's support."""
    import torch

    from pyro_vae import distributions

    latent = torch.zeros(1, config.latent_dim + Facts.of(config, dataset).num_classes)
    for split in (dataset.train, dataset.valid, dataset.test):
        if split is not None:
            distributions.check_support(model.likelihood(latent), split.x, site=split.description)


# ------------------------------------------------------------------------------------------- training


def build_objective(config: Config) -> "ELBO":
    """Build what is maximised, without warm-up and weight prior."""
    from pyro import infer

    from pyro_vae import objectives

    of_pyro = {
        "num_particles": config.num_particles,
        "vectorize_particles": config.num_particles > 1,
        "max_plate_nesting": 1,
    }
    return choices.OBJECTIVES[config.chosen_objective].make(objectives, infer, config, of_pyro)


def build_training(
    config: Config, model: "VAEModel", guide: "VAEGuide", dataset: "Dataset", folder: Path
) -> "tuple[SVI, list[Callback]]":
    """Build the algorithm, and the callbacks up to but without the checkpoint."""
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
    parameters = [*model.parameters(), *guide.parameters()]
    if config.refit_prior:
        parameters = list(model.prior.parameters())
        guide.eval()  # a codebook stays where it is
    if not parameters:
        raise ConfigError(
            f"prior {config.chosen_prior} has no parameters to be fitted: take a mixture or a flow"
        )
    optimizer = choices.OPTIMIZERS[config.optimizer].make(torch.optim)(parameters, lr=config.learning_rate)
    if config.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        callbacks.append(training.LearningRate(scheduler))
    if dataset.valid is not None:
        # Few data make a noisy bound; a few draws of each cost nothing then.
        num_samples = max(1, 2000 // len(dataset.valid))
        batch = arguments(dataset.valid, Facts.of(config, dataset))
        callbacks.append(training.Evaluate(*batch, num_samples=num_samples))
        # Without patience, too: a run that goes on with another one knows how long it has waited.
        patience = config.patience or math.inf
        callbacks.append(training.EarlyStopping(patience, f"valid/{config.system.metric}"))
    elif config.patience:
        raise ConfigError(f"--patience needs validation data, and {dataset.name} has none")
    if config.tensorboard:
        callbacks.append(training.TensorBoard(folder / "tensorboard"))
    if config.algorithm == "wake_sleep":
        num_data = len(dataset.train) if config.weight_prior else None
        return WakeSleep(model, guide, optimizer, num_data=num_data), callbacks
    return SVI(model, guide, optimizer, objective), callbacks
