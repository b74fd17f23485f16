"""What every model/guide pair keeps, and what our algorithms and estimators rely on."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import (
    SVI,
    Bernoulli,
    Conditional,
    ContinuousBernoulli,
    DiagNormal,
    FixedScaleNormal,
    MixtureOfNormals,
    SupportError,
    log_joint,
    log_weights,
    sample,
    vae,
)
from pyro_vae.oracles import LinearGaussian

DATA_DIM = 6


def bits():
    return torch.rand(10, DATA_DIM).round()


PAIRS = {
    "vae": (lambda: vae(DATA_DIM, 3, hidden=(8,)), bits),
    "mixture": (lambda: vae(DATA_DIM, 3, prior=MixtureOfNormals(3, 4), family=Bernoulli(), hidden=()), bits),
    "grey": (
        lambda: vae(DATA_DIM, 3, family=ContinuousBernoulli(), hidden=(8, 7)),
        lambda: torch.rand(10, DATA_DIM),
    ),
    "normal": (
        lambda: vae(DATA_DIM, 3, family=DiagNormal(squash_loc=True)),
        lambda: torch.randn(10, DATA_DIM),
    ),
    "fixed_scale": (
        lambda: vae(DATA_DIM, 3, family=FixedScaleNormal(0.3)),
        lambda: torch.randn(10, DATA_DIM),
    ),
    "linear_gaussian": (
        lambda: LinearGaussian.random(DATA_DIM, 3).pair(widening=1.2),
        lambda: torch.randn(10, DATA_DIM),
    ),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    make, data = PAIRS[request.param]
    model, guide = make()
    return model, guide, data()


def test_guide_and_model_share_their_latent_sites_in_the_data_plate(pair):
    model, guide, x = pair
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(model).get_trace(x)
    latent = {name for name in model_trace.stochastic_nodes if name != "data"}
    assert latent == {name for name in guide_trace.stochastic_nodes if name != "data"} == {"z"}
    assert model_trace.observation_nodes == ["x"]
    for trace, names in (guide_trace, latent), (model_trace, latent | {"x"}):
        for name in names:
            frames = trace.nodes[name]["cond_indep_stack"]
            assert [(frame.name, frame.dim, frame.size) for frame in frames] == [("data", -1, len(x))]
            assert trace.nodes[name]["fn"].batch_shape == (len(x),)


def test_theta_and_phi_are_disjoint(pair):
    model, guide, _ = pair
    assert not set(model.parameters()) & set(guide.parameters())
    assert set(model.parameters())
    assert set(guide.parameters())


def test_a_samples_plate_vectorises_everything(pair):
    model, guide, x = pair
    assert log_weights(model, guide, x, num_samples=5).shape == (5, len(x))


def test_data_are_independent(pair):
    model, _, x = pair
    latents = {"z": torch.randn(4, len(x), 3)}
    whole = log_joint(model, latents, x)
    order = torch.randperm(len(x))
    permuted = log_joint(model, {"z": latents["z"][:, order]}, x[order])
    part = log_joint(model, {"z": latents["z"][:, :3]}, x[:3])
    for all_, shuffled, some in zip(whole, permuted, part, strict=True):
        torch.testing.assert_close(all_[:, order], shuffled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(all_[:, :3], some, rtol=1e-5, atol=1e-5)


def test_plain_pyro_svi_trains_it(pair):
    model, guide, x = pair
    before = copy.deepcopy([*model.parameters(), *guide.parameters()])
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    for old, new in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert not torch.equal(old, new)


def test_two_pairs_in_one_process_do_not_share_parameters(pair):
    model, guide, x = pair
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    other_model, other_guide = copy.deepcopy(model), copy.deepcopy(guide)
    frozen = copy.deepcopy([*model.parameters(), *guide.parameters()])
    other = pyro.infer.SVI(other_model, other_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        other.step(x)
    for old, first, second in zip(
        frozen,
        [*model.parameters(), *guide.parameters()],
        [*other_model.parameters(), *other_guide.parameters()],
        strict=True,
    ):
        assert torch.equal(old, first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(pair, parallel):
    model, guide, x = pair
    predictive = Predictive(
        poutine.uncondition(model), guide=guide, num_samples=5, parallel=parallel, return_sites=("x", "z")
    )
    drawn = predictive(x)
    assert drawn["z"].squeeze().shape == (5, len(x), 3)
    assert drawn["x"].squeeze().shape == (5, len(x), DATA_DIM)


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_elbo_modules(pair, elbo, num_particles):
    model, guide, x = pair
    bound = elbo(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    bound(model, guide)(x).backward()
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.grad is not None


def test_the_parameter_store_stays_empty_in_our_functions(pair):
    model, guide, x = pair
    log_weights(model, guide, x, num_samples=2)
    sample(model, x)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("local", [False, True])
def test_pyro_modules_work_however_they_were_made(local):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](2, DATA_DIM)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    with pyro.settings.context(module_local_params=local):
        model = Model()
    _, guide = vae(DATA_DIM, 2)
    x = torch.randn(10, DATA_DIM)
    before = model.net.weight.clone()
    svi = SVI(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.1))
    svi.step(x)
    svi.step(x)
    assert not torch.equal(before, model.net.weight)
    assert log_weights(model, guide, x, num_samples=3).shape == (3, 10)
    weights = log_joint(model, {"z": torch.zeros(1, 10, 2)}, x).log_likelihood
    expected = dist.Normal(model.net.bias, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(weights[0], expected)


def test_wrong_data_are_explained_by_plain_pyro_too():
    model, guide = vae(DATA_DIM, 2)
    with pytest.raises(SupportError, match="Binarise"):
        Trace_ELBO().loss(model, guide, torch.full((4, DATA_DIM), 0.5))
    with pytest.raises(SupportError, match="1 nan or infinite"):
        Trace_ELBO().loss(model, guide, torch.tensor([[float("nan")] + [0.0] * 5]))
    with pytest.raises(SupportError, match=r"uint8.*float"):
        Trace_ELBO().loss(model, guide, torch.zeros(4, DATA_DIM, dtype=torch.uint8))
    with pytest.raises(ValueError, match="vectors of 6 numbers"):
        Trace_ELBO().loss(model, guide, torch.zeros(4, DATA_DIM + 1))


def test_a_prior_of_another_size_is_refused():
    with pytest.raises(ValueError, match="latent_dim is 3"):
        vae(DATA_DIM, 3, prior=MixtureOfNormals(2))


def test_a_users_own_modules_need_no_adapter():
    class Laplace(nn.Module):
        def forward(self):
            return dist.Laplace(torch.zeros(2), 1.0).to_event(1)

    decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, DATA_DIM))
    model, guide = vae(DATA_DIM, 2, prior=Laplace(), decoder=decoder)
    assert isinstance(model.likelihood, Conditional)
    assert log_weights(model, guide, bits(), num_samples=3).isfinite().all()
