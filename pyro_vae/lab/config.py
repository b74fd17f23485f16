"""A configuration of plain values, and which of them go together."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pyro_vae import records
from pyro_vae.errors import UserError, unknown
from pyro_vae.lab import choices
from pyro_vae.lab.choices import CATEGORICAL, FAMILIES, POSTERIORS, PRIORS, Choice
from pyro_vae.lab.systems import SYSTEMS, System

if TYPE_CHECKING:
    from pyro_vae.data import Dataset


class ConfigError(UserError, ValueError):
    """A configuration that makes no sense; the message says why."""


def _help(text: str, names: Mapping[str, Choice | System]) -> Any:
    lines = "; ".join(f"{name}: {row.help}" if row.help else name for name, row in names.items())
    return tyro.conf.arg(metavar="NAME", help=f"{text} {lines}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run, in plain values.

    Raises:
        ConfigError: If a name is unknown, a number out of range, or the parts do not go together.
    """

    __pydantic_config__ = records.STRICT

    data: Annotated[str, _help("What to learn.", choices.DATA)] = "digits"
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Where the files are; may be read-only. Default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae; "
            "what is missing is downloaded."
        ),
    ] = None
    binarization: Annotated[
        str | None,
        _help(
            "What becomes of grey values; default: dynamic for bernoulli, else none.", choices.BINARIZATIONS
        ),
    ] = None
    condition_on_labels: bool = False
    """Learn p(x|z,y) and q(z|x,y), given the labels y."""

    model: Annotated[str | None, _help("System; default: the one that goes with the prior.", SYSTEMS)] = None
    latent_dim: int = 20
    """Dimensions of z."""
    net: Annotated[str, _help("Encoder and decoder.", choices.NETS)] = "mlp"
    hidden: tuple[int, ...] = (500,)
    """Units of each hidden layer of the encoder; the decoder has them in reverse (mlp, gated)."""
    channels: tuple[int, ...] = (32, 64)
    """Channels after each halving of the image; the decoder has them in reverse (conv, residual_conv)."""
    prior: Annotated[
        str | None, _help("p(z); default: standard_normal, or the one that goes with the model.", PRIORS)
    ] = None
    components: int = 20
    """Normals in the mixture prior, pseudo-inputs of the VampPrior."""
    num_codes: int = 64
    """Vectors in the codebook (codes, transformer)."""
    code_dim: int = 2
    """Numbers of each; z has --latent-dim / --code-dim codes, or one at every place of the smallest grid of
    convolutions."""
    refit_prior: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="RUN",
            help="Take encoder and decoder from this run and train the prior alone, from scratch: it "
            "comes to fit the aggregate posterior. It is better than the old prior only if it is rich and "
            "trained enough: compare the bounds.",
        ),
    ] = None
    family: Annotated[str, _help("p(x|z).", FAMILIES)] = "bernoulli"
    columns: tuple[str, ...] = ()
    """Families of the columns of a table, one for each (family columns); categorical for categories."""
    missing: bool = False
    """The data may hold nan where a number is missing at random."""
    scale: float = 0.1
    """Standard deviation of fixed_scale_normal, in the unit of x (bytes are scaled to [0, 1])."""
    min_scale: float = 1e-3
    """Lower bound of the scales of normals (but fixed_scale_normal), laplace and student_t."""
    rank: int = 5
    """Directions of correlation of low_rank_normal."""
    posterior: Annotated[
        str | None, _help("q(z|x); default: the one that goes with the prior.", POSTERIORS)
    ] = None
    init: Annotated[str, _help("Initial weights (mlp, gated).", choices.INITS)] = "glorot"
    bias_from_data: bool = False
    """Start the decoder's output bias at the mean of the training data."""

    algorithm: Annotated[str, _help("How model and guide are trained.", choices.ALGORITHMS)] = "svi"
    objective: Annotated[
        str | None,
        _help(
            "What svi maximises; default: elbo_analytic_kl for posterior diag_normal, else elbo.",
            choices.OBJECTIVES,
        ),
    ] = None
    num_particles: int = 1
    """Draws of z for every datum and step: the paper's L, the K of weighted objectives."""
    gradient: Annotated[str, _help("Of iwae.", choices.GRADIENTS)] = "plain"
    alpha: float = 0.5
    """Order of the Renyi bound: 0 is iwae, 1 elbo."""
    free_nats: float = 0.5
    """KL that is free in every latent dimension (free_bits)."""
    weight_prior: bool = False
    """Add log N(w; 0, I) of the networks' weights to the objective, in nats: the paper's MAP."""
    beta: float = 1.0
    """Weight of the KL term, after the warm-up: 1 is the bound (elbo, elbo_analytic_kl)."""
    kl_warmup: int = 0
    """Epochs over which the weight of the KL term rises to its value (elbo, elbo_analytic_kl)."""

    optimizer: Annotated[str, _help("Of torch.optim.", choices.OPTIMIZERS)] = "adam"
    learning_rate: float = 1e-3
    """Step size of the optimiser."""
    schedule: Annotated[str, _help("Learning rate over epochs.", choices.SCHEDULES)] = "constant"
    batch_size: int = 100
    """Data in a step."""
    epochs: int = 500
    """Passes through the training data."""
    epoch_size: int = 0
    """Draw so many training data an epoch, with replacement; 0: every one, once."""
    patience: int = 0
    """Stop after so many epochs without a better bound on the validation data; 0: never. A run that
    stopped goes on when it is resumed with more."""
    test_samples: int = 1000
    """Importance samples for log p(x) of every test datum, at the end."""

    seed: int = 0
    """Seed of initial weights, noise and order of the data. The splits do not depend on it."""
    device: Annotated[str, _help("Where to compute.", choices.DEVICES)] = "auto"
    tensorboard: bool = False
    """Also write metrics for TensorBoard into the run folder (extra: tensorboard)."""

    @property
    def chosen_prior(self) -> str:
        """The prior, by default the one that goes with the model."""
        return self.prior or SYSTEMS[self.model or "vae"].prior

    @property
    def system(self) -> System:
        """The system, by default the one that goes with the prior."""
        return SYSTEMS[self.model or PRIORS[self.chosen_prior].system]

    @property
    def chosen_posterior(self) -> str:
        """The posterior, by default the one that goes with the prior."""
        return self.posterior or PRIORS[self.chosen_prior].posterior

    @property
    def chosen_test_samples(self) -> int:
        """Importance samples at the end; all are the same where a guide has one z for every datum."""
        return self.test_samples if self.system.draws else 1

    @property
    def chosen_objective(self) -> str:
        """The objective, by default the bound, with its KL in closed form where the posterior has one."""
        return self.objective or ("elbo_analytic_kl" if self.chosen_posterior == "diag_normal" else "elbo")

    @property
    def chosen_binarization(self) -> str:
        """The binarisation, by default what the family needs."""
        return self.binarization or ("dynamic" if self.family == "bernoulli" else "none")

    def __post_init__(self) -> None:
        self._check_values()
        for reason in self._misfits():
            raise ConfigError(reason)

    def _check_values(self) -> None:
        for field, names in _NAMES.items():
            if (value := getattr(self, field)) not in names and not (field in _OPTIONAL and value is None):
                raise ConfigError(unknown(field, value, names))
        for field in _AT_LEAST_1:
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, not {getattr(self, field)} ({flag(field)})")
        for field in ("kl_warmup", "patience", "epoch_size", "seed", "free_nats", "beta"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                what = "not be negative, but is" if value < 0 else "be finite, not"
                raise ConfigError(f"{field} must {what} {value} ({flag(field)})")
        for field in (*_AT_LEAST_1, "kl_warmup", "patience", "epoch_size", "seed"):
            if getattr(self, field) >= 2**31:
                raise ConfigError(f"{field} must be below 2,147,483,648, not {getattr(self, field)}")
        for field in ("scale", "min_scale", "learning_rate"):
            if not 0 < (value := getattr(self, field)) < math.inf:
                raise ConfigError(f"{field} must be positive and finite, not {value} ({flag(field)})")
        if self.min_scale >= 1:
            raise ConfigError(f"min_scale must be below 1, not {self.min_scale} (--min-scale)")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha must be finite, not {self.alpha} ({flag('alpha')})")
        if any(units < 1 for units in (*self.hidden, *self.channels)):
            raise ConfigError(
                f"hidden layers need at least one unit or channel each, not {self.hidden} and {self.channels}"
            )

    def _misfits(self) -> Iterator[str]:
        """Parts that do not go together, and why."""
        prior, posterior, objective = self.chosen_prior, self.chosen_posterior, self.chosen_objective
        family, latents = FAMILIES[self.family], PRIORS[prior]
        if self.system is not SYSTEMS[latents.system]:
            fitting = ", ".join(name for name, row in PRIORS.items() if row.system == self.model)
            yield f"model {self.model} does not go with prior {prior}: leave one out. It has {fitting}"
        if self.kl_warmup > self.epochs:
            yield (
                f"a warm-up over {self.kl_warmup} epochs does not end within {self.epochs}: the bound itself "
                "would never be maximised"
            )
        if (self.kl_warmup or self.beta != 1) and objective not in ("elbo", "elbo_analytic_kl"):
            yield f"kl_warmup and beta weigh the KL term of a bound, and {objective} has none: use elbo"
        if self.algorithm == "wake_sleep" and (
            self.objective or self.beta != 1 or self.kl_warmup or self.num_particles != 1
        ):
            yield (
                "objective, num_particles, beta and kl_warmup say what algorithm svi maximises; wake_sleep "
                "has no objective: leave them out"
            )
        if self.family != "bernoulli" and self.chosen_binarization in ("dynamic", "fixed", "threshold"):
            yield (
                f"binarization {self.binarization!r} makes bits, of which {self.family} is no distribution: "
                "use family bernoulli, or binarization none"
            )
        if self.chosen_binarization == "dequantize" and (family.values in ("bits", "levels", "counts")):
            yield (
                f"binarization 'dequantize' makes real numbers, of which {self.family} is no density: use a "
                "density such as continuous_bernoulli, or binarization none"
            )
        own = {row.posterior for row in PRIORS.values()} - {"diag_normal"}
        if posterior != latents.posterior and {posterior, latents.posterior} & own:
            yield (
                f"prior {prior} and posterior {posterior} are of different values: uniform_box goes "
                "with logit_normal, sphere with projected_normal, flat with point_mass, codes and "
                "transformer with nearest_code, all others with the rest"
            )
        if prior == "sphere" and self.latent_dim not in (2, 3, 4):
            yield f"prior sphere has a density in 2, 3 or 4 dimensions, not in {self.latent_dim}"
        flows = {"affine_coupling", "spline_coupling", "masked_autoregressive", "iaf", "spline", "sylvester"}
        if self.latent_dim == 1 and (one := flows & {prior, posterior}):
            yield f"{one.pop()} is a flow of at least 2 latent dimensions"
        if objective == "elbo_analytic_kl" and posterior != "diag_normal":
            yield (
                f"the KL of posterior {posterior} has no closed form: use objective elbo, with the KL at "
                "draws"
            )
        if prior.startswith("vamp") and self.condition_on_labels:
            yield (
                f"prior {prior} is a mixture of posteriors at pseudo-inputs, which have no labels, but "
                "this posterior is given labels (condition_on_labels): use mixture_of_normals"
            )
        yield from self.system.misfits(self)
        if not POSTERIORS[posterior].has_inverse:
            needs = {
                prior.startswith("vamp"): f"prior {prior}",
                self.gradient != "plain": f"gradient {self.gradient}",
                objective == "reweighted_wake_sleep": "objective reweighted_wake_sleep",
                self.algorithm == "wake_sleep": "algorithm wake_sleep",
            }
            if True in needs:
                yield (
                    f"{needs[True]} needs the posterior's density of given z, which {posterior} lacks: "
                    "its transforms have no inverse. Use posterior iaf or spline"
                )
        if self.gradient != "plain" and objective != "iwae":
            yield (
                f"gradient {self.gradient} is one of objective iwae, not of {objective} (the ELBO: iwae with "
                "--num-particles 1)"
            )
        if (self.family == "columns") != bool(self.columns):
            yield "family columns needs --columns, a family for every column, and the other way round"
        for name in self.columns:
            if name != CATEGORICAL and (name not in FAMILIES or name == "columns"):
                yield unknown("family of a column", name, [CATEGORICAL, *FAMILIES])
        if self.net in ("conv", "residual_conv") and (self.missing or self.columns):
            yield f"net {self.net} is for complete images: use mlp or gated"
        if self.missing and self.chosen_binarization != "none":
            yield (
                f"data with missing numbers are taken as they are: binarization must be none, not "
                f"{self.chosen_binarization}"
                if self.binarization
                else "data with missing numbers are taken as they are, but family bernoulli, which is the "
                "default, binarises them: name the --family of the numbers, such as diag_normal; for bits "
                "say --binarization none"
            )
        if self.missing and self.family == "low_rank_normal":
            yield "numbers can be missing where they are independent given z: not in a low_rank_normal"
        if self.missing and prior.startswith("vamp"):
            yield f"pseudo-inputs of prior {prior} start at data, and here numbers of data are missing"
        if self.bias_from_data and self.family == "grey_categorical":
            yield "bias_from_data: a mean does not say the probabilities of grey_categorical"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the prior that was chosen, which implies the model."""
        model = None if self.model == PRIORS[self.chosen_prior].system else self.model
        values = dataclasses.asdict(self) | {"prior": self.chosen_prior, "model": model}
        for name in (name for name, default in SINCE_0_2.items() if values[name] == default):
            del values[name]
        paths = {name: values[name] and str(values[name]) for name in PATHS}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | lists | paths

    @classmethod
    def from_dict(cls, values: object) -> "Config":
        """From what :meth:`to_dict` returned; raises :class:`ConfigError` if it is something else."""
        if not isinstance(values, dict):
            raise ConfigError(f"a configuration is a table of values, not {type(values).__name__}")
        try:
            return records.parse(json.dumps(values), cls)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None


def flag(field: str) -> str:
    """A field as the command line calls it."""
    return "--" + field.replace("_", "-")


_NAMES = {
    "algorithm": choices.ALGORITHMS,
    "binarization": choices.BINARIZATIONS,
    "net": choices.NETS,
    "model": SYSTEMS,
    "prior": PRIORS,
    "family": FAMILIES,
    "posterior": POSTERIORS,
    "init": choices.INITS,
    "objective": choices.OBJECTIVES,
    "gradient": choices.GRADIENTS,
    "optimizer": choices.OPTIMIZERS,
    "schedule": choices.SCHEDULES,
}
# Settings that runs of versions before 0.2 lack, by whose values they are known: left out at these.
SINCE_0_2 = {"model": None, "min_scale": 1e-3, "epoch_size": 0}
_OPTIONAL = ("binarization", "model", "prior", "posterior", "objective")
_AT_LEAST_1 = (
    *("latent_dim", "components", "num_codes", "code_dim", "rank", "num_particles", "batch_size", "epochs"),
    "test_samples",
)
PATHS = ("data_dir", "refit_prior")


def with_absolute_paths(config: Config) -> Config:
    """The same with paths that hold in any working directory."""
    data = config.data
    if data not in choices.DATA and Path(data).exists():
        data = str(Path(data).absolute())
    paths = {name: getattr(config, name) for name in PATHS}
    absolute = {name: path and path.expanduser().absolute() for name, path in paths.items()}
    return dataclasses.replace(config, data=data, **absolute)


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that a pair must know of its data, so that a run opens without them.

    Attributes:
        shape: Shape of a datum.
        levels: Largest grey level, by which bytes were divided; 1 if they were not.
        num_classes: Classes that the programs are given; 0 if they are given none.
        categories: One more than the largest number of every column of a table, at least 2.
    """

    shape: tuple[int, ...]
    levels: float
    num_classes: int
    categories: tuple[int, ...]

    @property
    def data_dim(self) -> int:
        """Numbers of a datum."""
        return math.prod(self.shape)

    @property
    def num_levels(self) -> int:
        """Grey levels."""
        return round(self.levels) + 1

    @classmethod
    def of(cls, config: Config, dataset: "Dataset") -> "Facts":
        """Facts of a data set, in so far as this configuration needs them."""
        train = dataset.train
        largest = train.x.nan_to_num(0.0).max(0).values.tolist() if config.columns else []
        return cls(
            tuple(dataset.shape),
            float(train.levels),
            1 + int(train.labels.max()) if config.condition_on_labels else 0,
            tuple(max(2, round(most) + 1) for most in largest),
        )
