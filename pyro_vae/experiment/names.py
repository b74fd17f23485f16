"""The names that configurations are made of, each with a line for ``--help``."""

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
    "dequantize": "for densities: noise spreads each grey level over its bin, drawn anew for every batch",
    "none": "x as it is",
}
PRIORS = {
    "standard_normal": "N(0, I), the paper's",
    "learned_normal": "a normal whose mean and scales are learned",
    "mixture_of_normals": "a learned mixture of --components diagonal normals",
    "vamp": "VampPrior: the mixture of posteriors at --components learned pseudo-inputs",
    "vamp_data": "the same at as many training data",
    "laplace": "a standard Laplace distribution",
    "student_t": "Student's t with learned degrees of freedom",
    "uniform_box": "uniform on [-1, 1] in every dimension",
    "sphere": "uniform on the sphere, for 2, 3 or 4 latent dimensions",
    "affine_coupling": "a RealNVP flow",
    "spline_coupling": "a flow of spline couplings",
    "masked_autoregressive": "a masked autoregressive flow",
    "flat": "none: with it an autoencoder is trained, which has no log p(x)",
    "codes": "even over --num-codes codes, --code-dim numbers each: a VQ-VAE",
    "transformer": "of codes, autoregressive; usually with --refit-prior after codes",
}
FAMILIES = {
    "bernoulli": "bits; grey data are binarised",
    "continuous_bernoulli": "a density of grey values in [0, 1]",
    "diag_normal": "normal, mean and scale of every number computed from z",
    "sigmoid_normal": "the same with the mean squashed into (0, 1), the paper's for Frey Face",
    "fixed_scale_normal": "normal with the scale --scale",
    "shared_scale_normal": "normal with one learned scale",
    "low_rank_normal": "normal with --rank directions of correlation computed from z",
    "laplace": "Laplace, location and scale computed from z",
    "student_t": "Student's t, location and scale computed from z, learned degrees of freedom",
    "discretized_logistic": "grey levels, by a logistic in bins",
    "logistic_mixture": "grey levels, by a mixture of 5 logistics in bins",
    "grey_categorical": "grey levels, a probability for each",
    "beta_binomial": "grey levels, by a beta-binomial",
    "poisson": "counts",
    "negative_binomial": "counts that vary more",
    "zero_inflated_negative_binomial": "counts with extra zeros",
    "columns": "a table: a family for every column, named by --columns",
    "bernoulli_cross_entropy": "cross-entropy of grey values: no likelihood, and labelled so",
}
POSTERIORS = {
    "diag_normal": "diagonal normal, the paper's",
    "full_normal": "normal with a full covariance matrix",
    "mixture": "a mixture of 5 diagonal normals",
    "iaf": "inverse autoregressive flow with context from the encoder",
    "spline": "autoregressive spline flow with context from the encoder",
    "planar": "planar flow with context from the encoder",
    "sylvester": "Sylvester flow, the same for all data",
    "logit_normal": "on a box, for the prior uniform_box",
    "projected_normal": "on a sphere, for the prior sphere",
    "point_mass": "all mass at one z, for the prior flat",
    "nearest_code": "all mass at the nearest codes, for the priors codes and transformer",
}
CATEGORICAL = "categorical"  # of a column only: as many categories as the training data have
OBJECTIVES = {
    "elbo": "the bound with sampled KL, the paper's estimator A",
    "elbo_analytic_kl": "the bound with closed-form KL where there is one, estimator B",
    "free_bits": "the bound whose KL costs nothing below --free-nats a dimension",
    "iwae": "the importance-weighted bound of --num-particles draws",
    "renyi": "the Renyi bound of order --alpha and --num-particles draws",
    "reweighted_wake_sleep": "wake phases for model and guide, --num-particles draws",
}
ALGORITHMS = {
    "svi": "gradients of the objective for model and guide: AEVB",
    "wake_sleep": "the model learns from draws of the guide, the guide from draws of the model",
}
GRADIENTS = {
    "plain": "that of the estimate",
    "stl": "sticking the landing: along the path of the draws only",
    "dreg": "doubly reparameterised",
}
NETS = {
    "mlp": "tanh layers of --hidden units",
    "gated": "the same with gates, as in the VampPrior paper",
    "conv": "convolutions of --channels channels, for images",
    "residual_conv": "the same with residual blocks",
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

GREY_LEVELS = ("discretized_logistic", "logistic_mixture", "grey_categorical", "beta_binomial")
COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
WITHOUT_INVERSE = ("planar", "sylvester")
POSTERIOR_OF = {  # of all others: diag_normal
    "uniform_box": "logit_normal",
    "sphere": "projected_normal",
    "flat": "point_mass",
    "codes": "nearest_code",
    "transformer": "nearest_code",
}
