import errno
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn
from toys import fit, parameters

import pyro_vae as pv
from pyro_vae.compiled import function
from pyro_vae.files import WriteError, write_atomically
from pyro_vae.training import CheckpointError, load_checkpoint, read_metrics

DIGITS = pv.load("digits", binarization="dynamic")


def make(objective=None, lr=1e-2, seed=0):
    pyro.set_rng_seed(seed)
    model, guide = pv.vae(64, 2, hidden=(16,))
    return pv.SVI(model, guide, torch.optim.Adam(parameters(model, guide), lr=lr), objective)


def train(algorithm, num_epochs, callbacks=(), seed=0):
    return fit(algorithm, pv.batches(DIGITS.train, 200, seed=seed), num_epochs, callbacks)


def values(algorithm):
    return torch.cat([p.detach().flatten() for p in parameters(algorithm.model, algorithm.guide)])


class Kill(pv.Callback):
    """Stops the process in the middle of an epoch, as far as the loop can tell."""

    def __init__(self, epoch):
        self.epoch = epoch

    def epoch_start(self, training):
        if training.epoch == self.epoch:
            raise KeyboardInterrupt


class Scripted(pv.Callback):
    """Metrics that are known beforehand."""

    def __init__(self, *values):
        self.values = iter(values)

    def epoch_end(self, training):
        training.row["valid/elbo"] = next(self.values)


def test_rows():
    algorithm = make()
    history = train(algorithm, 3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["samples"] for row in history] == [1297, 2594, 3891]
    assert history[0]["train/elbo"] < history[-1]["train/elbo"] < 0
    assert 0 < history[0]["seconds"] < history[-1]["seconds"]


def test_the_mean_over_an_epoch_weights_batches_by_their_size():
    class Constant:
        model = guide = nn.Module()
        state_dict = load_state_dict = dict

        def step(self, x):
            return {"elbo": x.mean()}

    x = torch.arange(10.0).unsqueeze(1)
    (row,) = fit(Constant(), [(part,) for part in x.split(4)], 1)
    assert row["train/elbo"] == pytest.approx(4.5)


def test_any_iterable_of_batches_will_do():
    x = DIGITS.train.x[:50]
    assert len(fit(make(), [(x,)], 2)) == 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=20)
    assert fit(make(), loader, 1)[0]["samples"] == 50


def test_evaluation_is_the_bound_and_does_not_disturb_training():
    plain = make()
    train(plain, 2)
    watched = make()
    valid = DIGITS.valid.x
    history = train(watched, 2, [pv.Evaluate(valid, num_samples=50)])
    assert torch.equal(values(plain), values(watched))
    bound = pv.elbo(watched.model, watched.guide, valid, num_samples=50).elbo.mean().item()
    assert history[-1]["valid/elbo"] == pytest.approx(bound, abs=0.05)
    history = train(make(), 4, [pv.Evaluate(valid, epochs=(1, 3))])
    assert [row["epoch"] for row in history if "valid/elbo" in row] == [1, 3]


def test_early_stopping_waits_for_patience():
    history = train(make(), 5, [Scripted(1.0, 3.0, 2.0, 2.5, 9.0), pv.EarlyStopping(patience=2)])
    assert len(history) == 4


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1), [0.1, 0.1, 0.01, 0.01]),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "min", patience=0), [0.1, 0.1, 0.01]),
    ],
    ids=["steps", "plateau"],
)
def test_learning_rates_are_scheduled(schedule, rates):
    algorithm = make(lr=0.1)
    callbacks = [Scripted(1.0, 2.0, 3.0, 4.0), pv.LearningRate(schedule(algorithm.optimizer))]
    history = train(algorithm, len(rates), callbacks)
    assert [row["learning_rate"] for row in history] == pytest.approx(rates)


def test_kl_warmup_rises_to_one_and_holds():
    objective = pv.BetaELBO()
    history = train(make(objective), 5, [pv.KLWarmup(objective, 4)])
    assert [row["beta"] for row in history] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_tensorboard_gets_every_row(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        history = train(make(), 2, [pv.TensorBoard(tmp_path)])
        events = EventAccumulator(str(tmp_path))
        events.Reload()
    scalars = events.Scalars("train/elbo")
    assert [event.step for event in scalars] == [1297, 2594]
    assert [event.value for event in scalars] == pytest.approx([row["train/elbo"] for row in history])


# --------------------------------------------------------------------------------------- resuming


def everything(folder):
    """An algorithm and callbacks that use all state there is."""
    objective = pv.BetaELBO()
    algorithm = make(pv.MAP(len(DIGITS.train), objective))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(algorithm.optimizer, 6)
    callbacks = [
        pv.KLWarmup(objective, 3),
        pv.LearningRate(scheduler),
        pv.Evaluate(DIGITS.valid.x),
        pv.EarlyStopping(50),
    ]
    return algorithm, callbacks, pv.Checkpoint(folder, resume=True)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_a_compiled_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Killed before, when and after each of its two shapes of batches is compiled."""
    monkeypatch.setattr(function, "_EAGER_CALLS", 4)
    monkeypatch.setattr("pyro_vae.compiled.work._SAVED_OF_OPERATOR", math.inf)
    x = (torch.rand(25, 8, generator=torch.Generator().manual_seed(1)) < 0.3).float()

    def trained(folder, resume=False, killed_at=None):
        pyro.set_rng_seed(0)
        model, guide = pv.vae(8, 2, hidden=(4,))
        svi = pv.SVI(model, guide, torch.optim.Adam(parameters(model, guide)))
        callbacks = [pv.Checkpoint(folder, resume=resume), Kill(killed_at)]
        fit(svi, pv.batches(pv.from_array(x).train, 8, seed=3), 7, callbacks)
        assert svi._compiled.function.is_compiled
        return values(svi)

    whole = trained(tmp_path / "whole")
    for killed_at in (1, 2, 4, 6):
        folder = tmp_path / str(killed_at)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, killed_at=killed_at)
        assert torch.equal(trained(folder, resume=True), whole), killed_at


@pytest.mark.parametrize("interrupted_at", [0, 1, 4])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, interrupted_at):
    whole, callbacks, checkpoint = everything(tmp_path / "whole")
    expected = train(whole, 6, [*callbacks, checkpoint])

    first, callbacks, checkpoint = everything(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(first, 6, [*callbacks, checkpoint, Kill(interrupted_at)])
    # What was written after the last checkpoint is not to count, not even half a line.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 1, "test/elbo": -1}\n{"epoch": 99, "samples": 1, "seconds": 1}\n{"epoch": 10')
    torch.manual_seed(12345)
    second, callbacks, checkpoint = everything(tmp_path / "parts")
    history = train(second, 6, [*callbacks, checkpoint], seed=99)

    assert torch.equal(values(whole), values(second))
    for name in ("checkpoint.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / part / name) for part in ("whole", "parts"))
        assert one["epoch"] == other["epoch"]
        assert torch.equal(one["random"], other["random"])
        assert one["callbacks"] == other["callbacks"]
        for key, value in one["algorithm"]["model"].items():
            assert torch.equal(value, other["algorithm"]["model"][key])
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)
    written = read_metrics(tmp_path / "parts")
    assert [row["epoch"] for row in written] == [1, 2, 3, 4, 5, 6]
    for rows in (history, written):
        assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    callbacks = [Scripted(-1.0, -2.0), pv.EarlyStopping(patience=1)]
    first = train(make(), 9, [*callbacks, pv.Checkpoint(tmp_path)])
    again = train(make(), 9, [*callbacks, pv.Checkpoint(tmp_path, resume=True)])
    assert len(first) == len(again) == 2


def test_best_is_the_epoch_with_the_best_metric(tmp_path):
    train(make(), 3, [Scripted(1.0, 3.0, 2.0), pv.Checkpoint(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"epoch", "samples", "train/elbo", "valid/elbo", "seconds"} <= set(rows[-1])
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 3


def test_a_checkpoint_every_few_epochs_and_at_the_end(tmp_path):
    epochs = []

    class Look(pv.Callback):
        def epoch_start(self, training):
            epochs.append(load_checkpoint(tmp_path / "checkpoint.pt")["epoch"])

    train(make(), 5, [Look(), pv.Checkpoint(tmp_path, every=3)])
    assert epochs == [0, 0, 0, 3, 3]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 5
    history = train(make(), 7, [pv.Checkpoint(tmp_path, every=3, resume=True)])
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path):
    train(make(), 1, [pv.Checkpoint(tmp_path)])
    assert not (tmp_path / "best.pt").exists()  # without the metric
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        train(make(), 1, [pv.Checkpoint(tmp_path)])


def test_checkpoints_hold_no_pickled_classes(tmp_path):
    algorithm, callbacks, checkpoint = everything(tmp_path)
    train(algorithm, 2, [*callbacks, checkpoint])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)

    def check(value):
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (int, float, str, bool, torch.Tensor), type(value)

    check(state)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"no checkpoint\.pt to go on from", Path.unlink),
        (r"checkpoint.pt cannot be read", lambda path: path.write_bytes(b"")),
        (r"checkpoint.pt cannot be read", lambda path: path.write_bytes(b"rubbish")),
        (r"checkpoint.pt cannot be read", lambda path: path.write_bytes(path.read_bytes()[:2000])),
        ("is not a checkpoint", lambda path: torch.save([1, 2], path)),
    ],
    ids=["lost", "empty", "rubbish", "cut off", "something else"],
)
def test_a_damaged_or_lost_checkpoint_is_named_and_does_not_start_the_run_again(tmp_path, words, change):
    train(make(), 2, [pv.Checkpoint(tmp_path)])
    change(tmp_path / "checkpoint.pt")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=words):
        train(make(), 2, [pv.Checkpoint(tmp_path, resume=True)])
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(make(), 1, [pv.Checkpoint(tmp_path)])
    model, guide = pv.vae(64, 3, hidden=(16,))
    other = pv.SVI(model, guide, torch.optim.Adam(parameters(model, guide)))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit.*layers.0.weight"):
        train(other, 2, [pv.Checkpoint(tmp_path, resume=True)])


def test_damaged_metrics_and_missing_files_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\nrubbish\n{"epoch": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    class FillDisk(pv.Callback):
        def epoch_start(self, training):
            if training.epoch == 2:
                monkeypatch.setattr(os, "fsync", self.full)

        @staticmethod
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match=r"No space left on device.*kept.*go on"):
        train(make(), 5, [FillDisk(), pv.Checkpoint(tmp_path)])
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2
    assert not list(tmp_path.glob("*.partial"))
    whole, resumed = make(), make()
    expected = train(whole, 5)
    history = train(resumed, 5, [pv.Checkpoint(tmp_path, resume=True)])
    assert torch.equal(values(whole), values(resumed))
    assert [row["train/elbo"] for row in history] == [row["train/elbo"] for row in expected]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_explained(tmp_path, monkeypatch):
    old = tmp_path / "x.bin"
    write_atomically(b"old", old)
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(WriteError, match="No space left"):
        write_atomically(b"new" * 10_000, old)
    assert old.read_bytes() == b"old"


# ---------------------------------------------------------------------------------- what is not finite


def test_a_loss_that_becomes_nan_names_the_site_and_the_step(tmp_path):
    algorithm = make()
    steps = 0
    plain_step = algorithm.step

    def step(*batch):
        nonlocal steps
        steps += 1
        if steps == 7 + 3:  # the third step of the second epoch
            with torch.no_grad():
                algorithm.guide.posterior.net.layers[0].weight[0, 0] = torch.nan
        return plain_step(*batch)

    algorithm.step = step
    words = r"elbo became nan at step 3 of epoch 2.*guide's site 'z'"
    with pytest.warns(UserWarning, match="NaN"), pytest.raises(pv.NonFiniteError, match=words):
        train(algorithm, 5, [pv.Checkpoint(tmp_path)])
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["algorithm"]["guide"].values())


@pytest.mark.filterwarnings("ignore:.*NaN:UserWarning")
@pytest.mark.parametrize(("wrong", "words"), [(-2.0, "values from -2 to -2"), (math.nan, "nan or infinite")])
def test_data_are_named_if_they_are_what_is_wrong(wrong, words):
    """Only the first step looks at its data."""
    model, guide = pv.vae(3, 2, hidden=(8,), family=pv.Poisson())
    algorithm = pv.SVI(model, guide, torch.optim.Adam(parameters(model, guide)), compile=False)
    good, bad = torch.ones(10, 3), torch.ones(10, 3)
    bad[3, 1] = wrong
    with pytest.raises(pv.NonFiniteError, match=f"step 2 of epoch 1: .*{words}") as error:
        fit(algorithm, [(good,), (bad,)], 1)
    assert "learning rate" not in str(error.value)


def test_the_likelihood_is_named_if_it_is_what_is_not_finite():
    algorithm = make()
    algorithm.step(DIGITS.train.x[:9])
    with torch.no_grad():
        algorithm.model.likelihood.net.layers[-1].bias[3] = torch.nan
    before = values(algorithm)
    words = r"step 1 of epoch 1.*model's site 'x'"
    with pytest.warns(UserWarning, match="NaN"), pytest.raises(pv.NonFiniteError, match=words):
        train(algorithm, 1)
    assert torch.equal(before.nan_to_num(), values(algorithm).nan_to_num())


def test_parameters_that_become_nan_in_the_last_step_are_not_kept(tmp_path):
    algorithm = make()

    class Break(pv.Callback):
        def epoch_start(self, training):
            if training.epoch == 1:
                for group in algorithm.optimizer.param_groups:
                    group["lr"] = math.inf

    x = DIGITS.train.x[:100]
    with pytest.raises(pv.NonFiniteError, match=r"parameter .* became nan or infinite in epoch 2"):
        fit(algorithm, [(x,)], 5, [Break(), pv.Checkpoint(tmp_path)])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1


# ------------------------------------------------------------------------------ streams, and compiling


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ((x,) for x in DIGITS.train.x[:50])


def a_function():
    yield from ((x,) for x in DIGITS.train.x[:50].split(20))


class Own:
    def __iter__(self):
        return a_function()


@pytest.mark.parametrize(
    "batches",
    [a_function, Own(), torch.utils.data.DataLoader(Stream(), batch_size=20)],
    ids=["function", "iterable", "loader"],
)
def test_epochs_end_when_a_stream_does(batches, tmp_path, capsys):
    """With the numbers of a list of the same batches, and of a run without an interruption."""
    draws_seeds = isinstance(batches, torch.utils.data.DataLoader)
    same = batches if draws_seeds else list(a_function())
    expected = fit(make(), same, 3, [pv.Evaluate(DIGITS.valid.x)])
    assert [row["samples"] for row in expected] == [50, 100, 150]
    parts = [pv.Evaluate(DIGITS.valid.x), pv.EarlyStopping(5), pv.Checkpoint(tmp_path, resume=True)]
    algorithm = make()
    algorithm.expect(0)  # of a training before, which says nothing of this one
    with pytest.raises(KeyboardInterrupt):
        fit(algorithm, batches, 3, [*parts, Kill(2)], progress=True)
    assert "step [" in capsys.readouterr().err  # and no total
    assert algorithm._compiled.function.planned_calls is None
    history = fit(make(), batches, 3, parts)
    assert [{**row, "seconds": 0} for row in history] == [{**row, "seconds": 0} for row in expected]


def test_a_stream_can_be_iterated_once():
    assert fit(make(), a_function(), 1)[0]["samples"] == 50


@pytest.mark.parametrize(
    ("error", "words", "run"),
    [
        (TypeError, r"tuples .* such as \(x,\), not a Tensor", lambda: fit(make(), [DIGITS.valid.x], 1)),
        (TypeError, r"pyro_vae\.SVI", lambda: fit(object(), [(DIGITS.valid.x,)], 1)),
        (ValueError, "one epoch only", lambda: fit(make(), iter([(DIGITS.valid.x,)]), 2)),
        (
            *(ValueError, r"batches is a generator: .*the function that makes"),
            lambda: fit(make(), a_function(), 2),
        ),
        (
            *(ValueError, "empty in epoch 2: an iterator gives one epoch only"),
            lambda: fit(make(), map(tuple, list(a_function())), 2),
        ),
        (ValueError, "add an Evaluate callback", lambda: train(make(), 1, [pv.EarlyStopping(patience=2)])),
        (ValueError, "num_epochs must be at least 1", lambda: pv.KLWarmup(pv.BetaELBO(), 0)),
        (ValueError, "every", lambda: pv.Checkpoint("r", every=0)),
    ],
)
def test_runs_that_cannot_be_are_refused(error, words, run):
    with pytest.raises(error, match=words):
        run()


def test_the_bar_says_that_it_compiles(capsys):
    """And does not take the seconds for those of a step."""
    bar = pv.progress.progress_bar(100, "training", "step")
    with bar:
        bar.update(1)
        with function.while_compiling():
            bar.start_t -= 50  # as if it had taken so long
            bar._time, now = lambda: now() + 1000, bar._time
            shown = str(bar)
        assert "compiling" in shown
        assert "step/s" not in shown
        assert "s/step" not in shown
        assert bar._time() - bar.last_print_t < 500
        assert "compiling" not in str(bar)
