"""What people pass by mistake, and the words that come back: an argument, what it was, what to do."""

import inspect
import math
import re
from typing import Annotated, Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.arguments import Count, Range, check, checked
from pyro_vae.tasks import Linear

D, Z = 6, 2
X = (torch.rand(20, D, generator=torch.Generator().manual_seed(0)) < 0.5).float()
SPLIT = pv.from_array(X).train


def pair(**parts):
    return pv.vae(D, Z, hidden=(4,), **parts)


def adam(*modules):
    return torch.optim.Adam([p for module in modules for p in module.parameters()])


def step(model, guide, *batch, optimizer=None):
    return pv.SVI(model, guide, optimizer or adam(model, guide), compile=False).step(*(batch or (X,)))


def fit(batches, epochs=1, callbacks=()):
    model, guide = pair()
    algorithm = pv.SVI(model, guide, adam(model, guide), compile=False)
    return pv.fit(algorithm, batches, epochs, callbacks, progress=False)


def estimate(*batch, **settings):
    return pv.importance_sampling(*pair(), *batch, progress=False, **{"num_samples": 2, **settings})


class Gives(nn.Module):
    """A network that gives something else than a tensor."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


MASKED = np.ma.array(X.numpy(), mask=X.numpy() > 0)
MISUSE = {
    # sizes and numbers
    "latent_dim": (lambda v: pv.vae(D, v), {"2": "'2'", 2.5: "2.5", None: "None", (2,): "tuple"}),
    "data_dim": (lambda v: pv.vae(v, Z), {True: "True", int: "class int"}),
    "hidden": (lambda v: pv.vae(D, Z, hidden=v), {"500": "list of whole numbers", 500: "not 500"}),
    r"hidden\[0\]": (lambda v: pv.vae(D, Z, hidden=(v,)), {0: "at least 1", 2.0: "whole number"}),
    "context_dim": (lambda v: pv.vae(D, Z, context_dim=v), {-1: "at least 0"}),
    "missing": (lambda v: pv.vae(D, Z, missing=v), {"yes": "True or False"}),
    "commitment": (lambda v: pv.vq_vae(D, commitment=v), {"a": "'a'", -1.0: "at least 0", math.nan: "nan"}),
    "components": (lambda v: pv.MixtureOfNormals(2, v), {2.5: "whole number", "3": "'3'"}),
    "min_scale": (lambda v: pv.DiagNormal(min_scale=v), {"a": "a number", math.nan: "nan", 0.0: "positive"}),
    "scale": (lambda v: pv.FixedScaleNormal(v), {-1.0: "positive and finite", math.inf: "inf"}),
    "low": (lambda v: pv.UniformBox(2, v, 1.0), {None: "None", -math.inf: "finite"}),
    "depth": (lambda v: pv.planar(3, depth=v), {0: "at least 1", -1: "at least 1"}),
    "outputs": (lambda v: pv.MLP(3, v), {0: "at least 1", "2": "whole number"}),
    "shape": (lambda v: pv.ConvEncoder(v, 3), {8: "list of whole numbers", "8x8": "'8x8'"}),
    "num_epochs": (lambda v: fit([(X,)], v), {-1: "at least 0", 1.5: "whole number", "3": "'3'"}),
    "batch_size": (lambda v: pv.batches(SPLIT, v), {0: "at least 1", 2.5: "whole", math.nan: "nan"}),
    "epoch_size": (lambda v: pv.batches(SPLIT, epoch_size=v), {0: "at least 1"}),
    "patience": (lambda v: pv.EarlyStopping(v), {0: "at least 1", "3": "whole number"}),
    "every": (lambda v: pv.Checkpoint("r", every=v), {1.5: "whole number"}),
    "num_samples": (lambda v: estimate(X, num_samples=v), {"9": "'9'", 2.5: "2.5", 0: "at least 1"}),
    "data_dim ": (lambda v: pv.bits_per_dim(-3.0, v, 1.0), {0: "at least 1"}),
    "num_data": (lambda v: pv.MCEM(pair()[0], adam(pair()[0]), v), {0: "at least 1", 9.5: "whole number"}),
    "beta": (lambda v: pv.BetaELBO(v), {"a": "'a'"}),
    "gradient": (lambda v: pv.ImportanceWeightedELBO(5, gradient=v), {"drg": "'drg'"}),
    # parts
    "prior": (
        lambda v: pair(prior=v),
        {
            pv.StandardNormal: "an instance, as in prior=StandardNormal",
            dist.Normal(0.0, 1.0): "distribution Normal: a prior is a module whose forward",
            nn.Linear(2, 3): "takes nothing and returns a distribution",
            "laplace": "a module, such as StandardNormal",
            pv.StandardNormal(3): "latent_dim is 2",
        },
    ),
    "family": (
        lambda v: pair(family=v),
        {
            pv.Bernoulli: "an instance, as in family=Bernoulli",
            dist.Bernoulli: "an instance",
            "bernoulli": "a Family, such as Bernoulli",
            pv.StandardNormal(6): "not a StandardNormal",
        },
    ),
    "posterior": (
        lambda v: pair(posterior=v),
        {pv.DiagNormal: "an instance", pv.inverse_autoregressive(3): r"latent_dim = 2 numbers"},
    ),
    "encoder": (
        lambda v: step(*pair(encoder=v)),
        {
            pv.MLP: "an instance",
            nn.Linear(D, 7): r"Linear.* gives 7 numbers .* DiagNormal takes 4 .* have 4 outputs",
            nn.Linear(D, 3): "gives 3 numbers",
            nn.Linear(5, 4): r"does not take .* of shape \(20, 6\)",
            pv.MLP(D + 1, 4): None,
            Gives(lambda x: (x, x)): "must give a tensor .* not a tuple",
            Gives(lambda x: dist.Normal(x, 1.0)): "not the distribution Normal",
        },
    ),
    "decoder": (
        lambda v: estimate_of(pair(decoder=v)),
        {nn.Linear(Z, 7): "gives 7 numbers .* Bernoulli takes 6", len: "a module"},
    ),
    "the encoder": (
        lambda v: step(*pv.vq_vae(D, num_codes=4, code_dim=2, length=3, encoder=v)),
        {nn.Linear(D, 8): "gives 8 numbers .* takes 6"},
    ),
    "net": (lambda v: pv.Conditional(v, pv.DiagNormal()), {"mlp": "a module", pv.MLP: "an instance"}),
    "families": (lambda v: pv.Columns(v), {pv.Bernoulli(): "list"}),
    # programs and what trains them
    "model": (
        lambda v: pv.importance_sampling(v, pair()[1], X, progress=False),
        {None: "a Pyro program", pv.VAEModel: "class VAEModel", "m": "'m'", X: "a tensor of shape"},
    ),
    "model ": (lambda v: step(v, pair()[1]), {nn.Linear(D, D): "Linear.* has no pyro.sample site"}),
    "program": (
        lambda v: v(nn.Linear(D, D), X),
        dict.fromkeys((pv.ais, pv.quadrature), "has no latent site"),
    ),
    "guide": (lambda v: pv.elbo(pair()[0], v, X), {1: "a Pyro program", pv.VAEGuide: "class VAEGuide"}),
    "optimizer": (
        lambda v: step(*pair(), optimizer=v),
        {
            torch.optim.Adam: "one of torch.optim over parameters.*the class Adam",
            pyro.optim.Adam({"lr": 0.1}): "PyroSVI",
            "adam": "'adam'",
            adam(pv.MLP(2, 2)): "moves no parameter of model or guide",
        },
    ),
    "loss": (
        lambda v: pv.SVI(*(p := pair()), adam(*p), v),
        {Trace_ELBO: "the class Trace_ELBO", "elbo": "'elbo'"},
    ),
    "compile": (lambda v: pv.SVI(*(p := pair()), adam(*p), compile=v), {"yes": "always", None: "None"}),
    "objective": (lambda v: pv.KLWarmup(v, 3), {Trace_ELBO(): "weight beta", pv.BetaELBO: "class BetaELBO"}),
    "callbacks": (
        lambda v: fit([(X,)], 1, v),
        {pv.EarlyStopping(3): "list", "all": "list"},
    ),
    r"callbacks\[0\]": (lambda v: fit([(X,)], 1, [v]), {pv.EarlyStopping: "class", len: "Callback"}),
    "swapped": (lambda v: v(*pair()[::-1]), {step: "SVI", lambda m, g: pv.elbo(m, g, X): "first"}),
    # data
    "argument 0": (
        lambda v: fit([(v,)]),
        {
            "x": "a tensor",
            "array": "torch.as_tensor",
            "masked": "from_array",
            "none": "None",
            "split": "test.x",
        },
    ),
    "argument 0 ": (
        lambda v: estimate(v),
        {"x": "a tensor", "array": "torch.as_tensor", "masked": "missing=True", "sparse": "to_dense"},
    ),
    "x": (
        lambda v: step(*pair(), v),
        {"datum": r"x\[None\]", "int64": "torch.int64.*x.to", "double": "float64", "empty": "at least one"},
    ),
    "batches": (
        lambda v: fit(v),
        {
            "split": "pyro_vae.batches",
            "none": "None",
            "nothing": "empty",
            "tensor": "tuples",
            "gap": "without data",
        },
    ),
    "matrix": (
        lambda v: Linear(v, 0.1),
        {X[0]: r"shape \(6,\)", X.long(): "finite floats", X * math.nan: "finite floats", "A": "'A'"},
    ),
    "batches ": (
        lambda v: fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), v, drop_last=True)),
        {21: "drop_last leaves nothing"},
    ),
    "context": (lambda v: pv.batches(SPLIT, context=v), {"array": "a tensor", "scalar": "a row for each of"}),
    "observed": (lambda v: pv.inpaint(*pair(), X, v), {"none": "a tensor", "array": "torch.as_tensor"}),
    "device": (lambda v: SPLIT.to(v), {"gpu": "this machine has cpu", "mps:9": "cannot be used", 3: "text"}),
    "device ": (lambda v: SPLIT.to(v), {torch.float64: r"from_array\(x, dtype=torch.float64\)"}),
    "dtype": (lambda v: pv.from_array(X, dtype=v), {"float64": "torch.float64", torch.int32: "floating"}),
    "name": (lambda v: pv.load(v, binarization="none"), {3: "text or a path"}),
}
WRONG = {  # named in the table, for arrays are not equal to anything
    "x": "x",
    "array": X.numpy(),
    "masked": MASKED,
    "none": None,
    "split": SPLIT,
    "sparse": X.to_sparse(),
    "datum": X[0],
    "int64": X.long(),
    "double": X.double(),
    "empty": X[:0],
    "nothing": [],
    "gap": [(X,), (X[:0],)],
    "tensor": X,
    "scalar": torch.tensor(1.0),
}
OF_DATA = ("argument 0", "argument 0 ", "x", "batches", "context", "observed")


def estimate_of(programs):
    return pv.importance_sampling(*programs, X, num_samples=2, progress=False)


@pytest.mark.filterwarnings("ignore:Found .* in:UserWarning")  # Pyro's, of programs that are swapped
@pytest.mark.parametrize("argument", MISUSE)
def test_mistakes_come_back_in_our_words(argument):
    call, wrong = MISUSE[argument]
    for value, words in wrong.items():
        pyro.clear_param_store()
        value = WRONG[value] if argument in OF_DATA else value
        with pytest.raises((TypeError, ValueError)) as raised:
            call(value)
        message = str(raised.value)
        assert message.count("\n") == 0, message
        assert len(message) < 420, message
        assert "typechecking" not in message, message
        if words is not None:
            name = argument.strip()
            assert re.search(words, message), message
            assert re.search(name, message), message


def test_the_rules_are_those_of_the_annotations():
    @checked
    def function(a: Count, b: float | None = None, *batch: Tensor, c: Literal["x", "y"] = "x", d: Any = 0):
        return a, b, batch, c, d

    assert function(np.int64(3), 2, X, c="y", d=object)[0] == 3
    assert list(inspect.signature(function).parameters) == ["a", "b", "batch", "c", "d"]
    for arguments, settings, words in (
        ((0, None, X), {}, "a must be at least 1, not 0"),
        ((1, "2", X), {}, "b must be a number or None, not '2'"),
        ((1, math.nan, X), {}, "b must be a number, not nan"),
        ((1, 2.0, X, [1]), {}, r"argument 1 of the programs is a list, but must be a tensor"),
        ((1, 2.0), {}, "the programs need arguments"),
        ((1, 2.0, X), {"c": "z"}, "there is no c 'z'"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            function(*arguments, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'e'"):
        function(1, e=3)


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(1), (1, 10**9), (0, -3)),
        (Range(0, open=True), (1e-30, 5.0), (0.0, math.inf)),
        (Range(0, 1), (0.0, 1.0), (1.1, -0.1)),
        (Range(), (-1e300, 0.0), (math.inf, -math.inf, math.nan)),
    ],
)
def test_ranges(limits, inside, outside):
    kind = Annotated[float, limits]
    for value in inside:
        check("number", value, kind)
    for value in outside:
        with pytest.raises(ValueError, match="number must be"):
            check("number", value, kind)


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0, -1.0])
def test_rates_lie_between_0_and_1(rate):
    model, _ = pair()
    for method in (pv.ais, pv.bidirectional, pv.marginal_likelihood.hmc, pv.sample_posterior):
        with pytest.raises(ValueError, match="target_acceptance must be between 0 and 1"):
            inspect.unwrap(method)(model, X, target_acceptance=rate)
