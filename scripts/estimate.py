"""Estimate log p(x) of a trained run in one or several ways, with errors, bounds and a verdict.

    python scripts/estimate.py runs/mnist --num-samples 5000 --limit 1000
    python scripts/estimate.py runs/mnist --method all --limit 100

Writes log_marginal.json (log_marginal_train.json, ... for other splits), with a value and an error for every
datum and method, and figures into the run folder. Estimates of other data (--limit) are kept beside each
other; of the same data by the same method the one that took more work stays.
"""

import dataclasses
import math
import shlex
import sys
from pathlib import Path
from typing import Literal

import tyro

from pyro_vae import command_line, experiment, runs
from pyro_vae.files import locked


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Estimate log p(x) of a trained run in one or several ways, with errors, bounds and a verdict.

    Writes log_marginal.json (log_marginal_train.json, ... for other splits), with a value and an error for
    every datum and method, and figures into the run folder. Estimates of other data (--limit) are kept beside
    each other; of the same data by the same method the one that took more work stays. Interrupted, it goes on
    when started again.
    """

    run: tyro.conf.Positional[Path]
    """Folder that train.py made."""
    method: tuple[Literal[(*experiment.ESTIMATORS, "all")], ...] = ("importance_sampling",)
    """How; several may be given. quadrature is exact, for up to 3 latent dimensions; ais and
    importance_sampling are lower bounds; hmc (the paper's Appendix D) is an upper bound, for few dimensions;
    bidirectional certifies ais on simulated data. all: those that fit the latent dimensions."""
    num_samples: int = 5000
    """Importance samples for every datum."""
    tolerance: float | None = None
    """Stop importance sampling when bias and Monte Carlo error are below so many nats."""
    num_chains: int = 16
    """Chains of ais and bidirectional for every datum."""
    num_temperatures: int = 1000
    """Of ais and bidirectional."""
    num_leapfrog: int = 3
    """Gradients for every transition of ais and bidirectional."""
    start: Literal["prior", "guide"] = "prior"
    """Where annealing starts: the guide takes fewer temperatures, but what it misses may stay missed."""
    num_simulated: int = 100
    """Data of bidirectional."""
    limit: int | None = None
    """Take only so many data, drawn at random, but the same ones each time."""
    split: Literal["train", "valid", "test"] = "test"
    """Of which data."""
    data_dir: Path | None = None
    """Where the files are, if not where they were."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main() -> None:
    """Load the run, estimate, write, draw and judge."""
    arguments = tyro.cli(Arguments)
    for name in ("num_samples", "num_chains", "num_temperatures", "num_leapfrog", "num_simulated", "limit"):
        if (size := getattr(arguments, name)) is not None and size < 1:
            raise experiment.ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {size}")
    if arguments.tolerance is not None and not arguments.tolerance > 0:
        raise experiment.ConfigError(f"--tolerance must be positive (nats), not {arguments.tolerance}")
    if not arguments.method:
        raise experiment.ConfigError("--method needs a name: leave it out, or see --help for what there is")

    from pyro_vae import marginal_likelihood as ml
    from pyro_vae import reports

    run = runs.load_run(arguments.run, data_dir=arguments.data_dir, device=arguments.device)
    split = getattr(run.dataset, arguments.split)
    if split is None:
        raise experiment.ConfigError(f"{run.dataset.name} has no split {arguments.split!r}")
    if run.config.is_autoencoder:
        raise experiment.ConfigError(
            f"{arguments.run} holds an autoencoder: its guide has no density and its prior none either, so "
            "there is no log p(x) to estimate. plot.py draws it"
        )
    methods = chosen(arguments, run.config)
    reports.check_files(arguments.run)
    print(f"{arguments.run}, weights of epoch {run.epoch}")
    print(reports.assess(run, split, arguments.limit).text, flush=True)

    # Estimates
    name = "log_marginal" if arguments.split == "test" else f"log_marginal_{arguments.split}"
    path = arguments.run / f"{name}.json"
    for method in methods:
        partial = arguments.run / f"{name}.{method}.partial"
        limit = arguments.limit if method != "bidirectional" else arguments.num_simulated
        with locked(arguments.run / f"{name}.{method}.lock", f"{method} of {arguments.run}"):
            try:
                result = reports.estimate(
                    run, split, method, limit, partial, **settings(arguments, run, method)
                )
            except KeyboardInterrupt:
                again = f"python {shlex.join(sys.argv)}"
                print(f"\ninterrupted; go on by the same command:\n    {again}", file=sys.stderr)
                sys.exit(command_line.INTERRUPTED)
            estimates = ml.merge_estimates({method: result}, path)
            partial.unlink(missing_ok=True)
        print(f"\n{result.summary()}", flush=True)
        if (text := reports.bits(run, split, result)) is not None:
            print(text)
        if (kept := estimates[method]).size > result.size:
            print(f"{path} keeps what took more work: {kept.settings['effort']}, mean {kept.mean:.2f}")

    print(f"\n{ml.table(estimates)}\n")
    print(ml.verdict(estimates))
    print(f"figures in {reports.save_figures(arguments.run, run)}")


def chosen(arguments: Arguments, config: experiment.Config) -> list[str]:
    """The methods, once each; raises ``ConfigError`` if one that was asked for does not fit the latents."""
    takes_all = "all" in arguments.method
    fitting = []
    for method in experiment.ESTIMATORS if takes_all else dict.fromkeys(arguments.method):
        why = None
        if method != "importance_sampling" and config.has_codes:
            why = "codes are discrete; importance_sampling gives their bound"
        elif method != "importance_sampling" and config.prior == "sphere":
            why = "a sphere cannot be mapped to all real numbers; importance_sampling needs not"
        elif config.latent_dim > experiment.MOST_DIMENSIONS.get(method, math.inf) and (
            takes_all or method == "quadrature"  # hmc only gets worse
        ):
            why = f"{config.latent_dim} latent dimensions are too many; ais takes any number"
        if why is None:
            fitting.append(method)
        elif takes_all:
            print(f"without {method}: {why}")
        else:
            raise experiment.ConfigError(f"{method} does not fit this run: {why}")
    return fitting


def settings(arguments: Arguments, run: runs.Run, method: str) -> dict:
    """What the estimator takes of the arguments."""
    if method == "importance_sampling":
        num_samples = 1 if run.config.has_codes else arguments.num_samples
        return {"num_samples": num_samples, "tolerance": arguments.tolerance}
    if method in ("quadrature", "hmc"):
        return {}
    return {
        "guide": run.guide if arguments.start == "guide" else None,
        "num_chains": arguments.num_chains,
        "num_temperatures": arguments.num_temperatures,
        "num_leapfrog": arguments.num_leapfrog,
    }


if __name__ == "__main__":
    command_line.run(main)
