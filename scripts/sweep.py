"""Train many configurations, several at once, and rank them by log p(x).

    python scripts/sweep.py sweeps/priors --vary prior=standard_normal,vamp latent_dim=10,20 --epochs 50
    python scripts/sweep.py sweeps/rates --vary learning_rate=1e-4..1e-2 posterior=diag_normal,iaf --trials 20
    python scripts/sweep.py sweeps/priors

The first trains every combination, the second lets Optuna search for the best bound on validation data
(extra: sweep), the third goes on with what is unfinished. Each run is one of train.py, in its own folder.
"""

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from pyro_vae import command_line, experiment, records, runs
from pyro_vae.errors import UserError, unknown
from pyro_vae.experiment import Config, ConfigError
from pyro_vae.files import locked, write_atomically
from pyro_vae.progress import progress_bar

Choices = dict[str, list[Any] | tuple[float, float]]  # setting -> values, or a range


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train many configurations, several at once, and rank them by log p(x) of the test data.

    Interrupted, it goes on when the same command, or the folder alone, is given again. Ends with a table of
    paired differences, and with ArviZ' view of it.
    """

    sweep: tyro.conf.Positional[Path]
    """Folder of the sweep; runs are folders in it."""
    vary: tuple[str, ...] = ()
    """What differs: setting=value,value,... or, for a search, setting=low..high (on a logarithmic scale)."""
    trials: int = 0
    """Configurations that Optuna tries, by the best bound on validation data; 0: all combinations. With one
    job they are the same whether it is interrupted or not; with more they depend on which run ends first."""
    jobs: int = 1
    """Runs at once; on a CPU they share its cores."""
    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)


def main() -> None:
    """Plan, train, compare."""
    arguments = resumed(command())
    choices = parse(arguments.vary)
    if not arguments.trials:
        for name, values in choices.items():
            if isinstance(values, tuple):
                raise ConfigError(
                    f"{name} is a range, and a grid has no end of these: list values, or --trials"
                )
    if arguments.jobs < 1 or arguments.trials < 0:
        raise ConfigError("jobs must be at least 1, and trials not negative")
    sweep = Sweep(arguments.sweep, experiment.with_absolute_paths(arguments.config), choices, arguments.jobs)
    with locked(arguments.sweep / ".lock", arguments.sweep):
        records.write_json(record(arguments), arguments.sweep / "sweep.json", indent=2)
        try:
            sweep.search(arguments.trials) if arguments.trials else sweep.grid()
        except KeyboardInterrupt:
            print(f"\ninterrupted; go on by\n    python {sys.argv[0]} {arguments.sweep}", file=sys.stderr)
            sys.exit(command_line.INTERRUPTED)
        report(arguments.sweep, sweep.finished, sweep.failed)


# ------------------------------------------------------------------------------------- what to train


def command() -> Arguments:
    """The command line. What varies has its first value while the rest is checked for what fits."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--vary", nargs="*", default=[])
    choices = parse(tuple(peek.parse_known_args()[0].vary))
    first = {name: values[0] for name, values in choices.items() if isinstance(values, list)}
    try:
        config = Config(**first)
    except ConfigError:  # what it goes with may stand elsewhere on the command line
        config = Config()
    arguments = tyro.cli(Arguments, default=Arguments(sweep=tyro.MISSING, config=config))
    return dataclasses.replace(arguments, vary=tuple(map(with_absolute_paths, arguments.vary)))


def with_absolute_paths(text: str) -> str:
    """What varies, with paths that hold in any working directory."""
    name, _, values = text.partition("=")
    if name not in ("data", *experiment.PATHS):
        return text
    return f"{name}={','.join(os.path.abspath(v) if Path(v).exists() else v for v in values.split(','))}"


def record(arguments: Arguments) -> dict[str, Any]:
    """The sweep in plain values."""
    return {
        "vary": list(arguments.vary),
        "trials": arguments.trials,
        "config": experiment.with_absolute_paths(arguments.config).to_dict(),
    }


@dataclasses.dataclass(frozen=True)
class Saved:
    """What :func:`record` wrote."""

    __pydantic_config__ = records.STRICT

    vary: list[str]
    trials: int
    config: Config
    file_checksum: str | None = None


def resumed(arguments: Arguments) -> Arguments:
    """The arguments; if the folder holds a sweep, those that it was started with."""
    path = arguments.sweep / "sweep.json"
    if not os.path.lexists(path):
        if not arguments.vary:
            raise ConfigError(f"{arguments.sweep} holds no sweep to go on with: say what differs by --vary")
        arguments.sweep.mkdir(parents=True, exist_ok=True)
        return arguments
    saved = records.read_json(path, Saved, ConfigError, "put back a copy of it, or choose another folder")
    earlier = Arguments(
        sweep=arguments.sweep,
        vary=tuple(saved.vary),
        trials=max(saved.trials, arguments.trials),
        jobs=arguments.jobs,
        config=saved.config,
    )
    if arguments.vary == () and arguments.config not in (Config(), earlier.config):
        raise ConfigError(
            f"{arguments.sweep} goes on with the settings it was started with: leave out the others, "
            "or choose another folder and say what differs by --vary"
        )
    if arguments.vary and (
        arguments.vary != earlier.vary or record(arguments)["config"] != record(earlier)["config"]
    ):
        raise ConfigError(
            f"{arguments.sweep} holds another sweep, of {' '.join(earlier.vary)}: choose another folder, or "
            "give the folder alone to go on with it"
        )
    return earlier


def parse(vary: tuple[str, ...]) -> Choices:
    """``name=a,b`` and ``name=low..high`` as values of the setting's type."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    choices: Choices = {}
    for text in vary:
        name, _, values = text.partition("=")
        name = name.strip("-").replace("-", "_")
        if name not in defaults:
            raise ConfigError(unknown("setting", name, defaults))
        if name == "columns":
            raise ConfigError("columns cannot vary: a sweep compares models of the same table; try family")
        try:
            if ".." in values and isinstance(defaults[name], int | float):
                low, _, high = values.partition("..")
                choices[name] = (float(low), float(high))
            else:
                choices[name] = [value_of(value, name, defaults[name]) for value in values.split(",")]
        except ValueError as error:
            raise ConfigError(f"--vary {text}: {error}") from None
        if isinstance(choices[name], tuple) and not 0 < choices[name][0] < choices[name][1]:
            raise ConfigError(f"--vary {text}: a range runs from a positive number to a larger one")
    return choices


def value_of(text: str, name: str, default: object) -> Any:
    """A setting's value from text: numbers of several layers are joined by x, as in hidden=300x300."""
    if name in experiment.PATHS:
        return Path(text)
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    if isinstance(default, tuple):
        return tuple(int(size) for size in text.split("x"))
    return text if default is None else type(default)(text)


def flags(config: Config) -> list[str]:
    """A configuration as options of train.py."""
    options = []
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            options += [flag, *map(str, value)]
        else:
            options += [flag, str(value)]
    return options


# ------------------------------------------------------------------------------------- training it


class Sweep:
    """Runs of train.py in a folder.

    Attributes:
        finished: Folders of finished runs.
        failed: What runs that failed said last, by folder.
    """

    def __init__(self, folder: Path, base: Config, choices: Choices, jobs: int) -> None:
        self.folder, self.base, self.choices, self.jobs = folder, base, choices, jobs
        self.finished: list[Path] = []
        self.failed: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._interrupted = False
        self._children: set[subprocess.Popen] = set()

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
        if experiment.load_data(self.base).valid is None:
            raise ConfigError(f"a search goes by the bound on validation data, and {self.base.data} has none")
        priors = self.choices.get("prior", [])
        if "flat" in priors and len(priors) > 1:
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
            if self._interrupted:  # it stays as it is, for the next time
                return
            with self._lock:
                study.tell(trial, value, state=None if value is not None else states.FAIL)

        waiting = len(study.get_trials(states=(states.WAITING,)))
        asked = sum("again" not in trial.user_attrs for trial in study.trials)
        self._each(attempt, [None] * (waiting + max(0, trials - asked)) + list(again))

    def _each(self, work: Any, todo: Any) -> None:
        with (
            progress_bar(len(todo), "sweep", "run", show=True) as bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            try:
                for _ in pool.map(work, todo):
                    bar.set_postfix_str(f"{len(self.failed)} failed" if self.failed else "", refresh=False)
                    bar.update()
            except BaseException:
                self._interrupted = True
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self._children):
                    child.terminate()
                raise

    def train(self, run: str, config: Config) -> float | None:
        """Train one configuration, or go on with it; its best bound on validation data, None if it failed."""
        folder = self.folder / run
        try:
            finished = is_finished(folder, config)
        except UserError as error:  # damaged, or another run
            with self._lock:
                self.failed[folder] = str(error)
            return None
        if not finished:
            resume = os.path.lexists(folder / "config.json")
            target = ["--resume", str(folder)] if resume else ["--out", str(folder), *flags(config)]
            script = Path(__file__).with_name("train.py")
            cores = max(1, (os.cpu_count() or 1) // self.jobs)
            environment = os.environ | {
                "OMP_NUM_THREADS": str(cores),
                "OMP_WAIT_POLICY": "PASSIVE",
                command_line.ENDS_WITH_INPUT: "yes",
            }
            log = self.folder / f"{run}.log"
            with log.open("w") as output:
                child = subprocess.Popen(
                    [sys.executable, str(script), *target],
                    stdin=subprocess.PIPE,  # ends when this process does, however it does
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self._children.add(child)
                code = child.wait()
                child.stdin.close()
                self._children.discard(child)
            if code:
                last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
                with self._lock:
                    self.failed[folder] = last
                return None
        with self._lock:
            if folder not in self.finished:
                self.finished.append(folder)
        return best_bound(folder, config)


def mend_journal(path: Path) -> None:
    """Remove what a killed search may have left: Optuna's lock, and half a line, which nobody acted on."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            write_atomically(content[: content.rfind(b"\n") + 1], path)


def name(change: Mapping[str, Any]) -> str:
    """Of a run's folder."""
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
    """Whether this run has been trained and tested."""
    from pyro_vae.marginal_likelihood import load_estimates

    if not config.is_autoencoder:
        if not os.path.lexists(folder / "log_marginal.json"):
            return False
        load_estimates(folder / "log_marginal.json")
    if not os.path.lexists(folder / "config.json"):
        return False
    if differing := runs.differences(runs.load_config(folder), config):
        raise ConfigError(f"{folder} holds a run of another configuration: {differing}")
    return any(f"test/{config.bound}" in row for row in rows(folder))


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of a run's metrics."""
    from pyro_vae.training import read_metrics

    yield from read_metrics(folder)


def best_bound(folder: Path, config: Config) -> float | None:
    """The best bound on validation data, or an autoencoder's log-likelihood; None if there are none."""
    metric = f"valid/{config.bound}"
    return max((row[metric] for row in rows(folder) if metric in row), default=None)


# ------------------------------------------------------------------------------------- comparing it


def report(folder: Path, finished: list[Path], failed: Mapping[Path, str]) -> None:
    """Print tables of log p(x) of the test data, one for each kind of data, and keep them in the folder."""
    from pyro_vae.marginal_likelihood import arviz_comparison, compare, load_estimates

    groups: dict[tuple, dict[str, Any]] = {}
    without = [run for run in finished if not (run / "log_marginal.json").exists()]  # autoencoders
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
    texts += [f"{run.name}: an autoencoder has no log p(x)" for run in without]
    for run, said in failed.items():
        texts.append(f"failed: {run}: {said} (all of it is in {run}.log)")
    text = "\n".join(texts).rstrip()
    write_atomically(f"{text}\n".encode(), folder / "comparison.txt")
    print(text)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
