import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toys import parameters

from pyro_vae import (
    MAP,
    SVI,
    BetaELBO,
    Conditional,
    DiagNormal,
    FreeBitsELBO,
    ImportanceWeightedELBO,
    MixtureOfNormals,
    RenyiELBO,
    ReweightedWakeSleep,
    VAEGuide,
    kl_per_dim,
    log_joint,
    log_weights,
    vae,
)
from pyro_vae.objectives import loss_and_metrics
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces import kl_by_dimension

pytestmark = pytest.mark.usefixtures("double")
WIDENING = 1.3


@pytest.fixture
def oracle():
    return LinearGaussian.random(5, 2)


def many(elbo):
    return elbo(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_bound_has_its_closed_form(oracle, elbo):
    x = oracle.sample(6)
    loss, metrics = loss_and_metrics(many(elbo), *oracle.pair(WIDENING), x)
    exact = oracle.elbo(x, WIDENING)
    assert loss.item() == pytest.approx(-exact.sum().item(), abs=0.1)
    assert metrics["elbo"].item() == pytest.approx(exact.mean().item(), abs=0.02)
    assert not metrics["elbo"].requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_beta_weights_the_divergence_and_leaves_the_metric_alone(oracle, elbo, beta):
    x = oracle.sample(6)
    loss, metrics = loss_and_metrics(BetaELBO(beta, many(elbo)), *oracle.pair(), x)
    # With the posterior as guide the bound is log p(x) = E log p(x | z) - KL.
    exact = oracle.log_prob(x) + (1 - beta) * oracle.kl_to_prior(x)
    assert loss.item() == pytest.approx(-exact.sum().item(), abs=0.4)
    assert metrics["elbo"].item() == pytest.approx(oracle.log_prob(x).mean().item(), abs=0.02)


def test_beta_multiplies_scales_that_are_there(oracle):
    model, guide = oracle.pair()
    x = oracle.sample(6)
    scaled = [poutine.scale(program, scale=3.0) for program in (model, guide)]
    objective = BetaELBO(0.5)
    torch.manual_seed(0)
    plain = objective.differentiable_loss(model, guide, x)
    torch.manual_seed(0)
    torch.testing.assert_close(objective.differentiable_loss(*scaled, x), 3 * plain)


def test_map_adds_the_log_prior_of_the_weights_once_an_epoch(oracle):
    model, guide = oracle.pair()
    x = oracle.sample(10)
    exact = -oracle.log_prob(x).sum()  # the guide is the posterior: no Monte Carlo error
    weights = torch.cat([oracle.weight.flatten(), oracle.gain.flatten()])
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(weights).sum()
    objective = MAP(10)
    total = sum(objective.differentiable_loss(model, guide, part) for part in x.split(4))
    torch.testing.assert_close(total, exact - log_prior)
    _, metrics = loss_and_metrics(objective, model, guide, x)
    torch.testing.assert_close(metrics["log_weight_prior"], log_prior)
    torch.testing.assert_close(metrics["elbo"], oracle.log_prob(x).mean())


def test_map_leaves_biases_and_the_priors_parameters_alone():
    model, guide = vae(4, 2, prior=MixtureOfNormals(2, 3))
    x = torch.zeros(5, 4)

    def gradients(objective):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(0)
        objective.differentiable_loss(model, guide, x).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, penalised = gradients(Trace_ELBO()), gradients(MAP(50))
    for name, parameter in model.named_parameters():
        expected = 5 / 50 * parameter.detach() if name.endswith("weight") else torch.zeros_like(parameter)
        torch.testing.assert_close(penalised[name] - plain[name], expected)


def test_objectives_nest(oracle):
    model, guide = oracle.pair()
    x = oracle.sample(4)
    loss, metrics = loss_and_metrics(MAP(4, BetaELBO(0.5, many(Trace_ELBO))), model, guide, x)
    plain, _ = loss_and_metrics(MAP(4), model, guide, x)
    assert plain.item() - loss.item() == pytest.approx(0.5 * oracle.kl_to_prior(x).sum().item(), abs=0.3)
    assert set(metrics) == {"elbo", "log_weight_prior"}


def test_plain_pyro_svi_takes_them(oracle):
    model, guide = oracle.pair()
    x = oracle.sample(4)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), MAP(4, BetaELBO(0.5)))
    before = model.likelihood.net.weight.clone()
    loss = svi.step(x)
    assert isinstance(loss, float)
    assert isinstance(svi.evaluate_loss(x), float)
    assert not torch.equal(before, model.likelihood.net.weight)


@pytest.mark.parametrize(
    "objective",
    [
        *(Trace_ELBO(), TraceMeanField_ELBO(), MAP(8), BetaELBO(0.5), FreeBitsELBO(0.1)),
        *(ImportanceWeightedELBO(3, gradient) for gradient in ("plain", "stl", "dreg")),
        *(RenyiELBO(0.5, 3), ReweightedWakeSleep(3), MAP(8, ImportanceWeightedELBO(3))),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_step_of_ours_is_a_step_of_pyros(objective):
    """The same noise and plain gradient descent give the same parameters as pyro.infer.SVI."""
    x = torch.rand(8, 4).round()
    updated = []
    for ours in (True, False):
        pyro.set_rng_seed(0)
        model, guide = vae(4, 2, hidden=(3,))
        if ours:
            svi = SVI(model, guide, torch.optim.SGD(parameters(model, guide), lr=0.01), objective)
        else:
            svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), objective)
        svi.step(x)
        updated.append(parameters(model, guide))
    torch.testing.assert_close(*updated)


# ----------------------------------------------------------------------------------- several draws


def gradients(objective, model, guide, x):
    """By the decoder's and the encoder's bias."""
    for module in (model, guide):
        module.zero_grad()
    objective.differentiable_loss(model, guide, x).backward()
    return -model.likelihood.net.bias.grad, -guide.posterior.net.bias.grad


def shifted(oracle, shift, widening=1.0):
    """The oracle's pair with the guide's mean moved."""
    model, guide = oracle.pair(widening)
    with torch.no_grad():
        guide.posterior.net.bias += shift
    return model, guide


def gradient_of_log_marginal(oracle, x):
    mean = oracle.mean.clone().requires_grad_()
    covariance = oracle.marginal.covariance_matrix
    exact = dist.MultivariateNormal(mean, covariance).log_prob(x).sum()
    return torch.autograd.grad(exact, mean)[0]


@pytest.mark.parametrize(
    "objective",
    [
        *(ImportanceWeightedELBO(5, gradient) for gradient in ("plain", "stl", "dreg")),
        *(RenyiELBO(alpha, 5) for alpha in (-1.0, 0.0, 0.5, 1.0, 3.0)),
    ],
    ids=lambda objective: getattr(objective, "gradient", f"{getattr(objective, 'alpha', '')}"),
)
def test_with_the_posterior_as_guide_all_bounds_are_log_p(oracle, objective):
    x = oracle.sample(6)
    model, guide = oracle.pair()
    loss, metrics = loss_and_metrics(objective, model, guide, x)
    exact = oracle.log_prob(x)
    torch.testing.assert_close(loss, -exact.sum())
    for value in metrics.values():
        torch.testing.assert_close(value, exact.mean())


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_along_the_path_have_no_variance_at_the_posterior(oracle, gradient):
    x = oracle.sample(6)
    by_theta, by_phi = gradients(ImportanceWeightedELBO(5, gradient), *oracle.pair(), x)
    assert by_phi.abs().max() < 1e-9
    # Each draw gives d log p(x, z); their mean over the posterior is d log p(x).
    many_draws = ImportanceWeightedELBO(50_000, gradient)
    by_theta, _ = gradients(many_draws, *oracle.pair(), x)
    torch.testing.assert_close(by_theta, gradient_of_log_marginal(oracle, x), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_one_draw_along_the_path_is_the_gradient_of_the_elbo(oracle, gradient):
    # KL(q || p(z | x)) = d^T C^-1 d / 2 for a mean that is off by d, whatever is drawn.
    x = oracle.sample(6)
    shift = torch.tensor([0.3, -0.2])
    _, by_phi = gradients(ImportanceWeightedELBO(1, gradient), *shifted(oracle, shift), x)
    torch.testing.assert_close(by_phi, -len(x) * torch.linalg.solve(oracle.covariance, shift))


def mean_and_error(take, count):
    taken = torch.stack([take() for _ in range(count)])
    return taken.mean(0), taken.std(0) / count**0.5


def mean_gradient(oracle, gradient, num_particles, replicates=60_000):
    """By the encoder's bias of one datum, and its standard error, from many draws."""
    torch.manual_seed(1)
    model, guide = shifted(oracle, 0.7 * oracle.covariance.diagonal().sqrt(), widening=1.5)
    x = oracle.sample(1).expand(replicates // 30, -1)
    objective = ImportanceWeightedELBO(num_particles, gradient)
    return mean_and_error(lambda: gradients(objective, model, guide, x)[1] / len(x), 30)


def test_the_doubly_reparameterised_gradient_is_that_of_the_bound_and_stl_is_not(oracle):
    plain, error = mean_gradient(oracle, "plain", 4)
    dreg, error_of_dreg = mean_gradient(oracle, "dreg", 4)
    stl, error_of_stl = mean_gradient(oracle, "stl", 4)
    assert ((dreg - plain).abs() < 4 * (error**2 + error_of_dreg**2).sqrt()).all()
    assert (error_of_dreg < error).all()
    assert ((stl - plain).abs() > 10 * (error**2 + error_of_stl**2).sqrt()).any()
    assert plain.norm() > 20 * error.norm()


def test_the_signal_of_the_plain_gradient_fades_with_draws_and_that_of_dreg_grows(oracle):
    """As 1 / sqrt(K) and sqrt(K) where weights have a variance, as under a guide wider than p(z | x)."""
    replicates, draws = 4_000, (8, 128)
    x = oracle.sample(1)
    exact = oracle.posterior(x)

    class Guide(nn.Module):
        """A mean of its own for every replicate, so that one backward pass gives a gradient of each."""

        def __init__(self):
            super().__init__()
            shift = 0.5 * exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
            self.loc = nn.Parameter((exact.mean + shift).expand(replicates, -1).clone())

        def forward(self, x):
            with pyro.plate("data", len(x)):
                scale_tril = 1.5 * exact.scale_tril.squeeze(0)
                pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=scale_tril))

    model, _ = oracle.pair()
    guide = Guide()
    growth = {}
    for gradient in ("plain", "dreg"):
        ratios = []
        for num_particles in draws:
            objective = ImportanceWeightedELBO(num_particles, gradient)
            loss = objective.differentiable_loss(model, guide, x.expand(replicates, -1))
            (taken,) = torch.autograd.grad(loss, [guide.loc])
            ratios.append(taken.mean(0).norm() / taken.std(0).norm())
        growth[gradient] = math.log(ratios[1] / ratios[0], draws[1] / draws[0])
    assert growth["plain"] == pytest.approx(-0.5, abs=0.15)
    assert growth["dreg"] == pytest.approx(0.5, abs=0.15)


def test_the_path_is_followed_once_through_several_sites():
    """z2 depends on z1: the doubly reparameterised gradient is still that of the bound."""

    class Model(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                z2 = pyro.sample("z2", dist.Normal(z1, 0.7).to_event(1))
                pyro.sample("x", dist.Normal(z2.sin() + z1, 0.6).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-0.6, 0.1, 1.2]))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(self.loc[:1].expand(len(x), 1), 0.8).to_event(1))
                pyro.sample("z2", dist.Normal(self.loc[1] + self.loc[2] * z1, 0.9).to_event(1))

    model, guide, x = Model(), Guide(), torch.tensor([[0.8]]).expand(20_000, 1)

    def take(gradient):
        loss = ImportanceWeightedELBO(3, gradient).differentiable_loss(model, guide, x)
        return torch.autograd.grad(loss, guide.loc)[0] / len(x)

    plain, error = mean_and_error(lambda: take("plain"), 40)
    dreg, error_of_dreg = mean_and_error(lambda: take("dreg"), 40)
    assert ((dreg - plain).abs() < 4 * (error**2 + error_of_dreg**2).sqrt()).all()
    assert plain.abs().max() > 40 * error.max()


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 0.9, 2.0])
def test_the_renyi_bound_has_its_closed_form(oracle, alpha):
    widening = 1.1 if alpha > 0 else 0.9
    x = oracle.sample(6)
    _, metrics = loss_and_metrics(RenyiELBO(alpha, 100_000), *oracle.pair(widening), x)
    # p = N(m, C), q = N(m, c^2 C): log of the integral of p^(1 - a) q^a
    log_integral = 2 * (-alpha * math.log(widening) - math.log(1 - alpha + alpha / widening**2) / 2)
    exact = oracle.log_prob(x).mean() + log_integral / (1 - alpha)
    assert metrics["renyi"].item() == pytest.approx(exact.item(), abs=0.01)
    assert metrics["elbo"].item() == pytest.approx(oracle.elbo(x, widening).mean().item(), abs=0.01)


def test_renyi_bounds_join_the_elbo_and_the_importance_weighted_bound(oracle):
    x = oracle.sample(6)
    values = []
    for objective in RenyiELBO(0.0, 7), ImportanceWeightedELBO(7), RenyiELBO(1.0, 7), RenyiELBO(1 + 1e-9, 7):
        torch.manual_seed(0)
        values.append(objective.differentiable_loss(*oracle.pair(WIDENING), x))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2], values[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-8, -1e-8, -1e-4])
def test_the_renyi_bound_is_exact_around_one(oracle, distance):
    """Around the mean of log w it grows by half its variance for every unit of 1 - alpha."""
    model, guide = (program.float() for program in oracle.pair(WIDENING))
    x = oracle.sample(4).float()
    pyro.set_rng_seed(0)
    log_w = log_weights(model, guide, x, num_samples=50).double()
    expected = log_w.mean(0) + distance * log_w.var(0, correction=0) / 2
    pyro.set_rng_seed(0)
    loss, _ = loss_and_metrics(RenyiELBO(1 - distance, 50), model, guide, x)
    assert -loss.item() == pytest.approx(expected.sum().item(), abs=1e-3)


def test_the_importance_weighted_bound_rises_with_draws_from_the_elbo_to_log_p(oracle):
    x = oracle.sample(2000)
    bounds = []
    for num_particles in (1, 5, 5000):
        chunks = [
            loss_and_metrics(ImportanceWeightedELBO(num_particles), *oracle.pair(1.5), part)[1]["iwae"]
            for part in x.split(100)
        ]
        bounds.append(torch.stack(chunks).mean().item())
    assert bounds[0] == pytest.approx(oracle.elbo(x, 1.5).mean().item(), abs=0.05)
    assert bounds[0] + 0.1 < bounds[1] < bounds[2] - 0.01
    assert bounds[2] == pytest.approx(oracle.log_prob(x).mean().item(), abs=0.002)


def test_reweighted_wake_sleep_moves_the_model_up_and_the_guide_to_the_posterior(oracle):
    x = oracle.sample(6)
    shift = 0.5 * oracle.covariance.diagonal().sqrt()
    objective = ReweightedWakeSleep(200_000)
    by_theta, by_phi = gradients(objective, *shifted(oracle, shift), x)
    torch.testing.assert_close(by_theta, gradient_of_log_marginal(oracle, x), atol=0.1, rtol=0.02)
    # KL(p(z | x) || q) = d^T C^-1 d / 2 for a mean that is off by d.
    expected = -len(x) * torch.linalg.solve(oracle.covariance, shift)
    torch.testing.assert_close(by_phi, expected, atol=0.3, rtol=0.03)


class Coin(nn.Module):
    """y ~ Bernoulli, x | y normal."""

    def __init__(self):
        super().__init__()
        self.logit, self.loc = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor([-1.0, 1.5]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=self.logit))
            pyro.sample("x", dist.Normal(self.loc[y.long()].unsqueeze(-1), 1.0).to_event(1), obs=x)


class CoinGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=self.weight * x[:, 0]))


def test_reweighted_wake_sleep_takes_discrete_latents():
    model, guide, x = Coin(), CoinGuide(), torch.tensor([[0.7], [-2.0], [0.1]])
    ReweightedWakeSleep(200_000).differentiable_loss(model, guide, x).backward()
    found = [-p.grad for p in parameters(model, guide)]
    for module in (model, guide):
        module.zero_grad()
    joint = torch.stack([sum(log_joint(model, {"y": torch.full((1, 3), y)}, x))[0] for y in (0.0, 1.0)])
    joint.logsumexp(0).sum().backward()
    posterior = joint.detach().softmax(0)[1]
    log_q = dist.Bernoulli(logits=guide.weight * x[:, 0])
    expected = posterior * log_q.log_prob(torch.ones(3)) + (1 - posterior) * log_q.log_prob(torch.zeros(3))
    expected.sum().backward()
    for ours, parameter in zip(found, parameters(model, guide), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "objective",
    [ImportanceWeightedELBO(3), ImportanceWeightedELBO(3, "dreg"), RenyiELBO(), FreeBitsELBO()],
)
def test_draws_without_gradients_are_refused(objective):
    with pytest.raises(ValueError, match=r"guide's site 'y'.*ReweightedWakeSleep"):
        objective.differentiable_loss(Coin(), CoinGuide(), torch.zeros(3, 1))


def test_free_bits_cost_nothing_below_the_threshold(oracle):
    x = oracle.sample(8)
    model, _ = oracle.pair()
    encoder = nn.Linear(5, 4)
    with torch.no_grad():
        encoder.weight *= torch.tensor([1.0, 0.05, 1.0, 0.05]).unsqueeze(1)  # the second says little
    guide = VAEGuide(Conditional(encoder, DiagNormal()))
    kl = kl_per_dim(model, guide, x).mean(0)
    torch.manual_seed(0)
    plain, _ = loss_and_metrics(TraceMeanField_ELBO(), model, guide, x)
    threshold = kl.mean().item()  # between the two
    for free_nats in (0.0, threshold, 1e3):
        torch.manual_seed(0)
        loss, metrics = loss_and_metrics(FreeBitsELBO(free_nats), model, guide, x)
        expected = plain + len(x) * (kl.clamp(min=free_nats) - kl).sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics["elbo"], -plain.detach() / len(x))
    # Below the threshold only the likelihood moves the guide.
    for free_nats, moved in (0.0, True), (1e3, False):
        guide.zero_grad()
        torch.manual_seed(0)
        with_kl = FreeBitsELBO(free_nats).differentiable_loss(model, guide, x)
        torch.manual_seed(0)
        log_likelihood, _ = kl_by_dimension(model, guide, x)
        (with_kl + log_likelihood.sum()).backward()
        assert bool(encoder.weight.grad.abs().max() > 1e-3) == moved


def test_free_bits_of_dependent_dimensions_are_those_of_the_whole(oracle):
    x = oracle.sample(5000)
    kl = oracle.kl_to_prior(x).mean().item()
    loss, metrics = loss_and_metrics(FreeBitsELBO(2 * kl), *oracle.pair(), x)
    assert metrics["elbo"].item() == pytest.approx(oracle.log_prob(x).mean().item(), abs=1e-6)
    assert -loss.item() / len(x) == pytest.approx(oracle.log_prob(x).mean().item() - kl, abs=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaELBO(-0.1), "beta"),
        (lambda: BetaELBO(0.5, ImportanceWeightedELBO()), "ImportanceWeightedELBO has terms of its own"),
        (lambda: ImportanceWeightedELBO(5, "dregs"), "Did you mean 'dreg'"),
        (lambda: RenyiELBO(float("nan")), "alpha"),
        (lambda: FreeBitsELBO(-1.0), "free_nats"),
        (lambda: ImportanceWeightedELBO(0), "num_particles"),
        (lambda: MAP(0), "num_data"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
