"""The names of the package: all that ``import pyro_vae`` gives, and where each is defined."""

from . import (
    algorithms as algorithms,
    compiled as compiled,
    data as data,
    distributions as distributions,
    errors as errors,
    lab as lab,
    latents as latents,
    marginal_likelihood as marginal_likelihood,
    mcmc as mcmc,
    models as models,
    nets as nets,
    objectives as objectives,
    oracles as oracles,
    tasks as tasks,
    traces as traces,
    training as training,
)
from .algorithms import (
    MCEM as MCEM,
    SVI as SVI,
    PyroSVI as PyroSVI,
    WakeSleep as WakeSleep,
)
from .compiled import (
    CompiledFunction as CompiledFunction,
    NotCompiledWarning as NotCompiledWarning,
)
from .data import (
    DataError as DataError,
    Dataset as Dataset,
    batches as batches,
    from_array as from_array,
    load as load,
)
from .distributions import (
    Bernoulli as Bernoulli,
    BetaBinomial as BetaBinomial,
    Categorical as Categorical,
    CodePrior as CodePrior,
    Codebook as Codebook,
    Columns as Columns,
    Conditional as Conditional,
    ContinuousBernoulli as ContinuousBernoulli,
    DiagNormal as DiagNormal,
    DiscretizedLogistic as DiscretizedLogistic,
    Family as Family,
    FixedScaleNormal as FixedScaleNormal,
    Flat as Flat,
    Flow as Flow,
    FullNormal as FullNormal,
    GreyCategorical as GreyCategorical,
    Laplace as Laplace,
    LogitNormal as LogitNormal,
    LowRankNormal as LowRankNormal,
    Missing as Missing,
    MixtureOfNormals as MixtureOfNormals,
    NegativeBinomial as NegativeBinomial,
    NormalMixture as NormalMixture,
    PointMass as PointMass,
    Poisson as Poisson,
    ProjectedNormal as ProjectedNormal,
    SharedScaleNormal as SharedScaleNormal,
    StandardNormal as StandardNormal,
    StudentT as StudentT,
    SupportError as SupportError,
    Unconditional as Unconditional,
    UniformBox as UniformBox,
    VampPrior as VampPrior,
    ZeroInflatedNegativeBinomial as ZeroInflatedNegativeBinomial,
    affine_coupling as affine_coupling,
    inverse_autoregressive as inverse_autoregressive,
    masked_autoregressive as masked_autoregressive,
    planar as planar,
    spline_autoregressive as spline_autoregressive,
    spline_coupling as spline_coupling,
    sylvester as sylvester,
)
from .lab import (
    Config as Config,
    ConfigError as ConfigError,
    Run as Run,
    load_run as load_run,
    train as train,
)
from .latents import (
    active_units as active_units,
    aggregate_posterior as aggregate_posterior,
    kl_per_dim as kl_per_dim,
)
from .marginal_likelihood import (
    LogMarginal as LogMarginal,
    ais as ais,
    average as average,
    bidirectional as bidirectional,
    bits_per_dim as bits_per_dim,
    compare as compare,
    elbo as elbo,
    enumeration as enumeration,
    importance_sampling as importance_sampling,
    inference_gap as inference_gap,
    load_estimates as load_estimates,
    quadrature as quadrature,
    save_estimates as save_estimates,
)
from .mcmc import (
    PosteriorDraws as PosteriorDraws,
    sample_posterior as sample_posterior,
)
from .models import (
    VAEGuide as VAEGuide,
    VAEModel as VAEModel,
    VQGuide as VQGuide,
    autoencoder as autoencoder,
    bayesian as bayesian,
    draw as draw,
    vae as vae,
    vq_vae as vq_vae,
)
from .nets import (
    MLP as MLP,
    CausalTransformer as CausalTransformer,
    ConvDecoder as ConvDecoder,
    ConvEncoder as ConvEncoder,
    GridDecoder as GridDecoder,
    GridEncoder as GridEncoder,
    Log1p as Log1p,
    WithMissing as WithMissing,
)
from .objectives import (
    MAP as MAP,
    BetaELBO as BetaELBO,
    FreeBitsELBO as FreeBitsELBO,
    ImportanceWeightedELBO as ImportanceWeightedELBO,
    RenyiELBO as RenyiELBO,
    ReweightedWakeSleep as ReweightedWakeSleep,
)
from .tasks import (
    anomaly_score as anomaly_score,
    denoise as denoise,
    inpaint as inpaint,
    interpolate as interpolate,
    log_missing as log_missing,
    mix as mix,
    restore as restore,
    super_resolve as super_resolve,
)
from .traces import (
    log_joint as log_joint,
    log_weights as log_weights,
    sample as sample,
)
from .training import (
    Callback as Callback,
    Checkpoint as Checkpoint,
    EarlyStopping as EarlyStopping,
    Evaluate as Evaluate,
    KLWarmup as KLWarmup,
    LearningRate as LearningRate,
    NonFiniteError as NonFiniteError,
    TensorBoard as TensorBoard,
    fit as fit,
)

__version__: str
