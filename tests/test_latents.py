"""What latent spaces are like: against integrals, straight lines, circles and known classes."""

import math

import pytest
import torch

from pyro_vae import (
    MixtureOfNormals,
    active_units,
    aggregate_posterior,
    autoencoder,
    elbo,
    inverse_autoregressive,
    kl_per_dim,
    vae,
    vq_vae,
)
from pyro_vae.latents import (
    along,
    code_usage,
    completeness,
    continuity,
    fitted_box,
    fitted_mixture,
    fitted_normal,
    lipschitz,
    nearest_distances,
    posterior_mean,
    posterior_variance,
    probe_accuracy,
    spherical,
    straight,
)
from pyro_vae.oracles import LinearGaussian


def test_kl_per_dimension_has_its_closed_form_and_sums_to_the_kl():
    model, guide = vae(5, 3)
    x = torch.rand(6, 5).round()
    kl = kl_per_dim(model, guide, x)
    posterior = guide.posterior(x).base_dist
    variance = posterior.scale.square()
    # Kingma & Welling 2013, appendix B
    expected = -0.5 * (1 + variance.log() - posterior.loc.square() - variance)
    torch.testing.assert_close(kl, expected.detach(), atol=1e-6, rtol=1e-4)
    sampled = elbo(model, guide, x, num_samples=20_000).kl
    torch.testing.assert_close(kl.sum(1).double(), sampled, rtol=0, atol=0.05)


MODEL, GUIDE = vae(5, 3)
ZEROS = torch.zeros(2, 5)
NO_DENSITY = r"one value for every datum|point mass"


@pytest.mark.parametrize(
    ("take", "words"),
    [
        (lambda: kl_per_dim(*vae(5, 3, prior=MixtureOfNormals(3)), ZEROS), "prior of 'z', MixtureSameFamily"),
        (
            lambda: kl_per_dim(*LinearGaussian.random(5, 3).pair(), ZEROS),
            "posterior of 'z', MultivariateNormal",
        ),
        (lambda: active_units(MODEL, ZEROS), "this takes the guide, but 'x' is observed"),
        (lambda: posterior_mean(MODEL, ZEROS), "this takes the guide, but 'x' is observed"),
        (lambda: kl_per_dim(GUIDE, MODEL, ZEROS), "this takes the guide, but 'x' is observed"),
        (lambda: active_units(GUIDE, ZEROS, site="w"), r"no site 'w', only \['z'\]"),
        (lambda: kl_per_dim(MODEL, GUIDE, ZEROS, site="w"), "site="),
        (lambda: aggregate_posterior(*autoencoder(5, 2), ZEROS), NO_DENSITY),
        (lambda: aggregate_posterior(*vq_vae(5, num_codes=3, code_dim=2, length=2), ZEROS), NO_DENSITY),
        (lambda: code_usage(vae(2, 2)[1], torch.zeros(1, 2)), "no code of a codebook, but Normal"),
        (lambda: fitted_mixture(torch.randn(10, 3), components=11), "from 1 to the"),
        (lambda: completeness(ZEROS, lambda x: 9 * x + 1, ZEROS, limit=0.2), "of logits take softmax"),
    ],
)
def test_what_codes_cannot_say_is_refused(take, words):
    with pytest.raises(ValueError, match=words):
        take()


def test_active_units_are_those_whose_mean_moves():
    _, guide = vae(5, 3, hidden=())
    encoder = guide.posterior.net.layers[0]
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[0, 0] = 2.0  # variance 4 Var(x_0) = 1
        encoder.weight[1, 1] = 0.1  # variance 0.01 Var(x_1) = 0.0025
    x = torch.rand(4000, 5).round()
    assert active_units(guide, x).tolist() == [True, False, False]
    assert active_units(guide, x, threshold=0.001).tolist() == [True, True, False]
    torch.testing.assert_close(posterior_mean(guide, x)[:, 0], 2 * x[:, 0] + encoder.bias[0].detach())


def test_codes_of_a_posterior_without_a_known_mean_are_means_of_draws():
    _, guide = vae(5, 3, posterior=inverse_autoregressive(3))
    x = torch.rand(6, 5).round()
    codes = posterior_mean(guide, x)
    many = guide.posterior(x.expand(20_000, *x.shape)).sample()
    assert ((codes - many.mean(0)).abs() < 5 * many.std(0) / 500**0.5).all()
    assert active_units(guide, x).shape == (3,)


@pytest.mark.usefixtures("double")
def test_posterior_variance():
    oracle = LinearGaussian.random(5, 3)
    _, guide = oracle.pair()
    x = oracle.sample(7)
    torch.testing.assert_close(posterior_variance(guide, x), oracle.covariance.diagonal())
    _, guide = vae(5, 3, posterior=inverse_autoregressive(3))
    many = guide.posterior(x.expand(20_000, *x.shape)).sample().var(0).mean(0)
    torch.testing.assert_close(posterior_variance(guide, x), many, rtol=0.2, atol=0)


# ------------------------------------------------------------------------------------ aggregate


@pytest.mark.usefixtures("double")
def test_the_aggregate_posterior_against_integrals():
    """One latent and five data: both parts by the trapezoidal rule."""
    model, guide = vae(5, 1, hidden=())
    with torch.no_grad():
        guide.posterior.net.layers[0].weight.mul_(3)
        guide.posterior.net.layers[0].bias.copy_(torch.tensor([0.3, -2.0]))
    x = torch.rand(5, 5).round()
    q = guide.posterior(x).base_dist
    z = torch.linspace(-15, 15, 30_001).unsqueeze(1)
    log_each = q.expand([5, 1]).log_prob(z.unsqueeze(1)).squeeze(2).detach()
    log_aggregate = log_each.logsumexp(1) - math.log(5)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z.squeeze(1))

    def integral(values):
        return torch.trapezoid(values, z.squeeze(1)).item()

    marginal = integral(log_aggregate.exp() * (log_aggregate - log_prior))
    information = integral((log_each.exp() * (log_each - log_aggregate.unsqueeze(1))).mean(1))
    found = aggregate_posterior(model, guide, x, num_samples=20_000)
    right = (kl_per_dim(model, guide, x).mean().item(), information, marginal)
    for (mean, error), value in zip(found, right, strict=True):
        assert error < 0.01
        assert mean == pytest.approx(value, abs=4 * error)
    assert found.kl.mean == pytest.approx(found.mutual_information.mean + found.marginal_kl.mean)
    assert marginal > 0.05
    assert information > 0.05


def test_the_aggregate_posterior_of_data_from_the_model_is_the_prior(monkeypatch):
    oracle = LinearGaussian.random(6, 2)
    model, guide = oracle.pair()
    x = oracle.sample(2000).float()
    found = aggregate_posterior(model.float(), guide.float(), x)
    assert abs(found.marginal_kl.mean) < 0.05
    assert found.mutual_information.mean == pytest.approx(found.kl.mean, abs=0.05)
    monkeypatch.setattr("pyro_vae.latents.information._NUMBERS_AT_ONCE", 100_000)  # in many blocks
    torch.manual_seed(0)
    first = aggregate_posterior(model, guide, x[:300], num_samples=3)
    monkeypatch.undo()
    torch.manual_seed(0)
    assert first.kl.mean == pytest.approx(aggregate_posterior(model, guide, x[:300], num_samples=3).kl.mean)


def test_code_usage():
    _, guide = vq_vae(2, num_codes=4, code_dim=1, length=2, encoder=torch.nn.Identity())
    guide.codebook.vectors.copy_(torch.tensor([[0.0], [1.0], [5.0], [9.0]]))
    usage = code_usage(guide, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert usage.share == 0.5
    assert usage.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


# ------------------------------------------------------------------------------------ densities of codes


def test_fitted_densities():
    codes = torch.randn(5000, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2.0, 3.0])
    drawn = fitted_normal(codes).sample((20_000,))
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(drawn.T.cov(), codes.T.cov(), rtol=0.1, atol=0.05)
    drawn = fitted_box(codes).sample((20_000,))
    assert (drawn >= codes.amin(0)).all()
    assert (drawn <= codes.amax(0)).all()
    torch.testing.assert_close(drawn.std(0), (codes.amax(0) - codes.amin(0)) / 12**0.5, rtol=0.03, atol=0)
    apart = torch.cat([codes[:2000], codes[2000:] + 100])
    density = fitted_mixture(apart, components=2)
    assert (density.sample((5000,))[:, 0] > 50).double().mean().item() == pytest.approx(0.6, abs=0.03)
    assert density.log_prob(apart).mean() > fitted_normal(apart).log_prob(apart).mean() + 1
    assert fitted_normal(torch.randn(100, 1)).sample((4,)).shape == (4, 1)


# ------------------------------------------------------------------------------------ completeness


def test_nearest_distances():
    x, data = torch.randn(2500, 3), torch.randn(40, 3)
    expected = (x.unsqueeze(1) - data).norm(dim=-1).amin(1)
    torch.testing.assert_close(nearest_distances(x, data), expected, rtol=1e-3, atol=1e-3)


def test_completeness_counts_what_is_sure_and_close():
    def classify(x):
        return torch.stack([x[:, 0], 1 - x[:, 0]], 1)

    data = torch.tensor([[0.95, 0.0]])
    decoded = torch.tensor([[0.99, 0.0], [0.98, 9.0], [0.02, 0.0], [0.8, 0.0]])
    assert completeness(decoded, classify, data, limit=0.2) == (0.75, 0.5, 0.25)


# ------------------------------------------------------------------------------------ continuity


def test_paths():
    start, end = torch.randn(2, 6, 3)
    for path in (straight, spherical):
        z = along(path, start, end, 11)
        torch.testing.assert_close(z[0], start, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(z[-1], end, atol=1e-5, rtol=1e-4)
    unit = torch.nn.functional.normalize(start, dim=1), torch.nn.functional.normalize(end, dim=1)
    torch.testing.assert_close(along(spherical, *unit, 9).norm(dim=-1), torch.ones(9, 6))
    middle = along(straight, start, end, 3)[1]
    torch.testing.assert_close(middle, (start + end) / 2)
    assert along(spherical, start, 2 * start, 5).isfinite().all()
    assert along(spherical, start, -start, 5).isfinite().all()


def test_continuity_of_a_half_circle():
    def decode(z):
        return torch.cat([z.cos(), z.sin()], -1)

    def classify(x):  # right, top, left
        return torch.stack([x[:, 0] > 0.5, x[:, 0].abs() <= 0.5, x[:, 0] < -0.5], 1).double()

    start, end = torch.zeros(2, 1), torch.tensor([[math.pi], [2 * math.pi - 0.1]])
    assert continuity(decode, classify, start, start).path_length.isnan().all()
    found = continuity(decode, classify, start, end, num_steps=400)
    assert found.path_length[0].item() == pytest.approx(math.pi / 2, rel=1e-3)
    assert found.detours.tolist() == [1, 4]  # over the top; and back to the class it came from
    assert found.largest_step[0].item() == pytest.approx(1, rel=1e-2)

    def jump(z):
        return (z > 1).float() * torch.ones(2)

    found = continuity(jump, classify, torch.zeros(1, 1), torch.full((1, 1), 3.0), num_steps=51)
    assert found.path_length.item() == pytest.approx(1)
    assert found.largest_step.item() == pytest.approx(50)


def test_the_lipschitz_constant_of_a_linear_decoder():
    weight = torch.randn(7, 3)
    z, scale = torch.randn(100, 3), torch.tensor([1.0, 2.0, 0.5])
    found = lipschitz(lambda z: z @ weight.T, z)
    torch.testing.assert_close(found, torch.linalg.svdvals(weight)[0].expand(100))
    found = lipschitz(lambda z: (z / scale) @ weight.T, scale * z, scale)
    torch.testing.assert_close(found, torch.linalg.svdvals(weight)[0].expand(100))
    model, _ = vae(5, 3)
    assert lipschitz(lambda z: model.likelihood(z).mean, z).shape == (100,)


# ------------------------------------------------------------------------------------ representation


def test_probes():
    def exclusive_or(count):
        codes = torch.randn(count, 2)
        return 1000 * codes, ((codes[:, 0] > 0) ^ (codes[:, 1] > 0)).long()

    def halves(count):
        codes = torch.randn(count, 2)
        return codes, (codes.sum(1) > 0).long()

    found = probe_accuracy(*exclusive_or(2000), *exclusive_or(1000))
    assert found.linear == pytest.approx(0.5, abs=0.1)
    assert found.nearest_neighbours > 0.95
    assert found.std_error == pytest.approx(0.016, abs=0.001)
    assert probe_accuracy(*halves(2000), *halves(1000)).linear > 0.98
