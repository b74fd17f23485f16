"""Test three explanations of blurry samples, each changed alone.

    python scripts/studies/blur.py

Samples of VAEs are said to be blurry because of maximum likelihood, which must cover all data and so puts
mass between them; because of the family p(x | z), squared errors of independent pixels; or because of the
bound, whose posteriors are too simple. Frey Face is learned with one of these changed at a time: proper
families, a flow posterior, the importance-weighted bound. The effect of maximum likelihood shows in samples
of the prior that are less sharp than reconstructions, which have the same decoder. Ends in a report, blur.md.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import study
import tyro
from study import Common, cell

from pyro_vae.lab import cli
from pyro_vae.lab.choices import FAMILIES
from pyro_vae.lab.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.lab import Run

BASE = "squared error"
SYSTEMS: dict[str, dict[str, Any]] = {
    BASE: {},
    "family: one learned scale": {"family": "shared_scale_normal"},
    "family: a scale for every pixel": {"family": "sigmoid_normal"},
    "family: mixtures of logistics": {"family": "logistic_mixture", "binarization": "none"},
    "posterior: a flow": {"posterior": "iaf"},
    "bound: importance-weighted, 20 draws": {
        "objective": "iwae",
        "num_particles": 20,
        "gradient": "dreg",
    },
    "family and posterior: a scale for every pixel, a flow": {
        "family": "sigmoid_normal",
        "posterior": "iaf",
    },
}
FREY_EPOCHS = 20  # for each of the command's
NUM_IMAGES = 100  # whose log p(x) is estimated
NUM_SAMPLES = 1000
NUM_TEMPERATURES = 200


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Test three explanations of blurry samples, each changed alone."""

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training."""

    system: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and file."""
        words = "".join(c if c.isalnum() else " " for c in self.system).split()
        return f"{'_'.join(words)},seed{self.seed}"

    def config(self, common: Common) -> Config:
        """Return its configuration."""
        return Config(
            **{
                "data": "frey_face",
                "data_dir": common.data_dir,
                "binarization": "dequantize",
                "family": "fixed_scale_normal",
                "scale": 0.1,
                "latent_dim": 10,
                "hidden": (200,),
                "epochs": FREY_EPOCHS * common.epochs,
                "device": "cpu",
                "seed": self.seed,
                **SYSTEMS[self.system],
            }
        )


def main() -> None:
    """Train, measure, report."""
    common = tyro.cli(Arguments).common
    settings = [Setting(system, seed) for seed in range(common.seeds) for system in SYSTEMS]
    records = study.measured(measure, settings, common, "blur")
    print(f"report in {report(records, common)}")


def sharpness(images: "Tensor", shape: tuple[int, ...]) -> float:
    """Variance of the Laplacian of the median image; numbers are cut to [0, 1], as shown."""
    import torch

    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).reshape(1, 1, 3, 3)
    laplacian = torch.nn.functional.conv2d(images.clamp(0, 1).reshape(-1, 1, *shape[:2]), kernel)
    return laplacian.flatten(1).var(1).median().item()


def trained(setting: Setting, common: Common, *, progress: bool) -> "Run":
    """Train, or go on with it, and return the run: its pair and its data."""
    config = setting.config(common)
    dataset = study.load("frey_face", common, binarization=config.chosen_binarization)
    return study.trained(common.runs / "blur" / setting.name, config, dataset, progress=progress)


def measure(setting: Setting, common: Common, *, progress: bool) -> str:
    """Train one setting, measure it and keep the record."""
    import pyro
    import torch

    from pyro_vae import bits_per_dim, elbo, importance_sampling
    from pyro_vae.latents import fitted_mixture, posterior_mean
    from pyro_vae.tasks import annealed

    path = study.record_file(common, "blur", setting.name)
    if path.exists():
        return f"{setting.name}: measured before"
    run = trained(setting, common, progress=progress)
    pyro.set_rng_seed(setting.seed)
    test, shape = run.dataset.test, run.dataset.shape
    (x,) = run.arguments(test, NUM_IMAGES)
    estimate = annealed(run.model, run.guide, x, num_temperatures=NUM_TEMPERATURES, progress=progress)
    sampled = importance_sampling(run.model, run.guide, x, num_samples=1000, progress=progress)
    width = 1.0 if FAMILIES[run.config.family].values == "levels" else test.bin_width
    with torch.no_grad():
        rebuilt = run.model.likelihood(posterior_mean(run.guide, test.x)).mean
        drawn = run.model.likelihood(run.model.prior().sample((NUM_SAMPLES,)))
        codes = fitted_mixture(posterior_mean(run.guide, run.dataset.train.x))
        from_codes = run.model.likelihood(codes.sample((NUM_SAMPLES,))).mean
    grey = study.load("frey_face", common, binarization="none").test.x
    data = sharpness(grey, shape)
    study.keep(
        path,
        setting=dataclasses.asdict(setting),
        log_marginal=estimate.mean,
        bits_per_dim=bits_per_dim(estimate.mean, run.dataset.data_dim, width),
        monte_carlo_error=estimate.monte_carlo_error,
        importance_sampling=sampled.mean,
        unreliable_share=sampled.unreliable_share,
        gap=estimate.mean - elbo(run.model, run.guide, x, num_samples=30).elbo.mean().item(),
        sharpness={
            "reconstructions": sharpness(rebuilt, shape) / data,
            "means of samples": sharpness(drawn.mean, shape) / data,
            "means of samples, z from a mixture fitted to codes": sharpness(from_codes, shape) / data,
            "samples": sharpness(drawn.sample(), shape) / data,
        },
    )
    return f"{setting.name}: measured"


# ------------------------------------------------------------------------------------------- report


def report(records: dict[Setting, dict[str, Any]], common: Common) -> Path:
    """Write blur.md and its figure."""
    of = {system: [r for s, r in records.items() if s.system == system] for system in SYSTEMS}

    def column(system: str, *path: str) -> list[float]:
        return [functools.reduce(lambda value, key: value[key], path, record) for record in of[system]]

    def sharp(system: str, what: str) -> list[float]:
        return column(system, "sharpness", what)

    lines = []
    for system in SYSTEMS:
        missed = [r["log_marginal"] - r["importance_sampling"] for r in of[system]]
        cells = [cell(column(system, "bits_per_dim"), 3), cell(column(system, "gap"), 1), cell(missed, 1)]
        cells += [cell(sharp(system, what), 3) for what in of[BASE][0]["sharpness"]]
        lines.append([system, *cells])
    header = ["change", "bits per dimension", "log p(x) - ELBO, nats", "log p(x) - importance sampling, nats"]
    header += [f"sharpness of {what}" for what in of[BASE][0]["sharpness"]]
    claims = []
    explanations = {
        "the family": [name for name in SYSTEMS if name.startswith("family:")],
        "the bound": [name for name in SYSTEMS if name.startswith(("posterior:", "bound:"))],
    }
    means, from_codes = (name for name in of[BASE][0]["sharpness"] if name.startswith("means"))
    for explanation, systems in explanations.items():
        for text, what in (
            (f"Blur is due to {explanation}: with another one, samples are sharper", means),
            ("... also where z is drawn from a mixture fitted to codes", from_codes),
            ("... reconstructions are sharper", "reconstructions"),
        ):
            base = sharp(BASE, what)
            sharper = {f"for {name}": study.is_above(sharp(name, what), base) for name in systems}
            claims.append([text, f"**{study.verdict(sharper)}**"])
        better = {
            f"for {name}": study.is_above(column(BASE, "bits_per_dim"), column(name, "bits_per_dim"))
            for name in systems
        }
        claims.append(["... log p(x) is higher", f"**{study.verdict(better)}**"])
    for text, what in (
        (
            "Blur is due to maximum likelihood: samples of the prior are less sharp than reconstructions",
            means,
        ),
        ("... also where z is drawn from a mixture fitted to codes", from_codes),
    ):
        blurred = {
            f"for {name}": study.is_above(sharp(name, "reconstructions"), sharp(name, what))
            for name in SYSTEMS
        }
        claims.append([text, f"**{study.verdict(blurred)}**"])
    made = next(iter(records.values()))["made_by"]
    path = common.out / "blur.md"
    path.write_text(
        _TEXT.format(
            command=made["command"],
            machine=made["machine"],
            commits=", ".join(sorted({r["made_by"]["commit"] for r in records.values()})),
            epochs=FREY_EPOCHS * common.epochs,
            seeds=common.seeds,
            num_images=NUM_IMAGES,
            num_temperatures=NUM_TEMPERATURES,
            error=max(r["monte_carlo_error"] for r in records.values()),
            unreliable=f"{100 * statistics.mean(r['unreliable_share'] for r in records.values()):.0f}",
            claims=study.table(["explanation", "verdict"], claims),
            table=study.table(header, lines),
            figure=study.save_figure(figure_of(common), common, "blur"),
        )
    )
    return path


def figure_of(common: Common) -> Any:
    """Draw data and, for every system, means of samples from its prior and its codes; first seed."""
    import torch

    from pyro_vae.lab import plots
    from pyro_vae.latents import fitted_mixture, posterior_mean

    dataset = study.load("frey_face", common, binarization="none")
    drawn, titles = [dataset.test.x[::23][:16]], ["data"]
    for system in SYSTEMS:
        run = trained(Setting(system, 0), common, progress=False)
        torch.manual_seed(0)
        with torch.no_grad():
            codes = fitted_mixture(posterior_mean(run.guide, run.dataset.train.x))
            likelihood = run.model.likelihood(run.model.prior().sample((16,)))
            drawn += [likelihood.mean, run.model.likelihood(codes.sample((16,))).mean]
        titles += [f"{system}: means of samples", "z from a mixture fitted to codes"]
    return plots.image_grid(drawn, dataset.shape, titles)


_TEXT = """# Why samples are blurry

Made by

    {command}

({machine}; commit {commits}): Frey Face, 10 latents, 200 hidden units, {epochs} epochs, {seeds} seeds;
means over seeds ± standard error, and a claim holds where the difference is above two of them. The base
has a normal p(x | z) of fixed scale 0.1 (a squared error), a diagonal normal q(z | x) and the ELBO. log p(x)
of {num_images} test images is by annealed importance sampling from the guide with {num_temperatures}
temperatures (Monte Carlo error at most {error:.2f} nats): importance sampling of 1,000 draws is too low
here, as its k-hat warns for {unreliable} % of the images. Bits per dimension are of dequantised bytes for
densities and of bytes for mixtures of logistics, so that they compare. *Sharpness* is the variance of
an image's Laplacian over that of test images, of the median image; independent noise of pixels counts as
sharp, so that samples say less than their means do.

{claims}

{table}

![Samples of all]({figure})
"""


if __name__ == "__main__":
    cli.run(main)
