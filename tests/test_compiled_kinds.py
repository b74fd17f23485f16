"""What users write around a program, compiled against eager: where they read, keep, count and change."""

import functools
import importlib
import sys
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import pyros_and_ours
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_vae import SVI, NotCompiledWarning, PyroSVI, vae
from pyro_vae.compiled import owners

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) + 1.0
STEPS, HALF = 16, 8

pytestmark = pytest.mark.usefixtures("captured")


class Job:
    """Model, guide and objective; what happens before and after a step; what the user has kept."""

    def __init__(self):
        self.prior, self.loc = (lambda: dist.Normal(0.0, 1.0)), (lambda z, x: z)
        self.loss, self.optim = Trace_ELBO(), pyro.optim.SGD({"lr": 0.01})
        self.before = self.after = lambda step, svi: None
        self.args, self.tell = lambda step: (X,), lambda: None

    def model(self, x, *more):
        z = pyro.sample("z", self.prior())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc(z, x, *more), 1.0).expand([3]).to_event(1), obs=x)

    def guide(self, x, *_):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))


def run(kind, change, seeded=True):
    """Losses or refusals of the steps of a changed job, what was learned and what kept, and the SVI."""
    job = Job()
    change(job)
    # Plain functions, so that the job, which is the test's, is no part of the programs.
    svi = kind(job.model, job.guide, job.optim, job.loss)
    pyro.set_rng_seed(1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotCompiledWarning)
        for step in range(STEPS):
            if seeded:
                pyro.set_rng_seed(100 + step)
            job.before(step, svi)
            try:
                found.append(float(svi.step(*job.args(step))))
            except ValueError as error:
                found.append(str(error).partition("\n")[0])
            job.after(step, svi)
    learned = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return found, learned, job.tell(), svi


def same(change, seeded=True):
    """Whether it was compiled; it must do what it does under ``pyro.infer.SVI``."""
    (expected, learned, told, _), (found, found_learned, found_told, svi) = pyros_and_ours(
        lambda kind: run(kind, change, seeded)
    )
    assert found_told == told
    for now, then in zip(found, expected, strict=True):
        assert now == then if isinstance(then, str) else now == pytest.approx(then, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(found_learned, learned, rtol=1e-3, atol=1e-4, equal_nan=True)
    return svi._compiled.function.is_compiled


# ------------------------------------------------------------- read where only a library calls


BETA = 1.0


class Annealed(Trace_ELBO):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def _get_trace(self, model, guide, args, kwargs):
        beta = self.config.beta
        parts = poutine.scale(model, scale=beta), poutine.scale(guide, scale=beta)
        return super()._get_trace(*parts, args, kwargs)


class Weighted(Messenger):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["scale"] = self.config.beta


class Tempered(dist.Normal):
    def log_prob(self, value):
        return BETA * super().log_prob(value)


def in_an_objective(job):
    config = types.SimpleNamespace(beta=0.1)
    job.loss = Annealed(config)
    job.before = lambda step, _: setattr(config, "beta", 0.1 + step // 5 * 0.3)


def in_a_messenger(job):
    config = types.SimpleNamespace(beta=1.0)
    model, handler = job.model, Weighted(config)

    def handled(x):
        with handler:
            model(x)

    job.model = handled
    job.before = lambda step, _: setattr(config, "beta", 5.0 if step >= HALF else 1.0)


def in_a_distribution(job):
    def before(step, _):
        global BETA
        BETA = 5.0 if step >= HALF else 1.0

    job.prior, job.before = lambda: Tempered(0.0, 1.0), before


@pytest.mark.parametrize("change", [in_an_objective, in_a_messenger, in_a_distribution])
def test_what_is_read_where_only_a_library_calls(change):
    assert same(change)


# ------------------------------------------------------------------------------ kept and changed


def test_a_dictionary_that_is_passed_is_filled():
    def change(job):
        batch, got = {}, []

        def model(batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch["z"] = z.detach()
            with pyro.plate("data", 6):
                pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=batch["x"])

        def args(_):
            batch.clear()
            batch["x"] = X
            return (batch,)

        job.model, job.args = model, args
        job.after = lambda *_: got.append(float(batch["z"]))
        job.tell = lambda: got

    assert not same(change)


# ------------------------------------------------------------------------------------ networks


class Buffered(nn.Linear):
    """Puts another tensor in place of a buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.register_buffer("calls", self.calls + 1)
        return super().forward(x) * torch.where(self.calls > HALF, 1.0, 0.1)


class Clamped(nn.Linear):
    """Changes its weights behind the back of autograd, after their use."""

    def forward(self, x):
        out = super().forward(x)
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return out


class Viewed(nn.Linear):
    """Writes to a view of its buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("sums", torch.zeros(4))
        self.first = self.sums[:2]

    def forward(self, x):
        self.first.add_(0.05)
        return super().forward(x) + self.sums.sum()


@pytest.mark.parametrize("net", [Buffered, Clamped, Viewed])
def test_networks_that_change_themselves(net):
    def in_the_guide(job):
        network = net(3, 1)

        def guide(x):
            pyro.module("net", network)
            pyro.sample("z", dist.Normal(network(x).mean(), 0.5))

        job.guide = guide
        job.tell = lambda: {n: b.flatten().tolist() for n, b in network.named_buffers()}

    same(in_the_guide)


@pytest.mark.parametrize("way", ["list", "dict", "isinstance"])
def test_a_small_penalty_of_parameters_that_are_found_otherwise(way):
    """Its gradient is a ten-thousandth of all, and is what moves these parameters."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.big = nn.Linear(1, 3), nn.Parameter(torch.ones(3))
            self.held = [self.lin.weight] if way == "list" else {self.lin.weight: 1.0}

        def penalty(self):
            if way == "list":
                return self.held[0].square().sum()
            if way == "dict":
                return sum(self.held.get(p, 0.0) * p.square().sum() for p in self.parameters())
            parameters = [p for p in self.lin.parameters() if isinstance(p, nn.Parameter)]
            return sum((p.square().sum() for p in parameters), torch.zeros(()))

    def change(job):
        net = Net()

        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(net.big, 0.05).to_event(1), obs=x)
            pyro.factor("penalty", -0.5 * net.penalty())

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

        job.model, job.guide, job.args = model, guide, lambda _: (30 * X,)
        job.optim = pyro.optim.Adam({"lr": 0.02})

    same(change)


def test_a_look_at_a_value_that_is_caught():
    def count(mask):
        try:
            return int(mask.sum())
        except Exception:
            return len(mask)

    def change(job):
        job.loc = lambda z, x, mask: z * count(mask)
        job.args = lambda step: (X, torch.arange(6) < (6 if step < HALF else 2))

    assert not same(change)


def test_a_dropout_whose_result_is_not_used_draws_its_numbers():
    def change(job):
        job.loc = lambda z, x: (z, nn.functional.dropout(x, 0.5))[0]

    assert same(change, seeded=False)


# ----------------------------------------------------------------------- gradients and arguments


def test_gradients_that_are_there_are_added():
    def change(job):
        job.before = lambda step, _: (5.0 * pyro.param("loc")).backward() if step else None

    assert same(change)


def test_gradients_of_a_network_that_pyro_does_not_see():
    def change(job):
        decoder = nn.Linear(1, 3)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=0.05)

        def after(*_):
            optimizer.step()
            optimizer.zero_grad()

        job.loc, job.after = lambda z, x: decoder(z[None]), after

    assert not same(change)


@pytest.mark.parametrize("noise", [lambda x: x + torch.randn_like(x), lambda x: x.view(-1).view(6, 3)])
def test_data_in_another_memory_order(noise):
    def change(job):
        model, turned = job.model, X.t().contiguous().t()
        job.model = lambda x: model(noise(x))
        job.args = lambda step: (X if step < HALF else turned,)

    if noise(X).equal(X):
        with pytest.raises(RuntimeError, match="view size"):
            run(functools.partial(PyroSVI, compile="always"), change)
    else:
        same(change)


def test_arguments_that_are_one_tensor_and_what_is_noted_on_them():
    def change(job):
        other, noted = X.clone(), X.clone()
        noted.beta = 0.5
        job.loc = lambda z, x, y: z * (0.3 if x is y else getattr(x, "beta", 1.0))
        job.args = lambda step: (X, other) if step < 5 else (X, X) if step < 10 else (noted, other)

    same(change)


# ------------------------------------------------------------------------- what Pyro refuses


def outside(prior, scale):
    def change(job):
        job.prior = prior
        job.guide = lambda x: pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.9)), scale))

    return change


def drifts(family, value):
    def change(job):
        def model(x):
            with pyro.plate("data", 6):
                pyro.sample("x", family(pyro.param("p", torch.tensor(0.3))), obs=x)

        job.model, job.guide = model, lambda x: None
        job.args, job.optim = lambda _: (torch.full((6,), value),), pyro.optim.Adam({"lr": 0.05})

    return change


def becomes_no_number(score):
    def change(job):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                score(x.log() + z)

        job.model, job.args = model, lambda step: (torch.full((6,), 1.0 if step < 10 else -1.0),)

    return change


REFUSED = {
    "a factor that is no number": becomes_no_number(lambda loc: pyro.factor("weight", loc)),
    "a mean that is no number": becomes_no_number(
        lambda loc: pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(6))
    ),
    "a draw below 0 of an exponential": outside(lambda: dist.Exponential(1.0), 0.4),
    "a draw outside of a box": outside(lambda: dist.Uniform(-2.0, 2.0), 0.9),
    "a probability below 0": drifts(dist.Bernoulli, 0.0),
    "a scale below 0": drifts(lambda scale: dist.Normal(0.0, scale), 0.001),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_pyro_refuses_at_a_later_step(what):
    assert same(REFUSED[what], seeded=False)


@pytest.mark.parametrize("pyros", [True, False])
def test_a_step_of_an_optimiser_that_was_wrapped_is_taken(pyros):
    calls, job, (model, guide) = [], Job(), vae(3, 1, hidden=(4,))
    if pyros:
        svi = PyroSVI(job.model, job.guide, job.optim, job.loss, compile="always")
    else:
        adam = torch.optim.Adam([*model.parameters(), *guide.parameters()])
        svi = SVI(model, guide, adam, compile="always")
    x = (X > 1).float()
    for _ in range(4):
        svi.step(x)
    (optimizer,) = job.optim.optim_objs.values() if pyros else [adam]
    step, params = optimizer.step, optimizer.param_groups[0]["params"]

    def clipped(*args, **kwargs):
        calls.append(nn.utils.clip_grad_norm_(params, 0.1))
        return step(*args, **kwargs)

    optimizer.step = clipped
    for _ in range(3):
        svi.step(x)
    assert svi._compiled.function.is_compiled
    assert len(calls) == 3


# --------------------------------------------------------- gradients of what is used in some steps


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("first", ["with", "without"])
def test_a_parameter_that_the_loss_depends_on_in_some_steps(every, first):
    """As of q(y | x) where labels are missing: Pyro moves it on by its momentum."""

    def change(job):
        shift, scale, seen = torch.tensor(0.3), torch.tensor(0.5), []

        def guide(x, labelled):
            loc, other = pyro.param("loc", shift), pyro.param("other", scale)
            pyro.sample("z", dist.Normal(loc + other if labelled else loc, 0.5))

        job.guide, job.loc, job.optim = guide, lambda z, *_: z, pyro.optim.Adam({"lr": 0.05})
        job.args = lambda step: (X, (step % every == 0) == (first == "with"))
        job.after = lambda step, svi: seen.append(float(pyro.param("other").unconstrained().grad is not None))
        job.tell = lambda: seen

    assert same(change)


def test_parameters_of_two_that_are_trained_in_turn_and_hidden():
    """backward() leaves gradients on hidden parameters, to which the other's step adds."""

    def change(job):
        encoder, decoder, others = nn.Linear(3, 2), nn.Linear(1, 3), []

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale = encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def before(step, svi):
            if not others:
                always = {"compile": "always"} if isinstance(svi, PyroSVI) else {}
                hidden = poutine.block(model, hide_types=["param"])
                others.append(type(svi)(hidden, guide, job.optim, job.loss, **always))
            others[0].step(X)

        job.model, job.guide, job.before = model, poutine.block(guide, hide_types=["param"]), before

    assert same(change)


class Sum(nn.Module):
    """Two biases, whose gradients are equal."""

    def __init__(self):
        super().__init__()
        self.common, self.own = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, z):
        return z + (self.common + self.own)


def test_equal_gradients_that_are_clipped_in_place():
    def trained(compile):  # noqa: A002
        torch.manual_seed(0)
        model, guide = vae(3, 3, hidden=(4,))
        total = Sum()
        model.likelihood.net = nn.Sequential(total, model.likelihood.net)
        params = [*model.parameters(), *guide.parameters()]
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(params, 0.1) and None)
        svi = SVI(model, guide, optimizer, compile=compile)
        for _ in range(8):
            svi.step((X > 1).float())
        assert not compile or svi._compiled.function.is_compiled
        return total.common.detach()

    torch.testing.assert_close(trained("always"), trained(False), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------- tensors that are no buffers


@pytest.mark.parametrize("way", ["data", "data of a number", "large"])
def test_tensors_that_are_no_buffers(way):
    def change(job):
        model, job.count = job.model, torch.zeros(())
        job.kept = torch.zeros(1_000_001 if way == "large" else 3)

        def changing(x):
            if way == "data":
                job.kept.data = 0.9 * job.kept + 0.1 * x.mean(0)
            elif way == "large":
                job.kept[:3] += x.mean(0)
            else:
                job.count.data = job.count + 1
            model(x - 0.01 * job.kept[:3] - 0.01 * job.count)

        job.model = changing
        job.tell = lambda: [*job.kept[:3].tolist(), job.count.item()]

    assert not same(change)


def test_a_checkpoint_that_knows_backward_alone():
    def change(job):
        decoder, model = nn.Linear(1, 3), job.model
        job.model = lambda x: (pyro.module("decoder", decoder), model(x))
        job.loc = lambda z, x: torch.utils.checkpoint.checkpoint(decoder, z[None], use_reentrant=True)

    assert not same(change)


def test_objects_that_raise_when_they_are_looked_at(monkeypatch):
    """Such as TensorBoard's flags, which say that they are a class and have no name."""

    def look(*_):
        raise AttributeError("__name__")

    monkeypatch.setattr("pyro_vae.compiled.trial.Heap", look)
    assert not same(lambda job: None)


# ---------------------------------------------------------------------- a helper that is installed


@pytest.mark.parametrize("requires", ["numpy", "scipy>=1"])
def test_a_package_of_the_users_own_is_followed_though_it_is_installed(requires, tmp_path, monkeypatch):
    """It needs no torch, and its functions read numbers that change."""
    (tmp_path / "lab_tools.py").write_text("SCALE = 0.3\n\ndef scale():\n    return SCALE\n")
    (tmp_path / "lab_tools-1.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: lab_tools\nVersion: 1\nRequires-Dist: {requires}\n"
    (tmp_path / "lab_tools-1.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(owners, "_PLACES", {*owners._PLACES, tmp_path})
    lab_tools = importlib.import_module("lab_tools")

    def change(job):
        job.loc = lambda z, x: z * lab_tools.scale()
        job.before = lambda step, svi: setattr(lab_tools, "SCALE", 0.3 if step < HALF else 2.0)

    try:
        assert same(change)
    finally:
        del sys.modules["lab_tools"]
        owners.forget()
