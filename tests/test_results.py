"""What is done with estimates: resumed, compared, ranked by ArviZ, judged."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from toys import ais, bidirectional, hmc, importance_sampling, quadrature, sample_posterior

from pyro_vae import LogMarginal, compare
from pyro_vae.marginal_likelihood import EstimatesError, average, best_estimate, table, verdict
from pyro_vae.mcmc.diagnostics import arviz
from pyro_vae.oracles import LinearGaussian
from pyro_vae.traces.blocks import ResumeError

pytestmark = pytest.mark.usefixtures("double")


def estimates(
    values,
    error=0.0,
    method="importance_sampling",
    bound="lower",
    data="same",
    simulated=False,
    **diagnostics,
):
    errors = torch.full_like(values, error)
    known = {"effort": "", "data": "toy", "data_checksum": data, "model_checksum": "m"}
    return LogMarginal(values, errors, method, bound, known, diagnostics, is_simulated=simulated)


# ------------------------------------------------------------------------------------ resuming


class InterruptionError(Exception):
    """Stands for Ctrl-C."""


TEMPERED = {"num_chains": 8, "num_temperatures": 5, "num_leapfrog": 1}
CHAINS = {"num_samples": 10, "num_warmup": 12, "num_leapfrog": 1}
RESUMABLE = {
    "importance_sampling": lambda model, guide, x, **kw: importance_sampling(
        model, guide, x, num_samples=40, **kw
    ),
    "ais": lambda model, guide, x, **kw: ais(model, x, guide=guide, **TEMPERED, **kw),
    "bidirectional": lambda model, _, x, **kw: bidirectional(model, x, **TEMPERED, **kw),
    "hmc": lambda model, _, x, **kw: hmc(model, x, **CHAINS, **kw),
    "quadrature": lambda model, _, x, **kw: quadrature(model, x, **kw),
    "sample_posterior": lambda model, _, x, **kw: sample_posterior(model, x, **CHAINS, **kw),
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_interrupted_work_goes_on_with_the_same_result(name, tmp_path, monkeypatch):
    """Interrupted again and again, in another process's state of the generators each time."""
    monkeypatch.setattr("pyro_vae.traces.blocks.rows_at_once", lambda *_: 256)
    monkeypatch.setattr("pyro_vae.marginal_likelihood.importance.rows_at_once", lambda *_: 256)
    oracle = LinearGaussian.random(4, 2)
    x, (model, guide) = oracle.sample(40), oracle.pair(widening=1.2)
    calls = left = 0
    forward = type(model).forward

    def counted(self, x):
        nonlocal calls, left
        calls, left = calls + 1, left - 1
        if left == 0:
            raise InterruptionError
        return forward(self, x)

    monkeypatch.setattr(type(model), "forward", counted)
    torch.manual_seed(1)
    whole = RESUMABLE[name](model, guide, x)
    needed, interruptions = calls, 0
    torch.manual_seed(1)
    while True:
        left = max(4, needed // 3)
        try:
            parts = RESUMABLE[name](model, guide, x, checkpoint=tmp_path / "unfinished")
            break
        except InterruptionError:
            interruptions += 1
            torch.manual_seed(interruptions + 100)
            # What was drawn before the first block was done is drawn anew.
            if not (tmp_path / "unfinished").exists():
                torch.manual_seed(1)
    left = 0
    assert interruptions >= 2
    for field in dataclasses.fields(whole):
        a, b = _tensors(getattr(whole, field.name)), _tensors(getattr(parts, field.name))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # Done already: nothing is computed but what describes the result.
    calls = 0
    RESUMABLE[name](model, guide, x, checkpoint=tmp_path / "unfinished")
    assert calls <= 2


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value.values() if isinstance(t, torch.Tensor)] if isinstance(value, dict) else []


def _function(program):
    return lambda x: program(x)


def test_unfinished_work_of_something_else_is_refused(tmp_path):
    oracle = LinearGaussian.random(4, 2)
    x, pair = oracle.sample(10), oracle.pair(1.2)
    path = tmp_path / "unfinished"
    importance_sampling(*pair, x, num_samples=30, checkpoint=path)
    other = LinearGaussian.random(4, 2).pair(1.2)
    for programs, data, count in ((other, x, 30), (pair, x + 1, 30), (pair, x, 40)):
        with pytest.raises(ResumeError, match="other data, weights or settings"):
            importance_sampling(*programs, data, num_samples=count, checkpoint=path)
    # Programs that are no modules are told apart by what they do.
    path.unlink()
    importance_sampling(*map(_function, pair), x, num_samples=30, checkpoint=path)
    with pytest.raises(ResumeError, match="other data, weights or settings"):
        importance_sampling(*map(_function, other), x, num_samples=30, checkpoint=path)
    path.unlink()
    ais(pair[0], x, num_temperatures=5, checkpoint=path)
    with pytest.raises(ResumeError, match="other data, weights or settings"):
        ais(pair[0], x, guide=pair[1], num_temperatures=5, checkpoint=path)
    path.write_bytes(b"something else")
    with pytest.raises(ResumeError, match="no file of unfinished estimates"):
        importance_sampling(*pair, x, num_samples=30, checkpoint=path)


# ------------------------------------------------------------------------------------ comparing


def test_paired_differences_vary_far_less_than_the_values():
    hard = 20 * torch.randn(500) - 90
    d = 0.3 + 0.5 * torch.randn(500)
    comparison = compare(
        {"a": estimates(hard, 0.1), "b": estimates(hard - d, 0.2), "c": estimates(hard - 5, 0.0)}
    )
    best, second, third = comparison.rows
    assert (best.name, second.name, third.name) == ("a", "b", "c")
    assert second.difference == pytest.approx(-d.mean().item())
    assert second.data_error == pytest.approx(d.std().item() / math.sqrt(500), rel=0.05)
    assert second.interval[0] == pytest.approx(second.difference - 1.96 * second.data_error, abs=0.01)
    assert second.monte_carlo_error == pytest.approx(math.hypot(0.1, 0.2) / math.sqrt(500))
    assert third.data_error == pytest.approx(0, abs=1e-12)
    row = ["b", f"{second.mean:.2f}", f"{second.difference:.2f}"]
    assert str(comparison).splitlines()[2].split()[:3] == row


@pytest.mark.parametrize(
    ("doubtful", "words", "of_other", "of_best"),
    [  # where the interval has no end, if it is the other's or the best's
        ({"khat": 0.9}, "too low, .*k-hat above 0.7 for 100.0 %", (0, 1), (1, 0)),
        ({"khat": 0.9, "bound": "upper"}, "too high, .*k-hat above 0.7", (1, 0), (0, 1)),
        ({"rhat": 1.2}, "too low or too high, .*R-hat above 1.01", (1, 1), (1, 1)),
        (
            {"converged": 0.0, "bound": "exact"},
            "too low or too high, .*not converged for 100.0 %",
            (1, 1),
            (1, 1),
        ),
        ({"ess": 1.0, "method": "ais"}, "too low, .*one chain has most", (0, 1), (1, 0)),
        ({"khat": 0.1, "ess": 50.0}, None, (0, 0), (0, 0)),
    ],
)
def test_a_ranking_carries_the_doubts_of_its_parts(doubtful, words, of_other, of_best):
    values = torch.randn(20)
    known = {key: doubtful[key] for key in ("bound", "method") if key in doubtful}
    columns = {key: torch.full_like(values, v) for key, v in doubtful.items() if key not in known}
    result = estimates(values, **known, **columns)
    result.settings["num_chains"] = 4
    for is_best, ends in (True, of_best), (False, of_other):
        shift = 1.0 if is_best else -1.0
        comparison = compare({"a": result, "b": estimates(values - shift, khat=values * 0)})
        assert [math.isinf(end) for end in comparison.rows[1].interval] == [bool(end) for end in ends]
        assert (words is None) == ("nobody knows by how much" not in str(comparison))
        if words:
            assert re.search(f"^a may be (?:{words})", str(comparison), re.MULTILINE)
    # An average of models is as doubtful as the worst of them.
    if result.bound != "upper":
        assert bool(average([result, result]).doubts) == (words is not None)


def test_estimates_of_one_model_are_known_to_be():
    oracle = LinearGaussian.random(4, 2)
    x, (model, guide) = oracle.sample(20), oracle.pair()
    other, _ = LinearGaussian.random(4, 2).pair()

    def found(one, proposal):
        return importance_sampling(one, proposal, x, num_samples=30)

    # Also of functions, which have no weights that could tell.
    results = {
        "A": found(_function(model), guide),
        "B": found(_function(model), oracle.pair(1.5)[1]),
        "C": found(_function(other), guide),
    }
    assert "A and B are estimates of one model" in str(compare(results))
    del results["B"]
    assert "one model" not in str(compare(results))


def test_what_cannot_be_compared():
    values = torch.randn(10)
    one = estimates(values)
    for words, results in (
        ("at least two", {"a": one}),
        ("data checksum differ", {"a": one, "b": estimates(values, data="others")}),
        ("simulated from a model", {name: estimates(values, simulated=True) for name in "ab"}),
        ("scores differ", {"a": one, "b": dataclasses.replace(one, is_density=False)}),
    ):
        with pytest.raises(EstimatesError, match=words):
            compare(results)
    assert "estimated in different ways" in str(compare({"a": one, "b": estimates(values - 1, method="ais")}))


def test_real_estimates_know_their_data():
    oracle = LinearGaussian.random(4, 2)
    x = oracle.sample(30)
    right = importance_sampling(*oracle.pair(), x, num_samples=50)
    wrong = importance_sampling(*LinearGaussian.random(4, 2).pair(), x, num_samples=50)
    assert [row.name for row in compare({"wrong": wrong, "right": right}).rows] == ["right", "wrong"]
    assert right.settings["model_checksum"] != wrong.settings["model_checksum"]


# ------------------------------------------------------------------------------------ ArviZ


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pandas, in ArviZ
@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 5.0, math.nan, math.inf])
def test_arviz_ranks_models_by_our_values(error):
    values = 5 * torch.randn(40) - 90
    good, bad = estimates(values, error), estimates(values - 1 + 0.1 * torch.randn(40), error)
    az = arviz()
    loo = az.loo(good.to_arviz(), pointwise=True)
    assert float(loo.elpd_loo) == pytest.approx(values.sum().item(), abs=0.1)
    np.testing.assert_allclose(loo.loo_i.values, values, atol=0.01)
    ranking = az.compare({"bad": bad.to_arviz(), "good": good.to_arviz()})
    assert list(ranking.index) == ["good", "bad"]


# ------------------------------------------------------------------------------------ verdicts


def test_the_verdict_says_what_to_rely_on():
    values = torch.linspace(-100, -90, 1000)
    khat = torch.zeros(1000)
    khat[:12] = 0.9
    sampled = estimates(values - 0.2, 0.3, khat=khat)
    annealed = estimates(values - 0.005, 0.1, method="ais")
    exact = estimates(values, 1e-5, method="quadrature", bound="exact", converged=torch.ones(1000))
    simulated = estimates(
        values, 0.1, method="bidirectional", simulated=True, upper=values + 0.3, upper_std_error=khat + 0.1
    )

    text = verdict({"importance_sampling": sampled})
    assert text.startswith("log p(x) = -95.20 ± 0.0095 (Monte Carlo) ± 0.091 (1,000 data)")
    assert "k-hat above 0.7 for 1.2 % of the data" in text
    assert "estimate with ais" in text

    everything = {"importance_sampling": sampled, "ais": annealed, "quadrature": exact}
    everything["bidirectional"] = simulated
    assert best_estimate(everything) is exact
    text = verdict(everything)
    assert text.startswith("log p(x) = -95.00 ")
    assert "by quadrature, exact" in text
    assert "importance sampling is 0.2 nats too low" in text
    assert "annealed importance sampling agrees (-0.005" in text
    assert "at most 0.3 ±" in text
    del everything["quadrature"]
    assert best_estimate(everything) is annealed
    unconverged = estimates(values, method="quadrature", bound="exact", converged=torch.zeros(1000))
    assert best_estimate({"ais": annealed, "quadrature": unconverged}) is annealed
    unknown = torch.full((1000,), 1e-5)
    unknown[0] = math.inf
    partly = dataclasses.replace(unconverged, std_error=unknown)
    text = verdict({"importance_sampling": sampled, "quadrature": partly})
    assert "quadrature is 0.2 nats higher (± 0.009) on the 999 data of which both know" in text
    text = verdict({"ais": annealed, "hmc": estimates(values, math.nan, method="hmc", bound="upper")})
    assert "Appendix D (hmc) does not know its error" in text
    assert verdict({"bidirectional": simulated}).startswith("on 1,000 data simulated from the model")

    # One chain says nothing about its error, and cannot be the best.
    alone = estimates(values + 1, math.nan, method="ais")
    assert best_estimate({"ais": alone, "importance_sampling": sampled}) is sampled
    with pytest.raises(EstimatesError, match="different data"):
        verdict({"importance_sampling": sampled, "ais": estimates(values, data="others")})
    with pytest.raises(ValueError, match="no estimates"):
        verdict({})

    lines = table({"importance_sampling": sampled, "bidirectional": simulated}).splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["method", "importance_sampling", "bidirectional", "-94.700"]
    assert "k-hat > 0.7: 1.2 %" in lines[1]
    assert "(simulated data)" in lines[2]
    assert "upper bound" in lines[3]
