"""Train a VAE, say how good it is, and keep the run in a folder.

python scripts/train.py
python scripts/train.py --data mnist --latent-dim 20 --epochs 30 --out runs/mnist
python scripts/train.py --resume runs/mnist
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pyro_vae import command_line, experiment, runs
from pyro_vae.experiment import Config

if TYPE_CHECKING:
    from pyro_vae import Callback
    from pyro_vae.training import Algorithm


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a VAE, say how good it is, and keep the run in a folder.

    The folder holds config.json; metrics.jsonl, a row an epoch and a last one with test/elbo; checkpoint.pt,
    the last epoch; best.pt, the epoch with the best bound on validation data; log_marginal.json; and figures.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder; default: runs/DATA, or the first of runs/DATA-2, ... that is free."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with the run in this folder; its configuration is kept, but --epochs may be raised and --patience
    and --test-samples be others. It then goes on as if it had been started so."""
    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)


def parse() -> Arguments:
    """The command line; with --resume, what it does not say is taken from the run."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", type=Path)
    resume = peek.parse_known_args()[0].resume
    config = runs.load_config(resume) if resume else Config()
    return tyro.cli(Arguments, default=Arguments(resume=resume, config=config))


def main() -> None:
    """Data, model, training, test, figures."""
    arguments = parse()
    config = experiment.with_absolute_paths(arguments.config)
    if arguments.resume and arguments.out:
        raise experiment.ConfigError("--resume goes on in the folder of its run: leave out --out")
    folder = arguments.resume or arguments.out or runs.free_folder(config)

    # Data and model
    device = experiment.device(config)
    dataset = experiment.load_data(config)
    model, guide = experiment.build_pair(config, dataset)
    if config.refit_prior and not arguments.resume:
        runs.take_networks(config.refit_prior, config, model, guide)
    experiment.check_data(model, config, dataset)
    run = runs.Run(config, dataset.to(device), model.to(device), guide.to(device))
    algorithm, callbacks = experiment.build_training(config, run.model, run.guide, run.dataset, folder)
    with runs.claim(folder):
        if arguments.resume:
            runs.continue_run(folder, config, dataset)
        else:
            runs.start_run(folder, config, dataset)
        print(f"{dataset.train.description}; on {device}; run folder {folder}")
        try:
            train_and_test(run, algorithm, callbacks, folder, resume=bool(arguments.resume))
        except KeyboardInterrupt:
            again = f"python {sys.argv[0]} --resume {folder}"
            print(f"\ninterrupted; go on from the last whole epoch by\n    {again}", file=sys.stderr)
            sys.exit(command_line.INTERRUPTED)


def train_and_test(
    run: runs.Run, algorithm: "Algorithm", callbacks: "list[Callback]", folder: Path, *, resume: bool
) -> None:
    """Train, look at the test data once, and draw."""
    from pyro_vae import batches, fit, marginal_likelihood, reports, training

    # Training
    reports.check_files(folder)
    config, dataset = run.config, run.dataset
    known_by, monitor = runs.identity(config), f"valid/{config.bound}"
    checkpoint = training.Checkpoint(folder, resume=resume, monitor=monitor, run=known_by)
    context = experiment.context(config, dataset, dataset.train)
    minibatches = batches(dataset.train, config.batch_size, seed=config.seed, context=context)
    fit(algorithm, minibatches, config.epochs, [*callbacks, checkpoint])
    last = training.load_checkpoint(folder / "checkpoint.pt")
    epoch = runs.load_weights(folder, config, run.model, run.guide)
    print(f"{last['epoch']} epochs in {int(last['seconds'])} s of training; weights of epoch {epoch}")

    # Test
    quality = reports.assess(run, dataset.test)
    print(f"test {quality.text}")
    row = {"epoch": epoch, "samples": last["samples"], **quality.row}
    if not config.is_autoencoder:
        result = reports.estimate(
            run, dataset.test, "importance_sampling", num_samples=config.chosen_test_samples
        )
        row |= {
            "test/log_marginal": result.mean,
            "test/monte_carlo_error": result.monte_carlo_error,
            "test/data_error": result.data_error,
            "test/num_samples": config.chosen_test_samples,
            "test/data": dataset.test.description,
            "test/scores": result.scores,
        }
        marginal_likelihood.merge_estimates({result.method: result}, folder / "log_marginal.json")
        for text in (result.summary(), reports.bits(run, dataset.test, result)):
            if text is not None:
                print(text)
    training.append_row(row, folder)

    # Figures
    print(f"figures in {reports.save_figures(folder, run)}")


if __name__ == "__main__":
    command_line.run(main)
