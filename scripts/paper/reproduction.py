"""Settings of the paper and training within a budget, shared by all figures.

Every curve is one :class:`Setting` and has a folder of its own, with checkpoints: run the same command again
to go on, or with a larger --budget to go further. Its record in results is written by curves.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pyro_vae.lab import build as lab_build
from pyro_vae.lab.config import Config, ConfigError
from pyro_vae.lab.jobs import FailedError

if TYPE_CHECKING:
    from pyro_vae.data import Batches, Dataset
    from pyro_vae.training import Algorithm

EPOCH = 50_000  # samples of a row of metrics: an epoch of MNIST, 31 of Frey Face
MCEM_SAMPLES = 15  # that a datum counts for in an iteration of MCEM: 10 leapfrog steps, 5 updates
STEP_SIZES = (0.01, 0.02, 0.1)  # from which the paper chooses
_SELECTION_SAMPLES = 20  # for every training datum: "the first few iterations"
_POINTS_PER_DECADE = 10
_CHECKPOINTS = 200  # for each curve


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every figure's command."""

    budget: Annotated[float, tyro.conf.arg(metavar="SAMPLES")] = 1e7
    """Training samples of every curve, counted with repetition, as on the paper's axes."""
    jobs: int = 1
    """Curves to train at once, each in a process of its own with its share of the cores."""
    data_dir: Path | None = None
    """Folder of the data; default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    runs: Path = Path("runs/paper")
    """Folder for checkpoints."""
    out: Path = Path("results")
    """Folder for curves (paper/*.json) and figures (figures/*.png)."""

    def __post_init__(self) -> None:
        if not EPOCH <= self.budget < math.inf:
            raise ConfigError(f"the budget must be at least {EPOCH:,} samples, not {self.budget:g}")
        if self.jobs < 1:
            raise ConfigError(f"jobs must be at least 1, not {self.jobs}")


@dataclasses.dataclass(frozen=True)
class Variation:
    """One thing at a time that differs from our reading of the paper, which the defaults are."""

    binary: bool = False
    """Binarise MNIST anew for every minibatch, instead of the cross-entropy of grey values."""
    levels: Literal[255, 256] = 255
    """Divisor of grey values 0 to 255: 256 for Frey Face in the authors' published code, and presumably in
    the copy of MNIST that it reads, mnist.pkl.gz."""
    step_size: float | None = None
    """Step size of Adagrad; default: the best of 0.01, 0.02 and 0.1 on the training data in the first
    iterations."""
    warmup: int | None = None
    """First updates that only sum Adagrad's squared gradients, as in the authors' published code; they are
    not counted as training samples. Default: 100, but none for Monte Carlo EM."""
    weight_prior: Literal["data", "minibatch", "none"] = "data"
    """The prior N(0, I) on weights counts once for all the data; or in every minibatch whole, which is easily
    programmed by mistake and makes it N/M times as strong; or not at all (maximum likelihood)."""
    init: Literal["small_normal", "authors", "glorot"] = "small_normal"
    """The paper's N(0, 0.01^2); the same, but the encoder's log variances, the bias of the decoder's and that
    of its output start at 0, as in the authors' published code; or Glorot's."""
    clip_dreams: bool = False
    """Clip wake-sleep's dreams of Frey Face to [0, 1], as the authors' published autoencoders do with images
    that they draw."""
    batch_size: int | None = None
    """Training data of a minibatch; default: 100, but all for Monte Carlo EM, no on-line algorithm."""
    seed: int = 0
    """Seed of the initial weights, the minibatches and the noise."""

    def of(self, data: str) -> dict[str, Any]:
        """Return the arguments of :class:`Setting`, without those that have no default."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        of_one = {"binary": "mnist", "clip_dreams": "frey_face"}
        return given | {name: given[name] and data == its for name, its in of_one.items()}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that determines a curve.

    Attributes:
        data: mnist or frey_face.
        latent_dim: Dimensions of z.
        algorithm: aevb, wake_sleep, mcem or full_vb.
        hidden: Units of the hidden layers.
        num_train: Training data; None for all, but not for mcem.
        binary and the rest: See :class:`Variation`.
    """

    data: str
    latent_dim: int
    algorithm: str
    hidden: int
    num_train: int | None = None
    binary: bool = Variation.binary
    levels: int = Variation.levels
    step_size: float | None = Variation.step_size
    warmup: int = 100
    weight_prior: str = Variation.weight_prior
    init: str = Variation.init
    clip_dreams: bool = Variation.clip_dreams
    batch_size: int = 100
    seed: int = Variation.seed

    @property
    def name(self) -> str:
        """Name of its folder and file; settings other than the defaults are at the end."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)[4:]
            if getattr(self, field.name) != field.default
        }
        parts = [self.data, f"z{self.latent_dim}", self.algorithm, *(f"{k}={v}" for k, v in changed.items())]
        return ",".join(parts)

    @property
    def epoch(self) -> tuple[int, int]:
        """Data and training samples of a row of metrics; for MCEM all data, which count several times."""
        if self.algorithm == "mcem":
            return self.num_train, self.num_train * MCEM_SAMPLES
        data = max(1, EPOCH // self.batch_size) * self.batch_size
        return data, data

    def config(self, common: Common) -> Config:
        """Return the configuration that builds data and programs."""
        family = {"mnist": "bernoulli" if self.binary else "bernoulli_cross_entropy"}
        return Config(
            data=self.data,
            data_dir=common.data_dir,
            family=family.get(self.data, "sigmoid_normal"),
            latent_dim=self.latent_dim,
            hidden=(self.hidden,),
            init="small_normal" if self.init == "authors" else self.init,
            seed=self.seed,
            device=common.device,
        )


# ------------------------------------------------------------------------------------------- training


def load(setting: Setting, common: Common) -> "Dataset":
    """Load the data onto the device; of the training data the first ``num_train``."""
    config = setting.config(common)
    dataset = lab_build.load_data(config)
    levels = float(setting.levels)
    train, test = (dataclasses.replace(split, levels=levels) for split in (dataset.train, dataset.test))
    if setting.num_train is not None:
        stored, labels = (data[: setting.num_train] for data in (train.stored, train.labels))
        train = dataclasses.replace(train, stored=stored, labels=labels)
    dataset = dataclasses.replace(dataset, train=train, test=test)
    return dataset.to(lab_build.device(config))


def build(setting: Setting, common: Common, dataset: "Dataset", step_size: float) -> "Algorithm":
    """Build the algorithm with its initial weights."""
    import torch
    from pyro.infer import TraceMeanField_ELBO

    from pyro_vae import MAP, MCEM, SVI, WakeSleep, bayesian

    config = setting.config(common)
    num_data = len(dataset.train)
    prior_data = {"data": num_data, "minibatch": setting.batch_size, "none": None}[setting.weight_prior]
    pair = lab_build.build_pair(config, dataset)
    if setting.init == "authors":
        start_at_zero(*pair)
    if setting.clip_dreams:  # data are within [0, 1] anyway
        pair[1].posterior.net.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(0, 1),))
    if setting.algorithm == "full_vb":
        pair = bayesian(*pair, num_data)
    model, guide = (program.to(lab_build.device(config)) for program in pair)
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    if setting.algorithm == "mcem":
        if setting.weight_prior == "minibatch":
            raise ConfigError("Monte Carlo EM has no weight prior that counts for every minibatch")
        optimizer = torch.optim.Adagrad(model.parameters(), lr=step_size)
        return MCEM(model, optimizer, num_data, weight_prior=prior_data is not None)
    optimizer = torch.optim.Adagrad(parameters, lr=step_size)
    if setting.algorithm == "wake_sleep":
        return WakeSleep(model, guide, optimizer, num_data=prior_data)
    bound = TraceMeanField_ELBO()
    if prior_data is not None and setting.algorithm != "full_vb":
        bound = MAP(prior_data, bound)
    return SVI(model, guide, optimizer, bound)


def start_at_zero(model: Any, guide: Any) -> None:
    """Set the encoder's log variances and the biases of the decoder's outputs to 0."""
    import torch

    last = guide.posterior.net.layers[-1]
    with torch.no_grad():
        for parameter in (last.weight, last.bias):  # means, then log variances
            parameter[len(parameter) // 2 :] = 0
        model.likelihood.net.layers[-1].bias.zero_()


def minibatches(setting: Setting, dataset: "Dataset") -> "Batches":
    """Minibatches of training data drawn with replacement; for MCEM each datum once, with its position."""
    import torch

    from pyro_vae import batches

    if setting.algorithm == "mcem":
        positions = torch.arange(len(dataset.train))
        return batches(dataset.train, setting.batch_size, seed=setting.seed, context=positions)
    return batches(dataset.train, setting.batch_size, seed=setting.seed, epoch_size=setting.epoch[0])


def warm_up(setting: Setting, algorithm: "Algorithm", dataset: "Dataset") -> None:
    """Take updates of step size 0, in which Adagrad sums squared gradients."""
    (group,) = algorithm.optimizer.param_groups
    step_size, group["lr"] = group["lr"], 0.0
    endless = itertools.chain.from_iterable(itertools.repeat(minibatches(setting, dataset)))
    for batch in itertools.islice(endless, setting.warmup // getattr(algorithm, "num_updates", 1)):
        algorithm.step(*batch)
    group["lr"] = step_size


def train(
    setting: Setting,
    dataset: "Dataset",
    algorithm: "Algorithm",
    num_epochs: int,
    *,
    callbacks: Sequence[Any] = (),
    folder: Path | None = None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Train so many epochs in all, from the checkpoint in ``folder`` if there is one; return their rows."""
    from pyro_vae import Checkpoint, fit

    if folder is not None:
        every = max(1, num_epochs // _CHECKPOINTS)
        callbacks = [*callbacks, Checkpoint(folder, resume=True, monitor="none", every=every)]
    if setting.warmup and (folder is None or not (folder / "checkpoint.pt").exists()):
        warm_up(setting, algorithm, dataset)
    return fit(algorithm, minibatches(setting, dataset), num_epochs, callbacks, progress=progress)


def require_end(setting: Setting, history: Sequence[dict[str, Any]], num_epochs: int, folder: Path) -> None:
    """Raise ``FailedError`` if training went on beyond ``num_epochs``: the model as it was there is gone."""
    if len(history) > num_epochs:
        seen, wanted = (epochs * setting.epoch[1] for epochs in (len(history), num_epochs))
        raise FailedError(
            f"{setting.name} was trained with {seen:,} samples already, and what it was after {wanted:,} is "
            f"not there any more: give the numbers its curve was made with, or begin again without {folder}"
        )


def selection_epochs(setting: Setting, num_data: int) -> int:
    """Number of first epochs, which decide on the step size: 20 samples a datum, an epoch at least."""
    return max(1, round(_SELECTION_SAMPLES * num_data / setting.epoch[1]))


def with_best_step_size(
    setting: Setting,
    common: Common,
    dataset: "Dataset",
    folder: Path,
    num_epochs: int,
    *,
    callbacks: Sequence[Any] = (),
    progress: bool,
) -> tuple["Algorithm", Path, dict[str, Any]]:
    """Train the first iterations with every step size; return the best algorithm, its folder, and the choice.

    The choice is by the bound (for MCEM by log p(x, z)) of the training data after :func:`selection_epochs`,
    and after ``num_epochs`` at most. Every step size has a folder in that of the curve; the best one
    continues there.

    Raises:
        FailedError: If training fails with all step sizes.
    """
    from pyro_vae import NonFiniteError

    first = min(selection_epochs(setting, len(dataset.train)), num_epochs)
    bounds: dict[float, float] = {}
    algorithms = {}
    metric = "train/log_joint" if setting.algorithm == "mcem" else "train/elbo"
    for step_size in STEP_SIZES if setting.step_size is None else (setting.step_size,):
        algorithm = build(setting, common, dataset, step_size)
        try:
            history = train(
                setting,
                dataset,
                algorithm,
                first,
                callbacks=callbacks,
                folder=folder / f"{step_size}",
                progress=progress,
            )
        except NonFiniteError:
            continue
        bounds[step_size] = round(history[first - 1][metric], 2)
        algorithms[step_size] = algorithm
    if not bounds:
        raise FailedError(f"{setting.name} cannot be trained with any step size")
    best = max(bounds, key=bounds.get)
    return algorithms[best], folder / f"{best}", {"step_size": best, "chosen_by": bounds}


def log_spaced(budget: float) -> list[float]:
    """Return numbers of samples at equal distances on a logarithmic axis, up to the budget."""
    count = math.floor(_POINTS_PER_DECADE * math.log10(budget / EPOCH) + 1e-9)
    return [budget * 10 ** (-i / _POINTS_PER_DECADE) for i in range(max(0, count), -1, -1)]


def epochs_at(setting: Setting, samples: Sequence[float]) -> list[int]:
    """Return the ends of epochs that are nearest to these numbers of samples."""
    return sorted({max(1, round(number / setting.epoch[1])) for number in samples})
