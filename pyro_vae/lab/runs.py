"""Run folders: what makes a run what it is, kept beside what came of it.

``config.json`` holds the configuration, the checksum of the data and the versions of what computed; beside it
lie the metrics and checkpoints of :mod:`pyro_vae.training`. A folder holds one run: resumed, never replaced.
"""

import contextlib
import dataclasses
import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae import records
from pyro_vae.lab import build
from pyro_vae.lab.config import SINCE_0_2, Config, ConfigError, Facts

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.data import Dataset, Split
    from pyro_vae.marginal_likelihood import LogMarginal
    from pyro_vae.models import VAEGuide, VAEModel

# Settings that may differ between a run and its continuation.
_PLACE = ("data_dir", "device", "tensorboard")
_CHANGEABLE = ("patience", "test_samples")
# Settings that must be the same for the networks of a run to serve under another prior.
_NETWORKS = (
    *("data", "binarization", "condition_on_labels", "missing", "latent_dim", "net", "hidden", "channels"),
    *("family", "columns", "scale", "min_scale", "rank", "num_codes", "code_dim"),
)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Data that a run was trained on; runs of versions before 0.2 lack the facts behind ``binarization``."""

    __pydantic_config__ = records.STRICT

    checksum: str
    provenance: str
    shape: list[int]
    binarization: str
    levels: float | None = None
    num_classes: int | None = None
    categories: list[int] | None = None

    @property
    def facts(self) -> Facts | None:
        """All that the programs need of the data; None if it was not written down."""
        if self.levels is None:
            return None
        return Facts(tuple(self.shape), self.levels, self.num_classes, tuple(self.categories))


@dataclasses.dataclass(frozen=True)
class _Record:
    """Content of ``config.json``."""

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
    facts = Facts.of(config, dataset)
    data = _Data(
        dataset.checksum,
        dataset.provenance,
        list(dataset.shape),
        dataset.train.binarization,
        facts.levels,
        facts.num_classes,
        list(facts.categories),
    )
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


def check_checksum(folder: Path, dataset: "Dataset") -> None:
    """Raise :class:`ConfigError` unless these are the data of a run."""
    if _read(folder).data.checksum != dataset.checksum:
        raise ConfigError(
            f"the data are not those that {folder} was trained on: their checksum differs. Put the old data "
            "back, or start a new run"
        )


def check_continuation(folder: Path, config: Config, dataset: "Dataset") -> None:
    """Raise :class:`ConfigError` unless the run in ``folder`` can go on with this configuration and data."""
    before = load_config(folder)
    may_differ = _PLACE + _CHANGEABLE + (("epochs",) if config.schedule == "constant" else ())
    differing = differences(before, config, may_differ)
    if differing:
        raise ConfigError(f"a run keeps its configuration when it is resumed, but {differing}")
    if config.epochs < before.epochs:
        raise ConfigError(
            f"the run in {folder} is one of {before.epochs} epochs, which may be raised, not lowered"
        )
    check_checksum(folder, dataset)


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
    before, now = (SINCE_0_2 | config.to_dict() for config in (old, new))
    return ", ".join(
        f"{name} was {value!r} and now is {now[name]!r}"
        for name, value in before.items()
        if name not in ignore and value != now[name]
    )


def identity(config: Config) -> str:
    """A checksum of all settings but those that may change when a run goes on."""
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
    if (codebook := getattr(guide, "codebook", None)) is not None:
        parts["prior.codebook."] = codebook
    weights = state["algorithm"].get("model")
    weights = weights.items() if isinstance(weights, dict) else ()
    for prefix, part in parts.items():
        own = {name.removeprefix(prefix): weight for name, weight in weights if name.startswith(prefix)}
        load_parameters({"algorithm": {"model": own}}, path, part, None)


# ------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    r"""A trained pair, and what is asked of it.

    Data are tensors or arrays of shape (batch, data) or (batch, \*facts.shape), in the scale that the pair
    was trained in: bytes divided by ``facts.levels``. Where the programs are given labels
    (``--condition-on-labels``), every method takes ``labels``, a class for every datum.

    Attributes:
        config: Its configuration.
        facts: Shape, levels and classes of its data.
        model: p(x, z), a Pyro program, on the configured device.
        guide: q(z | x), the same.
        epoch: Epoch after which the weights were kept; 0 for initial ones.
        folder: Folder of the run; None if it has none.
    """

    config: Config
    facts: Facts
    model: "VAEModel"
    guide: "VAEGuide"
    epoch: int = 0
    folder: Path | None = None

    @functools.cached_property
    def dataset(self) -> "Dataset":
        """Data of the run, on the device of the pair: loaded when first asked for.

        Raises:
            UserError: If they are not there, or not those that the run was trained on.
        """
        dataset = build.load_data(self.config)
        if self.folder is not None:
            check_checksum(self.folder, dataset)
        return dataset.to(self.device)

    @property
    def device(self) -> Any:
        """Device of the pair."""
        return next(self.guide.parameters()).device

    @property
    def dtype(self) -> Any:
        """Type of the pair's numbers."""
        return next(self.guide.parameters()).dtype

    def arguments(self, split: "Split", limit: int | None = None) -> "tuple[Tensor, ...]":
        """Arguments that both programs are called with, for a split or ``limit`` of its data, at random."""
        return build.arguments(split, self.facts, limit)

    def batch(self, x: object, labels: object = None) -> "tuple[Tensor, ...]":
        """Arguments that both programs are called with, for data of one's own.

        Raises:
            ConfigError: If they have another shape, or labels are missing or too many.
        """
        import torch

        values = torch.as_tensor(x)
        if values[:1].numel() != self.facts.data_dim or values.dim() < 2:
            raise ConfigError(
                f"data of this run have the shape (batch, {self.facts.data_dim}) or (batch, "
                f"{', '.join(map(str, self.facts.shape))}), not {tuple(values.shape)}"
            )
        values = values.reshape(len(values), -1).to(self.device, self.dtype)
        return (values, *self.context(len(values), labels))

    def context(self, count: int, labels: object = None) -> "tuple[Tensor, ...]":
        """Argument of both programs besides x: labels, one-hot, where they are given them.

        Args:
            count: Number of data.
            labels: Class of every datum, or one of all.

        Raises:
            ConfigError: If they are missing, too many or out of range.
        """
        import torch

        classes = self.facts.num_classes
        if (labels is None) != (classes == 0):
            raise ConfigError(
                "this run is given no labels: leave them out"
                if classes == 0
                else f"this run is given labels: say the class, 0 to {classes - 1}, of every datum"
            )
        if labels is None:
            return ()
        labels = torch.as_tensor(labels, device=self.device).long().expand(count)
        if not ((labels >= 0) & (labels < classes)).all():
            raise ConfigError(f"labels of this run are 0 to {classes - 1}")
        return (torch.nn.functional.one_hot(labels, classes).to(self.dtype),)

    def encode(self, x: object, labels: object = None) -> "Tensor":
        """Mean of q(z | x), for every datum: (batch, latent)."""
        from pyro_vae.latents import posterior_mean

        self.guide.eval()
        return posterior_mean(self.guide, *self.batch(x, labels))

    def decode(self, z: object, labels: object = None) -> "Tensor":
        """Mean of p(x | z), of every z: (batch, latent) to (batch, data)."""
        import torch

        return self._likelihood(torch.as_tensor(z), labels).mean

    def _likelihood(self, z: "Tensor", labels: object) -> Any:
        import torch

        from pyro_vae.models.vae import beside

        self.model.eval()
        with torch.no_grad():
            z = z.to(self.device, self.dtype)
            return self.model.likelihood(beside(z, *self.context(len(z), labels)))

    def sample(self, num_samples: int, labels: object = None) -> "Tensor":
        """Draws of x from p(x): (num_samples, data); ``decode`` of draws of z has less noise.

        Raises:
            ConfigError: If the model has no prior to draw from, as an autoencoder.
        """
        import torch

        if not self.config.system.has_log_prob:
            raise ConfigError(
                f"{self.config.system.noun} has no prior to draw z from: fit one to codes "
                "(pyro_vae.latents.fitted_mixture(run.encode(x))) and decode draws of that"
            )
        with torch.no_grad():
            return self._likelihood(self.model.prior().sample((num_samples,)), labels).sample()

    def log_prob(self, x: object, labels: object = None, *, num_samples: int = 1000) -> "LogMarginal":
        """Log p(x) of every datum, estimated by importance sampling, with its errors and diagnostics, nats.

        Raises:
            ConfigError: If there is no log p(x), as of an autoencoder.
        """
        from pyro_vae.marginal_likelihood import importance_sampling

        self.config.system.check_log_prob(self.folder or "this run")
        num_samples = num_samples if self.config.system.draws else 1
        batch = self.batch(x, labels)
        return importance_sampling(self.model, self.guide, *batch, num_samples=num_samples, progress=False)


def load_weights(folder: Path, config: Config, model: "VAEModel", guide: "VAEGuide") -> int:
    """Load the weights of the epoch with the best bound on validation data, else of the last; return it."""
    from pyro_vae.training import load_best, load_parameters

    path, checkpoint = load_best(folder, identity(config))
    load_parameters(checkpoint, path, model, guide)
    return checkpoint["epoch"]


def load_run(folder: Path | str, **place: Any) -> Run:
    """Open the trained pair of a run folder; its data are not needed before ``run.dataset`` is asked for.

    Args:
        folder: Run folder.
        **place: ``data_dir`` or ``device`` in place of the configured ones, unless None.

    Raises:
        UserError: If the folder holds no run, or what it holds does not fit.
    """
    folder = Path(folder)
    given = {name: value for name, value in place.items() if value is not None}
    record = _read(folder)
    config = dataclasses.replace(record.config, **given)
    device = build.device(config)
    facts = record.data.facts
    if facts is None:  # written before version 0.2
        facts = Facts.of(config, build.load_data(config))
    model, guide = build.build_pair(config, facts)
    epoch = load_weights(folder, config, model, guide)
    return Run(config, facts, model.to(device), guide.to(device), epoch, folder)
