"""Tasks against closed forms: conditionals of a normal, and sums over all completions of bits."""

import itertools
import math

import pytest
import torch
from torch import nn
from toys import importance_sampling, quadrature, sample_posterior

import pyro_vae as pv
from pyro_vae.latents import posterior_mean, spherical
from pyro_vae.oracles import LinearGaussian
from pyro_vae.tasks import Linear, Mask, degraded, pooling

SHAPE = (4, 2)
DIM = 8


@pytest.fixture
def oracle(double):
    return LinearGaussian.random(DIM, 2, scale=0.7)


MASK = torch.tensor([True] * 5 + [False] * 3)
MANY = {"num_chains": 32, "num_draws": 50, "num_warmup": 80, "num_leapfrog": 10, "progress": False}
FEW = {"num_draws": 8, "num_warmup": 30, "num_leapfrog": 2, "progress": False}
DEGRADATIONS = {
    "noise": lambda: Linear(None, 0.8),
    "blocks": lambda: Linear(pooling(SHAPE, 2), 0.3),
    "any": lambda: Linear(torch.randn(3, DIM), 0.3),
    "mask": Mask,
}


def matrix_and_noise(degradation):
    if isinstance(degradation, Mask):
        return torch.eye(DIM)[MASK], 0.0
    matrix = torch.eye(DIM) if degradation.matrix is None else degradation.matrix
    return matrix, degradation.noise_scale


def seen(oracle, degradation, x):
    """What is seen of x, and log p(y), E[x | y] and std[x | y] by the formulas for normals."""
    marginal = torch.distributions.MultivariateNormal
    matrix, noise = matrix_and_noise(degradation)
    y = x @ matrix.T + noise * torch.randn(len(x), len(matrix))
    covariance = oracle.marginal.covariance_matrix
    of_y = matrix @ covariance @ matrix.T + noise**2 * torch.eye(len(matrix))
    gain = covariance @ matrix.T @ torch.linalg.inv(of_y)
    mean = oracle.mean + (y - oracle.mean @ matrix.T) @ gain.T
    std = (covariance - gain @ matrix @ covariance).diagonal().clamp(min=0).sqrt()
    log_prob = marginal(oracle.mean @ matrix.T, of_y).log_prob(y)
    if isinstance(degradation, Mask):
        y = torch.where(MASK, x, math.nan)
    return y, log_prob, mean, std


@pytest.fixture(params=DEGRADATIONS)
def degradation(request, oracle):
    return DEGRADATIONS[request.param]()


def test_the_evidence_of_what_was_seen(degradation, oracle):
    y, exact, _, _ = seen(oracle, degradation, oracle.sample(6))
    pair = degraded(*oracle.pair(widening=1.5), degradation, y)
    found = quadrature(pair.model, *pair.batch).values
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-5)
    sampled = importance_sampling(pair.model, pair.guide, *pair.batch, num_samples=20_000)
    assert ((sampled.values - exact).abs() < 5 * sampled.std_error + 1e-3).all()


def test_restored_data_have_the_conditional_mean_and_spread(degradation, oracle):
    y, _, mean, std = seen(oracle, degradation, oracle.sample(4))
    model, guide = oracle.pair(widening=1.2)
    found = pv.restore(model, guide, degradation, y, **MANY)
    assert (found.rhat < 1.1).all()
    error = 0.1 * oracle.marginal.stddev  # of some thousand draws that depend on each other
    assert ((found.mean - mean).abs() < error).all()
    torch.testing.assert_close(found.std, std.expand(4, -1), rtol=0.08, atol=1e-6)
    assert found.samples.shape == (16, 4, DIM)
    assert ((found.samples.mean(0) - mean).abs() < 5 * error).all()


def test_log_missing_is_the_conditional_density(oracle):
    x = oracle.sample(8)
    covariance = oracle.marginal.covariance_matrix
    of_observed = torch.distributions.MultivariateNormal(oracle.mean[MASK], covariance[MASK][:, MASK])
    exact = oracle.log_prob(x) - of_observed.log_prob(x[:, MASK])
    for estimate in (None, importance_sampling):
        settings = {"estimate": estimate, "num_samples": 5000} if estimate else {"num_temperatures": 100}
        found = pv.log_missing(*oracle.pair(widening=1.2), x, MASK, progress=False, **settings)
        assert (found.std_error < 0.2).all()
        assert ((found.values - exact).abs() < 5 * found.std_error + 0.02).all()


def test_bits_against_the_sum_over_all_completions():
    """p(observed) and p(missing = 1 | observed), with two latents, by quadrature of every completion."""
    torch.manual_seed(3)
    model, guide = pv.vae(5, 2, hidden=(8,))
    with torch.no_grad():
        model.likelihood.net.layers[-1].weight.mul_(6)
    observed = torch.tensor([True, False, True, False, True])
    x = torch.tensor([[1.0, 0, 0, 1, 1], [0, 1, 1, 0, 1]])
    completions = []
    for bits in itertools.product([0.0, 1.0], repeat=2):
        full = x.clone()
        full[:, ~observed] = torch.tensor(bits)
        completions.append(full)
    joint = torch.stack([quadrature(model, full).values for full in completions])
    pair = degraded(model, guide, Mask(), torch.where(observed, x, math.nan))
    partial = quadrature(pair.model, *pair.batch).values
    torch.testing.assert_close(joint.logsumexp(0), partial, atol=1e-4, rtol=0)
    expected = (joint.softmax(0).unsqueeze(2) * torch.stack(completions)).sum(0).float()
    found = pv.inpaint(model, guide, x, observed, **MANY)
    assert torch.equal(found.mean[:, observed], x[:, observed])
    torch.testing.assert_close(found.mean, expected, atol=0.03, rtol=0)
    spread = (expected * (1 - expected)).sqrt()
    torch.testing.assert_close(found.std, spread, atol=0.03, rtol=0)
    assert spread[:, ~observed].min() > 0.1
    density = pv.log_missing(model, guide, x, observed, progress=False)
    truth = [
        next(j for j, f in zip(joint[:, n], completions, strict=True) if torch.equal(f[n], x[n]))
        for n in (0, 1)
    ]
    assert ((density.values - (torch.stack(truth) - partial)).abs() < 5 * density.std_error + 0.01).all()


def test_pooling_averages_blocks():
    image = torch.randn(3, 4, 6)
    matrix = pooling((4, 6), 2)
    expected = nn.functional.avg_pool2d(image.unsqueeze(1), 2).flatten(1)
    torch.testing.assert_close(image.flatten(1) @ matrix.T, expected)
    colours = torch.randn(2, 4, 4, 3)
    expected = nn.functional.avg_pool2d(colours.movedim(3, 1), 2).movedim(1, 3).flatten(1)
    torch.testing.assert_close(colours.flatten(1) @ pooling((4, 4, 3), 2).T, expected)
    for shape, factor in ((5, 4), 2), ((4, 4), 0):
        with pytest.raises(ValueError, match="do not fill images"):
            pooling(shape, factor)


def test_the_tasks_are_those_degradations(oracle):
    x = oracle.sample(3)
    pair = oracle.pair(widening=1.2)
    settings = {"num_draws": 8, "num_warmup": 5, "num_leapfrog": 2, "progress": False, "num_samples": 4}
    matrix = pooling(SHAPE, 2)
    coarse = x @ matrix.T
    for task, degradation, y in (
        (lambda: pv.inpaint(*pair, x, MASK, **settings), Mask(), torch.where(MASK, x, math.nan)),
        (lambda: pv.denoise(*pair, x, 0.5, **settings), Linear(None, 0.5), x),
        (lambda: pv.super_resolve(*pair, coarse, SHAPE, 2, **settings), Linear(matrix, 0.02), coarse),
    ):
        torch.manual_seed(1)
        first = task()
        torch.manual_seed(1)
        second = pv.restore(*pair, degradation, y, **settings)
        torch.testing.assert_close(first.samples, second.samples)


def test_a_guide_for_missing_numbers_sees_what_is_missing():
    model, guide = pv.vae(DIM, 2, family=pv.FixedScaleNormal(1.0), missing=True)
    y = torch.where(MASK, torch.randn(3, DIM), math.nan)
    pair = degraded(model, guide, Mask(), y)
    assert pair.batch[1].isnan().any()
    assert pv.restore(model, guide, Mask(), y, **FEW).mean.isfinite().all()


@pytest.mark.parametrize("family", [pv.DiscretizedLogistic(5), pv.GreyCategorical(5), pv.BetaBinomial(5)])
def test_grey_levels_are_restored(family):
    model, guide = pv.vae(DIM, 2, family=family)
    x = model.likelihood(torch.randn(3, 2)).sample()
    found = pv.inpaint(model, guide, x, MASK, **FEW)
    assert (found.std[:, MASK] == 0).all()
    assert (found.std[:, ~MASK] > 0).all()
    assert pv.denoise(model, guide, x, 0.1, **FEW).mean.isfinite().all()


def test_labels_go_along():
    model, guide = pv.vae(DIM, 2, family=pv.FixedScaleNormal(1.0), context_dim=3)
    x, c = torch.randn(4, DIM), torch.eye(3)[[0, 1, 2, 0]]
    found = pv.inpaint(model, guide, x, MASK, c, **FEW)
    assert found.mean.shape == (4, DIM)
    path = pv.interpolate(model, guide, x[:2], x[2:], c[:2], num_steps=3)
    assert path.shape == (3, 2, DIM)
    start = model.likelihood(torch.cat([posterior_mean(guide, x[:2], c[:2]), c[:2]], 1)).mean
    torch.testing.assert_close(path[0], start)


def test_posterior_draws_may_start_at_a_guide(oracle):
    x = oracle.sample(5)
    model, guide = oracle.pair(widening=1.3)
    draws = sample_posterior(
        model, x, guide=guide, num_chains=32, num_samples=50, num_warmup=80, num_leapfrog=5
    )
    exact = oracle.posterior(x)
    drawn = draws.latents["z"].flatten(0, 1)
    torch.testing.assert_close(drawn.mean(0), exact.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.var(0), exact.variance, atol=0.02, rtol=0.2)


# ------------------------------------------------------------------------------------ codes


def test_interpolate_and_mix(oracle):
    model, guide = oracle.pair()
    x = oracle.sample(6)
    path = pv.interpolate(model, guide, x[:3], x[3:], num_steps=5)
    codes = posterior_mean(guide, x)
    ends = model.likelihood(codes).mean
    torch.testing.assert_close(path[0], ends[:3])
    torch.testing.assert_close(path[-1], ends[3:])
    torch.testing.assert_close(path[2], (ends[:3] + ends[3:]) / 2)  # of a linear decoder
    arc = pv.interpolate(model, guide, x[:3], x[3:], num_steps=5, path=spherical)
    torch.testing.assert_close(arc[-1], ends[3:])
    weights = torch.tensor([[0.0, 1, 0, 0, 0, 0], [1, -1, 1, 0, 0, 0]])
    mixed = pv.mix(model, guide, x, weights)
    torch.testing.assert_close(mixed[0], ends[1])
    torch.testing.assert_close(mixed[1], model.likelihood(codes[0] - codes[1] + codes[2]).mean)


def test_anomaly_scores_rank_among_ordinary_data(oracle):
    model, guide = oracle.pair()
    ordinary = oracle.sample(400)
    x = torch.cat([oracle.mean.unsqueeze(0), oracle.sample(1), oracle.mean + 50 * torch.ones(1, DIM)])
    found = pv.anomaly_score(model, guide, x, reference=ordinary, num_samples=50, progress=False)
    torch.testing.assert_close(found.score, -oracle.log_prob(x))
    expected = (oracle.log_prob(ordinary) <= oracle.log_prob(x).unsqueeze(1)).double().mean(1)
    torch.testing.assert_close(found.rank, expected, atol=0.01, rtol=0)
    assert found.rank[2] == 0
    assert found.rank[0] == 1
    assert pv.anomaly_score(model, guide, x, num_samples=5, progress=False).rank.isnan().all()


# ------------------------------------------------------------------------------------ refusals


X, PAIR = torch.rand(3, DIM).round(), pv.vae(DIM, 2)
HALF = -torch.ones(1, DIM) / 2  # y is from -DIM / 2 to 0


@pytest.mark.parametrize(
    ("error", "words", "task"),
    [
        (ValueError, "flat", lambda: pv.inpaint(*pv.autoencoder(DIM, 2), X, MASK)),
        (
            ValueError,
            "discrete",
            lambda: pv.inpaint(*pv.vq_vae(DIM, num_codes=3, code_dim=2, length=2), X, MASK),
        ),
        (ValueError, "no rows", lambda: pv.inpaint(*PAIR, X[:0], MASK)),
        (pv.SupportError, "outside the support of Bernoulli", lambda: pv.inpaint(*PAIR, 16 * X + 3, MASK)),
        (pv.SupportError, "not finite", lambda: pv.denoise(*PAIR, X / 0, 0.1)),
        (
            pv.SupportError,
            "nan only where a Mask",
            lambda: pv.denoise(*PAIR, torch.full((2, DIM), math.nan), 0.1),
        ),
        (ValueError, "noise_scale must be positive", lambda: pv.denoise(*PAIR, X, 0.0)),
        (
            *(ValueError, "num_samples must be from 1"),
            lambda: pv.inpaint(*PAIR, X, MASK, num_samples=1000, num_chains=2, num_draws=4),
        ),
        (ValueError, "observed must be bool", lambda: pv.inpaint(*PAIR, X, MASK.float())),
        (ValueError, "observed must be bool", lambda: pv.log_missing(*PAIR, X, MASK[1:])),
        (
            *(pv.SupportError, f"{DIM + 1} numbers a row, and the degradation leaves {DIM}"),
            lambda: pv.denoise(*PAIR, torch.rand(3, DIM + 1), 0.1),
        ),
        (
            *(ValueError, f"data of {DIM + 1} numbers, and the model observes {DIM}"),
            lambda: pv.restore(*PAIR, Linear(torch.ones(2, DIM + 1), 0.1), torch.rand(3, 2)),
        ),
        (
            pv.SupportError,
            r"holds torch.float64, and .* torch.float32",
            lambda: pv.inpaint(*PAIR, X.double(), MASK),
        ),
        (
            *(ValueError, "one length"),
            lambda: pv.inpaint(*pv.vae(DIM, 2, context_dim=4), X, MASK, torch.rand(2, 4)),
        ),
        (ValueError, "such as a context", lambda: pv.inpaint(*PAIR, X, MASK, torch.rand(3, 4))),
        (pv.SupportError, "more than ten noise_scale", lambda: pv.denoise(*PAIR, 255 * X + 100, 0.5)),
        *(
            (
                *(pv.SupportError, "more than ten noise_scale"),
                lambda far=far: pv.restore(*PAIR, Linear(HALF, 0.1), torch.full((3, 1), far)),
            )
            for far in (-DIM / 2 - 1.1, 1.1)
        ),
        (ValueError, r"not \(7,\)", lambda: pv.super_resolve(*PAIR, X, (7,), 2)),
        (TypeError, "not a Bound", lambda: pv.log_missing(*PAIR, X, MASK, estimate=pv.elbo)),
        (ValueError, "as many ends as starts", lambda: pv.interpolate(*PAIR, X[:2], X)),
        (ValueError, "num_steps must be at least 2", lambda: pv.interpolate(*PAIR, X, X, num_steps=1)),
        (ValueError, "each of the 3 data", lambda: pv.mix(*PAIR, X, torch.ones(3))),
        (ValueError, "3 are not finite", lambda: pv.mix(*PAIR, X, torch.full((1, 3), math.nan))),
    ],
)
def test_what_cannot_be_restored_is_explained(error, words, task):
    with pytest.raises(error, match=words):
        task()
