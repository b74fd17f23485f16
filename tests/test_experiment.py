import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae import MAP, BetaELBO, fit, importance_sampling, log_weights, training
from pyro_vae.data import BINARIZATIONS, SOURCES
from pyro_vae.distributions import MixtureOfNormals, SupportError
from pyro_vae.errors import UserError
from pyro_vae.lab import Config, ConfigError, Facts, choices, load_config, load_run, train
from pyro_vae.lab.build import (
    arguments,
    build_objective,
    build_pair,
    build_training,
    check_dataset,
    load_data,
)
from pyro_vae.lab.build import device as choose_device
from pyro_vae.lab.build import family as build_family
from pyro_vae.lab.choices import DATA, INITS, OPTIMIZERS, SCHEDULES
from pyro_vae.lab.runs import (
    check_continuation,
    continue_run,
    differences,
    free_folder,
    identity,
    start_run,
)
from pyro_vae.lab.systems import SYSTEMS
from pyro_vae.latents import posterior_mean
from pyro_vae.objectives import WakeSleepPhases
from pyro_vae.training import Callback

SMALL = Config(latent_dim=2, hidden=(8,), epochs=1, test_samples=10, components=3)


def small(**change):
    return dataclasses.replace(SMALL, **change)


def made(**change):
    """A configuration, its data, and its model and guide."""
    config = small(**change)
    dataset = load_data(config)
    return config, dataset, *build_pair(config, dataset)


def test_help_and_code_know_the_same_names():
    assert set(DATA) - {"PATH"} == {"digits", *SOURCES}
    assert set(choices.BINARIZATIONS) == set(BINARIZATIONS)


@pytest.mark.parametrize(
    "change",
    [
        *({"init": name} for name in INITS),
        *({"optimizer": name} for name in OPTIMIZERS),
        *({"schedule": name} for name in SCHEDULES),
        *({"binarization": name} for name in ("dynamic", "fixed", "threshold")),
        {"binarization": "dequantize", "family": "continuous_bernoulli"},
        {"num_particles": 3},
        {"num_particles": 3, "prior": "mixture_of_normals"},
        {"weight_prior": True, "kl_warmup": 1},
        {"bias_from_data": True},
        {"patience": 1},
        {"hidden": ()},
    ],
    ids=str,
)
def test_every_setting_trains(change, tmp_path):
    config, dataset, model, guide = made(**change)
    check_dataset(model, config, dataset)
    svi, callbacks = build_training(config, model, guide, dataset, tmp_path)
    few = [(dataset.train.minibatch(torch.arange(100)),)] * 2
    (row,) = fit(svi, few, 1, callbacks, progress=False)
    assert {"train/elbo", "valid/elbo"} <= set(row)
    assert not torch.equal(
        guide.state_dict()["posterior.net.layers.0.weight"],
        build_pair(config, dataset)[1].state_dict()["posterior.net.layers.0.weight"],
    )


def test_names_choose_what_they_say():
    *_, model, _ = made(prior="mixture_of_normals")
    assert isinstance(model.prior, MixtureOfNormals)
    assert model.prior.logits.shape == (3,)
    *_, model, _ = made(family="sigmoid_normal")
    assert model.likelihood.family.squash_loc
    *_, model, _ = made(family="fixed_scale_normal", scale=0.25)
    assert model.likelihood.family.scale == 0.25
    _, dataset, model, _ = made(bias_from_data=True)
    start, mean = model.likelihood.net.layers[-1].bias.sigmoid(), dataset.train.x.mean(0)
    torch.testing.assert_close(start.detach(), mean.clamp(1e-3, 1 - 1e-3), rtol=1e-4, atol=1e-4)


def test_scales_of_computed_normals_have_the_lower_bound_that_was_asked_for():
    normals = ("diag_normal", "sigmoid_normal", "shared_scale_normal", "low_rank_normal")
    for name in (*normals, "laplace", "student_t"):
        config = small(family=name, min_scale=0.25)
        family = build_family(config, Facts.of(config, load_data(config)))
        assert family.scale(torch.tensor(-50.0)).item() == pytest.approx(0.25, rel=1e-3), name


def test_runs_of_older_versions_are_known_by_settings_that_they_had():
    assert not {"model", "min_scale", "epoch_size"} & set(SMALL.to_dict())
    assert identity(SMALL) == identity(Config.from_dict(SMALL.to_dict()))
    other = small(epoch_size=50, min_scale=0.1)
    assert identity(other) != identity(SMALL)
    assert "min_scale was 0.001 and now is 0.1, epoch_size was 0 and now is 50" in differences(SMALL, other)


def test_an_epoch_may_be_so_many_draws_of_data(tmp_path):
    config = small(epochs=3, epoch_size=50, batch_size=20)
    seen = []

    class Watch(Callback):
        def epoch_end(self, training):
            seen.append(training.samples)

    train(config, tmp_path / "run", callbacks=[Watch()], test=False, progress=False, say=str)
    assert seen == [50, 100, 150]


def built(tmp_path, **change):
    config, dataset, *pair = made(epochs=20, **change)
    svi, callbacks = build_training(config, *pair, dataset, tmp_path)
    return svi, {type(callback).__name__: callback for callback in callbacks}


def test_evaluation_during_training_is_on_validation_data(tmp_path):
    _, callbacks = built(tmp_path)
    assert torch.equal(callbacks["Evaluate"].batch[0], load_data(SMALL).valid.x)


def test_settings_of_training_do_what_they_say(tmp_path):
    svi, callbacks = built(tmp_path)
    assert type(svi.loss) is TraceMeanField_ELBO
    assert type(svi.optimizer) is torch.optim.Adam
    assert svi.optimizer.param_groups[0]["lr"] == 1e-3
    assert set(callbacks) == {"Evaluate", "EarlyStopping"}
    assert callbacks["EarlyStopping"].patience == math.inf  # which may be another one when it goes on

    adagrad = {"optimizer": "adagrad", "learning_rate": 0.5}
    svi, callbacks = built(tmp_path, objective="elbo", num_particles=7, **adagrad)
    assert type(svi.loss) is Trace_ELBO
    assert (svi.loss.num_particles, svi.loss.vectorize_particles) == (7, True)
    assert type(svi.optimizer) is torch.optim.Adagrad
    assert svi.optimizer.param_groups[0]["lr"] == 0.5

    svi, callbacks = built(tmp_path, weight_prior=True, kl_warmup=5, schedule="cosine", patience=3)
    assert isinstance(svi.loss, MAP)
    assert svi.loss.num_data == 1297
    assert isinstance(svi.loss.bound, BetaELBO)
    assert callbacks["KLWarmup"].objective is svi.loss.bound
    assert callbacks["KLWarmup"].num_epochs == 5
    assert callbacks["EarlyStopping"].patience == 3
    assert callbacks["LearningRate"].scheduler.T_max == 20


def test_wake_sleep_by_name(tmp_path):
    algorithm, _ = built(tmp_path, algorithm="wake_sleep")
    assert isinstance(algorithm.loss, WakeSleepPhases)
    assert not isinstance(algorithm.loss, MAP)
    algorithm, _ = built(tmp_path, algorithm="wake_sleep", weight_prior=True)
    assert algorithm.loss.num_data == 1297


def test_settings_of_the_networks_do_what_they_say():
    config, dataset, model, guide = made(hidden=(30, 20), init="small_normal")
    assert [layer.out_features for layer in guide.posterior.net.layers[::2]] == [30, 20, 4]
    assert [layer.out_features for layer in model.likelihood.net.layers[::2]] == [20, 30, 64]
    assert model.likelihood.net.layers[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    again, _ = build_pair(config, dataset)
    other, _ = build_pair(dataclasses.replace(config, seed=1), dataset)
    first = model.likelihood.net.layers[0].weight
    assert torch.equal(first, again.likelihood.net.layers[0].weight)
    assert not torch.equal(first, other.likelihood.net.layers[0].weight)


def test_defaults_go_with_the_prior():
    assert SMALL.chosen_posterior == "diag_normal"
    assert SMALL.chosen_objective == "elbo_analytic_kl"
    box = small(prior="uniform_box")
    assert (box.chosen_posterior, box.chosen_objective) == ("logit_normal", "elbo")
    assert small(prior="sphere").chosen_posterior == "projected_normal"
    assert small(posterior="iaf").chosen_objective == "elbo"


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("iwae", "ImportanceWeightedELBO", {"num_particles": 7, "gradient": "dreg"}),
        ("renyi", "RenyiELBO", {"num_particles": 5, "alpha": 0.2}),
        ("free_bits", "FreeBitsELBO", {"num_particles": 2, "free_nats": 0.3}),
        ("reweighted_wake_sleep", "ReweightedWakeSleep", {"num_particles": 4}),
    ],
)
def test_objectives_get_their_settings(name, kind, settings):
    objective = build_objective(small(objective=name, **settings))
    assert type(objective).__name__ == kind
    assert {name: getattr(objective, name) for name in settings} == settings


def test_families_know_the_levels_of_the_data():
    facts = Facts.of(SMALL, load_data(small(family="beta_binomial")))
    for name in ("beta_binomial", "discretized_logistic", "logistic_mixture", "grey_categorical"):
        assert build_family(small(family=name), facts).levels == 17
    assert build_family(small(family="low_rank_normal", rank=3), facts).rank == 3


def test_pseudo_inputs_are_learned_or_kept():
    for prior, count in ("vamp", 1), ("vamp_data", 0):
        _, dataset, model, _ = made(prior=prior)
        assert len(list(model.prior.parameters())) == count
        assert torch.equal(model.prior.inputs, dataset.train.x[:3])


def test_labels_are_the_context():
    config = small(condition_on_labels=True)
    dataset = load_data(config)
    x, c = arguments(dataset.test, Facts.of(config, dataset), 20)
    assert (x.shape, c.shape) == ((20, 64), (20, 10))
    everything, labels = arguments(dataset.test, Facts.of(config, dataset))
    index = [int((everything == datum).all(1).nonzero()[0]) for datum in x]
    assert torch.equal(labels[index], c)
    assert len(arguments(dataset.test, Facts.of(SMALL, dataset))) == 1


def test_some_of_the_data_are_a_random_sample_of_them():
    """Static MNIST is sorted by class, as many files are: the first data would say nothing of the rest."""
    dataset = load_data(SMALL)
    facts = Facts.of(SMALL, dataset)
    everything, few, more, all_ = (
        arguments(dataset.train, facts, limit)[0] for limit in (None, 200, 400, 10**6)
    )
    assert torch.equal(few, more[:200])
    assert not torch.equal(few, everything[:200])
    where = [int((everything == datum).all(1).nonzero()[0]) for datum in few]
    assert abs(np.mean(where) - len(everything) / 2) < 4 * len(everything) / (12 * 200) ** 0.5
    assert len(set(where)) > 190  # without replacement; a few images may be equal
    assert torch.equal(all_, everything)


def test_conditioning_needs_labels(tmp_path):
    np.save(tmp_path / "x.npy", np.random.RandomState(0).randint(2, size=(50, 6)))
    with pytest.raises(ConfigError, match="needs labels"):
        load_data(small(data=str(tmp_path / "x.npy"), condition_on_labels=True))
    x, labels = np.eye(6)[[0, 1, 2, 3]], np.arange(4)
    np.savez(tmp_path / "x.npz", train=x, test=x, train_labels=labels)
    config = small(data=str(tmp_path / "x.npz"), condition_on_labels=True)
    with pytest.raises(ConfigError, match=r"test.* has none"):
        load_data(config)
    np.savez(tmp_path / "x.npz", train=x, test=x, train_labels=labels, test_labels=labels + 1)
    with pytest.raises(ConfigError, match=r"test.* labels that the training data do not have"):
        load_data(config)


def test_columns_of_bits_and_columns_without_numbers(tmp_path):
    x = np.random.RandomState(0).randn(50, 3)
    x[:, 0] = x[:, 0] > 0
    x[:, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    columns = ("bernoulli", "diag_normal", "laplace")
    table = {"data": str(tmp_path / "x.npy"), "family": "columns", "columns": columns}
    _, dataset, model, guide = made(**table, missing=True, bias_from_data=True)
    assert log_weights(model, guide, dataset.train.x, num_samples=2).isfinite().all()


def test_beta_is_kept_after_the_warm_up(tmp_path):
    svi, callbacks = built(tmp_path, beta=0.3, kl_warmup=4)
    warmup = callbacks["KLWarmup"]
    betas = []
    for epoch in range(6):
        warmup.epoch_start(training.Training(svi, [], 20, epoch=epoch))
        betas.append(svi.loss.beta)
    assert betas == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])


def test_a_prior_without_parameters_cannot_be_refitted(tmp_path):
    with pytest.raises(ConfigError, match="no parameters to be fitted"):
        built(tmp_path, refit_prior=tmp_path)


def test_default_binarization_follows_the_family():
    assert load_data(SMALL).train.binarization == "dynamic"
    grey = small(family="continuous_bernoulli")
    assert load_data(grey).train.binarization == "none"


def test_configurations_survive_json():
    config = small(data_dir=Path("/tmp/x"), binarization="fixed", learning_rate=1.0)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    with pytest.raises(ConfigError, match="Did you mean 'latent_dim'"):
        Config.from_dict({"latent_dims": 3})
    with pytest.raises(ConfigError, match="latent_dim cannot be '3'"):
        Config.from_dict({"latent_dim": "3"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from([field.name for field in dataclasses.fields(Config)])


@settings(deadline=None)
@given(json_values | st.dictionaries(fields | st.text(max_size=8), json_values, max_size=4))
def test_rubbish_gives_a_configuration_or_one_message(values):
    try:
        config = Config.from_dict(values)
    except ConfigError:
        return
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_rubbish_in_a_run_folder_gives_one_message(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(folder)


def trained(folder, **change):
    config, dataset, model, guide = made(**change)
    start_run(folder, config, dataset)
    svi, callbacks = build_training(config, model, guide, dataset, folder)
    _, *labels = arguments(dataset.train, Facts.of(config, dataset))
    batch = (dataset.train.minibatch(torch.arange(100)), *(c[:100] for c in labels))
    fit(svi, [batch], 1, [*callbacks, training.Checkpoint(folder)], progress=False)
    return model, guide, dataset


def test_a_run_is_loaded_as_it_was(tmp_path):
    model, guide, dataset = trained(tmp_path)
    run = load_run(tmp_path)
    for module, loaded in (model, run.model), (guide, run.guide):
        for key, value in module.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key])
    assert run.dataset.checksum == dataset.checksum
    assert run.epoch == 1


def test_a_run_folder_is_not_used_twice(tmp_path):
    _, _, dataset = trained(tmp_path)
    with pytest.raises(ConfigError, match=r"very configuration.*--resume"):
        start_run(tmp_path, SMALL, dataset)
    with pytest.raises(ConfigError, match="latent_dim was 2 and now is 3"):
        start_run(tmp_path, small(latent_dim=3), dataset)


def test_what_a_run_left_is_not_taken_over_by_another(tmp_path):
    _, _, dataset = trained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json: put that back"):
        start_run(tmp_path, SMALL, dataset)
    assert not (tmp_path / "config.json").exists()


def test_a_run_keeps_its_configuration_and_data(tmp_path):
    _, _, dataset = trained(tmp_path)
    check_continuation(tmp_path, small(epochs=9, device="cpu"), dataset)
    continue_run(tmp_path, small(epochs=9), dataset)
    assert load_config(tmp_path).epochs == 9
    with pytest.raises(ConfigError, match="seed was 0 and now is 1"):
        continue_run(tmp_path, small(seed=1), dataset)
    with pytest.raises(ConfigError, match="checksum differs"):
        check_continuation(tmp_path, small(epochs=9), dataclasses.replace(dataset, checksum="0"))
    with pytest.raises(ConfigError, match="9 epochs, which may be raised"):
        continue_run(tmp_path, small(epochs=8), dataset)
    assert load_config(tmp_path).epochs == 9
    trained(tmp_path / "cosine", schedule="cosine")
    with pytest.raises(ConfigError, match="epochs was 1 and now is 9"):
        check_continuation(tmp_path / "cosine", small(schedule="cosine", epochs=9), dataset)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        start_run(tmp_path / "file" / "run", SMALL, load_data(SMALL))


def test_free_folder_takes_the_first_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_folder(SMALL) == Path("runs/digits")
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits-2").mkdir()
    assert free_folder(SMALL) == Path("runs/digits-3")
    assert free_folder(small(data="/some/where/cells.npz")) == Path("runs/cells")


def test_a_device_that_is_not_there_is_explained():
    for name in "cuda:99", "gpu", "mps:9":
        there = "" if name == "cuda:99" else r"this machine has cpu.*: "
        with pytest.raises(ConfigError, match=f"{there}try --device auto"):
            choose_device(small(device=name))


def test_data_that_the_family_does_not_cover_are_found_before_training():
    config, dataset, model, _ = made(binarization="none")
    with pytest.raises(SupportError, match=r"digits train.*Binarise"):
        check_dataset(model, config, dataset)


@pytest.mark.parametrize(
    "change", [{}, {"prior": "vamp"}, {"condition_on_labels": True}, {"family": "beta_binomial"}]
)
def test_a_run_opens_and_answers_without_its_data(change, tmp_path, monkeypatch):
    model, guide, dataset = trained(tmp_path, **change)
    monkeypatch.setattr("pyro_vae.data.load", lambda *args, **kwargs: pytest.fail("the data were loaded"))
    run = load_run(tmp_path)
    x, *labels = arguments(dataset.test, run.facts, 20)
    classes = labels[0].argmax(1).tolist() if labels else None
    z = run.encode(x.reshape(20, 8, 8).numpy(), classes)
    torch.testing.assert_close(z, posterior_mean(guide.eval(), x, *labels))
    with torch.no_grad():
        expected = model.likelihood(torch.cat([z, *labels], 1)).mean
    torch.testing.assert_close(run.decode(z.numpy(), classes), expected)
    found = run.log_prob(x, classes, num_samples=30)
    assert found.values.shape == (20,)
    assert found.values.mean() == pytest.approx(
        importance_sampling(model, guide, x, *labels, num_samples=2000).mean, abs=1.0
    )
    drawn = run.sample(500, 3 if labels else None)
    assert drawn.shape == (500, 64)
    context = [torch.eye(10)[[3] * 500]] if labels else []
    with torch.no_grad():
        of_model = model.likelihood(torch.cat([model.prior().sample((500,)), *context], 1)).mean
    torch.testing.assert_close(drawn.mean(0), of_model.mean(0), atol=0.15, rtol=0)
    with pytest.raises(ConfigError, match=r"\(batch, 64\) or \(batch, 8, 8\), not \(20, 63\)"):
        run.encode(x[:, 1:], classes)
    with pytest.raises(ConfigError, match="labels"):
        run.encode(x, None if labels else [1] * 20)


def test_a_run_of_an_older_version_opens_where_its_data_are(tmp_path):
    """Before version 0.2 nothing but the shape was noted of the data."""
    model, _, _ = trained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["prior"] == "standard_normal"
    assert "model" not in record["config"]
    del record["file_checksum"], record["data"]["levels"], record["data"]["num_classes"]
    del record["data"]["categories"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    run = load_run(tmp_path)
    assert run.facts == Facts((8, 8), 16.0, 0, ())
    assert torch.equal(run.model.likelihood.net.layers[0].weight, model.likelihood.net.layers[0].weight)


def test_a_system_is_chosen_by_its_own_name_or_by_its_prior(tmp_path):
    for system, prior in ("autoencoder", "flat"), ("vq_vae", "codes"), ("vae", "standard_normal"):
        named, implied = (Config(**{name: value}) for name, value in (("model", system), ("prior", prior)))
        assert named.system is implied.system is SYSTEMS[system]
        assert named.to_dict() == implied.to_dict()
    with pytest.raises(ConfigError, match=r"not go with prior vamp: leave one out\. It has flat"):
        Config(model="autoencoder", prior="vamp")
    with pytest.raises(ConfigError, match="Did you mean 'autoencoder'"):
        Config(model="autoencodr")
    trained(tmp_path, model="autoencoder")
    run = load_run(tmp_path)
    for ask in (lambda: run.log_prob(torch.zeros(1, 64)), lambda: run.sample(3)):
        with pytest.raises(ConfigError, match="an autoencoder"):
            ask()
