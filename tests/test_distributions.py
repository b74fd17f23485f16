import copy
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae import (
    MLP,
    Bernoulli,
    Conditional,
    ContinuousBernoulli,
    DiagNormal,
    FixedScaleNormal,
    MixtureOfNormals,
    StandardNormal,
    SupportError,
)
from pyro_vae.distributions import check_support, soft_clamp

UNIT = torch.linspace(0, 1, 200_001, dtype=torch.float64)
LINE = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)
FAMILIES = {
    "bernoulli": (Bernoulli(), BITS),
    "continuous_bernoulli": (ContinuousBernoulli(), UNIT),
    "diag_normal": (DiagNormal(), LINE),
    "sigmoid_normal": (DiagNormal(squash_loc=True), LINE),
    "fixed_scale_normal": (FixedScaleNormal(0.7), LINE),
}
PRIORS = {"standard_normal": StandardNormal, "mixture_of_normals": MixtureOfNormals}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("eta", [-30.0, -2.0, -1e-4, 0.0, 5e-4, 2e-3, 1.0, 30.0])
def test_family_is_normalised(name, eta):
    family, points = FAMILIES[name]
    parameters = torch.full((1, family.params_per_dim), eta, dtype=torch.float64)
    if family.params_per_dim == 2:
        parameters[0, 1] = 0.3
    density = family(parameters).log_prob(points.unsqueeze(-1)).exp()
    total = density.sum() if points is BITS else torch.trapezoid(density, points)
    assert total.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", PRIORS)
def test_prior_is_normalised(name):
    torch.manual_seed(1)
    prior = PRIORS[name](2)()
    assert prior.batch_shape == ()
    assert prior.event_shape == (2,)
    line = torch.linspace(-9, 9, 601)
    density = prior.log_prob(torch.cartesian_prod(line, line)).exp()
    assert density.double().sum().item() * (18 / 600) ** 2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_batch_shape_is_the_leading_shape(name, leading):
    family = FAMILIES[name][0]
    density = Conditional(MLP(4, 5 * family.params_per_dim), family)(torch.randn(*leading, 4))
    assert density.batch_shape == leading
    assert density.event_shape == (5,)


@pytest.mark.parametrize("name", [*FAMILIES, *PRIORS])
def test_gradient_reaches_every_parameter_and_state_dict_restores_it(name):
    if name in PRIORS:
        module, arguments, x = PRIORS[name](3), (), torch.rand(7, 3)
    else:
        family = FAMILIES[name][0]
        module = Conditional(MLP(4, 3 * family.params_per_dim, (6,)), family)
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
    ours = ContinuousBernoulli()(torch.tensor([logit])).base_dist.log_prob(x.float())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_continuous_bernoulli_is_exact_around_zero_in_float64():
    logits = torch.tensor([-9e-4, 1e-4, 9.9e-4, 1.1e-3, 0.1], dtype=torch.float64)
    x = torch.tensor(0.25, dtype=torch.float64)
    exact = logits * x - (torch.special.expm1(logits) / logits).log()
    ours = ContinuousBernoulli()(logits).base_dist.log_prob(x)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_continuous_bernoulli_has_finite_gradients_everywhere():
    logits = torch.tensor([-80.0, -1e-3, -1e-4, 0.0, 1e-4, 1e-3, 80.0], requires_grad=True)
    x = torch.tensor(0.3)
    ContinuousBernoulli()(logits).base_dist.log_prob(x).sum().backward()
    # d/dlogit = x - E[x], and E[x] = 1/2 + logit/12 + ... near 0
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad[1:6], torch.full((5,), -0.2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("log_variance", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_scales_stay_within_their_bounds(log_variance):
    family = DiagNormal(min_scale=0.01, max_scale=10.0)
    eta = torch.tensor([0.0, log_variance], dtype=torch.float64, requires_grad=True)
    scale = family(eta).base_dist.scale
    assert 0.01 * (1 - 1e-3) <= scale.item() <= 10.0 + 1e-12
    assert torch.autograd.grad(scale.log().sum(), eta)[0].isfinite().all()


def test_a_scale_beyond_its_bound_can_come_back():
    eta = torch.tensor([0.0, 2 * (math.log(10.0) + 2)], dtype=torch.float64, requires_grad=True)
    scale = DiagNormal(min_scale=0.01, max_scale=10.0)(eta).base_dist.scale
    assert torch.autograd.grad(scale.log().sum(), eta)[0][1] > 0.01


def test_soft_clamp_is_the_identity_inside():
    value = torch.linspace(-10, 10, 201, dtype=torch.float64)
    assert (soft_clamp(value, -20.0, 20.0) - value).abs().max() < 2 * math.exp(-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_bias_starts_at_the_mean(name):
    family = FAMILIES[name][0]
    mean = torch.tensor([0.05, 0.5, 0.9])
    start = family(family.bias(mean)).mean
    if name == "continuous_bernoulli":  # its mean is no simple function of the logit
        assert ((start - 0.5).sign() == (mean - 0.5).sign()).all()
    else:
        torch.testing.assert_close(start, mean)


def test_components_of_a_mixture_start_apart():
    loc = MixtureOfNormals(2, components=3).loc.detach()
    assert torch.pdist(loc).min() > 0.01


def test_mixture_of_one_component_is_its_normal():
    mixture = MixtureOfNormals(2, components=1)
    z = torch.randn(5, 2)
    normal = dist.Normal(mixture.loc[0], 1.0).to_event(1)
    torch.testing.assert_close(mixture().log_prob(z), normal.log_prob(z), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagNormal(min_scale=0.0), "min_scale"),
        (lambda: DiagNormal(min_scale=2.0, max_scale=1.0), "min_scale"),
        (lambda: FixedScaleNormal(-1.0), "positive"),
        (lambda: MixtureOfNormals(2, components=0), "at least one"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("family", "x", "words"),
    [
        (Bernoulli(), [[0.0, 0.5]], ["Bernoulli", "0.5", "binarise", "ContinuousBernoulli"]),
        (Bernoulli(), [[0.0, float("nan")]], ["Bernoulli", "nan"]),
        (ContinuousBernoulli(), [[0.0, 200.0]], ["ContinuousBernoulli", "200", "[0, 1]"]),
        (DiagNormal(), [[0.0, float("inf")]], ["Normal", "infinite"]),
        (Bernoulli(), [[0.0, 1.0, 0.0]], ["shape", "(1, 3)", "(2,)"]),
        (Bernoulli(cross_entropy=True), [[0.0, 1.5]], ["1.5", "[0, 1]"]),
    ],
)
def test_data_outside_the_support_are_named_with_a_way_out(family, x, words):
    density = family(torch.zeros(1, 2 * family.params_per_dim))
    with pytest.raises(SupportError) as error:
        check_support(density, torch.tensor(x))
    for word in words:
        assert word.lower() in str(error.value).lower()


def test_grey_pixels_need_an_explicit_choice():
    grey = torch.tensor([[0.2, 0.8]])
    cross_entropy = Bernoulli(cross_entropy=True)(torch.tensor([[0.4, -1.0]]))
    check_support(cross_entropy, grey)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([[0.4, -1.0]]), grey, reduction="sum"
    )
    torch.testing.assert_close(cross_entropy.log_prob(grey).sum(), expected)
