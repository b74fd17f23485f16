"""Every command, program and link of the README and the manual works, on small budgets."""

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

from pyro_vae import load
from pyro_vae.lab import Config, cli, train
from pyro_vae.lab.runs import start_run

INDEX = (ROOT / "docs" / "index.md").read_text()
MANUAL = [
    "docs/index.md",
    *(f"docs/{name}" for name in re.findall(r"^\| \[.*?\]\((\w+\.md)\)", INDEX, re.MULTILINE)),
]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", *MANUAL)}
BLOCKS = [
    (name, *block)
    for name, text in TEXTS.items()
    for block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)
]
COMMANDS = dict.fromkeys(  # each once, in the order of the README and then of the manual
    part.strip()
    for _, language, block in BLOCKS
    if language == "bash"
    for line in block.strip().splitlines()
    for part in line.split("&&")
)
PROGRAMS = [
    pytest.param(block, id=f"{name}-{position}", marks=[] if name == "README.md" else pytest.mark.slow)
    for position, (name, language, block) in enumerate(BLOCKS)
    if language == "python"
]
LONG = [c for c in COMMANDS if c.startswith(("python scripts/paper/", "python scripts/studies/"))]
PAGE = "pyro-vae explore runs/mnist"  # runs until it is interrupted
INLINE = [  # said in sentences; --help is no command of its own
    code
    for text in TEXTS.values()
    for code in re.findall(r"`(pyro-vae \w+ [^`|]*--[^`|]+)`", text)
    if "--help" not in code
]
SHORT = [c for c in COMMANDS if c.startswith(("python scripts/", "pyro-vae ")) and c not in (*LONG, PAGE)]


def test_the_readme_is_one_screen_and_the_manual_is_whole():
    assert len(TEXTS["README.md"].encode()) <= 9000
    assert sorted(MANUAL) == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def test_every_command_is_an_install_a_test_or_a_script():
    installs = [command for command in COMMANDS if command.startswith("pip install -e ")]
    assert installs == ["pip install -e .", 'pip install -e ".[test]"', 'pip install -e ".[explore]"']
    assert set(COMMANDS) == {*installs, "pytest", *SHORT, *LONG, PAGE}
    # .ci/run installs by the README's own command
    assert installs[1] in (ROOT / ".ci" / "run").read_text()


def small(command):
    """The command with small budgets, for Python: an epoch, one more where it resumes, few samples."""
    program, name, *arguments = shlex.split(command)
    epochs = "2" if "--resume" in arguments else "1"
    for flag, value in (("--epochs", epochs), ("--num-samples", "40"), ("--limit", "20")):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        elif flag == "--epochs" and "train" in name:
            arguments += [flag, value]
    if "--method" in arguments:
        arguments += ["--num-temperatures", "20", "--num-simulated", "5"]
    if ("train" in name or "sweep" in name) and "--resume" not in arguments:
        arguments += ["--test-samples", "10"]
    return [*(["-m", "pyro_vae", name] if program == "pyro-vae" else [ROOT / name]), *arguments]


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_readme_and_the_manual(tmp_path, monkeypatch):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"MNIST is not at {SHARED_DATA}")
    monkeypatch.setenv("PYRO_VAE_DATA", str(SHARED_DATA))
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).normal(size=(200, 7)))
    for command in SHORT:
        done = subprocess.run(
            [sys.executable, *small(command)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Warning" not in done.stderr, f"{command}\n{done.stderr}"
    for name in ("digits", "mnist", "cells"):
        assert (tmp_path / "runs" / name / "figures" / "learning_curves.png").stat().st_size > 1000


@pytest.mark.parametrize("command", LONG)
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


@pytest.mark.parametrize(
    "command",
    [
        c for c in (*SHORT, PAGE, *INLINE) if re.match("pyro-vae (?!sweep)", c)
    ],  # beartype refuses tyro.MISSING
)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(command)
    module = importlib.import_module(cli.COMMANDS[name])
    if "--resume" in arguments:
        folder = Path(arguments[arguments.index("--resume") + 1])
        start_run(folder, Config(epochs=30), load("digits", binarization="dynamic"))
    assert isinstance(module.parse(arguments, f"pyro-vae {name}"), module.Arguments)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "cells.npy", np.random.default_rng(0).normal(size=(200, 7)))
    if "runs/digits" in program:
        train(Config(epochs=2), Path("runs/digits"), test=False, progress=False)
    small = program.replace("num_samples=5000", "num_samples=50")
    small = re.sub(r"epochs=\d+", "epochs=2", small)
    small = small.replace("test.x[:50]", "test.x[:5]").replace("num_temperatures=100", "num_temperatures=5")
    exec(compile(small, "README.md", "exec"), {})
    if "summary" in program:
        assert "log p(x) = " in capsys.readouterr().out


def anchors(path):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TEXTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.resolve().exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
