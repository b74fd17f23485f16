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
from conftest import pyros_and_ours
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
HALF = STEPS // 2

pytestmark = pytest.mark.usefixtures("captured")


def nothing(*_):
    pass


# A number that a model depends on, what its state is in the end, and what happens before a step.
Program = collections.namedtuple("Program", "factor tell change", defaults=(nothing, nothing))


def programs(factor):
    """A model and a guide; ``factor()`` is a number that the model depends on."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z * factor(), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))

    return model, guide


def same_as_pyro(make):
    """Whether a program is compiled; it must do what it does under ``pyro.infer.SVI``."""

    def trained(kind):
        factor, tell, change = make()
        svi = kind(*programs(factor), pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
        losses = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotCompiledWarning)
            for i in range(STEPS):
                change(i)
                torch.manual_seed(i)
                losses.append(float(svi.step(X)))
        return torch.tensor([*losses, pyro.param("loc").item()]), tell(), svi

    (expected, state, _), (found, found_state, svi) = pyros_and_ours(trained)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found_state == state
    return svi._compiled is not None and svi._compiled.function.is_compiled


# ------------------------------------------------------------------------- a counter in what it holds


def gradually(count):
    return 0.1 if count <= HALF else 1.0


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

        return Program(factor, lambda: way(counter))  # one more

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


def counted(make):
    """A program that counts; what ``make()`` returns counts on by one."""

    def program():
        count = make()
        return Program(lambda: gradually(count()), count)

    return program


def content_of(make, count):
    """A program that counts in a thing."""

    def counter():
        held = make()
        return lambda: count(held)

    return counted(counter)


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


def global_variable():
    global TOTAL
    TOTAL = 0

    def count():
        global TOTAL
        TOTAL += 1
        return TOTAL

    return count


def variable_of_a_function():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


def attribute_of_a_function():
    def count():
        count.calls += 1
        return count.calls

    count.calls = 0
    return count


def context_variable():
    VARIABLE.set(0)

    def count():
        VARIABLE.set(VARIABLE.get() + 1)
        return VARIABLE.get()

    return count


def environment():
    os.environ["PYRO_VAE_CALLS"] = "0"

    def count():
        os.environ["PYRO_VAE_CALLS"] = str(int(os.environ["PYRO_VAE_CALLS"]) + 1)
        return int(os.environ["PYRO_VAE_CALLS"])

    return count


def helper_module(**content):
    """A module of the user's."""
    helper = sys.modules["helper_of_tests"] = types.ModuleType("helper_of_tests")
    vars(helper).update(content)


def module_of_the_users():
    helper_module(calls=0)

    def count():
        import helper_of_tests

        helper_of_tests.calls += 1
        return helper_of_tests.calls

    return count


def autograd_function():
    Stepwise.calls = 0
    return Program(lambda: Stepwise.apply(torch.ones(())), lambda: Stepwise.calls)


def file():
    stream = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def factor():
        stream.write("step\n")
        return 1.0

    def tell():
        stream.seek(0)
        with stream:
            return len(stream.readlines())

    return Program(factor, tell)


def opened_file():
    path = tempfile.mktemp()

    def factor():
        with open(path, "a") as stream:
            stream.write("step\n")
        return 1.0

    def tell():
        with open(path) as stream:
            return len(stream.readlines())

    return Program(factor, tell)


def backward_hook():
    net, norms = nn.Linear(1, 1), []
    nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
    net.register_full_backward_hook(lambda module, inputs, outputs: norms.append(1))
    return Program(lambda: net(torch.ones(1, requires_grad=True)), lambda: len(norms))


def scheduler_that_steps():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: gradually(n + 1))

    def factor():
        optimizer._opt_called = True
        schedule.step()
        return schedule.get_last_lr()[0]

    return Program(factor, lambda: schedule.last_epoch)


def method_of_a_generator():
    def numbers():
        for count in range(1_000):
            yield gradually(count)

    step = numbers().__next__
    return Program(step, step)


def parameter_that_is_replaced():
    held = types.SimpleNamespace(scale=torch.tensor(1.0))

    def factor():
        held.scale = held.scale * 0.95
        return held.scale

    return Program(factor, lambda: round(float(held.scale), 4))


def dropout_that_changes():
    layer = nn.Dropout(0.0)

    def factor():
        layer.p = min(layer.p + 0.01, 0.2)
        return layer(torch.ones(3))

    return Program(factor, lambda: round(layer.p, 4))


PLACES = {
    "global": counted(global_variable),
    "nonlocal": counted(variable_of_a_function),
    "default": counted(lambda: lambda log=[]: grow(log)),
    "keyword default": counted(lambda: lambda *, log={}: count_key(log)),
    "attribute of a function": counted(attribute_of_a_function),
    "attribute of a layer": content_of(lambda: nn.Linear(1, 1), add),
    "attribute of a parameter": content_of(lambda: nn.Parameter(torch.ones(1)), add),
    "attribute of a distribution": content_of(lambda: dist.Normal(0.0, 1.0), add),
    "attribute of an ELBO": content_of(Trace_ELBO, add),
    "attribute of a namespace": content_of(types.SimpleNamespace, add),
    "attribute of arguments": content_of(argparse.Namespace, add),
    "attribute of a handler": content_of(lambda: poutine.block_messenger.BlockMessenger(), add),
    "slot": content_of(Slotted, add),
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
    "context variable": counted(context_variable),
    "autograd.Function": autograd_function,
    "iterator": content_of(itertools.count, lambda numbers: next(numbers)),
    "generator": content_of(lambda: (n for n in range(1_000)), lambda numbers: next(numbers)),
    "file": file,
    "opened file": opened_file,
    "environment": counted(environment),
    "module that is imported inside": counted(module_of_the_users),
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

        return Program(factor, lambda: len(cache))

    assert same_as_pyro(make)


# ------------------------------------------------------------------------- changes from outside


class Settings:
    scale = 1.0

    def __init__(self):
        self.own = 1.0

    def method(self):
        return 1.0


def sets(name, value=0.3):
    return lambda state: setattr(state, name, value)


def puts(key, value=0.3):
    return lambda state: operator.setitem(state, key, value)


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


CACHED = {}


def fill_cache(scale):
    CACHED["scale"] = scale
    cached.cache_clear()


def two_values(scale=1.0, *, factor=1.0):
    return scale * factor


def fresh_defaults():
    two_values.__defaults__, two_values.__kwdefaults__ = (1.0,), {"factor": 1.0}


def imported_inside(_):
    from helper_of_tests import scale

    return scale


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


# What makes a state, what the program reads of it, and how it changes from outside in the middle.
SEEN = {  # and compiled anew
    "method of a dict": (
        lambda: with_another(lambda: {"a": 1.0}, lambda held: held.get),
        lambda s: s[1]("a"),
        lambda s: s[0].update(a=0.3),
    ),
    "weak reference": (
        lambda: with_another(Settings, weakref.ref),
        lambda s: s[1]().own,
        lambda s: setattr(s[0], "own", 0.3),
    ),
    "read-only view": (
        lambda: with_another(lambda: {"a": 1.0}, types.MappingProxyType),
        lambda s: s[1]["a"],
        lambda s: s[0].update(a=0.3),
    ),
    "attrgetter": (
        lambda: with_another(Settings, lambda _: operator.attrgetter("own")),
        lambda s: s[1](s[0]),
        lambda s: setattr(s[0], "own", 0.3),
    ),
    "array of objects": (lambda: np.array([1.0, None], dtype=object), lambda s: s[0], puts(0)),
    "class of an object": (Settings, lambda s: s.method(), sets("__class__", OtherSettings)),
    "globals()": (
        lambda: globals().update(FACTOR=1.0),
        lambda _: globals()["FACTOR"],
        lambda _: globals().update(FACTOR=0.3),
    ),
    "module that is imported inside": (
        lambda: helper_module(scale=1.0),
        imported_inside,
        lambda _: setattr(sys.modules["helper_of_tests"], "scale", 0.3),
    ),
}
OUTSIDE = {
    **SEEN,
    "attribute": (Settings, lambda s: s.own, sets("own")),
    "attribute of a class": (lambda: type("Own", (Settings,), {}), lambda s: s.scale, sets("scale")),
    "attribute that hides the class's": (Settings, lambda s: s.scale, sets("scale")),
    "method": (Settings, lambda s: s.method(), sets("method", lambda: 0.3)),
    "attribute by getattr": (Settings, lambda s: getattr(s, "n" + "ew", 1.0), sets("new")),
    "attribute by match": (lambda: types.SimpleNamespace(scale=1.0), matched, sets("scale", 2.0)),
    "attribute by format": (Settings, formatted, sets("own")),
    "slot": (lambda: [setattr(s := Slotted(), "calls", 1.0), s][1], lambda s: s.calls, sets("calls")),
    "entry of a dict": (lambda: {"a": 1.0}, lambda s: s["a"], puts("a")),
    "key of a dict": (lambda: {"gauss": 1}, lambda s: 1.0 if "gauss" in s else 0.3, rename),
    "entry of a list": (lambda: [1.0], lambda s: s[0], puts(0)),
    "length of a list": (list, lambda s: 1.0 / (1 + len(s)), lambda s: s.append(1)),
    "entry of a deque": (lambda: collections.deque([1.0]), lambda s: s[0], puts(0)),
    "member of a set": (lambda: {"a"}, lambda s: 1.0 if "a" in s else 0.3, lambda s: s.clear() or s.add("b")),
    "entry of a UserDict": (lambda: collections.UserDict(a=1.0), lambda s: s["a"], puts("a")),
    "array": (lambda: np.ones(3), lambda s: float(s[0]), puts(0)),
    "large array": (lambda: np.ones(20_000), lambda s: float(s[0]), puts(0)),
    "very large array": (lambda: np.ones(300_000), lambda s: float(s[-1]), puts(-1)),
    "array in a tuple": (lambda: (np.ones(3),), lambda s: float(s[0][0]), lambda s: s[0].fill(0.3)),
    "array in a partial": (
        lambda: functools.partial(lambda a: float(a[0]), np.ones(3)),
        lambda s: s(),
        lambda s: s.args[0].fill(0.3),
    ),
    "array by item": (lambda: np.ones(3), lambda s: s.sum().item() / 3, lambda s: s.fill(0.3)),
    "tensor in place": (lambda: torch.ones(()), lambda s: s, lambda s: s.fill_(0.3)),
    "tensor in a dict": (lambda: {"a": torch.ones(())}, lambda s: s["a"], puts("a", torch.tensor(0.3))),
    "size of a tensor": (lambda: torch.ones(3), lambda s: s.sum() / len(s) ** 2, lambda s: s.resize_(1)),
    "training mode": (lambda: nn.Dropout(0.5), lambda s: 1.0 if s.training else 0.3, lambda s: s.eval()),
    "p of a dropout": (lambda: nn.Dropout(0.0), lambda s: s(torch.ones(3)), sets("p", 0.9)),
    "weight of a layer": (
        lambda: nn.Linear(1, 1).requires_grad_(False),
        lambda s: s.weight[0, 0],
        lambda s: setattr(s, "weight", nn.Parameter(torch.ones(1, 1), requires_grad=False)),
    ),
    "code": (lambda: {"f": lambda: 1.0}, lambda s: s["f"](), code_of),
    "default": (fresh_defaults, lambda s: two_values(), lambda s: sets("__defaults__", (0.3,))(two_values)),
    "keyword default": (
        fresh_defaults,
        lambda s: two_values(),
        lambda s: setattr(two_values, "__kwdefaults__", {"factor": 0.3}),
    ),
    "entry of the keyword defaults": (
        fresh_defaults,
        lambda s: two_values(),
        lambda s: two_values.__kwdefaults__.update(factor=0.3),
    ),
    "cache": (lambda: fill_cache(1.0), lambda s: cached(), lambda s: fill_cache(0.3)),
    "learning rate": (
        lambda: types.SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)),
        lambda s: s.optimizer.param_groups[0]["lr"],
        lambda s: s.optimizer.param_groups[0].update(lr=0.3),
    ),
    "scaler": (
        Scaler,
        lambda s: float(s.scaler.scale_[0]),
        lambda s: setattr(s.scaler, "scale_", np.array([0.3])),
    ),
    "environment": (
        lambda: os.environ.update(PYRO_VAE_SCALE="1"),
        lambda s: float(os.environ["PYRO_VAE_SCALE"]),
        lambda s: os.environ.update(PYRO_VAE_SCALE="0.3"),
    ),
    "context variable": (lambda: VARIABLE.set(1), lambda s: 1.0 / VARIABLE.get(), lambda s: VARIABLE.set(3)),
    "store": (
        lambda: puts("tau", torch.tensor(1.0))(pyro.get_param_store()),
        lambda s: pyro.get_param_store()["tau"].detach(),
        lambda s: puts("tau", torch.tensor(0.3))(pyro.get_param_store()),
    ),
    "default dtype": (
        nothing,
        lambda s: 1.0 if torch.get_default_dtype() is torch.float32 else 0.3,
        nothing,
    ),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_change_from_outside(what):
    make_state, read, change = OUTSIDE[what]

    def make():
        state = make_state()
        return Program(lambda: read(state), change=lambda i: change(state) if i == HALF else None)

    assert same_as_pyro(make) or what not in SEEN


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
