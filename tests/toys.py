"""What tests of several files are made of: small programs, estimates without a bar, and training."""

import functools
import inspect

import pyro
import pyro.distributions as dist
import torch

from pyro_vae import marginal_likelihood, mcmc, training
from pyro_vae.oracles import LinearGaussian


def quiet(function):
    return functools.partial(function, progress=False)


ais = quiet(marginal_likelihood.ais)
bidirectional = quiet(marginal_likelihood.bidirectional)
enumeration = quiet(marginal_likelihood.enumeration)
fit = quiet(training.fit)
hmc = quiet(marginal_likelihood.hmc)
importance_sampling = quiet(marginal_likelihood.importance_sampling)
inference_gap = quiet(marginal_likelihood.inference_gap)
quadrature = quiet(marginal_likelihood.quadrature)
sample_posterior = quiet(mcmc.sample_posterior)


def of_one_latent(prior, likelihood):
    """A model of z and of data x; the prior is a distribution, or a function of x that makes one."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x) if inspect.isfunction(prior) else prior)
            pyro.sample("x", likelihood(z), obs=x)

    return model


def guide_of(**sites):
    """A guide of independent sites, each a function of x that makes its distribution."""

    def guide(x):
        with pyro.plate("data", len(x)):
            for name, distribution in sites.items():
                pyro.sample(name, distribution(x))

    return guide


def standard_normal(x):
    """A prior in the type of the data, whatever the default is."""
    return dist.Normal(x.new_zeros(()), 1.0)


def parameters(*modules):
    return [parameter for module in modules for parameter in module.parameters()]


def train(algorithm, num_steps, minibatch):
    """Steps whose learning rate ends at zero; the metrics of each."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(algorithm.optimizer, num_steps)
    rows = []
    for _ in range(num_steps):
        rows.append(algorithm.step(*minibatch()))
        scheduler.step()
    return rows


def distance_to_maximum_likelihood(model, x, latent_dim, scale):
    """In nats a datum, of a model with a linear decoder and a fixed scale; also the maximum."""
    best = LinearGaussian.maximum_likelihood(x, latent_dim, scale).log_prob(x).mean().item()
    decoder = model.likelihood.net.layers[0]
    learned = LinearGaussian(decoder.weight.detach(), decoder.bias.detach(), scale)
    return best - learned.log_prob(x).mean().item(), best
