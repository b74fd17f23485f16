"""``sweep``: train many configurations, several at once, and rank them by log p(x).

The first of these trains every combination, the second lets Optuna search for the best bound on validation
data (extra: sweep), the third goes on with what is unfinished:

    pyro-vae sweep sweeps/priors --vary prior=standard_normal,vamp latent_dim=10,20 --epochs 50
    pyro-vae sweep sweeps/rates --vary learning_rate=1e-4..1e-2 posterior=diag_normal,iaf --trials 20
    pyro-vae sweep sweeps/priors
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from pyro_vae import records
from pyro_vae.errors import unknown
from pyro_vae.files import locked
from pyro_vae.lab import cli
from pyro_vae.lab.config import PATHS, Config, ConfigError, with_absolute_paths
from pyro_vae.lab.sweep import Choices, Sweep


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train many configurations, several at once, and rank them by log p(x) of the test data.

    Interrupted, it goes on when the same command, or the folder alone, is given again. Ends with a table of
    paired differences, and with ArviZ' view of it.
    """

    sweep: tyro.conf.Positional[Path]
    """Folder of the sweep; runs are folders in it."""
    vary: tuple[str, ...] = ()
    """Settings that differ: setting=value,value,... or, for a search, setting=low..high (logarithmic)."""
    trials: int = 0
    """Configurations that Optuna tries, by the best bound on validation data; 0: all combinations. With one
    job they are the same whether it is interrupted or not; with more they depend on which run ends first."""
    jobs: int = 1
    """Runs at once; on a CPU they share its cores."""
    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)


def main(arguments: Arguments) -> None:
    """Plan, train, compare."""
    arguments = resumed(arguments)
    choices = varied(arguments.vary)
    if not arguments.trials:
        for name, values in choices.items():
            if isinstance(values, tuple):
                raise ConfigError(
                    f"{name} is a range, and a grid has no end of these: list values, or --trials"
                )
    if arguments.jobs < 1 or arguments.trials < 0:
        raise ConfigError("jobs must be at least 1, and trials not negative")
    sweep = Sweep(arguments.sweep, with_absolute_paths(arguments.config), choices, arguments.jobs)
    with locked(arguments.sweep / ".lock", arguments.sweep):
        records.write_json(record(arguments), arguments.sweep / "sweep.json", indent=2)
        try:
            sweep.search(arguments.trials) if arguments.trials else sweep.grid()
        except KeyboardInterrupt:
            cli.exit_interrupted(f"interrupted; go on by\n    {cli.program('sweep')} {arguments.sweep}")
        sweep.report()


# ------------------------------------------------------------------------------------- what to train


def parse(words: Sequence[str], program: str) -> Arguments:
    """Read the command line; settings that vary have their first value while the rest is checked."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--vary", nargs="*", default=[])
    choices = varied(tuple(peek.parse_known_args(words)[0].vary))
    first = {name: values[0] for name, values in choices.items() if isinstance(values, list)}
    try:
        config = Config(**first)
    except ConfigError:  # what it goes with may stand elsewhere on the command line
        config = Config()
    field = ("config", tyro.conf.OmitArgPrefixes[Config], dataclasses.field(default=config))
    kind = dataclasses.make_dataclass("Arguments", [field], bases=(Arguments,), frozen=True)
    kind.__doc__ = Arguments.__doc__
    arguments = tyro.cli(kind, prog=program, args=words)
    return dataclasses.replace(arguments, vary=tuple(map(with_absolute_values, arguments.vary)))


def with_absolute_values(text: str) -> str:
    """Return what varies, with paths that hold in any working directory."""
    name, _, values = text.partition("=")
    if name not in ("data", *PATHS):
        return text
    return f"{name}={','.join(os.path.abspath(v) if Path(v).exists() else v for v in values.split(','))}"


def record(arguments: Arguments) -> dict[str, Any]:
    """The sweep in plain values."""
    return {
        "vary": list(arguments.vary),
        "trials": arguments.trials,
        "config": with_absolute_paths(arguments.config).to_dict(),
    }


@dataclasses.dataclass(frozen=True)
class Saved:
    """Content of sweep.json."""

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
    if arguments.vary == () and arguments.config.to_dict() not in (
        Config().to_dict(),
        earlier.config.to_dict(),
    ):
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


def varied(vary: tuple[str, ...]) -> Choices:
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
    if name in PATHS:
        return Path(text)
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    if isinstance(default, tuple):
        return tuple(int(size) for size in text.split("x"))
    return text if default is None else type(default)(text)
