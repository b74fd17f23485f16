import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from toys import distance_to_maximum_likelihood, parameters, train

from pyro_vae import MLP, SVI, FixedScaleNormal, SupportError, VAEModel, vae
from pyro_vae.oracles import LinearGaussian


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_training_reaches_the_maximum_likelihood(elbo):
    """A VAE whose optimum is the maximum of the linear-Gaussian likelihood (Lucas et al. 2019)."""
    x = LinearGaussian.random(8, 3).sample(500)
    nets = {"encoder": MLP(8, 6, ()), "decoder": MLP(3, 8, ())}
    model, guide = vae(8, 3, family=FixedScaleNormal(0.5), **nets)
    svi = SVI(model, guide, torch.optim.Adam(parameters(model, guide), lr=0.03), elbo())
    train(svi, 1500, lambda: (x,))
    # No parameters do better than the maximum, and training ends within 0.05 nats of it.
    gap, best = distance_to_maximum_likelihood(model, x, latent_dim=3, scale=0.5)
    assert -1e-4 < gap < 0.05
    # The bound is tight there: the posterior is in the guide's family.
    assert svi.step(x)["elbo"].item() == pytest.approx(best, abs=0.3)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "NAdam"])
def test_any_torch_optimiser(name):
    model, guide = vae(4, 2, hidden=(3,))
    svi = SVI(model, guide, getattr(torch.optim, name)(parameters(model, guide), lr=0.01))
    x = torch.ones(50, 4)
    first = svi.step(x)["elbo"]
    for _ in range(100):
        last = svi.step(x)["elbo"]
    assert last > first
    assert not last.requires_grad


def test_particles_lower_the_variance_of_the_bound():
    model, guide = vae(4, 2)
    x = torch.ones(5, 4)
    spread = {}
    for num_particles in (1, 100):
        elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, torch.optim.SGD(model.parameters(), lr=0.0), elbo)
        spread[num_particles] = torch.stack([svi.step(x)["elbo"] for _ in range(200)]).var().item()
    assert spread[1] / spread[100] == pytest.approx(100, rel=0.5)


def test_only_what_the_optimiser_has_is_trained():
    model, guide = vae(4, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    SVI(model, guide, torch.optim.Adam(guide.parameters())).step(torch.ones(5, 4))
    assert all(map(torch.equal, before, model.parameters()))


def test_parameters_that_nobody_would_train_are_found():
    class Model(VAEModel):
        def forward(self, x):
            super().forward(x)
            pyro.param("w", torch.ones(3))

    model, guide = vae(4, 2)
    svi = SVI(Model(model.prior, model.likelihood), guide, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="'w' lives in Pyro's store"):
        svi.step(torch.ones(5, 4))
    with pytest.raises(TypeError, match="must be modules"):
        SVI(lambda x: None, guide, torch.optim.Adam(guide.parameters()))
    with pytest.raises(TypeError, match="ELBO object"):
        SVI(model, guide, torch.optim.Adam(model.parameters()), "elbo")


def test_a_module_that_registers_itself_is_fine():
    class Model(VAEModel):
        def forward(self, x):
            pyro.module("mine", self)
            super().forward(x)

    model, guide = vae(4, 2)
    model = Model(model.prior, model.likelihood)
    before = model.likelihood.net.layers[0].weight.clone()
    SVI(model, guide, torch.optim.Adam(parameters(model, guide))).step(torch.ones(5, 4))
    assert not torch.equal(before, model.likelihood.net.layers[0].weight)


def test_the_first_step_looks_at_the_data():
    model, guide = vae(4, 2)
    svi = SVI(model, guide, torch.optim.Adam(model.parameters()))
    with pytest.raises(SupportError, match="Bernoulli"):
        svi.step(torch.full((5, 4), 0.3))
    svi.step(torch.ones(5, 4))
