"""Time log p(x) of 10,000 MNIST-sized images, 5,000 samples each, on a tenth of them.

    python scripts/benchmarks/log_marginal.py

Compared in turn: `importance_sampling` with its captured graph, on the tenth and on two of them, so that
what it costs once (the eager start, compiling) is known beside what every image costs; the decoder's matrix
products alone, by the better of two libraries; and Pyro's vectorised traces, on a tenth of the tenth. What
is printed is scaled to all 10,000 images.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

FULL = 10_000
HIDDEN, LATENT, DATA = 500, 20, 784


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time log p(x) of 10,000 MNIST-sized images, 5,000 samples each, on a part of them."""

    num_data: int = 1000
    """Images to measure on, and twice as many."""
    num_samples: int = 5000
    """Importance samples of each."""
    rounds: int = 3
    """Turns; medians are reported."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    out: Path | None = None
    """Write the numbers to this JSON file."""


def main() -> None:
    """Build, take turns, report."""
    arguments = tyro.cli(Arguments)
    import torch
    import works

    from pyro_vae import importance_sampling, vae

    torch.manual_seed(0)
    model, guide = (module.to(arguments.device) for module in vae(DATA, LATENT, hidden=(HIDDEN,)))
    x = (torch.rand(2 * arguments.num_data, DATA) < 0.2).float().to(arguments.device)
    rows = arguments.num_data * arguments.num_samples

    few = max(1, arguments.num_data // 10)

    def estimate(count: int) -> None:
        importance_sampling(model, guide, x[:count], num_samples=arguments.num_samples, progress=False)

    variants: dict[str, Callable[[], object]] = {
        "products": lambda: products(rows, arguments.device),
        "once": lambda: estimate(arguments.num_data),
        "twice": lambda: estimate(2 * arguments.num_data),
        "traces": lambda: pyro_traces(model, guide, x[:few], arguments.num_samples),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    per_image = (median["twice"] - median["once"]) / arguments.num_data
    fixed = 2 * median["once"] - median["twice"]
    alone = FULL / arguments.num_data * median["products"]
    seconds = {
        "matrix products alone": alone,
        "pyro_vae.importance_sampling": fixed + FULL * per_image,
        "  of it once": fixed,
        "Pyro's vectorised traces": FULL / few * median["traces"],
    }
    print(f"{'10,000 images, 5,000 samples':32}{'seconds':>10}{'/ products':>12}")
    for name, value in seconds.items():
        print(f"{name:32}{value:10.1f}{value / alone:12.2f}")
    machine = works.machine(arguments.device)
    print(machine)
    if arguments.out:
        text = json.dumps({"machine": machine, "seconds": seconds, "turns": times}, indent=1)
        arguments.out.write_text(text + "\n")


def products(rows: int, device: str) -> None:
    """The two products of the decoder for so many rows, by the better library, in blocks that fit a cache."""
    import torch

    from pyro_vae.compiled import products as library

    block = 4096 if device == "cpu" else 2**18
    z, h = torch.rand(block, LATENT, device=device), torch.rand(block, HIDDEN, device=device)
    first, second = torch.rand(HIDDEN, LATENT, device=device), torch.rand(DATA, HIDDEN, device=device)
    bias = torch.rand(HIDDEN, device=device), torch.rand(DATA, device=device)

    def better(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], object]:
        if device == "cpu" and library.faster(inputs, weight.t(), bias) == "onednn":
            return lambda: torch.ops.pyro_vae.linear(inputs, weight, bias)
        return lambda: torch.addmm(bias, inputs, weight.t())

    one, two = better(z, first, bias[0]), better(h, second, bias[1])
    with torch.no_grad():
        for _ in range(max(1, rows // block)):
            one()
            two()


def pyro_traces(model: object, guide: object, x: object, num_samples: int) -> None:
    """Weights from Pyro's own vectorised importance traces, in blocks as large as ours."""
    import torch
    from pyro.infer.importance import vectorized_importance_weights

    for block in x.split(128):
        size = max(1, 4096 // len(block))
        with torch.no_grad():
            for start in range(0, num_samples, size):
                count = min(size, num_samples - start)
                vectorized_importance_weights(model, guide, block, num_samples=count, max_plate_nesting=1)


if __name__ == "__main__":
    main()
