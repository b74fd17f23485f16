"""Time a training step: Pyro, torch, this package and NumPyro, side by side in one run.

    python scripts/benchmarks/step.py
    python scripts/benchmarks/step.py --work mnist frey --rounds 20 --out step.json

Every variant has the same networks, data, batch, optimiser (Adam) and number format (float32). Each lives in
a process of its own, so that the threads of one library do not disturb another's, and they take turns, a few
steps each, so that a disturbance from outside meets all of them. Medians over the turns and their ratios
are printed and written. NumPyro comes with `pip install -e ".[bench]"` and is left out without it; its epoch
is one `lax.scan` inside `jit`. On a GPU the compiled steps of this package are launched several at a time.
"""

import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

_PATIENCE = 180  # seconds to compile and take the first steps
Work = Literal["mnist", "mnist_20", "frey", "m2", "conv"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time a training step: Pyro, torch, this package and NumPyro, side by side in one run."""

    work: tuple[Work, ...] = ("mnist", "mnist_20", "frey", "m2", "conv")
    """mnist: 784-500-20, batch 100; mnist_20: the same, batch 20; frey: 560-200-10, batch 100; m2: a label
    that is summed over beside a latent, 784-500-20, batch 100; conv: a convolutional VAE, batch 64."""
    rounds: int = 20
    """Turns of every variant."""
    steps: int = 30
    """Steps in a turn (an epoch of them for NumPyro)."""
    variants: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME")] = None
    """Only these."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    out: Path | None = None
    """Write all numbers to this JSON file."""


def main() -> None:
    """Start all variants of each work, let them take turns, report."""
    arguments = tyro.cli(Arguments)
    import works

    results = {}
    for name in arguments.work:
        workers = {}
        for key in works.variants(name):
            if arguments.variants is None or key in arguments.variants:
                try:
                    workers[key] = Worker(name, key, arguments.steps, arguments.device)
                except RuntimeError as error:
                    print(f"{name}: {key}: {error}", file=sys.stderr)
        times: dict[str, list[float]] = {key: [] for key in workers}
        for _ in range(arguments.rounds):
            for key, worker in workers.items():
                times[key].append(worker.turn() / arguments.steps * 1e3)
        for worker in workers.values():
            worker.close()
        results[name] = {key: statistics.median(values) for key, values in times.items()}
        report(name, results[name], times)
    machine = works.machine(arguments.device)
    print(f"\n{machine}")
    if arguments.out:
        text = json.dumps({"machine": machine, "milliseconds": results}, indent=1)
        arguments.out.write_text(text + "\n")


class Worker:
    """A variant in a process of its own, asleep but for its turns."""

    def __init__(self, work: str, key: str, steps: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, work, key, steps, device)
        self._process = context.Process(target=_work, args=arguments, daemon=False)
        self._process.start()
        if not self._pipe.poll(_PATIENCE):
            self._process.kill()
            raise RuntimeError(f"not ready after {_PATIENCE} s, so it is left out")
        ready = self._pipe.recv()
        if isinstance(ready, str):
            self._process.join()
            raise RuntimeError(ready)
        print(f"{work}: {key} ready after {ready:.1f} s", file=sys.stderr)

    def turn(self) -> float:
        """Seconds of one epoch."""
        self._pipe.send("go")
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send("stop")
        self._process.join()


def _work(pipe: "multiprocessing.connection.Connection", *arguments: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    import works

    work, key, steps, device = arguments
    started = time.perf_counter()
    try:
        epoch = works.variants(work)[key](work, steps, device)
        epoch()
        epoch()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error)[:100].partition(chr(10))[0]}")
        return
    pipe.send(time.perf_counter() - started)
    while pipe.recv() == "go":
        epoch()  # wakes threads and caches up
        started = time.perf_counter()
        epoch()
        pipe.send(time.perf_counter() - started)


def report(name: str, medians: dict[str, float], times: dict[str, list[float]]) -> None:
    """A table: medians, quartiles, and how many times slower than the compiled step of this package."""
    ours = medians.get("pyro_vae compiled", min(medians.values()))
    print(f"\n{name:32}{'ms a step':>10}{'quartiles':>18}{'/ compiled':>12}")
    for key, median in medians.items():
        low, _, high = statistics.quantiles(times[key], n=4) if len(times[key]) > 1 else (median,) * 3
        print(f"{key:32}{median:10.2f}{low:9.2f}{high:9.2f}{median / ours:12.2f}")


if __name__ == "__main__":
    main()
