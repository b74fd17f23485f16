"""The direction of imports, read from the source."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "pyro_vae"
EVERYBODY_MAY = {"arguments", "errors"}
MAY_IMPORT = {
    "errors": set(),
    "arguments": {"errors"},
    "progress": {"compiled"},
    "files": {"errors"},
    "records": {"errors", "files"},
    "nets": set(),
    "distributions": {"errors"},
    "models": {"nets", "distributions", "diagnostics", "errors"},
    "traces": {"compiled", "distributions"},
    "objectives": {"traces", "distributions"},
    "compiled": {"errors"},
    "algorithms": {"traces", "objectives", "compiled", "hmc"},
    "diagnostics": set(),
    "blocks": {"compiled", "errors", "progress", "records", "traces"},
    "hmc": set(),
    "tempering": {"blocks", "compiled", "hmc", "traces"},
    "posterior": {"blocks", "diagnostics", "hmc", "tempering", "traces"},
    "marginal_likelihood": {
        *("blocks", "compiled", "diagnostics", "distributions", "errors", "files", "hmc", "posterior"),
        *("records", "tempering", "traces"),
    },
    "oracles": {"distributions", "models"},
    "latents": {"traces", "distributions"},
    "tasks": {
        *("blocks", "distributions", "latents", "marginal_likelihood", "posterior", "traces"),
    },
    "data": {"errors"},
    "training": {"blocks", "traces", "marginal_likelihood", "errors", "files", "progress", "records"},
    "lab": {
        *("algorithms", "blocks", "data", "distributions", "files", "latents", "marginal_likelihood"),
        *("models", "nets", "objectives", "progress", "records", "tasks", "traces", "training"),
    },
    "__main__": {"lab"},
}


def modules():
    return sorted(
        path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE
    )


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pyro_vae":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyro_vae.")
            )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = layer(path)
    assert own in MAY_IMPORT, f"{own} is new: say here what it may import"
    assert set(imported_layers(path)) - {own, *EVERYBODY_MAY} <= MAY_IMPORT[own]


def test_the_check_sees_imports():
    assert set(imported_layers(PACKAGE / "lab" / "reports.py")) >= {"lab", "marginal_likelihood"}


def test_no_module_is_far_too_long():
    for path in modules():
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize("module", ["pyro_vae", "pyro_vae.lab", "pyro_vae.lab.cli", "pyro_vae.lab.jobs"])
def test_what_help_needs_imports_nothing_heavy(module):
    program = f"import sys, {module}; print({{'torch', 'pyro', 'matplotlib', 'sklearn'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_can_be_imported():
    import pyro_vae

    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'vea'"):
        pyro_vae.vea  # noqa: B018
