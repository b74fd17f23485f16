"""Damaged run folders: the result of whole ones, or one line that names the file; never a wrong number."""

import importlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pyro_vae import records
from pyro_vae.errors import UserError
from pyro_vae.files import InUseError
from pyro_vae.lab import cli, load_config, reports
from pyro_vae.marginal_likelihood import load_estimates, load_estimates_by_data, merge_estimates

FILES = ("config.json", "metrics.jsonl", "log_marginal.json", "checkpoint.pt", "best.pt")
COMMANDS = {
    "train": ("--resume", "{run}", "--epochs", "4"),
    "estimate": ("{run}", "--num-samples", "30", "--limit", "2"),
    "plot": ("{run}",),
}
SMALL = ("--hidden", 3, "--latent-dim", 2, "--batch-size", 30, "--test-samples", 40)
WRONG = (None, True, "text", [], {}, [[1]], {"a": {"b": 1}}, -1, 2.5, 10**30, 1e300, [1, "a"], "nan")


@pytest.fixture(scope="module")
def scripts():
    """The main functions of the scripts, which draw nothing: that takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "figures", lambda folder, _: reports.check_files(folder) or {})
        yield {name: importlib.import_module(cli.COMMANDS[name]) for name in COMMANDS}


@pytest.fixture
def call(scripts, monkeypatch, capsys):
    """A script by its name and its arguments; what it printed."""

    def call(name, *arguments):
        capsys.readouterr()
        scripts[name].main(scripts[name].parse(list(map(str, arguments)), name))
        return capsys.readouterr().out

    return call


@pytest.fixture
def run(tmp_path, call):
    """A run of three epochs with its estimates."""
    np.save(tmp_path / "x.npy", np.random.RandomState(0).randint(2, size=(60, 3)))
    call("train", "--data", tmp_path / "x.npy", *SMALL, "--epochs", 3, "--out", tmp_path / "run")
    return tmp_path / "run"


def outcome(call, command, folder):
    """All that a command says and leaves, but for times."""
    said = call(command, *(part.format(run=folder) for part in COMMANDS[command]))
    said = [re.sub(r"  \d+$", "", line) for line in said.splitlines() if " s; " not in line]
    rows = [{**row, "seconds": 0} for row in reports.read_metrics(folder) if "seconds" in row]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return said, rows, records.checksum(state["algorithm"])


# ---------------------------------------------------------------------------------------- damages


def of_bytes(rng, content, path):
    """Another content, or something else in place of the file."""
    place = rng.randrange(len(content))
    kinds = {
        "flipped": lambda: (
            content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        ),
        "cut off": lambda: content[:place],
        "empty": lambda: b"",
        "rubbish": lambda: rng.randbytes(100),
        "zeros": lambda: content[:place] + bytes(len(content) - place),
        "a piece lost": lambda: content[:place] + content[place + 1 + rng.randrange(20) :],
        "a piece twice": lambda: content[: place + 20] + content[place:],
        "utf-16": lambda: content.decode("latin-1").encode("utf-16"),
        "folder": lambda: None,
        "broken link": lambda: None,
    }
    kind = rng.choice(list(kinds))
    if kind in ("folder", "broken link"):
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
    else:
        path.write_bytes(kinds[kind]())
    return f"{kind} at {place}"


def places(value, path=()):
    """Paths to everything inside nested dictionaries and lists."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def of_structure(rng, record, wrong=WRONG):
    """Something inside of another type or value, missing, added or under another name."""
    chosen = rng.choice(list(places(record)))
    *path, key = chosen
    parent = record
    for step in path:
        parent = parent[step]
    kind = rng.choice(["wrong", "wrong", "lost", "renamed", "added"])
    if kind == "wrong":
        parent[key] = rng.choice(wrong)
    elif kind == "lost":
        del parent[key]
    elif isinstance(parent, dict):
        parent["renamed" if kind == "renamed" else "added"] = parent[key]
        if kind == "renamed":
            del parent[key]
    else:
        parent.append(parent[key])
    return f"{kind} at {chosen}"


def of_json(rng, content, path):
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    number = rng.randrange(len(lines))
    kind = rng.choice(["structure", "structure", "structure", "twice", "number", "lines"])
    if kind == "structure":
        record = json.loads(lines[number])
        kind += of_structure(rng, record, (*WRONG, float("nan"), float("inf")))
        lines[number] = json.dumps(record)
    elif kind == "twice":
        lines[number] = lines[number].replace("{", '{"epoch": 1, "config": {}, "values": [], ', 1)
    elif kind == "number":
        digits = [i for i, letter in enumerate(lines[number]) if letter.isdigit()]
        i, other = rng.choice(digits), rng.choice(["7e999", "1" * 5000, "NaN", "-", "8"])
        lines[number] = lines[number][:i] + other + lines[number][i + 1 :]
    elif len(lines) > 1:
        lines[number] = rng.choice(lines)
    path.write_text("\n".join(lines) + "\n" * (path.suffix == ".jsonl"))
    return kind


def of_tensors(rng, content, path):
    record = torch.load(path, weights_only=True)
    done = of_structure(rng, record, (*WRONG, torch.zeros(2), torch.zeros(3, 3, dtype=torch.float64)))
    torch.save(record, path)
    return done


def damage(rng, folder):
    """Damages one file; returns which, and how."""
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    ways = [of_bytes, of_tensors if path.suffix == ".pt" else of_json]
    return path.name, rng.choice(ways)(rng, content, path)


def damaged(run, call, seeds):
    """Meets damages, one by one; yields what was neither right nor explained."""
    rights = {}

    def copied():
        shutil.rmtree(run.with_name("copy"), ignore_errors=True)
        return shutil.copytree(run, run.with_name("copy"))

    for seed in seeds:
        rng = random.Random(seed)
        command = rng.choice(list(COMMANDS))
        if command not in rights:
            rights[command] = outcome(call, command, copied())
        copy = copied()
        file, how = damage(rng, copy)
        what = f"seed {seed}: {command} with {file} {how}"
        try:
            found = outcome(call, command, copy)
        except UserError as error:
            if file not in str(error) or "\n" in str(error):
                yield f"{what}: {error}"
        except BaseException as error:
            yield f"{what}: {type(error).__name__}: {error}"
        else:
            if found != rights[command]:
                yield f"{what}: another result: {found}"


def test_damages_give_the_right_result_or_one_line(run, call, request):
    count = 200 if request.config.getoption("--all") else 60
    assert list(damaged(run, call, range(int(os.environ.get("DAMAGES", count))))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(epoch="three"), "epoch"),
        (lambda state: state.update(epoch=True), "epoch"),
        (lambda state: state.update(samples=-1), "samples"),
        (lambda state: state.update(stop=3), "stop"),
        (lambda state: state.update(random=torch.zeros(3)), "random is a float32 tensor"),
        (lambda state: state.pop("callbacks"), "callbacks is missing"),
        (lambda state: state["callbacks"]["EarlyStopping"].update(best="high"), "EarlyStopping.best"),
        (lambda state: state["batches"].update(generator=[1]), "batches.generator"),
        (lambda state: state["algorithm"].update(compiled=[1]), "compiled|valid dict"),
        (lambda state: state["algorithm"]["guide"].popitem(), "is missing"),
        (lambda state: state["algorithm"].update(optimizer={}), "optimizer is of other parameters"),
        (lambda state: state["algorithm"]["optimizer"]["state"].update({0: 1}), "optimizer.state.0"),
        (lambda state: state["algorithm"]["optimizer"]["state"].update({99: {}}), "optimizer.state.99"),
        (lambda state: state["algorithm"]["optimizer"]["state"][1].pop("exp_avg"), "1.exp_avg is missing"),
        (lambda state: state["algorithm"]["optimizer"]["state"][1].update(step=torch.zeros(2)), "1.step"),
        (lambda state: state["algorithm"]["optimizer"]["param_groups"].pop(), "optimizer"),
    ],
)
def test_states_of_another_form_are_refused_even_where_the_checksum_is_right(run, call, change, words):
    path = run / "checkpoint.pt"
    state = records.load_tensors(path)
    change(state)
    records.save_tensors(state, path)
    with pytest.raises(UserError, match=words) as raised:
        call("train", "--resume", run, "--epochs", 4)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_without_a_checksum_are_those_of_earlier_versions(run, call):
    before = records.load_tensors(run / "checkpoint.pt")["epoch"]
    for name in ("config.json", "log_marginal.json"):
        record = json.loads((run / name).read_text())
        record.pop(records.CHECKSUM, None)
        for part in record.values():
            part.pop(records.CHECKSUM, None)
        (run / name).write_text(json.dumps(record))
    for name in ("checkpoint.pt", "best.pt"):
        state = torch.load(run / name, weights_only=True)
        del state[records.CHECKSUM], state["metrics"]
        torch.save(state, run / name)
    call("train", "--resume", run, "--epochs", before + 1)
    assert records.load_tensors(run / "checkpoint.pt")["epoch"] == before + 1


@pytest.mark.parametrize("swapped", ["config.json", "best.pt"])
def test_files_of_another_run_are_refused(run, call, swapped):
    """Of other settings and the same shapes, so that all would fit."""
    other = run.with_name("other")
    data = run.with_name("x.npy")
    call("train", "--data", data, *SMALL, "--epochs", 2, "--learning-rate", "0.002", "--out", other)
    shutil.copy(other / swapped, run / swapped)
    with pytest.raises(UserError, match=r"\.pt is of a run of another configuration than config\.json"):
        call("estimate", run)


# ---------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from pyro_vae.files import locked

with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(run):
    """Another process that trains in the run folder, as far as one can tell."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_has_is_refused_until_that_is_gone(run, call, holder):
    before = (run / "checkpoint.pt").read_bytes()
    words = rf"in use by process {holder.pid} on {platform.node()} since 20\d\d-"
    with pytest.raises(InUseError, match=words):
        call("train", "--resume", run, "--epochs", 4)
    with pytest.raises(InUseError, match=str(holder.pid)):
        call("train", "--data", "digits", "--out", run)
    assert (run / "checkpoint.pt").read_bytes() == before
    call("estimate", run, "--num-samples", 30)  # of the best weights so far
    holder.kill()  # leaves its lock behind
    holder.wait()
    assert (run / ".lock").exists()
    call("train", "--resume", run, "--epochs", 4)
    assert not (run / ".lock").exists()


def test_estimates_stored_at_the_same_time_are_all_there(run, call):
    call("estimate", run, "--num-samples", 30, "--limit", 4)
    (estimate,) = load_estimates_by_data(run / "log_marginal.json").popitem()[1].values()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: merge_estimates({name: estimate}, run / "log_marginal.json"), "abcdefgh"))
    assert set(load_estimates(run / "log_marginal.json")) == {"importance_sampling", *"abcdefgh"}


# ---------------------------------------------------------------------------------------- what is kept


def test_a_smaller_estimate_never_takes_the_place_of_a_larger_one(run, call):
    path = run / "log_marginal.json"
    whole = load_estimates(path)["importance_sampling"]
    said = call("estimate", run, "--limit", 3, "--num-samples", 5000)
    assert "(3 data)" in said
    assert torch.equal(load_estimates(path)["importance_sampling"].values, whole.values)
    of_data = [len(next(iter(found.values())).values) for found in load_estimates_by_data(path).values()]
    assert sorted(of_data) == [3, 6]
    said = call("estimate", run, "--num-samples", 30)  # fewer samples
    assert "keeps what took more work: 40 samples" in said
    assert torch.equal(load_estimates(path)["importance_sampling"].values, whole.values)
    call("estimate", run, "--num-samples", 50)
    assert load_estimates(path)["importance_sampling"].settings["num_samples"] == 50
    call("estimate", run, "--method", "ais", "--limit", 3, "--num-temperatures", 5)
    assert set(load_estimates(path)) == {"importance_sampling", "ais"}
    # Of other weights there is nothing to keep.
    call("train", "--resume", run, "--epochs", 5)
    assert load_estimates(path)["importance_sampling"].settings["num_samples"] == 40


# ---------------------------------------------------------------------------------------- patience


def test_a_run_that_stopped_early_goes_on_with_more_patience(run, call):
    """As one that had it from the start."""
    data = load_config(run).data
    settings = ("--data", data, *SMALL, "--learning-rate", 0.3, "--epochs", 12)

    def train(name, *arguments):
        begin = () if "--resume" in arguments else ("--out", run.with_name(name), *settings)
        call("train", *begin, *arguments)
        return records.load_tensors(run.with_name(name) / "checkpoint.pt")

    at = run.with_name("stopped")
    stopped = train("stopped", "--patience", 1)
    assert stopped["epoch"] < 12
    again = train("stopped", "--resume", at, "--epochs", 13)  # as a run of 13 epochs with this patience
    assert (again["epoch"], again["stop"]) == (stopped["epoch"], stopped["stop"])
    train("stopped", "--resume", at, "--patience", 0)
    assert load_config(at).patience == 0
    other = train("other", "--patience", 0, "--epochs", 13)
    found = records.load_tensors(at / "checkpoint.pt")
    assert found["epoch"] == 13
    for state in (found, other):
        del state["metrics"], state["seconds"], state["algorithm"]["compiled"]  # what hangs on the clock
    assert {name: records.checksum(part) for name, part in found.items()} == {
        name: records.checksum(part) for name, part in other.items()
    }
    words = f"would have stopped after epoch {stopped['epoch']}.*larger patience"
    with pytest.raises(UserError, match=words):
        train("stopped", "--resume", at, "--patience", 1, "--epochs", 14)


def test_a_lost_best_epoch_is_said(run, call):
    """Going on, the best of all epochs would be another; scored, the weights would be others."""
    (run / "best.pt").unlink()
    for command in (("estimate", run), ("train", "--resume", run, "--epochs", 4)):
        with pytest.raises(UserError, match=r"has lost best\.pt, .*: put it back, or copy checkpoint\.pt"):
            call(*command)
    shutil.copy(run / "checkpoint.pt", run / "best.pt")
    call("train", "--resume", run, "--epochs", 4)


def test_the_line_of_the_checksum_can_be_removed(run, call):
    path = run / "config.json"
    lines = [line for line in path.read_text().splitlines() if records.CHECKSUM not in line]
    path.write_text("\n".join(lines))
    assert load_config(run).latent_dim == 2
    call("plot", run)
