"""The direction of imports, read from the source."""

import ast
import importlib.metadata
import json
import re
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
    "models": {"nets", "distributions", "errors"},
    "traces": {"compiled", "distributions", "progress", "records"},
    "objectives": {"traces", "distributions"},
    "compiled": {"errors"},
    "algorithms": {"traces", "objectives", "compiled", "mcmc"},
    "mcmc": {"compiled", "traces"},
    "marginal_likelihood": {"compiled", "distributions", "files", "mcmc", "records", "traces"},
    "oracles": {"distributions", "models"},
    "latents": {"traces", "distributions"},
    "tasks": {"distributions", "latents", "marginal_likelihood", "mcmc", "traces"},
    "data": {"errors"},
    "training": {"traces", "marginal_likelihood", "errors", "files", "progress", "records"},
    "lab": {
        *("algorithms", "data", "distributions", "files", "latents", "marginal_likelihood"),
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


STUB = ast.parse((PACKAGE / "__init__.pyi").read_text())
EXPORTED = {alias.asname for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}


# Rooms without a door of their own: the scripts and the package know them.
PRIVATE = {
    *("__main__", "arguments", "files", "progress", "records"),
}


def test_every_name_of_the_stub_can_be_imported():
    import pyro_vae

    assert set(pyro_vae.__all__) == EXPORTED
    for name in EXPORTED:
        assert getattr(pyro_vae, name).__doc__, name


def test_public_subpackages_are_attributes():
    public = {layer(path) for path in modules()} - PRIVATE
    assert public <= EXPORTED
    program = "import pyro_vae; print(pyro_vae.latents.kl_per_dim is pyro_vae.kl_per_dim)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_name_that_there_is_not_is_told_from_the_nearest():
    import pyro_vae

    with pytest.raises(AttributeError, match=r"no attribute 'vea'. Did you mean 'vae'\?"):
        pyro_vae.vea  # noqa: B018
    assert not hasattr(pyro_vae, "_repr_html_")


def test_the_version_is_that_of_the_installed_package():
    import pyro_vae

    assert pyro_vae.__version__ == importlib.metadata.version("pyro_vae")


def programs():
    """README's programs, notebooks and scripts: what users write."""
    yield from re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield from ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    yield from (path.read_text() for path in ROOT.glob("scripts/**/*.py"))


def test_what_users_import_is_exported():
    found = {
        alias.name
        for program in programs()
        for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", program)))
        if isinstance(node, ast.ImportFrom) and node.module == "pyro_vae"
        for alias in node.names
    }
    assert len(found) > 30
    assert {name for name in found - EXPORTED if name not in PRIVATE} == set()
