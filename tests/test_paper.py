"""The reproduction of the paper: its commands at small budgets, and what they measure."""

import dataclasses
import functools
import importlib
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from pyro_vae.objectives import loss_and_metrics
from pyro_vae.oracles import LinearGaussian
from pyro_vae.training import load_checkpoint

FOLDER = ROOT / "scripts" / "paper"


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def reproduction(scripts):
    return scripts("reproduction")


@pytest.fixture
def common(reproduction, shared_data):
    return reproduction.Common(data_dir=shared_data, device="cpu")


def built(reproduction, common, *setting, **settings):
    """The data of a setting, and its algorithm."""
    setting = reproduction.Setting(*setting, 10, **settings)
    dataset = reproduction.load(setting, common)
    return dataset, reproduction.build(setting, common, dataset, 0.01)


def command(script, cwd, *arguments):
    places = ("--runs", cwd / "runs", "--out", cwd / "results")
    return [sys.executable, str(FOLDER / f"{script}.py"), *map(str, (*places, *arguments))]


def run(script, cwd, *arguments, check=True):
    done = subprocess.run(command(script, cwd, *arguments), capture_output=True, text=True, timeout=500)
    if check:
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
    return done


@pytest.fixture(autouse=True)
def _data(monkeypatch, shared_data):
    monkeypatch.setenv("PYRO_VAE_DATA", str(shared_data))


def curve(cwd, figure, name):
    return json.loads((cwd / "results" / "paper" / figure / f"{name}.json").read_text())


FREY_FACE = ("--data", "frey_face", "--latent-dim", 2)


@pytest.mark.slow
def test_figure2_goes_on_where_it_was(tmp_path):
    small = (*FREY_FACE, "--algorithm", "aevb", "--step-size", 0.02)
    name = "frey_face,z2,aevb,step_size=0.02"
    run("figure2", tmp_path, *small, "--budget", 5e4)
    first = curve(tmp_path, "figure2", name)["curve"]
    run("figure2", tmp_path, *small, "--budget", 1.5e5)
    second = curve(tmp_path, "figure2", name)["curve"]
    assert [row[0] for row in second] == [50_000, 100_000, 150_000]
    assert second[0] == first[0]
    # One training: Adagrad has summed over 100 steps of warm-up and three times 500 more.
    checkpoint = load_checkpoint(tmp_path / "runs" / "figure2" / name / "0.02" / "checkpoint.pt")
    assert checkpoint["algorithm"]["optimizer"]["state"][0]["step"] == 1600


@pytest.mark.slow
def test_figure2_is_drawn_and_reported(tmp_path):
    run("figure2", tmp_path, *FREY_FACE, "--budget", 1e5, "--jobs", 2)
    record = curve(tmp_path, "figure2", "frey_face,z2,aevb")
    assert set(record["chosen_by"]) == {"0.01", "0.02", "0.1"}
    assert record["step_size"] == float(max(record["chosen_by"], key=record["chosen_by"].get))
    assert str(tmp_path) not in json.dumps(record)  # no places
    assert "--budget 100000.0 --jobs 2" in record["made_by"]["command"]
    assert record["curve"][-1][2] > 500  # the paper's curve is there after 1e6 samples
    # Wake-sleep ignores z, as in the paper: 577 and 568 nats.
    other = curve(tmp_path, "figure2", "frey_face,z2,wake_sleep")
    assert other["curve"][-1][2] == pytest.approx(568, abs=10)
    assert (tmp_path / "results" / "figures" / "paper_figure2_frey_face.png").exists()

    subprocess.run([sys.executable, FOLDER / "report.py", "--out", tmp_path / "results"], check=True)
    report = (tmp_path / "results" / "paper.md").read_text()
    assert "| 2 | wake-sleep | test | 5" in report
    assert "| 3 | AEVB | test | — (paper -152.9)" in report
    assert "figures/paper_figure2_frey_face.png" in report
    assert "missing: run full_vb.py" in report

    run("figure4", tmp_path, "--data", "frey_face", "--budget", 1e5)  # nothing is left to train
    assert "figure2.py" in curve(tmp_path, "figure2", "frey_face,z2,aevb")["made_by"]["command"]
    assert (tmp_path / "results" / "figures" / "paper_figure4_frey_face.png").exists()


@pytest.mark.slow
def test_jobs_end_when_they_are_interrupted(tmp_path):
    small = (*FREY_FACE, "--budget", 1e8, "--jobs", 2, "--step-size", 0.02)
    process = subprocess.Popen(command("figure2", tmp_path, *small), stderr=subprocess.PIPE, text=True)
    names = ("frey_face,z2,aevb,step_size=0.02", "frey_face,z2,wake_sleep,step_size=0.02")
    checkpoints = [tmp_path / "runs/figure2" / name / "0.02/checkpoint.pt" for name in names]
    deadline = time.time() + 120
    while not all(path.exists() for path in checkpoints):
        assert time.time() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "Warning" not in said
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    assert not any(line.split()[0] == str(process.pid) for line in found.splitlines()[1:])
    for path in checkpoints:
        assert "epoch" in torch.load(path, weights_only=True)  # whole


def test_names_that_the_paper_does_not_have(tmp_path):
    done = run("figure2", tmp_path, "--data", "digits", check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: the paper has no data 'digits', only mnist, frey_face"
    done = run("figure3", tmp_path, "--algorithm", "em", check=False)
    assert "no algorithm 'em'" in done.stderr
    done = run("figure5", tmp_path, "--budget", 10, check=False)
    assert done.returncode != 0
    assert "at least 50,000 samples, not 10" in done.stderr


@pytest.mark.slow
def test_figure3_by_monte_carlo_em(tmp_path):
    small = ("--num-train", 300, "--algorithm", "mcem", "--estimated", 8, "--exact", 2)
    run("figure3", tmp_path, *small, "--budget", 5e4)
    record_name = "mnist,z3,mcem,num_train=300,step_size=0.1,warmup=0,batch_size=300"
    record = curve(tmp_path, "figure3", record_name)
    (row,) = record["curve"]
    values = dict(zip(record["columns"], row, strict=True))
    assert values["samples"] == 49_500
    assert -215 < values["test_exact"] < -130  # pixel means alone score -206
    for split in ("train", "test"):
        assert values[f"{split}_hmc_of_exact"] == pytest.approx(values[f"{split}_exact"], abs=0.3)
    small = (*small[:-3], 9, *small[-2:])  # of one more, of which nothing is kept
    run("figure3", tmp_path, *small, "--budget", 6e4)
    done = run("figure3", tmp_path, *small, "--budget", 5e4, check=False)
    assert done.returncode == 1
    assert "trained with 58,500 samples already, and what it was after 49,500 is not there" in done.stderr
    assert curve(tmp_path, "figure3", record_name)["curve"][-1][0] == 58_500


@pytest.mark.slow
def test_full_vb_beside_point_estimates(tmp_path):
    small = ("--num-train", 300, "--seeds", 0, "--estimated", 5, "--draws", 2, "--num-temperatures", 10)
    done = run("full_vb", tmp_path, *small, "--budget", 5e4)
    assert "| full variational Bayes | 0.1 | 1 | -" in done.stdout
    record = curve(tmp_path, "full_vb", "mnist,z3,full_vb,num_train=300,step_size=0.1")
    values = dict(zip(record["columns"], record["curve"][0], strict=True))
    assert values["bound"] < values["train_elbo"]  # it pays for the weights
    assert values["train_elbo"] < values["train_log_p"] + 0.5
    assert (tmp_path / "results" / "figures" / "paper_full_vb.png").exists()


@pytest.mark.slow
def test_gradients_on_the_command_line(tmp_path):
    small = ("--budget", 1e5, "--repetitions", 5, "--num-samples", 1, 2, "--latent-dim", 2)
    done = run("gradients", tmp_path, *small)
    assert "| 100,000 | B: and KL in closed form |" in done.stdout
    rows = curve(tmp_path, "", "gradients")["rows"]
    assert {row["samples"] for row in rows} == {0, 50_000, 100_000}
    run("gradients", tmp_path, *small)  # what was trained is measured as it was at each stage
    assert curve(tmp_path, "", "gradients")["rows"] == rows


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", ["score", "baseline", "A", "B"])
def test_gradient_estimators_have_the_same_mean(scripts, name):
    """That of the bound, known for a linear-Gaussian model."""
    gradients = scripts("gradients")
    torch.manual_seed(0)
    oracle = LinearGaussian.random(3, 1, scale=1.0)
    model, guide = oracle.pair(widening=1.3)
    encoder = guide.posterior.net
    with torch.no_grad():
        encoder.bias.add_(0.4)
    x = oracle.sample(4)
    # Minus the gradient of KL(q || p(z | x)) = (m - m*)^2 / 2 v + ..., with m = a x + c, by a and by c.
    shift = (oracle.posterior(x).mean - encoder(x)).detach() / oracle.covariance
    expected = torch.cat([(shift.T @ x).flatten(), shift.sum(0)]) / 4
    # Of the mean over 4 data, each repeated: only then are the data of a baseline many.
    data = x.repeat(500, 1)
    draws = torch.stack([gradients.gradient(name, model, guide, 20, data) for _ in range(10)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-4).all()
    assert (error < 0.1 * expected.abs().max()).all()


def test_moments(scripts):
    def moments(gradients):
        found = scripts("gradients").measured(0, "A", 1, gradients)
        return found["variance"], found["squared_mean"]

    torch.manual_seed(0)
    values = torch.tensor([3.0, 4.0]) + torch.tensor([1.0, 2.0]) * torch.randn(20_000, 2)
    variance, length = moments(values)
    assert variance == pytest.approx(5, rel=0.05)
    assert length == pytest.approx(25, rel=0.02)
    lengths = [moments(part)[1] for part in (0.0 * values + torch.randn(20_000, 2)).split(4)]
    assert sum(lengths) / len(lengths) == pytest.approx(0, abs=0.05)  # unbiased


def test_values_between_points_and_verdicts(scripts):
    value_at, cell = scripts("curves").value_at, scripts("report").cell
    points = [(1e5, -200.0), (1e6, -150.0), (1e7, -140.0)]
    assert value_at(points, 1e6) == pytest.approx(-150)
    assert value_at(points, 10**6.5) == pytest.approx(-145)
    assert value_at(points, 2e7) is None
    assert value_at(points[:1], 99_500) == -200  # an epoch may end beside it
    assert cell(-150.0, -150.9, 1.0) == "-150.0 (+0.9) ✓"
    assert cell(-150.0, -151.1, 1.0) == "-150.0 (+1.1) ✗"
    assert cell(-150.0, -151.1, None) == "-150.0 (+1.1)"
    assert cell(None, -151.1, 1.0) == "— (paper -151.1)"
    assert cell(-150.0, None, 1.0) == "-150.0"
    assert cell(None, None, 1.0) == ""


def test_reports_judge_what_is_there(scripts, reproduction, tmp_path):
    """The paper's own curves pass; moved by more than the band, they do not."""
    curves, report, published = map(scripts, ("curves", "report", "published"))
    common = reproduction.Common(out=tmp_path)
    for shift, verdict in ((0.5, "✓"), (-1.5, "✗")):
        for algorithm in ("aevb", "wake_sleep"):
            setting = reproduction.Setting("mnist", 5, algorithm, 500)
            theirs = [published.figure2("mnist", 5, algorithm, split) for split in ("train", "test")]
            rows = [[x, train + shift, test + shift] for (x, train), (_, test) in zip(*theirs, strict=True)]
            path, columns = curves.file_of(setting, common, "figure2"), ["samples", "train", "test"]
            curves.save(path, setting, step_size=0.02, seconds=1, columns=columns, curve=rows)
        page = "\n".join(report.of_figure2(common))
        line = next(line for line in page.splitlines() if line.startswith("| 5 | AEVB | test"))
        assert line.count(verdict) == 8
        assert "AEVB is above wake-sleep everywhere ✓" in page
        assert "at least 2.2 nats (5 latents, 2e8 samples)" in page


def test_reports_of_figure3(scripts, reproduction, tmp_path):
    """The paper's own values at 6e7 samples have its findings; a variation is beside what it varies."""
    curves, report, published, figure3 = map(scripts, ("curves", "report", "published", "figure3"))
    common = reproduction.Common(out=tmp_path)
    plain, mcem = (figure3.setting(1000, algorithm) for algorithm in ("aevb", "mcem"))
    columns = ["samples", *(f"{split}_{name}" for split in ("train", "test") for name in figure3.COLUMNS)]
    rest = {"step_size": 0.1, "seconds": 1, "estimated": 1000, "exact": 100, "columns": columns}
    varied = dataclasses.replace(plain, weight_prior="none")
    for setting, shift in (plain, 0.0), (mcem, 0.0), (varied, 1.5):
        of = functools.partial(published.figure3, 1000, setting.algorithm)
        train, test = (of(split)[-1][1] + shift for split in ("train", "test"))
        row = [6e7, train, 0, -100.0, -100.5, test, 2, -120.0, -120.0]
        curves.save(curves.file_of(setting, common, "figure3"), setting, curve=[row], **rest)
    page = "\n".join(report.of_figure3(common))
    assert "meet on train: ✓ (AEVB -109.1, MCEM -109.2 after 6e7 samples)" in page
    assert "by 1 to 2 nats: ✓ (AEVB -143.2, MCEM -141.6" in page
    assert "MCEM is far behind: missing" in page
    assert (
        "| weight_prior none | 1,000 | AEVB | 0.1 | 6e7 "
        "| -107.6 (+1.5) | -141.7 (+1.5) | -109.1 (+0.0) | -143.2 (+0.0) |"
    ) in page
    assert "Of 4,000 estimates 4 are above 0" in page
    assert page.count("| -100.000 | -100.500 | +0.500 |") == 2  # not of the variation


@pytest.mark.parametrize("data", ["mnist", "frey_face"])
def test_what_starts_at_zero(reproduction, common, data):
    _, algorithm = built(reproduction, common, data, 2, "aevb", init="authors")
    output, code = algorithm.model.likelihood.net.layers[-1], algorithm.guide.posterior.net.layers[-1]
    assert not output.bias.any()
    assert code.bias[:2].all()
    assert code.weight[:2].all()
    assert not code.bias[2:].any()
    assert not code.weight[2:].any()
    assert output.weight.all()


def test_dreams_are_clipped(reproduction, common):
    """The guide gives a dream the code of what is left of it within [0, 1]; data have theirs."""
    clipped = {"levels": 256, "clip_dreams": True}
    dataset, algorithm = built(reproduction, common, "frey_face", 2, "wake_sleep", **clipped)
    assert dataset.train.x.max() == dataset.train.stored.max() / 256
    net = algorithm.guide.posterior.net
    dream = 2 * dataset.train.x[:5] - 0.5
    torch.testing.assert_close(net(dream), net.layers(dream.clamp(0, 1)))
    assert not torch.allclose(net(dream), net.layers(dream))


def test_impossible_estimates_are_left_out(scripts):
    sampled, exact = torch.tensor([-100.0, 7616.0, -111.0]), torch.tensor([-101.0, -106.0])
    assert scripts("figure3").means(sampled, exact) == [-105.5, 1, -100, -103.5]


def test_step_sizes_are_chosen_before_anything_is_estimated(scripts, reproduction):
    figure3 = scripts("figure3")
    for num_train, expected in ((1000, 1), (50_000, 20)):
        for algorithm in ("aevb", "wake_sleep"):
            setting = figure3.setting(num_train, algorithm)
            assert reproduction.selection_epochs(setting, num_train) == expected
            assert expected <= reproduction.epochs_at(setting, figure3.SAMPLES)[0]


def test_monte_carlo_em_takes_every_datum_once(scripts, reproduction, common):
    figure3 = scripts("figure3")
    assert figure3.setting(300, "mcem").epoch == (300, 4500)
    for batch_size, number in ((300, 1), (100, 3)):
        setting = figure3.setting(300, "mcem", batch_size=batch_size)
        drawn = list(reproduction.minibatches(setting, reproduction.load(setting, common)))
        assert len(drawn) == number
        assert torch.cat([positions for _, positions in drawn]).unique().tolist() == list(range(300))


def test_weight_priors(reproduction, common):
    """Log p(w) counts len(minibatch) / num_data times in the objective of a minibatch."""
    objectives = {}
    for prior in ("data", "minibatch", "none"):
        dataset, algorithm = built(reproduction, common, "frey_face", 2, "aevb", weight_prior=prior)
        pair, x = (algorithm.model, algorithm.guide), dataset.train.x[:100]
        torch.manual_seed(0)
        objectives[prior], metrics = loss_and_metrics(algorithm.loss, *pair, x)
        if prior != "none":
            log_prior = metrics["log_weight_prior"]
    assert log_prior < 0
    torch.testing.assert_close(objectives["minibatch"], objectives["none"] - log_prior)
    torch.testing.assert_close(objectives["data"], objectives["none"] - log_prior / 16)


def test_what_a_curve_is_called(reproduction):
    plain = reproduction.Setting("mnist", 3, "aevb", 500)
    assert plain.name == "mnist,z3,aevb"
    assert dataclasses.replace(plain, binary=True, seed=2).name == "mnist,z3,aevb,binary=True,seed=2"
    assert plain.epoch == (50_000, 50_000)
    assert dataclasses.replace(plain, batch_size=300).epoch == (49_800, 49_800)
