"""Compare a VQ-VAE with a grid of codes and a VAE, both of convolutions: reconstructions, samples, bounds.

    python scripts/studies/vq_vae.py --epochs 10

Both learn MNIST with the same convolutions. The VAE's latents are 32 numbers under N(0, I); those of the
VQ-VAE are a grid of 7 x 7 codes. A prior is fitted to the codes of both. Ends in a report, vq_vae.md.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import study
import tyro
from study import Common, cell

from pyro_vae.lab import cli
from pyro_vae.lab.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from pyro_vae.lab import Run

KINDS = ("VAE", "VQ-VAE")
LATENT_DIM = 32
PLACES = 7 * 7
NUM_CODES, CODE_DIM = 64, 8
COMPONENTS = 100
NUM_SAMPLES = 1000
NUM_DRAWS = 500  # of importance sampling
PRIORS = {
    "VAE": {"of the training": "N(0, I)", "fitted afterwards": "mixture"},
    "VQ-VAE": {"of the training": "even", "fitted afterwards": "transformer"},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare a VQ-VAE with a grid of codes and a VAE, both of convolutions."""

    common: tyro.conf.OmitArgPrefixes[Common] = dataclasses.field(default_factory=Common)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and file."""
        return f"{self.kind.lower()},seed{self.seed}"

    @property
    def is_vq(self) -> bool:
        """True if its latents are codes."""
        return self.kind == "VQ-VAE"


def main() -> None:
    """Train, measure, report."""
    import classifier

    common = tyro.cli(Arguments).common
    settings = [Setting(kind, seed) for seed in range(common.seeds) for kind in KINDS]
    classifier.trained(common.runs, study.load("mnist", common, binarization="none"))
    records = study.measured(measure, settings, common, "vq_vae")
    print(f"report in {report(records, common)}")


def config(setting: Setting, common: Common, **others: Any) -> Config:
    """Return its configuration; before a prior is fitted."""
    own = {"prior": "codes", "latent_dim": PLACES * CODE_DIM, "num_codes": NUM_CODES, "code_dim": CODE_DIM}
    values = {
        "data": "mnist",
        "data_dir": common.data_dir,
        "net": "conv",
        "epochs": common.epochs,
        "device": "cpu",
        "seed": setting.seed,
        **(own if setting.is_vq else {"latent_dim": LATENT_DIM}),
    }
    return Config(**values | others)


def trained(setting: Setting, common: Common, *, progress: bool) -> "tuple[Run, dict[str, nn.Module]]":
    """Train; return the run and its priors: that of the training, and one that was fitted afterwards."""
    dataset = study.load("mnist", common, binarization="dynamic")
    folder = common.runs / "vq_vae" / setting.name
    run = study.trained(folder, config(setting, common), dataset, progress=progress)
    fitted = (
        {"prior": "transformer"}
        if setting.is_vq
        else {"prior": "mixture_of_normals", "components": COMPONENTS}
    )
    refit = config(setting, common, refit_prior=folder, **fitted)
    then = study.trained(folder / "prior", refit, dataset, progress=progress)
    return run, {"of the training": run.model.prior, "fitted afterwards": then.model.prior}


def measure(setting: Setting, common: Common, *, progress: bool) -> str:
    """Train one setting, measure it and keep the record."""
    import classifier
    import pyro
    import torch

    from pyro_vae import elbo, importance_sampling
    from pyro_vae.latents import code_usage, completeness, nearest_distances, posterior_mean
    from pyro_vae.traces import log_joint

    path = study.record_file(common, "vq_vae", setting.name)
    if path.exists():
        return f"{setting.name}: measured before"
    run, priors = trained(setting, common, progress=progress)
    model, guide = run.model, run.guide
    grey = study.load("mnist", common, binarization="none")
    judge = classifier.trained(common.runs, grey)
    limit = nearest_distances(grey.test.x[:2000], grey.train.x).quantile(0.95).item()
    pyro.set_rng_seed(setting.seed)
    x = run.dataset.test.x
    parts = {"encoder": guide.encoder if setting.is_vq else guide.posterior, "decoder": model.likelihood}
    parts["fitted prior"] = priors["fitted afterwards"]
    found: dict[str, Any] = code_usage(guide, x)._asdict() if setting.is_vq else {}
    found["parameters"] = {name: sum(p.numel() for p in net.parameters()) for name, net in parts.items()}
    with torch.no_grad():
        at_code = [
            log_joint(model, {"z": posterior_mean(guide, part)[None]}, part)[1] for part in x.split(1000)
        ]
        found["log_likelihood_at_code"] = torch.cat(at_code, 1).mean().item()
        for name, prior in priors.items():
            model.prior = prior
            decoded = model.likelihood(prior().sample((NUM_SAMPLES,))).mean
            found[name] = completeness(decoded, judge, grey.train.x, limit)._asdict()
            found[name]["elbo"] = elbo(model, guide, x).elbo.mean().item()
            if not setting.is_vq:
                sampled = importance_sampling(
                    model, guide, x[:1000], num_samples=NUM_DRAWS, progress=progress
                )
                bound = elbo(model, guide, x[:1000], num_samples=10).elbo.mean().item()
                found[name]["gap"] = sampled.mean - bound
    study.keep(path, setting=dataclasses.asdict(setting), **found)
    return f"{setting.name}: measured"


# ------------------------------------------------------------------------------------------- report


def report(records: dict[Setting, dict[str, Any]], common: Common) -> Path:
    """Write vq_vae.md and its figure."""
    of = {kind: [r for s, r in records.items() if s.kind == kind] for kind in KINDS}
    lines = []
    for kind in KINDS:
        for prior in ("of the training", "fitted afterwards"):
            rows = [record[prior] for record in of[kind]]
            cells = [cell([row[name] for row in rows]) for name in ("elbo", "sure", "close", "both")]
            lines.append([kind, PRIORS[kind][prior], *cells])
    sizes = {kind: of[kind][0]["parameters"] for kind in KINDS}
    path = common.out / "vq_vae.md"
    made = next(iter(records.values()))["made_by"]
    usage = of["VQ-VAE"]
    path.write_text(
        _TEXT.format(
            command=made["command"],
            machine=made["machine"],
            commits=", ".join(sorted({r["made_by"]["commit"] for r in records.values()})),
            epochs=common.epochs,
            seeds=common.seeds,
            sizes="; ".join(
                f"{kind}: {', '.join(f'{part} {size:,}' for part, size in parts.items())}"
                for kind, parts in sizes.items()
            ),
            bits=f"{49 * math.log2(NUM_CODES):.0f}",
            at_code=" and ".join(
                f"{cell([r['log_likelihood_at_code'] for r in of[kind]])} ({kind})" for kind in KINDS
            ),
            usage=cell([100 * r["share"] for r in usage], 1),
            perplexity=cell([r["perplexity"] for r in usage], 1),
            draws=NUM_DRAWS,
            gap=cell([r["fitted afterwards"]["gap"] for r in of["VAE"]]),
            table=study.table(
                ["system", "prior", "bound on log p(x), nats", "samples sure", "close", "both"], lines
            ),
            figure=study.save_figure(figure_of(common), common, "vq_vae"),
        )
    )
    return path


def figure_of(common: Common) -> "Figure":
    """Draw test images, reconstructions and samples of the first seed."""
    import torch

    from pyro_vae.lab import plots

    x = study.load("mnist", common, binarization="dynamic").test.x[:16]
    drawn, titles = [x], ["test images"]
    for kind in KINDS:
        run, priors = trained(Setting(kind, 0), common, progress=False)
        torch.manual_seed(0)
        with torch.no_grad():
            drawn.append(run.decode(run.encode(x)))
            drawn += [run.model.likelihood(prior().sample((16,))).mean for prior in priors.values()]
        titles += [f"{kind}: reconstructions", *(f"samples, {PRIORS[kind][name]}" for name in priors)]
    return plots.image_grid(drawn, (28, 28), titles)


_TEXT = """# A VQ-VAE beside a VAE of like size

Made by

    {command}

({machine}; commit {commits}): MNIST, binarised anew for every minibatch, {epochs} epochs of 50,000 images,
{seeds} seeds, means over seeds ± standard error. Both encoders halve the images twice by convolutions of 32
and 64 channels, and both decoders double them again. The VAE has 32 latents; the VQ-VAE a grid of 7 x 7 codes
out of 64, {bits} bits, whose vectors have 8 numbers. Trained with an even prior and with N(0, I), both get a
prior fitted to their codes, for as many epochs again, while all else stays as it is: a transformer and a
mixture of 100 normals. Parameters:
{sizes}.

The VQ-VAE uses {usage} % of its codebook, with a perplexity of {perplexity} of 64.
At the code, log p(x given z) is {at_code} nats.
The code that the VQ-VAE's encoder gives makes a lower bound on log p(x), as the ELBO of the VAE is one; that
of the VAE with its mixture is {gap} nats below importance sampling's estimate of log p(x) ({draws} draws,
1,000 test images).

{table}

*Sure* and *close* are those of latent_space.md: a classifier gives a class at least 0.9; no farther from the
nearest training image than 95 % of test images are.

![Reconstructions and samples]({figure})
"""


if __name__ == "__main__":
    cli.run(main)
