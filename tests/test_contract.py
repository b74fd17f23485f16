"""What every model/guide pair keeps, and what our algorithms and estimators rely on."""

import copy
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import (
    MCEM,
    MLP,
    SVI,
    Bernoulli,
    Categorical,
    CausalTransformer,
    CodePrior,
    Columns,
    Conditional,
    ContinuousBernoulli,
    ConvDecoder,
    ConvEncoder,
    DiagNormal,
    DiscretizedLogistic,
    FixedScaleNormal,
    Flat,
    FullNormal,
    Log1p,
    LogitNormal,
    MixtureOfNormals,
    NegativeBinomial,
    NormalMixture,
    Poisson,
    ProjectedNormal,
    StandardNormal,
    SupportError,
    Unconditional,
    UniformBox,
    VampPrior,
    WakeSleep,
    affine_coupling,
    autoencoder,
    bayesian,
    draw,
    inverse_autoregressive,
    log_joint,
    log_weights,
    planar,
    sample,
    vae,
    vq_vae,
)
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces import guide_distributions

DATA_DIM = 6


def bits():
    return torch.rand(10, DATA_DIM).round()


def reals():
    return torch.randn(10, DATA_DIM)


def vamp():
    model, guide = vae(DATA_DIM, 3, hidden=(8,))
    model.prior = VampPrior(guide.posterior, torch.rand(4, DATA_DIM))
    return model, guide


def vq_vae_with_prior():
    model, guide = vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3)
    model.prior = CodePrior(guide.codebook, 3, CausalTransformer(4, 3, width=8, layers=1, heads=2))
    return model, guide


def with_missing():
    x = reals()
    x[0, 1] = x[3, :3] = float("nan")
    return x


def table():
    return torch.cat([torch.randn(10, 3), torch.randint(5, (10, 2)), torch.randint(3, (10, 1))], 1)


def of_table():
    amount, count = DiagNormal(), Poisson()
    return Columns([amount, amount, amount, count, count, Categorical(3)])


PAIRS = {  # what makes the pair, what makes its arguments
    "vae": (lambda: vae(DATA_DIM, 3, hidden=(8,)), bits),
    "mixture": (lambda: vae(DATA_DIM, 3, prior=MixtureOfNormals(3, 4), family=Bernoulli(), hidden=()), bits),
    "grey": (
        lambda: vae(DATA_DIM, 3, family=ContinuousBernoulli(), hidden=(8, 7)),
        lambda: torch.rand(10, DATA_DIM),
    ),
    "normal": (lambda: vae(DATA_DIM, 3, family=DiagNormal(squash_loc=True)), reals),
    "fixed_scale": (lambda: vae(DATA_DIM, 3, family=FixedScaleNormal(0.3)), reals),
    "linear_gaussian": (lambda: LinearGaussian.random(DATA_DIM, 3).pair(widening=1.2), reals),
    "vamp": (vamp, bits),
    "flow_prior": (lambda: vae(DATA_DIM, 3, prior=Unconditional(affine_coupling(3), 3)), bits),
    "box": (lambda: vae(DATA_DIM, 3, prior=UniformBox(3, -1.0, 1.0), posterior=LogitNormal(-1.0, 1.0)), bits),
    "sphere": (
        lambda: vae(DATA_DIM, 3, prior=Unconditional(ProjectedNormal(), 3), posterior=ProjectedNormal()),
        bits,
    ),
    "iaf": (lambda: vae(DATA_DIM, 3, posterior=inverse_autoregressive(3, context_dim=4)), bits),
    "planar": (lambda: vae(DATA_DIM, 3, posterior=planar(3, context_dim=4)), bits),
    "full": (lambda: vae(DATA_DIM, 3, posterior=FullNormal()), bits),
    "posterior_mixture": (lambda: vae(DATA_DIM, 3, posterior=NormalMixture(2)), bits),
    "counts": (
        lambda: vae(DATA_DIM, 3, family=NegativeBinomial(), encoder=Log1p(MLP(DATA_DIM, 6))),
        lambda: torch.randint(9, (10, DATA_DIM)).float(),
    ),
    "levels": (
        lambda: vae(DATA_DIM, 3, family=DiscretizedLogistic(17, 2)),
        lambda: torch.randint(17, (10, DATA_DIM)) / 16,
    ),
    "table": (lambda: vae(DATA_DIM, 3, family=of_table()), table),
    "missing": (lambda: vae(DATA_DIM, 3, family=DiagNormal(), missing=True), with_missing),
    "autoencoder": (lambda: autoencoder(DATA_DIM, 3), bits),
    "vq_vae": (lambda: vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3, decay=None), bits),
    "vq_vae_averages": (lambda: vq_vae(DATA_DIM, num_codes=4, code_dim=1, length=3), bits),
    "vq_vae_prior": (vq_vae_with_prior, bits),
    "context": (
        lambda: vae(DATA_DIM, 3, context_dim=2, hidden=(8,)),
        lambda: (bits(), torch.randn(10, 2)),
    ),
    "convolutions": (
        lambda: vae(
            DATA_DIM,
            3,
            encoder=ConvEncoder((3, 2), 6, (4,), blocks=1),
            decoder=ConvDecoder(3, (3, 2), 1, (4,), blocks=1),
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
    return isinstance(model.prior, Flat)


def has_codes(model):
    return isinstance(model.prior, CodePrior)


def test_a_samples_plate_vectorises_everything(pair):
    model, guide, batch = pair
    if is_autoencoder(model):
        with pytest.raises(ValueError, match=r"point mass.*no bound"):
            log_weights(model, guide, *batch, num_samples=5)
        z = torch.randn(5, len(batch[0]), 3)
        assert log_joint(model, {"z": z}, *batch).log_likelihood.shape == (5, len(batch[0]))
        return
    assert log_weights(model, guide, *batch, num_samples=5).shape == (5, len(batch[0]))


def test_data_are_independent(pair):
    model, _, batch = pair
    latents = {"z": torch.randn(4, len(batch[0]), 3)}
    whole = log_joint(model, latents, *batch)
    order = torch.randperm(len(batch[0]))
    permuted = log_joint(model, {"z": latents["z"][:, order]}, *(part[order] for part in batch))
    part = log_joint(model, {"z": latents["z"][:, :3]}, *(part[:3] for part in batch))
    for all_, shuffled, some in zip(whole, permuted, part, strict=True):
        torch.testing.assert_close(all_[:, order], shuffled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(all_[:, :3], some, rtol=1e-5, atol=1e-5)


def test_plain_pyro_svi_trains_it(pair):
    model, guide, batch = pair
    before = copy.deepcopy([*model.parameters(), *guide.parameters()])
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(*batch)
    for old, new in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert not torch.equal(old, new)


def test_two_pairs_in_one_process_do_not_share_parameters(pair):
    model, guide, batch = pair
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(*batch)
    other_model, other_guide = copy.deepcopy((model, guide))
    frozen = copy.deepcopy([*model.parameters(), *guide.parameters()])
    other = pyro.infer.SVI(other_model, other_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        other.step(*batch)
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
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.grad is not None


def test_the_parameter_store_stays_empty_in_our_functions(pair):
    model, guide, batch = pair
    if is_autoencoder(model):
        with pytest.raises(ValueError, match="flat"):
            sample(model, *batch)
        return
    log_weights(model, guide, *batch, num_samples=2)
    sample(model, *batch)
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
    with pytest.raises(SupportError, match=r"torch.float64.*x.to\(torch.float32\)"):
        Trace_ELBO().loss(model, guide, torch.zeros(4, DATA_DIM, dtype=torch.float64))
    for batch in (torch.zeros(DATA_DIM), torch.zeros(0, DATA_DIM)):
        with pytest.raises(SupportError, match="batch of at least one datum"):
            Trace_ELBO().loss(model, guide, batch)
    with pytest.raises(SupportError, match=r"makes \(4, 3\) codes of it: .* x\.flatten\(1\)"):
        Trace_ELBO().loss(model, guide, torch.zeros(4, 3, DATA_DIM))
    pair = vae(DATA_DIM, 2, context_dim=3)
    for rows in (1, 3):
        with pytest.raises(SupportError, match=r"one row of numbers for each of 4 data"):
            Trace_ELBO().loss(*pair, torch.zeros(4, DATA_DIM), torch.zeros(rows, 3))


def test_a_prior_of_another_size_is_refused():
    with pytest.raises(ValueError, match="latent_dim is 3"):
        vae(DATA_DIM, 3, prior=MixtureOfNormals(2))


def test_parts_must_be_instances_and_dimensions_positive():
    for part in ({"family": DiagNormal}, {"posterior": DiagNormal}, {"prior": StandardNormal}):
        with pytest.raises(TypeError, match=f"{next(iter(part))} must be an instance"):
            inspect.unwrap(vae)(DATA_DIM, 3, **part)  # the tests' own check of types comes before
    with pytest.raises(ValueError, match="latent_dim must be at least 1, not 0"):
        vae(DATA_DIM, 0)


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (UniformBox(3), DiagNormal()),
        (UniformBox(3), LogitNormal(-1.0, 1.0)),
        (Unconditional(ProjectedNormal(), 3), DiagNormal()),
        (None, LogitNormal()),
    ],
)
def test_a_posterior_of_other_values_than_the_prior_is_refused(prior, posterior):
    with pytest.raises(ValueError, match="a box goes with LogitNormal"):
        vae(DATA_DIM, 3, prior=prior, posterior=posterior)


def test_the_context_reaches_model_and_guide():
    model, guide = vae(DATA_DIM, 3, context_dim=2)
    x, c = bits(), torch.randn(10, 2)
    z = {"z": torch.zeros(1, 10, 3)}
    one, other = log_joint(model, z, x, c), log_joint(model, z, x, -c)
    assert (one.log_likelihood - other.log_likelihood).abs().min() > 1e-4
    torch.testing.assert_close(one.log_prior, other.log_prior)
    first, second = (guide_distributions(guide, x, part)["z"].mean for part in (c, -c))
    assert (first - second).abs().min() > 1e-6


def test_a_vamp_prior_of_a_conditional_guide_is_refused():
    _, guide = vae(DATA_DIM, 3, context_dim=2)
    with pytest.raises(ValueError, match=r"does not take pseudo-inputs .*labels or covariates"):
        VampPrior(guide.posterior, bits())


def test_missing_numbers_need_to_be_announced():
    model, guide = vae(DATA_DIM, 3, family=DiagNormal())
    with pytest.raises(SupportError, match="missing=True"):
        Trace_ELBO().loss(model, guide, with_missing())


def test_a_users_own_modules_need_no_adapter():
    class Laplace(nn.Module):
        def forward(self):
            return dist.Laplace(torch.zeros(2), 1.0).to_event(1)

    decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, DATA_DIM))
    model, guide = vae(DATA_DIM, 2, prior=Laplace(), decoder=decoder)
    assert isinstance(model.likelihood, Conditional)
    assert log_weights(model, guide, bits(), num_samples=3).isfinite().all()


def moves(algorithm, modules, *batch):
    """Steps of an algorithm: all parameters of these modules move, and stay finite."""
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    for _ in range(3):
        metrics = algorithm.step(*batch)
    assert all(value.isfinite() for value in metrics.values())
    for module, olds in zip(modules, before, strict=True):
        for old, new in zip(olds, module.parameters(), strict=True):
            assert not torch.equal(old, new)
            assert new.isfinite().all()


def test_wake_sleep_trains_it(pair):
    model, guide, batch = pair
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-3)
    algorithm = WakeSleep(model, guide, optimizer, num_data=10)
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
            MCEM(model, optimizer, 10).step(*batch, torch.arange(10))
        return
    if isinstance(model.prior, Unconditional) and isinstance(model.prior.family, ProjectedNormal):
        with pytest.raises(ValueError, match="cannot be mapped to all real numbers"):
            MCEM(model, optimizer, 10).step(*batch, torch.arange(10))
        return
    moves(MCEM(model, optimizer, 10, weight_prior=True), (model,), *batch, torch.arange(10))


def test_full_variational_bayes_trains_it(pair):
    ordinary, of_latents, batch = pair
    if has_codes(ordinary) and of_latents.codebook.decay is None:
        pytest.skip("the guide looks codes up in a codebook that would be random")
    model, guide = bayesian(ordinary, of_latents, num_data=20)
    svi = SVI(model, guide, torch.optim.Adam(guide.parameters(), lr=1e-3), Trace_ELBO())
    moves(svi, (guide,), *batch)
    drawn = draw(model, guide)
    if is_autoencoder(ordinary):
        return
    assert log_weights(*drawn, *batch, num_samples=2).shape == (2, 10)
    assert not set(ordinary.parameters()) & set(drawn[0].parameters())
