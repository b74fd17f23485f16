import copy
import math

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.distributions import Missing, check_support, same_support, soft_clamp
from pyro_vae.distributions.posteriors import DiagNormalMixture
from pyro_vae.distributions.splines import RationalQuadratic


def of_family(family, dim=2):
    return pv.Conditional(pv.MLP(5, family.num_params(dim), (8,)), family)


UNIT = torch.linspace(0, 1, 200_001, dtype=torch.float64)
LINE = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)
COUNTS = torch.arange(20_000, dtype=torch.float64)
LEVELS = torch.arange(256, dtype=torch.float64) / 255
ETAS = [-30.0, -2.0, -1e-4, 0.0, 5e-4, 2e-3, 1.0, 30.0]
FEW = [-2.0, 0.0, 1.0]
FAMILIES = {  # of independent numbers: family, all values of a number, first parameters to try
    "bernoulli": (pv.Bernoulli(), BITS, ETAS),
    "continuous_bernoulli": (pv.ContinuousBernoulli(), UNIT, ETAS),
    "diag_normal": (pv.DiagNormal(), LINE, ETAS),
    "sigmoid_normal": (pv.DiagNormal(squash_loc=True), LINE, ETAS),
    "fixed_scale_normal": (pv.FixedScaleNormal(0.7), LINE, ETAS),
    "shared_scale_normal": (pv.SharedScaleNormal(scale=0.6), LINE, ETAS),
    "laplace": (pv.Laplace(), LINE, FEW),
    "student_t": (pv.StudentT(30.0), LINE, FEW),
    "discretized_logistic": (pv.DiscretizedLogistic(), LEVELS, ETAS),
    "logistic_mixture": (pv.DiscretizedLogistic(17, 3), torch.arange(17) / 16, ETAS),
    "grey_categorical": (pv.GreyCategorical(17), torch.arange(17) / 16, ETAS),
    "beta_binomial": (pv.BetaBinomial(), LEVELS, ETAS),
    "poisson": (pv.Poisson(), COUNTS, [-30.0, *FEW, 6.0]),
    "negative_binomial": (pv.NegativeBinomial(), COUNTS, [-30.0, *FEW, 6.0]),
    "zero_inflated_negative_binomial": (pv.ZeroInflatedNegativeBinomial(), COUNTS, [-30.0, *FEW, 6.0]),
    "categorical": (pv.Categorical(4), COUNTS[:4], ETAS),
}
VECTORS = {  # of vectors whose numbers depend on each other: how to make them for so many dimensions
    "full_normal": lambda _: pv.FullNormal(),
    "low_rank_normal": lambda _: pv.LowRankNormal(2),
    "normal_mixture": lambda _: pv.NormalMixture(3),
    "inverse_autoregressive": pv.inverse_autoregressive,
    "spline_autoregressive": pv.spline_autoregressive,
    "affine_coupling": pv.affine_coupling,
    "spline_coupling": pv.spline_coupling,
    "masked_autoregressive": pv.masked_autoregressive,
}
PRIORS = {
    "standard_normal": pv.StandardNormal,
    "uniform_box": lambda dim: pv.UniformBox(dim, -2.0, 3.0),
    "mixture_of_normals": pv.MixtureOfNormals,
    "laplace": lambda dim: pv.Unconditional(pv.Laplace(), dim),
    "learned_normal": lambda dim: pv.Unconditional(pv.DiagNormal(), dim, learned=True),
    "student_t": lambda dim: pv.Unconditional(pv.StudentT(30.0), dim),
    "affine_coupling": lambda dim: pv.Unconditional(pv.affine_coupling(dim), dim),
    "spline_coupling": lambda dim: pv.Unconditional(pv.spline_coupling(dim), dim),
    "masked_autoregressive": lambda dim: pv.Unconditional(pv.masked_autoregressive(dim), dim),
    "vamp": lambda dim: pv.VampPrior(of_family(pv.DiagNormal(), dim), torch.rand(7, 5)),
}


def grid_line(name):
    """Where to sum a density; splines have kinks, and are the identity outside of [-5, 5]."""
    end, count = (7, 1001) if name == "spline_coupling" else (12, 601)
    return torch.linspace(-end, end, count).double()


@pytest.mark.parametrize(("name", "eta"), [(name, eta) for name in FAMILIES for eta in FAMILIES[name][2]])
def test_family_is_normalised(name, eta):
    family, points, _ = FAMILIES[name]
    parameters = torch.full((1, family.params_per_dim), eta, dtype=torch.float64)
    parameters[0, 1:] = torch.linspace(0.3, -0.5, family.params_per_dim - 1)
    density = family(parameters).log_prob(points.double().unsqueeze(-1)).exp()
    total = density.sum() if len(points) <= len(COUNTS) else torch.trapezoid(density, points)
    # The mean of a beta-binomial is kept 1e-4 from the ends, and its log gammas are of size 1e3.
    assert total.item() == pytest.approx(1, abs=1e-6)


def mass_on_a_grid(density, line):
    grid = torch.cartesian_prod(line, line).float()
    inside = density.support.check(grid)
    return (density.log_prob(grid).exp().double() * inside).sum().item() * (line[1] - line[0]).item() ** 2


@pytest.mark.parametrize("name", PRIORS)
def test_prior_is_normalised(name):
    torch.manual_seed(1)
    prior = PRIORS[name](2)()
    assert prior.batch_shape == ()
    assert prior.event_shape == (2,)
    accuracy = 0.03 if name == "uniform_box" else 1e-3
    assert mass_on_a_grid(prior, grid_line(name)) == pytest.approx(1, abs=accuracy)
    assert prior.support.check(prior.sample((50,))).all()


@pytest.mark.parametrize("name", VECTORS)
def test_family_of_vectors_is_normalised(name):
    torch.manual_seed(1)
    family = VECTORS[name](2)
    density = family(0.5 * torch.randn(family.num_params(2)))
    accuracy = 3e-3 if name == "spline_coupling" else 1e-3
    assert mass_on_a_grid(density, grid_line(name)) == pytest.approx(1, abs=accuracy)


def test_the_logit_normal_is_normalised_on_its_interval():
    x = torch.linspace(-1, 2, 100_001, dtype=torch.float64)[1:-1]
    for eta in ([0.0, 0.0], [1.0, -1.0], [-2.0, 1.0]):
        density = pv.LogitNormal(-1.0, 2.0)(torch.tensor(eta, dtype=torch.float64))
        mass = torch.trapezoid(density.log_prob(x.unsqueeze(-1)).exp(), x).item()
        assert mass == pytest.approx(1, abs=1e-5)
        assert density.sample((1000,)).min() > -1
        assert density.support.check(density.sample((5,))).all()


@pytest.mark.parametrize("eta", [[-1e3, 0.0], [1e3, -20.0], [1e3, 1e3], [-6.0, 1e3]])
def test_draws_of_the_logit_normal_keep_their_density_in_float32(eta):
    """An encoder that runs away must not find a place where rounding gives it density for nothing."""
    single = pv.LogitNormal(-1.0, 1.0)(torch.tensor(eta))
    double = pv.LogitNormal(-1.0, 1.0)(torch.tensor(eta, dtype=torch.float64))
    draws, exact = single.sample((20_000,)), double.sample((20_000,))
    assert pv.UniformBox(1, -1.0, 1.0)().log_prob(draws).isfinite().all()
    error = single.log_prob(draws).mean().item() - double.log_prob(exact).mean().item()
    assert abs(error) < 0.1


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_the_projected_normal_is_normalised_on_its_sphere(dim):
    torch.manual_seed(0)
    area = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    uniform = torch.nn.functional.normalize(torch.randn(400_000, dim, dtype=torch.float64), dim=-1)
    eta = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=torch.float64)[:dim]
    density = pv.ProjectedNormal()(eta).log_prob(uniform).exp()
    assert area * density.mean().item() == pytest.approx(1, abs=0.01)
    at_zero = pv.Unconditional(pv.ProjectedNormal(), dim)().log_prob(uniform[:5].float())
    torch.testing.assert_close(at_zero, torch.full((5,), -math.log(area)))


@pytest.mark.parametrize("flow", [pv.planar, pv.sylvester])
def test_flows_without_an_inverse_know_the_density_of_their_draws(flow):
    torch.manual_seed(0)
    family = flow(2)
    density = family.double()(0.3 * torch.randn(family.num_params(2), dtype=torch.float64))
    # E_q[u(z) / q(z)] = 1 for any density u inside of q's support.
    inside = dist.Normal(density.sample((1000,)).mean(0), 0.5).to_event(1)
    z = density.rsample((100_000,))
    ratio = (inside.log_prob(z) - density.log_prob(z)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / len(ratio) ** 0.5)
    assert ratio.std() / len(ratio) ** 0.5 < 0.02


@pytest.mark.parametrize("name", [*FAMILIES, *VECTORS])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_batch_shape_is_the_leading_shape(name, leading):
    family = FAMILIES[name][0] if name in FAMILIES else VECTORS[name](5)
    density = pv.Conditional(pv.MLP(4, family.num_params(5)), family)(torch.randn(*leading, 4))
    assert density.batch_shape == leading
    assert density.event_shape == (5,)
    assert density.sample().shape == (*leading, 5)
    assert density.expand((6, *leading)).sample().shape == (6, *leading, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_the_moments_and_lie_in_the_support(name):
    family = FAMILIES[name][0]
    density = family(torch.linspace(-1, 0.5, 3 * family.params_per_dim))
    draws = density.sample((40_000,))
    check_support(density, draws)
    error = draws.std(0) / 200
    assert ((draws.mean(0) - density.mean).abs() < 5 * error).all()
    squares = (draws - density.mean).square()
    known = density.variance.isfinite()  # Student's t may have none
    assert ((squares.mean(0) - density.variance).abs() < 5 * squares.std(0) / 200)[known].all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "categorical"])
def test_draws_follow_the_density(name):
    """The mean log-density of draws is minus the entropy, which a sum over all values gives."""
    family, points, _ = FAMILIES[name]
    parameters = torch.linspace(-0.8, 0.5, family.params_per_dim, dtype=torch.float64)
    density = family.double()(parameters)
    family.float()
    log_prob = density.log_prob(points.double().unsqueeze(-1))
    summed = torch.where(log_prob > -700, log_prob, 0.0) * log_prob.exp()
    exact = summed.sum() if len(points) <= len(COUNTS) else torch.trapezoid(summed, points)
    drawn = density.log_prob(density.sample((40_000,)))
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / 200 + 1e-9


@pytest.mark.parametrize(
    "role", [f"family {name}" for name in (*FAMILIES, *VECTORS)] + [f"prior {n}" for n in PRIORS]
)
def test_gradient_reaches_every_parameter_and_state_dict_restores_it(role):
    role, name = role.split()
    if role == "prior":
        module, arguments, x = PRIORS[name](3), (), torch.rand(7, 3)
    else:
        family = FAMILIES[name][0] if name in FAMILIES else VECTORS[name](3)
        module = pv.Conditional(pv.MLP(4, family.num_params(3), (6,)), family)
        arguments, x = (torch.randn(7, 4),), torch.rand(7, 3).round()
    log_prob = module(*arguments).log_prob(x)
    log_prob.sum().backward() if log_prob.requires_grad else None
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    module.load_state_dict(state)
    torch.testing.assert_close(module(*arguments).log_prob(x), log_prob, rtol=0, atol=0)


@pytest.mark.parametrize("logit", [-50.0, -20.0, -3.0, -1e-3, -1e-5, 0.0, 1e-4, 1e-2, 5.0, 20.0, 50.0])
def test_continuous_bernoulli_is_exact_in_float32(logit):
    exact_logit = torch.tensor(logit, dtype=torch.float64)
    # integral of exp(logit * x) over [0, 1], and the density is exp(logit * x) over it
    integral = torch.special.expm1(exact_logit) / exact_logit if logit else torch.tensor(1.0).double()
    x = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    exact = exact_logit * x - integral.log()
    ours = pv.ContinuousBernoulli()(torch.tensor([logit])).base_dist.log_prob(x.float())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_continuous_bernoulli_is_exact_around_zero_in_float64():
    logits = torch.tensor([-9e-4, 1e-4, 9.9e-4, 1.1e-3, 0.1], dtype=torch.float64)
    x = torch.tensor(0.25, dtype=torch.float64)
    exact = logits * x - (torch.special.expm1(logits) / logits).log()
    ours = pv.ContinuousBernoulli()(logits).base_dist.log_prob(x)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("logit", [-80.0, -30.0, -2.0, 0.0, 1e-4, 2.0, 30.0, 80.0])
def test_continuous_bernoulli_draws_what_it_is_a_density_of(logit):
    density = pv.ContinuousBernoulli()(torch.tensor([logit], dtype=torch.float64)).base_dist
    probabilities = density.log_prob(UNIT).exp()
    mean = torch.trapezoid(UNIT * probabilities, UNIT).item()
    assert density.mean.item() == pytest.approx(mean, abs=1e-6)
    below = torch.cumulative_trapezoid(probabilities, UNIT)
    at = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    quantiles = UNIT[1:][torch.searchsorted(below, at)]
    torch.testing.assert_close(density.icdf(at), quantiles, atol=1e-5, rtol=0)
    draws = pv.ContinuousBernoulli()(torch.tensor([logit])).sample((40_000,))
    assert draws.mean().item() == pytest.approx(mean, abs=5 * draws.std().item() / 200)


@pytest.mark.parametrize("log_shape", [3.0, 9.0, 13.0, 20.0])
def test_negative_binomials_of_any_shape_are_exact_in_float32(log_shape):
    eta = torch.tensor([math.log(5.0), log_shape])
    x = torch.arange(30.0).unsqueeze(-1)
    for family, parameters in (
        (pv.NegativeBinomial(), eta),
        (pv.ZeroInflatedNegativeBinomial(), torch.cat([eta, torch.tensor([-60.0])])),
    ):
        exact = family(parameters.double()).log_prob(x.double())
        torch.testing.assert_close(family(parameters).log_prob(x).double(), exact, atol=1e-4, rtol=1e-5)
    # A mean of 5 and next to no variance beyond: Poisson's.
    if log_shape == 20.0:
        torch.testing.assert_close(
            pv.NegativeBinomial()(eta).log_prob(x), pv.Poisson()(eta[:1]).log_prob(x), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("count", [1e3, 1e5, 1e6])
def test_large_counts_of_a_poisson_do_not_cancel(count):
    eta, x = torch.tensor([math.log(count)]), count + torch.tensor([[-3.0], [0.0], [3.0]]) * count**0.5 // 1
    exact = pv.Poisson()(eta.double()).log_prob(x.double())
    torch.testing.assert_close(pv.Poisson()(eta).log_prob(x).double(), exact, atol=4e-3, rtol=0)


def test_continuous_bernoulli_has_finite_gradients_everywhere():
    logits = torch.tensor([-80.0, -1e-3, -1e-4, 0.0, 1e-4, 1e-3, 80.0], requires_grad=True)
    x = torch.tensor(0.3)
    pv.ContinuousBernoulli()(logits).base_dist.log_prob(x).sum().backward()
    # d/dlogit = x - E[x], and E[x] = 1/2 + logit/12 + ... near 0
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad[1:6], torch.full((5,), -0.2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("log_variance", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_scales_stay_within_their_bounds(log_variance):
    family = pv.DiagNormal(min_scale=0.01, max_scale=10.0)
    eta = torch.tensor([0.0, log_variance], dtype=torch.float64, requires_grad=True)
    scale = family(eta).base_dist.scale
    assert 0.01 * (1 - 1e-3) <= scale.item() <= 10.0 + 1e-12
    assert torch.autograd.grad(scale.log().sum(), eta)[0].isfinite().all()


def test_a_scale_beyond_its_bound_can_come_back():
    eta = torch.tensor([0.0, 2 * (math.log(10.0) + 2)], dtype=torch.float64, requires_grad=True)
    scale = pv.DiagNormal(min_scale=0.01, max_scale=10.0)(eta).base_dist.scale
    assert torch.autograd.grad(scale.log().sum(), eta)[0][1] > 0.01


@pytest.mark.parametrize("scale", [0.0011, 0.01, 0.6, 1.0, 100.0, 900.0])
def test_a_shared_scale_starts_where_it_is_told(scale):
    found = pv.SharedScaleNormal(scale=scale)(torch.zeros(1)).base_dist.scale.item()
    assert found == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("df", [1.001, 5.0, 1e5])
def test_degrees_of_freedom_start_where_they_are_told(df):
    assert pv.StudentT(df)(torch.zeros(2)).base_dist.df.item() == pytest.approx(df, rel=1e-5)


def test_soft_clamp_is_the_identity_inside():
    value = torch.linspace(-10, 10, 201, dtype=torch.float64)
    assert (soft_clamp(value, -20.0, 20.0) - value).abs().max() < 2 * math.exp(-10)


WITHOUT_BIAS = ("grey_categorical", "categorical")  # of which no mean determines the parameters


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_BIAS])
def test_bias_starts_at_the_mean(name):
    family = FAMILIES[name][0]
    mean = torch.tensor([0.05, 0.5, 0.9])
    assert family.bias(mean).shape == (family.num_params(3),)
    start = family(family.bias(mean)).mean
    if name in ("continuous_bernoulli", "discretized_logistic", "logistic_mixture"):
        # Their means are no simple functions of the parameters.
        assert ((start - 0.5).sign() == (mean - 0.5).sign())[[0, 2]].all()
    else:
        torch.testing.assert_close(start, mean)


def test_components_of_a_mixture_start_apart():
    loc = pv.MixtureOfNormals(2, components=3).loc.detach()
    assert torch.pdist(loc).min() > 0.01


def test_mixture_of_one_component_is_its_normal():
    mixture = pv.MixtureOfNormals(2, components=1)
    z = torch.randn(5, 2)
    normal = dist.Normal(mixture.loc[0], 1.0).to_event(1)
    torch.testing.assert_close(mixture().log_prob(z), normal.log_prob(z), atol=1e-2, rtol=0)


def table():
    amount, count, ward = pv.DiagNormal(), pv.Poisson(), pv.Categorical(3)
    return pv.Columns([amount, count, ward, amount]), [amount, count, ward]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.DiagNormal(min_scale=2.0, max_scale=1.0), "min_scale"),
        (lambda: pv.SharedScaleNormal(scale=0.0), "scale must be positive"),
        (lambda: pv.SharedScaleNormal(scale=1.0, max_scale=0.5), "scale must lie"),
        (lambda: pv.LowRankNormal(0), "rank"),
        (lambda: pv.StudentT(1.0), "df"),
        (lambda: pv.DiscretizedLogistic(1), "levels"),
        (lambda: pv.DiscretizedLogistic(components=0), "components must be at least 1"),
        (lambda: pv.Categorical(1), "categories"),
        (lambda: pv.Columns([]), "every column"),
        (lambda: pv.NormalMixture(1), "components must be at least 2"),
        (lambda: pv.ProjectedNormal().num_params(5), "not in 5"),
        (lambda: pv.LogitNormal(1.0, 1.0), "below"),
        (lambda: pv.UniformBox(2, 1.0, 0.0), "below"),
        (lambda: pv.LogitNormal(min_scale=2.0), "min_scale"),
        (lambda: pv.affine_coupling(1), "dim must be at least 2"),
        (lambda: pv.MixtureOfNormals(2, components=0), "components must be at least 1"),
        (lambda: table()[0].num_params(5), "4 columns, but the data have 5"),
        (
            lambda: Missing(pv.LowRankNormal(1))(torch.zeros(1, 12)).log_prob(torch.zeros(1, 4)),
            "LowRank.*are not",
        ),
        (
            lambda: pv.VampPrior(
                pv.Conditional(pv.WithMissing(pv.MLP(10, 4)), pv.DiagNormal()), torch.full((3, 5), math.nan)
            ),
            "nan",
        ),
        (lambda: pv.VampPrior(of_family(pv.planar(2)), torch.rand(3, 5)), "no density of given z"),
        (lambda: pv.VampPrior(of_family(pv.sylvester(2)), torch.rand(3, 5)), "no density of given z"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("family", "x", "words"),
    [
        (pv.Bernoulli(), [[0.0, 0.5]], ["Bernoulli", "0.5", "binarise", "ContinuousBernoulli"]),
        (pv.Bernoulli(), [[0.0, float("nan")]], ["Bernoulli", "nan"]),
        (pv.ContinuousBernoulli(), [[0.0, 200.0]], ["ContinuousBernoulli", "200", "[0, 1]"]),
        (pv.DiagNormal(), [[0.0, float("inf")]], ["Normal", "infinite"]),
        (pv.Bernoulli(), [[0.0, 1.0, 0.0]], ["shape", "(1, 3)", "(2,)"]),
        (pv.Poisson(), [[0.0, 0.5]], ["Poisson", "0.5", "whole numbers", "DiscretizedLogistic", "int64"]),
        (pv.Categorical(3), [[0.0, 3.0]], ["Categorical", "3", "training data", "Categorical(n)"]),
        (pv.NegativeBinomial(), [[0.0, -1.0]], ["NegativeBinomial", "-1", "whole numbers"]),
        (pv.ZeroInflatedNegativeBinomial(), [[0.0, 0.1]], ["ZeroInflated", "0.1", "whole numbers"]),
        (pv.DiscretizedLogistic(), [[0.0, 0.1234]], ["GreyLevels", "0.1234", "levels"]),
        (pv.GreyCategorical(17), [[0.0, 2.0]], ["GreyLevels", "2", "levels"]),
        (pv.LowRankNormal(1), [[0.0, float("nan")]], ["LowRank", "nan", "fill in"]),
        (pv.Bernoulli(cross_entropy=True), [[0.0, 1.5]], ["1.5", "[0, 1]"]),
    ],
)
def test_data_outside_the_support_are_named_with_a_way_out(family, x, words):
    density = family(torch.zeros(1, family.num_params(2)))
    with pytest.raises(pv.SupportError) as error:
        check_support(density, torch.tensor(x))
    for word in words:
        assert word.lower() in str(error.value).lower()


def test_grey_pixels_need_an_explicit_choice():
    grey = torch.tensor([[0.2, 0.8]])
    logits = torch.tensor([[0.4, -1.0]])
    cross_entropy = pv.Bernoulli(cross_entropy=True)(logits)
    check_support(cross_entropy, grey)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, grey, reduction="sum")
    torch.testing.assert_close(cross_entropy.log_prob(grey).sum(), expected)


def test_columns_are_independent_and_of_their_own_families():
    family, (amount, count, ward) = table()
    assert family.num_params(4) == 4 + 1 + 3
    eta = torch.randn(6, 8)
    row = family(eta)
    x = torch.tensor([[0.3, 2.0, 1.0, -1.0]]).expand(6, 4)
    expected = (
        amount(eta[:, :4]).log_prob(x[:, [0, 3]])
        + count(eta[:, 4:5]).log_prob(x[:, 1:2])
        + ward(eta[:, 5:]).log_prob(x[:, 2:3])
    )
    torch.testing.assert_close(row.log_prob(x), expected)
    drawn = row.sample((20_000,))
    check_support(row, drawn)
    torch.testing.assert_close(drawn.mean(0), row.mean, atol=0.15, rtol=0.1)
    torch.testing.assert_close(drawn.var(0), row.variance, atol=0.15, rtol=0.15)
    start = family(family.bias(torch.tensor([1.0, 5.0, 0.0, 2.0]))).mean
    torch.testing.assert_close(start, torch.tensor([1.0, 5.0, 1.0, 2.0]))


def test_a_table_says_which_column_is_wrong():
    family, _ = table()
    row = family(torch.zeros(1, 8))
    for x, words in (
        ([0.3, 2.0, 3.0, -1.0], r"x\[..., \[2\]\] holds values from 3 to 3 .*Categorical.*one less"),
        ([0.3, 2.5, 1.0, -1.0], r"x\[..., \[1\]\] holds values from 2.5 to 2.5 .*Poisson.*whole numbers"),
    ):
        with pytest.raises(pv.SupportError, match=words):
            check_support(row, torch.tensor([x]))


def test_missing_numbers_are_integrated_out():
    family, _ = table()
    eta = torch.randn(5, 8)
    x = torch.tensor([0.3, 2.0, 1.0, -1.0]).expand(5, 4).clone()
    x[:, 2] = float("nan")
    observed = Missing(family)(eta)
    check_support(observed, x)
    values = torch.tensor([0.0, 1.0, 2.0])
    complete = [family(eta).log_prob(torch.cat([x[:, :2], v.expand(5, 1), x[:, 3:]], 1)) for v in values]
    torch.testing.assert_close(observed.log_prob(x), torch.stack(complete).logsumexp(0))
    assert observed.log_prob(torch.full((5, 4), float("nan"))).abs().max() == 0
    with pytest.raises(pv.SupportError, match="infinite"):
        check_support(observed, torch.full((5, 4), float("inf")))


def test_missing_numbers_leave_gradients_finite():
    family = Missing(pv.NegativeBinomial())
    eta = torch.zeros(1, 4, requires_grad=True)
    family(eta).log_prob(torch.tensor([[3.0, float("nan")]])).sum().backward()
    assert eta.grad.isfinite().all()
    assert eta.grad[0, [1, 3]].abs().max() == 0


def test_a_vamp_prior_is_the_mixture_of_posteriors():
    posterior = pv.Conditional(pv.MLP(5, 4, (8,)), pv.DiagNormal())
    inputs = torch.rand(3, 5)
    prior = pv.VampPrior(posterior, inputs)
    z = torch.randn(6, 2)
    expected = torch.stack([posterior(u).log_prob(z) for u in inputs]).logsumexp(0) - math.log(3)
    torch.testing.assert_close(prior().log_prob(z), expected)
    assert [name for name, _ in prior.named_parameters()] == ["inputs"]
    assert not list(pv.VampPrior(posterior, inputs, learned=False).parameters())
    prior().log_prob(z).sum().backward()
    assert posterior.net.layers[0].weight.grad.abs().sum() > 0


def test_what_is_no_category_has_no_probability():
    x = torch.tensor([[0.0], [2.0], [3.0], [-1.0], [1.5]])
    log_prob = pv.Categorical(3)(torch.tensor([0.0, 1.0, 3.0])).log_prob(x)
    assert log_prob.isfinite().tolist() == [True, True, False, False, False]


def test_supports_are_told_apart():
    normal, box = pv.StandardNormal(2)(), pv.UniformBox(2, -1.0, 2.0)()
    for family in VECTORS.values():
        of_family = family(2)
        assert same_support(normal, of_family(torch.zeros(of_family.num_params(2))))
    assert same_support(normal, pv.MixtureOfNormals(2)())
    assert same_support(box, pv.LogitNormal(-1.0, 2.0)(torch.zeros(4)))
    assert not same_support(box, pv.LogitNormal()(torch.zeros(4)))
    assert not same_support(normal, box)
    assert not same_support(normal, pv.ProjectedNormal()(torch.zeros(2)))


def test_shared_scales_of_data_find_their_maximum_likelihood():
    family = pv.SharedScaleNormal()
    x = 0.3 * torch.randn(5000, 2)
    optimizer = torch.optim.Adam(family.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-family(torch.zeros(2)).log_prob(x).mean()).backward()
        optimizer.step()
    found = family(torch.zeros(2)).base_dist.scale[0].item()
    assert found == pytest.approx(x.square().mean().sqrt().item(), rel=0.01)


def test_the_low_rank_normal_has_its_covariance():
    eta = torch.randn(4, 5)
    density = pv.LowRankNormal(2)(eta.flatten())
    w = density.cov_factor
    torch.testing.assert_close(w, eta[2:].T)
    torch.testing.assert_close(density.cov_diag, eta[1].exp(), rtol=1e-2, atol=0)
    covariance = w @ w.T + torch.diag(density.cov_diag)
    exact = torch.distributions.MultivariateNormal(density.loc, covariance)
    x = torch.randn(3, 5)
    torch.testing.assert_close(density.log_prob(x), exact.log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dim", [1, 3])
def test_draws_of_a_mixture_carry_the_gradient_of_expectations(dim):
    """E[(z - a)^3 ...] of a mixture is known; so are its derivatives by weights, means and scales."""
    torch.manual_seed(3)
    parameters = [p.requires_grad_() for p in (torch.randn(4), torch.randn(4, dim), 0.3 + torch.rand(4, dim))]
    logits, loc, scale = parameters
    weights = logits.softmax(-1)
    # E of the sum of squares, plus that of the product of the first and the last dimension's values
    exact = (weights * (loc.square() + scale.square()).sum(-1)).sum()
    if dim > 1:
        exact = exact + (weights * loc[:, 0] * loc[:, -1]).sum()
    exact = torch.autograd.grad(exact, parameters)
    estimates = []
    for _ in range(20):
        z = DiagNormalMixture(*parameters).expand((20_000,)).rsample()
        value = z.square().sum(-1) + (z[:, 0] * z[:, -1] if dim > 1 else 0.0)
        estimates.append(torch.autograd.grad(value.mean(), parameters))
    for expected, found in zip(exact, zip(*estimates, strict=True), strict=True):
        found = torch.stack(found)
        error = found.std(0) / 20**0.5
        assert ((found.mean(0) - expected).abs() < 4.5 * error).all()
        assert error.max() < 0.05 * expected.abs().max()


@pytest.mark.usefixtures("double")
def test_the_derivative_of_a_mixtures_distribution_functions_is_that_of_autograd():
    density = DiagNormalMixture(torch.randn(3), torch.randn(3, 4), 0.2 + torch.rand(3, 4))
    z = density.sample()
    _, by_z = density._distribution_functions(z)
    expected = torch.autograd.functional.jacobian(lambda z: density._distribution_functions(z)[0], z)
    torch.testing.assert_close(by_z, expected)
    one = dist.MixtureSameFamily(
        dist.Categorical(logits=density.log_weights), dist.Normal(density.loc, density.scale).to_event(1)
    )
    torch.testing.assert_close(density.log_prob(z), one.log_prob(z))
    torch.testing.assert_close(density.mean, one.mean)


@pytest.mark.usefixtures("double")
def test_splines_are_inverted_and_have_their_derivatives():
    spline = RationalQuadratic(2 * torch.randn(500, 23), 5.0)
    x = (14 * torch.rand(500) - 7).requires_grad_()
    y, log_derivative = spline(x)
    torch.testing.assert_close(spline.inverse(y), x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), log_derivative)
    assert (y[x.abs() > 5] == x[x.abs() > 5]).all()
    identity, _ = RationalQuadratic(torch.zeros(500, 23), 5.0)(x)
    torch.testing.assert_close(identity, x)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", [name for name in VECTORS if "normal" not in name])
def test_the_density_of_a_draw_is_that_of_its_value(name):
    """Transforms remember what they drew; without it they are inverted."""
    family = VECTORS[name](4).double()
    eta = torch.randn(6, family.num_params(4))
    density = family(eta)
    z = density.rsample()
    again = family(eta).log_prob(z.clone())
    torch.testing.assert_close(density.log_prob(z), again)
    jacobian = torch.autograd.functional.jacobian
    inverse = jacobian(lambda z: _to_base(family(eta[0]), z), z[0])
    base = family(eta[0])
    expected = base.base_dist.log_prob(_to_base(base, z[0])) + inverse.det().abs().log()
    torch.testing.assert_close(again[0], expected)


def _to_base(density, z):
    for transform in reversed(density.transforms):
        z = transform.inv(z)
    return z


def test_an_inverted_flow_is_the_base_density_where_its_transforms_lead():
    flow = pv.masked_autoregressive(4)
    z = torch.randn(6, 4)
    at, log_det = z, 0.0
    for transform in flow.transforms:
        after = transform(at)
        log_det = log_det + transform.log_abs_det_jacobian(at, after)
        at = after
    eta = torch.zeros(8)
    expected = flow.base(eta).log_prob(at) + log_det
    torch.testing.assert_close(flow(eta).log_prob(z), expected)


@pytest.mark.parametrize(
    "family",
    [
        *(
            pv.Bernoulli(),
            pv.Poisson(),
            pv.NegativeBinomial(),
            pv.ZeroInflatedNegativeBinomial(),
            pv.DiagNormal(),
        ),
        *(pv.SharedScaleNormal(scale=0.3), pv.LowRankNormal(2), pv.FullNormal(), pv.StudentT(), pv.Laplace()),
        *(
            pv.FixedScaleNormal(0.3),
            pv.Categorical(3),
            pv.BetaBinomial(3),
            pv.GreyCategorical(3),
            pv.NormalMixture(2),
        ),
        *(pv.DiscretizedLogistic(3), Missing(pv.DiagNormal()), pv.masked_autoregressive(4)),
        *(pv.inverse_autoregressive(4), pv.spline_coupling(4)),
    ],
    ids=lambda family: type(family).__name__,
)
def test_double_precision_is_kept_whatever_the_default_is(family):
    """The same numbers as where all of torch has it: nothing in between is rounded to 32 bits."""
    family = family.double()
    eta = torch.randn(5, family.num_params(4), dtype=torch.float64)
    x = torch.randint(2, (5, 4)).double()
    found, drawn = family(eta).log_prob(x.clone()), family(eta).sample()
    torch.set_default_dtype(torch.float64)
    expected = family(eta).log_prob(x.clone())
    assert found.dtype == drawn.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_counts_that_float_rounds_are_refused():
    poisson = pv.Poisson()(torch.zeros(1, 2))
    check_support(poisson, torch.tensor([[2.0**24, 1.0]]))
    with pytest.raises(pv.SupportError, match=r"above 16777216: use from_array.*float64"):
        check_support(poisson, torch.tensor([[2.0**24 + 2, 1.0]]))
    check_support(poisson, torch.tensor([[2.0**24 + 2, 1.0]], dtype=torch.float64))
