"""Experiments: a configuration of plain values, and what it builds.

This is the only place where strings are looked up: names of priors, families, objectives, ... become the
objects that the rest of the package passes around. It imports nothing heavy until something is built, so that
``--help`` answers at once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pyro_vae.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

    from pyro_vae.algorithms import SVI
    from pyro_vae.data import Dataset, Split
    from pyro_vae.distributions import Family
    from pyro_vae.marginal_likelihood import LogMarginal
    from pyro_vae.models import VAEGuide, VAEModel
    from pyro_vae.training import Callback

DATA = {
    "digits": "scikit-learn's 1,797 8x8 digits",
    "mnist": "28x28 digits",
    "fashion_mnist": "28x28 clothes",
    "static_mnist": "Larochelle's fixed binarisation",
    "frey_face": "28x20 frames of a face",
    "caltech_silhouettes": "28x28 silhouettes",
    "omniglot": "28x28 characters",
    "PATH": "your own .npy, .npz or folder of images",
}
BINARIZATIONS = {
    "dynamic": "bits drawn anew for every batch from the grey values; evaluation uses one draw",
    "fixed": "one seeded draw",
    "threshold": "x > 1/2",
    "none": "x as it is",
}
PRIORS = {
    "standard_normal": "N(0, I), the paper's",
    "mixture_of_normals": "a learned mixture of --components diagonal normals",
}
FAMILIES = {
    "bernoulli": "bits; grey data are binarised",
    "continuous_bernoulli": "a density of grey values in [0, 1]",
    "diag_normal": "normal, mean and scale of every number computed from z",
    "sigmoid_normal": "the same with the mean squashed into (0, 1), the paper's for Frey Face",
    "fixed_scale_normal": "normal with the scale --scale",
    "bernoulli_cross_entropy": "cross-entropy of grey values: no likelihood, and labelled so",
}
OBJECTIVES = {
    "elbo": "the bound with sampled KL, the paper's estimator A",
    "elbo_analytic_kl": "the bound with closed-form KL where there is one, estimator B",
}
INITS = {
    "glorot": "uniform by fan-in and fan-out, biases 0",
    "small_normal": "N(0, 0.01^2) everywhere, the paper's",
}
SCHEDULES = {"constant": "the same rate throughout", "cosine": "falls to 0 by the last epoch"}
OPTIMIZERS = {
    name.lower(): f"torch.optim.{name}"
    for name in ("Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
}
ESTIMATORS = {
    "importance_sampling": "a lower bound, fast; tight where the guide covers the posterior",
    "ais": "annealing from prior or guide, a lower bound as tight as one has time for",
    "bidirectional": "annealing both ways on data simulated from the model, which certifies ais",
    "hmc": "the paper's Appendix D, an upper bound, for few latent dimensions",
    "quadrature": "exact, for up to 3 latent dimensions",
}
MOST_DIMENSIONS = {"hmc": 5, "quadrature": 3}
DEVICES = {"auto": "cuda if there is one", "cpu": "", "cuda": "", "cuda:N": "the N-th GPU"}


class ConfigError(UserError, ValueError):
    """A configuration that makes no sense; the message says why."""


def _help(text: str, names: Mapping[str, str]) -> Any:
    lines = "; ".join(f"{name}: {line}" if line else name for name, line in names.items())
    return tyro.conf.arg(metavar="NAME", help=f"{text} {lines}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """What makes a run what it is, in plain values.

    Raises:
        ConfigError: If a name is unknown, a number out of range, or the parts do not go together.
    """

    data: Annotated[str, _help("What to learn.", DATA)] = "digits"
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Where the files are; may be read-only. Default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae; "
            "what is missing is downloaded."
        ),
    ] = None
    binarization: Annotated[
        str | None,
        _help("How grey values become bits; default: dynamic for bernoulli, else none.", BINARIZATIONS),
    ] = None

    latent_dim: int = 20
    """Dimensions of z."""
    hidden: tuple[int, ...] = (500,)
    """Tanh units of each hidden layer of the encoder; the decoder has them in reverse."""
    prior: Annotated[str, _help("p(z).", PRIORS)] = "standard_normal"
    components: int = 20
    """Normals in the mixture prior."""
    family: Annotated[str, _help("p(x|z).", FAMILIES)] = "bernoulli"
    scale: float = 0.1
    """Standard deviation of fixed_scale_normal, in the unit of x (bytes are scaled to [0, 1])."""
    init: Annotated[str, _help("Initial weights.", INITS)] = "glorot"
    bias_from_data: bool = False
    """Start the decoder's output bias at the mean of the training data."""

    objective: Annotated[str, _help("What is maximised.", OBJECTIVES)] = "elbo_analytic_kl"
    num_particles: int = 1
    """Draws of z for every datum and step: the paper's L."""
    weight_prior: bool = False
    """Add log N(w; 0, I) of the networks' weights to the objective, in nats: the paper's MAP."""
    kl_warmup: int = 0
    """Epochs over which the weight of the KL term rises to 1."""

    optimizer: Annotated[str, _help("Of torch.optim.", OPTIMIZERS)] = "adam"
    learning_rate: float = 1e-3
    """Of the optimiser."""
    schedule: Annotated[str, _help("Learning rate over epochs.", SCHEDULES)] = "constant"
    batch_size: int = 100
    """Data a step."""
    epochs: int = 500
    """Passes through the training data."""
    patience: int = 0
    """Stop after so many epochs without a better bound on the validation data; 0: never."""
    test_samples: int = 1000
    """Importance samples for log p(x) of every test datum, at the end."""

    seed: int = 0
    """Of initial weights, noise and order of the data. The splits do not depend on it."""
    device: Annotated[str, _help("Where to compute.", DEVICES)] = "auto"
    tensorboard: bool = False
    """Also write metrics for TensorBoard into the run folder (extra: tensorboard)."""

    def __post_init__(self) -> None:
        for field, names in _NAMES.items():
            if getattr(self, field) not in names:
                raise ConfigError(unknown(field, getattr(self, field), names))
        if self.binarization is not None and self.binarization not in BINARIZATIONS:
            raise ConfigError(unknown("binarization", self.binarization, BINARIZATIONS))
        for field in ("latent_dim", "components", "num_particles", "batch_size", "epochs", "test_samples"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("kl_warmup", "patience", "seed"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} must not be negative, but is {getattr(self, field)}")
        for field in ("scale", "learning_rate"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} must be positive and finite, not {getattr(self, field)}")
        if any(units < 1 for units in self.hidden):
            raise ConfigError(f"hidden layers need at least one unit each, not {self.hidden}")
        if self.kl_warmup > self.epochs:
            raise ConfigError(
                f"a warm-up over {self.kl_warmup} epochs does not end within {self.epochs}: the bound itself "
                "would never be maximised"
            )
        if self.family != "bernoulli" and self.binarization not in (None, "none"):
            raise ConfigError(
                f"binarization {self.binarization!r} makes bits, of which {self.family} is no distribution: "
                "use family bernoulli, or binarization none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return values | {"hidden": list(self.hidden), "data_dir": self.data_dir and str(self.data_dir)}

    @classmethod
    def from_dict(cls, values: object) -> "Config":
        """From what :meth:`to_dict` returned; raises :class:`ConfigError` if it is something else."""
        if not isinstance(values, dict):
            raise ConfigError(f"a configuration is a table of values, not {type(values).__name__}")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        checked = {}
        for name, value in values.items():
            if name not in defaults:
                raise ConfigError(unknown("setting", name, defaults))
            if name == "data_dir" and isinstance(value, str):
                value = Path(value)
            elif name == "hidden" and isinstance(value, list):
                value = tuple(value)
            elif isinstance(defaults[name], float) and type(value) is int:
                value = float(value)
            if not _has_type_of(value, name, defaults[name]):
                raise ConfigError(f"{name} cannot be {value!r}; its default is {defaults[name]!r}")
            checked[name] = value
        return cls(**checked)


_NAMES = {
    "prior": PRIORS,
    "family": FAMILIES,
    "init": INITS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}


def _has_type_of(value: object, name: str, default: object) -> bool:
    if name == "data_dir":
        return value is None or isinstance(value, Path)
    if name == "binarization":
        return value is None or isinstance(value, str)
    if name == "hidden":
        return isinstance(value, tuple) and all(type(units) is int for units in value)
    return type(value) is type(default)


# ------------------------------------------------------------------------------------------- objects


def with_absolute_paths(config: Config) -> Config:
    """The same with paths that hold in any working directory."""
    data, data_dir = config.data, config.data_dir
    if data not in DATA and Path(data).exists():
        data = str(Path(data).absolute())
    return dataclasses.replace(config, data=data, data_dir=data_dir and data_dir.expanduser().absolute())


def load_data(config: Config) -> "Dataset":
    """The data set, on the CPU, binarised as configured."""
    from pyro_vae import data

    binarization = config.binarization or ("dynamic" if config.family == "bernoulli" else "none")
    return data.load(config.data, binarization=binarization, data_dir=config.data_dir)


def device(config: Config) -> "torch.device":
    """The device; raises :class:`ConfigError` if it is not there."""
    import torch

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({message}): try --device auto") from error
    return torch.device(name)


def build_pair(config: Config, train: "Split") -> "tuple[VAEModel, VAEGuide]":
    """Model and guide, sized for these data, with initial weights from ``config.seed``."""
    import pyro

    from pyro_vae import distributions, nets
    from pyro_vae.models import vae

    pyro.set_rng_seed(config.seed)
    init = {"glorot": nets.glorot, "small_normal": nets.small_normal}[config.init]
    family = build_family(config)
    prior = {
        "standard_normal": lambda: distributions.StandardNormal(config.latent_dim),
        "mixture_of_normals": lambda: distributions.MixtureOfNormals(config.latent_dim, config.components),
    }[config.prior]()
    posterior = distributions.DiagNormal()
    data_dim = train.stored.shape[1]
    encoder = nets.MLP(data_dim, config.latent_dim * posterior.params_per_dim, config.hidden, init=init)
    decoder = nets.MLP(
        config.latent_dim,
        data_dim * family.params_per_dim,
        tuple(reversed(config.hidden)),
        init=init,
        output_bias=family.bias(train.x.mean(0)) if config.bias_from_data else None,
    )
    return vae(
        data_dim,
        config.latent_dim,
        prior=prior,
        family=family,
        posterior=posterior,
        encoder=encoder,
        decoder=decoder,
    )


def check_data(model: "VAEModel", config: Config, dataset: "Dataset") -> None:
    """Raise ``SupportError`` if any datum of any split is outside the likelihood's support."""
    import torch

    from pyro_vae.distributions import check_support

    likelihood = model.likelihood(torch.zeros(1, config.latent_dim))
    for split in (dataset.train, dataset.valid, dataset.test):
        if split is not None:
            check_support(likelihood, split.x, site=split.description)


def build_family(config: Config) -> "Family":
    """The family of p(x | z)."""
    from pyro_vae import distributions

    return {
        "bernoulli": distributions.Bernoulli,
        "continuous_bernoulli": distributions.ContinuousBernoulli,
        "diag_normal": distributions.DiagNormal,
        "sigmoid_normal": lambda: distributions.DiagNormal(squash_loc=True),
        "fixed_scale_normal": lambda: distributions.FixedScaleNormal(config.scale),
        "bernoulli_cross_entropy": lambda: distributions.Bernoulli(cross_entropy=True),
    }[config.family]()


def build_training(
    config: Config, model: "VAEModel", guide: "VAEGuide", dataset: "Dataset", folder: Path
) -> "tuple[SVI, list[Callback]]":
    """The algorithm, and the callbacks up to but without the checkpoint."""
    import torch
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from pyro_vae import objectives, training
    from pyro_vae.algorithms import SVI

    bound = {"elbo": Trace_ELBO, "elbo_analytic_kl": TraceMeanField_ELBO}[config.objective]
    objective = bound(
        num_particles=config.num_particles, vectorize_particles=config.num_particles > 1, max_plate_nesting=1
    )
    callbacks: list[Callback] = []
    if config.kl_warmup:
        objective = objectives.BetaELBO(bound=objective)
        callbacks.append(training.KLWarmup(objective, config.kl_warmup))
    if config.weight_prior:
        objective = objectives.MAP(len(dataset.train), objective)
    make_optimizer = getattr(torch.optim, OPTIMIZERS[config.optimizer].rpartition(".")[2])
    optimizer = make_optimizer([*model.parameters(), *guide.parameters()], lr=config.learning_rate)
    if config.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        callbacks.append(training.LearningRate(scheduler))
    if dataset.valid is not None:
        # Few data make a noisy bound; a few draws of each cost nothing then.
        num_samples = max(1, 2000 // len(dataset.valid))
        callbacks.append(training.Evaluate(dataset.valid.x, num_samples=num_samples))
    if config.patience:
        if dataset.valid is None:
            raise ConfigError(f"--patience needs validation data, and {dataset.name} has none")
        callbacks.append(training.EarlyStopping(config.patience))
    if config.tensorboard:
        callbacks.append(training.TensorBoard(folder / "tensorboard"))
    return SVI(model, guide, optimizer, objective), callbacks


def estimator(name: str) -> "Callable[..., LogMarginal]":
    """The function of ``marginal_likelihood`` that has this name among ``ESTIMATORS``."""
    from pyro_vae import marginal_likelihood

    if name not in ESTIMATORS:
        raise ConfigError(unknown("estimator", name, ESTIMATORS))
    return getattr(marginal_likelihood, name)
