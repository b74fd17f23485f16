"""Write one page about all that has been run: the paper's values beside ours, and what is missing.

    python scripts/paper/report.py

Reads the curves in results/paper and writes results/paper.md. At its top stands results/paper/notes.md,
which is written by hand. A test value of ours passes if it is within 1 nat of figure 2 for MNIST, within 5 %
for Frey Face (both from 1e6 samples on), and within 2 nats of figure 3.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import figure2
import figure3
import full_vb
import gradients
import published
import tyro
from curves import load_all, value_at
from reproduction import Common, Setting

from pyro_vae.files import write_atomically
from pyro_vae.lab import cli

Record = dict[str, Any]
_LEGEND = "ours (minus the paper's); of test values ✓ within the band, ✗ outside"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write one page about all that has been run: every value of the paper's figures beside ours."""

    out: Path = Path("results")
    """Folder with paper/*/*.json and figures; paper.md is written there."""


def main() -> None:
    """Read, compare, write."""
    common = Common(out=tyro.cli(Arguments).out)
    notes = common.out / "paper" / "notes.md"
    sections = [
        "# Auto-Encoding Variational Bayes, reproduced",
        "Written by `python scripts/paper/report.py`. The paper's values are digitised from the vector "
        "graphics of its PDF (arXiv 1312.6114).",
        notes.read_text().strip() if notes.exists() else "",
        *of_figure2(common),
        *of_figure3(common),
        *images(common),
        *of_gradients(common),
        *of_full_vb(common),
        *origins(common),
    ]
    path = common.out / "paper.md"
    write_atomically(("\n\n".join(filter(None, sections)) + "\n").encode(), path)
    print(f"report in {path}")


def cell(ours: float | None, paper: float | None, band: float | None) -> str:
    """Write a value of ours beside the paper's; without a band there is no verdict."""
    if paper is None:
        return "" if ours is None else f"{ours:.1f}"
    if ours is None:
        return f"— (paper {paper:.1f})"
    verdict = "" if band is None else " ✓" if abs(ours - paper) <= band else " ✗"
    return f"{ours:.1f} ({ours - paper:+.1f}){verdict}"


def find(records: Sequence[Record], setting: Setting) -> Record | None:
    """Return the curve of a setting, if it was made."""
    wanted = dataclasses.asdict(setting)
    return next((record for record in records if record["setting"] == wanted), None)


def column(record: Record | None, name: str) -> list[tuple[float, float]]:
    """Return the values of a curve of one kind."""
    if record is None:
        return []
    place = record["columns"].index(name)
    return [(row[0], row[place]) for row in record["curve"]]


def number(samples: float) -> str:
    """Write a number of samples, such as 1e6 or 2e7."""
    return f"{samples:.0e}".replace("e+0", "e").replace("e+", "e")


def figure_of(common: Common, name: str) -> str:
    """Link to the figure, if it was drawn."""
    path = common.out / "figures" / f"paper_{name}.png"
    return f"![{name}](figures/{path.name})" if path.exists() else f"(figure {name} is missing)"


# ------------------------------------------------------------------------------------------- figure 2


def of_figure2(common: Common) -> Iterator[str]:
    """Yield tables of bounds, of AEVB against wake-sleep, and of variations."""
    records = load_all(common, "figure2")
    for data, latent_dims in figure2.LATENT_DIMS.items():
        hidden = figure2.HIDDEN[data]
        yield f"## Figure 2, {data}: the lower bound"
        yield figure_of(common, f"figure2_{data}")
        settings = [Setting(data, z, a, hidden) for z in latent_dims for a in figure2.ALGORITHMS]
        samples = [x for x, _ in published.figure2(data, latent_dims[0], "aevb", "test")]
        yield _legend(data) + table(
            ["latents", "algorithm", "split", *map(number, samples)],
            (
                [str(s.latent_dim), figure2.ALGORITHMS[s.algorithm], split]
                + [_figure2_cell(find(records, s), s, split, x) for x in samples]
                for s in settings
                for split in ("train", "test")
            ),
        )
        yield _aevb_above_wake_sleep(records, data)
        yield from _variations(records, data)


def _legend(data: str) -> str:
    band = "1 nat" if data == "mnist" else "5 %"
    return f"Nats; {_LEGEND} ({band}).\n\n"


def _figure2_cell(record: Record | None, setting: Setting, split: str, samples: float) -> str:
    curve = published.figure2(setting.data, setting.latent_dim, setting.algorithm, split)
    paper = value_at(curve, samples)
    ours = value_at(column(record, split), samples)
    band = None
    if split == "test" and samples >= 1e6 and paper is not None:
        band = 1.0 if setting.data == "mnist" else 0.05 * abs(paper)
    return cell(ours, paper, band)


def _aevb_above_wake_sleep(records: Sequence[Record], data: str) -> str:
    """Least lead of AEVB on test data from 1e6 samples on."""
    leads = []
    for latent_dim in figure2.LATENT_DIMS[data]:
        pair = [
            column(find(records, Setting(data, latent_dim, name, figure2.HIDDEN[data])), "test")
            for name in figure2.ALGORITHMS
        ]
        for samples, aevb in pair[0]:
            other = value_at(pair[1], samples)
            if samples >= 1e6 and other is not None:
                leads.append((aevb - other, latent_dim, samples))
    if not leads:
        return "AEVB and wake-sleep cannot be compared yet."
    lead, latent_dim, samples = min(leads)
    verdict = (
        "AEVB is above wake-sleep everywhere ✓" if lead > 0 else "AEVB is not above wake-sleep everywhere ✗"
    )
    return (
        f"{verdict}: from 1e6 samples on its test bound leads by at least {lead:.1f} nats "
        f"({latent_dim} latents, {number(samples)} samples)."
    )


def _variations(records: Sequence[Record], data: str) -> Iterator[str]:
    """Yield a table of variations, one at a time, on test data."""
    rows = []
    for record in records:
        setting = record["setting"]
        plain = plain_figure2(setting)
        if setting["data"] == data and changes(setting, plain):
            theirs = published.figure2(data, setting["latent_dim"], setting["algorithm"], "test")
            unvaried = find(records, plain)
            with_and_without = column(record, "test"), column(unvaried, "test")
            rows.append(
                [
                    said(changes(setting, plain)),
                    str(setting["latent_dim"]),
                    figure2.ALGORITHMS[setting["algorithm"]],
                    str(record["step_size"]),
                    str(unvaried["step_size"]) if unvaried else "",
                    *(
                        cell(value_at(curve, x), value_at(theirs, x), None)
                        for curve in with_and_without
                        for x in (1e6, 1e7)
                    ),
                ]
            )
    if rows:
        yield "One thing varied at a time: test bounds, ours (minus the paper's)."
        header = ["variation", "latents", "algorithm", "step size", "without it"]
        yield table([*header, "1e6", "1e7", "1e6 without it", "1e7 without it"], rows)


def plain_figure2(setting: Record) -> Setting:
    """Return the setting without its variation."""
    return Setting(**{name: setting[name] for name in ("data", "latent_dim", "algorithm", "hidden")})


def plain_figure3(setting: Record) -> Setting:
    """Return the setting without its variation."""
    return figure3.setting(setting["num_train"], setting["algorithm"])


def changes(setting: Record, plain: Setting) -> dict[str, Any]:
    """Return the names and values that were varied."""
    return {
        name: setting[name] for name, value in dataclasses.asdict(plain).items() if setting[name] != value
    }


def said(changed: dict[str, Any]) -> str:
    """Write a variation in words."""
    return ", ".join(f"{name} {value}" for name, value in changed.items())


# ------------------------------------------------------------------------------------------- figure 3


def of_figure3(common: Common) -> Iterator[str]:
    """Yield tables of log p(x), by Appendix D and by quadrature, and the paper's three findings."""
    records = load_all(common, "figure3")
    yield "## Figure 3: log p(x), 3 latents"
    yield figure_of(common, "figure3")
    rows = []
    samples = [x for x, _ in published.figure3(1000, "aevb", "test")]
    for num_train in (1000, 50000):
        for algorithm, label in figure3.ALGORITHMS.items():
            record = find(records, figure3.setting(num_train, algorithm))
            for split in ("train", "test"):
                theirs = published.figure3(num_train, algorithm, split)
                ours = column(record, f"{split}_hmc")
                band = 2.0 if split == "test" else None
                cells = [cell(value_at(ours, x), value_at(theirs, x), band) for x in samples]
                rows.append([f"{num_train:,}", label, split, *cells])
    yield f"Nats, by Appendix D; {_LEGEND} (2 nats).\n\n" + table(
        ["training data", "algorithm", "split", *map(number, samples)], rows
    )
    unvaried = [r for r in records if not changes(r["setting"], plain_figure3(r["setting"]))]
    yield from _impossible(unvaried)
    yield from _figure3_variations(records)
    yield from _exact(unvaried)
    yield from _findings(records)


def _impossible(records: Sequence[Record]) -> Iterator[str]:
    """Count the estimates that are not in the means."""
    counts = [
        count
        for record in records
        for split in ("train", "test")
        for _, count in column(record, f"{split}_impossible")
    ]
    total = sum(2 * record["estimated"] * len(record["curve"]) for record in records)
    if total:
        yield f"Of {total:,} estimates {sum(counts)} are above 0, which cannot be, and are not in the means."


def _figure3_variations(records: Sequence[Record]) -> Iterator[str]:
    """Yield a table of variations, one at a time, where the curve ends."""
    rows = []
    for record in records:
        setting = record["setting"]
        unvaried = plain_figure3(setting)
        varied, plain = changes(setting, unvaried), find(records, unvaried)
        samples = record["curve"][-1][0]
        if not varied or plain is None or plain["estimated"] != record["estimated"]:
            continue
        cells = [
            cell(
                value_at(column(curve, f"{split}_hmc"), samples),
                value_at(published.figure3(setting["num_train"], setting["algorithm"], split), samples),
                None,
            )
            for curve in (record, plain)
            for split in ("train", "test")
        ]
        names = figure3.ALGORITHMS[setting["algorithm"]], str(record["step_size"]), number(samples)
        rows.append([said(varied), f"{setting['num_train']:,}", *names, *cells])
    if rows:
        yield "One thing varied at a time: ours (minus the paper's)."
        header = ["variation", "training data", "algorithm", "step size", "samples"]
        yield table([*header, "train", "test", "train without it", "test without it"], rows)


def _exact(records: Sequence[Record]) -> Iterator[str]:
    rows = []
    for record in records:
        last = dict(zip(record["columns"], record["curve"][-1], strict=True))
        setting = record["setting"]
        for split in ("train", "test"):
            sampled, exact = last[f"{split}_hmc_of_exact"], last[f"{split}_exact"]
            rows.append(
                [
                    f"{setting['num_train']:,}",
                    figure3.ALGORITHMS[setting["algorithm"]],
                    split,
                    str(record["exact"]),
                    number(last["samples"]),
                    f"{sampled:.3f}",
                    f"{exact:.3f}",
                    f"{sampled - exact:+.3f}",
                ]
            )
    if rows:
        yield "Appendix D against quadrature, which is exact here, on the first data of each split:"
        header = ["training data", "algorithm", "split", "data", "samples"]
        yield table([*header, "Appendix D", "quadrature", "difference"], rows)


def _findings(records: Sequence[Record]) -> Iterator[str]:
    """Check the three findings of the paper, at the last number of samples that both have."""

    def last(num_train: int, split: str) -> tuple[float, float, float] | None:
        aevb, mcem = (
            column(find(records, figure3.setting(num_train, name)), f"{split}_hmc")
            for name in ("aevb", "mcem")
        )
        if not aevb or not mcem:
            return None
        at = min(aevb[-1][0], mcem[-1][0])
        return value_at(aevb, at), value_at(mcem, at), at

    facts: list[tuple[str, int, str, Callable[[float, float], bool]]] = [
        (
            "at 1,000 data AEVB and MCEM meet on train",
            1000,
            "train",
            lambda aevb, mcem: abs(aevb - mcem) < 2,
        ),
        (
            "at 1,000 data MCEM is better on test by 1 to 2 nats",
            1000,
            "test",
            lambda aevb, mcem: 1 <= mcem - aevb <= 2,
        ),
        ("at 50,000 data MCEM is far behind", 50000, "test", lambda aevb, mcem: aevb - mcem > 5),
    ]
    lines = []
    for text, num_train, split, holds in facts:
        values = last(num_train, split)
        if not values:
            lines.append(f"- {text}: missing")
            continue
        aevb, mcem, samples = values
        verdict = "✓" if holds(aevb, mcem) else "✗"
        lines.append(
            f"- {text}: {verdict} (AEVB {aevb:.1f}, MCEM {mcem:.1f} after {number(samples)} samples)"
        )
    yield "The paper's findings (there at 6e7 samples):\n\n" + "\n".join(lines)


# ------------------------------------------------------------------------------------------- the rest


def images(common: Common) -> Iterator[str]:
    """Yield figures 4 and 5."""
    yield "## Figures 4 and 5: manifolds and samples"
    for name in ("figure4_mnist", "figure4_frey_face", "figure5"):
        yield figure_of(common, name)


def of_gradients(common: Common) -> Iterator[str]:
    """Yield the table of gradients.py."""
    path = common.out / "paper" / "gradients.json"
    yield "## Why the reparameterisation: variance of gradients"
    if not path.exists():
        yield "missing: run gradients.py"
        return
    record = json.loads(path.read_text())
    yield figure_of(common, "gradients")
    yield (
        f"Of the bound by the encoder's parameters, {record['setting']['latent_dim']} latents, in units of "
        f"the squared length of the mean gradient; {record['repetitions']} gradients each, "
        "of 'another minibatch' 50."
    )
    yield gradients.table(record["rows"])


def of_full_vb(common: Common) -> Iterator[str]:
    """Yield the table of full_vb.py."""
    records = full_vb.load_records(common, full_vb.Arguments.num_train)
    yield "## Appendix F: full variational Bayes on 1,000 images"
    if not records:
        yield "missing: run full_vb.py"
        return
    yield figure_of(common, "full_vb")
    samples = sorted({number(record["samples"]) for record in records})
    yield f"After {', '.join(samples)} training samples. Means over seeds, with their standard errors; nats."
    yield full_vb.table(records)


def origins(common: Common) -> Iterator[str]:
    """Yield commands, commits, machines and durations."""
    groups: dict[tuple[str, ...], list[float]] = {}
    files = [path for path in (common.out / "paper").rglob("*.json") if path.exists()]
    for path in files:
        record = json.loads(path.read_text())
        made = record["made_by"]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        key = (made["command"], str(made["commit"]), made["machine"], versions)
        groups.setdefault(key, []).append(record.get("seconds", 0))
    if groups:
        yield "## How it was made"
        rows = [
            [f"`{key[0]}`", *key[1:], str(len(s)), f"{sum(s) / 60:.0f}"] for key, s in sorted(groups.items())
        ]
        yield table(["command", "commit", "machine", "versions", "files", "minutes of training"], rows)


def table(header: Sequence[str], rows: Any) -> str:
    """Write a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
