"""The kernel of Hamiltonian Monte Carlo, and posterior draws."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import hmc, sample_posterior

from pyro_vae.mcmc.diagnostics import arviz, rhat
from pyro_vae.mcmc.hmc import Evaluation, init, jittered, step, tune
from pyro_vae.mcmc.tempering import TemperedDensity, schedule, tempered
from pyro_vae.oracles import LinearGaussian

pytestmark = pytest.mark.usefixtures("double")

# Of three data, two coordinates.
SCALES = torch.tensor([[1.0, 0.1], [3.0, 0.5], [0.2, 2.0]], dtype=torch.float64)


def normals(position):
    """Independent normals over two sites, one of them a vector; a different one for every datum."""
    a, b = position["a"], position["b"]
    log_density = -((a / SCALES[:, 0]) ** 2) / 2 - ((b / SCALES[:, 1:]) ** 2).sum(-1) / 2
    return Evaluation(log_density, {"a": -a / SCALES[:, 0] ** 2, "b": -b / SCALES[:, 1:] ** 2}, {})


def start(chains):
    return init(normals, {"a": torch.zeros(chains, 3), "b": torch.zeros(chains, 3, 1)})


def test_a_step_leaves_the_target_as_it_is():
    """Started in equilibrium, 4,000 chains stay there, at step sizes so large that many are rejected."""
    at = {"a": torch.randn(4000, 3) * SCALES[:, 0], "b": torch.randn(4000, 3, 1) * SCALES[:, 1:]}
    state = init(normals, at)
    step_size = 1.3 * SCALES.min(1).values.expand(4000, 3)
    for _ in range(30):
        state, info = step(normals, state, step_size, 4)
    assert 0.3 < info.acceptance.mean() < 0.95
    for site, scale in ("a", SCALES[:, 0]), ("b", SCALES[:, 1]):
        draws = state.position[site].reshape(4000, 3)
        torch.testing.assert_close(draws.std(0), scale, rtol=0.05, atol=0)
        assert (draws.mean(0) / scale).abs().max() < 0.08
        kurtosis = ((draws / scale) ** 4).mean(0)
        torch.testing.assert_close(kurtosis, torch.full((3,), 3.0), rtol=0.15, atol=0)


def test_every_chain_decides_for_itself():
    state = start(50)
    step_size = torch.full((50, 3), 0.01)
    step_size[:, 1] = 1e4  # hopeless for the second datum only
    new, info = step(normals, state, step_size, 5)
    assert info.is_accepted[:, [0, 2]].all()
    assert not info.is_accepted[:, 1].any()
    assert info.is_divergent[:, 1].all()
    assert not info.is_divergent[:, [0, 2]].any()
    assert (new.position["a"][:, 1] == 0).all()
    assert (new.position["a"][:, 0] != 0).all()
    there = normals(new.position)
    torch.testing.assert_close(new.at.log_density, there.log_density)
    torch.testing.assert_close(new.at.gradient["a"], there.gradient["a"])


def test_what_is_no_number_is_rejected():
    def holes(position):
        at = normals(position)
        return at._replace(log_density=torch.where(position["a"].abs() > 0.01, torch.nan, at.log_density))

    state = init(holes, start(20).position)
    new, info = step(holes, state, torch.full((20, 3), 0.5), 3)
    assert not info.is_accepted.any()
    assert info.is_divergent.all()
    assert torch.isfinite(new.at.log_density).all()


def test_tuning_reaches_the_target_and_finds_the_scales():
    state, step_size, scale = tune(normals, start(8), torch.full((8, 3), 5.0), 400, 8, target_acceptance=0.8)
    acceptance = torch.zeros(3)
    for _ in range(200):
        state, info = step(normals, state, jittered(step_size), 8)
        acceptance += info.acceptance.mean(0) / 200
    torch.testing.assert_close(acceptance, torch.full((3,), 0.8), atol=0.05, rtol=0)
    torch.testing.assert_close(scale["a"][0], SCALES[:, 0], rtol=0.25, atol=0)
    # With the scales all data have the same shape, hence the same step size.
    _, step_size, _ = tune(normals, state, step_size, 400, 8, target_acceptance=0.8, scale=scale)
    assert step_size.max() / step_size.min() < 1.5


def test_posterior_of_the_linear_gaussian_model():
    oracle = LinearGaussian.random(6, 3)
    x = oracle.sample(10)
    draws = sample_posterior(oracle.pair()[0], x, num_chains=16, num_samples=125)
    z = draws.latents["z"]
    assert z.shape == (16, 125, 10, 3)
    posterior = oracle.posterior(x)
    error = (z.mean((0, 1)) - posterior.mean) / oracle.covariance.diagonal().sqrt()
    assert error.abs().max() < 0.12
    covariance = torch.stack([torch.cov(z[:, :, i].flatten(0, 1).T) for i in range(10)]).mean(0)
    torch.testing.assert_close(covariance, oracle.covariance, rtol=0.12, atol=0.004)
    assert draws.rhat.max() < 1.05
    assert draws.ess.min() > 300
    assert draws.divergences.sum() == 0
    assert draws.acceptance.mean().item() == pytest.approx(0.8, abs=0.06)


def gamma_normal(x):
    """A positive, a bounded and a real latent, which depend on each other and on the data."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        share = pyro.sample("share", dist.Uniform(0.0, rate))
        loc = pyro.sample("loc", dist.Normal(share, 0.7))
        pyro.sample("x", dist.Normal(torch.sin(loc) + rate, 0.4), obs=x)


def gamma_normal_moments(x):
    """Means and standard deviations given one datum, by a grid over rate, share / rate and loc - share."""
    rate = torch.linspace(0.0, 14.0, 281)[1:, None, None]
    share = rate * (torch.arange(80)[:, None] + 0.5) / 80
    loc = share + torch.linspace(-4.2, 4.2, 169)
    joint = dist.Gamma(3.0, 2.0).log_prob(rate) + dist.Normal(share, 0.7).log_prob(loc)
    joint = joint + dist.Normal(loc.sin() + rate, 0.4).log_prob(x)
    probability = (joint - joint.logsumexp((0, 1, 2))).exp()
    means = {}
    for name, values in (("rate", rate), ("share", share), ("loc", loc)):
        mean = (probability * values).sum()
        means[name] = mean.item(), (probability * (values - mean) ** 2).sum().sqrt().item()
    return means


def test_constrained_and_dependent_latents_have_their_moments():
    x = torch.tensor([0.5, 2.5])
    draws = sample_posterior(gamma_normal, x, num_chains=16, num_samples=300)
    assert draws.rhat.max() < 1.02
    for i in range(2):
        for name, (mean, std) in gamma_normal_moments(x[i]).items():
            ours = draws.latents[name][:, :, i]
            assert ours.mean().item() == pytest.approx(mean, abs=0.1 * std)
            assert ours.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.usefixtures("in_one_block")
def test_modes_get_the_share_that_they_have():
    """Two modes far apart, of probability 0.2 and 0.8: chains cannot cross, so they must start right."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            log_share = torch.where(z > 0, torch.tensor(4.0).log(), torch.tensor(0.0))
            pyro.factor("likelihood", dist.Normal(1.5, 0.05).log_prob(z.abs()) + log_share)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    draws = sample_posterior(model, torch.zeros(100), num_chains=32, num_samples=20, num_warmup=120)
    share = (draws.latents["z"] > 0).double().mean().item()
    assert share == pytest.approx(0.8, abs=0.05)


def test_arviz_gets_dimensions_and_coordinates():
    oracle = LinearGaussian.random(4, 2)
    draws = sample_posterior(
        oracle.pair()[0], oracle.sample(3), num_chains=2, num_samples=40, num_warmup=40, num_leapfrog=2
    )
    data = draws.to_arviz(datum=["a", "b", "c"])
    z = data["posterior"]["z"]
    assert z.dims == ("chain", "draw", "datum", "z_dim")
    assert z.shape == (2, 40, 3, 2)
    assert list(z.coords["datum"].values) == ["a", "b", "c"]
    np.testing.assert_allclose(z.values, draws.latents["z"])
    ours = rhat(draws.latents["z"]).numpy()
    np.testing.assert_allclose(ours, arviz().rhat(data)["z"].values)


def test_tempered_density_and_its_gradient():
    oracle = LinearGaussian.random(4, 2)
    model, guide = oracle.pair(widening=1.4)
    x = oracle.sample(3)
    u = torch.randn(5, 3, 2)
    for base in (None, guide):
        density = TemperedDensity(model, base)
        at = density.at(0.3, x)({"z": u})
        z = u.clone().requires_grad_()
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        b = prior if base is None else guide.posterior(x).log_prob(z)
        joint = prior + model.likelihood(z).log_prob(x)
        expected = 0.7 * b + 0.3 * joint
        torch.testing.assert_close(at.log_density, expected.detach())
        (gradient,) = torch.autograd.grad(expected.sum(), z)
        torch.testing.assert_close(at.gradient["z"], gradient)
        torch.testing.assert_close(tempered(at.parts, 1.0).log_density, joint.detach())
        again = tempered(density.at(1.0, x)({"z": u}).parts, 0.3)
        torch.testing.assert_close(again.gradient["z"], at.gradient["z"])


def test_schedule_is_monotone_from_0_to_1():
    betas = schedule(50)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    assert betas.diff()[0] < betas.diff()[25] / 5


def test_chains_that_cannot_be_judged():
    oracle = LinearGaussian.random(3, 2)
    model, x = oracle.pair()[0], oracle.sample(3)
    with pytest.raises(ValueError, match="num_samples must be at least 4"):
        sample_posterior(model, x, num_samples=3)
    few = {"num_samples": 20, "num_warmup": 20, "num_leapfrog": 2, "progress": False}
    draws = sample_posterior(model, x, num_chains=1, **few)
    assert draws.rhat.isnan().all()
    with pytest.raises(ValueError, match="the name 'datum'"):
        dataclasses.replace(draws, latents={"datum": draws.latents["z"]}).to_arviz()
    for num_chains, said in (1, False), (2, True):
        result = hmc(model, x, num_chains=num_chains, **few)
        assert ("R-hat" in result.summary()) == said
