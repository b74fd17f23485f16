"""Holes, walks and codes: the story of the VAE's latent space, measured.

    python scripts/studies/latent_space.py --jobs 2

An autoencoder, a VAE, a VAE without its KL term, and a VQ-VAE learn MNIST with 2 and with 20 latent numbers,
from several seeds. Each is asked which share of its samples is like the data, what a walk between two codes
meets, how the variance of its posteriors changed during training, and how well labels can be read off its
codes. Ends in a report, latent_space.md, with a verdict on every claim.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import study
import tyro
from study import Common

from pyro_vae.lab import cli
from pyro_vae.lab.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.lab import Run

KINDS = ("autoencoder", "VAE", "VAE without KL", "VQ-VAE")
LATENTS = (2, 20)
HIDDEN = (500,)
ROWS_PER_EPOCH = 10  # rows of metrics: the variance moves fast at first
NUM_SAMPLES = 1000
NUM_PAIRS = 500
CODE_DIM = 2
NUM_CODES = {2: 512, 20: 64}  # a single code of 2 numbers; ten codes of 2 numbers


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Holes, walks and codes: the story of the VAE's latent space, measured."""

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training."""

    kind: str
    latent_dim: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and file."""
        return f"{self.kind.replace(' ', '_').lower()},z{self.latent_dim},seed{self.seed}"


def main() -> None:
    """Train, measure, report."""
    common = tyro.cli(Arguments).common
    settings = [
        Setting(kind, latent_dim, seed)
        for seed in range(common.seeds)
        for latent_dim in LATENTS
        for kind in KINDS
    ]
    import classifier

    classifier.trained(common.runs, study.load("mnist", common, binarization="none"))
    records = study.measured(measure, settings, common, "latent_space")
    print(f"report in {report(records, common)}")


# ------------------------------------------------------------------------------------------- systems


def config(setting: Setting, common: Common, **others: Any) -> Config:
    """Return its configuration; before a prior is fitted."""
    of_kind = {
        "autoencoder": {"prior": "flat"},
        "VAE": {},
        "VAE without KL": {"beta": 0.0},
        "VQ-VAE": {"prior": "codes", "code_dim": CODE_DIM, "num_codes": NUM_CODES[setting.latent_dim]},
    }
    values = {
        "data": "mnist",
        "data_dir": common.data_dir,
        "latent_dim": setting.latent_dim,
        "hidden": HIDDEN,
        "device": "cpu",
        "seed": setting.seed,
        **of_kind[setting.kind],
    }
    return Config(**values | others)


def trained(setting: Setting, common: Common, *, progress: bool) -> "Run":
    """Train, and a VQ-VAE a second time for its prior; rows of a VAE's metrics have the variance of q."""
    from pyro_vae import Callback
    from pyro_vae.latents import posterior_variance

    dataset = study.load("mnist", common, binarization="dynamic")
    x = dataset.test.x[:1000]

    class Variance(Callback):
        def epoch_end(self, training: Any) -> None:
            variance = posterior_variance(training.algorithm.guide, x)
            training.row["variance"] = variance.mean().item()
            training.row["variance_by_latent"] = variance.tolist()

    folder = common.runs / "latent_space" / setting.name
    rows = {"epochs": common.epochs * ROWS_PER_EPOCH, "epoch_size": len(dataset.train) // ROWS_PER_EPOCH}
    callbacks = [Variance()] if setting.kind.startswith("VAE") else []
    run = study.trained(
        folder, config(setting, common, **rows), dataset, callbacks=callbacks, progress=progress
    )
    if setting.kind != "VQ-VAE":
        return run
    fitted = {"prior": "transformer", "refit_prior": folder, "epochs": max(1, common.epochs // 3)}
    return study.trained(folder / "prior", config(setting, common, **fitted), dataset, progress=progress)


# ------------------------------------------------------------------------------------------- measures


def samplers(kind: str, model: "nn.Module", codes: "Tensor") -> "dict[str, Any]":
    """Return the distributions of z to sample from, by name."""
    from pyro_vae import CodePrior
    from pyro_vae.latents import fitted_box, fitted_mixture, fitted_normal

    fitted = {
        "box around the codes": fitted_box,
        "normal fitted to the codes": fitted_normal,
        "mixture fitted to the codes": fitted_mixture,
    }
    if kind == "VQ-VAE":
        even = CodePrior(model.prior.codebook, model.prior.length)
        return {"even prior": even(), "prior fitted to the codes": model.prior()}
    afterwards = {name: fit(codes) for name, fit in fitted.items()}
    return afterwards if kind == "autoencoder" else {"prior": model.prior(), **afterwards}


def log_marginal_of_codes(model: "nn.Module", guide: "nn.Module", x: "Tensor") -> float:
    """Mean of log p(x): summed over all codes where a datum has one code, else its bound."""
    import torch

    from pyro_vae import elbo
    from pyro_vae.traces import log_joint

    if model.prior.length > 1:
        return elbo(model, guide, x).elbo.mean().item()
    every = guide.codebook(torch.arange(guide.codebook.num_codes).unsqueeze(1)).unsqueeze(1)
    with torch.no_grad():
        values = [
            sum(log_joint(model, {"z": every.expand(-1, len(part), -1)}, part)).logsumexp(0)
            for part in x.split(100)
        ]
    return torch.cat(values).mean().item()


def measure(setting: Setting, common: Common, *, progress: bool) -> str:
    """Train one setting, measure it and keep the record."""
    import classifier
    import pyro
    import torch

    from pyro_vae import elbo, importance_sampling
    from pyro_vae.latents import (
        active_units,
        aggregate_posterior,
        code_usage,
        completeness,
        continuity,
        lipschitz,
        nearest_distances,
        posterior_mean,
        probe_accuracy,
    )
    from pyro_vae.traces import log_joint
    from pyro_vae.training import read_metrics

    path = study.record_file(common, "latent_space", setting.name)
    if path.exists():
        return f"{setting.name}: measured before"
    run = trained(setting, common, progress=progress)
    model, guide, bits = run.model, run.guide, run.dataset
    grey = study.load("mnist", common, binarization="none")
    judge = classifier.trained(common.runs, grey)
    pyro.set_rng_seed(setting.seed)
    x, found = bits.test.x, {}

    def decode(z: torch.Tensor) -> torch.Tensor:
        return model.likelihood(z).mean

    def walk(z: torch.Tensor) -> torch.Tensor:  # between codes there are none
        is_vq = setting.kind == "VQ-VAE"
        return decode(guide.codebook(guide.codebook.nearest(z)) if is_vq else z)

    # How good is it?
    with torch.no_grad():
        codes, labels = posterior_mean(guide, bits.train.x[:10_000]), bits.train.labels[:10_000]
        of_test = posterior_mean(guide, x)
        found["log_likelihood_at_code"] = log_joint(model, {"z": of_test[None]}, x)[1].mean().item()
    if setting.kind != "autoencoder":
        found["elbo"] = elbo(model, guide, x, num_samples=10).elbo.mean().item()
    if setting.kind == "VAE":
        sampled = importance_sampling(model, guide, x[:1000], num_samples=1000, progress=progress)
        found["log_marginal_of_1000"] = sampled.mean
        found["active_units"] = int(active_units(guide, x).sum())
    if setting.kind == "VQ-VAE":
        found["log_marginal_of_1000"] = log_marginal_of_codes(model, guide, x[:1000])

    # Completeness
    limit = nearest_distances(grey.test.x[:2000], grey.train.x).quantile(0.95).item()
    found["completeness"] = {}
    with torch.no_grad():
        for name, density in samplers(setting.kind, model, codes).items():
            decoded = decode(density.sample((NUM_SAMPLES,)))
            found["completeness"][name] = completeness(decoded, judge, grey.train.x, limit)._asdict()
        recoded = completeness(walk(of_test[:NUM_SAMPLES]), judge, grey.train.x, limit)
        found["completeness"]["codes of test data"] = recoded._asdict()

    # Continuity
    start, end = of_test[:NUM_PAIRS], of_test[NUM_PAIRS : 2 * NUM_PAIRS]
    walks = continuity(walk, judge, start, end)
    apart = (start - end).norm(dim=1) > 0  # two codes may be one
    for name, values in walks._asdict().items():
        found[name] = values[apart].double().mean().item()
    slopes = lipschitz(decode, of_test[:NUM_PAIRS], codes.std(0))
    found |= {"lipschitz_median": slopes.median().item(), "lipschitz_largest": slopes.max().item()}

    # Information
    if setting.kind.startswith("VAE"):
        parts = aggregate_posterior(model, guide, x[:2000])
        found |= {name: part.mean for name, part in parts._asdict().items()}
        history = read_metrics(run.folder)
        found["variance"] = [[row["samples"], row["variance"]] for row in history]
        found["variance_by_latent"] = history[-1]["variance_by_latent"]
    if setting.kind == "VQ-VAE":
        found |= code_usage(guide, x)._asdict()

    # Labels
    found |= probe_accuracy(codes, labels, of_test, bits.test.labels)._asdict()
    study.keep(path, setting=dataclasses.asdict(setting), **found)
    return f"{setting.name}: measured"


# ------------------------------------------------------------------------------------------- report


def report(records: dict[Setting, dict[str, Any]], common: Common) -> Path:
    """Write latent_space.md and its figures."""
    import latent_space_report

    return latent_space_report.write(records, common, functools.partial(trained, progress=False))


if __name__ == "__main__":
    cli.run(main)
