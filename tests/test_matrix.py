"""Every member of every axis, and all priors with all posteriors, through the whole of a short run."""

import dataclasses

import numpy as np
import pyro
import pytest
import torch

from pyro_vae import elbo, fit, log_joint, log_weights
from pyro_vae.lab import Config, ConfigError, Facts
from pyro_vae.lab.build import arguments, build_pair, build_training, check_dataset, load_data
from pyro_vae.lab.choices import FAMILIES, GRADIENTS, NETS, OBJECTIVES, POSTERIORS, PRIORS
from pyro_vae.traces import at_point_masses, guide_distributions

TABLE = ("poisson", "categorical", "student_t", "negative_binomial", "categorical", *["laplace"] * 15)
SIZES = {"latent_dim": 3, "hidden": (16,), "channels": (4, 8), "components": 3, "num_codes": 8, "code_dim": 1}
SMALL = Config(**SIZES, epochs=2, learning_rate=1e-2)


def allowed(**change):
    try:
        return dataclasses.replace(SMALL, **change)
    except ConfigError:
        return None


def cases():
    for prior in PRIORS:
        yield allowed(prior=prior)
        for posterior in POSTERIORS:
            yield allowed(prior=prior, posterior=posterior)
    yield allowed(family="columns", columns=TABLE)
    yield allowed(family="columns", columns=TABLE, missing=True, bias_from_data=True)
    yield allowed(family="negative_binomial", missing=True)
    for family in FAMILIES:
        yield allowed(family=family)
        yield allowed(family=family, binarization="dequantize", net="gated")
    flow = {"prior": "standard_normal", "posterior": "iaf"}
    for objective in OBJECTIVES:
        for gradient in GRADIENTS:
            weighted = {"objective": objective, "gradient": gradient, "num_particles": 4}
            for pair in {}, {"prior": "vamp"}, {"prior": "sphere"}, flow:
                yield allowed(**weighted, **pair)
    for net in NETS:
        for family in "bernoulli", "logistic_mixture", "low_rank_normal":
            yield allowed(net=net, family=family)
            yield allowed(net=net, family=family, condition_on_labels=True)
    dreg = {"objective": "iwae", "num_particles": 3, "gradient": "dreg"}
    yield allowed(condition_on_labels=True, posterior="iaf", **dreg)
    yield allowed(prior="codes", net="conv", latent_dim=8, code_dim=2)  # 2 x 2 codes
    yield allowed(prior="flat", condition_on_labels=True)
    yield allowed(prior="mixture_of_normals", kl_warmup=1, beta=0.9, weight_prior=True)


def name(config):
    changed = {
        field.name: str(getattr(config, field.name))
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != getattr(SMALL, field.name)
    }
    return "-".join(changed.values()) or "default"


AXES = ("prior", "posterior", "family", "objective", "net", "condition_on_labels")


def case(config):
    """Everything by itself, always; together with other things, among the slow tests."""
    changed = [axis for axis in AXES if getattr(config, axis) != getattr(SMALL, axis)]
    return pytest.param(config, id=name(config), marks=[pytest.mark.slow] * (len(changed) > 1))


CASES = {name(config): case(config) for config in cases() if config is not None}


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """A table of counts of three kinds of data, complete and with missing numbers."""
    rng = np.random.RandomState(0)
    rates = rng.gamma(1.0, 3.0, (3, 20))[rng.randint(3, size=600)]
    folder, table = tmp_path_factory.mktemp("counts"), rng.poisson(rates)
    np.save(folder / "complete.npy", table)
    np.save(folder / "missing.npy", np.where(rng.random_sample(table.shape) < 0.1, np.nan, table))
    return folder / "complete.npy", folder / "missing.npy"


def always_compiled(config, dataset, folder):
    """The algorithm of a configuration, and its callbacks."""
    svi, callbacks = build_training(config, *build_pair(config, dataset), dataset, folder)
    return type(svi)(svi.model, svi.guide, svi.optimizer, svi.loss, compile="always"), callbacks


def variants(svi):
    return [variant for variants in svi._compiled.function._variants.values() for variant in variants]


@pytest.mark.parametrize("config", CASES.values())
def test_it_trains_improves_is_captured_and_survives_saving(config, captured, counts, tmp_path):
    if FAMILIES[config.family].values in ("counts", "table"):
        config = dataclasses.replace(config, data=str(counts[config.missing]))
    dataset = load_data(config)
    svi, callbacks = always_compiled(config, dataset, tmp_path)
    model, guide = svi.model, svi.guide
    check_dataset(model, config, dataset)
    batch = arguments(dataset.train, Facts.of(config, dataset), 100)

    def quality():
        if not config.system.has_log_prob:
            return sum(at_point_masses(model, guide, *batch)).mean()
        return elbo(model, guide, *batch, num_samples=20).elbo.mean()

    before = quality()

    history = fit(svi, [batch] * 20, config.epochs, callbacks, progress=False)

    assert len(history) == config.epochs
    assert quality() > before + 0.5
    assert f"valid/{config.system.metric}" in history[-1]
    assert svi._compiled.function.refused is None
    assert all(variant.graph.num_calls > 10 for variant in variants(svi))

    if not config.system.has_log_prob:
        with pytest.raises(ValueError, match="point mass"):
            log_weights(model, guide, *batch, num_samples=3)
    else:
        weights = log_weights(model, guide, *batch, num_samples=3)
        assert weights.shape == (3, 100)
        assert weights.isfinite().all()

    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, tmp_path / "pair.pt")
    other = build_pair(dataclasses.replace(config, seed=1), dataset)
    state = torch.load(tmp_path / "pair.pt", weights_only=True)
    for module, part in zip(other, ("model", "guide"), strict=True):
        module.load_state_dict(state[part])
    drawn = []
    for pair in ((model, guide), other):
        pyro.set_rng_seed(5)
        drawn.append(guide_distributions(pair[1], *batch)["z"].sample())
        drawn.append(log_joint(pair[0], {"z": drawn[-1]}, *batch).log_likelihood)
    torch.testing.assert_close(drawn[:2], drawn[2:])


PLANAR, MISSING, NAN = {"posterior": "planar"}, {"missing": True}, float("nan")
REFUSED = {
    "a density for an autoencoder": ({"prior": "flat", "posterior": "diag_normal"}, "flat with point_mass"),
    "a point for a normal": ({"posterior": "point_mass"}, "different values"),
    "codes of half a length": ({"prior": "codes", "code_dim": 2}, "no multiple of code_dim"),
    "importance weights of codes": ({"prior": "codes", "objective": "iwae"}, "one z for every datum"),
    "wake-sleep of an autoencoder": ({"prior": "flat", "algorithm": "wake_sleep"}, "one z for every datum"),
    "codes with labels": ({"prior": "codes", "condition_on_labels": True}, "condition_on_labels does not"),
    "analytic KL of a flow": ({"posterior": "iaf", "objective": "elbo_analytic_kl"}, "no closed form"),
    "vamp with labels": ({"prior": "vamp", "condition_on_labels": True}, "have no labels"),
    "vamp of planar flows": ({**PLANAR, "prior": "vamp"}, "no inverse"),
    "path gradients of planar flows": (
        {"posterior": "sylvester", "objective": "iwae", "gradient": "dreg"},
        "gradient dreg needs .* no inverse",
    ),
    "wake phases of planar flows": ({**PLANAR, "objective": "reweighted_wake_sleep"}, "no inverse"),
    "wake-sleep of planar flows": ({**PLANAR, "algorithm": "wake_sleep"}, "no inverse"),
    "an objective of wake-sleep": ({"algorithm": "wake_sleep", "objective": "iwae"}, "leave them out"),
    "normal on a box": ({"prior": "uniform_box", "posterior": "diag_normal"}, "different values"),
    "box for a normal": ({"posterior": "logit_normal"}, "different values"),
    "sphere in many dimensions": ({"prior": "sphere", "latent_dim": 10}, "2, 3 or 4"),
    "flow in one dimension": ({"prior": "affine_coupling", "latent_dim": 1}, "at least 2"),
    "gradient of the ELBO": ({"gradient": "stl"}, "one of objective iwae"),
    "warm-up of a weighted bound": ({"objective": "iwae", "kl_warmup": 2}, "has none"),
    "bits of normals": ({"family": "diag_normal", "binarization": "dynamic"}, "makes bits"),
    "dequantised bits": ({"binarization": "dequantize"}, "makes real numbers"),
    "dequantised levels": ({"family": "beta_binomial", "binarization": "dequantize"}, "makes real numbers"),
    "a table of no columns": ({"family": "columns"}, "needs --columns"),
    "columns of no table": ({"columns": ("poisson",)}, "needs --columns"),
    "an unknown column": ({"family": "columns", "columns": ("poison",)}, "Did you mean 'poisson'"),
    "missing pixels of conv nets": ({**MISSING, "net": "conv", "family": "diag_normal"}, "complete images"),
    "missing bits": (MISSING, "taken as they are"),
    "missing and correlated": ({**MISSING, "family": "low_rank_normal"}, "independent given z"),
    "missing pseudo-inputs": ({**MISSING, "family": "diag_normal", "prior": "vamp"}, "pseudo-inputs"),
    "a prior": ({"prior": "standard_norml"}, "Did you mean 'standard_normal'"),
    "a family": ({"family": "bernouli"}, "Did you mean 'bernoulli'"),
    "an optimizer": ({"optimizer": "adamm"}, "Did you mean 'adam'"),
    "a binarization": ({"binarization": "dynamik"}, "Did you mean 'dynamic'"),
    "no latents": ({"latent_dim": 0}, "latent_dim must be at least 1"),
    "an empty layer": ({"hidden": (5, 0)}, "hidden layers"),
    "no step": ({"learning_rate": 0.0}, "learning_rate must be positive"),
    "a step of nan": ({"learning_rate": NAN}, r"learning_rate must be positive.*not nan \(--learning-rate\)"),
    "a seed": ({"seed": -1}, "seed must not be negative"),
    "an infinite alpha": ({"alpha": float("inf")}, "alpha must be finite"),
    "a beta of nan": ({"beta": NAN}, r"beta must be finite, not nan \(--beta\)"),
    "binarised and missing": (MISSING, "bernoulli, which is the default, binarises them: name the --family"),
    "fixed and missing": ({**MISSING, "binarization": "fixed"}, "binarization must be none, not fixed"),
    "a long warm-up": ({"kl_warmup": 9}, "does not end"),
    "fixed bits of normals": ({"family": "diag_normal", "binarization": "fixed"}, "makes bits"),
    "mean of categories": ({"family": "grey_categorical", "bias_from_data": True}, "mean does not say"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(case):
    change, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(SMALL, **change)


def test_counts_are_no_family_of_grey_images():
    config = dataclasses.replace(SMALL, family="poisson")
    dataset = load_data(config)
    with pytest.raises(ValueError, match="grey images are none"):
        check_dataset(build_pair(config, dataset)[0], config, dataset)


@pytest.mark.parametrize(
    "change",
    [
        {"posterior": "iaf"},
        {"posterior": "mixture"},
        {"prior": "vamp", "objective": "iwae", "gradient": "dreg", "num_particles": 3},
        {"family": "logistic_mixture", "net": "residual_conv"},
    ],
    ids=str,
)
def test_inductor_compiles_it(change, tmp_path):
    config = dataclasses.replace(SMALL, **change)
    dataset = load_data(config)
    svi, _ = always_compiled(config, dataset, tmp_path)
    fit(svi, [arguments(dataset.train, Facts.of(config, dataset), 50)] * 4, 1, progress=False)
    assert svi._compiled.function.refused is None
