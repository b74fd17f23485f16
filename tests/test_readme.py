"""Every command and program of the README runs, on small budgets."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, SHARED_DATA

README = (ROOT / "README.md").read_text()
COMMANDS = [
    part.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines()
    for part in line.split("&&")
]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LONG = [c for c in COMMANDS if c.startswith(("python scripts/paper/", "python scripts/studies/"))]
PAGE = "python scripts/explore.py runs/mnist"  # runs until it is interrupted
SCRIPTS = [c for c in COMMANDS if c.startswith("python scripts/") and c not in (*LONG, PAGE)]


def test_every_command_is_an_install_a_test_or_a_script():
    installs = [command for command in COMMANDS if command.startswith("pip install -e ")]
    assert installs == ["pip install -e .", 'pip install -e ".[test]"', 'pip install -e ".[explore]"']
    assert set(COMMANDS) == {*installs, "pytest", *SCRIPTS, *LONG, PAGE}
    # .ci/run installs by the README's own command
    assert installs[1] in (ROOT / ".ci" / "run").read_text()


def small(command, position):
    """The command with small budgets: two epochs, one more where it resumes, few samples."""
    arguments = shlex.split(command)[1:]
    arguments[0] = str(ROOT / arguments[0])
    for flag, value in (("--epochs", str(3 if "--resume" in arguments else 2)), ("--num-samples", "40")):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        elif flag == "--epochs" and "train.py" in command:
            arguments += [flag, value]
    if "--method" in arguments:
        arguments += ["--num-temperatures", "20", "--num-simulated", "5"]
    if ("train.py" in command or "sweep.py" in command) and "--resume" not in arguments:
        arguments += ["--test-samples", "10"]
    return arguments


@pytest.mark.slow
def test_scripts_run_in_the_order_of_the_readme(tmp_path, monkeypatch):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"MNIST is not at {SHARED_DATA}")
    monkeypatch.setenv("PYRO_VAE_DATA", str(SHARED_DATA))
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).normal(size=(200, 7)))
    for position, command in enumerate(SCRIPTS):
        done = subprocess.run(
            [sys.executable, *small(command, position)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Warning" not in done.stderr, f"{command}\n{done.stderr}"
    for run in ("digits", "mnist", "cells"):
        assert (tmp_path / "runs" / run / "figures" / "learning_curves.png").stat().st_size > 1000


@pytest.mark.parametrize("command", [*LONG, PAGE])
def test_long_commands_are_understood(command, monkeypatch):
    """They take hours; tests of their own run them at small budgets."""
    _, script, *arguments = shlex.split(command)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    name = Path(script).stem
    monkeypatch.delitem(sys.modules, name, raising=False)  # of another folder
    kind = importlib.import_module(name).Arguments
    understood = tyro.cli(kind, args=arguments)
    assert isinstance(understood, kind)
    if "--jobs" in arguments:
        assert understood.common.jobs == 2


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).normal(size=(200, 7)))
    small = program.replace("num_samples=5000", "num_samples=50")
    small = re.sub(r"num_epochs=\d+", "num_epochs=2", small)
    small = small.replace("test.x[:50]", "test.x[:5]").replace("num_temperatures=100", "num_temperatures=5")
    exec(compile(small, "README.md", "exec"), {})
    if "summary" in program:
        assert "log p(x) = " in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
