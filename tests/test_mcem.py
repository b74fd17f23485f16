import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import distance_to_maximum_likelihood, fit, parameters, train

from pyro_vae import MCEM, MLP, Checkpoint, FixedScaleNormal, NonFiniteError, batches, from_array, vae
from pyro_vae.oracles import LinearGaussian


def test_chains_draw_from_the_posterior_at_the_target_acceptance():
    torch.manual_seed(0)
    oracle = LinearGaussian.random(4, 2, scale=0.7)
    x = oracle.sample(3)
    model, _ = oracle.pair()
    copies = 2000
    mcem = MCEM(model, torch.optim.SGD(model.parameters(), lr=0.0), 3 * copies)
    data, index = x.repeat_interleave(copies, 0), torch.arange(3 * copies)
    metrics = [mcem.step(data, index) for _ in range(150)]
    acceptance = torch.stack([m["acceptance"] for m in metrics[100:]]).mean().item()
    assert acceptance == pytest.approx(0.9, abs=0.01)
    draws = mcem.chains["z"].unflatten(0, (3, copies))
    exact = oracle.posterior(x)
    torch.testing.assert_close(draws.mean(1), exact.mean, atol=0.05, rtol=0)
    for one in draws:
        torch.testing.assert_close(one.T.cov(), exact.covariance_matrix[0], atol=0.04, rtol=0)
    assert exact.mean.abs().max() > 0.5


def test_training_reaches_the_maximum_likelihood():
    torch.manual_seed(0)
    x = LinearGaussian.random(6, 2).sample(400)
    model, _ = vae(6, 2, family=FixedScaleNormal(0.5), decoder=MLP(2, 6, ()))
    mcem = MCEM(model, torch.optim.Adam(model.parameters(), lr=0.02), len(x))
    train(mcem, 400, lambda: (x, torch.arange(len(x))))
    gap, _ = distance_to_maximum_likelihood(model, x, latent_dim=2, scale=0.5)
    assert -1e-4 < gap < 0.05


def test_updates_are_gradients_at_the_new_draws():
    """On the way that an update of 5 steps by hand goes, with the prior on weights."""
    model, _ = vae(5, 2, hidden=(4,))
    x, index = torch.ones(6, 5), torch.tensor([7, 0, 3, 9, 1, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mcem = MCEM(model, optimizer, 10, weight_prior=True, num_updates=1, compile=False)
    mcem.step(x, index)
    assert mcem.chains["z"][[2, 4, 6, 8]].abs().max() == 0
    z = mcem.chains["z"][index]
    for old in before.values():
        old.requires_grad_()
    likelihood = torch.func.functional_call(model.likelihood, {k[11:]: v for k, v in before.items()}, (z,))
    objective = likelihood.log_prob(x).sum() - 6 / 10 * sum(
        old.square().sum() / 2 for name, old in before.items() if name.endswith("weight")
    )
    gradients = torch.autograd.grad(objective, list(before.values()))
    for parameter, old, gradient in zip(model.parameters(), before.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old.detach() + 1e-3 * gradient)


class Mixture(nn.Module):
    """A scale between 0 and 1, a discrete component that is summed out, and x."""

    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(2.0, 2.0))
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(self.locs[y], z).expand_by([]), obs=x)


def test_constrained_and_discrete_latents():
    torch.manual_seed(0)
    y = (torch.rand(300) < 0.5).float()
    x = 4 * y - 2 + 0.5 * torch.randn(300)
    model = Mixture()
    mcem = MCEM(model, torch.optim.Adam(model.parameters(), lr=0.05), 300, compile=False)
    for _ in range(60):
        metrics = mcem.step(x, torch.arange(300))
    torch.testing.assert_close(model.locs.detach(), torch.tensor([-2.0, 2.0]), atol=0.2, rtol=0)
    assert mcem.chains["z"].shape == (300,)
    assert 0.7 < metrics["acceptance"] <= 1


def test_a_compiled_iteration_is_the_eager_one():
    results = []
    for mode in (False, "always"):
        pyro.set_rng_seed(0)
        model, _ = vae(8, 2, hidden=(7,))
        mcem = MCEM(model, torch.optim.Adagrad(model.parameters(), lr=0.05), 40, compile=mode)
        x = (torch.rand(40, 8) < 0.7).float()
        metrics = [mcem.step(x[i : i + 20], torch.arange(i, i + 20)) for i in (0, 20, 0, 20, 0)]
        results.append(([m["log_joint"] for m in metrics], mcem.chains["z"], parameters(model)))
    assert mcem._graph.is_compiled
    assert mcem._updates._compiled.function.is_compiled
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_it_is_an_algorithm_that_fit_runs_and_resumes(tmp_path):
    data = from_array((torch.rand(60, 5) < 0.3).float().numpy()).train

    def run(folder, *epochs):
        for num_epochs in epochs:
            pyro.set_rng_seed(0)
            model, _ = vae(5, 2, hidden=(4,))
            mcem = MCEM(model, torch.optim.Adam(model.parameters()), len(data))
            minibatches = batches(data, 12, context=torch.arange(len(data)))
            callbacks = [Checkpoint(folder, resume=True)]
            history = fit(mcem, minibatches, num_epochs, callbacks)
        return [(row["train/log_joint"], row["train/acceptance"]) for row in history]

    assert run(tmp_path / "a", 4) == run(tmp_path / "b", 2, 4)


@pytest.mark.filterwarnings("ignore:.*NaN:UserWarning")
def test_what_becomes_nan_is_said():
    data = from_array((torch.rand(60, 5) < 0.3).float().numpy()).train
    model, _ = vae(5, 2, hidden=(4,))
    mcem = MCEM(model, torch.optim.SGD(model.parameters(), lr=math.inf), len(data))
    with pytest.raises(NonFiniteError, match=r"log_joint became nan at step 2 of epoch 1; try a smaller"):
        fit(mcem, batches(data, 12, context=torch.arange(len(data))), 2)


def em(**settings):
    model, _ = vae(5, 2)
    return MCEM(model, torch.optim.Adam(model.parameters()), 10, **settings)


@pytest.mark.parametrize(
    ("words", "take"),
    [
        ("one whole number each", lambda: em().step(torch.ones(4, 5), torch.arange(3))),
        ("one whole number each", lambda: em().step(torch.ones(4, 5), torch.rand(4))),
        ("one whole number each", lambda: em().step(torch.ones(4, 5))),
        ("from 0 to 10, but num_data=10", lambda: em().step(torch.ones(4, 5), torch.tensor([0, 1, 2, 10]))),
        ("num_updates must be at least 1", lambda: em(num_updates=0)),
        ("between 0 and 1", lambda: em(target_acceptance=1.0)),
        ("Bernoulli", lambda: em().step(torch.full((4, 5), 0.5), torch.arange(4))),
    ],
)
def test_positions_and_arguments_are_checked(words, take):
    with pytest.raises(ValueError, match=words):
        take()
