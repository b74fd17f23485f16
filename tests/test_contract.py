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
from toys import parameters

import pyro_vae as pv
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces import guide_distributions

DATA_DIM = 6


def small_vae(**parts):
    return pv.vae(DATA_DIM, 3, **parts)


def bits():
    return torch.rand(10, DATA_DIM).round()


def reals():
    return torch.randn(10, DATA_DIM)


def vamp():
    model, guide = small_vae(hidden=(8,))
    model.prior = pv.VampPrior(guide.posterior, torch.rand(4, DATA_DIM))
    return model, guide


def vq_vae_with_prior():
    model, guide = pv.vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3)
    model.prior = pv.CodePrior(guide.codebook, 3, pv.CausalTransformer(4, 3, width=8, layers=1, heads=2))
    return model, guide


def with_missing():
    x = reals()
    x[0, 1] = x[3, :3] = float("nan")
    return x


def table():
    return torch.cat([torch.randn(10, 3), torch.randint(5, (10, 2)), torch.randint(3, (10, 1))], 1)


def of_table():
    amount, count = pv.DiagNormal(), pv.Poisson()
    return pv.Columns([amount, amount, amount, count, count, pv.Categorical(3)])


PAIRS = {  # what makes the pair, what makes its arguments
    "vae": (lambda: small_vae(hidden=(8,)), bits),
    "mixture": (lambda: small_vae(prior=pv.MixtureOfNormals(3, 4), family=pv.Bernoulli(), hidden=()), bits),
    "grey": (
        lambda: small_vae(family=pv.ContinuousBernoulli(), hidden=(8, 7)),
        lambda: torch.rand(10, DATA_DIM),
    ),
    "normal": (lambda: small_vae(family=pv.DiagNormal(squash_loc=True)), reals),
    "fixed_scale": (lambda: small_vae(family=pv.FixedScaleNormal(0.3)), reals),
    "linear_gaussian": (lambda: LinearGaussian.random(DATA_DIM, 3).pair(widening=1.2), reals),
    "vamp": (vamp, bits),
    "flow_prior": (lambda: small_vae(prior=pv.Unconditional(pv.affine_coupling(3), 3)), bits),
    "box": (lambda: small_vae(prior=pv.UniformBox(3, -1.0, 1.0), posterior=pv.LogitNormal(-1.0, 1.0)), bits),
    "sphere": (
        lambda: small_vae(prior=pv.Unconditional(pv.ProjectedNormal(), 3), posterior=pv.ProjectedNormal()),
        bits,
    ),
    "iaf": (lambda: small_vae(posterior=pv.inverse_autoregressive(3, context_dim=4)), bits),
    "planar": (lambda: small_vae(posterior=pv.planar(3, context_dim=4)), bits),
    "full": (lambda: small_vae(posterior=pv.FullNormal()), bits),
    "posterior_mixture": (lambda: small_vae(posterior=pv.NormalMixture(2)), bits),
    "counts": (
        lambda: small_vae(family=pv.NegativeBinomial(), encoder=pv.Log1p(pv.MLP(DATA_DIM, 6))),
        lambda: torch.randint(9, (10, DATA_DIM)).float(),
    ),
    "levels": (
        lambda: small_vae(family=pv.DiscretizedLogistic(17, 2)),
        lambda: torch.randint(17, (10, DATA_DIM)) / 16,
    ),
    "table": (lambda: small_vae(family=of_table()), table),
    "missing": (lambda: small_vae(family=pv.DiagNormal(), missing=True), with_missing),
    "autoencoder": (lambda: pv.autoencoder(DATA_DIM, 3), bits),
    "vq_vae": (lambda: pv.vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3, decay=None), bits),
    "vq_vae_averages": (lambda: pv.vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3), bits),
    "vq_vae_prior": (vq_vae_with_prior, bits),
    "context": (lambda: small_vae(context_dim=2, hidden=(8,)), lambda: (bits(), torch.randn(10, 2))),
    "convolutions": (
        lambda: small_vae(
            encoder=pv.ConvEncoder((3, 2), 6, (4,), blocks=1),
            decoder=pv.ConvDecoder(3, (3, 2), 1, (4,), blocks=1),
        ),
        bits,
    ),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    make, data = PAIRS[request.param]
    model, guide = make()
    batch = data()
    return model, guide, batch if isinstance(batch, tuple) else (batch,)


def test_guide_and_model_share_their_latent_sites_in_the_data_plate(pair):
    model, guide, batch = pair
    guide_trace = poutine.trace(guide).get_trace(*batch)
    model_trace = poutine.trace(model).get_trace(*batch)
    latent = {name for name in model_trace.stochastic_nodes if name != "data"}
    assert latent == {name for name in guide_trace.stochastic_nodes if name != "data"} == {"z"}
    assert model_trace.observation_nodes == ["x"]
    for trace, names in (guide_trace, latent), (model_trace, latent | {"x"}):
        for name in names:
            frames = trace.nodes[name]["cond_indep_stack"]
            assert [(frame.name, frame.dim, frame.size) for frame in frames] == [("data", -1, len(batch[0]))]
            assert trace.nodes[name]["fn"].batch_shape == (len(batch[0]),)


def test_theta_and_phi_are_disjoint(pair):
    model, guide, _ = pair
    assert not set(model.parameters()) & set(guide.parameters())
    assert set(model.parameters())
    assert set(guide.parameters())


def is_autoencoder(model):
    return isinstance(model.prior, pv.Flat)


def has_codes(model):
    return isinstance(model.prior, pv.CodePrior)


def test_our_functions_vectorise_and_leave_the_parameter_store_empty(pair):
    model, guide, batch = pair
    if is_autoencoder(model):
        with pytest.raises(ValueError, match=r"point mass.*no bound"):
            pv.log_weights(model, guide, *batch, num_samples=5)
        with pytest.raises(ValueError, match="flat"):
            pv.sample(model, *batch)
        z = torch.randn(5, len(batch[0]), 3)
        assert pv.log_joint(model, {"z": z}, *batch).log_likelihood.shape == (5, len(batch[0]))
        return
    assert pv.log_weights(model, guide, *batch, num_samples=5).shape == (5, len(batch[0]))
    pv.sample(model, *batch)
    assert not list(pyro.get_param_store())


def test_data_are_independent(pair):
    model, _, batch = pair
    latents = {"z": torch.randn(4, len(batch[0]), 3)}
    whole = pv.log_joint(model, latents, *batch)
    order = torch.randperm(len(batch[0]))
    permuted = pv.log_joint(model, {"z": latents["z"][:, order]}, *(part[order] for part in batch))
    part = pv.log_joint(model, {"z": latents["z"][:, :3]}, *(part[:3] for part in batch))
    for all_, shuffled, some in zip(whole, permuted, part, strict=True):
        torch.testing.assert_close(all_[:, order], shuffled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(all_[:, :3], some, rtol=1e-5, atol=1e-5)


def test_plain_pyro_svi_trains_it_and_no_copy_of_it(pair):
    model, guide, batch = pair
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(*batch)
    copies = copy.deepcopy((model, guide))
    frozen = copy.deepcopy(parameters(model, guide))
    other = pyro.infer.SVI(*copies, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        other.step(*batch)
    for old, first, second in zip(frozen, parameters(model, guide), parameters(*copies), strict=True):
        assert torch.equal(old, first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(pair, parallel):
    model, guide, batch = pair
    predictive = Predictive(
        poutine.uncondition(model), guide=guide, num_samples=5, parallel=parallel, return_sites=("x", "z")
    )
    drawn = predictive(*batch)
    assert drawn["z"].squeeze().shape == (5, len(batch[0]), 3)
    assert drawn["x"].squeeze().shape == (5, len(batch[0]), DATA_DIM)


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_elbo_modules(pair, elbo, num_particles):
    model, guide, batch = pair
    bound = elbo(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    bound(model, guide)(*batch).backward()
    assert all(parameter.grad is not None for parameter in parameters(model, guide))


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
    _, guide = pv.vae(DATA_DIM, 2)
    x = torch.randn(10, DATA_DIM)
    before = model.net.weight.clone()
    svi = pv.SVI(model, guide, torch.optim.Adam(parameters(model, guide), lr=0.1))
    svi.step(x)
    svi.step(x)
    assert not torch.equal(before, model.net.weight)
    assert pv.log_weights(model, guide, x, num_samples=3).shape == (3, 10)
    weights = pv.log_joint(model, {"z": torch.zeros(1, 10, 2)}, x).log_likelihood
    expected = dist.Normal(model.net.bias, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(weights[0], expected)


VAE, OF_CONTEXT = pv.vae(DATA_DIM, 2), pv.vae(DATA_DIM, 2, context_dim=3)
ROWS = "one row of numbers for each of 4 data"


@pytest.mark.parametrize(
    ("words", "pair", "batch"),
    [
        ("Binarise", VAE, (torch.full((4, DATA_DIM), 0.5),)),
        ("1 nan or infinite", VAE, (torch.tensor([[float("nan")] + [0.0] * 5]),)),
        (r"uint8.*float", VAE, (torch.zeros(4, DATA_DIM, dtype=torch.uint8),)),
        ("vectors of 6 numbers", VAE, (torch.zeros(4, DATA_DIM + 1),)),
        (r"torch.float64.*x.to\(torch.float32\)", VAE, (torch.zeros(4, DATA_DIM, dtype=torch.float64),)),
        ("batch of at least one datum", VAE, (torch.zeros(DATA_DIM),)),
        ("batch of at least one datum", VAE, (torch.zeros(0, DATA_DIM),)),
        (r"makes \(4, 3\) codes of it: .* x\.flatten\(1\)", VAE, (torch.zeros(4, 3, DATA_DIM),)),
        (ROWS, OF_CONTEXT, (torch.zeros(4, DATA_DIM), torch.zeros(1, 3))),
        (ROWS, OF_CONTEXT, (torch.zeros(4, DATA_DIM), torch.zeros(3, 3))),
        ("missing=True", small_vae(family=pv.DiagNormal()), (with_missing(),)),
    ],
)
def test_wrong_data_are_explained_by_plain_pyro_too(words, pair, batch):
    error = ValueError if words.startswith("vectors") else pv.SupportError
    with pytest.raises(error, match=words):
        Trace_ELBO().loss(*pair, *batch)


OF_BOX = "a box goes with LogitNormal"


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("latent_dim must be at least 1, not 0", lambda: pv.vae(DATA_DIM, 0)),
        (OF_BOX, lambda: small_vae(prior=pv.UniformBox(3), posterior=pv.DiagNormal())),
        (OF_BOX, lambda: small_vae(prior=pv.UniformBox(3), posterior=pv.LogitNormal(-1.0, 1.0))),
        (
            OF_BOX,
            lambda: small_vae(prior=pv.Unconditional(pv.ProjectedNormal(), 3), posterior=pv.DiagNormal()),
        ),
        (OF_BOX, lambda: small_vae(posterior=pv.LogitNormal())),
        (
            r"does not take pseudo-inputs .*labels or covariates",
            lambda: pv.VampPrior(small_vae(context_dim=2)[1].posterior, bits()),
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(words, make):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_context_reaches_model_and_guide():
    model, guide = small_vae(context_dim=2)
    x, c = bits(), torch.randn(10, 2)
    z = {"z": torch.zeros(1, 10, 3)}
    one, other = pv.log_joint(model, z, x, c), pv.log_joint(model, z, x, -c)
    assert (one.log_likelihood - other.log_likelihood).abs().min() > 1e-4
    torch.testing.assert_close(one.log_prior, other.log_prior)
    first, second = (guide_distributions(guide, x, part)["z"].mean for part in (c, -c))
    assert (first - second).abs().min() > 1e-6


def test_a_users_own_modules_need_no_adapter():
    class Laplace(nn.Module):
        def forward(self):
            return dist.Laplace(torch.zeros(2), 1.0).to_event(1)

    decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, DATA_DIM))
    model, guide = pv.vae(DATA_DIM, 2, prior=Laplace(), decoder=decoder)
    assert isinstance(model.likelihood, pv.Conditional)
    assert pv.log_weights(model, guide, bits(), num_samples=3).isfinite().all()


def moves(algorithm, modules, *batch):
    """Steps of an algorithm: all parameters of these modules move, and stay finite."""
    before = [p.detach().clone() for p in parameters(*modules)]
    for _ in range(3):
        metrics = algorithm.step(*batch)
    assert all(value.isfinite() for value in metrics.values())
    for old, new in zip(before, parameters(*modules), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


def test_wake_sleep_trains_it(pair):
    model, guide, batch = pair
    optimizer = torch.optim.Adam(parameters(model, guide), lr=1e-3)
    algorithm = pv.WakeSleep(model, guide, optimizer, num_data=10)
    if is_autoencoder(model) or has_codes(model):
        with pytest.raises(ValueError, match=r"point mass|one value for every datum"):
            algorithm.step(*batch)
        return
    if "Planar" in str(guide):
        with pytest.raises(ValueError, match="flow without an inverse"):
            algorithm.step(*batch)
        return
    moves(algorithm, (model, guide), *batch)


def test_monte_carlo_em_trains_the_model(pair):
    model, _, batch = pair
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if is_autoencoder(model) or has_codes(model):
        with pytest.raises(ValueError, match=r"is flat|are discrete"):
            pv.MCEM(model, optimizer, 10).step(*batch, torch.arange(10))
        return
    if isinstance(model.prior, pv.Unconditional) and isinstance(model.prior.family, pv.ProjectedNormal):
        with pytest.raises(ValueError, match="cannot be mapped to all real numbers"):
            pv.MCEM(model, optimizer, 10).step(*batch, torch.arange(10))
        return
    moves(pv.MCEM(model, optimizer, 10, weight_prior=True), (model,), *batch, torch.arange(10))


def test_full_variational_bayes_trains_it(pair):
    ordinary, of_latents, batch = pair
    if has_codes(ordinary) and of_latents.codebook.decay is None:
        pytest.skip("the guide looks codes up in a codebook that would be random")
    model, guide = pv.bayesian(ordinary, of_latents, num_data=20)
    assert list(guide.names) == [name for name, _ in ordinary.named_parameters()]
    svi = pv.SVI(model, guide, torch.optim.Adam(guide.parameters(), lr=1e-3), Trace_ELBO())
    moves(svi, (guide,), *batch)
    drawn = pv.draw(model, guide)
    if is_autoencoder(ordinary):
        return
    assert pv.log_weights(*drawn, *batch, num_samples=2).shape == (2, 10)
    assert not set(ordinary.parameters()) & set(drawn[0].parameters())
