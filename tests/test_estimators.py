"""Every estimator against an exact answer, with the error that it states."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from toys import (
    ais,
    bidirectional,
    enumeration,
    guide_of,
    hmc,
    importance_sampling,
    inference_gap,
    of_one_latent,
    quadrature,
    standard_normal,
)

from pyro_vae import DiagNormal, LogMarginal, SupportError, compare, elbo, log_joint, oracles, vae
from pyro_vae.marginal_likelihood import annealing, fit_kernel_density, fit_normal, importance
from pyro_vae.marginal_likelihood.reciprocal import reciprocal_importance
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces import at_unconstrained, draw_unconstrained

pytestmark = pytest.mark.usefixtures("double", "in_one_block")

CHAINS = {"num_samples": 100, "num_warmup": 120, "num_leapfrog": 4}
# By name, from a pair and data to estimates; small enough for the tests, good enough for their errors.
ESTIMATORS = {
    "importance_sampling": lambda model, guide, x: importance_sampling(model, guide, x, num_samples=400),
    "ais_prior": lambda model, _, x: ais(model, x, num_temperatures=100, num_leapfrog=2),
    "ais_guide": lambda model, guide, x: ais(model, x, guide=guide, num_temperatures=20, num_leapfrog=2),
    "hmc_normal": lambda model, _, x: hmc(model, x, **CHAINS),
    "hmc_kernel": lambda model, _, x: hmc(model, x, fit=fit_kernel_density, **CHAINS),
    "quadrature": lambda model, _, x: quadrature(model, x),
}


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "quadrature"])
def test_stated_errors_are_calibrated(name):
    oracle = LinearGaussian.random(6, 2)
    x = oracle.sample(250)
    result = ESTIMATORS[name](*oracle.pair(widening=1.3), x)
    z = (result.values - oracle.log_prob(x)) / result.std_error
    assert 0.8 < z.std().item() < 1.25
    assert abs(z.mean().item()) < 0.35
    assert result.std_error.max() < 0.6
    assert result.bound == ("upper" if name.startswith("hmc") else "lower")


@pytest.mark.parametrize(
    "estimate",
    [
        lambda oracle, x: ESTIMATORS["ais_guide"](*oracle.pair(), x),
        lambda oracle, x: hmc(
            oracle.pair()[0], x, fit=lambda _: oracle.posterior(x).log_prob, num_samples=10, num_warmup=60
        ),
    ],
    ids=["ais", "appendix_d"],
)
def test_with_the_exact_posterior_log_p_x_of_every_datum_is_exact(estimate):
    """So it is by importance sampling, in `test_marginal_likelihood.py`."""
    oracle = LinearGaussian.random(6, 4)
    x = oracle.sample(50)
    result = estimate(oracle, x)
    torch.testing.assert_close(result.values, oracle.log_prob(x), rtol=0, atol=1e-4)
    assert result.std_error.max() < 1e-4


def test_the_bias_of_importance_sampling():
    r"""It is :math:`-CV^2 / 2K` to first order, with CV^2 of the weights in closed form."""
    oracle = LinearGaussian.random(2, 2)
    x = oracle.sample(1).expand(100_000, -1)
    c, size = 1.4, 20
    result = importance_sampling(*oracle.pair(widening=c), x, num_samples=size)
    variation = (c**2 / math.sqrt(2 * c**2 - 1)) ** 2 - 1
    bias = (result.values - oracle.log_prob(x)).mean().item()
    assert bias == pytest.approx(-variation / (2 * size), rel=0.2)


def test_sampling_stops_at_the_tolerance_or_says_why_not():
    oracle = LinearGaussian.random(4, 2)
    x = oracle.sample(100)
    model, wide = oracle.pair(widening=1.3)
    result = importance_sampling(model, wide, x, num_samples=20_000, tolerance=0.002)
    assert 200 <= result.diagnostics["num_samples"].mean() < 5000
    assert abs((result.values - oracle.log_prob(x)).mean().item()) < 0.01
    assert "stopped at the tolerance of 0.002 nats" in result.summary()
    # A smaller tolerance takes more samples, and so does less data.
    more = importance_sampling(model, wide, x, num_samples=20_000, tolerance=0.0005)
    assert more.diagnostics["num_samples"].mean() > 2 * result.diagnostics["num_samples"].mean()
    _, narrow = oracle.pair(widening=0.4)
    hopeless = importance_sampling(model, narrow, x, num_samples=2000, tolerance=0.001)
    assert hopeless.diagnostics["num_samples"].max() < 2000
    assert "was not reached" in hopeless.summary()
    assert "ais" in hopeless.summary()


@pytest.mark.parametrize(("variance", "is_reached"), [(0.0199, True), (0.0201, False)])
def test_the_tolerance_holds_for_the_bias_which_is_half_the_variance(variance, is_reached):
    """With so many data that their Monte Carlo error is long below it."""
    variances = torch.full((10_000,), variance)
    sums = importance._RunningSums(10_000, num_samples=1_000_000)
    sums.count, sums.variance = 400, lambda: variances
    assert sums.is_enough(0.01, num_data=10_000) == is_reached
    columns = {"std_error": variances.sqrt(), "num_samples": torch.full((10_000,), 400.0)}
    verdict = importance._verdict_on_tolerance(columns, 0.01)
    assert verdict.startswith(
        "stopped at the tolerance" if is_reached else "the tolerance of 0.01 nats was not"
    )
    assert f"estimated bias {-variance / 2:.2g}" in verdict


def test_quadrature_does_not_trust_lattices_that_see_mass_on_few_nodes():
    """A mode much narrower than the first lattices: two of them agree on what their one node says."""
    model = of_one_latent(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1e-3))
    x = torch.linspace(-1.0, 1.0, 24)
    result = quadrature(model, x, tolerance=0.8)
    exact = dist.Normal(0.0, math.hypot(1.0, 1e-3)).log_prob(x)
    assert ((result.values - exact).abs() <= result.std_error + 1e-6).all()
    assert (result.values - exact).abs().max() < 0.01


# ------------------------------------------------------------------------------------ bounds


@pytest.fixture
def simulated(monkeypatch):
    """What bidirectional bounds simulate: latents and data."""
    seen, simulate = [], annealing.simulate
    monkeypatch.setattr(annealing, "simulate", lambda *a: seen.append(simulate(*a)) or seen[-1])
    return seen


def test_bidirectional_bounds_hold_log_p_x_between_them(simulated):
    oracle = LinearGaussian.random(8, 5)
    x = torch.zeros(300, 8)
    result = bidirectional(oracle.pair()[0], x, num_temperatures=20, num_leapfrog=2)
    exact = torch.cat([oracle.log_prob(data) for _, (data,) in simulated])
    lower, upper = (result.values - exact).mean().item(), (result.upper - exact).mean().item()
    assert -2 < lower < -0.02
    assert 0.02 < upper < 2
    assert result.gap == pytest.approx(upper - lower)
    # More temperatures bring them together.
    close = bidirectional(oracle.pair()[0], x, num_temperatures=200, num_leapfrog=2)
    assert -0.02 < close.gap < 0.4 * result.gap
    assert "simulated from the model" in close.summary()


# ------------------------------------------------------------------------------------ other models


def test_trajectories_that_overflow_are_rejected():
    """A scale that underflows to 0 far out: a divergence, and no error of torch."""
    model = of_one_latent(dist.Exponential(1.0), lambda scale: dist.Normal(0.0, scale))
    x = torch.tensor([0.1, 1.0, 3.0]).repeat(20).float()
    exact = quadrature(model, x.double()).values
    check(ais(model, x, num_temperatures=100), exact)


@pytest.mark.parametrize("name", ["ais_prior", "hmc_normal"])
def test_data_of_another_type_than_the_model(name):
    torch.set_default_dtype(torch.float32)
    oracle = LinearGaussian.random(4, 2)
    x = oracle.sample(40)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = of_one_latent(prior, lambda z: dist.Normal(z @ oracle.weight.T + oracle.mean, 0.5).to_event(1))
    result = ESTIMATORS[name](model, oracle.pair(widening=1.2)[1], x.double())
    check(result, oracle.log_prob(x).double())


def test_dropout_is_off_in_programs_that_are_wrapped():
    oracle = LinearGaussian.random(4, 2)
    model, guide = oracle.pair()
    model.likelihood.net = torch.nn.Sequential(torch.nn.Dropout(0.5), model.likelihood.net)
    x = oracle.sample(20)
    for wrapped in (config_enumerate(model), lambda x: model(x), model.forward):
        result = importance_sampling(wrapped, guide, x, num_samples=20)
        torch.testing.assert_close(result.values, oracle.log_prob(x), rtol=0, atol=1e-6)
        assert model.likelihood.net[0].training


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_quadrature_is_exact(latent_dim):
    oracle = LinearGaussian.random(7, latent_dim, scale=0.2)
    x = oracle.sample(40 if latent_dim < 3 else 8)
    result = quadrature(oracle.pair()[0], x)
    torch.testing.assert_close(result.values, oracle.log_prob(x), rtol=0, atol=1e-6)
    assert (result.diagnostics["converged"] == 1).all()
    assert result.bound == "exact"


def test_quadrature_finds_narrow_modes_wherever_they_are():
    """Modes of width 0.02 around +-1.3 and +-2.6, far narrower than the first lattice is dense."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = of_one_latent(prior, lambda z: dist.Normal(z.square(), 0.1).to_event(1))
    x = torch.tensor([[1.7, 6.8], [0.02, 3.0], [1.7, 9.0]])

    def joint(z):
        return sum(log_joint(model, {"z": z.unsqueeze(1).expand(-1, len(x), -1)}, x))

    exact = oracles.quadrature_log_prob(joint, 2, nodes=1500, limit=5.0)
    torch.testing.assert_close(quadrature(model, x).values, exact, rtol=0, atol=1e-4)


def brute_force(log_likelihood, x, scale=1.0):
    """log p(x) for z ~ N(0, scale^2) by a grid of a million points."""
    z = torch.linspace(-15 * scale, 15 * scale, 1_000_001)
    log_f = dist.Normal(0.0, scale).log_prob(z) + log_likelihood(z, x[:, None])
    return log_f.logsumexp(1) + math.log(30 * scale / 1_000_000)


def test_quadrature_finds_mirrored_modes():
    """Two modes of one width on a lattice that is not symmetric: one of them is nearer to a node."""
    model = of_one_latent(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z**2, 0.01))
    x = torch.tensor([0.3, 0.5, 0.9, 1.3, 1.7, 2.5, 3.0])
    exact = brute_force(lambda z, x: dist.Normal(z**2, 0.01).log_prob(x), x)
    torch.testing.assert_close(quadrature(model, x).values, exact, rtol=0, atol=1e-4)


def test_quadrature_follows_ridges_and_says_where_it_cannot():
    def ridge(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * w, 0.05), obs=x)

    x = torch.tensor([0.0, 0.3, 2.0])
    exact = brute_force(lambda z, x: dist.Normal(0.0, (z**2 + 0.05**2).sqrt()).log_prob(x), x)
    torch.testing.assert_close(quadrature(ridge, x).values, exact, rtol=0, atol=1e-4)

    def funnel(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(0.0, (v / 2).exp()))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.tensor([0.0, 1.0])
    result = quadrature(funnel, x, max_nodes=100_000)
    exact = brute_force(lambda v, x: dist.Normal(0.0, (v.exp() + 0.01).sqrt()).log_prob(x), x, 3.0)
    error = (result.values - exact).abs()
    assert (error <= result.std_error.clamp(min=1e-5)).all()


def _phi(t):
    return torch.special.ndtr(t)


JUMPS = {  # of the density of x at z: p(x)
    "box": (
        lambda z: dist.Uniform(z - 0.5, z + 0.5, validate_args=False),
        lambda x: _phi(x + 0.5) - _phi(x - 0.5),
    ),
    "sign": (
        lambda z: dist.Normal(2.0 * (z > 0.1), 1.0),
        lambda x: sum(
            mass * dist.Normal(loc, 1.0).log_prob(x).exp()
            for mass, loc in ((_phi(torch.tensor(0.1)), 0.0), (_phi(torch.tensor(-0.1)), 2.0))
        ),
    ),
    "round": (
        lambda z: dist.Normal(z.round(), 0.1),
        lambda x: sum(
            (_phi(torch.tensor(k + 0.5)) - _phi(torch.tensor(k - 0.5)))
            * dist.Normal(k, 0.1).log_prob(x).exp()
            for k in range(-6, 7)
        ),
    ),
}


@pytest.mark.parametrize("jump", JUMPS)
def test_the_stated_error_of_quadrature_covers_jumps(jump):
    likelihood, exact = JUMPS[jump]
    x = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64) + 0.0123
    result = quadrature(of_one_latent(standard_normal, likelihood), x)
    off = (result.values - exact(x).log()).abs()
    assert (off <= 3 * result.std_error).all()
    assert result.diagnostics["converged"].sum() > 30


@pytest.mark.parametrize(("pace", "noise"), [pytest.param(20.0, 0.05, marks=pytest.mark.slow), (30.0, 0.02)])
def test_quadrature_of_a_likelihood_that_oscillates(pace, noise, monkeypatch):
    def likelihood(z):
        return dist.Normal((pace * z).sin(), noise)

    x = torch.linspace(-0.9, 0.9, 13, dtype=torch.float64)
    z = torch.linspace(-9.0, 9.0, 1_000_001, dtype=torch.float64)
    weights = dist.Normal(0.0, 1.0).log_prob(z) + math.log(z[1] - z[0])
    exact = torch.stack([(weights + likelihood(z).log_prob(one)).logsumexp(0) for one in x])
    model = of_one_latent(standard_normal, likelihood)
    torch.testing.assert_close(quadrature(model, x).values, exact, rtol=0, atol=1e-5)
    # Where nodes are left too early, the points that look for mass there find it.
    monkeypatch.setattr("pyro_vae.marginal_likelihood.lattices._WHOLE", {})
    result = quadrature(model, x)
    is_off = (result.values - exact).abs() > 0.01
    assert is_off.any()
    assert result.std_error[is_off].isinf().all()


def test_quadrature_sees_peaks_with_heavy_tails_far_out():
    """Half of the mass is at 0, half in a peak at x as wide: 1 of 10 million, within exponential steps."""
    model = of_one_latent(lambda x: dist.Cauchy(x.new_zeros(()), 1.0), lambda z: dist.Cauchy(z, 1.0))
    x = torch.tensor([1.0, 30.0, 2e4, 5e4, 1e6, 1e7])
    result = quadrature(model, x, max_nodes=10_000)
    exact = dist.Cauchy(0.0, 2.0).log_prob(x)
    torch.testing.assert_close(result.values[:2], exact[:2], rtol=0, atol=1e-6)
    assert (result.diagnostics["converged"] == torch.tensor([1.0, 1, 0, 0, 0, 0])).all()
    assert result.std_error[2:].isinf().all()  # so many nodes would not do


@pytest.mark.parametrize(("loc", "noise"), [(1e4, 1e-4), (1e3, 1e-5)])
def test_quadrature_knows_where_neighbouring_nodes_are_one_number(loc, noise):
    model = of_one_latent(lambda x: dist.Normal(x.new_tensor(loc), 1.0), lambda z: dist.Normal(z, noise))
    x = loc + torch.tensor([0.0, 0.5, -1.0])
    assert quadrature(model, x.float()).std_error.isinf().all()
    exact = dist.Normal(loc, 1.0).log_prob(x.double())
    result = quadrature(model, x.double())
    torch.testing.assert_close(result.values, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadrature_does_not_state_what_is_infinite(dtype):
    r"""Where x = 0, :math:`\int N(0; 0, z^2) p(z) dz` has no end towards z = 0."""
    model = of_one_latent(lambda x: dist.HalfNormal(x.new_ones(())), lambda z: dist.Normal(0 * z, z))
    result = quadrature(model, torch.tensor([0.0, 0.7], dtype=dtype), max_nodes=20_000)
    assert result.std_error[0].isinf()
    assert result.std_error[1] < 1e-2


def test_where_no_node_has_a_probability_quadrature_knows_nothing():
    model = of_one_latent(
        dist.Normal(0.0, 1.0), lambda z: dist.Uniform(z - 1e-5, z + 1e-5, validate_args=False)
    )
    result = quadrature(model, torch.tensor([0.2, 50.0]))
    assert (result.std_error == math.inf).all()
    assert (result.diagnostics["converged"] == 0).all()


def test_quadrature_says_where_it_has_not_converged():
    oracle = LinearGaussian.random(5, 3, scale=0.01)
    result = quadrature(oracle.pair()[0], oracle.sample(5), max_nodes=500)
    assert (result.diagnostics["converged"] == 0).any()
    assert "not converged for" in result.summary()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_constrained_latent_in_programs_without_modules(name):
    """Its log p(x) is that of the negative binomial distribution."""
    model = of_one_latent(dist.Gamma(3.0, 0.5), dist.Poisson)
    guide = guide_of(z=lambda x: dist.LogNormal(((x + 2.5) / 1.5).log(), (x + 3).rsqrt()))
    x = torch.arange(0.0, 15.0).repeat(4)
    result = ESTIMATORS[name](model, guide, x)
    exact = dist.NegativeBinomial(3.0, probs=torch.tensor(1 / 1.5)).log_prob(x)
    check(result, exact)


def check(result, exact):
    error = result.values - exact
    if result.method == "quadrature":
        assert error.abs().max() < 1e-5
    else:
        z = error / result.std_error.clamp(min=1e-6)
        assert z.square().mean() < 2
        assert z.abs().max() < 6
        assert result.std_error.mean() < 0.4


@pytest.mark.parametrize("name", ["importance_sampling", "ais_prior", "quadrature"])
def test_an_angle(name):
    """Its mode is near the cut."""

    def likelihood(z):
        return dist.Normal(torch.stack([z.cos(), z.sin()], -1), 0.8).to_event(1)

    model = of_one_latent(dist.VonMises(3.0, 2.0), likelihood)
    guide = guide_of(z=lambda x: dist.VonMises(3.0, torch.full((len(x),), 2.0)))
    x = torch.randn(30, 2)
    z = torch.arange(4096) * (2 * math.pi / 4096) - math.pi
    joint = dist.VonMises(3.0, 2.0).log_prob(z) + likelihood(z.unsqueeze(1)).log_prob(x).T
    check(ESTIMATORS[name](model, guide, x), joint.logsumexp(1) + math.log(2 * math.pi / 4096))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_mixture_as_prior(name):
    means = torch.tensor([[-1.0, 0.5], [1.5, 1.0]])
    prior = dist.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2)), dist.Normal(means, 0.6).to_event(1)
    )
    model = of_one_latent(prior, lambda z: dist.Normal(z, 0.7).to_event(1))
    guide = guide_of(z=lambda x: dist.Normal(x / 2, 1.0).to_event(1))
    x = torch.randn(40, 2)
    scale = math.sqrt(0.6**2 + 0.7**2)
    exact = dist.Normal(means, scale).to_event(1).log_prob(x.unsqueeze(1)).logsumexp(1) - math.log(2)
    check(ESTIMATORS[name](model, guide, x), exact)


WEIGHTS = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -1.0]], dtype=torch.float64)


def two_levels(x):
    r"""z2 ~ N(0, 1), z1 | z2 ~ N((z2, -z2), 0.5^2), x | z1 ~ N(W z1, 0.7^2): jointly normal."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(torch.stack([z2, -z2], -1), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z1 @ WEIGHTS.T, 0.7).to_event(1), obs=x)


def two_levels_guide(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.5 * x @ WEIGHTS, 0.7).to_event(1))
        pyro.sample("z2", dist.Normal(0.6 * (z1[..., 0] - z1[..., 1]) / 2, 0.7))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_hierarchy_of_latents(name):
    signs = torch.tensor([1.0, -1.0])
    covariance = WEIGHTS @ (torch.outer(signs, signs) + 0.25 * torch.eye(2)) @ WEIGHTS.T + 0.49 * torch.eye(3)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(3), covariance)
    x = marginal.sample((60 if name != "quadrature" else 8,))
    check(ESTIMATORS[name](two_levels, two_levels_guide, x), marginal.log_prob(x))


SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
CENTRES = torch.tensor([[-2.0, 0.0], [0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
STAY = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)


def mixture(x):
    """y ~ Categorical, z | y ~ N(c_y, 1), x | z, y ~ N((1 + y) z, 0.5^2)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(SHARES))
        z = pyro.sample("z", dist.Normal(CENTRES[y], 1.0).to_event(1))
        pyro.sample("x", dist.Normal((1.0 + y)[..., None] * z, 0.5).to_event(1), obs=x)


def mixture_guide(x):
    """Exact posterior of z given y."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.3, 0.3])))
        a = (1.0 + y)[..., None]
        precision = 1 + a**2 / 0.25
        pyro.sample("z", dist.Normal((CENTRES[y] + a * x / 0.25) / precision, precision.rsqrt()).to_event(1))


without_y = guide_of(z=lambda x: dist.Normal(0.6 * x, 0.8).to_event(1))


def mixture_log_prob(x):
    a = torch.arange(1.0, 4.0)[:, None, None]
    normal = dist.Normal(a * CENTRES[:, None], (0.25 + a**2).sqrt()).log_prob(x).sum(-1)
    return (normal + SHARES.log()[:, None]).logsumexp(0)


@pytest.mark.parametrize(
    "guide",
    [without_y, mixture_guide, config_enumerate(mixture_guide)],
    ids=["without_y", "y_drawn", "y_summed_out"],
)
def test_discrete_and_continuous_latents_by_importance_sampling(guide):
    x = 3 * torch.randn(60, 2)
    result = importance_sampling(mixture, guide, x, num_samples=20_000)
    exact = mixture_log_prob(x)
    if guide in (without_y, mixture_guide):
        assert (result.values - exact).abs().max() < 0.3
    else:  # all values of y, and the exact posterior of z for each: nothing is left to chance
        torch.testing.assert_close(result.values, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "importance_sampling"])
def test_discrete_and_continuous_latents_by_the_others(name):
    x = 3 * torch.randn(60, 2)
    if name == "ais_guide":  # far from the posterior, so that 16 chains understate their error
        result = ais(mixture, x, guide=without_y, num_chains=64, num_temperatures=20, num_leapfrog=2)
    else:
        result = ESTIMATORS[name](mixture, without_y, x)
    if name.startswith("hmc"):  # two modes in some
        assert (result.values - mixture_log_prob(x)).abs().median() < 0.05
    else:
        check(result, mixture_log_prob(x))


def chain(x):
    """A hidden Markov model of eight steps, summed out in time that is linear in its length."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y_0", dist.Categorical(torch.tensor([0.5, 0.5])))
        for t in pyro.markov(range(8)):
            if t:
                y = pyro.sample(f"y_{t}", dist.Categorical(STAY[y]))
            pyro.sample(f"x_{t}", dist.Normal(2.0 * y - 1, 1.0), obs=x[:, t])


def test_enumeration_of_a_chain():
    x = torch.randn(30, 8)

    def joint(y):
        path = math.log(0.5) + STAY[y[:, :-1], y[:, 1:]].log().sum(-1)
        return path[:, None] + dist.Normal(2.0 * y - 1, 1.0).log_prob(x[:, None]).sum(-1).T

    result = enumeration(chain, x)
    torch.testing.assert_close(result.values, oracles.enumerated_log_prob(joint, [2] * 8), rtol=0, atol=1e-10)
    assert (result.std_error == 0).all()
    assert "exact" in result.summary()


def test_masked_sites_are_not_there():
    """A ragged chain: what is masked is summed out to 1, not to the number of its values."""

    def ragged(x, length):
        with pyro.plate("data", len(x)):
            y = 0
            for t in pyro.markov(range(4)):
                with pyro.poutine.mask(mask=t < length):
                    y = pyro.sample(f"y_{t}", dist.Categorical(STAY[y]))
                    pyro.sample(f"x_{t}", dist.Normal(2.0 * y, 1.0), obs=x[:, t])

    x, length = torch.randn(4, 4), torch.tensor([1, 2, 3, 4])
    result = enumeration(ragged, x, length)
    for i, count in enumerate(length.tolist()):

        def joint(y, i=i, count=count):
            path = torch.cat([torch.zeros(len(y), 1, dtype=int), y], 1)
            chain = STAY[path[:, :-1], path[:, 1:]].log().sum(-1)
            return (chain + dist.Normal(2.0 * y, 1.0).log_prob(x[i, :count]).sum(-1))[:, None]

        expected = oracles.enumerated_log_prob(joint, [2] * count)
        assert result.values[i].item() == pytest.approx(expected.item())


def test_estimates_under_inference_mode():
    oracle = LinearGaussian.random(4, 2)
    model, x = oracle.pair()[0], oracle.sample(3)
    with torch.inference_mode():
        result = quadrature(model, x)
    torch.testing.assert_close(result.values, oracle.log_prob(x))


# ------------------------------------------------------------------------------------ Appendix D


def test_kernel_density_is_that_of_scipy():
    from scipy.stats import gaussian_kde

    draws, points = torch.randn(60, 2, 3) @ torch.randn(3, 3), torch.randn(40, 2, 3)
    ours = fit_kernel_density(draws)(points)
    for i in range(2):
        found = []
        scott = 30 ** (-1 / 7)
        for j in range(10):
            kde = gaussian_kde(draws[:30, i].T.numpy(), bw_method=scott * math.exp((j - 5) / 2))
            found.append(kde.logpdf(draws[30:, i].T.numpy()).sum())
        width = 60 ** (-1 / 7) * math.exp((max(range(10), key=found.__getitem__) - 5) / 2)
        expected = gaussian_kde(draws[:, i].T.numpy(), bw_method=width).logpdf(points[:, i].T.numpy())
        torch.testing.assert_close(ours[:, i], torch.from_numpy(expected))


def test_reciprocal_estimates_err_upwards_when_the_fit_is_poor():
    """The table in which 25 draws are too few for ten latents, and 250 are enough (exact posterior draws)."""
    oracle = LinearGaussian.random(20, 10)
    x = oracle.sample(200)
    errors = {}
    for count in (25, 250):
        z = oracle.posterior(x).sample((2, count))
        joint = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        joint = joint + dist.Normal(z @ oracle.weight.T + oracle.mean, oracle.scale).log_prob(x).sum(-1)
        for fit in (fit_normal, fit_kernel_density):
            values, _, _ = reciprocal_importance(joint, z, fit)
            errors[fit, count] = (values - oracle.log_prob(x)).mean().item()
    assert 0.05 < errors[fit_normal, 25] < 0.6
    assert 0.4 < errors[fit_kernel_density, 25] < 1.5
    assert abs(errors[fit_normal, 250]) < 0.02
    assert abs(errors[fit_kernel_density, 250]) < 0.2


# ------------------------------------------------------------------------------------ where the gap is


def test_inference_gap_of_a_wrong_encoder_is_amortisation():
    oracle = LinearGaussian.random(6, 2)
    x = oracle.sample(50)
    model, guide = oracle.pair(widening=1.5)
    gap = inference_gap(model, guide, x)
    expected = (oracle.log_prob(x) - oracle.elbo(x, 1.5)).mean().item()
    assert gap.amortisation.mean().item() == pytest.approx(expected, abs=0.05)
    assert gap.approximation.mean().item() == pytest.approx(0, abs=0.01)
    assert "amortisation gap" in gap.summary()
    again = importance_sampling(model, guide, x, num_samples=50)
    assert [row.name for row in compare({"gap": gap.log_marginal, "again": again}).rows]


def test_inference_gap_of_a_diagonal_family_is_approximation():
    oracle = LinearGaussian.random(6, 3)
    x = oracle.sample(50)
    model, _ = oracle.pair()
    _, guide = vae(6, 3, hidden=())  # whose family is DiagNormal
    gap = inference_gap(model, guide, x)
    precision = torch.linalg.inv(oracle.covariance)
    # The best diagonal normal has the diagonal of the posterior's precision.
    expected = (precision.diagonal().log().sum() - precision.logdet()).item() / 2
    assert gap.approximation.mean().item() == pytest.approx(expected, abs=0.03)
    bound = elbo(model, guide, x, num_samples=2000).elbo.mean().item()
    assert gap.elbo.mean().item() == pytest.approx(bound, rel=0.02)


# ------------------------------------------------------------------------------------ mass at the ends

FEW = torch.tensor([0.0, 1.0, 5.0, 10.0])
TWO = torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 10.0], [5.0, 0.0, 5.0], [4.0, 3.0, 3.0]])


def _of_ten(z):
    return dist.Binomial(10, z, validate_args=False)


def _split_in_ten(z):
    return dist.Multinomial(10, z, validate_args=False)


def _beta_binomial(a, b, x=FEW):
    return dist.BetaBinomial(torch.tensor(a).double(), torch.tensor(b).double(), 10).log_prob(x.double())


def _gamma_poisson(shape, rate, x=FEW):
    shape, rate = torch.tensor(shape).double(), torch.tensor(rate).double()
    return dist.NegativeBinomial(shape, probs=1 / (1 + rate)).log_prob(x.double())


def _by_quantiles(quantile, log_likelihood, x):
    """E p(x | z) over the prior, for z as a function of the logit of its quantile."""
    t = torch.linspace(-300, 300, 60_001, dtype=torch.float64)
    weight = torch.nn.functional.logsigmoid(t) + torch.nn.functional.logsigmoid(-t)
    joint = weight[:, None] + log_likelihood(quantile(t)[:, None], x.double())
    return joint.logsumexp(0) + math.log(600 / 60_000)


def _sparse(a, size):
    return dist.Dirichlet(torch.full((size,), a))


def _mixture(parts):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


LOG_DIRICHLET = dist.DirichletMultinomial(torch.full((3,), 0.1).double(), 10.0).log_prob(TWO.double())
HARD = {  # prior, likelihood, data, log p(x)
    "beta": (dist.Beta(0.1, 0.1), _of_ten, FEW, _beta_binomial(0.1, 0.1)),
    "beta_sparser": (dist.Beta(0.02, 0.02), _of_ten, FEW, _beta_binomial(0.02, 0.02)),
    "beta_of_one_end": (dist.Beta(30.0, 0.05), _of_ten, FEW, _beta_binomial(30.0, 0.05)),
    "betas": (
        dist.Beta(torch.tensor([0.1, 0.1]), torch.tensor([0.1, 0.2])).to_event(1),
        lambda z: _of_ten(z).to_event(1),
        TWO[:, :2],
        _beta_binomial(0.1, 0.1, TWO[:, 0]) + _beta_binomial(0.1, 0.2, TWO[:, 1]),
    ),
    "beta_of_another_interval": (
        dist.AffineBeta(*torch.tensor([0.1, 0.1, -1.0, 2.0])),
        lambda z: _of_ten((z + 1) / 2),
        FEW,
        _beta_binomial(0.1, 0.1),
    ),
    "mixture_of_betas": (
        _mixture(dist.Beta(torch.tensor([0.1, 1.0]), torch.tensor([1.0, 0.1]))),
        _of_ten,
        FEW,
        torch.logaddexp(_beta_binomial(0.1, 1.0), _beta_binomial(1.0, 0.1)) - math.log(2),
    ),
    "kumaraswamy": (
        dist.Kumaraswamy(*torch.tensor([0.1, 1.0])),  # Beta(0.1, 1), under another name
        _of_ten,
        FEW,
        _beta_binomial(0.1, 1.0),
    ),
    "relaxed_bernoulli": (
        dist.RelaxedBernoulli(torch.tensor(0.1), logits=torch.tensor(0.0)),
        _of_ten,
        FEW,
        _by_quantiles(lambda t: 10 * t, lambda u, x: dist.Binomial(10, logits=u).log_prob(x), FEW),
    ),
    "dirichlet": (_sparse(0.1, 3), _split_in_ten, TWO, LOG_DIRICHLET),
    "mixture_of_dirichlets": (_mixture(_sparse(0.1, 3).expand([2])), _split_in_ten, TWO, LOG_DIRICHLET),
    "gamma": (dist.Gamma(0.1, 1.0), dist.Poisson, FEW, _gamma_poisson(0.1, 1.0)),
    "gamma_sparser": (dist.Gamma(0.01, 1.0), dist.Poisson, FEW, _gamma_poisson(0.01, 1.0)),
    "pareto": (
        dist.Pareto(1.0, 0.1),
        lambda z: dist.Exponential(1 / z),
        FEW,
        _by_quantiles(lambda t: torch.nn.functional.softplus(t) / 0.1, lambda u, x: -u - x * (-u).exp(), FEW),
    ),
    "lognormal": (
        dist.LogNormal(0.0, 100.0),
        dist.Poisson,
        FEW[:2],
        oracles.quadrature_log_prob(
            lambda u: (
                dist.Normal(0.0, 100.0).log_prob(u)
                + dist.Poisson(u.clamp(max=50).double().exp()).log_prob(FEW[:2].double())
            ),
            1,
            nodes=40_001,
            limit=690.0,
        ),
    ),
    "cauchy": (
        dist.Cauchy(0.0, 1.0),
        lambda z: dist.Bernoulli(logits=z),
        FEW[:2],
        torch.full((2,), 0.5).double().log(),
    ),
    "far_modes": (
        _mixture(dist.Normal(torch.tensor([-50.0, 50.0]), 1.0)),
        lambda z: dist.Normal(z, 1.0),
        FEW,
        dist.Normal(torch.tensor([[-50.0], [50.0]]).double(), math.sqrt(2))
        .log_prob(FEW.double())
        .logsumexp(0)
        - math.log(2),
    ),
    "narrow_posterior": (
        dist.Normal(0.0, 1.0),
        lambda z: dist.Normal(z, 1e-4),
        FEW[:2],
        dist.Normal(0.0, 1.0).log_prob(FEW[:2].double()),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_quadrature_sees_mass_at_the_ends_of_numbers(name):
    torch.set_default_dtype(torch.float32)
    prior, likelihood, x, exact = HARD[name]
    result = quadrature(of_one_latent(prior, likelihood), x)
    error = (result.values - exact).abs()
    assert (result.diagnostics["converged"] == 1).all()
    assert (error <= result.std_error + 2e-4).all()
    torch.testing.assert_close(
        result.diagnostics["prior_mass"], torch.ones(len(x)).double(), rtol=0, atol=1e-3
    )


def test_a_prior_that_does_not_integrate_to_one_is_not_exact():
    class Half(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) - math.log(2)

    model = of_one_latent(Half(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
    result = quadrature(model, torch.zeros(3))
    assert (result.std_error == math.inf).all()
    assert "the prior integrates to 0.5" in result.summary()
    assert "exact but for" not in result.summary()


@pytest.mark.parametrize(
    "name",
    ["beta", "betas", "dirichlet", "kumaraswamy", "gamma_sparser", "lognormal", "mixture_of_dirichlets"],
)
def test_draws_in_unconstrained_space_have_the_density_that_is_scored(name):
    """By the mean of exp(i w u) under draws, and under the density on a grid."""
    torch.set_default_dtype(torch.float32)
    prior, likelihood, x, _ = HARD[name]
    model, x = of_one_latent(prior, likelihood), x[:1]
    u = draw_unconstrained(model, x, num_samples=20_000)["z"][:, 0].reshape(20_000, -1)
    line = torch.linspace(-4000, 4000, 100_001)
    for i in range(u.shape[1]):
        position = u[:1].expand(len(line), -1).clone()
        position[:, i] = line
        shaped = (
            position.reshape(len(line), 1, *u.shape[1:])
            if u.shape[1] > 1 or name == "dirichlet"
            else position
        )
        point = at_unconstrained(model, {"z": shaped}, x)
        # Of several coordinates, given the others: the mass of this one at w = 0 is what normalises it.
        density = (point.log_joint.log_prior + point.log_jacobian)[:, 0].double().softmax(0)
        for w in (0.01, 0.1):
            phases = (w * line).double()
            expected = torch.complex((phases.cos() * density).sum(), (phases.sin() * density).sum())
            found = torch.complex((w * u[:, i]).cos().mean().double(), (w * u[:, i]).sin().mean().double())
            assert (found - expected).abs() < 0.03


@pytest.mark.parametrize("name", ["beta", "dirichlet"])
def test_bidirectional_bounds_at_the_ends_of_numbers(name, simulated):
    """With r = w / p(x) of a chain: E r = 1 from the prior, and E r/(1 + r) is E 1/(1 + r) of reverse ones.

    The latter (Crooks 1999, eq. 9) instead of E 1/r = 1, of which rare chains make up a part.
    """
    torch.set_default_dtype(torch.float32)
    prior, likelihood, x, _ = HARD[name]
    exact_of = {
        "beta": lambda drawn: _beta_binomial(0.1, 0.1, drawn),
        "dirichlet": dist.DirichletMultinomial(torch.full((3,), 0.1).double(), 10.0).log_prob,
    }[name]
    x = x[:1].expand(1000, *x.shape[1:])
    result = bidirectional(
        of_one_latent(prior, likelihood), x, num_chains=1, num_temperatures=40, num_leapfrog=2
    )
    drawn = torch.cat([data for _, (data,) in simulated]).double()
    exact = exact_of(drawn)
    ratio = (result.values - exact).exp()
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / math.sqrt(len(x))
    difference = (result.values - exact).sigmoid() - (exact - result.upper).sigmoid()
    assert abs(difference.mean().item()) < 4 * difference.std().item() / math.sqrt(len(x))
    simulated.clear()
    several = bidirectional(of_one_latent(prior, likelihood), x[:150], num_temperatures=40, num_leapfrog=2)
    drawn = torch.cat([data for _, (data,) in simulated]).double()
    assert (several.values - exact_of(drawn)).min() > -3


def test_data_finer_than_the_programs_are_refused_for_what_they_are():
    model, guide = vae(6, 2, hidden=(8,), family=DiagNormal())
    for seed in range(3):  # rounding decided what was said
        torch.manual_seed(seed)
        x = torch.randn(100, 6, dtype=torch.float64)
        with pytest.raises(SupportError, match=r"the programs take torch\.float32"):
            importance_sampling(model.float(), guide.float(), x, num_samples=10)


def test_estimates_of_missing_and_impossible_numbers_are_read_again(tmp_path):
    x = torch.randn(20, 5)
    x[0, 0], x[1, 1] = math.nan, 1e200
    model, guide = vae(5, 2, hidden=(8,), family=DiagNormal(), missing=True)
    result = importance_sampling(model, guide, x, num_samples=20)
    assert result.values[1] == -math.inf
    result.save(tmp_path / "estimates.json")
    torch.testing.assert_close(LogMarginal.load(tmp_path / "estimates.json").values, result.values)


def test_a_guide_of_a_smaller_support_is_noted():
    """Half of the mass is out of its reach: no number tells, for the weights of the other half are even."""
    half = guide_of(z=lambda x: dist.HalfNormal(torch.ones(len(x))))
    box = guide_of(z=lambda x: dist.Uniform(-20.0 * torch.ones(len(x)), 20.0))
    model = of_one_latent(standard_normal, lambda z: dist.Normal(z, 1.0))
    x = torch.linspace(-2.0, 2.0, 5)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    above = exact + (1 - dist.Normal(x / 2, math.sqrt(0.5)).cdf(torch.zeros(()))).log()
    for guide, expected in ((half, above), (box, exact)):
        for result in (
            importance_sampling(model, guide, x, num_samples=20_000),
            ais(model, x, guide=guide, num_chains=100, num_temperatures=100),
        ):
            assert ((result.values - expected).abs() < 4 * result.std_error).all()
            assert ("draws 'z' from a part of the model's support" in result.summary()) == (guide is half)


def test_data_that_are_impossible_for_other_latents():
    """x lies between 0 and z: for a draw from the prior, as tells models apart, it may be impossible."""

    model = of_one_latent(dist.Pareto(torch.tensor(0.5), torch.tensor(2.0)), lambda z: dist.Uniform(0.0, z))
    guide = guide_of(z=lambda x: dist.Pareto(x.clamp(min=0.5), torch.tensor(2.5)))
    x = torch.tensor([0.3, 0.6, 1.0, 2.9])
    exact = (2 / 3 * 0.5**2 / x.clamp(min=0.5) ** 3).log()
    result = importance_sampling(model, guide, x, num_samples=5_000)
    torch.testing.assert_close(result.values, exact, rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------ refusals


def _shifted(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)


def _autoregressive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        before = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
        pyro.sample("x", dist.Normal(z[..., None] + 2 * before, 0.5).to_event(1), obs=x)


def _support_of_y(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Uniform(-y - 1, y + 1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _trials(x, count):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Binomial(count, 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _masked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


def _of_flow(x):
    base = dist.Normal(torch.zeros(len(x), 1), 1.0)
    return dist.TransformedDistribution(base, [torch.distributions.transforms.TanhTransform()]).to_event(1)


NORMAL = of_one_latent(standard_normal, lambda z: dist.Normal(z, 1.0))
OF_BITS = of_one_latent(
    lambda x: dist.Bernoulli(torch.full((4,), 0.5)).to_event(1), lambda y: dist.Normal(y.sum(-1), 1.0)
)
FLAT = of_one_latent(
    lambda x: dist.ImproperUniform(dist.constraints.real, (), ()), lambda z: dist.Normal(z, 1.0)
)
OF_W = guide_of(w=lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("words", "estimate"),
    [
        (
            "tolerance must be positive",
            lambda x: importance_sampling(*LinearGaussian.random(4, 2).pair(), x, tolerance=0.0),
        ),
        ("observes is none of its arguments", lambda x: bidirectional(_shifted, x[:, 0])),
        ("'x' depends on the data that it shall draw", lambda x: bidirectional(_autoregressive, x)),
        (
            "4 latent dimensions, but quadrature takes at most 3",
            lambda x: quadrature(LinearGaussian.random(4, 4).pair()[0], x),
        ),
        (r"cannot be enumerated\. Make it several sites", lambda x: enumeration(OF_BITS, x[:, 0])),
        ("no value for the model's site 'z'", lambda x: enumeration(mixture, x[:, :2])),
        (r"all \(.*\) are discrete: enumeration", lambda x: ais(chain, x.repeat(1, 2))),
        (
            "support of the model's site 'z' depends on a discrete site",
            lambda x: quadrature(_support_of_y, x[:, 0]),
        ),
        (r"\['z'\].*\['w'\]", lambda x: ais(LinearGaussian.random(4, 2).pair()[0], x, guide=OF_W)),
        ("family cannot be searched", lambda x: inference_gap(vae(4, 1)[0], guide_of(z=_of_flow), x)),
        (
            "samples 'z_unconstrained' besides the model's sites",
            lambda x: importance_sampling(NORMAL, pyro.infer.autoguide.AutoNormal(NORMAL), x[:, 0]),
        ),
        (
            r"cannot be summed out \(Inhomogeneous total count",
            lambda x: enumeration(_trials, x[:, 0], torch.tensor([2.0, 3.0, 3.0])),
        ),
        (r"'x' is masked by shape \(\d+, 3\).*one number a datum", lambda x: quadrature(_masked, x[:, :3])),
        ("the prior of a site is flat", lambda x: quadrature(FLAT, x[:, 0])),
    ],
)
def test_what_cannot_be_estimated_is_said(words, estimate):
    with pytest.raises(ValueError, match=words):
        estimate(torch.rand(3, 4).round())
