import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae import MAP, SVI, BetaELBO, MixtureOfNormals, vae
from pyro_vae.objectives import loss_and_metrics
from pyro_vae.oracles import LinearGaussian

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
    num_data = len(x)
    exact = -oracle.log_prob(x).sum()  # the guide is the posterior: no Monte Carlo error
    weights = torch.cat([oracle.weight.flatten(), oracle.gain.flatten()])
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(weights).sum()
    objective = MAP(num_data)
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


def test_beta_must_not_be_negative():
    with pytest.raises(ValueError, match="beta"):
        BetaELBO(-0.1)


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO(), MAP(8), BetaELBO(0.5)])
def test_a_step_of_ours_is_a_step_of_pyros(objective):
    """The same noise and plain gradient descent give the same parameters as pyro.infer.SVI."""
    x = torch.rand(8, 4).round()
    updated = []
    for ours in (True, False):
        pyro.set_rng_seed(0)
        model, guide = vae(4, 2, hidden=(3,))
        if ours:
            parameters = [*model.parameters(), *guide.parameters()]
            svi = SVI(model, guide, torch.optim.SGD(parameters, lr=0.01), objective)
        else:
            svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), objective)
        svi.step(x)
        updated.append([*model.parameters(), *guide.parameters()])
    for first, second in zip(*updated, strict=True):
        torch.testing.assert_close(first, second)
