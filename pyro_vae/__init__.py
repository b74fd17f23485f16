"""Auto-Encoding Variational Bayes in Pyro, with log-likelihoods one can trust.

Names are imported when they are first used, so that ``import pyro_vae`` and ``--help`` cost nothing.
"""

import importlib

_HOMES = {
    "algorithms": ["MCEM", "SVI", "PyroSVI", "WakeSleep"],
    "compiled": ["CompiledFunction", "NotCompiledWarning"],
    "data": ["DataError", "Dataset", "batches", "from_array", "load"],
    "distributions": [
        "Bernoulli",
        "BetaBinomial",
        "Categorical",
        "CodePrior",
        "Codebook",
        "Columns",
        "Conditional",
        "ContinuousBernoulli",
        "DiagNormal",
        "DiscretizedLogistic",
        "Family",
        "FixedScaleNormal",
        "Flat",
        "Flow",
        "FullNormal",
        "GreyCategorical",
        "Laplace",
        "LogitNormal",
        "LowRankNormal",
        "Missing",
        "MixtureOfNormals",
        "NegativeBinomial",
        "NormalMixture",
        "PointMass",
        "Poisson",
        "ProjectedNormal",
        "SharedScaleNormal",
        "StandardNormal",
        "StudentT",
        "SupportError",
        "Unconditional",
        "UniformBox",
        "VampPrior",
        "ZeroInflatedNegativeBinomial",
        "affine_coupling",
        "inverse_autoregressive",
        "masked_autoregressive",
        "planar",
        "spline_autoregressive",
        "spline_coupling",
        "sylvester",
    ],
    "latents": ["active_units", "aggregate_posterior", "kl_per_dim"],
    "marginal_likelihood": [
        "LogMarginal",
        "ais",
        "average",
        "bidirectional",
        "bits_per_dim",
        "compare",
        "elbo",
        "enumeration",
        "importance_sampling",
        "inference_gap",
        "load_estimates",
        "quadrature",
        "save_estimates",
    ],
    "models": ["VAEGuide", "VAEModel", "VQGuide", "autoencoder", "bayesian", "draw", "vae", "vq_vae"],
    "nets": [
        "MLP",
        "CausalTransformer",
        "ConvDecoder",
        "ConvEncoder",
        "GridDecoder",
        "GridEncoder",
        "Log1p",
        "WithMissing",
    ],
    "objectives": [
        "MAP",
        "BetaELBO",
        "FreeBitsELBO",
        "ImportanceWeightedELBO",
        "RenyiELBO",
        "ReweightedWakeSleep",
    ],
    "mcmc": ["PosteriorDraws", "sample_posterior"],
    "tasks": [
        "anomaly_score",
        "denoise",
        "inpaint",
        "interpolate",
        "log_missing",
        "mix",
        "restore",
        "super_resolve",
    ],
    "traces": ["log_joint", "log_weights", "sample"],
    "training": [
        "Callback",
        "Checkpoint",
        "EarlyStopping",
        "Evaluate",
        "KLWarmup",
        "LearningRate",
        "NonFiniteError",
        "TensorBoard",
        "fit",
    ],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
