import pytest
import torch

from pyro_vae import MixtureOfNormals, active_units, elbo, inverse_autoregressive, kl_per_dim, vae
from pyro_vae.latents import posterior_mean
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


def test_a_prior_that_does_not_factorise_is_refused():
    model, guide = vae(5, 3, prior=MixtureOfNormals(3))
    with pytest.raises(ValueError, match="prior of 'z', MixtureSameFamily"):
        kl_per_dim(model, guide, torch.zeros(2, 5))


def test_a_posterior_with_correlations_is_refused():
    model, guide = LinearGaussian.random(5, 3).pair()
    with pytest.raises(ValueError, match="posterior of 'z', MultivariateNormal"):
        kl_per_dim(model, guide, torch.zeros(2, 5))


def test_other_sites_are_named():
    model, guide = vae(5, 3)
    with pytest.raises(ValueError, match=r"no site 'w', only \['z'\]"):
        active_units(guide, torch.zeros(2, 5), site="w")
    with pytest.raises(ValueError, match="site="):
        kl_per_dim(model, guide, torch.zeros(2, 5), site="w")


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
    many = torch.stack([guide.posterior(x).sample() for _ in range(20_000)])
    assert ((codes - many.mean(0)).abs() < 5 * many.std(0) / 500**0.5).all()
    assert active_units(guide, x).shape == (3,)
