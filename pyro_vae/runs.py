"""Run folders: what makes a run what it is, kept beside what came of it.

``config.json`` holds the configuration, the checksum of the data and the versions of what computed; beside it
lie the metrics and checkpoints of :mod:`pyro_vae.training`. A folder holds one run: resumed, never replaced.
"""

import contextlib
import dataclasses
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae import experiment, records
from pyro_vae.experiment import Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.data import Dataset, Split
    from pyro_vae.models import VAEGuide, VAEModel

# What may differ between a run and its continuation.
_PLACE = ("data_dir", "device", "tensorboard")
# What must be the same for the networks of a run to serve under another prior.
_NETWORKS = (
    *("data", "binarization", "condition_on_labels", "missing", "latent_dim", "net", "hidden", "channels"),
    *("family", "columns", "scale", "rank", "num_codes", "code_dim"),
)
_CHANGEABLE = ("patience", "test_samples")


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a run was trained on."""

    __pydantic_config__ = records.STRICT

    checksum: str
    provenance: str
    shape: list[int]
    binarization: str


@dataclasses.dataclass(frozen=True)
class _Record:
    """What ``config.json`` holds."""

    __pydantic_config__ = records.STRICT

    config: Config
    data: _Data
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    file_checksum: str | None = None


def free_folder(config: Config) -> Path:
    """runs/DATA, or the first of runs/DATA-2, runs/DATA-3, ... that does not exist."""
    base = Path("runs") / (Path(config.data).stem or "data")
    number = 2
    folder = base
    while folder.exists():
        folder = base.with_name(f"{base.name}-{number}")
        number += 1
    return folder


def start_run(folder: Path, config: Config, dataset: "Dataset") -> None:
    """Make the run folder and write ``config.json``; a folder that holds a run is left alone.

    Raises:
        ConfigError: If the folder holds a run already.
    """
    if os.path.lexists(folder / "config.json"):
        other = load_config(folder)
        differing = differences(other, config)
        raise ConfigError(
            f"{folder} already holds a run, "
            + (f"of another configuration ({differing})" if differing else "of this very configuration")
            + f". Go on with it by --resume {folder}, or choose another folder with --out"
        )
    if any((folder / name).exists() for name in ("checkpoint.pt", "best.pt", "metrics.jsonl")):
        raise ConfigError(
            f"{folder} holds what a run left, but no config.json: put that back, or choose another --out"
        )
    data = _Data(dataset.checksum, dataset.provenance, list(dataset.shape), dataset.train.binarization)
    versions = {"python": platform.python_version()} | {
        name: version(name) for name in ("pyro_vae", "pyro-ppl", "torch")
    }
    _make(folder)
    _write(_Record(config, data, versions), folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} ({error.strerror}); choose another --out"
        ) from error


def claim(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a run folder, made if need be, against other processes that would start or resume a run in it.

    Raises:
        ConfigError: If it cannot be made.
        InUseError: If another process has it.
    """
    from pyro_vae.training import lock_run

    _make(folder)
    return lock_run(folder)


def load_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: If the folder holds no run, or its ``config.json`` is damaged.
    """
    return _read(folder).config


def _read(folder: Path) -> _Record:
    path = folder / "config.json"
    advice = (
        "put back a copy of it, or start anew in another folder; if you changed it yourself, remove the "
        "line file_checksum"
    )
    try:
        return records.read_json(path, _Record, ConfigError, advice)
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run folder: there is no {path}") from None


def _write(record: _Record, folder: Path) -> None:
    plain = {
        "config": record.config.to_dict(),
        "data": dataclasses.asdict(record.data),
        "versions": record.versions,
    }
    records.write_json(plain, folder / "config.json", indent=2)


def check_continuation(folder: Path, config: Config, dataset: "Dataset") -> None:
    """Raise :class:`ConfigError` unless the run in ``folder`` can go on with this configuration and data."""
    before = _read(folder)
    may_differ = _PLACE + _CHANGEABLE + (("epochs",) if config.schedule == "constant" else ())
    differing = differences(before.config, config, may_differ)
    if differing:
        raise ConfigError(f"a run keeps its configuration when it is resumed, but {differing}")
    if config.epochs < before.config.epochs:
        raise ConfigError(
            f"the run in {folder} is one of {before.config.epochs} epochs, which may be raised, not lowered"
        )
    if before.data.checksum != dataset.checksum:
        raise ConfigError(
            f"the data are not those that {folder} was trained on: their checksum differs. Put the old data "
            "back, or start a new run"
        )


def continue_run(folder: Path, config: Config, dataset: "Dataset") -> None:
    """Check that the run can go on with this configuration, and write it down.

    It may have more epochs (unless its schedule counts them), another patience, other samples at the test.

    Raises:
        ConfigError: As :func:`check_continuation`.
    """
    check_continuation(folder, config, dataset)
    _write(dataclasses.replace(_read(folder), config=config), folder)


def differences(old: Config, new: Config, ignore: tuple[str, ...] = _PLACE) -> str:
    """In words, in which settings two configurations differ; empty if in none."""
    return ", ".join(
        f"{field.name} was {before!r} and now is {now!r}"
        for field in dataclasses.fields(Config)
        if field.name not in ignore
        for before, now in [(getattr(old, field.name), getattr(new, field.name))]
        if before != now
    )


def identity(config: Config) -> str:
    """What tells a run from those of other settings: all but what may change when it goes on."""
    varying = (*_PLACE, *_CHANGEABLE, "epochs")
    return records.checksum({k: v for k, v in config.to_dict().items() if k not in varying})


def take_networks(folder: Path, config: Config, model: "VAEModel", guide: "VAEGuide") -> None:
    """Load encoder and decoder of another run, for a prior to be fitted to them.

    Raises:
        ConfigError: If the other run differs in more than the prior and its training.
    """
    from pyro_vae.training import load_best, load_parameters

    other = load_config(folder)
    fields = {field.name for field in dataclasses.fields(Config)} - set(_NETWORKS)
    differing = differences(other, config, tuple(fields))
    if differing or other.chosen_posterior != config.chosen_posterior:
        raise ConfigError(
            f"refit_prior takes encoder and decoder of {folder}, so all but the prior and its training must "
            f"be as there, but {differing or 'the posterior differs'}"
        )
    path, state = load_best(folder, identity(other))
    load_parameters(state, path, None, guide)
    parts = {"likelihood.": model.likelihood}
    if config.has_codes:
        parts["prior.codebook."] = guide.codebook
    weights = state["algorithm"].get("model")
    weights = weights.items() if isinstance(weights, dict) else ()
    for prefix, part in parts.items():
        own = {name.removeprefix(prefix): weight for name, weight in weights if name.startswith(prefix)}
        load_parameters({"algorithm": {"model": own}}, path, part, None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A pair with its data.

    Attributes:
        config: How it was trained.
        dataset: On the device of the pair.
        model: On the same device.
        guide: The same.
        epoch: After which their weights were kept; 0 for initial ones.
    """

    config: Config
    dataset: "Dataset"
    model: "VAEModel"
    guide: "VAEGuide"
    epoch: int = 0

    def arguments(self, split: "Split", limit: int | None = None) -> "tuple[Tensor, ...]":
        """What both programs are called with, for a split or ``limit`` of its data, drawn at random."""
        return experiment.arguments(self.config, self.dataset, split, limit)


def load_weights(folder: Path, config: Config, model: "VAEModel", guide: "VAEGuide") -> int:
    """Load the weights of the epoch with the best bound on validation data, else of the last; returns it."""
    from pyro_vae.training import load_best, load_parameters

    path, checkpoint = load_best(folder, identity(config))
    load_parameters(checkpoint, path, model, guide)
    return checkpoint["epoch"]


def load_run(folder: Path | str, **place: Any) -> Run:
    """The trained pair of a run and its data.

    Args:
        folder: The run folder.
        **place: ``data_dir`` or ``device`` in place of the configured ones, unless None.

    Raises:
        UserError: If the folder holds no run, or what it holds does not fit.
    """
    folder = Path(folder)
    given = {name: value for name, value in place.items() if value is not None}
    config = dataclasses.replace(load_config(folder), **given)
    device = experiment.device(config)
    dataset = experiment.load_data(config)
    check_continuation(folder, config, dataset)
    model, guide = experiment.build_pair(config, dataset)
    epoch = load_weights(folder, config, model, guide)
    return Run(config, dataset.to(device), model.to(device), guide.to(device), epoch)
