"""Works of the benchmarks: the same pairs for Pyro, plain torch and NumPyro.

``variants(work)`` gives functions that build a variant; what they return runs an epoch of so many steps.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pyro_vae import SVI, Conditional, DiagNormal, vae

Epoch = Callable[[], object]
LEARNING_RATE = 1e-3
SIZES = {  # data, hidden, latent, batch
    "mnist": (784, 500, 20, 100),
    "mnist_20": (784, 500, 20, 20),
    "frey": (560, 200, 10, 100),
    "m2": (784, 500, 20, 100),
    "conv": (784, 0, 20, 64),
}
LABELS = 10


def variants(work: str) -> dict[str, Callable[[str, int, str], Epoch]]:
    """Builders of all variants that there are of this work: from (work, steps, device)."""
    found: dict[str, Callable[[str, int, str], Epoch]] = {
        "pyro.infer.SVI": functools.partial(pyro_epoch, jit=False),
        "pyro.infer.SVI, Jit ELBO": functools.partial(pyro_epoch, jit=True),
        "torch eager": functools.partial(torch_epoch, compiled=False),
        "torch compiled": functools.partial(torch_epoch, compiled=True),
        "pyro_vae eager": functools.partial(own_epoch, compile=False),
        "pyro_vae compiled": functools.partial(own_epoch, compile="always"),
    }
    if importlib.util.find_spec("numpyro"):
        found["NumPyro"] = numpyro_epoch
    return found


def batches(work: str, steps: int, device: str) -> Tensor:
    """An epoch of data, the same for all."""
    data_dim, _, _, batch = SIZES[work]
    data = torch.rand(steps, batch, data_dim, generator=torch.Generator().manual_seed(0))
    return (data if work == "frey" else (data < 0.2).float()).to(device)


def machine(device: str) -> dict[str, object]:
    """Describe the machine and the versions."""
    return {
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


# ------------------------------------------------------------------------------------------ networks


class ConvEncoder(nn.Module):
    """28x28 images of any leading shape to vectors."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.out = nn.Linear(64 * 7 * 7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return self.out(self.net(x.reshape(-1, 1, 28, 28))).reshape(*x.shape[:-1], -1)


class ConvDecoder(nn.Module):
    """Vectors of any leading shape to 28x28 logits."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, 64 * 7 * 7)
        self.net = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Logits."""
        return self.net(self.inp(z).reshape(-1, 64, 7, 7)).reshape(*z.shape[:-1], 784)


class M2Model(nn.Module):
    """p(y) p(z) p(x | y, z) with y one of ten, which the objective sums over."""

    def __init__(self, data_dim: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.net = nn.Sequential(nn.Linear(latent + LABELS, hidden), nn.Tanh(), nn.Linear(hidden, data_dim))

    def forward(self, x: Tensor) -> None:
        """Sites y, z, x."""
        if not pyro.settings.get("module_local_params"):
            pyro.module("m2_model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(LABELS)))
            shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
            inputs = torch.cat([z.expand(*shape, -1), y.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.net(inputs)).to_event(1), obs=x)


class M2Guide(nn.Module):
    """q(y | x) q(z | x)."""

    def __init__(self, data_dim: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.sizes = [latent, latent, LABELS]
        self.net = nn.Sequential(nn.Linear(data_dim, hidden), nn.Tanh(), nn.Linear(hidden, sum(self.sizes)))

    @config_enumerate
    def forward(self, x: Tensor) -> None:
        """Sites y, z."""
        if not pyro.settings.get("module_local_params"):
            pyro.module("m2_guide", self)
        with pyro.plate("data", len(x)):
            loc, log_variance, logits = self.net(x).split(self.sizes, -1)
            pyro.sample("y", dist.OneHotCategorical(logits=logits))
            pyro.sample("z", dist.Normal(loc, (log_variance / 2).exp()).to_event(1))


def pair(work: str) -> tuple[nn.Module, nn.Module]:
    """Model and guide of a work, from the same initial weights every time."""
    data_dim, hidden, latent, _ = SIZES[work]
    torch.manual_seed(0)
    if work == "m2":
        return M2Model(data_dim, hidden, latent), M2Guide(data_dim, hidden, latent)
    if work == "conv":
        return vae(data_dim, latent, encoder=ConvEncoder(2 * latent), decoder=ConvDecoder(latent))
    family = DiagNormal(squash_loc=True) if work == "frey" else None
    return vae(data_dim, latent, hidden=(hidden,), family=family)


def parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """All of them."""
    return [parameter for module in modules for parameter in module.parameters()]


# ------------------------------------------------------------------------------------------ variants


def pyro_epoch(work: str, steps: int, device: str, *, jit: bool) -> Epoch:
    """Pyro's own SVI."""
    data = batches(work, steps, device)
    model, guide = (module.to(device) for module in pair(work))
    if work == "m2":
        loss = (JitTraceEnum_ELBO if jit else TraceEnum_ELBO)(max_plate_nesting=1)
    else:
        loss = (JitTrace_ELBO if jit else Trace_ELBO)()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss)
    return lambda: [svi.step(x) for x in data]


def own_epoch(work: str, steps: int, device: str, *, compile: bool | str) -> Epoch:  # noqa: A002
    """This package."""
    data = batches(work, steps, device)
    model, guide = (module.to(device) for module in pair(work))
    loss = TraceEnum_ELBO(max_plate_nesting=1) if work == "m2" else Trace_ELBO()
    optimizer = torch.optim.Adam(parameters(model, guide), lr=LEARNING_RATE)
    svi = SVI(model, guide, optimizer, loss, compile=compile)

    def epoch() -> None:
        for x in data:
            metrics = svi.step(x)
        float(metrics["elbo"])

    def launches() -> None:
        for metrics, _ in svi.steps(stored):
            last = metrics["elbo"]
        float(last[-1])

    stored = Stored(data)
    return launches if compile and device == "cuda" else epoch


class Stored:
    """An epoch of data on the device, whose minibatches are taken inside of a launch."""

    def __init__(self, data: Tensor) -> None:
        self.data = data.flatten(0, 1)
        self.batch_size = data.shape[1]
        self.generator = torch.Generator(data.device)

    def indices(self) -> tuple[Tensor, ...]:
        """Positions of the minibatches."""
        return torch.arange(len(self.data), device=self.data.device).split(self.batch_size)

    def draw(self, index: Tensor) -> tuple[Tensor]:
        """A minibatch."""
        return (self.data[index],)


def torch_loss(work: str, model: nn.Module, guide: nn.Module) -> Callable[[Tensor], Tensor]:
    """Minus the bound, as one would write it without Pyro."""

    def normal(z: Tensor, loc: Tensor | float, log_scale: Tensor) -> Tensor:
        return (-0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)

    def scale_of(family: DiagNormal, log_variance: Tensor) -> Tensor:
        low, high = family.scale.log_bounds
        value = low + F.softplus(log_variance / 2 - low)
        return high - F.softplus(high - value)

    if work == "m2":
        sizes, zero = guide.sizes, torch.zeros(())

        def loss(x: Tensor) -> Tensor:
            loc, log_variance, logits = guide.net(x).split(sizes, -1)
            z = loc + (log_variance / 2).exp() * torch.randn_like(loc)
            eye = torch.eye(LABELS, device=x.device)
            shape = (LABELS, len(x))
            inputs = torch.cat([z.expand(*shape, -1), eye[:, None].expand(*shape, -1)], -1)
            likelihood = -F.binary_cross_entropy_with_logits(
                model.net(inputs), x.expand(*shape, -1), reduction="none"
            ).sum(-1)
            log_q = logits.log_softmax(-1).T
            bound = (log_q.exp() * (likelihood - math.log(LABELS) - log_q)).sum(0)
            prior = normal(z, 0.0, zero.to(x.device)) - normal(z, loc, log_variance / 2)
            return -(bound + prior).sum()

        return loss

    posterior: Conditional = guide.posterior
    likelihood: Conditional = model.likelihood

    def loss(x: Tensor) -> Tensor:
        loc, log_variance = posterior.net(x).chunk(2, -1)
        log_scale = scale_of(posterior.family, log_variance)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        eta = likelihood.net(z)
        if work == "frey":
            mean, log_variance = eta.chunk(2, -1)
            log_x = normal(x, mean.sigmoid(), scale_of(likelihood.family, log_variance))
        else:
            log_x = -F.binary_cross_entropy_with_logits(eta, x, reduction="none").sum(-1)
        return -(log_x + normal(z, 0.0, torch.zeros((), device=x.device)) - normal(z, loc, log_scale)).sum()

    return loss


def torch_epoch(work: str, steps: int, device: str, *, compiled: bool) -> Epoch:
    """The same in plain PyTorch with fused Adam."""
    data = batches(work, steps, device)
    model, guide = (module.to(device) for module in pair(work))
    optimizer = torch.optim.Adam(parameters(model, guide), lr=LEARNING_RATE, fused=True)
    loss = torch_loss(work, model, guide)
    loss = torch.compile(loss) if compiled else loss

    def epoch() -> None:
        for x in data:
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            optimizer.step()
        value.item()

    return epoch


def numpyro_epoch(work: str, steps: int, device: str) -> Epoch:
    """NumPyro: an epoch is one scan inside jit."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from jax import lax
    from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

    data_dim, hidden, latent, _ = SIZES[work]
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 16))
    squash = work == "frey"

    def uniform(shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
        bound = math.sqrt(6 / (fan_in + fan_out))
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)

    def mlp(inputs: int, outputs: int) -> dict:
        return {
            "w1": uniform((inputs, hidden), inputs, hidden),
            "b1": jnp.zeros(hidden),
            "w2": uniform((hidden, outputs), hidden, outputs),
            "b2": jnp.zeros(outputs),
        }

    def run_mlp(p: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(p: dict, name: str, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, p[name], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
        return y + p[f"{name}b"]

    def transposed(p: dict, name: str, x: jax.Array) -> jax.Array:
        return lax.conv_transpose(x, p[name], (2, 2), "SAME", dimension_numbers=numbers) + p[f"{name}b"]

    if work == "conv":
        encoder = {
            "c1": uniform((4, 4, 1, 32), 16, 512),
            "c1b": jnp.zeros(32),
            "c2": uniform((4, 4, 32, 64), 512, 1024),
            "c2b": jnp.zeros(64),
            "w": uniform((3136, 2 * latent), 3136, 2 * latent),
            "b": jnp.zeros(2 * latent),
        }
        decoder = {
            "w": uniform((latent, 3136), latent, 3136),
            "b": jnp.zeros(3136),
            "c1": uniform((4, 4, 64, 32), 1024, 512),
            "c1b": jnp.zeros(32),
            "c2": uniform((4, 4, 32, 1), 512, 16),
            "c2b": jnp.zeros(1),
        }

        def encode(p: dict, x: jax.Array) -> jax.Array:
            h = jax.nn.relu(conv(p, "c1", x.reshape(-1, 28, 28, 1)))
            h = jax.nn.relu(conv(p, "c2", h))
            return h.reshape(len(x), -1) @ p["w"] + p["b"]

        def decode(p: dict, z: jax.Array) -> jax.Array:
            h = jax.nn.relu(z @ p["w"] + p["b"]).reshape(-1, 7, 7, 64)
            return transposed(p, "c2", jax.nn.relu(transposed(p, "c1", h))).reshape(len(z), 784)
    else:
        labels = LABELS if work == "m2" else 0
        encoder = mlp(data_dim, 2 * latent + labels)
        decoder = mlp(latent + labels, data_dim * (2 if squash else 1))
        encode = decode = run_mlp
    low, high = DiagNormal().scale.log_bounds

    def scale_of(log_variance: jax.Array) -> jax.Array:
        value = low + jax.nn.softplus(log_variance / 2 - low)
        return jnp.exp(high - jax.nn.softplus(high - value))

    def model(x: jax.Array) -> None:
        p = numpyro.param("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            if work == "m2":
                y = numpyro.sample("y", ndist.Categorical(logits=jnp.zeros(LABELS)))
                one_hot = jax.nn.one_hot(y, LABELS)
                shape = jnp.broadcast_shapes(z.shape[:-1], one_hot.shape[:-1])
                z = [jnp.broadcast_to(v, (*shape, v.shape[-1])) for v in (z, one_hot)]
                z = jnp.concatenate(z, -1)
            eta = decode(p, z)
            if squash:
                mean, log_variance = jnp.split(eta, 2, -1)
                likelihood = ndist.Normal(jax.nn.sigmoid(mean), scale_of(log_variance))
            else:
                likelihood = ndist.Bernoulli(logits=eta)
            numpyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        eta = encode(numpyro.param("encoder", encoder), x)
        loc, log_variance, logits = jnp.split(eta, [latent, 2 * latent], -1)
        with numpyro.plate("data", len(x)):
            if work == "m2":
                probabilities = ndist.Categorical(logits=logits)
                numpyro.sample("y", probabilities, infer={"enumerate": "parallel"})
            scale = jnp.exp(log_variance / 2) if work == "m2" else scale_of(log_variance)
            numpyro.sample("z", ndist.Normal(loc, scale).to_event(1))

    loss = TraceEnum_ELBO(max_plate_nesting=1) if work == "m2" else Trace_ELBO()
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), loss)
    data = jnp.asarray(batches(work, steps, "cpu").numpy())
    state = [svi.init(jax.random.PRNGKey(1), data[0])]
    scan = jax.jit(lambda state: lax.scan(lambda s, x: svi.update(s, x), state, data))

    def epoch() -> None:
        state[0], losses = scan(state[0])
        losses.block_until_ready()

    return epoch
