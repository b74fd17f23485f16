"""The scripts as command lines, on small real data: what they leave, and what they survive."""

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

SMALL = ["--hidden", "16", "--latent-dim", "2", "--test-samples", "40", "--batch-size", "200"]
DRAWN = {"learning_curves", "reconstructions", "samples", "codes"}  # of every system


def command(script, *arguments):
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]


def run(script, *arguments, cwd, check=True, in_process_of_its_own=False):
    if in_process_of_its_own:
        line = command(script, *arguments)
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
    else:
        done = run_here(ROOT / "scripts" / f"{script}.py", *arguments, cwd=cwd)
    if check:
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
    return done


def refused(script, *arguments, cwd, status=1):
    """What a command says that ends with an error, in one message."""
    done = run(script, *arguments, cwd=cwd, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    return done.stderr


def stopped(script, *arguments, cwd, once, by=signal.SIGINT):
    """The exit status of a command that gets a signal once something is there, what it said, and what is."""
    line = command(script, *arguments)
    process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (found := once()):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(by)
    _, said = process.communicate(timeout=60)
    return process.returncode, said, found


def found_in(folder, pattern):
    return list(folder.glob(pattern))


def has_lines(path, number):
    return path.exists() and path.read_text().count("\n") >= number


def figures(folder):
    return {path.stem for path in (folder / "figures").iterdir()}


def estimates(folder, name="log_marginal"):
    return json.loads((folder / f"{name}.json").read_text())


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def parameters(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)["algorithm"]


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four epochs, and what was printed."""
    cwd = tmp_path_factory.mktemp("finished")
    done = run("train", *SMALL, "--epochs", 4, cwd=cwd, in_process_of_its_own=True)
    return cwd / "runs" / "digits", done


def test_train_leaves_a_run(finished):
    folder, done = finished
    left = {"config.json", "metrics.jsonl", "checkpoint.pt", "best.pt", "log_marginal.json", "figures"}
    assert {path.name for path in folder.iterdir()} == left
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["hidden"] == [16]
    assert config["data"]["binarization"] == "dynamic"
    *epochs, test = rows(folder)
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert {"epoch", "samples", "train/elbo", "valid/elbo", "seconds"} <= set(epochs[0])
    assert not any("test/elbo" in row for row in epochs)
    assert test["test/elbo"] < test["test/log_marginal"] < 0
    assert "binarization dynamic" in test["test/data"]
    assert figures(folder) == DRAWN | {"manifold", "log_marginal", "sandwich", "khat"}
    said = ("test ELBO = ", "log p(x) = ", "(Monte Carlo)", "k-hat", "binarization dynamic", "figures in")
    for words in said:
        assert words in done.stdout
    assert "training: 100%" in done.stderr


def test_estimate_says_how_good_a_run_is(finished):
    folder, _ = finished
    few = ("--num-samples", 100, "--limit", 50, "--split", "valid")
    done = run("estimate", folder, *few, cwd=folder, in_process_of_its_own=True)
    assert (
        "digits valid, 200 data, binarization dynamic (one draw, seed 1), 50 of them at random" in done.stdout
    )
    assert len(estimates(folder)["importance_sampling"]["values"]) == 300
    record = estimates(folder, "log_marginal_valid")["importance_sampling"]
    assert len(record["values"]) == len(record["std_error"]) == len(record["diagnostics"]["khat"]) == 50
    assert record["settings"]["num_samples"] == 100
    assert record["settings"]["seconds"] > 0


def test_estimate_by_all_methods(finished):
    folder, _ = finished
    small = ("--num-temperatures", 40, "--num-simulated", 10, "--num-samples", 200)
    few = ("--method", "all", "--limit", 10, "--split", "train", *small)
    done = run("estimate", folder, *few, cwd=folder, in_process_of_its_own=True)  # unchecked annotations
    methods = {"importance_sampling", "ais", "bidirectional", "hmc", "quadrature"}
    record = estimates(folder, "log_marginal_train")
    assert set(record) == methods
    assert {line.split()[0] for line in done.stdout.splitlines() if line} >= methods
    assert "by quadrature, exact" in done.stdout
    exact = np.array(record["quadrature"]["values"])
    for name in "importance_sampling", "ais", "hmc":
        np.testing.assert_allclose(record[name]["values"], exact, atol=0.5)
    assert not list(folder.glob("*.partial"))
    # What took more work stays, and so do estimates of other data.
    run("estimate", folder, "--limit", 10, "--split", "train", "--num-samples", 50, cwd=folder)
    record = estimates(folder, "log_marginal_train")
    assert set(record) == methods
    assert record["importance_sampling"]["settings"]["num_samples"] == 200
    run("estimate", folder, "--limit", 11, "--split", "train", "--num-samples", 50, cwd=folder)
    record = estimates(folder, "log_marginal_train")
    assert set(record) == methods
    assert len(record["importance_sampling"]["values"]) == 11
    assert len(record["quadrature"]["values"]) == 10


@pytest.mark.slow
def test_an_interrupted_estimate_goes_on(finished):
    folder, _ = finished
    arguments = [folder, "--method", "ais", "--num-temperatures", 300, "--split", "valid"]
    partial = folder / "log_marginal_valid.ais.partial"
    status, said, _ = stopped("estimate", *arguments, cwd=folder, once=partial.exists)
    assert status == 130, said
    assert "go on by the same command" in said
    done = run("estimate", *arguments, cwd=folder)
    assert "ais, from the prior, 16 chains, 300 temperatures" in done.stdout
    assert not partial.exists()


def test_plot_draws_a_run_again(finished):
    folder, _ = finished
    for path in (folder / "figures").iterdir():
        path.unlink()
    done = run("plot", folder, cwd=folder, in_process_of_its_own=True)
    drawn = sorted(str(path) for path in (folder / "figures").iterdir())
    assert done.stdout.split() == drawn
    assert len(drawn) == 8


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9, again and again, at whatever moment it strikes."""
    settings = [*SMALL, "--epochs", 60, "--kl-warmup", 5, "--weight-prior", "--patience", 50]
    run("train", *settings, "--out", "whole", cwd=tmp_path)
    arguments, metrics = [*settings, "--out", "parts"], tmp_path / "parts" / "metrics.jsonl"
    for wanted in (3, 17, 31, 44):
        enough = functools.partial(has_lines, metrics, wanted)
        status, _, _ = stopped("train", *arguments, cwd=tmp_path, once=enough, by=signal.SIGKILL)
        assert status == -signal.SIGKILL
        arguments = ["--resume", "parts"]
    run("train", "--resume", "parts", cwd=tmp_path)
    assert without_seconds(tmp_path / "parts") == without_seconds(tmp_path / "whole")
    for name in ("checkpoint.pt", "best.pt"):
        assert same(parameters(tmp_path / "whole", name), parameters(tmp_path / "parts", name))
    whole, parts = (estimates(tmp_path / name)["importance_sampling"] for name in ("whole", "parts"))
    assert whole["values"] == parts["values"]


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, stop):
    endless = ("train", *SMALL, "--epochs", 100_000, "--out", "here")
    two_epochs = functools.partial(has_lines, tmp_path / "here" / "metrics.jsonl", 2)
    status, error, _ = stopped(*endless, cwd=tmp_path, once=two_epochs, by=stop)
    assert status == 130
    assert "--resume here" in error
    assert "Traceback" not in error
    assert torch.load(tmp_path / "here" / "checkpoint.pt", weights_only=True)["epoch"] >= 1


def test_a_finished_run_can_be_extended(tmp_path):
    run("train", *SMALL, "--epochs", 2, "--out", "short", cwd=tmp_path)
    run("train", "--resume", "short", "--epochs", 4, cwd=tmp_path)
    run("train", *SMALL, "--epochs", 4, "--out", "long", cwd=tmp_path)
    assert without_seconds(tmp_path / "short") == without_seconds(tmp_path / "long")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train", ["--latent-dim", "--binarization", "sigmoid_normal", "--resume", "estimator B"]),
        ("estimate", ["--method", "--num-samples", "--limit", "--split"]),
        ("plot", ["PNG"]),
    ],
)
def test_help_explains_without_importing_torch(script, words):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'scripts' / f'{script}.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert [word for word in words if word not in done.stdout] == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train", ["--data", "mnits"], "Did you mean 'mnist'"),
        ("train", ["--prior", "standard"], "Did you mean 'standard_normal'"),
        ("train", ["--data", "grey.npy"], "grey.npy"),
        ("train", ["--data", "negative.npy"], "grey values in [0, 1]"),
        ("train", ["--binarization", "none"], "Bernoulli"),
        ("train", ["--device", "cuda:77"], "--device auto"),
        ("train", ["--resume", "nowhere"], "nowhere is not a run folder"),
        ("estimate", ["nowhere"], "nowhere is not a run folder"),
        ("plot", ["nowhere"], "nowhere is not a run folder"),
        ("sweep", [], "say what differs by --vary"),
        ("sweep", ["--vary", "learning_rate=1e-3..1e-1"], "a grid has no end"),
        ("sweep", ["--vary", "learning_rat=1e-3"], "Did you mean 'learning_rate'"),
        ("sweep", ["--vary", "latent_dim=two"], "invalid literal"),
        ("sweep", ["--vary", "learning_rate=0..1", "--trials", 2], "positive number"),
        ("sweep", ["--vary", "prior=uniform_box", "posterior=iaf"], "no combination goes together"),
        ("sweep", ["--vary", "columns=poisson"], "columns cannot vary"),
        ("sweep", ["--vary", "data=a/x.npy,b/x.npy"], "share a folder"),
    ],
)
def test_mistakes_get_one_clear_message(tmp_path, script, arguments, message):
    np.save(tmp_path / "negative.npy", np.linspace(-1, 1, 40).reshape(10, 4))
    (tmp_path / "grey.npy").write_bytes(b"rubbish")
    folder = ["sweep"] if script == "sweep" else []
    status = 2 if "--prior" in arguments else 1  # of what the command line does not know
    said = refused(script, *folder, *arguments, cwd=tmp_path, status=status)
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_is_not_overwritten(finished):
    folder, _ = finished
    before = (folder / "checkpoint.pt").read_bytes()
    error = refused("train", "--latent-dim", "3", "--out", folder, cwd=folder)
    assert "latent_dim was 2 and now is 3" in error
    error = refused("train", "--resume", folder, "--seed", "5", cwd=folder)
    assert "seed was 0 and now is 5" in error
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_becomes_nan_stops_with_the_last_good_checkpoint(tmp_path):
    steep = ("--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "3", "--out", "r")
    error = refused("train", *SMALL, *steep, cwd=tmp_path)
    assert "step" in error
    assert "site" in error
    state = parameters(tmp_path / "r")
    assert all(value.isfinite().all() for value in [*state["model"].values(), *state["guide"].values()])


def test_tensorboard_writes_events(tmp_path):
    run("train", *SMALL, "--epochs", 1, "--tensorboard", "--out", "r", cwd=tmp_path)
    assert any("tfevents" in name for name in os.listdir(tmp_path / "r" / "tensorboard"))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A finished run of every new part: labels, a flow, grey levels, convolutions."""
    cwd = tmp_path_factory.mktemp("conditional")
    options = ("--condition-on-labels", "--posterior", "iaf", "--family", "discretized_logistic")
    done = run("train", *SMALL, *options, "--net", "conv", "--channels", 4, 8, "--epochs", 2, cwd=cwd)
    return cwd / "runs" / "digits", done


def test_a_conditional_run_is_trained_judged_and_drawn(conditional):
    folder, done = conditional
    assert "bits per dimension, the length of a code" in done.stdout
    assert "of 2 latent dimensions are active" in done.stdout
    assert figures(folder) >= {"reconstructions", "samples", "codes"}
    small = ("--num-temperatures", 20, "--num-simulated", 5, "--limit", 5, "--num-samples", 50)
    methods = ("importance_sampling", "ais", "bidirectional")
    done = run("estimate", folder, "--method", *methods, *small, cwd=folder)
    assert set(estimates(folder)) == set(methods)
    # The last is of other data, and the table and the verdict are of all.
    assert re.search(r"^importance_sampling +-\d", done.stdout, re.MULTILINE)
    assert re.search(r"^log p\(x\) = .* data simulated from the model", done.stdout, re.MULTILINE)


def test_a_prior_is_refitted_to_the_aggregate_posterior(finished, tmp_path):
    folder, _ = finished
    refit = ("train", *SMALL, "--refit-prior", folder)
    mixture = ("--prior", "mixture_of_normals", "--components", 5, "--learning-rate", 0.03)
    done = run(*refit, *mixture, "--epochs", 3, "--out", "refitted", cwd=tmp_path)
    before, after = parameters(folder, "best.pt"), parameters(tmp_path / "refitted")
    assert same(before["guide"], after["guide"])
    networks = {name: value for name, value in after["model"].items() if name.startswith("likelihood")}
    assert same({name: value for name, value in before["model"].items() if name in networks}, networks)
    rows_before, rows_after = rows(folder), rows(tmp_path / "refitted")
    assert rows_after[-1]["test/elbo"] > rows_before[-1]["test/elbo"]
    assert "log p(x) = " in done.stdout
    error = refused(*refit, "--prior", "vamp", "--net", "gated", cwd=tmp_path)
    assert "all but the prior and its training must be as there, but net was 'mlp'" in error


@pytest.mark.slow
def test_a_sweep_ranks_all_combinations_and_goes_on(tmp_path):
    options = (*SMALL, "--epochs", 2, "--jobs", 2)
    vary = ("--vary", "prior=standard_normal,vamp", "posterior=diag_normal,planar")
    done = run("sweep", "sweep", *vary, *options, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert folders == {
        "prior=standard_normal,posterior=diag_normal",
        "prior=standard_normal,posterior=planar",
        "prior=vamp,posterior=diag_normal",
    }
    assert "left out prior=vamp,posterior=planar: prior vamp needs" in done.stderr
    for words in (*folders, "difference  ± data", "95 % interval", "ArviZ (leave-one-out)", "elpd"):
        assert words in done.stdout
    assert (tmp_path / "sweep" / "comparison.txt").read_text() == done.stdout

    def times():
        return {name: (tmp_path / "sweep" / name / "checkpoint.pt").stat().st_mtime_ns for name in folders}

    before = times()
    lost = tmp_path / "sweep" / "prior=vamp,posterior=diag_normal"
    (lost / "log_marginal.json").unlink()
    again = run("sweep", "sweep", cwd=tmp_path)
    assert set(again.stdout.split()) >= folders
    assert {name for name, time in times().items() if time == before[name]} >= folders - {lost.name}
    assert (lost / "log_marginal.json").exists()
    error = refused("sweep", "sweep", "--vary", "latent_dim=2,3", cwd=tmp_path)
    assert "holds another sweep" in error


def test_a_sweep_says_that_autoencoders_have_no_log_marginal(tmp_path):
    options = ("--vary", "prior=standard_normal,flat", "--hidden", 10, "--epochs", 1, "--test-samples", 10)
    done = run("sweep", "sweep", *options, cwd=tmp_path)
    assert "prior=standard_normal: -" in done.stdout
    assert "prior=flat: an autoencoder has no log p(x)" in done.stdout
    checkpoint = tmp_path / "sweep" / "prior=flat" / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns
    run("sweep", "sweep", cwd=tmp_path)
    assert checkpoint.stat().st_mtime_ns == before
    error = refused("sweep", "search", *options, "--trials", 2, cwd=tmp_path)
    assert "cannot rank autoencoders" in error


@pytest.mark.slow
def test_a_search_tries_what_optuna_proposes_and_can_be_extended(tmp_path):
    vary = ("--vary", "learning_rate=1e-3..1e-1", "prior=standard_normal,mixture_of_normals")
    done = run("sweep", "search", *vary, *SMALL, "--epochs", 1, "--trials", 2, cwd=tmp_path)
    assert done.stdout.count("learning_rate=") >= 2
    more = run("sweep", "search", "--trials", 3, cwd=tmp_path)
    found = {path.name for path in (tmp_path / "search").iterdir() if path.is_dir()}
    assert len(found) == 3
    assert all(name in more.stdout for name in found)


@pytest.mark.slow
def test_an_interrupted_trial_is_the_first_to_go_on(tmp_path):
    search = ("sweep", "--vary", "learning_rate=1e-4..1e-2", "--trials", 2, *SMALL, "--epochs", 100)
    checkpoints = functools.partial(found_in, tmp_path, "sweep/*/checkpoint.pt")
    _, said, begun = stopped("sweep", *search, cwd=tmp_path, once=checkpoints)
    assert "go on by" in said
    assert not (begun[0].parent / "log_marginal.json").exists()
    run("sweep", "sweep", cwd=tmp_path)
    finished = {path.parent for path in tmp_path.glob("sweep/*/log_marginal.json")}
    assert finished == {path.parent for path in tmp_path.glob("sweep/*/config.json")}
    assert len(finished) == 2
    assert begun[0].parent in finished


@pytest.mark.slow
def test_a_search_that_is_killed_proposes_what_it_would_have_and_leaves_no_run(tmp_path):
    small = ("--hidden", 4, "--latent-dim", 2, "--test-samples", 2, "--epochs")
    search = ("--vary", "learning_rate=1e-4..1e-2", "latent_dim=2..9", "--trials", 2, *small)
    run("sweep", "whole", *search, 2, cwd=tmp_path)
    checkpoints = functools.partial(found_in, tmp_path, "parts/*/checkpoint.pt")
    _, _, begun = stopped("sweep", "parts", *search, 2, cwd=tmp_path, once=checkpoints, by=signal.SIGKILL)
    locks = [path.parent / ".lock" for path in begun]
    for _ in range(300):  # the run ends with the sweep, and with it goes its lock
        if not any(lock.exists() for lock in locks):
            break
        time.sleep(0.1)
    assert not any(lock.exists() for lock in locks)
    run("sweep", "parts", cwd=tmp_path)
    found = [{path.parent.name for path in tmp_path.glob(f"{n}/*/config.json")} for n in ("whole", "parts")]
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.slow
def test_a_sweep_over_data_goes_on_from_relative_paths(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.RandomState(0).randint(2, size=(60, 4)))
    (tmp_path / "there").mkdir()
    options = ("../sweep", "--vary", "data=../a.npy,../b.npy", *SMALL, "--epochs", 1)
    run("sweep", *options, cwd=tmp_path / "there")
    done = run("sweep", "sweep", cwd=tmp_path)
    assert "data=b.npy" in done.stdout
    done = run("sweep", "other", "--vary", "refit_prior=nowhere", *SMALL, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "nowhere is not a run folder" in done.stdout
    error = refused("sweep", "sweep", "--epochs", 5, cwd=tmp_path)
    assert "leave out the others" in error


@pytest.mark.slow
def test_signal_to_noise_of_gradients(finished):
    folder, _ = finished
    small = ("--num-particles", 1, 16, "--repetitions", 200)
    done = run("studies/signal_to_noise", folder, *small, cwd=folder, in_process_of_its_own=True)
    ratios = json.loads((folder / "signal_to_noise.json").read_text())
    assert set(ratios) == {"plain", "stl", "dreg"}
    assert ratios["dreg"]["16"] > ratios["plain"]["16"]
    # Of one draw stl and dreg are one estimator.
    assert ratios["stl"]["1"] == pytest.approx(ratios["dreg"]["1"], rel=0.2)
    assert (folder / "figures" / "signal_to_noise.png").exists()
    assert "draws" in done.stdout


@pytest.mark.slow
def test_what_varies_is_not_held_against_the_rest(tmp_path):
    """Dequantised data have no Bernoulli, the default family, but that is not among those tried."""
    options = ("--binarization", "dequantize", "--vary", "family=continuous_bernoulli,laplace")
    done = run("sweep", "sweep", *SMALL, *options, "--epochs", 1, cwd=tmp_path)
    assert "family=laplace" in done.stdout


def test_an_autoencoder_is_trained_drawn_and_not_estimated(tmp_path):
    done = run("train", *SMALL, "--prior", "flat", "--epochs", 3, "--out", "ae", cwd=tmp_path)
    assert "an autoencoder has no log p(x)" in done.stdout
    folder = tmp_path / "ae"
    assert {"train/log_joint", "valid/log_joint"} <= set(rows(folder)[0])
    assert "test/log_joint" in rows(folder)[-1]
    assert not (folder / "log_marginal.json").exists()
    assert (folder / "best.pt").exists()
    assert figures(folder) == DRAWN
    assert "no log p(x) to estimate" in refused("estimate", "ae", cwd=tmp_path)
    run("train", "--resume", "ae", "--epochs", 4, cwd=tmp_path)
    assert rows(folder)[-1]["epoch"] == 4


def test_a_prior_is_fitted_to_the_codes_of_a_vq_vae(tmp_path):
    codes = ["--prior", "codes", "--hidden", 50, "--latent-dim", 8, "--num-codes", 16]
    done = run("train", *codes, "--epochs", 20, "--learning-rate", 3e-3, "--out", "vq", cwd=tmp_path)
    assert re.search(r"% of 16 codes are in use, perplexity \d", done.stdout)
    arguments = ["--prior", "transformer", "--refit-prior", "vq", *codes[2:], "--learning-rate", 3e-3]
    run("train", *arguments, "--epochs", 8, "--out", "refitted", cwd=tmp_path)
    before, after = (rows(tmp_path / name)[-1] for name in ("vq", "refitted"))
    assert after["test/elbo"] > before["test/elbo"] + 0.5
    assert before["test/kl"] == pytest.approx(4 * np.log(16), rel=1e-4)
    old, new = (parameters(tmp_path / name, "best.pt") for name in ("vq", "refitted"))
    assert same(old["guide"], new["guide"])
    assert torch.equal(old["model"]["prior.codebook.vectors"], new["model"]["prior.codebook.vectors"])
    done = run("estimate", "refitted", "--method", "all", "--limit", 20, cwd=tmp_path)
    assert "without ais: codes are discrete" in done.stdout
    assert re.search(r"log p\(x\) ≥ -\d+\.\d\d nats per datum", done.stdout)
    assert "Monte Carlo)" not in done.stdout
    assert not (tmp_path / "refitted" / "figures" / "sandwich.png").exists()
    error = refused("estimate", "refitted", "--method", "ais", cwd=tmp_path)
    assert error.startswith("error: ais does not fit this run: codes are discrete")
    refused("estimate", "refitted", "--method", "hmc", "quadrature", cwd=tmp_path)


def test_methods_that_do_not_fit_the_latents_are_refused_before_any_work(tmp_path):
    small = ("--hidden", 20, "--latent-dim", 4, "--epochs", 1, "--test-samples", 2)
    run("train", *small, "--out", "r", cwd=tmp_path)
    done = run("estimate", "r", "--method", "ais", "quadrature", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "quadrature does not fit this run: 4 latent dimensions" in done.stderr
    assert "ais" not in done.stdout


@pytest.mark.parametrize("work", ["mnist", "frey", "m2", "conv"])
def test_the_benchmark_of_steps_times_the_same_losses(work, monkeypatch):
    """That in plain torch is Pyro's, at the same noise."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    works = importlib.import_module("works")
    model, guide = works.pair(work)
    x = works.batches(work, 1, "cpu")[0]
    elbo = (TraceEnum_ELBO if work == "m2" else Trace_ELBO)(max_plate_nesting=1)
    torch.manual_seed(1)
    expected = elbo.differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    torch.testing.assert_close(works.torch_loss(work, model, guide)(x), expected, rtol=1e-4, atol=0)
