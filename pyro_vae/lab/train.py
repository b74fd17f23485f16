"""``train(config, folder) -> Run``: data, pair, training, test and figures, kept in a run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_vae.lab import build, runs
from pyro_vae.lab.config import Config, Facts, with_absolute_paths

if TYPE_CHECKING:
    from pyro_vae.data import Dataset
    from pyro_vae.training import Callback


def train(
    config: Config,
    folder: Path | None = None,
    *,
    resume: bool = False,
    dataset: "Dataset | None" = None,
    callbacks: "Sequence[Callback]" = (),
    test: bool = True,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> runs.Run:
    """Train a configuration, look at the test data once, draw, and keep all of it in a run folder.

    The folder then holds config.json; metrics.jsonl, a row an epoch and a last one with test/elbo;
    checkpoint.pt, the last epoch; best.pt, the epoch with the best bound on validation data;
    log_marginal.json; and figures.

    Args:
        config: Settings.
        folder: Run folder; default: runs/DATA, or the first of runs/DATA-2, ... that is free.
        resume: Go on with the run in the folder, from its last whole epoch.
        dataset: Data in place of those that the configuration names, such as a part of them.
        callbacks: More that watches the training.
        test: Whether to look at the test data, and draw.
        progress: Whether to show how far it is.
        say: Function that is given every line for the user.

    Returns:
        The pair with the weights of its best epoch.

    Raises:
        UserError: If settings, data and folder do not fit.
    """
    from pyro_vae import training
    from pyro_vae.data import batches
    from pyro_vae.lab import estimates, reports

    config = with_absolute_paths(config)
    folder = folder or runs.free_folder(config)
    device = build.device(config)
    dataset = dataset or build.load_data(config)
    model, guide = build.build_pair(config, dataset)
    if config.refit_prior and not resume:
        runs.take_networks(config.refit_prior, config, model, guide)
    build.check_dataset(model, config, dataset)
    run = runs.Run(config, Facts.of(config, dataset), model.to(device), guide.to(device), folder=folder)
    run.dataset = dataset.to(device)
    algorithm, own = build.build_training(config, run.model, run.guide, run.dataset, folder)
    with runs.claim(folder):
        if resume:
            runs.continue_run(folder, config, dataset)
        else:
            runs.start_run(folder, config, dataset)
        say(f"{dataset.train.description}; on {device}; run folder {folder}")

        # Training
        reports.check_files(folder)
        known_by, monitor = runs.identity(config), f"valid/{config.system.metric}"
        checkpoint = training.Checkpoint(folder, resume=resume, monitor=monitor, run=known_by)
        minibatches = batches(
            run.dataset.train,
            config.batch_size,
            seed=config.seed,
            epoch_size=config.epoch_size or None,
            context=build.context(run.dataset.train, run.facts),
        )
        watching = [*own, *callbacks, checkpoint]
        training.fit(algorithm, minibatches, config.epochs, watching, progress=progress)
        last = training.load_checkpoint(folder / "checkpoint.pt")
        run.epoch = runs.load_weights(folder, config, run.model.eval(), run.guide.eval())
        say(f"{last['epoch']} epochs in {int(last['seconds'])} s of training; weights of epoch {run.epoch}")
        if not test:
            return run

        # Test
        split = run.dataset.test
        quality = reports.assess(run, split)
        say(f"test {quality.text}")
        row = {"epoch": run.epoch, "samples": last["samples"], **quality.row}
        if config.system.has_log_prob:
            settings = estimates.Settings(num_samples=config.test_samples)
            result = estimates.estimate(run, split, "importance_sampling", settings)
            estimates.keep(result, folder / "log_marginal.json")
            row |= {
                "test/log_marginal": result.mean,
                "test/monte_carlo_error": result.monte_carlo_error,
                "test/data_error": result.data_error,
                "test/num_samples": result.settings["num_samples"],
                "test/data": split.description,
                "test/scores": result.scores,
            }
            say(estimates.in_words(run, split, result))
        training.append_row(row, folder)
        say(f"figures in {reports.save_figures(folder, run)}")
    return run
