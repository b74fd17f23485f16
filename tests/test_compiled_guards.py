"""What may change beside a compiled program: it is noticed, or the program refused with the reason."""

import copy
import enum
import functools
import itertools
import math
import random
import time
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import pyros_and_ours
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_vae import SVI, BetaELBO, NotCompiledWarning, PyroSVI
from pyro_vae.compiled.updates import FusedUpdate

pytestmark = pytest.mark.usefixtures("captured")

CONFIG = {"weight": 1.0}
OPTIONS = types.SimpleNamespace(offset=0.0)
LOG = []


class Kind(enum.Enum):
    PLAIN = 1.0
    DOUBLE = 2.0


def bend(x):
    return x + 0.1 * x**2


def straighten(x):
    return x - 0.1 * x**2


class Model(nn.Module):
    """Depends on something of every kind."""

    factor, reseeded = 1.0, True

    def __init__(self):
        super().__init__()
        self.made_at = time.time()  # the program does not look at it
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 6))
        self.settings = types.SimpleNamespace(beta=1.0)
        self.weights = [1.0, torch.tensor(1.0)]
        self.number, self.power, self.kind = np.float32(1.0), 2, Kind.PLAIN
        self.array = np.ones(2)
        self.bend = bend
        self.prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        self.register_buffer("mask", None)
        self.losses = []  # of no concern to the program

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            with poutine.scale(scale=self.helper()):
                loc = self.bend(self.net(z)) * getattr(self, "gain", 1.0) + OPTIONS.offset
                loc = loc if self.mask is None else loc * self.mask
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def helper(self):
        numbers = self.factor * self.settings.beta * self.number * self.kind.value * CONFIG["weight"]
        return float(numbers) * self.weights[0] * self.weights[1] * (3**self.power / 9) * self.array.sum() / 2


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, x):
        loc, scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def reset():
    CONFIG["weight"], OPTIONS.offset, Model.factor = 1.0, 0.0, 1.0
    LOG.clear()
    nn.modules.module._global_forward_hooks.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    reset()


def run(compile, change=None, model=Model):  # noqa: A002
    """Losses and parameters of seven steps, with a change in the middle, and the SVI."""
    reset()
    model, guide = model(), Guide()
    parameters = [*model.parameters(), *guide.parameters()]
    svi = SVI(model, guide, torch.optim.SGD(parameters, lr=0.02, momentum=0.5), compile=compile)
    x, losses = torch.rand(8, 6), []
    for i in range(7):
        if i == 4 and change is not None:
            change(svi)
        if model.reseeded:
            torch.manual_seed(i)
        losses.append(float(svi.step(x)["elbo"]))
        model.losses.append(losses[-1])
    return torch.tensor(losses), [p.detach() for m in (svi.model, svi.guide) for p in m.parameters()], svi


def is_as_eager(change=None, model=Model):
    """The compiled run is the eager one, up to rounding; returns its SVI."""
    expected, found = run(False, change, model), run("always", change, model)
    buffers = [list(svi.model.buffers()) for _, _, svi in (found, expected)]
    for a, b in zip((*found[:2], buffers[0]), (*expected[:2], buffers[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(found[2].model.weights) == len(expected[2].model.weights)
    return found[2]


def guide_of_z(*_):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def compiled(model, guide=guide_of_z):
    return PyroSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), compile="always")


def same_as_pyro(model, guide, steps, loss=None):
    """Losses and parameters are those of ``pyro.infer.SVI`` for the arguments of these steps; the SVI."""

    def train(kind):
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())
        losses = []
        for i, arguments in enumerate(steps):
            torch.manual_seed(i)
            losses.append(float(svi.step(*arguments)))
        learned = [value.detach().flatten() for _, value in sorted(pyro.get_param_store().items())]
        return torch.cat([torch.tensor(losses), *learned]), svi

    (expected, _), (found, svi) = pyros_and_ours(train)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return svi


def set_item(things, key, value):
    things[key] = value


def grow(svi):
    extra = nn.Linear(6, 6)
    svi.model.net.append(extra)
    svi.optimizer.add_param_group({"params": list(extra.parameters())})


def transpose(svi):
    weight = svi.model.net[0].weight
    weight.data = weight.data.t().contiguous().t()


CHANGES = {
    "attribute of a class": lambda svi: setattr(Model, "factor", 2.0),
    "attribute of a namespace": lambda svi: setattr(svi.model.settings, "beta", 0.5),
    "attribute of a global": lambda svi: setattr(OPTIONS, "offset", 0.5),
    "entry of a global dict": lambda svi: set_item(CONFIG, "weight", 2.0),
    "entry of a list": lambda svi: set_item(svi.model.weights, 0, 2.0),
    "tensor in a list": lambda svi: set_item(svi.model.weights, 1, torch.tensor(2.0)),
    "number of NumPy": lambda svi: setattr(svi.model, "number", np.float32(2.0)),
    "array of NumPy": lambda svi: setattr(svi.model, "array", np.full(2, 2.0)),
    "array of NumPy in place": lambda svi: set_item(svi.model.array, 0, 3.0),
    "member of an enum": lambda svi: setattr(svi.model, "kind", Kind.DOUBLE),
    "attribute that was not there": lambda svi: setattr(svi.model, "gain", 2.0),
    "distribution": lambda svi: setattr(svi.model, "prior", dist.Normal(torch.ones(2), 1.0).to_event(1)),
    "function in an attribute": lambda svi: setattr(svi.model, "bend", straighten),
    "method of an object": lambda svi: setattr(svi.model.net, "forward", lambda z: z.repeat(1, 3)),
    "buffer that was None": lambda svi: setattr(svi.model, "mask", torch.tensor([0.0, 1, 1, 1, 0, 0])),
    "module": lambda svi: setattr(svi.model, "net", nn.Sequential(nn.Linear(2, 6))),
    "module in a sequence": lambda svi: set_item(svi.model.net, 1, nn.ReLU()),
    "another layer": grow,
    "forward hook": lambda svi: svi.model.net.register_forward_hook(lambda m, a, out: 2 * out),
    "forward hook of all modules": lambda svi: nn.modules.module.register_module_forward_hook(
        lambda m, a, out: 2 * out if isinstance(m, nn.Tanh) else out
    ),
    "layout of a parameter": transpose,
    "model": lambda svi: setattr(svi, "model", svi.model.requires_grad_(False) and Model()),
    "loss": lambda svi: setattr(svi, "loss", BetaELBO(0.5)),
    "optimizer": lambda svi: setattr(svi, "optimizer", torch.optim.SGD(svi.guide.parameters(), lr=0.1)),
    "momentum switched off": lambda svi: set_item(svi.optimizer.param_groups[0], "momentum", 0.0),
    "hook of an optimizer": lambda svi: svi.optimizer.register_step_post_hook(
        lambda *_: [p.data.clamp_(-0.1, 0.1) for p in svi.guide.parameters()]
    ),
    "parameter taken from an optimizer": lambda svi: svi.optimizer.param_groups[0]["params"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change):
    svi = is_as_eager(change)
    assert svi._current.function.is_compiled  # again


def test_settings_that_change_in_place_are_noticed():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = torch.optim.Adam([param])
    optimizer.step()
    optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    update = FusedUpdate([optimizer], [param])
    assert update.is_current([optimizer], [param])
    optimizer.param_groups[0]["betas"][0] = 0.5
    assert not update.is_current([optimizer], [param])


def test_a_list_beside_the_program_is_of_no_concern():
    assert [len(variants) for variants in is_as_eager()._current.function._variants.values()] == [1]


def altered(begin=lambda model: None, before=lambda model, x: None, weight=lambda model: 1.0, reseeded=True):
    """A model: what it does once it is made, before every run, and a weight of its own."""

    class Altered(Model):
        def __init__(self):
            super().__init__()
            begin(self)

        def forward(self, x):
            before(self, x)
            super().forward(x)

        def helper(self):
            return weight(self) * super().helper()

    Altered.reseeded = reseeded
    return Altered


def count(model, x):
    model.count = model.count + 1
    OPTIONS.offset = OPTIONS.offset + 0.1


def look(model, x):
    if x.sum() > 3:
        pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def go_by_a_list(model, x, log=LOG):
    log.append(1)
    pyro.factor("count", torch.tensor(float(len(log))))


HERE = r".*test_compiled_guards.py:\d+"
REFUSED = {
    "item": (altered(before=lambda model, x: x.sum().item()), rf"item\(\) at {HERE} \(site 'z'"),
    "if": (altered(before=look), f"if or while at {HERE}"),
    "numpy": (altered(before=lambda model, x: x.numpy()), rf"numpy\(\) at {HERE}"),
    "index": (altered(before=lambda model, x: x[x > 0.5]), f"values of tensors {HERE}"),
    "random": (altered(weight=lambda model: random.random()), f"Python's random generator at {HERE}"),
    "numpy.random": (altered(weight=lambda model: float(np.random.rand())), "NumPy's random generator"),
    "length of a list": (altered(before=go_by_a_list), "changes a default of go_by_a_list"),
    "notes something": (
        altered(before=lambda model, x: setattr(model, "last", x.sum())),
        "running it changes last of Altered",
    ),
    "counts": (
        altered(lambda model: model.register_buffer("count", torch.tensor(0.0)), count),
        "running it changes global OPTIONS|offset of SimpleNamespace|count of Altered",
    ),
    "appends": (
        altered(before=lambda model, x: model.weights.append(x.mean())),
        "running it changes weights of Altered",
    ),
    "reads": (
        altered(
            lambda model: setattr(model, "factors", itertools.cycle([1.0] * 5 + [2.0])),
            weight=lambda model: next(model.factors),
        ),
        "reads from an iterator.*factors of Altered",
    ),
    "decides": (
        altered(
            lambda model: setattr(model, "random", random.Random(4)),
            weight=lambda model: 2.0 if model.random.random() < 0.2 else 1.0,
        ),
        "random generator of its own.*random of Altered",
    ),
    "looks at the time": (altered(weight=lambda model: 1.0 if time.time() > 0 else 2.0), "looks at the time"),
    "seeds": (
        altered(before=lambda model, x: torch.manual_seed(0), reseeded=False),
        "seeds the random generator",
    ),
    "looks at a value after a buffer changed where autograd does not see it": (
        altered(lambda model: model.net.append(nn.BatchNorm1d(6, momentum=None))),
        "looks at the value of a tensor by float",
    ),
    "a parameter of no module": (
        altered(lambda model: set_item(model.weights, 1, torch.tensor(1.0, requires_grad=True))),
        "neither a parameter of a module nor",
    ),
    "a hook of a parameter": (
        altered(lambda model: model.net[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))),
        "weight of Linear net.0 has a hook",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_would_not_do_is_refused_and_run_as_ever(model, message):
    with pytest.warns(NotCompiledWarning, match=message) as caught:
        svi = is_as_eager(model=model)
    assert [warning.category for warning in caught] == [NotCompiledWarning]  # one is enough
    assert not svi._current.function.is_compiled


def test_a_program_that_changes_its_argument_does_so_once_a_step():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x.sum())

    def guide(x):
        x += 1
        guide_of_z()

    svi, x = compiled(model, guide), torch.zeros(2)
    svi.step(x)
    with pytest.warns(NotCompiledWarning, match="changes an argument in place"):
        svi.step(x)
    assert (x == 2).all()


def test_what_is_replaced_at_every_step_is_not_compiled_anew_for_ever():
    model, guide = Model(), Guide()
    svi = SVI(model, guide, torch.optim.SGD(guide.parameters(), lr=0.01), compile="always")

    def anneal():
        for i in range(12):
            model.weights[1] = torch.tensor(1.0 + i)
            svi.step(torch.rand(8, 6))

    words = "again and again .*container: tensor.*in a tensor, and change that"
    with pytest.warns(NotCompiledWarning, match=words):
        anneal()
    assert not svi._current.function.is_compiled


@functools.lru_cache
def table(length):
    return torch.arange(float(length))


class Caching(Model):
    def forward(self, x):
        CACHE.setdefault(len(x), torch.ones(len(x), 1))
        super().forward(x * CACHE[len(x)] + 0 * table(len(x))[:, None])


CACHE = {}


def test_caches_by_shape_hold_tensors_with_values():
    losses = []
    for when in (False, "always"):
        CACHE.clear()
        table.cache_clear()
        reset()
        model, guide = Caching(), Guide()
        optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=0.02)
        svi, x = SVI(model, guide, optimizer, compile=when), torch.rand(8, 6)
        for size in (8, 8, 8, 5, 8, 8, 5, 5):
            torch.manual_seed(size)
            losses.append(float(svi.step(x[:size])["elbo"]))
    torch.testing.assert_close(losses[8:], losses[:8], rtol=1e-4, atol=1e-5)
    assert svi._current.function.is_compiled
    assert type(CACHE[5]) is torch.Tensor
    assert float(table(5).sum()) == 10


def test_a_copy_goes_its_own_way():
    svi = run("always")[2]
    other = copy.deepcopy(svi)
    before = [p.detach().clone() for p in svi.model.parameters()]
    for _ in range(4):
        other.step(torch.rand(8, 6))
    assert all(map(torch.equal, before, svi.model.parameters()))
    assert not any(map(torch.equal, before, other.model.parameters()))
    assert other._current.function.is_compiled


def test_gradients_of_a_compiled_step_are_not_those_of_an_earlier_one():
    svi = run("always")[2]
    assert all(p.grad is None for p in svi.guide.parameters())


def test_handlers_and_no_grad_around_a_step_run_eagerly():
    svi = run("always")[2]
    before = [p.detach().clone() for p in svi.guide.parameters()]
    x = torch.rand(8, 6)
    torch.manual_seed(0)
    plain = svi.step(x)["elbo"]
    with torch.no_grad():
        for p, value in zip(svi.guide.parameters(), before, strict=True):
            p.copy_(value)
    torch.manual_seed(0)
    with pytest.warns(NotCompiledWarning, match="handlers of Pyro are active"), poutine.scale(scale=10.0):
        assert svi.step(x)["elbo"] < 3 * plain
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        svi.step(x)


# --------------------------------------------------------------------------------------- the parameter store


STORE_CHANGES = {
    "nothing": lambda svi, x: None,
    "cleared": lambda svi, x: pyro.clear_param_store(),
    "another optimizer": lambda svi, x: setattr(svi, "optim", pyro.optim.SGD({"lr": 0.01})),
    "optimizers cleared": lambda svi, x: svi.optim.optim_objs.clear(),
    "another guide": lambda svi, x: setattr(svi, "guide", poutine.scale(svi.guide, scale=0.5)),
    "a batch of another size": lambda svi, x: x.resize_(5),
}


@pytest.mark.parametrize("change", STORE_CHANGES.values(), ids=STORE_CHANGES)
def test_changes_of_the_parameter_store_are_noticed(change):
    def model(data):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

    def guide(data):
        scale = pyro.param("scale", lambda: torch.rand(()) + 0.5, constraint=dist.constraints.positive)
        pyro.sample("loc", dist.Normal(pyro.param("loc_q", lambda: torch.tensor(0.0)), scale))

    def train(kind):
        x, losses = torch.randn(20) + 3, []
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for i in range(7):
            if i == 4:
                change(svi, x)
            torch.manual_seed(i)
            losses.append(float(svi.step(x)))
        return torch.tensor([*losses, pyro.param("loc_q").item(), pyro.param("scale").item()])

    torch.testing.assert_close(*pyros_and_ours(train), rtol=1e-4, atol=1e-5)


def test_a_program_without_arguments_is_compiled():
    x = torch.randn(30) + 3

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide():
        pyro.sample("loc", dist.Normal(pyro.param("loc_q", torch.tensor(0.0)), 0.1))

    svi = compiled(model, guide)
    for _ in range(200):
        svi.step()
    assert svi._compiled.function.is_compiled
    assert abs(pyro.param("loc_q").item() - x.mean().item()) < 0.2


def test_bayesian_networks_of_pyro_modules_are_compiled():
    class Regression(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = pyro.nn.PyroModule[nn.Linear](3, 1)
            self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

        def forward(self, x, y):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    x, weight = torch.randn(50, 3), torch.tensor([1.0, -2.0, 0.5])
    y, model = x @ weight, Regression()
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = PyroSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), compile="always")
    for _ in range(400):
        svi.step(x, y)
    assert svi._compiled.function.is_compiled
    loc = pyro.param("AutoNormal.locs.linear.weight").detach().flatten()
    torch.testing.assert_close(loc, weight, rtol=0, atol=0.1)


def test_what_arguments_bring_into_play_is_trained():
    def model(x, y=None):
        loc = pyro.param("a", torch.tensor(1.0)) * pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        if y is not None:
            pyro.sample("y", dist.Normal(pyro.param("b", torch.tensor(1.0)), 1.0), obs=y)

    x, y = torch.tensor(0.5), torch.tensor(2.0)
    svi = same_as_pyro(model, guide_of_z, [(x, y), (x,), *[(x, y), (x,), (x, y)] * 4])
    assert svi._compiled.function.is_compiled


def test_a_loss_of_no_parameter_runs_eagerly():
    def model(x, y=None):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        if y is not None:
            pyro.sample("y", dist.Normal(pyro.param("a", torch.tensor(1.0)), 1.0), obs=y)

    one, both = (torch.tensor(1.0),), (torch.tensor(1.0), torch.tensor(2.0))
    steps = [both, one, one, both, both, one, both, both, one, both]
    svi = same_as_pyro(model, lambda x, y=None: None, steps)
    assert svi._compiled.function.refused is None


def test_two_share_an_optimizer():
    def programs(name):
        def model(x):
            z = pyro.sample("z", dist.Normal(pyro.param("shared", torch.tensor(1.0)), 1.0))
            pyro.sample("x", dist.Normal(z * pyro.param(name, torch.tensor(1.0)), 1.0), obs=x)

        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param(f"{name}_q", torch.tensor(0.0)), 1.0))

        return model, guide

    def train(kind):
        optim = pyro.optim.Adam({"lr": 0.05})
        both = [kind(*programs(name), optim, Trace_ELBO()) for name in ("a", "b")]
        for i in range(16):
            torch.manual_seed(i)
            both[i % 2].step(torch.tensor(3.0))
        return {name: value.item() for name, value in pyro.get_param_store().items()}

    torch.testing.assert_close(*pyros_and_ours(train), rtol=1e-4, atol=1e-5)


def test_names_of_sites_and_methods_of_libraries_are_no_variables():
    names = {"x": 0, "data": iter([1]), "time": time, "torch": torch, "pyro": pyro, "dist": dist}
    exec(
        "def model(batch):\n"
        "    z = pyro.sample('time', dist.Normal(0.0, 1.0))\n"
        "    with pyro.plate('data', len(batch)):\n"
        "        pyro.sample('x', dist.Normal(torch.log(z.exp()), 1.0), obs=batch)\n"
        "def guide(batch):\n"
        "    pyro.sample('time', dist.Normal(pyro.param('loc', torch.tensor(0.0)), 1.0))\n",
        names,
    )
    svi = compiled(names["model"], names["guide"])
    for names["x"] in range(8):
        svi.step(torch.ones(3))
    assert [len(variants) for variants in svi._compiled.function._variants.values()] == [1]


def test_sequential_plates_blocked_parameters_and_namespaces():
    options = types.SimpleNamespace(scale=2.0)

    def model(x, args):
        z = pyro.sample("z", dist.Normal(0.0, args.scale))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x, args):
        with poutine.block(hide_types=["param"]):
            scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))

    svi = same_as_pyro(model, guide, [(torch.tensor([1.0, 2.0, 4.0]), options)] * 6)
    assert svi._compiled.function.is_compiled
    options.scale = 0.001
    losses = [svi.step(torch.tensor([1.0, 2.0, 4.0]), options) for _ in range(3)]
    assert max(losses) > 1_000


@pytest.mark.parametrize("plates", ["nested", "twice", "permuted"])
def test_data_one_by_one_have_the_index_of_their_plate(plates):
    data, order = torch.arange(12.0).reshape(4, 3) / 5, torch.tensor([3, 0, 2, 1])

    def pairs():
        rows = pyro.plate("rows", 4, subsample=order if plates == "permuted" else None)
        if plates == "nested":
            columns = pyro.plate("columns", 3)
            return ((f"{i}_{j}", i, j) for i in rows for j in columns)
        return ((f"{i}_{j}", i, j) for j in range(2) for i in rows)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for position, (name, i, j) in enumerate(pairs()):
            pyro.sample(f"x_{name}", dist.Normal(z, 1.0 + position), obs=data[i, j])

    if plates == "permuted":  # which indices they are is a value
        with pytest.warns(NotCompiledWarning, match=r"looks at the value of a tensor by item\(\)"):
            same_as_pyro(model, guide_of_z, [()] * 6)
    else:
        assert same_as_pyro(model, guide_of_z, [()] * 6)._compiled.function.is_compiled


def test_what_has_no_probability_is_left_out_whenever_that_is():
    def model(x, known):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Uniform(0.0, 1.0 + z, validate_args=False), obs=x)  # above 1 never if z = 0
            pyro.sample("y", dist.Normal(z, scale), obs=x)

    @config_enumerate
    def guide(x, known):
        logits = torch.stack([torch.zeros(3), pyro.param("logit", torch.tensor(0.0)).expand(3)], -1)
        logits = torch.where(known, torch.tensor([-math.inf, 0.0]), logits)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    possible = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([[False], [False], [False]])
    labelled = torch.tensor([0.2, 1.4, 0.9]), torch.tensor([[False], [True], [False]])
    svi = same_as_pyro(model, guide, [possible] * 6 + [labelled] * 6, TraceEnum_ELBO(max_plate_nesting=1))
    assert svi._compiled.function.is_compiled


def test_elements_of_a_range_that_is_written_to_are_values():
    def model(x):
        steps = torch.arange(3)
        steps.mul_(2)
        scale = 1.0 + int(steps[1])
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), scale), obs=x)

    with pytest.warns(NotCompiledWarning, match=r"looks at the value of a tensor by int\(\)"):
        same_as_pyro(model, guide_of_z, [(torch.tensor(1.0),)] * 6)


def test_a_loss_that_cannot_be_captured_runs_eagerly():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.warns(NotCompiledWarning, match="TraceGraph_ELBO has no differentiable_loss"):
        svi = same_as_pyro(model, guide_of_z, [(torch.tensor(1.0),)] * 3, pyro.infer.TraceGraph_ELBO())
    assert isinstance(svi.loss(model, guide_of_z, torch.tensor(1.0)), float)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (torch.rand(8, 6).to_sparse(), "sparse"),
        (torch._neg_view(-torch.rand(8, 6)), "negated"),
        (torch.rand(8, 6, requires_grad=True), "requires gradients"),
        (np.ones((8, 6)), "is a ndarray"),
    ],
)
def test_arguments_without_a_graph_run_eagerly(argument, message):
    def model(x):
        dense = torch.as_tensor(x).to_dense() if not isinstance(x, np.ndarray) else torch.from_numpy(x)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([6]).to_event(1), obs=dense.float().mean(0))

    svi = compiled(model)
    svi.step(argument)
    with pytest.warns(NotCompiledWarning, match=message):
        svi.step(argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(argument)
