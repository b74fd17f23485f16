import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.marginal_likelihood import EstimatesError, importance
from pyro_vae.mcmc import diagnostics
from pyro_vae.oracles import LinearGaussian, quadrature_log_prob
from pyro_vae.traces.blocks import rows_at_once


def estimate(*arguments, **settings):
    return pv.importance_sampling(*arguments, progress=False, **settings)


def test_exact_posterior_gives_log_p_x_for_every_datum(double):
    oracle = LinearGaussian.random(10, 4)
    x = oracle.sample(200)
    result = estimate(*oracle.pair(), x, num_samples=100)
    torch.testing.assert_close(result.values, oracle.log_prob(x), rtol=0, atol=1e-5)
    assert result.std_error.max() < 1e-5
    torch.testing.assert_close(result.ess, torch.full((200,), 100.0))
    assert (result.khat == 0).all()


def test_exact_posterior_in_float32():
    oracle = LinearGaussian.random(10, 4)
    x = oracle.sample(200)
    result = estimate(*oracle.pair(), x, num_samples=100)
    torch.testing.assert_close(result.values.float(), oracle.log_prob(x), rtol=0, atol=1e-5)


def test_another_guide_gives_it_within_the_reported_error(double):
    """With standard deviations widened by 1.5 the weights are bounded, so the errors can be trusted."""
    oracle = LinearGaussian.random(10, 3)
    x = oracle.sample(400)
    num_samples = 500
    result = estimate(*oracle.pair(widening=1.5), x, num_samples=num_samples)
    error = result.values - oracle.log_prob(x)
    z = error / result.std_error
    assert z.std().item() == pytest.approx(1, abs=0.12)
    # bias = -Var / 2 to first order (Nowozin 2018); its own Monte Carlo error is std / sqrt(400)
    variance = result.std_error.square().mean().item()
    assert error.mean().item() == pytest.approx(-variance / 2, abs=4 * math.sqrt(variance / 400))
    # E w^2 / E[w]^2 of each dimension in closed form: c^2 / sqrt(2 c^2 - 1)
    second_moment = (1.5**2 / math.sqrt(2 * 1.5**2 - 1)) ** 3
    assert variance == pytest.approx((second_moment - 1) / num_samples, rel=0.1)
    assert result.ess.mean().item() == pytest.approx(num_samples / second_moment, rel=0.05)
    assert result.unreliable_share == 0


def test_too_narrow_a_guide_is_flagged_and_too_low(double):
    """With standard deviations halved, weights have a tail with k = 1 - 1/4: nothing can be relied on."""
    oracle = LinearGaussian.random(5, 2)
    x = oracle.sample(300)
    result = estimate(*oracle.pair(widening=0.5), x, num_samples=1000)
    assert result.khat.median().item() == pytest.approx(0.75, abs=0.15)
    assert result.unreliable_share > 0.4
    assert (result.values < oracle.log_prob(x)).double().mean() > 0.6
    assert "too low" in result.summary()


def test_a_trained_nonlinear_model_agrees_with_quadrature(double):
    model, guide = pv.vae(6, 2, hidden=(10,))
    x = torch.rand(40, 6).round()
    svi = pv.SVI(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.02))
    for _ in range(300):
        svi.step(x)

    def joint(z):
        with torch.no_grad():
            return sum(pv.log_joint(model, {"z": z.unsqueeze(1).expand(-1, len(x), -1)}, x))

    exact = quadrature_log_prob(joint, 2, nodes=120, limit=7.0)
    result = estimate(model, guide, x, num_samples=4000)
    z = (result.values - exact) / result.std_error
    assert z.abs().max() < 5
    assert z.square().mean() < 2
    assert result.std_error.max() < 0.1


@pytest.mark.parametrize("num_samples", [1, 29, 30, 333, 20_000])
def test_blocks_do_not_matter(double, num_samples, monkeypatch):
    """The same weights, streamed in blocks or all at once, give the same results."""
    weights = torch.randn(num_samples, 3) * 2
    position = 0

    def scripted(model, guide, x, num_samples):
        nonlocal position
        drawn = weights[position : position + num_samples, : len(x)]
        position += num_samples
        return drawn

    monkeypatch.setattr(importance, "log_weights", scripted)
    monkeypatch.setattr(importance, "rows_at_once", lambda *_: 100)
    monkeypatch.setattr(importance, "_block_size", lambda *_: 3)
    oracle = LinearGaussian.random(2, 1)
    result = estimate(*oracle.pair(), oracle.sample(3), num_samples=num_samples)
    assert position == num_samples
    torch.testing.assert_close(result.values, weights.logsumexp(0) - math.log(num_samples))
    normalised = weights.softmax(0)
    ess = 1 / normalised.square().sum(0)
    torch.testing.assert_close(result.ess, ess)
    # delta method: the variance of the mean weight over its square
    w = (weights - weights.max()).exp()
    if num_samples == 1:
        assert result.std_error.isnan().all()
    else:
        relative = w.var(0, correction=0) / num_samples / w.mean(0) ** 2
        torch.testing.assert_close(result.std_error, relative.sqrt())
    if num_samples < 30:
        assert result.khat is None
        assert result.unreliable_share is None
    else:
        khat, smoothed = diagnostics.pareto_smooth(weights.T, num_samples)
        # ArviZ's lines round the tail differently
        np.testing.assert_allclose(result.khat, khat, atol=0.05)
        expected = smoothed.logsumexp(1) - math.log(num_samples)
        np.testing.assert_allclose(result.diagnostics["smoothed"], expected, atol=0.01)
    for size, bound in result.curve.items():
        torch.testing.assert_close(bound, weights[:size].logsumexp(0) - math.log(size))
    sizes = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
    assert list(result.curve) == [*(n for n in sizes if n < num_samples), num_samples]


def test_the_tail_is_as_long_as_vehtari_and_others_say():
    """A fifth of the weights, and from 225 on 3 times the root of their number."""
    lengths = {100: 20, 225: 45, 1000: 95, 10_000: 300}
    assert {number: diagnostics.tail_length(number) for number in lengths} == lengths


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_khat_of_weights_with_a_known_tail(double, k):
    """U^-k has a Pareto tail of shape k."""
    log_w = -k * torch.rand(100, 10_000).log()
    largest = log_w.topk(6 * diagnostics.tail_length(10_000), 1).values
    khat, smoothed = diagnostics.pareto_smooth(largest, 10_000)
    # Smoothing is on the scale of the weights, and leaves all but the tail as it is.
    tail = diagnostics.tail_length(10_000)
    torch.testing.assert_close(smoothed[:, tail + 1 :], largest[:, tail + 1 :])
    assert (smoothed[:, :tail] != largest[:, :tail]).double().mean() > 0.9
    assert khat.mean().item() == pytest.approx(k, abs=0.05)


def test_elbo_and_its_parts(double):
    oracle = LinearGaussian.random(6, 2)
    x = oracle.sample(50)
    model, guide = oracle.pair(widening=1.3)
    bound = pv.elbo(model, guide, x, num_samples=4000)
    torch.testing.assert_close(bound.elbo, oracle.elbo(x, 1.3), rtol=0, atol=0.1)
    torch.testing.assert_close(bound.elbo, bound.log_likelihood - bound.kl)
    kl = pv.elbo(*oracle.pair(), x, num_samples=4000).kl
    torch.testing.assert_close(kl, oracle.kl_to_prior(x), rtol=0, atol=0.15)


def test_errors_of_the_mean():
    values, errors = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.3, 0.4, 0.0])
    khat = torch.tensor([0.1, 0.9, 0.6])
    result = pv.LogMarginal(values, errors, "m", "lower", {}, {"khat": khat, "upper": values + khat})
    assert result.mean == pytest.approx(3)
    assert result.monte_carlo_error == pytest.approx(0.5 / 3)
    assert result.data_error == pytest.approx(math.sqrt(7 / 3))
    assert result.unreliable_share == pytest.approx(1 / 3)
    assert result.gap == pytest.approx(1.6 / 3)
    assert result.ess is None


def test_summary_says_what_was_measured(double):
    oracle = LinearGaussian.random(4, 2)
    x = oracle.sample(20)
    result = estimate(*oracle.pair(1.2), x, num_samples=200, data="toy test, binarization none")
    said = result.summary()
    for words in ("log p(x) = ", "(Monte Carlo)", "(20 data)", "200 samples", "lower bound"):
        assert words in said
    assert "k-hat above 0.7 for 0.0 %" in said
    assert "binarization none" in said
    few = estimate(*oracle.pair(), x, num_samples=2).summary()
    assert "not said" in few
    assert "k-hat needs 30" in few


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_cross_entropy_is_labelled_wherever_it_is(table, missing):
    family = pv.Bernoulli(cross_entropy=True)
    if table:
        family = pv.Columns([pv.DiagNormal(), family, pv.DiagNormal(), family])
    model, guide = pv.vae(4, 2, family=family, missing=missing)
    text = estimate(model, guide, torch.full((3, 4), 0.4), num_samples=30).summary()
    assert "not a log-likelihood" in text
    assert "log p(x) =" not in text


def test_save_and_load(tmp_path, double):
    oracle = LinearGaussian.random(4, 2)
    result = estimate(*oracle.pair(1.2), oracle.sample(7), num_samples=50)
    result.save(tmp_path / "r.json")
    loaded = pv.LogMarginal.load(tmp_path / "r.json")
    torch.testing.assert_close(loaded.values, result.values, rtol=0, atol=0)
    torch.testing.assert_close(loaded.khat, result.khat, rtol=0, atol=0)
    assert loaded.summary() == result.summary()
    torch.testing.assert_close(loaded.curve[10], result.curve[10], rtol=0, atol=0)
    broken = dataclasses.replace(result, diagnostics={"khat": torch.full((7,), math.inf)})
    broken.save(tmp_path / "r.json")
    assert (pv.LogMarginal.load(tmp_path / "r.json").khat == math.inf).all()
    assert "Infinity" not in (tmp_path / "r.json").read_text()
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["importance_sampling"]["settings"]["num_samples"] == 50
    pv.save_estimates({"a": result, "b": result}, tmp_path / "r.json")
    assert list(pv.load_estimates(tmp_path / "r.json")) == ["a", "b"]
    with pytest.raises(EstimatesError, match="holds a, b"):
        pv.LogMarginal.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"values": [1.0], "khat": null}')
    with pytest.raises(EstimatesError, match=r"make them again with scripts/estimate\.py"):
        pv.LogMarginal.load(tmp_path / "r.json")


def test_files_that_said_in_settings_what_a_result_is(tmp_path):
    """As version 0.1 wrote them: one of codes, one of a cross-entropy, one of simulated data."""
    columns = {"values": [-3.0], "std_error": [0.0], "bound": "lower", "diagnostics": {}, "curve": {}}
    known = {"effort": "", "data": "toy", "data_checksum": "a", "model_checksum": "m", "scores": "log p(x)"}
    entropy = "minus the cross-entropy of grey values (not a log-likelihood)"
    old = {
        "plain": ("importance_sampling", {"num_samples": 40}),
        "codes": ("importance_sampling", {"is_of_codes": True}),
        "grey": ("importance_sampling", {"scores": entropy}),
        "simulated": ("bidirectional", {"data_checksum": "simulated"}),
    }
    records = {
        name: columns | {"method": method, "settings": known | settings, "summary": []}
        for name, (method, settings) in old.items()
    }
    (tmp_path / "old.json").write_text(json.dumps(records))
    read = pv.load_estimates(tmp_path / "old.json")
    kinds = {n: (e.is_of_codes, not e.is_density, e.is_simulated) for n, e in read.items()}
    assert kinds == {name: (name == "codes", name == "grey", name == "simulated") for name in old}
    assert read["grey"].scores == entropy
    assert read["simulated"].data_checksum is None
    assert read["plain"].settings["num_samples"] == 40
    assert not {"scores", "is_of_codes"} & read["codes"].settings.keys()
    pv.save_estimates(read, tmp_path / "new.json")
    again = pv.load_estimates(tmp_path / "new.json")
    assert {n: (e.is_of_codes, not e.is_density, e.is_simulated) for n, e in again.items()} == kinds


def test_bits_per_dim():
    # A uniform density on [0, 1]^D has log p = 0: 8 bits a byte.
    assert pv.bits_per_dim(0.0, 10, 1 / 256) == pytest.approx(8)
    # A uniform distribution over bits has log p = -D log 2: one bit a bit.
    assert pv.bits_per_dim(-10 * math.log(2), 10, 1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "arguments", "settings", "message"),
    [
        (ValueError, (torch.zeros(0, 4),), {}, "no data"),
        (ValueError, (torch.zeros(3, 4), torch.zeros(2, 4)), {}, r"one length, not \[2, 3\]"),
        (ValueError, (torch.zeros(3, 4),), {"num_samples": 0}, "num_samples"),
        (TypeError, (torch.tensor(0.0),), {}, r"argument 0 of the programs is a .*, but must be a tensor"),
    ],
)
def test_impossible_requests_are_refused(error, arguments, settings, message):
    for estimator in (estimate, pv.elbo):
        with pytest.raises(error, match=message):
            estimator(*pv.vae(4, 2), *arguments, **settings)


def test_memory_stays_bounded():
    """2,000 images take (almost) no more memory than 256."""
    program = """
import resource, torch
from pyro_vae import importance_sampling, vae
model, guide = vae(784, 20, hidden=(20,))
x = torch.rand(2000, 784).round()
importance_sampling(model, guide, x[:256], num_samples=200, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
importance_sampling(model, guide, x, num_samples=200, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    said = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=300)
    # All weights at once would be 2000 x 200 decoded images, 1.2 GiB.
    assert float(said) < 100


def test_large_likelihoods_are_scored_in_fewer_rows():
    x = torch.randint(17, (5, 300)) / 16
    families = pv.GreyCategorical(17), pv.BetaBinomial(17)
    few, many = (rows_at_once(pv.vae(300, 2, family=family)[0], (x,)) for family in families)
    assert few == 2**22 // (300 * 17)
    assert many == 4096
