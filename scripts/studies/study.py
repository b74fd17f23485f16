"""Places, training that can be resumed, records and verdicts, shared by all studies."""

import dataclasses
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.files import write_atomically
from pyro_vae.lab import jobs
from pyro_vae.lab.config import ConfigError
from pyro_vae.lab.provenance import provenance

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import nn

    from pyro_vae.data import Dataset, Split
    from pyro_vae.lab import Config, Run
    from pyro_vae.training import Callback


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every study's command."""

    epochs: int = 30
    """Epochs of every training."""
    seeds: int = 3
    """Trainings of every kind, from seeds 0, 1, ..., whose spread makes the errors."""
    jobs: int = 1
    """Trainings at once, each in a process of its own with its share of the cores."""
    limit: int | None = None
    """Take only so many training data, and judge on as many test data: for a quick look."""
    data_dir: Path | None = None
    """Folder of the data; default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae."""
    runs: Path = Path("runs/studies")
    """Folder for checkpoints: an interrupted command goes on when it is given again."""
    out: Path = Path("results")
    """Folder for the report (*.md), its numbers (studies/*.json) and figures (figures/*.png)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 100:
            raise ConfigError(f"limit must be at least 100 data, not {self.limit}")


def load(name: str, common: Common, **options: Any) -> Any:
    """Load a data set, with fewer data if the command limits them."""
    from pyro_vae import data

    dataset = data.load(name, data_dir=common.data_dir, **options)
    if common.limit is None:
        return dataset

    def some(split: "Split | None") -> "Split | None":
        if split is None:
            return None
        labels = None if split.labels is None else split.labels[: common.limit]
        return dataclasses.replace(split, stored=split.stored[: common.limit], labels=labels)

    parts = {part: some(getattr(dataset, part)) for part in ("train", "valid", "test")}
    return dataclasses.replace(dataset, **parts)


def trained(
    folder: Path,
    config: "Config",
    dataset: "Dataset",
    *,
    callbacks: "Sequence[Callback]" = (),
    progress: bool,
) -> "Run":
    """Train, or go on with it, to the last epoch: there are no validation data to choose another by."""
    from pyro_vae.lab import train

    return train(
        config,
        folder,
        resume=(folder / "config.json").exists(),
        dataset=dataclasses.replace(dataset, valid=None),
        callbacks=callbacks,
        test=False,
        progress=progress,
        say=str,
    )


def train_network(
    path: Path, net: "nn.Module", minibatches: Any, loss_of: "Callable[..., torch.Tensor]", *, num_epochs: int
) -> "nn.Module":
    """Train a network by Adam on ``loss_of(*minibatch)``, once: its parameters are kept in a file."""
    import torch

    from pyro_vae.progress import progress_bar

    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with progress_bar(num_epochs * len(minibatches), path.stem, "step", show=True) as bar:
        for _ in range(num_epochs):
            for minibatch in minibatches:
                loss = loss_of(*minibatch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(buffer.getvalue(), path)
    return net.eval()


def keep(path: Path, **content: Any) -> None:
    """Write a record as JSON, with its origin, one entry on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**content, "made_by": provenance()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    write_atomically(f"{{\n{lines}\n}}\n".encode(), path)


def record_file(common: Common, study: str, name: str) -> Path:
    """Path of the record of one setting."""
    return common.out / "studies" / study / f"{name}.json"


def measured(
    measure: Callable[..., str], settings: Sequence[Any], common: Common, study: str
) -> dict[Any, dict[str, Any]]:
    """Return the records of all settings; ``measure`` makes missing ones, ``common.jobs`` at once."""
    jobs.run_all(measure, settings, common)
    return {setting: json.loads(record_file(common, study, setting.name).read_text()) for setting in settings}


def save_figure(figure: "Figure", common: Common, name: str) -> str:
    """Write figures/NAME.png; return its path from the folder of reports."""
    path = common.out / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"figures/{name}.png"


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error, which is nan for one seed."""
    error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return statistics.mean(numbers), error


def cell(numbers: Sequence[float], digits: int = 2) -> str:
    """Write mean and standard error in words."""
    mean, error = mean_and_error(numbers)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def is_above(more: Sequence[float], less: Sequence[float]) -> bool:
    """Test if the first mean is above the second by more than twice the error of the difference."""
    (a, of_a), (b, of_b) = mean_and_error(more), mean_and_error(less)
    return a - b > 2 * math.hypot(of_a, of_b)  # one seed has no error: no verdict


def verdict(found: Mapping[str, bool]) -> str:
    """Verdict on a claim, from the places where it was tested and whether it held there."""
    held = [where for where, it_held in found.items() if it_held]
    if len(held) == len(found):
        return "holds"
    if not held:
        return "does not hold"
    *others, last = held
    return f"holds only {', '.join(others)}{' and ' if others else ''}{last}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
