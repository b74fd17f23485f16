import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toys import enumeration, fit, importance_sampling, parameters, train

import pyro_vae as pv
from pyro_vae.distributions import Conditional
from pyro_vae.marginal_likelihood import EstimatesError
from pyro_vae.oracles import LinearGaussian

NOISE = 0.5


class Regression(nn.Module):
    """y = x w + noise."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, y, x):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ self.weight, NOISE), obs=y)


class NoLatents(nn.Module):
    def forward(self, *batch):
        pass


def trained(pair, minibatch, num_steps, elbo=TraceMeanField_ELBO):
    svi = pv.SVI(*pair, torch.optim.Adam(pair[1].parameters(), lr=0.03), elbo())
    rows = train(svi, num_steps, minibatch)
    return torch.stack([row["elbo"] for row in rows[-num_steps // 4 :]]).mean().item()


def kl(mean, variance, exact):
    """Of an independent normal from a normal with full covariance."""
    q = torch.distributions.MultivariateNormal(mean, torch.diag(variance))
    return torch.distributions.kl_divergence(q, exact).item()


@pytest.mark.parametrize(("elbo", "batch_size"), [(Trace_ELBO, 10), (TraceMeanField_ELBO, 40)])
def test_bayesian_linear_regression(elbo, batch_size):
    """The optimum is known: the exact means, and the variances of each weight given the others."""
    torch.manual_seed(1)
    x = torch.randn(40, 3) @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0]])
    y = x @ torch.tensor([1.0, -0.5, 0.3]) + NOISE * torch.randn(40)
    precision = torch.eye(3) + x.T @ x / NOISE**2
    exact = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, x.T @ y / NOISE**2), precision_matrix=precision
    )
    evidence = torch.distributions.MultivariateNormal(torch.zeros(40), NOISE**2 * torch.eye(40) + x @ x.T)

    model, guide = pv.bayesian(Regression(3), NoLatents(), num_data=40, scale=0.1)

    def minibatch():
        index = torch.randperm(40)[:batch_size]
        return y[index], x[index]

    bound = trained((model, guide), minibatch, 3000, elbo)
    (q,) = guide.posterior().values()
    torch.testing.assert_close(q.mean, exact.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(q.variance, 1 / precision.diagonal(), rtol=0.15, atol=0)
    # It does differ from the marginal variance.
    assert (1 / precision.diagonal() / exact.variance).min() < 0.7
    best = evidence.log_prob(y).item() - kl(exact.mean, 1 / precision.diagonal(), exact)
    assert 40 * bound == pytest.approx(best, abs=0.5)


def test_a_linear_gaussian_model_whose_mean_is_random():
    """p(b) = N(0, I), x = W z + b + noise: joint and predictive distributions are normal."""
    torch.manual_seed(0)
    oracle = LinearGaussian.random(4, 2, scale=0.7)
    x = oracle.sample(30)
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(4)
    precision = torch.eye(4) + 30 * torch.linalg.inv(covariance)
    exact_mean = torch.linalg.solve(precision, torch.linalg.solve(covariance, x.sum(0)))
    # Given all z the covariance of b is s^2 / (N + s^2) I, which is that of the best q(b) q(z | x).
    variance = oracle.scale**2 / (30 + oracle.scale**2)

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, z):
            return z @ oracle.weight.T + self.bias

    ordinary, guide = oracle.pair()
    ordinary = pv.VAEModel(ordinary.prior, Conditional(Shift(), pv.FixedScaleNormal(oracle.scale)))
    pair = pv.bayesian(ordinary, guide, num_data=30, scale=0.1)
    trained(pair, lambda: (x,), 2000)
    (q,) = pair[1].posterior().values()
    torch.testing.assert_close(q.mean, exact_mean, atol=0.02, rtol=0)
    torch.testing.assert_close(q.variance, torch.full((4,), variance), rtol=0.15, atol=0)

    # The predictive probability under this q is normal, too.
    new = oracle.sample(5)
    spread = covariance + torch.diag(q.variance.detach())
    predictive = torch.distributions.MultivariateNormal(q.mean.detach(), spread)
    estimates = [importance_sampling(*pv.draw(*pair), new, num_samples=50) for _ in range(150)]
    mean = pv.average(estimates)
    error = (mean.values - predictive.log_prob(new)).abs()
    assert (error < 5 * mean.std_error).all()
    assert mean.std_error.max() < 0.1
    single = estimates[0].values - predictive.log_prob(new)
    assert single.abs().max() > 3 * error.max()


def test_errors_of_an_average_are_the_spread_of_the_probabilities():
    """Coins of random bias: the mean of p(x) is known, and the spread of averages is what they say."""

    class Coin(nn.Module):
        def __init__(self, logit):
            super().__init__()
            self.logit = torch.tensor(logit)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Bernoulli(logits=self.logit + 0 * z), obs=x)

    x = torch.tensor([1.0, 0.0])

    def one():
        logits = torch.randn(10).tolist()
        return pv.average([enumeration(Coin(logit), x) for logit in logits])

    averages = [one() for _ in range(40)]
    values = torch.stack([a.values for a in averages])
    stated = torch.stack([a.std_error for a in averages]).mean(0)
    torch.testing.assert_close(values.exp().mean(0), torch.tensor([0.5, 0.5]).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(values.std(0), stated, rtol=0.4, atol=0)
    assert averages[0].bound == "lower"
    assert "mean over 10 models" in averages[0].summary()


def test_averages_are_of_the_same_data_and_side():
    model, guide = pv.vae(4, 2)
    one = importance_sampling(model, guide, torch.ones(3, 4), num_samples=5)
    other = importance_sampling(model, guide, torch.zeros(3, 4), num_samples=5)
    with pytest.raises(EstimatesError, match="data checksum differ"):
        pv.average([one, other])
    with pytest.raises(EstimatesError, match="no estimates"):
        pv.average([])
    with pytest.raises(EstimatesError, match="bound nothing"):
        pv.average([dataclasses.replace(one, bound="upper")] * 2)
    torch.testing.assert_close(pv.average([one]).values, one.values)


def test_a_compiled_step_is_the_eager_one():
    results = []
    for mode in (False, "always"):
        pyro.set_rng_seed(0)
        model, guide = pv.bayesian(*pv.vae(8, 2, hidden=(7,)), num_data=100)
        optimizer = torch.optim.Adagrad(guide.parameters(), lr=0.05)
        svi = pv.SVI(model, guide, optimizer, TraceMeanField_ELBO(), compile=mode)
        elbos = [svi.step((torch.rand(20, 8) < 0.7).float())["elbo"].item() for _ in range(6)]
        results.append((elbos, parameters(guide)))
    assert svi._compiled.function.is_compiled
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_it_works_as_it_is_in_pyro():
    x = (torch.rand(50, 6) < 0.5).float()
    pairs = [pv.bayesian(*pv.vae(6, 2, hidden=(5,)), num_data=50) for _ in range(2)]
    for model, guide in pairs:
        before = [p.detach().clone() for p in guide.parameters()]
        svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        svi.step(x)
        svi.step(x)
        changed = [not torch.equal(old, new) for old, new in zip(before, guide.parameters(), strict=True)]
        assert all(changed)
    assert len(set(pyro.get_param_store())) == 2 * len(before)  # every parameter once
    predictive = pyro.infer.Predictive(model, guide=guide, num_samples=3)
    assert predictive(x)["theta.likelihood.net.layers.0.weight"].squeeze(1).shape == (3, 5, 2)


def test_draws_are_ordinary_pairs():
    ordinary = pv.vae(6, 2, hidden=(5,))
    model, guide = pv.bayesian(*ordinary, num_data=50, scale=0.3)
    x = (torch.rand(7, 6) < 0.5).float()
    drawn, of_latents = pv.draw(model, guide)
    assert type(drawn) is type(ordinary[0])
    assert pv.log_weights(drawn, of_latents, x, num_samples=3).shape == (3, 7)
    with pytest.raises(ValueError, match="draw an ordinary pair"):
        pv.log_weights(model, guide, x, num_samples=3)
    draws = torch.stack([pv.draw(model, guide)[0].likelihood.net.layers[2].bias.detach() for _ in range(500)])
    torch.testing.assert_close(draws.std(0), torch.full((6,), 0.3), rtol=0.15, atol=0)
    expected = ordinary[0].likelihood.net.layers[2].bias.detach()
    torch.testing.assert_close(draws.mean(0), expected, atol=0.06, rtol=0)


def test_the_posterior_of_weights_goes_to_arviz():
    _, guide = pv.bayesian(*pv.vae(6, 2, hidden=(5,)), num_data=50, scale=0.3)
    posterior = guide.to_arviz(200)["posterior"]
    values = posterior["likelihood.net.layers.0.weight"].values
    assert values.shape == (1, 200, 5, 2)
    assert values.std(1).mean() == pytest.approx(0.3, rel=0.1)


def test_fit_trains_and_saves_it():
    data = pv.from_array((torch.rand(200, 6) < 0.2).float().numpy())
    model, guide = pv.bayesian(*pv.vae(6, 2, hidden=(5,)), num_data=len(data.train))
    svi = pv.SVI(model, guide, torch.optim.Adam(guide.parameters(), lr=0.02), TraceMeanField_ELBO())
    history = fit(svi, pv.batches(data.train, 32), 40)
    assert history[-1]["train/elbo"] > history[0]["train/elbo"] + 0.5
    again = pv.bayesian(*pv.vae(6, 2, hidden=(5,)), num_data=len(data.train))
    again[1].load_state_dict(guide.state_dict())
    for a, b in zip(again[1].posterior().values(), guide.posterior().values(), strict=True):
        torch.testing.assert_close(a.mean, b.mean)


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "num_data must be at least 1", lambda: pv.bayesian(*pv.vae(6, 2), num_data=0)),
        (TypeError, "must be a module", lambda: pv.bayesian(lambda x: None, pv.vae(6, 2)[1], num_data=5)),
        (ValueError, "no parameters", lambda: pv.bayesian(NoLatents(), pv.vae(6, 2)[1], num_data=5)),
        (ValueError, "scale must lie between", lambda: pv.bayesian(*pv.vae(6, 2), num_data=5, scale=100.0)),
    ],
)
def test_arguments_are_checked(error, words, make):
    with pytest.raises(error, match=words):
        make()
