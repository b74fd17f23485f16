"""Compiled programs against eager ones: the same numbers for the same noise."""

import copy
import functools
import gc
import math
import shutil
import time
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import pyros_and_ours
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn
from torch.distributions import constraints
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae import (
    MAP,
    SVI,
    BetaELBO,
    KLWarmup,
    LearningRate,
    MixtureOfNormals,
    NotCompiledWarning,
    PyroSVI,
    SupportError,
    batches,
    fit,
    importance_sampling,
    load,
    log_weights,
    vae,
)
from pyro_vae.compiled import CompiledFunction
from pyro_vae.compiled.launch import can_launch, taken_as_is
from pyro_vae.compiled.rewrites import bernoulli_log_prob, fast_tanh
from pyro_vae.data import Batches

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler"
)

# ------------------------------------------------------------------------------------- programs


def small_vae(**parts):
    return vae(6, 2, hidden=(5,), **parts)


class Hierarchical(nn.Module):
    """Two latent sites, the upper one not reparameterised; masked and scaled."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 6))
        self.prior = nn.Linear(3, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.7):
            k = pyro.sample("k", dist.OneHotCategorical(logits=torch.zeros(3)))
            z = pyro.sample("z", dist.Normal(self.prior(k), 1.0).to_event(1))
            with poutine.mask(mask=x[:, 0] > 0.5):
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


class HierarchicalGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.z = nn.Linear(6, 3), nn.Linear(9, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.7):
            k = pyro.sample("k", dist.OneHotCategorical(logits=self.k(x)))
            loc, scale = self.z(torch.cat([x, k], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Noisy(nn.Module):
    """Dropout, and batch normalisation with its running statistics."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(5, outputs),
        )

    def forward(self, x):
        return self.net(x)


def noisy():
    return vae(6, 2, encoder=Noisy(6, 4), decoder=Noisy(2, 6))


MODULE_PROGRAMS = {
    "vae": lambda: (small_vae(), Trace_ELBO()),
    "mean field": lambda: (small_vae(), TraceMeanField_ELBO()),
    "particles": lambda: (
        small_vae(prior=MixtureOfNormals(2, 3)),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "map": lambda: (small_vae(), MAP(100)),
    "beta": lambda: (small_vae(), BetaELBO(0.3)),
    "score function": lambda: ((Hierarchical(), HierarchicalGuide()), Trace_ELBO()),
    "dropout and batch norm": lambda: (noisy(), Trace_ELBO()),
}


def enumerated():
    """M2-like: a label that is summed over, beside a latent that is drawn."""
    decoder, encoder = nn.Linear(5, 6), nn.Linear(6, 7)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))
            shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
            inputs = torch.cat([z.expand(*shape, 2), y.expand(*shape, 3)], -1)
            pyro.sample("x", dist.Bernoulli(logits=decoder(inputs)).to_event(1), obs=x)

    @config_enumerate
    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale, logits = encoder(x).split([2, 2, 3], -1)
            pyro.sample("y", dist.OneHotCategorical(logits=logits))
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide, TraceEnum_ELBO(max_plate_nesting=1)


def constrained_params():
    def model(x):
        rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        scale = pyro.sample("scale", dist.Gamma(rate, 1.0))
        with pyro.plate("data", len(x)):
            mean = (weights * x[:, :3]).sum(-1)
            pyro.sample("x", dist.Normal(mean, scale + 0.1), obs=x[:, 3])

    def guide(x):
        alpha = pyro.param("alpha", torch.tensor(1.5), constraint=constraints.greater_than(0.1))
        pyro.sample("scale", dist.Gamma(alpha, 2.0))

    return model, guide, Trace_ELBO()


def subsampled():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("x", dist.Normal(loc, 1.0).expand([6]).to_event(1), obs=x[index])

    def guide(x):
        loc = pyro.param("loc_q", torch.tensor(0.3))
        scale = pyro.param("scale_q", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("loc", dist.Normal(loc, scale))

    return model, guide, Trace_ELBO(num_particles=2)


def flow():
    transform = dist.transforms.affine_autoregressive(2, hidden_dims=[4])
    decoder, loc = nn.Linear(2, 6), torch.tensor([0.1, 0.2])

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            for _ in range(2):  # control flow that depends on no value
                z = torch.tanh(z) if len(x) > 2 else z
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return model, guide, Trace_ELBO()


class PyroExample(nn.Module):
    """The style of Pyro's own examples: bound methods of one module."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, scale.exp()).to_event(1))


def bound_methods():
    pair = PyroExample()
    return pair.model, pair.guide, TraceMeanField_ELBO()


STORE_PROGRAMS = [enumerated, constrained_params, subsampled, flow, bound_methods]


def data(rows=8):
    drawn = torch.rand(rows, 6, generator=torch.Generator().manual_seed(3))
    return (drawn < 0.4).to(torch.get_default_dtype())


def close(found, expected):
    tolerance = 1e-10 if torch.get_default_dtype() == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- the same numbers


in_both_precisions = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


@in_both_precisions
@pytest.mark.parametrize("program", MODULE_PROGRAMS)
def test_steps_equal_eager_ones(program, dtype):
    torch.set_default_dtype(dtype)
    torch.manual_seed(1)
    made, results = MODULE_PROGRAMS[program](), []
    for when in False, "always":
        (model, guide), loss = copy.deepcopy(made)
        # Adam would divide rounding errors of gradients that are 0 by their size.
        optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=0.02)
        svi = SVI(model, guide, optimizer, loss, compile=when)
        torch.manual_seed(2)
        metrics = [svi.step(data()) for _ in range(5)]
        results.append((metrics, model.state_dict(), guide.state_dict()))
    assert svi._compiled.function.is_compiled
    close(results[1], results[0])
    # Fresh noise at every call.
    assert len({float(row["elbo"]) for row in metrics}) == 5


@in_both_precisions
@pytest.mark.parametrize("program", STORE_PROGRAMS, ids=lambda program: program.__name__)
def test_programs_of_the_parameter_store(program, dtype):
    torch.set_default_dtype(dtype)

    def train(kind):
        torch.manual_seed(1)
        model, guide, loss = program()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
        torch.manual_seed(2)
        losses = [float(svi.step(data())) for _ in range(5)]
        return (losses, {name: value.detach() for name, value in pyro.get_param_store().items()}), svi

    (expected, _), (found, svi) = pyros_and_ours(train)
    assert svi._compiled.function.is_compiled
    close(found, expected)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceEnum_ELBO])
def test_programs_with_nothing_to_train(elbo):
    """Pyro goes through; so does ours, with the same draws, and what the model counts is counted once."""

    def train(kind):
        calls = []

        def model(calls=calls):
            calls.append(1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        svi = kind(model, lambda: pyro.sample("z", dist.Normal(0.5, 1.0)), pyro.optim.Adam({}), elbo())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is not compiled, and of what is not enumerated
            return [svi.step() for _ in range(4)], len(calls)

    expected, found = pyros_and_ours(train)
    assert found == expected


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    "family",
    [
        lambda z: dist.Poisson(z.exp()),
        lambda z: dist.Bernoulli(logits=z).mask(torch.tensor([True, False, True, True])),
        lambda z: dist.Bernoulli(logits=z, validate_args=False),
    ],
    ids=["poisson", "masked", "unchecked"],
)
def test_data_outside_their_support_are_refused_as_by_pyro(family, checks, captured):
    good, bad = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.5, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(pyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def train(kind):
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        said, losses = "", []
        with pyro.validation_enabled(checks):
            losses += [svi.step(good) for _ in range(5)]
            try:
                losses += [svi.step(x) for x in (bad, good, good)]
            except ValueError as error:
                said = str(error)
        return said.partition(":")[0], torch.tensor([*losses, pyro.param("loc").item()]), svi

    (said, numbers, _), (compiled_said, compiled_numbers, svi) = pyros_and_ours(train)
    assert svi._compiled.function.is_compiled
    assert said == compiled_said
    assert bool(said) == (checks and family(good)._validate_args)
    torch.testing.assert_close(compiled_numbers, numbers)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "groups": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_their_state(name, double):
    states = []
    torch.manual_seed(0)
    pair = vae(6, 2, hidden=(3,))
    for when in False, "always":
        model, guide = copy.deepcopy(pair)
        optimizer = OPTIMIZERS[name]([*model.parameters(), *guide.parameters()])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        svi = SVI(model, guide, optimizer, compile=when)
        torch.manual_seed(0)
        for step in range(8):
            svi.step(data())
            if step % 3 == 2:
                schedule.step()
            if step == 5:  # a restored checkpoint
                svi.load_state_dict(copy.deepcopy(svi.state_dict()))
        states.append(svi.state_dict())
    eager, compiled = states
    close(compiled["model"], eager["model"])
    assert eager["optimizer"]["param_groups"] == compiled["optimizer"]["param_groups"]
    close(compiled["optimizer"]["state"], eager["optimizer"]["state"])
    # Either goes on with what the other saved.
    assert svi._compiled.function.is_compiled


# ------------------------------------------------------------------------------------- never silently wrong


def compiled_svi(model=None, guide=None, **settings):
    pair = vae(6, 2, hidden=(3,))
    model, guide = model or pair[0], guide or pair[1]
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.01)
    return SVI(model, guide, optimizer, compile="always", **settings)


def test_what_the_garbage_collector_calls_is_not_the_programs(captured):
    thresholds = gc.get_threshold()
    looks = lambda *_: time.perf_counter()  # noqa: E731  (as Hypothesis does)
    gc.callbacks.append(looks)
    gc.set_threshold(100)
    try:
        svi = compiled_svi()
        for _ in range(3):
            svi.step(data())  # a warning would be an error
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(looks)
    assert svi._compiled.function.is_compiled


def test_hidden_state_is_found_by_comparing_with_eager():
    hidden = dict.fromkeys(["offset", *range(1000)], 0.0)  # containers as large are not compared

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vae(6, 2, hidden=(3,))[0]

        def forward(self, x):
            pyro.factor("hidden", torch.tensor(1.0) * hidden["offset"])
            self.model(x)

    svi = compiled_svi(Model())
    for _ in range(2):
        svi.step(data())
    hidden["offset"] = 50.0
    assert svi.step(data())["elbo"] > 0  # the eager result already; one difference may be rounding
    assert svi._compiled.function.is_compiled
    with pytest.warns(NotCompiledWarning, match="compiled and eager results differ in loss"):
        svi.step(data())
    assert not svi._compiled.function.is_compiled


def equals_eager(svi, *batch):
    """The next step of an SVI is what an eager copy of it does."""
    other = SVI(*copy.deepcopy((svi.model, svi.guide, svi.optimizer, svi.loss)), compile=False)
    results = []
    for each in svi, other:
        torch.manual_seed(5)
        results.append((each.step(*batch)["elbo"], list(each.model.parameters())))
    close(*results)


def run(svi):
    for _ in range(4):
        svi.step(data())
    assert svi._compiled.function.is_compiled


def test_other_batch_shapes_modes_parameters_and_states_are_noticed():
    model, guide = noisy()
    svi = compiled_svi(model, guide)
    run(svi)
    for rows in 5, 8:
        equals_eager(svi, data(rows))
    for mode in False, True, False, True:
        model.train(mode)
        guide.train(mode)
        equals_eager(svi, data())
    # Of 8 data in both modes, of 5 in one.
    assert [len(variants) for variants in svi._compiled.function._variants.values()] == [2, 1]
    # A loaded state
    state = {name: value + 0.1 for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False)
    equals_eager(svi, data())
    # requires_grad
    decoder = model.likelihood.net.net
    decoder[0].weight.requires_grad_(False)
    frozen = decoder[0].weight.clone()
    run(svi)
    assert torch.equal(decoder[0].weight, frozen)
    decoder[0].weight.requires_grad_(True)
    run(svi)
    assert not torch.equal(decoder[0].weight, frozen)
    # A replaced parameter
    decoder[0].weight = nn.Parameter(torch.zeros(5, 2))
    equals_eager(svi, data())


def test_a_reset_optimizer_is_noticed():
    svi = compiled_svi()
    run(svi)
    for parameter in svi.optimizer.state:
        svi.optimizer.state[parameter] = {}
    for _ in range(3):
        equals_eager(svi, data())
    for parameter, state in svi.optimizer.state.items():
        svi.optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
    before = [state["step"].item() for state in svi.optimizer.state.values()]
    svi.step(data())
    assert [state["step"].item() for state in svi.optimizer.state.values()] == [n + 1 for n in before]


class Gated(nn.Module):
    """Uses some of its parameters only if a flag says so."""

    def __init__(self):
        super().__init__()
        self.net, self.extra = nn.Linear(2, 6), nn.Linear(2, 6)
        self.use_extra = False

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.net(z) + self.extra(z) if self.use_extra else self.net(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def test_parameters_come_and_go_with_a_flag():
    model, (_, guide) = Gated(), vae(6, 2, hidden=(3,))
    svi = compiled_svi(model, guide)
    run(svi)
    for use_extra in True, False, True:
        model.use_extra = use_extra
        for _ in range(3):
            equals_eager(svi, data())
    assert [len(variants) for variants in svi._compiled.function._variants.values()] == [2]


def test_beta_may_change_without_a_new_graph():
    loss = BetaELBO(0.1)
    svi = compiled_svi(loss=loss)
    run(svi)
    variants = list(svi._compiled.function._variants.values())
    for beta in 0.5, 0.9:
        loss.beta = beta
        equals_eager(svi, data())
    assert list(svi._compiled.function._variants.values()) == variants
    loss.beta = 1.0
    equals_eager(svi, data())


def test_closure_values_and_found_tensors_are_noticed():
    scale, offset = 1.0, torch.zeros(())

    def function(x):
        return {"y": x * scale + offset}

    compiled = CompiledFunction(function, (function,), always=True)
    x = torch.ones(3)
    for _ in range(3):
        assert compiled(x)[0]["y"].tolist() == [1, 1, 1]
    assert compiled.is_compiled
    offset.fill_(2.0)
    assert compiled(x)[0]["y"].tolist() == [3, 3, 3]
    scale = 5.0
    assert compiled(x)[0]["y"].tolist() == [7, 7, 7]


def test_a_seed_reproduces_a_run():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        svi = compiled_svi()
        losses.append([float(svi.step(data())["elbo"]) for _ in range(6)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("InvalidCxxCompiler: No working C++ compiler", r"No working C\+\+ compiler\); install g\+\+"),
        ("no kernel for this", r"\(RuntimeError: no kernel for this\)$"),
    ],
)
def test_what_inductor_cannot_compile_runs_eagerly(monkeypatch, reason, message):
    def broken(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr("torch._inductor.compile", broken)
    svi = compiled_svi()
    svi.step(data())
    with pytest.warns(NotCompiledWarning, match=f"could not compile.*{message}"):
        svi.step(data())
    svi.step(data())


def test_short_runs_do_not_compile():
    model, guide = vae(6, 2, hidden=(3,))
    svi = SVI(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()]))
    svi.expect(150)
    for _ in range(150):
        svi.step(data())
    assert not svi._compiled.function.is_compiled


class Forked(nn.Module):
    """Uses one decoder or the other, by a value: what runs eagerly must train both."""

    def __init__(self):
        super().__init__()
        self.one, self.two = vae(6, 2, hidden=(3,))[0], vae(6, 2, hidden=(3,))[0]

    def forward(self, x):
        (self.one if x.sum() > 10 else self.two)(x)


def test_a_path_by_data_trains_all_of_its_parameters():
    svi = compiled_svi(Forked())
    svi.step(torch.zeros(8, 6))
    with pytest.warns(NotCompiledWarning, match="if or while"):
        svi.step(torch.zeros(8, 6))
    before = copy.deepcopy(svi.model.one.state_dict())
    svi.step(torch.ones(8, 6))
    assert not torch.equal(
        svi.model.one.likelihood.net.layers[0].weight, before["likelihood.net.layers.0.weight"]
    )


# ------------------------------------------------------------------------------------- cheaper forms


def test_fast_tanh_is_tanh_to_float32_rounding():
    h = torch.cat([torch.randn(20_000) * 10**exponent for exponent in torch.linspace(-6, 2, 30)])
    exact = torch.tanh(h.double())
    assert ((fast_tanh(h) - exact) / exact).abs().max() < 6e-7
    assert fast_tanh(torch.tensor([0.0, float("inf"), -float("inf")])).tolist() == [0, 1, -1]


@pytest.mark.parametrize("size", [784, 560, 64, 20, 8])
def test_bernoulli_log_prob_in_groups(size):
    logits, x = 20 * torch.randn(50, size), (torch.rand(50, size) < 0.5).float()
    exact = dist.Bernoulli(logits=logits.double()).to_event(1).log_prob(x.double())
    torch.testing.assert_close(bernoulli_log_prob(logits, x).double(), exact, rtol=3e-6, atol=1e-4)


@pytest.mark.parametrize("library", ["onednn", "mkl"])
def test_estimates_are_the_same_compiled_whichever_library_multiplies(library, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("pyro_vae.compiled.products.faster", lambda *_: library)
    model, guide = vae(56, 3, hidden=(64,))
    x = (torch.rand(32, 56) < 0.3).float()

    def function(x, count):
        return {"log_weights": log_weights(model, guide, x, num_samples=count)}

    compiled = CompiledFunction(function, (model, guide), always=True)
    for _ in range(4):  # the first calls fill caches
        torch.manual_seed(0)
        weights = compiled(x, count=20)[0]["log_weights"]
    assert set(compiled.products.values()) == {library}
    assert library in caplog.text  # which was chosen is said
    assert compiled.is_compiled
    torch.manual_seed(0)
    eager = function(x, 20)["log_weights"].detach()
    torch.testing.assert_close(weights, eager, rtol=1e-5, atol=1e-4)


def test_importance_sampling_is_the_same_compiled(monkeypatch):
    model, guide = vae(16, 2, hidden=(8,))
    x = (torch.rand(300, 16) < 0.3).float()
    torch.manual_seed(0)
    eager = importance_sampling(model, guide, x, num_samples=1500, progress=False)
    monkeypatch.setattr("pyro_vae.compiled.work._SAVED_OF_OPERATOR", math.inf)
    monkeypatch.setattr("pyro_vae.compiled.function._EAGER_CALLS", 2)
    torch.manual_seed(0)
    compiled = importance_sampling(model, guide, x, num_samples=1500, progress=False)
    torch.testing.assert_close(compiled.values, eager.values, rtol=1e-6, atol=1e-5)
    # Its data are still checked, in every block.
    x[290, 3] = 0.5
    with pytest.raises(SupportError, match=r"0\.5"):
        importance_sampling(model, guide, x, num_samples=1500, progress=False)


# ------------------------------------------------------------------------------------- launches


class RecordedGraph:
    """What a CUDA graph does, on a CPU: operators are recorded, without effect, and replayed as they were."""

    def __init__(self):
        self.tape = []
        self.num_replays = 0
        self.generators = [torch.default_generator]

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        self.num_replays += 1
        for function, args, kwargs, results in self.tape:
            found = pytree.tree_leaves(function(*args, **kwargs))
            for old, new in zip(results, found, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class recording(TorchDispatchMode):  # noqa: N801
    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        self.states = [generator.get_state() for generator in self.graph.generators]
        self.before = {}
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for generator, state in zip(self.graph.generators, self.states, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in reversed(self.before.values()):  # the first values last
                tensor.copy_(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.is_view is False and function._schema.is_mutable:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.before.setdefault(id(leaf), (leaf, leaf.clone()))
        results = function(*args, **kwargs)
        self.graph.tape.append((function, args, kwargs, pytree.tree_leaves(results)))
        return results


@pytest.fixture
def launches(monkeypatch, captured):
    """Launches of recorded steps, without a GPU; counts recordings."""
    graphs = []

    def graph():
        graphs.append(RecordedGraph())
        return graphs[-1]

    monkeypatch.setattr("torch.cuda.CUDAGraph", graph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    monkeypatch.setattr("pyro_vae.compiled.launch.default_generator", lambda device: torch.default_generator)
    monkeypatch.setattr("pyro_vae.compiled.step.can_launch", lambda tensors: True)
    return graphs


def fitted(kind=torch.optim.Adam, device="cpu", gamma=1.0, warm_up=1):
    pyro.set_rng_seed(0)
    data = load("digits", binarization="dynamic").to(device)
    model, guide = (module.to(device) for module in vae(64, 2, hidden=(8,)))
    optimizer = kind([*model.parameters(), *guide.parameters()], lr=1e-3)
    schedule = LearningRate(torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma))
    objective = BetaELBO()
    svi = SVI(model, guide, optimizer, objective, compile="always")
    callbacks = [schedule, KLWarmup(objective, warm_up)]
    rows = fit(svi, batches(data.train, 20, seed=1), 2, callbacks, progress=False)
    elbos = torch.tensor([row["train/elbo"] for row in rows])
    return elbos, torch.cat([p.detach().flatten().cpu() for m in (model, guide) for p in m.parameters()])


@functools.cache
def one_by_one(run, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile", lambda module, inputs, options: module)
        patch.setattr("pyro_vae.compiled.step.can_launch", lambda tensors: False)
        return run(*args, **kwargs)


# Epochs of 3 x 20 + 4 + 1 steps. Of twenties, all after the second; of single steps those after the 23rd.
@pytest.mark.parametrize(
    ("optimizer", "gamma", "num_replays"),
    [
        (torch.optim.Adam, 1.0, [1 + 3, 17 + 4 + 4]),
        (torch.optim.Adagrad, 1.0, [1 + 3, 17 + 4 + 4]),
        (torch.optim.SGD, 1.0, [1 + 3, 17 + 4 + 4]),
        (torch.optim.Adam, 0.5, [1, 2, 4, 21]),  # a learning rate that changes is recorded anew
    ],
)
def test_several_steps_in_a_launch_are_those_one_by_one(launches, optimizer, gamma, num_replays):
    elbos, parameters = fitted(optimizer, gamma=gamma)
    assert sorted(graph.num_replays for graph in launches) == num_replays
    expected, expected_parameters = one_by_one(fitted, optimizer, gamma=gamma)
    torch.testing.assert_close(elbos, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-5, atol=1e-6)


def stepped(num_steps, every=None):
    """``PyroSVI`` on its own minibatches, whose learning rate may fall after ``every`` so many."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([8]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(torch.zeros(8), 1.0).to_event(1), obs=y)

    def guide(x, y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))

    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
    optim = pyro.optim.ExponentialLR({**adam, "gamma": 0.9})
    svi = PyroSVI(model, guide, optim, Trace_ELBO(), compile="always")
    losses = []
    for i in range(num_steps):
        losses.append(float(svi.step(torch.randn(8) + 1, torch.randn(8))))
        if every and i % every == 0:
            optim.step()
    return torch.tensor(losses), pyro.param("loc").item(), pyro.param("scale").item()


@pytest.mark.parametrize(("every", "num_recordings"), [(None, 1), (1, 0), (25, 3)])
def test_a_single_step_is_a_launch_if_nothing_changes_at_every_step(launches, every, num_recordings):
    found = stepped(90, every)
    assert len(launches) == num_recordings
    if every is None:
        assert launches[0].num_replays == 90 - 1 - 2 - 20  # the trial is a replay, too
    torch.testing.assert_close(found, one_by_one(stepped, 90, every), rtol=1e-5, atol=1e-6)


def test_a_recording_that_computes_something_else_is_not_used(launches, monkeypatch):
    monkeypatch.setattr(RecordedGraph, "replay", lambda self: None)
    with pytest.warns(NotCompiledWarning, match="one by one: .*something else"):
        _, parameters = fitted()
    _, expected = one_by_one(fitted)
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_recorded_goes_on_step_by_step(launches, monkeypatch):
    class failing(recording):  # noqa: N801
        def __exit__(self, *error):
            super().__exit__(*error)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    stopped = []
    monkeypatch.setattr("torch.cuda.graph", failing)
    monkeypatch.setattr("pyro_vae.compiled.launch._stop_recording", stopped.append)
    with pytest.warns(NotCompiledWarning, match=r"one by one: .*recorded .*\(operation .* capturing\)$"):
        _, parameters = fitted()
    assert len(launches) == len(stopped) == 2  # one step, and several
    _, expected = one_by_one(fitted)
    torch.testing.assert_close(parameters, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("asked", "does"), [(None, False), ("0", False), ("1", True)])
def test_launches_are_asked_for(monkeypatch, asked, does):
    monkeypatch.delenv("COMPILED_CUDA_GRAPHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("COMPILED_CUDA_GRAPHS", asked)
    monkeypatch.setattr("torch.version.hip", None)
    on_a_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    assert can_launch([on_a_gpu]) is does
    assert not can_launch([on_a_gpu, torch.zeros(1)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_after_a_recording_that_failed(monkeypatch):
    def unrecordable(self, row, draw=Batches.draw):
        if torch.cuda.is_current_stream_capturing():
            row.sum().item()
        return draw(self, row)

    monkeypatch.setattr(Batches, "draw", unrecordable)
    monkeypatch.setenv("COMPILED_CUDA_GRAPHS", "1")
    with pytest.warns(NotCompiledWarning, match="one by one: .*cannot be recorded"):
        _, parameters = fitted(device="cuda")
    monkeypatch.setattr("pyro_vae.compiled.step.can_launch", lambda tensors: False)
    _, expected = fitted(device="cuda")
    torch.testing.assert_close(parameters, expected, rtol=1e-3, atol=1e-3)


def test_a_recording_takes_values_of_other_devices_as_they_are():
    number, device = torch.tensor(0.5), torch.device("cuda", 0)
    before = taken_as_is([number], device), taken_as_is([number], number.device)
    number.fill_(1.0)
    assert taken_as_is([number], device) != before[0]
    assert taken_as_is([number], number.device) == before[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"gamma": 0.5}, {"warm_up": 2}])
def test_several_steps_in_a_launch_of_a_gpu(monkeypatch, settings):
    monkeypatch.setenv("COMPILED_CUDA_GRAPHS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        elbos, parameters = fitted(device="cuda", **settings)
    monkeypatch.setattr("pyro_vae.compiled.step.can_launch", lambda tensors: False)
    expected, expected_parameters = fitted(device="cuda", **settings)
    torch.testing.assert_close(elbos, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-3, atol=1e-3)
