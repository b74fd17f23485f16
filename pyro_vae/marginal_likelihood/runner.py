"""From an estimator to its result: the one way of all, through blocks of data.

An :class:`Estimator` says what it does with a block of data; the rest, progress, checkpoints and the making
of the result, is here.
"""

import abc
import contextlib
from pathlib import Path

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.distributions import scores_cross_entropy
from pyro_vae.marginal_likelihood.result import LogMarginal
from pyro_vae.traces import Program
from pyro_vae.traces.blocks import (
    Batch,
    PerDatum,
    Work,
    behaviour_of,
    check_sizes,
    checksum,
    evaluation,
    programs_checksum,
)
from pyro_vae.traces.running import trace_of
from pyro_vae.traces.sites import latent_names, sample_sites

CURVE = "curve/"  # begins the names of columns that are bounds by number of samples
_DRAWS = 100  # of every site, to see what a guide leaves out


class Estimator(Work):
    """An estimator of log p(x).

    Its columns are ``values``, ``std_error``, diagnostics, and bounds by number of samples (``curve/K``).

    Attributes:
        name: Name of the function, ``LogMarginal.method``.
        bound: Side of log p(x) on which it is, ``LogMarginal.bound``.
        is_simulated: True if it draws its data from the model.
        is_of_codes: True if the guide has one code for a datum.
    """

    bound: str
    is_simulated = is_of_codes = False

    def __init__(self, model: Program, guide: Program | None, batch: Batch) -> None:
        check_sizes(batch)
        self.model, self.guide, self.batch = model, guide, batch
        self.programs = (model,) if guide is None else (model, guide)

    @abc.abstractmethod
    def effort(self, columns: PerDatum) -> str:
        """Amount of work that was done, in words."""

    def notes(self, columns: PerDatum) -> list[str]:
        """Sentences to keep in mind besides the diagnoses."""
        return []

    def estimate(self, data: str | None, progress: bool, checkpoint: Path | None) -> LogMarginal:
        """The result of all data.

        Args:
            data: Words on the data, for the summary.
            progress: Show a bar.
            checkpoint: File that keeps finished blocks of data, from which an interrupted call goes on.
        """
        columns = self.run(self.batch, progress=progress, checkpoint=checkpoint)
        curve = {
            int(name.removeprefix(CURVE)): columns.pop(name)
            for name in list(columns)
            if name.startswith(CURVE)
        }
        notes = self.notes(columns)
        if self.is_of_codes:  # of one weight there is nothing to diagnose
            columns["std_error"] = torch.zeros_like(columns["std_error"])
        with evaluation(*self.programs):
            trace, left_out = self._described(*(argument[:3] for argument in self.batch))
            sites = [site for _, site in sample_sites(trace)]
            settings = {
                "effort": self.effort(columns),
                "num_data": len(self.batch[0]),
                "data": data or "not said (nor how they were binarised)",
                "data_checksum": checksum(*self.batch),
                "model_checksum": programs_checksum(self.model),
                "model_behaviour": behaviour_of(sites).tolist(),
                "notes": notes + left_out,
            }
        return LogMarginal(
            columns.pop("values"),
            columns.pop("std_error"),
            self.name,
            self.bound,
            settings | {name: value for name, value in self.settings.items() if value is not None},
            columns,
            {size: bound for size, bound in curve.items() if not bound.isnan().any()},
            is_simulated=self.is_simulated,
            is_of_codes=self.is_of_codes,
            is_density=not any(scores_cross_entropy(site["fn"]) for site in sites),
        )

    def _described(self, *batch: Tensor) -> tuple[poutine.Trace, list[str]]:
        """A trace of the model, always of the same draws, and what the guide leaves out."""
        with torch.random.fork_rng(), pyro.validation_enabled(False):  # data may be impossible here
            torch.manual_seed(0)
            trace = trace_of(self.model, batch, 1)
            if self.guide is None or self.is_of_codes:
                return trace, []
            return trace, left_out(self.guide, trace, *batch)


def left_out(guide: Program, drawn: poutine.Trace, *batch: Tensor) -> list[str]:
    """A note, if draws from the sites of the model's trace lie outside of the guide's support."""
    sites = {name: drawn.nodes[name] for name in latent_names(drawn)}
    latents = {name: site["value"] for name, site in sites.items()}
    trace = trace_of(guide, batch, 1, lambda program: poutine.condition(program, data=latents))
    names = []
    for name, site in sample_sites(trace):
        with contextlib.suppress(NotImplementedError, AttributeError):  # no support is known
            if name in sites and not site["fn"].support.check(sites[name]["fn"].sample((_DRAWS,))).all():
                names.append(repr(name))
    return [
        f"the guide draws {' and '.join(names)} from a part of the model's support only: what lies outside "
        "of it is missing in every value, and no error tells of it; give a guide with the model's support"
    ] * bool(names)
