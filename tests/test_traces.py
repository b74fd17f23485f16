import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from toys import (
    ais,
    bidirectional,
    enumeration,
    guide_of,
    importance_sampling,
    quadrature,
    sample_posterior,
    standard_normal,
)

from pyro_vae import Bernoulli, SupportError, elbo, log_joint, log_weights, planar, sample, vae
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces import first_nonfinite, guide_distributions, log_guide, model_distributions

pytestmark = pytest.mark.usefixtures("double")


def test_log_joint_has_both_parts_for_every_sample_and_datum():
    oracle = LinearGaussian.random(5, 2)
    model, _ = oracle.pair()
    x, z = torch.randn(4, 5), torch.randn(3, 4, 2)
    log_prior, log_likelihood = log_joint(model, {"z": z}, x)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(log_prior, expected)
    loc = z @ oracle.weight.T + oracle.mean
    torch.testing.assert_close(log_likelihood, dist.Normal(loc, 0.5).log_prob(x).sum(-1))


def test_weights_are_log_p_x_if_the_guide_is_the_posterior():
    oracle = LinearGaussian.random(5, 3)
    x = oracle.sample(7)
    weights = log_weights(*oracle.pair(), x, num_samples=6)
    torch.testing.assert_close(weights, oracle.log_prob(x).expand(6, 7), rtol=0, atol=1e-10)


def test_weights_are_differentiable_in_both_programs():
    oracle = LinearGaussian.random(5, 3)
    model, guide = oracle.pair(widening=1.5)
    x = oracle.sample(4)
    log_weights(model, guide, x, num_samples=20_000).mean(0).sum().backward()
    # The gradient of the bound in the mean of p(x|z) is sum (x - E[x | q]) / s^2; at the posterior mean it is
    residual = x - oracle.mean - (x - oracle.mean) @ oracle.gain.T @ oracle.weight.T
    bias = model.likelihood.net.bias
    torch.testing.assert_close(bias.grad, residual.sum(0) / 0.5**2, rtol=0.02, atol=0.3)
    # ... and zero in the guide's mean, where the posterior mean already is.
    assert guide.posterior.net.bias.grad.abs().max() < 0.5
    assert guide.posterior.net.bias.grad.abs().max() > 0


def test_mask_counts_and_scale_does_not():
    oracle = LinearGaussian.random(4, 2)
    model, _ = oracle.pair()
    x, z = torch.randn(6, 4), {"z": torch.randn(2, 6, 2)}
    plain = log_joint(model, z, x)
    scaled = log_joint(poutine.scale(model, scale=7.0), z, x)
    torch.testing.assert_close(scaled.log_likelihood, plain.log_likelihood)
    mask = torch.tensor([True, False, True, True, False, True])
    masked = log_joint(poutine.mask(model, mask=mask), z, x)
    torch.testing.assert_close(masked.log_likelihood, plain.log_likelihood * mask)
    torch.testing.assert_close(masked.log_prior, plain.log_prior * mask)


def two_levels(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z1, 0.3).to_event(1), obs=x)


def test_several_latent_sites():
    x, z1, z2 = torch.randn(3, 2), torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    log_prior, log_likelihood = log_joint(two_levels, {"z1": z1, "z2": z2}, x)
    expected = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(z2, 0.5).log_prob(z1)
    torch.testing.assert_close(log_prior, expected.sum(-1))
    torch.testing.assert_close(log_likelihood, dist.Normal(z1, 0.3).log_prob(x).sum(-1))


def test_sample_draws_from_the_model():
    oracle = LinearGaussian.random(3, 2)
    latents, observations = sample(oracle.pair()[0], torch.zeros(2, 3), num_samples=40_000)
    assert latents["z"].shape == (40_000, 2, 2)
    x = observations["x"]
    assert x.shape == (40_000, 2, 3)
    torch.testing.assert_close(x[:, 0].mean(0), oracle.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(x[:, 1].T), oracle.marginal.covariance_matrix, atol=0.15, rtol=0)
    # x belongs to its z
    residual = x - latents["z"] @ oracle.weight.T - oracle.mean
    assert residual.std().item() == pytest.approx(0.5, rel=0.02)


def test_distributions_of_the_sites():
    oracle = LinearGaussian.random(4, 2, scale=0.01)
    model, guide = oracle.pair()
    x = oracle.sample(5)
    posterior = guide_distributions(guide, x)["z"]
    torch.testing.assert_close(posterior.mean[0], (x - oracle.mean) @ oracle.gain.T)
    sites = model_distributions(model, guide, x)
    assert set(sites) == {"z", "x"}
    assert sites["x"].mean.shape == (1, 5, 4)
    # at a draw from the guide, which here knows x closely; not at a draw from the prior
    assert (sites["x"].mean[0] - x).abs().max() < 0.1


def test_the_first_site_that_is_not_finite_is_named():
    model, guide = vae(4, 2, family=Bernoulli())
    x = torch.zeros(3, 4)
    assert first_nonfinite(model, guide, x) is None
    with torch.no_grad():
        model.likelihood.net.layers[-1].bias[1] = torch.nan
    assert "model's site 'x'" in first_nonfinite(model, guide, x)
    with torch.no_grad():
        guide.posterior.net.layers[-1].bias[0] = torch.inf
    assert "value of the guide's site 'z'" in first_nonfinite(model, guide, x)


X = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
METHODS = {
    "quadrature": lambda model, guide: quadrature(model, X),
    "ais": lambda model, guide: ais(model, X, num_temperatures=2),
    "ais_guide": lambda model, guide: ais(model, X, guide=guide, num_temperatures=2),
    "bidirectional": lambda model, guide: bidirectional(model, X, num_temperatures=2),
    "importance_sampling": lambda model, guide: importance_sampling(model, guide, X, num_samples=9),
    "elbo": lambda model, guide: elbo(model, guide, X),
    "sample_posterior": lambda model, guide: sample_posterior(model, X, num_samples=4, num_warmup=4),
}


def _shared_in_a_plate(size, dim=None, index=None):
    def model(x):
        with pyro.plate("topics", size, dim=dim):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = w.sum() if index is None else w[index * torch.ones(len(x)).long()]
            pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("topics", size, dim=dim):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("size", "dim", "index"), [(5, None, None), (20, None, None), (5, -3, None), (4, None, 3)]
)
def test_sites_in_a_plate_of_their_own_are_refused_by_name(name, size, dim, index):
    with pytest.raises(
        ValueError, match=r"(?s)'w' must lie in the plate 'data'.*'topics' at dim=.*pyro\.param"
    ):
        METHODS[name](*_shared_in_a_plate(size, dim, index))


@pytest.mark.parametrize("name", METHODS)
def test_plates_on_the_axis_of_samples_are_refused_by_name(name):
    def nested(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(3, -1))

    for model in nested, _shared_in_a_plate(5, -2)[0]:
        with pytest.raises(ValueError, match=r"(?s)'(features|topics)'.* at dim=-2.*to_event"):
            METHODS[name](model, guide_of(z=standard_normal))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sample_posterior"])
def test_subsampled_and_scaled_plates_have_log_p_x_of_every_datum(name):
    def model(x):
        with poutine.scale(scale=0.1), pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    def part(x):
        with pyro.plate("data", len(x), subsample_size=min(5, len(x))) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def part_guide(x):
        with pyro.plate("data", len(x), subsample_size=min(5, len(x))):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    if name in ("quadrature", "importance_sampling", "ais_guide"):
        exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
        found = METHODS[name](model, guide).values
        torch.testing.assert_close(found, exact, rtol=0, atol=0.5 if name == "ais_guide" else 1e-6)
    with pytest.raises(ValueError, match="draws some of the data"):
        METHODS[name](part, part_guide)


def test_masked_latents_are_not_there():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = torch.where(X > 0, dist.Normal(0.0, math.sqrt(2)).log_prob(X), 0.0)
    torch.testing.assert_close(quadrature(model, X).values, exact, rtol=0, atol=1e-6)


def by_a_handler(name, fn, mask):
    with poutine.mask(mask=mask):
        return pyro.sample(name, fn)


def by_a_distribution(name, fn, mask):
    return pyro.sample(name, fn.expand(mask.shape).mask(mask))


@pytest.mark.parametrize("masked_by", [by_a_handler, by_a_distribution])
@pytest.mark.parametrize("masked", [{"model", "guide"}, {"model"}, {"guide"}])
def test_a_mask_means_the_same_in_both_programs_and_in_every_estimator(masked, masked_by):
    """Where the model masks a latent it is not there; elsewhere the guide's density counts, masked or not."""

    def model(x):
        with pyro.plate("data", len(x)):
            mask = (x > 0) | ("model" not in masked)
            y = masked_by("y", dist.Categorical(torch.tensor([0.2, 0.8])), mask)
            z = masked_by("z", dist.Uniform(-5.0, 5.0), mask)
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x):
        mask = (x > 0) | ("guide" not in masked)
        with pyro.plate("data", len(x)):
            masked_by("y", dist.Categorical(torch.tensor([0.5, 0.5]).expand(len(x), 2)), mask)
            masked_by("z", dist.Uniform(-5.0, 5.0), mask)

    few = X[::4]
    box = dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0)
    within = box.cdf(few + 5) - box.cdf(few - 5)
    exact = torch.where(few > 0, (torch.tensor([[0.02], [0.08]]) * within).sum(0).log(), 0.0)
    for result in (
        quadrature(model, few),
        importance_sampling(model, guide, few, num_samples=5_000),
        ais(model, few, num_temperatures=20, num_chains=50),
    ):
        assert ((result.values - exact).abs() < 5 * result.std_error + 1e-6).all()
    bound = elbo(model, guide, few, num_samples=2000).elbo
    assert (bound < exact + 0.06).all()
    if "model" in masked:
        assert (bound[few <= 0] == 0).all()


@pytest.mark.parametrize("masked_by", [by_a_handler, by_a_distribution])
@pytest.mark.parametrize("latent", [dist.Normal(0.0, 1.0), dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))])
def test_data_that_depend_on_a_masked_latent_have_no_density(latent, masked_by):
    def model(x):
        with pyro.plate("data", len(x)):
            z = masked_by("z", latent, x > 0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guide_of(z=lambda x: latent.expand(x.shape))
    method = quadrature if latent.has_rsample else enumeration
    for estimate in (
        lambda: importance_sampling(model, guide, X, num_samples=10),
        lambda: elbo(model, guide, X),
        lambda: method(model, X),
    ):
        with pytest.raises(ValueError, match="the model masks 'z', so that it is not there, but 'x' depends"):
            estimate()


# ------------------------------------------------------------------------------------ refusals


def outside_of_the_plate(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.expand(len(x), 4), 1.0).to_event(1), obs=x)


def partly_masked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 2]).mask(x > 0).to_event(1))
        pyro.sample("x", dist.Normal(z * (x > 0), 1.0).to_event(1), obs=x)


def in_another_place(x):
    with pyro.plate("data", len(x), dim=-3):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 1, 1), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


POINT = guide_of(z=lambda x: dist.Delta(torch.zeros(len(x), 2)).to_event(1))
OF_W = guide_of(w=lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1))
SHAPE = r"shape \(samples, 3 data"


@pytest.mark.parametrize(
    ("words", "take"),
    [
        ("point mass", lambda x: log_weights(vae(4, 2)[0], POINT, x, num_samples=2)),
        (r"\['z'\].*\['w'\]", lambda x: log_weights(vae(4, 2)[0], OF_W, x, num_samples=2)),
        (
            "'w' must lie in the plate 'data'",
            lambda x: log_weights(
                outside_of_the_plate, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)), x, num_samples=2
            ),
        ),
        ("'z1'", lambda x: log_joint(two_levels, {"z2": torch.zeros(5, 3, 2)}, x[:, :2])),
        (SHAPE, lambda x: log_joint(vae(4, 2)[0], {"z": torch.zeros(3, 2)}, x)),
        (SHAPE, lambda x: log_joint(vae(4, 2)[0], {"z": torch.zeros(3, 5, 2)}, x)),
        ("at dim=-1", lambda x: log_joint(in_another_place, {"z": torch.zeros(1, 1, 1)}, x[:1, :1, None])),
        (
            "known for its own draws only",
            lambda x: log_guide(vae(4, 2, posterior=planar(2))[1], {"z": torch.zeros(1, 3, 2)}, x),
        ),
        ("some numbers of the latent site 'z' are masked", lambda x: quadrature(partly_masked, x[:, :2])),
    ],
)
def test_what_has_no_density_is_refused(words, take):
    with pytest.raises(ValueError, match=words):
        take(torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]))


def test_data_outside_of_the_support_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=x == x):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guide_of(z=lambda x: dist.Normal(torch.zeros(len(x)), 1.0))
    x = torch.tensor([1.0, math.nan])
    for estimate in (lambda: elbo(model, guide, x), lambda: log_weights(model, guide, x, num_samples=2)):
        with pytest.raises(SupportError, match=r"site .x. holds numbers, such as nan, .* are masked"):
            estimate()
