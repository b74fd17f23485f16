"""Programs made of networks that fit (batch, features) only: jointly as one sample after the other."""

import functools
import itertools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.infer import Trace_MMD
from pyro.nn import PyroModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from toys import parameters

import pyro_vae as pv
from pyro_vae.latents import posterior_mean
from pyro_vae.objectives import FreeBitsELBO
from pyro_vae.traces import draw_pair, takes_samples

pytestmark = pytest.mark.usefixtures("double")

DATA, WIDTH = 6, 8


def split(h, dim=1):
    return h.chunk(2, dim=dim)


BODIES = {  # of (batch, WIDTH), as people write them
    "softmax": lambda n, h: F.softmax(h, dim=1),
    "log_softmax": lambda n, h: nn.LogSoftmax(1)(h),
    "normalize": lambda n, h: F.normalize(h, dim=1),
    "sum": lambda n, h: h.exp() / h.exp().sum(1, keepdim=True),
    "mean": lambda n, h: h - h.mean(1, keepdim=True),
    "max": lambda n, h: h - h.max(1, keepdim=True).values,
    "cumsum": lambda n, h: h.cumsum(1),
    "norm": lambda n, h: h / (1 + torch.linalg.vector_norm(h, dim=1, keepdim=True)),
    "cat": lambda n, h: torch.cat([h[:, :4].tanh(), h[:, 4:]], 1),
    "stack": lambda n, h: torch.stack(split(h), 1).flatten(1).tanh(),
    "chunk": lambda n, h: torch.cat([split(h)[0], split(h)[1].exp()], 1),
    "glu": lambda n, h: F.glu(h.repeat(1, 2), 1),
    "slices": lambda n, h: h[:, :WIDTH] * h[:, :1],
    "roll": lambda n, h: h.roll(1, 1) * h,
    "view": lambda n, h: h.view(-1, 2, 4).transpose(1, 2).reshape(-1, WIDTH).tanh(),
    "view_of_len": lambda n, h: h.view(len(h), -1).tanh(),
    "view_of_sizes": lambda n, h: h.view(h.size(0), h.size(1), 1).squeeze(2).tanh(),
    "permute": lambda n, h: h.reshape(-1, 2, 4).permute(0, 2, 1).flatten(1).sin(),
    "t": lambda n, h: (n.weight @ h.t()).t(),
    "addmm": lambda n, h: torch.addmm(h, h.tanh(), n.weight),
    "einsum": lambda n, h: torch.einsum("bi,ij->bj", h, n.weight),
    "layer_norm": lambda n, h: F.layer_norm(h, h.shape[1:]),
    "group_norm": lambda n, h: n.group_norm(h),
    "instance_norm": lambda n, h: F.instance_norm(h[:, None])[:, 0],
    "batch_norm": lambda n, h: n.batch_norm(h),
    "batch_norm_2d": lambda n, h: n.batch_norm_2d(h.reshape(-1, 2, 2, 2)).reshape(*h.shape),
    "gru": lambda n, h: n.gru(h.reshape(len(h), -1, 2))[0].flatten(1),
    "conv1d": lambda n, h: n.conv1d(h.unsqueeze(1)).squeeze(1),
    "conv2d": lambda n, h: nn.Flatten()(n.conv2d(h.reshape(-1, 2, 2, 2))),
    "attention": lambda n, h: n.attention(*[h.reshape(-1, 2, 4)] * 3)[0].flatten(1),
    "pooling": lambda n, h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "rows": lambda n, h: torch.stack([row * row.sum() for row in h]),
    "any_shape": lambda n, h: h.tanh(),
}
NEIGHBOURS = {
    "softmax": lambda n, h: F.softmax(h, dim=0),
    "mean": lambda n, h: h - h.mean(0),
    "cumsum": lambda n, h: h.cumsum(0),
    "attention": lambda n, h: (h @ h.mT).softmax(-1) @ h,
    "batch_norm": lambda n, h: n.batch_norm_of_batch(h),
    "sort": lambda n, h: h.sort(0).values,
    "flip": lambda n, h: h + h.flip(0),
}


class Net(nn.Module):
    def __init__(self, body, num_in, num_out):
        super().__init__()
        self.body = body
        self.first, self.last = nn.Linear(num_in, WIDTH), nn.Linear(WIDTH, num_out)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.group_norm = nn.GroupNorm(2, WIDTH)
        self.batch_norm, self.batch_norm_2d = nn.BatchNorm1d(WIDTH), nn.BatchNorm2d(2)
        self.batch_norm_of_batch = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.gru = nn.GRU(2, 2, batch_first=True)
        self.conv1d, self.conv2d = nn.Conv1d(1, 1, 3, padding=1), nn.ConvTranspose2d(2, 2, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        return self.last(self.body(self, self.first(inputs)))


class OneByOne(nn.Module):
    """The oracle: the network sees (batch, features), one sample after the other."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs):
        if inputs.dim() == 2:
            return self.net(inputs)
        return torch.stack([self(sample) for sample in inputs])


def pair_of(role, net):
    torch.manual_seed(1)
    return pv.vae(DATA, 2, hidden=(8,), family=pv.DiagNormal(), **{role: net})


decoder_pair = functools.partial(pair_of, "decoder")
encoder_pair = functools.partial(pair_of, "encoder")


class OwnModel(PyroModule):
    """A hierarchy whose second site has a sample axis in model and guide; operations in the program."""

    def __init__(self, net):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.up = net, nn.Linear(2, DATA)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.net(z2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(self.up(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x[..., :2] / 2, 0.8).to_event(1))
            pyro.sample("z", dist.Normal(self.net(z2), 0.8).to_event(1))


def own_pair(net):
    own = OwnModel(net)
    return own.model, own.guide


ROLES = {"decoder": (decoder_pair, 2, 2 * DATA), "encoder": (encoder_pair, DATA, 4), "own": (own_pair, 2, 2)}
QUIET = {"progress": False}
HMC = {"num_leapfrog": 1, **QUIET}
OBSERVED = torch.arange(DATA) < 4


def loss_and_gradients(objective, model, guide, x):
    loss = objective.differentiable_loss(model, guide, x)
    found = [p for m in (model, guide) if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, found, allow_unused=True) if found else ()
    return [loss.detach(), *sorted((g.abs().sum() for g in gradients if g is not None), key=float)]


def missing(m, g, x):
    return pv.log_missing(m, g, x, OBSERVED, estimate=pv.importance_sampling, num_samples=20, **QUIET).values


ESTIMATES = {
    "log_weights": lambda m, g, x: pv.log_weights(m, g, x, num_samples=4).detach(),
    "elbo": lambda m, g, x: torch.stack(pv.elbo(m, g, x, num_samples=4)),
    "importance_sampling": lambda m, g, x: pv.importance_sampling(m, g, x, num_samples=40, **QUIET).values,
    "ais": lambda m, g, x: pv.ais(m, x, num_chains=2, num_temperatures=3, **HMC).values,
    "ais_from_guide": lambda m, g, x: pv.ais(m, x, guide=g, num_chains=2, num_temperatures=3, **HMC).values,
    "bidirectional": lambda m, g, x: pv.bidirectional(m, x, num_chains=2, num_temperatures=3, **HMC).upper,
    "sample_posterior": lambda m, g, x: pv.sample_posterior(
        m, x, num_chains=2, num_samples=4, num_warmup=8, **HMC
    ).latents["z"],
    "sample": lambda m, g, x: pv.sample(m, x, num_samples=3)[1]["x"].detach(),
    "draw": lambda m, g, x: [v.detach() for v in draw_pair(m, g, x, num_samples=3).log_joint],
    "iwae": lambda m, g, x: loss_and_gradients(pv.ImportanceWeightedELBO(4), m, g, x),
    "dreg": lambda m, g, x: loss_and_gradients(pv.ImportanceWeightedELBO(4, "dreg"), m, g, x),
    "renyi": lambda m, g, x: loss_and_gradients(pv.RenyiELBO(0.5, 4), m, g, x),
    "wake_sleep": lambda m, g, x: loss_and_gradients(pv.ReweightedWakeSleep(4), m, g, x),
    "free_bits": lambda m, g, x: loss_and_gradients(FreeBitsELBO(0.1, 4), m, g, x),
    "quadrature": lambda m, g, x: pv.quadrature(m, x[:1], tolerance=0.3, **QUIET).values,
    "aggregate_posterior": lambda m, g, x: torch.tensor([e.mean for e in pv.aggregate_posterior(m, g, x)]),
    "anomaly_score": lambda m, g, x: pv.anomaly_score(m, g, x, num_samples=30, **QUIET).score,
    "kl_per_dim": lambda m, g, x: pv.kl_per_dim(m, g, x),
    "posterior_mean": lambda m, g, x: posterior_mean(g, x),
    "interpolate": lambda m, g, x: pv.interpolate(m, g, x[:2], x[2:4], num_steps=3),
    "inpaint": lambda m, g, x: (
        pv.inpaint(m, g, x[:2], OBSERVED, num_chains=2, num_draws=4, num_warmup=6, num_samples=2, **HMC).mean
    ),
    "log_missing": missing,
}
IN_NO_TIME = [
    *("log_weights", "elbo", "importance_sampling", "sample", "draw", "iwae", "dreg", "renyi", "wake_sleep"),
    *("aggregate_posterior", "kl_per_dim"),
]


def outcome(estimate, pair, x):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ESTIMATES[estimate](*pair, x)
    return list(found) if isinstance(found, list | tuple) else [found]


def agree(estimate, make, net):
    x = torch.randn(5, DATA)
    found, expected = (outcome(estimate, make(one), x) for one in (net, OneByOne(net)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


PROGRAMS = list(itertools.product(ROLES, BODIES))


@pytest.mark.parametrize(("role", "body"), PROGRAMS)
def test_every_network_is_worth_what_it_is_one_sample_after_the_other(role, body):
    """Every one in every role, with two estimates in turn."""
    make, num_in, num_out = ROLES[role]
    net = Net(BODIES[body], num_in, num_out).eval()
    first = 2 * PROGRAMS.index((role, body))
    for i in (first, first + 1):
        agree(IN_NO_TIME[i % len(IN_NO_TIME)], make, net)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_every_estimate_of_a_network_for_images(estimate):
    net = nn.Sequential(
        *(nn.Linear(2, 8), nn.Unflatten(-1, (2, 2, 2)), nn.ConvTranspose2d(2, 4, 2), nn.Flatten()),
        *(nn.Linear(36, 2 * DATA), nn.Unflatten(1, (2, DATA)), nn.Softmax(1), nn.Flatten()),
    )
    agree(estimate, decoder_pair, net)


@pytest.mark.parametrize("body", NEIGHBOURS)
def test_a_network_whose_values_depend_on_other_data_is_refused_by_name(body):
    for role, (make, num_in, num_out) in ROLES.items():
        net = Net(NEIGHBOURS[body], num_in, num_out).eval()
        pair = make(net)
        name = {"decoder": "likelihood.net", "encoder": "posterior.net", "own": "net"}[role]
        for estimate in ("importance_sampling", "elbo") if role == "decoder" else ("iwae",):
            with pytest.raises(ValueError, match="depends on the other rows of its batch") as error:
                outcome(estimate, pair, torch.randn(4, DATA))
            inner = ".batch_norm_of_batch" * (body == "batch_norm")
            assert f"network '{name}{inner}'" in str(error.value)


def test_a_network_that_takes_any_shape_is_not_folded():
    x = torch.randn(4, DATA)
    for body, is_folded in ("any_shape", False), ("softmax", True):
        for make, num_in, num_out in ROLES.values():
            model, guide = make(Net(BODIES[body], num_in, num_out))
            net_is_in_model = make is not encoder_pair
            assert takes_samples(model, (x,)) is not (is_folded and net_is_in_model)
            assert takes_samples(guide, (x,)) is not (is_folded and make is own_pair)


def switching(net):
    """Discrete sites that are summed out meet the network as well: z given y, and x given both."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_tensor([0.2, 0.5, 0.3])))
            w = pyro.sample("w", dist.Bernoulli(0.2 + 0.2 * y))
            inputs = torch.stack(torch.broadcast_tensors(y.to(x), w), -1)
            z = pyro.sample("z", dist.Normal(y.to(x)[..., None] * x.new_ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(inputs) + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :2] / 2, 1.0).to_event(1))

    return model, guide


def test_sums_over_discrete_sites_meet_the_network_one_by_one_too():
    net = Net(BODIES["softmax"], 2, DATA)
    x, z = torch.randn(4, DATA), torch.randn(3, 4, 2)
    model, guide = switching(net)
    prior = torch.tensor([0.2, 0.5, 0.3])
    total = []
    for y, w in itertools.product(range(3), range(2)):
        one = torch.tensor([[y, w]]).to(x).expand(4, 2)
        mean = net(one)
        log_p = prior[y].log() + dist.Bernoulli(0.2 + 0.2 * torch.tensor(float(y))).log_prob(
            torch.tensor(float(w))
        )
        log_p = log_p + dist.Normal(float(y), 1.0).log_prob(z).sum(-1)
        total.append(log_p + dist.Normal(mean + z.sum(-1, keepdim=True), 1.0).log_prob(x).sum(-1))
    expected = torch.stack(total).logsumexp(0)
    torch.testing.assert_close(sum(pv.log_joint(model, {"z": z}, x)), expected)
    draws = draw_pair(model, guide, x, num_samples=3)
    again = sum(pv.log_joint(model, draws.latents, x))
    torch.testing.assert_close(sum(draws.log_joint), again)
    torch.manual_seed(0)
    weights = pv.log_weights(model, guide, x, num_samples=3)
    torch.manual_seed(0)
    draws = draw_pair(model, guide, x, num_samples=3)
    torch.testing.assert_close(weights, sum(draws.log_joint) - draws.log_guide)


def test_enumeration_of_a_network_for_one_axis():
    net = Net(BODIES["softmax"], 2, DATA)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3)).to(x)
            pyro.sample("x", dist.Normal(net(torch.stack([y, 1 - y], -1)), 1.0).to_event(1), obs=x)

    x = torch.randn(4, DATA)
    means = net(torch.eye(2).flip(0))
    log_p = torch.tensor([0.7, 0.3]).log()[:, None] + torch.stack(
        [dist.Normal(mean, 1.0).log_prob(x).sum(-1) for mean in means]
    )
    torch.testing.assert_close(pv.enumeration(model, x, progress=False).values, log_p.logsumexp(0).detach())


# ------------------------------------------------------------------------------------ left as it was


class Moving(Net):
    """Buffers move in every mode: an average of one's own, one that is replaced, a counter; dropout."""

    def __init__(self, body, num_in, num_out):
        super().__init__(body, num_in, num_out)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        h = self.batch_norm(self.dropout(self.first(inputs)))
        with torch.no_grad():
            self.average.lerp_(h.flatten(0, -2).mean(0), 0.1)
            self.replaced = self.replaced + 1
            self.calls += 1
        return self.last(self.body(self, h))


def state_of(*modules):
    found = [m for module in modules for m in module.modules()]
    tensors = [t for m in found for t in (*m._buffers.values(), *m._parameters.values()) if t is not None]
    return [m.training for m in found], [(id(t), t.detach().clone()) for t in tensors]


OBJECTIVES = ("iwae", "dreg", "renyi", "wake_sleep", "free_bits")


@pytest.mark.parametrize("estimate", [name for name in ESTIMATES if name not in OBJECTIVES])
def test_no_estimate_moves_the_pair(estimate):
    x = torch.randn(4, DATA)
    model, guide = decoder_pair(Moving(BODIES["softmax"], 2, 2 * DATA))
    guide.posterior.net = Moving(BODIES["any_shape"], DATA, 4)
    model.train(), guide.train()
    model.likelihood.net.gru.eval()  # modes that differ
    for part in model.likelihood.net, guide.posterior.net:
        part.batch_norm.running_mean.normal_()
    modes, tensors = state_of(model, guide)
    numpy_state = np.random.get_state()[1].copy()
    first = outcome(estimate, (model, guide), x)
    modes_after, tensors_after = state_of(model, guide)
    assert modes == modes_after
    for (before, value), (after, now) in zip(tensors, tensors_after, strict=True):
        assert before == after
        assert torch.equal(value, now)
    assert (np.random.get_state()[1] == numpy_state).all()
    # So it is the same again: no dropout, no moving average.
    for one, other in zip(first, outcome(estimate, (model, guide), x), strict=True):
        torch.testing.assert_close(one, other)


def test_the_pair_is_as_it_was_after_an_error_and_a_moved_parameter_is_refused():
    x = torch.randn(4, DATA)
    model, guide = decoder_pair(Moving(BODIES["softmax"], 2, 2 * DATA))
    modes, tensors = state_of(model, guide)

    def fails(*_):
        raise KeyboardInterrupt

    hook = model.likelihood.net.last.register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        pv.importance_sampling(model, guide, x, num_samples=3, **QUIET)
    hook.remove()
    assert state_of(model, guide)[0] == modes
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors, state_of(model, guide)[1], strict=True))

    def moves(module, *_):
        with torch.no_grad():
            module.weight.mul_(1.01)

    model.likelihood.net.first.register_forward_hook(moves)
    with pytest.raises(ValueError, match=r"Linear.* gives other values when it is run again"):
        pv.elbo(model, guide, x)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors, state_of(model, guide)[1], strict=True))


def test_training_moves_buffers_and_keeps_dropout():
    model, guide = decoder_pair(Moving(BODIES["softmax"], 2, 2 * DATA))
    optimizer = torch.optim.Adam(parameters(model, guide))
    algorithm = pv.SVI(model, guide, optimizer, pv.ImportanceWeightedELBO(3), compile=False)
    before = model.likelihood.net.batch_norm.running_mean.clone()
    algorithm.step(torch.randn(4, DATA))
    assert int(model.likelihood.net.batch_norm.num_batches_tracked) == 1  # probes left nothing
    assert not torch.equal(before, model.likelihood.net.batch_norm.running_mean)
    assert model.likelihood.net.dropout.training


# ------------------------------------------------------------------------------------ wherever modules are


class InAList(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.programs = [program]

    def forward(self, x):
        self.programs[0](x)


REACHES = {
    "bound method": lambda program: program,
    "lambda": lambda program: lambda x: program(x),
    "handler": lambda program: poutine.scale(program, scale=1.0),
    "list": InAList,
    "partial": lambda program: functools.partial(lambda p, x: p(x), program),
}


@pytest.mark.parametrize("reach", REACHES)
def test_pyro_modules_are_found_wherever_they_are(reach):
    own = OwnModel(Net(BODIES["softmax"], 2, 2))
    x = torch.randn(4, DATA)
    pair = [REACHES[reach](program) for program in (own.model, own.guide)]
    for estimate in ("log_weights", "importance_sampling", "elbo", "inpaint", "log_missing", "ais"):
        found, expected = (outcome(estimate, programs, x) for programs in (pair, (own.model, own.guide)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_svi_takes_a_loss_that_holds_a_pyro_module():
    model, guide = decoder_pair(Net(BODIES["any_shape"], 2, 2 * DATA))
    loss = Trace_MMD(RBF(input_dim=2), num_particles=2, max_plate_nesting=1)
    algorithm = pv.SVI(model, guide, torch.optim.SGD(model.parameters(), 1e-3), loss, compile=False)
    assert all(algorithm.step(torch.randn(4, DATA))["elbo"].isfinite() for _ in range(2))


# --------------------------------------------------------------------- neighbours that hide, and what moves


class Scaled(nn.Module):
    """An encoder or decoder behind a scaling that people write."""

    def __init__(self, scaling, inputs, outputs, dropout=0.0):
        super().__init__()
        self.scaling, self.net, self.dropout = scaling, nn.Linear(inputs, outputs), dropout

    def forward(self, h):
        return self.net(F.dropout(self.scaling(h), self.dropout, training=True))


MANY = 40
LATE = torch.arange(MANY)[:, None] > 30  # the data that show it are the last
SCALINGS = {
    "mean": (lambda h: h - h.mean(0), lambda x: torch.where(LATE, x, 1.0)),
    "statistics": (
        lambda h: F.batch_norm(h, None, None, training=True) if len(h) > 1 else 0 * h,
        lambda x: torch.where(LATE, x, 1.0),
    ),
    "range": (
        lambda h: (h - h.min()) / (h.max() - h.min()),
        lambda x: torch.where(LATE, 0.3 * x.sigmoid(), torch.arange(DATA) % 2),
    ),
    "largest": (
        lambda h: h / 255 if h.max() > 1 else h,
        lambda x: torch.where(LATE, 100 * x.abs(), x.sigmoid()),
    ),
    "last": (lambda h: h - h[-1], lambda x: x),
    "first": (lambda h: h - h[:1], lambda x: x),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_neighbours_are_found_wherever_they_are_and_beside_random_numbers(scaling, dropout):
    scale, data = SCALINGS[scaling]
    x = data(torch.randn(MANY, DATA))
    encoder = Scaled(scale, DATA, 4, dropout)
    model, guide = pv.vae(DATA, 2, hidden=(4,), family=pv.DiagNormal(), encoder=encoder)
    model, guide = model.double(), guide.double()
    with pytest.raises(ValueError, match=r"posterior.net.* depends on the other rows"):
        pv.elbo(model, guide, x, num_samples=3)


def test_random_numbers_alone_are_no_neighbours():
    model, guide = pv.vae(
        DATA, 2, hidden=(4,), encoder=Scaled(lambda h: h, DATA, 4, 0.3), family=pv.DiagNormal()
    )
    assert pv.elbo(model.double(), guide.double(), torch.randn(5, DATA)).elbo.isfinite().all()


class Moves(nn.Module):
    """Changes itself whenever it runs."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = nn.Linear(2, 2 * DATA), change
        self.register_buffer("mean", torch.zeros(2 * DATA))
        self.noted = torch.zeros(2)

    def forward(self, z):
        self.change(self)
        return self.net(z) - self.mean


def clamped(m):
    m.net.weight.data.clamp_(min=0)


def assigned(m):
    m.net.weight.data = m.net.weight.data / m.net.weight.data.norm()


def replaced(m):
    m.net.weight = nn.Parameter(m.net.weight.detach() * 0.999)


def follows(m):
    m.mean = m.mean + 0.1


def noted(m):
    m.noted = m.noted + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((change, "changes their parameter weight") for change in (clamped, assigned)),
        (replaced, "other values when it is run again"),
        (follows, "other values when it is run again"),
        (noted, None),
    ],
)
def test_an_estimate_puts_back_whatever_moves_and_says_so(change, message):
    model, guide = pv.vae(DATA, 2, hidden=(4,), decoder=Moves(change), family=pv.DiagNormal())
    model, guide = model.double(), guide.double()
    before, state = parameters(model), {k: v.clone() for k, v in model.state_dict().items()}
    for estimate in (pv.elbo, pv.importance_sampling):
        if message is None:
            estimate(model, guide, torch.randn(4, DATA), num_samples=3)
        else:
            with pytest.raises(ValueError, match=message):
                estimate(model, guide, torch.randn(4, DATA), num_samples=3)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not model.likelihood.net.noted.any()
