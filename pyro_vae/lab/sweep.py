"""Sweeps: many configurations trained in a folder, several at once, and ranked by log p(x)."""

import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyro_vae.errors import UserError
from pyro_vae.files import write_atomically
from pyro_vae.lab import build, runs
from pyro_vae.lab.config import Config, ConfigError
from pyro_vae.lab.jobs import FailedError, Jobs

Choices = dict[str, list[Any] | tuple[float, float]]  # setting -> values, or a range


# ------------------------------------------------------------------------------------- training it


class Sweep:
    """Runs in a folder.

    Attributes:
        finished: Folders of finished runs.
        failed: Last words of runs that failed, by folder.
    """

    def __init__(self, folder: Path, base: Config, choices: Choices, jobs: int) -> None:
        self.folder, self.base, self.choices, self.jobs = folder, base, choices, Jobs(jobs)
        self.finished: list[Path] = []
        self.failed: dict[Path, str] = {}
        self._lock = threading.Lock()

    def grid(self) -> None:
        """Train all combinations; those that do not go together are left out, and said."""
        todo = []
        for values in itertools.product(*self.choices.values()):
            change = dict(zip(self.choices, values, strict=True))
            try:
                todo.append((name(change), dataclasses.replace(self.base, **change)))
            except ConfigError as error:
                print(f"left out {name(change)}: {error}", file=sys.stderr)
        if not todo:
            raise ConfigError("no combination goes together")
        if len({run for run, _ in todo}) < len(todo):
            raise ConfigError(
                f"runs would share a folder, {', '.join(sorted(run for run, _ in todo))}: give "
                "each value once, and files names that differ"
            )
        self._each(lambda job: self.train(*job), todo)

    def search(self, trials: int) -> None:
        """Let Optuna choose configurations by the best bound on validation data."""
        try:
            import optuna
        except ImportError:
            raise ConfigError("--trials needs Optuna: pip install 'pyro_vae[sweep]'") from None
        if build.load_data(self.base).valid is None:
            raise ConfigError(f"a search goes by the bound on validation data, and {self.base.data} has none")
        metrics = {
            metric_of(self.base, {name: value})
            for name in ("model", "prior")
            for value in self.choices.get(name, [])
        }
        if len(metrics) > 1:
            raise ConfigError(
                "a search cannot rank autoencoders (prior flat) among others: they have no bound"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = self.folder / "optuna.log"
        mend_journal(path)
        try:
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
                study_name="sweep",
                direction="maximize",
                load_if_exists=True,
            )
        except Exception as error:  # Optuna raises whatever the content leads it to
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}): put back a copy of it, or choose another folder"
            ) from None
        states, again = optuna.trial.TrialState, {}
        known = {trial.user_attrs.get("again") for trial in study.trials}
        for trial in study.trials:
            if trial.state == states.COMPLETE:
                self.finished.append(self.folder / trial.user_attrs["run"])
            elif trial.state == states.RUNNING:  # interrupted
                if trial.number not in known:
                    study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
                study.tell(trial.number, state=states.FAIL)
            elif (
                trial.state == states.FAIL
                and trial.number not in known
                and "left_out" not in trial.user_attrs
            ):
                again[trial.number] = trial.params

        def attempt(number: int | None) -> None:
            with self._lock:
                if number is not None:  # failed before
                    study.enqueue_trial(again[number], user_attrs={"again": number})
                # By number, so that a search that was interrupted proposes what it would have proposed.
                asked = sum("again" not in trial.user_attrs for trial in study.trials)
                study.sampler = optuna.samplers.TPESampler(seed=self.base.seed + asked)
                trial = study.ask()
                change = {key: suggest(trial, key, values) for key, values in self.choices.items()}
            trial.set_user_attr("run", name(change))
            value = None
            try:
                value = self.train(name(change), dataclasses.replace(self.base, **change))
            except ConfigError as error:
                print(f"left out {name(change)}: {error}", file=sys.stderr)
                trial.set_user_attr("left_out", str(error))
            if self.jobs.interrupted:  # it stays as it is, for the next time
                return
            with self._lock:
                study.tell(trial, value, state=None if value is not None else states.FAIL)

        waiting = len(study.get_trials(states=(states.WAITING,)))
        asked = sum("again" not in trial.user_attrs for trial in study.trials)
        self._each(attempt, [None] * (waiting + max(0, trials - asked)) + list(again))

    def report(self) -> None:
        """Print how the runs compare, and keep it in the folder.

        Raises:
            FailedError: If some failed.
        """
        text = compared(self.finished, self.failed)
        write_atomically(f"{text}\n".encode(), self.folder / "comparison.txt")
        print(text, flush=True)
        if self.failed:
            raise FailedError(f"{len(self.failed)} runs failed")

    def _each(self, work: Any, todo: Any) -> None:
        from pyro_vae.progress import progress_bar

        with progress_bar(len(todo), "sweep", "run", show=True) as bar:

            def done(_: object) -> None:
                bar.set_postfix_str(f"{len(self.failed)} failed" if self.failed else "", refresh=False)
                bar.update()

            self.jobs.each(work, todo, done)

    def train(self, run: str, config: Config) -> float | None:
        """Train one configuration, or go on with it; its best bound on validation data, None if it failed."""
        folder = self.folder / run
        try:
            if not is_finished(folder, config):
                self.jobs.call(train_or_go_on, config, folder, log=self.folder / f"{run}.log")
            value = best_bound(folder, config)
        except UserError as error:  # it failed, is damaged, or another run
            with self._lock:
                self.failed[folder] = str(error)
            return None
        with self._lock:
            if folder not in self.finished:
                self.finished.append(folder)
        return value


def train_or_go_on(config: Config, folder: Path) -> None:
    """Train in a folder, on from where it was interrupted."""
    from pyro_vae.lab.train import train

    resume = os.path.lexists(folder / "config.json")
    train(runs.load_config(folder) if resume else config, folder, resume=resume)


def metric_of(base: Config, change: Mapping[str, Any]) -> str | None:
    """Metric that a changed configuration maximises; None if the change makes no sense by itself."""
    try:
        return dataclasses.replace(base, **change).system.metric
    except ConfigError:
        return None


def mend_journal(path: Path) -> None:
    """Remove what a killed search may have left: Optuna's lock, and half a line, which nobody acted on."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            write_atomically(content[: content.rfind(b"\n") + 1], path)


def name(change: Mapping[str, Any]) -> str:
    """Name of a run's folder."""
    parts = {key: "x".join(map(str, v)) if isinstance(v, tuple) else f"{v}" for key, v in change.items()}
    return ",".join(f"{key}={Path(value).name}" for key, value in parts.items())


def suggest(trial: Any, key: str, values: list[Any] | tuple[float, float]) -> Any:
    """A value that Optuna proposes."""
    if isinstance(values, list):
        index = trial.suggest_categorical(key, list(range(len(values))))
        return values[index]
    default = next(field.default for field in dataclasses.fields(Config) if field.name == key)
    if isinstance(default, int):
        return trial.suggest_int(key, round(values[0]), round(values[1]), log=True)
    return float(f"{trial.suggest_float(key, *values, log=True):.3g}")


def is_finished(folder: Path, config: Config) -> bool:
    """Return whether this run has been trained and tested."""
    from pyro_vae.marginal_likelihood import load_estimates

    if config.system.has_log_prob:
        if not os.path.lexists(folder / "log_marginal.json"):
            return False
        load_estimates(folder / "log_marginal.json")
    if not os.path.lexists(folder / "config.json"):
        return False
    if differing := runs.differences(runs.load_config(folder), config):
        raise ConfigError(f"{folder} holds a run of another configuration: {differing}")
    return any(f"test/{config.system.metric}" in row for row in rows(folder))


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's metrics."""
    from pyro_vae.training import read_metrics

    yield from read_metrics(folder)


def best_bound(folder: Path, config: Config) -> float | None:
    """The best bound on validation data, or an autoencoder's log-likelihood; None if there are none."""
    metric = f"valid/{config.system.metric}"
    return max((row[metric] for row in rows(folder) if metric in row), default=None)


def compared(finished: list[Path], failed: Mapping[Path, str]) -> str:
    """Tables of log p(x) of the test data, one for each kind of data."""
    from pyro_vae.marginal_likelihood import arviz_comparison, compare, load_estimates

    groups: dict[tuple, dict[str, Any]] = {}
    without = [run for run in finished if not runs.load_config(run).system.has_log_prob]
    for run in sorted(set(finished) - set(without)):
        for estimate in load_estimates(run / "log_marginal.json").values():
            if estimate.method == "importance_sampling":
                kind = estimate.data_checksum, estimate.scores
                groups.setdefault(kind, {})[run.name] = estimate
    texts = []
    for estimates in groups.values():
        first = next(iter(estimates.values()))
        texts.append(f"{first.scores} of {first.settings['data']}, importance sampling")
        if len(estimates) == 1:
            doubts = "".join(f"; {doubt.words}" for doubt in first.doubts)
            texts.append(
                f"{next(iter(estimates))}: {first.mean:.2f} (nothing else is of the same data{doubts})"
            )
        else:
            texts += [str(compare(estimates)), "", "ArviZ (leave-one-out):", arviz_comparison(estimates)]
        texts.append("")
    texts += [f"{run.name}: {runs.load_config(run).system.noun} has no log p(x)" for run in without]
    for run, said in failed.items():
        texts.append(f"failed: {run}: {said} (all of it is in {run}.log)")
    return "\n".join(texts).rstrip()
