"""Autoencoder and VQ-VAE: quantisation against its formulas, bounds against enumeration."""

import copy
import itertools
import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_vae import (
    SVI,
    BetaELBO,
    CausalTransformer,
    Codebook,
    CodePrior,
    DiagNormal,
    FixedScaleNormal,
    Flat,
    FreeBitsELBO,
    GridDecoder,
    GridEncoder,
    ImportanceWeightedELBO,
    ais,
    autoencoder,
    batches,
    elbo,
    fit,
    importance_sampling,
    load,
    log_weights,
    quadrature,
    sample,
    vae,
    vq_vae,
)
from pyro_vae.distributions import QuantizedPoint, perplexity
from pyro_vae.marginal_likelihood import hmc

K, L, D, X = 3, 2, 2, 5


def parameters_of(*modules):
    return [p for module in modules for p in module.parameters()]


def codes_with(prior=None, decay=0.9):
    model, guide = vq_vae(X, num_codes=K, code_dim=D, length=L, hidden=(6,), decay=decay)
    guide.codebook.vectors.data.normal_()
    if prior is not None:
        model.prior = CodePrior(guide.codebook, L, prior)
    return model, guide


def all_sequences(codebook, length=L):
    codes = torch.tensor(list(itertools.product(range(codebook.num_codes), repeat=length)))
    return codes, codebook(codes)


# ------------------------------------------------------------------------------------ the codebook


def test_the_nearest_code_is_the_nearest():
    codebook = Codebook(20, 3)
    codebook.vectors.normal_()
    z = torch.randn(50, 4 * 3)
    distance = torch.cdist(z.reshape(-1, 3), codebook.vectors)
    assert torch.equal(codebook.nearest(z), distance.argmin(1).reshape(50, 4))
    codes = torch.randint(20, (7, 4))
    assert torch.equal(codebook.nearest(codebook(codes)), codes)


@pytest.mark.usefixtures("double")
def test_moving_averages_follow_the_paper():
    """Counts and sums as van den Oord et al. 2017 keep them, one code at a time, while none is dead."""
    codebook = Codebook(3, 2, decay=0.8)
    codebook.vectors.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]))
    codebook.counts.fill_(10.0)
    counts, sums = codebook.counts.clone(), codebook.vectors * 10.0
    for _ in range(5):
        z = torch.cat([centre + torch.randn(10, 2) for centre in codebook.vectors])[torch.randperm(30)]
        nearest = [min(range(3), key=lambda k, v=v: (v - codebook.vectors[k]).norm()) for v in z]
        for k in range(3):
            mine = z[[n == k for n in nearest]]
            counts[k] = 0.8 * counts[k] + 0.2 * len(mine)
            sums[k] = 0.8 * sums[k] + 0.2 * mine.sum(0)
        codebook.follow(z)
        torch.testing.assert_close(codebook.counts, counts)
        torch.testing.assert_close(codebook.vectors, sums / counts.unsqueeze(1))


def test_vectors_start_at_encodings_and_the_dead_return_to_them():
    codebook = Codebook(8, 2)
    z = 100 + torch.randn(500, 2)
    codebook.follow(z)
    assert (torch.cdist(codebook.vectors, z).amin(1) < 0.1).all()
    alive = codebook.vectors[1:].clone()
    codebook.vectors[0] = -1e6  # nothing is near it
    for _ in range(200):  # 0.99^200 of an even share is above 3 %
        codebook.follow(z)
    assert codebook.vectors[0, 0] < -1e5
    for _ in range(200):
        codebook.follow(z)
    assert codebook.vectors[0, 0] > 90
    assert (codebook.counts > 1).all()
    assert (codebook.vectors[1:] - alive).norm(dim=1).max() < 5


def test_equal_encodings_do_not_make_equal_vectors():
    codebook = Codebook(16, 2)
    codebook.follow(torch.randn(2, 2).repeat(50, 1))
    assert torch.pdist(codebook.vectors).min() > 0


def test_perplexity():
    assert perplexity(torch.arange(8), 8) == pytest.approx(8)
    assert perplexity(torch.zeros(5, 3, dtype=torch.long), 8) == pytest.approx(1)
    counts = torch.tensor([3, 1])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(torch.arange(2).repeat_interleave(counts), 8) == pytest.approx(math.exp(entropy))


# ------------------------------------------------------------------------------------ straight through


def test_gradients_pass_straight_through():
    codebook = Codebook(5, 2)
    encoding = torch.randn(4, 6, requires_grad=True)
    z = QuantizedPoint(encoding, codebook).rsample()
    torch.testing.assert_close(z, codebook(codebook.nearest(encoding)))
    weight = torch.randn(4, 6)
    (weight * z.square()).sum().backward()
    torch.testing.assert_close(encoding.grad, 2 * weight * z.detach())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_loss_is_that_of_the_paper(decay):
    r"""-log p(x|z) + L log K + beta |z_e - sg(e)|^2 (+ |sg(z_e) - e|^2), with its gradients."""
    model, guide = codes_with(decay=decay)
    guide.eval()  # the codebook stands still
    x = torch.rand(7, X).round()
    with pyro.settings.context(module_local_params=True):
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
    parameters = parameters_of(model, guide)
    gradients = torch.autograd.grad(loss, parameters)

    encoding = guide.encoder(x)
    distance = torch.cdist(encoding.reshape(-1, D), guide.codebook.vectors.detach())
    e = guide.codebook.vectors[distance.argmin(1)].reshape(7, L * D)
    logits = model.likelihood.net(encoding + (e - encoding).detach())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    expected = expected + 7 * L * math.log(K) + 0.25 * (encoding - e.detach()).square().sum()
    if decay is None:
        expected = expected + (encoding.detach() - e).square().sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))


def test_only_training_moves_the_codebook():
    model, guide = codes_with()
    x = torch.rand(20, X).round()
    before = guide.codebook.vectors.clone()
    elbo(model, guide, x)
    with torch.no_grad():
        log_weights(model, guide, x, num_samples=2)
    guide.eval()
    log_weights(model, guide, x, num_samples=2)
    assert torch.equal(before, guide.codebook.vectors)
    guide.train()
    SVI(model, guide, torch.optim.Adam(guide.parameters(), lr=1e-3)).step(x)
    assert not torch.equal(before, guide.codebook.vectors)


# ------------------------------------------------------------------------------------ probabilities


def a_transformer(num_codes=K, length=L):
    net = CausalTransformer(num_codes, length, width=8, layers=2, heads=2)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("net", [None, a_transformer])
def test_priors_over_codes_sum_to_one_and_draw_what_they_say(net):
    codebook = Codebook(K, D)
    codebook.vectors.normal_()
    prior = CodePrior(codebook, L, net and net())()
    codes, sequences = all_sequences(codebook)
    probability = prior.log_prob(sequences).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = codebook.nearest(prior.sample((20_000,)))
    shares = (drawn.unsqueeze(1) == codes).all(-1).double().mean(0)
    error = (probability * (1 - probability) / 20_000).sqrt()
    assert ((shares - probability).abs() < 5 * error).all()
    if net is not None:
        assert probability.max() > 2 * probability.min()
    assert prior.log_prob(sequences[:1] + 0.1) == -math.inf
    assert prior.support.check(sequences).all()
    assert not prior.support.check(sequences + 0.1).any()


def test_the_transformer_looks_back_only():
    net = a_transformer(5, 6)
    codes = torch.randint(5, (2, 3, 6))
    logits = net(codes)
    assert logits.shape == (2, 3, 6, 5)
    for place in range(6):
        changed = codes.clone()
        changed[..., place] = (changed[..., place] + 1) % 5
        moved = (net(changed) - logits).abs().amax((0, 1, 3)) > 1e-6
        assert moved.tolist() == [other > place for other in range(6)]


@pytest.mark.parametrize("net", [None, a_transformer])
def test_the_bound_is_a_bound(net):
    """Against log p(x), summed over all sequences of codes; and the two differ by log p(z(x) | x)."""
    model, guide = codes_with(net and net())
    x = torch.rand(9, X).round()
    bound = log_weights(model.eval(), guide.eval(), x, num_samples=3)
    assert torch.equal(bound[0], bound[2])
    _, sequences = all_sequences(guide.codebook)
    likelihood = model.likelihood(sequences.unsqueeze(1)).log_prob(x)
    joint = model.prior().log_prob(sequences).unsqueeze(1) + likelihood
    exact = joint.logsumexp(0)
    assert (bound[0] < exact).all()
    found = importance_sampling(model, guide, x, num_samples=2, progress=False)
    torch.testing.assert_close(found.values, bound[0], check_dtype=False)
    assert f"log p(x) ≥ {found.mean:.2f} nats" in found.summary()
    assert found.monte_carlo_error == 0
    encoding = guide.encoder(x)
    chosen = (guide.codebook(guide.codebook.nearest(encoding)) == sequences.unsqueeze(1)).all(-1)
    torch.testing.assert_close(bound[0], joint.T[chosen.T])


def test_codes_of_another_codebook_are_named():
    model, guide = codes_with()
    model.prior = CodePrior(codes_with()[1].codebook, L)
    found = importance_sampling(model, guide, torch.rand(4, X).round(), num_samples=1, progress=False)
    assert "of 4 data all draws of the guide are impossible" in found.summary()
    with pytest.raises(ValueError, match=r"all \(z\) are discrete: importance_sampling"):
        ais(model, torch.rand(4, X).round(), progress=False)


def test_metrics_are_the_bound_and_what_is_trained_besides():
    model, guide = codes_with()
    x = torch.rand(20, X).round()
    algorithm = SVI(model, guide, torch.optim.SGD(parameters_of(model, guide), lr=0.0))
    algorithm.step(x)
    guide.eval()
    metrics = algorithm.step(x)
    assert metrics["elbo"].item() == pytest.approx(elbo(model, guide, x).elbo.mean().item(), rel=1e-5)
    encoding = guide.encoder(x)
    codes = guide.codebook.nearest(encoding)
    cost = 0.25 * (encoding - guide.codebook(codes)).square().sum(-1).mean()
    assert metrics["commitment"].item() == pytest.approx(cost.item(), rel=1e-5)
    assert metrics["perplexity"].item() == pytest.approx(perplexity(codes, K).item(), rel=1e-5)
    several = SVI(model, guide, algorithm.optimizer, Trace_ELBO(num_particles=3, vectorize_particles=True))
    for name, value in several.step(x).items():
        assert value.item() == pytest.approx(metrics[name].item(), rel=1e-5), name


def test_compiled_steps_are_eager_ones():
    torch.manual_seed(1)
    pair = codes_with(a_transformer())
    x = (torch.rand(40, X) < torch.rand(X)).float()
    for prior_only in (False, True):
        results = []
        for compile_ in (False, "always"):
            model, guide = copy.deepcopy(pair)
            trained = [model.prior] if prior_only else [model, guide]
            optimizer = torch.optim.SGD(parameters_of(*trained), lr=1e-2)
            svi = SVI(model, guide, optimizer, compile=compile_)
            torch.manual_seed(2)
            metrics = [svi.step(x) for _ in range(6)]
            results.append((metrics[-1], model.state_dict(), guide.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------ learning


def test_a_vq_vae_learns_with_most_codes_and_a_prior_improves_its_bound():
    digits = load("digits", binarization="fixed")
    model, guide = vq_vae(64, num_codes=16, code_dim=2, length=6, hidden=(100,))
    optimizer = torch.optim.Adam(parameters_of(model, guide), lr=3e-3)
    history = fit(SVI(model, guide, optimizer), batches(digits.train), 25, progress=False)
    assert history[-1]["train/perplexity"] > 8
    x = digits.test.x
    first = elbo(model, guide, x)
    even = x.new_tensor(6 * math.log(16))
    torch.testing.assert_close(first.kl.float(), even.expand(len(x)))
    model.prior = CodePrior(guide.codebook, 6, CausalTransformer(16, 6, width=16, layers=1))

    def kept():
        return [*parameters_of(guide, model.likelihood), guide.codebook.vectors]

    before = copy.deepcopy(kept())
    guide.eval()
    optimizer = torch.optim.Adam(model.prior.net.parameters(), lr=3e-3)
    fit(SVI(model, guide, optimizer), batches(digits.train), 15, progress=False)
    assert all(map(torch.equal, before, kept()))
    second = elbo(model, guide, x)
    assert second.kl.mean() < first.kl.mean() - 0.5
    torch.testing.assert_close(second.log_likelihood, first.log_likelihood)
    _, observed = sample(model, torch.zeros(200, 64))
    assert (observed["x"].mean((0, 1)) - digits.train.x.mean(0)).abs().max() < 0.15


def test_grids_of_codes():
    encoder, decoder = GridEncoder((7, 6), 3, (4, 5)), GridDecoder(3, (7, 6), 2, (4, 5))
    assert encoder.places == 2 * 2
    x = torch.rand(2, 4, 42)
    assert encoder(x).shape == (2, 4, 4 * 3)
    assert decoder(encoder(x)).shape == (2, 4, 84)
    # A place sees what is near it, and its vector is D numbers side by side.
    dark = torch.zeros(1, 42)
    lit = dark.unflatten(1, (7, 6)).clone()
    lit[0, 6, 5] = 1
    moved = (encoder(lit.flatten(1)) - encoder(dark)).reshape(4, 3).abs().amax(1) > 1e-6
    assert moved.tolist() == [False, False, False, True]
    nets = {"encoder": encoder, "decoder": decoder}
    model, guide = vq_vae(42, num_codes=4, code_dim=3, length=4, family=DiagNormal(), **nets)
    assert log_weights(model, guide, torch.rand(5, 42), num_samples=2).shape == (2, 5)


@pytest.mark.usefixtures("double")
def test_an_autoencoder_maximises_the_likelihood_at_its_codes():
    """A linear one with a normal likelihood: principal components, whatever the codes' scale."""
    x = torch.randn(400, 3) * torch.tensor([3.0, 1.0, 0.2]) @ torch.linalg.qr(torch.randn(3, 3)).Q
    x = x - x.mean(0)
    model, guide = autoencoder(3, 2, hidden=(), family=FixedScaleNormal(1.0))
    optimizer = torch.optim.Adam(parameters_of(model, guide), lr=0.03)
    algorithm = SVI(model, guide, optimizer, compile=False)
    for _ in range(1500):
        metrics = algorithm.step(x)
    smallest = torch.linalg.svdvals(x)[-1].square() / len(x)
    best = -1.5 * math.log(2 * math.pi) - smallest / 2
    assert set(metrics) == {"log_joint"}
    assert metrics["log_joint"].item() == pytest.approx(best.item(), abs=1e-3)


# ------------------------------------------------------------------------------------ refusals


def test_an_autoencoder_has_no_log_marginal():
    model, guide = autoencoder(X, 2)
    x = torch.rand(4, X).round()
    for estimate in (elbo, importance_sampling, lambda m, g, x: log_weights(m, g, x, num_samples=2)):
        with pytest.raises(ValueError, match="point mass"):
            estimate(model, guide, x)
    for estimate in (ais, hmc, quadrature):
        with pytest.raises(ValueError, match=r"flat.*log p\(x\) is not defined"):
            estimate(model, x, progress=False)
    _, proper = vae(X, 2)
    with pytest.raises(ValueError, match="flat"):
        importance_sampling(model, proper, x, progress=False)
    with pytest.raises(ValueError, match="flat"):
        ais(model, x, guide=proper, progress=False)
    assert isinstance(model.prior, Flat)


@pytest.mark.parametrize("objective", [ImportanceWeightedELBO(2), FreeBitsELBO(0.1)])
def test_objectives_that_would_leave_out_the_commitment_cost_say_so(objective):
    model, guide = codes_with()
    algorithm = SVI(model, guide, torch.optim.Adam(guide.parameters()), objective)
    with pytest.raises(ValueError, match=r"commitment.*Trace_ELBO"):
        algorithm.step(torch.rand(3, X).round())


def test_weights_of_the_divergence_keep_the_commitment_cost():
    model, guide = codes_with()
    guide.eval()
    x = torch.rand(20, X).round()
    algorithm = SVI(model, guide, torch.optim.SGD(guide.parameters(), lr=0.0), BetaELBO(0.5))
    loss, _ = algorithm.loss.loss_and_metrics(model, guide, x)
    bound = elbo(model, guide, x)
    cost = SVI(model, guide, torch.optim.SGD(guide.parameters(), lr=0.0)).step(x)["commitment"]
    expected = (-bound.log_likelihood + 0.5 * bound.kl).sum() + 20 * cost
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def bound_with(net):
    model, guide = vq_vae(4, num_codes=8, code_dim=2, length=3)
    model.prior = CodePrior(guide.codebook, 3, net)
    return elbo(model, guide, torch.ones(2, 4))


WRONG = {
    "no code": (lambda: Codebook(0, 2), "must be"),
    "codes of no number": (lambda: Codebook(2, 0), "must be"),
    "a decay of 1": (lambda: Codebook(2, 2, 1.0), "must be"),
    "a decay below 0": (lambda: Codebook(2, 2, -0.1), "must be"),
    "no data": (lambda: vq_vae(0), "data_dim must be at least 1"),
    "no length": (lambda: vq_vae(4, length=0), "length must be at least 1"),
    "no codes": (lambda: vq_vae(4, num_codes=0), "num_codes must be at least 1"),
    "heads": (lambda: CausalTransformer(8, 3, width=10), "4 heads cannot share a width of 10"),
    "a longer net": (lambda: bound_with(CausalTransformer(8, 4)), "for sequences of 4 codes, not 3"),
    "a net of more": (lambda: bound_with(CausalTransformer(16, 3)), "it must give 8 for every code"),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
def test_wrong_sizes_are_explained(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_guide_is_no_codebook():
    with pytest.raises(TypeError, match="codebook"):
        CodePrior(codes_with()[1], 3)
