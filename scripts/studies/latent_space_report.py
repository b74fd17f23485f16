"""Report of latent_space.py, in words, tables and figures."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import study
from latent_space import KINDS, LATENTS, ROWS_PER_EPOCH, Setting
from study import Common, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = dict[Setting, dict[str, Any]]
Numbers = Callable[[str, int], list[float]]
_BEST_OF = {  # the best distribution to sample each kind from
    "autoencoder": "mixture fitted to the codes",
    "VAE": "prior",
    "VAE without KL": "mixture fitted to the codes",
    "VQ-VAE": "prior fitted to the codes",
}


class Claim(NamedTuple):
    """Claim about the systems, with the numbers that it says to be larger and smaller.

    Attributes:
        text: The claim.
        measure: The measure, in words.
        more: From the number of latents to one number for each seed, which the claim says to be larger.
        less: The same for the smaller numbers.
        digits: Digits to print.
    """

    text: str
    measure: str
    more: Callable[[int], list[float]]
    less: Callable[[int], list[float]]
    digits: int = 2


def claims(records: Records) -> list[Claim]:
    """Return all claims."""

    def of(kind: str, *path: str) -> Callable[[int], list[float]]:
        return lambda latent_dim: [_at(r, path) for r in rows(records, kind, latent_dim)]

    def complete(kind: str, sampler: str) -> Callable[[int], list[float]]:
        return of(kind, "completeness", sampler, "both")

    def constant(value: float) -> Callable[[int], list[float]]:
        return lambda latent_dim: [value] * len(rows(records, "VAE", latent_dim))

    def variance(first: int | None, last: int | None) -> Callable[[int], list[float]]:
        """Mean variance of the VAE over rows of the history."""
        return lambda latent_dim: [
            statistics.mean(v for _, v in r["variance"][first:last]) for r in rows(records, "VAE", latent_dim)
        ]

    at_first, at_last = variance(None, ROWS_PER_EPOCH), variance(-ROWS_PER_EPOCH, None)
    found = [
        Claim(
            f"An autoencoder has holes: samples from {sampler} are seldom like data, the VAE's from its "
            "prior are",
            "share of samples both sure and close, VAE against autoencoder",
            complete("VAE", "prior"),
            complete("autoencoder", sampler),
        )
        for sampler in (
            "box around the codes",
            "normal fitted to the codes",
            "mixture fitted to the codes",
        )
    ]
    return [
        *found,
        Claim(
            "The KL term closes the holes",
            "the same share from N(0, I), with the KL term against without",
            complete("VAE", "prior"),
            complete("VAE without KL", "prior"),
        ),
        Claim(
            "... even where the VAE without KL gets a mixture fitted to its codes",
            "the same share, prior with the KL term against mixture without",
            complete("VAE", "prior"),
            complete("VAE without KL", "mixture fitted to the codes"),
        ),
        Claim(
            "Without the KL term posteriors shrink to points",
            "mean variance of q at the end, VAE against VAE without KL",
            at_last,
            lambda d: [r["variance"][-1][1] for r in rows(records, "VAE without KL", d)],
            4,
        ),
        Claim(
            "A VAE is continuous where an autoencoder is not: walks between codes are straighter",
            "path length over distance of the ends, autoencoder against VAE",
            of("autoencoder", "path_length"),
            of("VAE", "path_length"),
        ),
        Claim(
            "... they pass through fewer classes that are neither end's",
            "class changes beyond the necessary one, autoencoder against VAE",
            of("autoencoder", "detours"),
            of("VAE", "detours"),
        ),
        Claim(
            "... and its decoder is less steep",
            "largest slope at 500 codes, by standard deviations of the codes, autoencoder against VAE",
            of("autoencoder", "lipschitz_largest"),
            of("VAE", "lipschitz_largest"),
        ),
        Claim(
            "The variance of q is small at first and then grows",
            "mean over latents, in the last epoch against the first",
            at_last,
            at_first,
            3,
        ),
        Claim(
            "... towards 1",
            "mean over latents in the last epoch, against 0.5",
            at_last,
            constant(0.5),
            3,
        ),
        Claim(
            "A discrete codebook reconstructs better",
            "log p(x given z) at the code, nats, VQ-VAE against VAE",
            of("VQ-VAE", "log_likelihood_at_code"),
            of("VAE", "log_likelihood_at_code"),
        ),
        Claim(
            "... its samples are more often like data",
            "share of samples both sure and close, VQ-VAE with a fitted prior against VAE",
            complete("VQ-VAE", "prior fitted to the codes"),
            complete("VAE", "prior"),
        ),
        Claim(
            "... and it is the better density model",
            "log p(x), nats, VQ-VAE with a fitted prior against VAE",
            of("VQ-VAE", "log_marginal_of_1000"),
            of("VAE", "log_marginal_of_1000"),
        ),
        Claim(
            "A VAE's codes say more of the label than an autoencoder's",
            "accuracy of a linear classifier of codes, VAE against autoencoder",
            of("VAE", "linear"),
            of("autoencoder", "linear"),
            3,
        ),
        Claim(
            "... also to their nearest neighbours",
            "accuracy of nearest neighbours, VAE against autoencoder",
            of("VAE", "nearest_neighbours"),
            of("autoencoder", "nearest_neighbours"),
            3,
        ),
    ]


def rows(records: Records, kind: str, latent_dim: int) -> list[dict[str, Any]]:
    """Records of all seeds."""
    return [r for s, r in records.items() if (s.kind, s.latent_dim) == (kind, latent_dim)]


def _at(record: dict[str, Any], path: Sequence[str]) -> float:
    for name in path:
        record = record[name]
    return record


def write(records: Records, common: Common, trained: Callable[..., Any]) -> Path:
    """Write latent_space.md; return its path."""
    import torch

    runs = {}
    for setting in records:
        if setting.seed == 0:
            torch.manual_seed(0)
            runs[setting.kind, setting.latent_dim] = trained(setting, common)
    drawn = {
        "latent_space_plane": plane(runs),
        "latent_space_samples": samples(runs),
        "latent_space_variance": variances(records),
        "latent_space_walks": walks(runs),
    }
    figures = {name: study.save_figure(figure, common, name) for name, figure in drawn.items()}
    made = next(iter(records.values()))["made_by"]
    text = _TEXT.format(
        command=made["command"],
        machine=made["machine"],
        commits=", ".join(sorted({r["made_by"]["commit"] for r in records.values()})),
        seeds=common.seeds,
        epochs=common.epochs,
        claims=claims_table(records),
        completeness=completeness_table(records),
        others=others_table(records),
        **figures,
    )
    path = common.out / "latent_space.md"
    path.write_text(text)
    return path


def claims_table(records: Records) -> str:
    """Write a row for each claim, with its verdict."""
    lines = []
    for claim in claims(records):
        found, cells = {}, []
        for latent_dim in LATENTS:
            more, less = claim.more(latent_dim), claim.less(latent_dim)
            found[f"with {latent_dim} latents"] = study.is_above(more, less)
            cells.append(f"{cell(more, claim.digits)} against {cell(less, claim.digits)}")
        lines.append([claim.text, claim.measure, *cells, f"**{study.verdict(found)}**"])
    header = ["claim", "measure", *(f"{latent_dim} latents" for latent_dim in LATENTS), "verdict"]
    return study.table(header, lines)


def completeness_table(records: Records) -> str:
    """Write shares of samples, by what was sampled."""
    lines = []
    for latent_dim in LATENTS:
        for kind in KINDS:
            found = [r["completeness"] for r in rows(records, kind, latent_dim)]
            for sampler in found[0]:
                shares = [cell([r[sampler][name] for r in found]) for name in ("sure", "close", "both")]
                lines.append([str(latent_dim), kind, sampler, *shares])
    return study.table(["latents", "system", "sampled from", "sure", "close", "both"], lines)


def others_table(records: Records) -> str:
    """Write all other measures."""
    names = {
        "log_likelihood_at_code": ("log p(x given z) at the code", 1),
        "elbo": ("bound on log p(x)", 1),
        "log_marginal_of_1000": ("log p(x), 1,000 test images", 1),
        "path_length": ("path length", 2),
        "detours": ("detours", 2),
        "largest_step": ("largest step", 1),
        "lipschitz_median": ("slope, median", 2),
        "lipschitz_largest": ("slope, largest", 1),
        "kl": ("KL, mean over data", 1),
        "mutual_information": ("mutual information", 2),
        "marginal_kl": ("marginal KL", 2),
        "perplexity": ("perplexity", 1),
        "share": ("share of codes used", 2),
        "linear": ("labels, linear", 3),
        "nearest_neighbours": ("labels, neighbours", 3),
    }
    lines = []
    for name, (words, digits) in names.items():
        for latent_dim in LATENTS:
            found = [[r[name] for r in rows(records, kind, latent_dim) if name in r] for kind in KINDS]
            lines.append([words, str(latent_dim), *(cell(f, digits) if f else "" for f in found)])
    return study.table(["measure", "latents", *KINDS], lines)


# ------------------------------------------------------------------------------------------- figures


def plane(runs: dict) -> "Figure":
    """Draw codes of test data in the plane, by class, and the images that the plane decodes to."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8.2), layout="constrained")
    for axes, kind in zip(figure.subplots(2, len(KINDS)).T, KINDS, strict=True):
        run = runs[kind, 2]
        test = run.dataset.test
        codes = run.encode(test.x[:5000])
        low, high = codes.quantile(0.005, 0), codes.quantile(0.995, 0)
        grid = [torch.linspace(float(a), float(b), 20) for a, b in zip(low, high, strict=True)]
        z = torch.cartesian_prod(grid[1].flip(0), grid[0]).flip(1)
        images = run.decode(z).reshape(20, 20, 28, 28)
        axes[0].scatter(*codes.T.numpy(), c=test.labels[:5000].numpy(), s=3, cmap="tab10")
        (left, bottom), (right, top) = low.tolist(), high.tolist()
        axes[0].set(title=kind, xlim=(left, right), ylim=(bottom, top))
        axes[1].imshow(torch.cat([torch.cat(list(row), 1) for row in images]).numpy(), cmap="gray_r")
        axes[1].axis("off")
    return figure


def samples(runs: dict) -> "Figure":
    """Draw samples of each system, with 20 latents."""
    import torch
    from latent_space import samplers

    from pyro_vae.lab import plots

    drawn, titles = [], []
    for kind in KINDS:
        run = runs[kind, 20]
        codes = run.encode(run.dataset.train.x[:10_000])
        with torch.no_grad():
            for name, density in samplers(kind, run.model, codes).items():
                drawn.append(run.decode(density.sample((16,))))
                titles.append(f"{kind}: {name}")
    return plots.image_grid(drawn, (28, 28), titles)


def variances(records: Records) -> "Figure":
    """Draw the mean variance of q over training, all seeds; and that of every latent at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_time, at_end = figure.subplots(1, 2)
    styles = {"VAE": "-", "VAE without KL": "--"}
    for colour, latent_dim in zip(("C0", "C3"), LATENTS, strict=True):
        for kind, style in styles.items():
            for record in rows(records, kind, latent_dim):
                samples_seen, values = zip(*record["variance"], strict=True)
                label = f"{kind}, {latent_dim} latents" if record["setting"]["seed"] == 0 else None
                over_time.plot(samples_seen, values, style, color=colour, lw=1, label=label)
        for record in rows(records, "VAE", latent_dim):
            values = sorted(record["variance_by_latent"])
            at_end.plot(range(1, len(values) + 1), values, "o-", color=colour, ms=3, lw=0.7)
    over_time.set(xscale="log", yscale="log", xlabel="training data seen", ylabel="variance of q, mean")
    over_time.legend(fontsize=7)
    at_end.set(xlabel="latents, sorted", ylabel="variance of q at the end, VAE", ylim=(0, 1.05))
    for axes in (over_time, at_end):
        axes.grid(alpha=0.3)
    return figure


def walks(runs: dict) -> "Figure":
    """Draw walks from one test digit to another, with 20 latents; those of the VQ-VAE by its codes."""
    from pyro_vae.lab import plots
    from pyro_vae.latents import along, straight

    drawn, titles = [], []
    for kind in KINDS:
        run = runs[kind, 20]
        codes = run.encode(run.dataset.test.x[:10])
        for first, second in ((0, 1), (4, 8)):
            z = along(straight, codes[first : first + 1], codes[second : second + 1], 16).squeeze(1)
            if kind == "VQ-VAE":
                z = run.guide.codebook(run.guide.codebook.nearest(z))
            drawn.append(run.decode(z))
            titles.append(kind if first == 0 else "")
    return plots.image_grid(drawn, (28, 28), titles)


_TEXT = """# What the latent space is worth

The story: an autoencoder has holes in its latent space; the KL term closes them; a discrete codebook does
better. Here are its claims, each with a measure. Made by

    {command}

({machine}; commit {commits}): MNIST, binarised anew for every minibatch, {epochs} epochs of 50,000
images, one hidden layer of 500 tanh units, {seeds} seeds. Numbers are means over seeds ± the standard
error of the mean; a claim holds where the difference is in its direction by more than two standard errors
of it.

- *Sure*: a convolutional classifier trained on real images gives a class at least 0.9. *Close*: the
  nearest of 50,000 training images is not farther away than it is for 95 % of real test images. Both are
  of decoded means, and closeness forgives blur. The row "codes of test data" is what reconstructions
  reach.
- *Walks* go straight from the code of a test image to that of another, 500 pairs, 50 points. *Path
  length*: of the decoded walk over the distance of its ends; *detours*: changes of the classifier's class
  beyond the one needed; *largest step* over the mean step. A VQ-VAE walks over its codes.
- *Slope*: the largest singular value of the decoder's derivative at 500 codes, by standard deviations of
  the codes.
- The VAE without KL has its KL term weighted by 0. The VQ-VAE has one code of 2 numbers out of 512 (2
  latents), or ten out of 64 (20); its prior over codes is a transformer.
- *log p(x)* of 1,000 test images is estimated by importance sampling for the VAE; it is exact for the VQ-VAE
  of one code, a sum over all, and for the one of ten codes the bound that the encoder's own gives.

## Claims

{claims}

## Completeness

{completeness}

![Samples with 20 latents]({latent_space_samples})

*Decoded samples, 20 latents.*

![The plane of two latents]({latent_space_plane})

*Two latents: codes of test images by class, and what that region of the plane decodes to.*

## Continuity

![Walks]({latent_space_walks})

*Walks between the codes of test images, 20 latents.*

## Variance of q

![Variance of q over training]({latent_space_variance})

*Left, the mean over latents; right, of every latent at the end. Encoders start near variance 1; without the
KL term it falls to the square of the smallest scale that the family has, 0.001.*

## All measures

Mutual information is that of z and the number of one of 2,000 test images, so it is at most log 2,000 =
7.60. Where it gets there, as with 20 latents, the marginal KL is that of 2,000 separate posteriors, and only
an upper bound on that of the encoder of all possible images.

{others}
"""
