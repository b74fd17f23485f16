import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import distance_to_maximum_likelihood, fit, parameters, train

from pyro_vae import MLP, Checkpoint, FixedScaleNormal, WakeSleep, batches, from_array, log_joint, vae
from pyro_vae.oracles import LinearGaussian


def sgd(model, guide):
    return torch.optim.SGD(parameters(model, guide), lr=0.0)


def test_gradients_are_the_expected_ones():
    torch.manual_seed(0)
    oracle = LinearGaussian.random(4, 2, scale=0.7)
    model, guide = oracle.pair(widening=1.4)
    decoder, encoder = model.likelihood.net, guide.posterior.net
    with torch.no_grad():  # away from the optimum, where both gradients vanish
        encoder.weight.add_(0.2 * torch.randn_like(encoder.weight))
        encoder.bias.add_(0.3)
    x = oracle.sample(4)
    count = 400_000
    WakeSleep(model, guide, sgd(model, guide), compile=False).step(x.repeat(count // 4, 1))

    factor = guide.posterior.family.scale_tril
    w, b, a, c = (p.detach() for p in (decoder.weight, decoder.bias, encoder.weight, encoder.bias))
    covariance = factor @ factor.T
    mean = x @ a.T + c
    second = covariance + mean.T @ mean / 4
    wake = ((x - b).T @ mean / 4 - w @ second) / oracle.scale**2
    torch.testing.assert_close(-decoder.weight.grad / count, wake, atol=0.02, rtol=0)
    wake = (x.mean(0) - b - mean.mean(0) @ w.T) / oracle.scale**2
    torch.testing.assert_close(-decoder.bias.grad / count, wake, atol=0.02, rtol=0)

    # Of (x', z') from the model: E z' x'^T = W^T, E x' x'^T = W W^T + s^2 I + b b^T.
    squares = w @ w.T + oracle.scale**2 * torch.eye(4) + torch.outer(b, b)
    sleep = torch.linalg.solve(covariance, w.T - a @ squares - torch.outer(c, b))
    torch.testing.assert_close(-encoder.weight.grad / count, sleep, atol=0.05, rtol=0)
    assert sleep.abs().max() > 0.5
    assert wake.abs().max() > 0.1


def test_training_reaches_the_maximum_likelihood():
    torch.manual_seed(0)
    x = LinearGaussian.random(6, 2).sample(500)
    nets = {"encoder": MLP(6, 4, ()), "decoder": MLP(2, 6, ())}
    model, guide = vae(6, 2, family=FixedScaleNormal(0.5), **nets)
    algorithm = WakeSleep(model, guide, torch.optim.Adam(parameters(model, guide), lr=0.02))
    train(algorithm, 2500, lambda: (x,))
    gap, _ = distance_to_maximum_likelihood(model, x, latent_dim=2, scale=0.5)
    assert -1e-4 < gap < 0.1


def bits(logits):
    return dist.Bernoulli(logits=logits).to_event(1)


class Causes(nn.Module):
    """Bits z, and bits x that are linear in them on the scale of logits."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.tensor([-1.0, 0.5, 0.0]))
        self.effect = nn.Linear(3, 4)
        with torch.no_grad():
            self.effect.weight.normal_(std=2.0)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", bits(self.prior))
            pyro.sample("x", bits(self.effect(z)), obs=x)


class Table(nn.Module):
    """q(z_i = 1 | x) of every x by itself."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(16, 3))

    def forward(self, x):
        row = (x @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
        with pyro.plate("data", len(x)):
            pyro.sample("z", bits(self.logits[row]))


def test_asleep_the_guide_learns_posteriors_of_discrete_latents():
    torch.manual_seed(0)
    model, guide = Causes(), Table()
    algorithm = WakeSleep(model, guide, torch.optim.Adam(guide.parameters(), lr=0.05))
    for lr in (0.05, 0.005, 0.001):
        algorithm.optimizer.param_groups[0]["lr"] = lr
        for _ in range(300):
            algorithm.step(torch.zeros(2000, 4))
    every_x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    every_z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    joint = sum(log_joint(model, {"z": every_z[:, None].expand(8, 16, 3)}, every_x)).detach()
    exact = torch.einsum("zx,zi->xi", joint.softmax(0), every_z)
    error = (guide.logits.detach().sigmoid() - exact).abs()
    assert (error * joint.logsumexp(0).exp()[:, None]).sum(0).max() < 0.01  # a mean over p(x)
    assert (exact - 0.5).abs().max() > 0.4


def test_the_prior_on_weights_is_that_of_the_paper():
    model, guide = vae(6, 2, hidden=(5,))
    gradients = []
    for num_data in (None, 40):
        optimizer = sgd(model, guide)
        torch.manual_seed(0)
        WakeSleep(model, guide, optimizer, num_data=num_data, compile=False).step(torch.ones(10, 6))
        gradients.append([p.grad.clone() for p in parameters(model, guide)])
    names = [name for module in (model, guide) for name, _ in module.named_parameters()]
    for name, plain, with_prior, p in zip(names, *gradients, parameters(model, guide), strict=True):
        expected = 10 / 40 * p.detach() if name.endswith("weight") else torch.zeros_like(p)
        torch.testing.assert_close(with_prior - plain, expected)


def test_the_bound_reported_is_the_bound():
    oracle = LinearGaussian.random(5, 2)
    x = oracle.sample(100)
    model, guide = oracle.pair(widening=1.5)
    algorithm = WakeSleep(model, guide, sgd(model, guide), compile=False)
    metrics = algorithm.step(x.repeat(1000, 1))
    assert metrics["elbo"].item() == pytest.approx(oracle.elbo(x, 1.5).mean().item(), abs=0.02)


def test_a_compiled_step_is_the_eager_one():
    results = []
    for mode in (False, "always"):
        pyro.set_rng_seed(0)
        model, guide = vae(8, 2, hidden=(7,))
        optimizer = torch.optim.Adagrad(parameters(model, guide), lr=0.05)
        algorithm = WakeSleep(model, guide, optimizer, num_data=100, compile=mode)
        elbos = [algorithm.step((torch.rand(20, 8) < 0.7).float())["elbo"].item() for _ in range(6)]
        results.append((elbos, [p.detach() for p in model.parameters()]))
    assert algorithm._compiled.function.is_compiled
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_it_is_an_algorithm_that_fit_runs_and_resumes(tmp_path):
    data = from_array((torch.rand(60, 5) < 0.3).float().numpy())

    def run(folder, *epochs):
        for num_epochs in epochs:
            pyro.set_rng_seed(0)
            model, guide = vae(5, 2, hidden=(4,))
            algorithm = WakeSleep(model, guide, torch.optim.Adam(parameters(model, guide)))
            callbacks = [Checkpoint(folder, resume=True)]
            history = fit(algorithm, batches(data.train, 20), num_epochs, callbacks)
        return [(row["train/elbo"], row["train/sleep"]) for row in history]

    assert run(tmp_path / "a", 4) == run(tmp_path / "b", 2, 4)


def test_programs_that_do_not_fit_are_refused():
    model, _ = vae(5, 2)
    _, guide = vae(5, 3)
    with pytest.raises(ValueError, match="shape"):
        WakeSleep(model, guide, sgd(model, guide)).step(torch.ones(4, 5))
    with pytest.raises(TypeError, match=r"torch\.optim"):
        WakeSleep(model, guide, pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(TypeError, match="must be modules"):
        WakeSleep(lambda x: None, guide, sgd(model, guide))
