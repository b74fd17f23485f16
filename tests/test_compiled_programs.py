"""Programs that are made, each with state of its own: compiled they do what they do eagerly, or are refused.

What is captured runs as it is, without Inductor: what is tested is what a graph stands for.
"""

import argparse
import array
import collections
import contextvars
import ctypes
import functools
import itertools
import operator
import os
import sys
import tempfile
import types
import unittest
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_vae import MLP, NotCompiledWarning, PyroSVI

X = torch.tensor([2.0, 3.0, 2.5])
STEPS = 30


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile", lambda module, inputs, options: module)


def programs(factor):
    """A model and a guide; ``factor()`` is a number that the model depends on."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z * factor(), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))

    return model, guide


def trained(kind, make):
    """Losses of some steps, what was learned, and what the program says of its state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    factor, change, tell = make()
    model, guide = programs(factor)
    svi = kind(model, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotCompiledWarning)
        for i in range(STEPS):
            change(i)
            torch.manual_seed(i)
            losses.append(float(svi.step(X)))
    return torch.tensor([*losses, pyro.param("loc").item()]), tell(), svi


def same_as_pyro(make):
    """Whether a program is compiled; it must do what it does under ``pyro.infer.SVI``."""
    expected, state, _ = trained(pyro.infer.SVI, make)
    found, found_state, svi = trained(functools.partial(PyroSVI, compile="always"), make)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found_state == state
    return svi._compiled is not None and svi._compiled.function.is_compiled


def nothing(_):
    pass


# ------------------------------------------------------------------------- a counter in what it holds


def gradually(count):
    return 0.1 if count <= STEPS // 2 else 1.0


BASES = {
    "object": (object, ()),
    "nn.Module": (nn.Module, ()),
    "nn.Linear": (nn.Linear, (1, 1)),
    "nn.Sequential": (nn.Sequential, (nn.Linear(1, 1),)),
    "nn.GRU": (nn.GRU, (1, 1)),
    "PyroModule": (PyroModule, ()),
    "PyroModule[nn.Linear]": (PyroModule[nn.Linear], (1, 1)),
    "AutoNormal": (AutoNormal, (lambda: pyro.sample("w", dist.Normal(0.0, 1.0)),)),
    "EasyGuide": (EasyGuide, (lambda: None,)),
    "Trace_ELBO": (Trace_ELBO, ()),
    "Messenger": (Messenger, ()),
    "Normal": (dist.Normal, (0.0, 1.0)),
    "SimpleNamespace": (types.SimpleNamespace, ()),
    "Namespace": (argparse.Namespace, ()),
    "dict": (dict, ()),
    "list": (list, ()),
    "Tensor": (torch.Tensor, ([0.0],)),
    "MLP": (MLP, (1, 1, (2,))),
}


def add(self):
    self.calls = getattr(self, "calls", 0) + 1
    return self.calls


def by_name(self):
    setattr(self, "calls", getattr(self, "calls", 0) + 1)  # noqa: B010
    return self.calls


def by_a_made_up_name(self):
    name = "".join(["ca", "lls"])
    setattr(self, name, getattr(self, name, 0) + 1)
    return getattr(self, name)


def in_vars(self):
    vars(self)["calls"] = vars(self).get("calls", 0) + 1
    return vars(self)["calls"]


def in_a_list(self):
    if not hasattr(self, "history"):
        self.history = []
    self.history.append(1)
    return len(self.history)


def in_an_array(self):
    if not hasattr(self, "numbers"):
        self.numbers = np.zeros(2, dtype=int)
    self.numbers[1] += 1
    return int(self.numbers[1])


def in_the_class(self):
    type(self).total = getattr(type(self), "total", 0) + 1
    return type(self).total


WAYS = [add, by_name, by_a_made_up_name, in_vars, in_a_list, in_an_array, in_the_class]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_counter_in_a_subclass(base, way):
    is_read = (len(base) + len(way.__name__)) % 3 > 0

    def make():
        kind, args = BASES[base]
        more = {"guide": lambda self: None} if kind is EasyGuide else {}
        counter = type("Counted", (kind,), {"tick": way, **more})(*args)

        def factor():
            count = counter.tick()
            return gradually(count) if is_read else 1.0

        return factor, nothing, lambda: way(counter)  # one more

    assert not same_as_pyro(make)


# ------------------------------------------------------------------------- a counter anywhere


class Slotted:
    __slots__ = ("calls",)


class Stepwise(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        Stepwise.calls += 1
        return x * gradually(Stepwise.calls)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


TOTAL = 0
VARIABLE = contextvars.ContextVar("calls", default=0)


def global_variable():
    def factor():
        global TOTAL
        TOTAL += 1
        return gradually(TOTAL)

    global TOTAL
    TOTAL = 0
    return factor, nothing, lambda: TOTAL


def variable_of_a_function():
    calls = 0

    def factor():
        nonlocal calls
        calls += 1
        return gradually(calls)

    return factor, nothing, lambda: calls


def default_of_a_function():
    log = []

    def factor(log=log):
        log.append(1)
        return gradually(len(log))

    return factor, nothing, lambda: len(log)


def keyword_default():
    log = {"calls": 0}

    def factor(*, log=log):
        log["calls"] += 1
        return gradually(log["calls"])

    return factor, nothing, lambda: log["calls"]


def attribute_of_a_function():
    def factor():
        factor.calls += 1
        return gradually(factor.calls)

    factor.calls = 0
    return factor, nothing, lambda: factor.calls


def attribute_of(thing):
    def make():
        made = thing()

        def factor():
            made.calls = getattr(made, "calls", 0) + 1
            return gradually(made.calls)

        return factor, nothing, lambda: made.calls

    return make


def content_of(made, tick):
    def make():
        held = made()

        def factor():
            return gradually(tick(held))

        return factor, nothing, lambda: tick(held)

    return make


def bump(held):
    held[0] += 1
    return int(held[0])


def grow(held):
    (held.add if isinstance(held, set) else held.append)(len(held))
    return len(held)


def count_key(held):
    held["calls"] = held.get("calls", 0) + 1
    return held["calls"]


def count_value(held):
    held.value += 1
    return held.value


def context_variable():
    VARIABLE.set(0)

    def factor():
        VARIABLE.set(VARIABLE.get() + 1)
        return gradually(VARIABLE.get())

    return factor, nothing, VARIABLE.get


def autograd_function():
    Stepwise.calls = 0
    return lambda: Stepwise.apply(torch.ones(())), nothing, lambda: Stepwise.calls


def iterator():
    numbers = itertools.count()
    return lambda: gradually(next(numbers)), nothing, lambda: next(numbers)


def generator():
    numbers = (n for n in range(1_000))
    return lambda: gradually(next(numbers)), nothing, lambda: next(numbers)


def file():
    stream = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def factor():
        stream.write("step\n")
        return 1.0

    def tell():
        stream.seek(0)
        with stream:
            return len(stream.readlines())

    return factor, nothing, tell


def opened_file():
    path = tempfile.mktemp()

    def factor():
        with open(path, "a") as stream:
            stream.write("step\n")
        return 1.0

    def tell():
        with open(path) as stream:
            return len(stream.readlines())

    return factor, nothing, tell


def environment():
    os.environ["PYRO_VAE_CALLS"] = "0"

    def factor():
        os.environ["PYRO_VAE_CALLS"] = str(int(os.environ["PYRO_VAE_CALLS"]) + 1)
        return gradually(int(os.environ["PYRO_VAE_CALLS"]))

    return factor, nothing, lambda: os.environ["PYRO_VAE_CALLS"]


def module_of_the_users():
    helper = sys.modules["helper_of_tests"] = types.ModuleType("helper_of_tests")
    helper.calls = 0

    def factor():
        import helper_of_tests

        helper_of_tests.calls += 1
        return gradually(helper_of_tests.calls)

    return factor, nothing, lambda: helper.calls


def backward_hook():
    net, norms = nn.Linear(1, 1), []
    nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
    net.register_full_backward_hook(lambda module, inputs, outputs: norms.append(1))
    return lambda: net(torch.ones(1, requires_grad=True)), nothing, lambda: len(norms)


def scheduler_that_steps():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: gradually(n + 1))

    def factor():
        optimizer._opt_called = True
        schedule.step()
        return schedule.get_last_lr()[0]

    return factor, nothing, lambda: schedule.last_epoch


def method_of_a_generator():
    def numbers():
        for count in range(1_000):
            yield gradually(count)

    step = numbers().__next__
    return step, nothing, step


def parameter_that_is_replaced():
    held = types.SimpleNamespace(scale=torch.tensor(1.0))

    def factor():
        held.scale = held.scale * 0.95
        return held.scale

    return factor, nothing, lambda: round(float(held.scale), 4)


def dropout_that_changes():
    layer = nn.Dropout(0.0)

    def factor():
        layer.p = min(layer.p + 0.01, 0.2)
        return layer(torch.ones(3))

    return factor, nothing, lambda: round(layer.p, 4)


PLACES = {
    "global": global_variable,
    "nonlocal": variable_of_a_function,
    "default": default_of_a_function,
    "keyword default": keyword_default,
    "attribute of a function": attribute_of_a_function,
    "attribute of a layer": attribute_of(lambda: nn.Linear(1, 1)),
    "attribute of a parameter": attribute_of(lambda: nn.Parameter(torch.ones(1))),
    "attribute of a distribution": attribute_of(lambda: dist.Normal(0.0, 1.0)),
    "attribute of an ELBO": attribute_of(Trace_ELBO),
    "attribute of a namespace": attribute_of(types.SimpleNamespace),
    "attribute of arguments": attribute_of(argparse.Namespace),
    "attribute of a handler": attribute_of(lambda: poutine.block_messenger.BlockMessenger()),
    "slot": attribute_of(Slotted),
    "list": content_of(list, grow),
    "deque": content_of(collections.deque, grow),
    "set": content_of(set, grow),
    "dict": content_of(dict, count_key),
    "defaultdict": content_of(lambda: collections.defaultdict(int), count_key),
    "Counter": content_of(collections.Counter, count_key),
    "UserDict": content_of(collections.UserDict, count_key),
    "array of NumPy": content_of(lambda: np.zeros(1, dtype=int), bump),
    "array of the standard library": content_of(lambda: array.array("i", [0]), bump),
    "bytes": content_of(lambda: bytearray(1), bump),
    "number of C": content_of(lambda: ctypes.c_int(0), count_value),
    "list in a tuple": content_of(lambda: ([0],), lambda held: bump(held[0])),
    "context variable": context_variable,
    "autograd.Function": autograd_function,
    "iterator": iterator,
    "generator": generator,
    "file": file,
    "opened file": opened_file,
    "environment": environment,
    "module that is imported inside": module_of_the_users,
    "backward hook": backward_hook,
    "replaced tensor": parameter_that_is_replaced,
    "dropout": dropout_that_changes,
    "scheduler": scheduler_that_steps,
    "method of a generator": method_of_a_generator,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_counter_anywhere(place):
    assert not same_as_pyro(PLACES[place])


def test_what_is_made_once_does_not_stand_in_the_way():
    def make():
        cache = {}

        def factor():
            if "one" not in cache:
                cache["one"] = torch.ones(())
            return cache["one"]

        return factor, nothing, lambda: len(cache)

    assert same_as_pyro(make)


# ------------------------------------------------------------------------- changes from outside


class Settings:
    scale = 1.0

    def __init__(self):
        self.own = 1.0

    def method(self):
        return 1.0


HALF = STEPS // 2


def changed(make_state, read, change):
    """A program that reads a state, which is changed from outside in the middle."""

    def make():
        state = make_state()
        return lambda: read(state), lambda i: change(state) if i == HALF else None, lambda: None

    return make


def set_key(key, value):
    return lambda state: state.__setitem__(key, value)


def set_attribute(name, value):
    return lambda state: setattr(state, name, value)


def rename(state):
    value = state.pop("gauss")
    state["laplace"] = value


def matched(state):
    match state:
        case types.SimpleNamespace(scale=1.0):
            return 1.0
        case _:
            return 0.3


def formatted(state):
    return float("{0.own}".format(state))  # noqa: UP030, UP032


def code_of(state):
    state["f"].__code__ = (lambda: 0.3).__code__


@functools.lru_cache
def cached():
    return CACHED["scale"]


CACHED = {"scale": 1.0}


def clear_cache(_):
    CACHED["scale"] = 0.3
    cached.cache_clear()


def fresh_cache():
    CACHED["scale"] = 1.0
    cached.cache_clear()


def two_values(scale=1.0, *, factor=1.0):
    return scale * factor


def fresh_defaults():
    two_values.__defaults__, two_values.__kwdefaults__ = (1.0,), {"factor": 1.0}


def scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return types.SimpleNamespace(optimizer=optimizer)


class OtherSettings(Settings):
    def method(self):
        return 0.3


def with_another(make, another):
    """A thing, and another that looks at it."""
    made = make()
    return made, another(made)


class Scaler:
    def __init__(self):
        from sklearn.preprocessing import StandardScaler

        self.scaler = StandardScaler().fit(np.array([[0.0], [2.0]]))


SEEN = {  # and compiled anew
    "method of a dict": changed(
        lambda: with_another(lambda: {"a": 1.0}, lambda held: held.get),
        lambda s: s[1]("a"),
        lambda s: s[0].update(a=0.3),
    ),
    "weak reference": changed(
        lambda: with_another(Settings, weakref.ref), lambda s: s[1]().own, lambda s: setattr(s[0], "own", 0.3)
    ),
    "read-only view": changed(
        lambda: with_another(lambda: {"a": 1.0}, types.MappingProxyType),
        lambda s: s[1]["a"],
        lambda s: s[0].update(a=0.3),
    ),
    "attrgetter": changed(
        lambda: with_another(Settings, lambda _: operator.attrgetter("own")),
        lambda s: s[1](s[0]),
        lambda s: setattr(s[0], "own", 0.3),
    ),
    "array of objects": changed(lambda: np.array([1.0, None], dtype=object), lambda s: s[0], set_key(0, 0.3)),
    "class of an object": changed(Settings, lambda s: s.method(), set_attribute("__class__", OtherSettings)),
    "globals()": changed(
        lambda: globals().update(FACTOR=1.0),
        lambda _: globals()["FACTOR"],
        lambda _: globals().update(FACTOR=0.3),
    ),
}
OUTSIDE = {
    **SEEN,
    "attribute": changed(Settings, lambda s: s.own, set_attribute("own", 0.3)),
    "attribute of a class": changed(
        lambda: type("Own", (Settings,), {}), lambda s: s.scale, set_attribute("scale", 0.3)
    ),
    "attribute that hides the class's": changed(Settings, lambda s: s.scale, set_attribute("scale", 0.3)),
    "method": changed(Settings, lambda s: s.method(), set_attribute("method", lambda: 0.3)),
    "attribute by getattr": changed(
        Settings, lambda s: getattr(s, "n" + "ew", 1.0), set_attribute("new", 0.3)
    ),
    "attribute by match": changed(
        lambda: types.SimpleNamespace(scale=1.0), matched, set_attribute("scale", 2.0)
    ),
    "attribute by format": changed(Settings, formatted, set_attribute("own", 0.3)),
    "slot": changed(
        lambda: [setattr(s := Slotted(), "calls", 1.0), s][1], lambda s: s.calls, set_attribute("calls", 0.3)
    ),
    "entry of a dict": changed(lambda: {"a": 1.0}, lambda s: s["a"], set_key("a", 0.3)),
    "key of a dict": changed(lambda: {"gauss": 1}, lambda s: 1.0 if "gauss" in s else 0.3, rename),
    "entry of a list": changed(lambda: [1.0], lambda s: s[0], set_key(0, 0.3)),
    "length of a list": changed(list, lambda s: 1.0 / (1 + len(s)), lambda s: s.append(1)),
    "entry of a deque": changed(lambda: collections.deque([1.0]), lambda s: s[0], set_key(0, 0.3)),
    "member of a set": changed(
        lambda: {"a"}, lambda s: 1.0 if "a" in s else 0.3, lambda s: s.clear() or s.add("b")
    ),
    "entry of a UserDict": changed(lambda: collections.UserDict(a=1.0), lambda s: s["a"], set_key("a", 0.3)),
    "array": changed(lambda: np.ones(3), lambda s: float(s[0]), set_key(0, 0.3)),
    "large array": changed(lambda: np.ones(20_000), lambda s: float(s[0]), set_key(0, 0.3)),
    "very large array": changed(lambda: np.ones(300_000), lambda s: float(s[-1]), set_key(-1, 0.3)),
    "array in a tuple": changed(
        lambda: (np.ones(3),), lambda s: float(s[0][0]), lambda s: set_key(0, 0.3)(s[0])
    ),
    "array in a partial": changed(
        lambda: functools.partial(lambda a: float(a[0]), np.ones(3)),
        lambda s: s(),
        lambda s: set_key(0, 0.3)(s.args[0]),
    ),
    "array by item": changed(lambda: np.ones(3), lambda s: s.sum().item() / 3, lambda s: s.fill(0.3)),
    "tensor in place": changed(lambda: torch.ones(()), lambda s: s, lambda s: s.fill_(0.3)),
    "tensor in a dict": changed(
        lambda: {"a": torch.ones(())}, lambda s: s["a"], lambda s: s.update(a=torch.tensor(0.3))
    ),
    "size of a tensor": changed(
        lambda: torch.ones(3), lambda s: s.sum() / len(s) ** 2, lambda s: s.resize_(1)
    ),
    "training mode": changed(
        lambda: nn.Dropout(0.5), lambda s: 1.0 if s.training else 0.3, lambda s: s.eval()
    ),
    "p of a dropout": changed(lambda: nn.Dropout(0.0), lambda s: s(torch.ones(3)), set_attribute("p", 0.9)),
    "weight of a layer": changed(
        lambda: nn.Linear(1, 1).requires_grad_(False),
        lambda s: s.weight[0, 0],
        lambda s: setattr(s, "weight", nn.Parameter(torch.ones(1, 1), requires_grad=False)),
    ),
    "code": changed(lambda: {"f": lambda: 1.0}, lambda s: s["f"](), code_of),
    "default": changed(
        fresh_defaults, lambda s: two_values(), lambda s: setattr(two_values, "__defaults__", (0.3,))
    ),
    "keyword default": changed(
        fresh_defaults,
        lambda s: two_values(),
        lambda s: setattr(two_values, "__kwdefaults__", {"factor": 0.3}),
    ),
    "entry of the keyword defaults": changed(
        fresh_defaults, lambda s: two_values(), lambda s: two_values.__kwdefaults__.update(factor=0.3)
    ),
    "cache": changed(fresh_cache, lambda s: cached(), clear_cache),
    "learning rate": changed(
        scheduler,
        lambda s: s.optimizer.param_groups[0]["lr"],
        lambda s: s.optimizer.param_groups[0].update(lr=0.3),
    ),
    "scaler": changed(
        Scaler, lambda s: float(s.scaler.scale_[0]), lambda s: setattr(s.scaler, "scale_", np.array([0.3]))
    ),
    "environment": changed(
        lambda: os.environ.__setitem__("PYRO_VAE_SCALE", "1"),
        lambda s: float(os.environ["PYRO_VAE_SCALE"]),
        lambda s: os.environ.__setitem__("PYRO_VAE_SCALE", "0.3"),
    ),
    "context variable": changed(
        lambda: VARIABLE.set(1), lambda s: 1.0 / VARIABLE.get(), lambda s: VARIABLE.set(3)
    ),
    "store": changed(
        lambda: pyro.get_param_store().__setitem__("tau", torch.tensor(1.0)),
        lambda s: pyro.get_param_store()["tau"].detach(),
        lambda s: pyro.get_param_store().__setitem__("tau", torch.tensor(0.3)),
    ),
    "default dtype": changed(
        lambda: None,
        lambda s: 1.0 if torch.get_default_dtype() is torch.float32 else 0.3,
        lambda s: None,
    ),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_change_from_outside(what):
    assert same_as_pyro(OUTSIDE[what]) or what not in SEEN


def test_a_module_that_is_imported_inside_may_change():
    def make():
        helper = sys.modules["helper_of_tests"] = types.ModuleType("helper_of_tests")
        helper.scale = 1.0

        def factor():
            from helper_of_tests import scale

            return scale

        return factor, lambda i: setattr(helper, "scale", 0.3) if i == HALF else None, lambda: None

    assert same_as_pyro(make)


def test_what_trains_is_no_part_of_the_program():
    """Of a class that keeps it, and looks names up, so that all that it keeps may be what is read."""

    class Experiment(unittest.TestCase):
        scale, key = 2.0, "scale"

        def setUp(self):
            programs_of_it = programs(lambda: getattr(self, self.key))
            self.svi = PyroSVI(*programs_of_it, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO(), compile="always")

    experiment = Experiment()
    experiment.setUp()
    for _ in range(STEPS):
        experiment.svi.step(X)
    assert experiment.svi._compiled.function.is_compiled
