"""The one table of names: each with its line of ``--help``, how it is made, and what goes with it.

A new prior, family, posterior, ... is one class of the library and one row here. A maker is given the module
of the library that has its class, so that nothing heavy is imported before something is made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A name that a configuration may hold.

    Attributes:
        help: Line of ``--help``.
        make: Maker; its arguments are named at its table. None where nothing is made.
    """

    help: str
    make: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Prior(Choice):
    """A prior: ``make(distributions, config)``, but None where it is made of parts of the guide.

    Attributes:
        posterior: Posterior that has values of the same kind.
        system: System that it belongs to.
        unmapped: Why its z cannot be mapped to all real numbers, as annealing and Appendix D need; empty if
            they can.
    """

    posterior: str = "diag_normal"
    system: str = "vae"
    unmapped: str = ""


@dataclass(frozen=True)
class Family(Choice):
    """A family of p(x | z): ``make(distributions, config, facts)``.

    Attributes:
        values: Kind of data: bits, levels, reals, counts or table.
        is_density: Whether its values are log-probabilities.
    """

    values: str = "reals"
    is_density: bool = True


@dataclass(frozen=True)
class Posterior(Choice):
    """A posterior: ``make(distributions, latent_dim)``, None for codes.

    Attributes:
        has_inverse: Whether it has a density of a given z, not of its own draws alone.
    """

    has_inverse: bool = True


@dataclass(frozen=True)
class Estimator(Choice):
    """An estimator of log p(x), the function of ``marginal_likelihood`` of the same name.

    Attributes:
        most_dimensions: Latent dimensions up to which it serves.
        needs_map: Whether latents must be such as can be mapped to all real numbers.
    """

    most_dimensions: float = math.inf
    needs_map: bool = True


DATA = {
    "digits": Choice("scikit-learn's 1,797 8x8 digits"),
    "mnist": Choice("28x28 digits"),
    "fashion_mnist": Choice("28x28 clothes"),
    "static_mnist": Choice("Larochelle's fixed binarisation"),
    "frey_face": Choice("28x20 frames of a face"),
    "caltech_silhouettes": Choice("28x28 silhouettes"),
    "omniglot": Choice("28x28 characters"),
    "PATH": Choice("your own .npy, .npz or folder of images"),
}
BINARIZATIONS = {
    "dynamic": Choice("bits drawn anew for every batch from the grey values; evaluation uses one draw"),
    "fixed": Choice("one seeded draw"),
    "threshold": Choice("x > 1/2"),
    "dequantize": Choice(
        "for densities: noise spreads each grey level over its bin, drawn anew for every batch"
    ),
    "none": Choice("x as it is"),
}
PRIORS = {
    "standard_normal": Prior("N(0, I), the paper's", lambda d, c: d.StandardNormal(c.latent_dim)),
    "learned_normal": Prior(
        "a normal whose mean and scales are learned",
        lambda d, c: d.Unconditional(d.DiagNormal(), c.latent_dim, learned=True),
    ),
    "mixture_of_normals": Prior(
        "a learned mixture of --components diagonal normals",
        lambda d, c: d.MixtureOfNormals(c.latent_dim, c.components),
    ),
    "vamp": Prior("VampPrior: the mixture of posteriors at --components learned pseudo-inputs"),
    "vamp_data": Prior("the same at as many training data"),
    "laplace": Prior(
        "a standard Laplace distribution", lambda d, c: d.Unconditional(d.Laplace(), c.latent_dim)
    ),
    "student_t": Prior(
        "Student's t with learned degrees of freedom",
        lambda d, c: d.Unconditional(d.StudentT(), c.latent_dim),
    ),
    "uniform_box": Prior(
        "uniform on [-1, 1] in every dimension",
        lambda d, c: d.UniformBox(c.latent_dim, -1.0, 1.0),
        posterior="logit_normal",
    ),
    "sphere": Prior(
        "uniform on the sphere, for 2, 3 or 4 latent dimensions",
        lambda d, c: d.Unconditional(d.ProjectedNormal(), c.latent_dim),
        posterior="projected_normal",
        unmapped="a sphere cannot be mapped to all real numbers",
    ),
    "affine_coupling": Prior(
        "a RealNVP flow", lambda d, c: d.Unconditional(d.affine_coupling(c.latent_dim), c.latent_dim)
    ),
    "spline_coupling": Prior(
        "a flow of spline couplings",
        lambda d, c: d.Unconditional(d.spline_coupling(c.latent_dim), c.latent_dim),
    ),
    "masked_autoregressive": Prior(
        "a masked autoregressive flow",
        lambda d, c: d.Unconditional(d.masked_autoregressive(c.latent_dim), c.latent_dim),
    ),
    "flat": Prior(
        "none: with it an autoencoder is trained, which has no log p(x)",
        lambda d, c: d.Flat(c.latent_dim),
        posterior="point_mass",
        system="autoencoder",
        unmapped="a flat prior is no density",
    ),
    "codes": Prior(
        "even over --num-codes codes, --code-dim numbers each: a VQ-VAE",
        posterior="nearest_code",
        system="vq_vae",
        unmapped="codes are discrete",
    ),
    "transformer": Prior(
        "of codes, autoregressive; usually with --refit-prior after codes",
        posterior="nearest_code",
        system="vq_vae",
        unmapped="codes are discrete",
    ),
}
FAMILIES = {
    "bernoulli": Family("bits; grey data are binarised", lambda d, c, f: d.Bernoulli(), "bits"),
    "continuous_bernoulli": Family(
        "a density of grey values in [0, 1]", lambda d, c, f: d.ContinuousBernoulli()
    ),
    "diag_normal": Family(
        "normal, mean and scale of every number computed from z",
        lambda d, c, f: d.DiagNormal(min_scale=c.min_scale),
    ),
    "sigmoid_normal": Family(
        "the same with the mean squashed into (0, 1), the paper's for Frey Face",
        lambda d, c, f: d.DiagNormal(squash_loc=True, min_scale=c.min_scale),
    ),
    "fixed_scale_normal": Family(
        "normal with the scale --scale", lambda d, c, f: d.FixedScaleNormal(c.scale)
    ),
    "shared_scale_normal": Family(
        "normal with one learned scale", lambda d, c, f: d.SharedScaleNormal(min_scale=c.min_scale)
    ),
    "low_rank_normal": Family(
        "normal with --rank directions of correlation computed from z",
        lambda d, c, f: d.LowRankNormal(c.rank, min_scale=c.min_scale),
    ),
    "laplace": Family(
        "Laplace, location and scale computed from z", lambda d, c, f: d.Laplace(min_scale=c.min_scale)
    ),
    "student_t": Family(
        "Student's t, location and scale computed from z, learned degrees of freedom",
        lambda d, c, f: d.StudentT(min_scale=c.min_scale),
    ),
    "discretized_logistic": Family(
        "grey levels, by a logistic in bins", lambda d, c, f: d.DiscretizedLogistic(f.num_levels), "levels"
    ),
    "logistic_mixture": Family(
        "grey levels, by a mixture of 5 logistics in bins",
        lambda d, c, f: d.DiscretizedLogistic(f.num_levels, 5),
        "levels",
    ),
    "grey_categorical": Family(
        "grey levels, a probability for each", lambda d, c, f: d.GreyCategorical(f.num_levels), "levels"
    ),
    "beta_binomial": Family(
        "grey levels, by a beta-binomial", lambda d, c, f: d.BetaBinomial(f.num_levels), "levels"
    ),
    "poisson": Family("counts", lambda d, c, f: d.Poisson(), "counts"),
    "negative_binomial": Family("counts that vary more", lambda d, c, f: d.NegativeBinomial(), "counts"),
    "zero_inflated_negative_binomial": Family(
        "counts with extra zeros", lambda d, c, f: d.ZeroInflatedNegativeBinomial(), "counts"
    ),
    "columns": Family(
        "a table: a family for every column, named by --columns",
        lambda d, c, f: d.Columns(columns(d, c, f)),
        "table",
    ),
    "bernoulli_cross_entropy": Family(
        "cross-entropy of grey values: no likelihood, and labelled so",
        lambda d, c, f: d.Bernoulli(cross_entropy=True),
        "bits",
        is_density=False,
    ),
}
CATEGORICAL = "categorical"  # of a column only: as many categories as the training data have
POSTERIORS = {
    "diag_normal": Posterior("diagonal normal, the paper's", lambda d, dim: d.DiagNormal()),
    "full_normal": Posterior("normal with a full covariance matrix", lambda d, dim: d.FullNormal()),
    "mixture": Posterior("a mixture of 5 diagonal normals", lambda d, dim: d.NormalMixture(5)),
    "iaf": Posterior(
        "inverse autoregressive flow with context from the encoder",
        lambda d, dim: d.inverse_autoregressive(dim),
    ),
    "spline": Posterior(
        "autoregressive spline flow with context from the encoder",
        lambda d, dim: d.spline_autoregressive(dim),
    ),
    "planar": Posterior(
        "planar flow with context from the encoder", lambda d, dim: d.planar(dim), has_inverse=False
    ),
    "sylvester": Posterior(
        "Sylvester flow, the same for all data", lambda d, dim: d.sylvester(dim), has_inverse=False
    ),
    "logit_normal": Posterior("on a box, for the prior uniform_box", lambda d, dim: d.LogitNormal(-1.0, 1.0)),
    "projected_normal": Posterior("on a sphere, for the prior sphere", lambda d, dim: d.ProjectedNormal()),
    "point_mass": Posterior("all mass at one z, for the prior flat", lambda d, dim: d.PointMass()),
    "nearest_code": Posterior("all mass at the nearest codes, for the priors codes and transformer"),
}
OBJECTIVES = {  # make(objectives, pyro.infer, config, settings of Pyro's own bounds)
    "elbo": Choice(
        "the bound with sampled KL, the paper's estimator A", lambda o, p, c, kwargs: p.Trace_ELBO(**kwargs)
    ),
    "elbo_analytic_kl": Choice(
        "the bound with closed-form KL where there is one, estimator B",
        lambda o, p, c, kwargs: p.TraceMeanField_ELBO(**kwargs),
    ),
    "free_bits": Choice(
        "the bound whose KL costs nothing below --free-nats a dimension",
        lambda o, p, c, kwargs: o.FreeBitsELBO(c.free_nats, c.num_particles),
    ),
    "iwae": Choice(
        "the importance-weighted bound of --num-particles draws",
        lambda o, p, c, kwargs: o.ImportanceWeightedELBO(c.num_particles, c.gradient),
    ),
    "renyi": Choice(
        "the Renyi bound of order --alpha and --num-particles draws",
        lambda o, p, c, kwargs: o.RenyiELBO(c.alpha, c.num_particles),
    ),
    "reweighted_wake_sleep": Choice(
        "wake phases for model and guide, --num-particles draws",
        lambda o, p, c, kwargs: o.ReweightedWakeSleep(c.num_particles),
    ),
}
ALGORITHMS = {
    "svi": Choice("gradients of the objective for model and guide: AEVB"),
    "wake_sleep": Choice("the model learns from draws of the guide, the guide from draws of the model"),
}
GRADIENTS = {
    "plain": Choice("that of the estimate"),
    "stl": Choice("sticking the landing: along the path of the draws only"),
    "dreg": Choice("doubly reparameterised"),
}
NETS = {
    "mlp": Choice("tanh layers of --hidden units"),
    "gated": Choice("the same with gates, as in the VampPrior paper"),
    "conv": Choice("convolutions of --channels channels, for images"),
    "residual_conv": Choice("the same with residual blocks"),
}
INITS = {  # make(nets)
    "glorot": Choice("uniform by fan-in and fan-out, biases 0", lambda nets: nets.glorot),
    "small_normal": Choice("N(0, 0.01^2) everywhere, the paper's", lambda nets: nets.small_normal),
}
SCHEDULES = {
    "constant": Choice("the same rate throughout"),
    "cosine": Choice("falls to 0 by the last epoch"),
}
OPTIMIZERS = {  # make(torch.optim)
    "adagrad": Choice("torch.optim.Adagrad", lambda optim: optim.Adagrad),
    "adam": Choice("torch.optim.Adam", lambda optim: optim.Adam),
    "adamw": Choice("torch.optim.AdamW", lambda optim: optim.AdamW),
    "adamax": Choice("torch.optim.Adamax", lambda optim: optim.Adamax),
    "nadam": Choice("torch.optim.NAdam", lambda optim: optim.NAdam),
    "radam": Choice("torch.optim.RAdam", lambda optim: optim.RAdam),
    "rmsprop": Choice("torch.optim.RMSprop", lambda optim: optim.RMSprop),
    "sgd": Choice("torch.optim.SGD", lambda optim: optim.SGD),
}
ESTIMATORS = {
    "importance_sampling": Estimator(
        "a lower bound, fast; tight where the guide covers the posterior", needs_map=False
    ),
    "ais": Estimator("annealing from prior or guide, a lower bound as tight as one has time for"),
    "bidirectional": Estimator("annealing both ways on data simulated from the model, which certifies ais"),
    "hmc": Estimator(
        "the paper's Appendix D, an upper bound, for few latent dimensions", most_dimensions=5.0
    ),
    "quadrature": Estimator("exact, for up to 3 latent dimensions", most_dimensions=3.0),
}
DEVICES = {
    "auto": Choice("cuda if there is one"),
    "cpu": Choice(""),
    "cuda": Choice(""),
    "cuda:N": Choice("the N-th GPU"),
}


def columns(distributions: Any, config: Any, facts: Any) -> list[Any]:
    """One family for every column of a table, the same object for columns of one kind.

    Raises:
        ConfigError: If the names are not as many as the columns.
    """
    from pyro_vae.lab.config import ConfigError

    if len(config.columns) != facts.data_dim:
        raise ConfigError(f"columns names {len(config.columns)} families, but the data have {facts.data_dim}")
    kinds = [
        (name, count if name == CATEGORICAL else 0)
        for name, count in zip(config.columns, facts.categories, strict=True)
    ]
    families = {
        (name, count): distributions.Categorical(count)
        if name == CATEGORICAL
        else FAMILIES[name].make(distributions, config, facts)
        for name, count in set(kinds)
    }
    return [families[kind] for kind in kinds]
