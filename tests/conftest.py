import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz  # noqa: F401  (its 0.23 line warns about 1.0 when it is first imported)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run slow tests, too, and check annotations")


def pytest_configure(config):
    """Annotations of shapes are checked with --all; those of `compiled` are not.

    What walks through all objects takes tens of times as long. And with what has no shapes in its annotations
    loops of thousands take twice as long: the hook puts its decorator around everything.
    """

    def with_shapes(*, typechecker):
        def decorate(thing):
            has_shapes = isinstance(thing, type) or "jaxtyping" in str(thing.__annotations__)
            return check(thing, typechecker=typechecker) if has_shapes else thing

        return decorate

    if config.getoption("--all"):
        check, jaxtyping.jaxtyped = jaxtyping.jaxtyped, with_shapes
        rooms = [path.stem for path in (ROOT / "pyro_vae").iterdir() if path.stem != "compiled"]
        jaxtyping.install_import_hook([f"pyro_vae.{room}" for room in rooms], "beartype.beartype")


def pytest_collection_modifyitems(config, items):
    """Slow tests run with --all, or where one is named by its node id."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from the same seed and an empty parameter store, and leaves torch's dtype alone."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def run_here(script, *arguments, cwd):
    """A script as the command line would run it, but in this process, which has imported torch already."""
    said, complained = io.StringIO(), io.StringIO()
    handler, code = signal.getsignal(signal.SIGTERM), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.syspath_prepend(script.parent)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(sys.argv, code, said.getvalue(), complained.getvalue())


@pytest.fixture
def in_one_block(monkeypatch):
    """Chains of all data together, which run through the temperatures once; blocks are tested elsewhere."""
    for module in ("marginal_likelihood.annealing", "mcmc.posterior"):
        monkeypatch.setattr(f"pyro_vae.{module}.block_size", lambda _, batch, num_chains: len(batch[0]))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the public data sets are not at {SHARED_DATA}")
    return SHARED_DATA


# ------------------------------------------------------------------------------------ the compiler


@pytest.fixture
def captured(monkeypatch):
    """Graphs run as they are captured: Inductor takes seconds for each, and is tested elsewhere."""
    monkeypatch.setattr("torch._inductor.compile", lambda module, inputs, options: module)


def pyros_and_ours(train):
    """What ``train(kind)`` returns of Pyro's SVI and of ours, which compiles, from the same start."""
    from functools import partial

    from pyro_vae import PyroSVI  # no sooner, or annotations would not be checked

    results = []
    for kind in pyro.infer.SVI, partial(PyroSVI, compile="always"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(train(kind))
    return results
