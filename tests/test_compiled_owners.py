"""Whose code it is, and that the compiler knows nothing of the package around it."""

import ast
import importlib
import importlib.machinery
import importlib.metadata
import re
import sys
import sysconfig
import types
from pathlib import PurePath

import pytest
from conftest import ROOT

import pyro_vae.traces  # noqa: F401  (which registers)
from pyro_vae.compiled import owners
from pyro_vae.compiled.owners import is_discreet, is_fixed, is_library, is_users

SOURCES = sorted((ROOT / "pyro_vae" / "compiled").glob("*.py"))
ALLOWED = re.compile(r"pyro_vae\.(errors|compiled)(\.|$)")
NAMED = re.compile(r"\bpyro_vae\b(?!\.(errors|compiled)\b)")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def of_the_package(source):
    """Imports of the package, and strings that name it, other than what the compiler may know."""
    tree = ast.parse(source)
    names = [name for name in imported(tree) if name.split(".")[0] == "pyro_vae" and not ALLOWED.match(name)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return names + [text for text in texts if isinstance(text, str) and NAMED.search(text)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_compiler_knows_nothing_of_the_package(path):
    assert of_the_package(path.read_text()) == []


def test_the_check_sees_what_it_looks_for():
    source = "import pyro_vae.nets\nfrom pyro_vae import vae\nx = 'pyro_vae.models'\ny = f'pyro_vae.{x}'"
    assert of_the_package(source) == ["pyro_vae.nets", "pyro_vae.vae", "pyro_vae.models", "pyro_vae."]


def private(path):
    """Imports of private names of torch and Pyro."""
    for name in imported(ast.parse(path.read_text())):
        root, *parts = name.split(".")
        if root in ("torch", "pyro") and any(part.startswith("_") for part in parts):
            yield name


def test_private_names_are_in_one_place():
    found = {path.name for path in SOURCES if list(private(path))}
    assert found == {"private.py", "inductor.py", "updates.py"}


def test_what_is_registered_can_be_imported():
    for name in owners._around | owners._fixed:
        importlib.import_module(name)


def installed(monkeypatch, folder, requires, files=()):
    """A package in a folder, what it says that it requires, and its files."""
    module = types.ModuleType("a_package")
    module.__file__ = f"{folder}/a_package.py"
    known = importlib.metadata.requires
    monkeypatch.setitem(sys.modules, "a_package", module)
    monkeypatch.setattr("importlib.metadata.requires", lambda n: requires if n == "a_package" else known(n))
    monkeypatch.setattr("importlib.metadata.files", lambda name: [PurePath(file) for file in files])
    owners.forget()


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    owners.forget()


@pytest.mark.parametrize(
    ("requires", "is_known"),
    [
        ([], True),
        (["numpy>=2"], True),
        (["torch>=2.4; extra == 'test'"], True),
        (["numpy", "torch>=2.4"], False),  # programs may be written there
        (["pyro-ppl"], False),
        (["pyro_ppl (>=1.9)"], False),
    ],
)
def test_a_library_is_installed_and_required_and_needs_no_torch(monkeypatch, requires, is_known):
    installed(monkeypatch, sysconfig.get_path("purelib"), requires)
    assert is_users("a_package.inside")  # nobody requires it: it may be the user's own
    monkeypatch.setattr(owners, "_registered", {"one_that_is_registered"})
    known = importlib.metadata.requires
    lines = {"one_that_is_registered": ["A.Package >=1; extra == 'table'"]}
    monkeypatch.setattr("importlib.metadata.requires", lambda n: lines.get(n) or known(n))
    owners.forget()
    assert is_library("a_package.inside") is is_known
    assert is_users("a_package.inside") is not is_known


def test_a_package_with_compiled_code_is_a_library(monkeypatch):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    installed(monkeypatch, sysconfig.get_path("purelib"), [], ["a_package.py", f"fast{suffix}"])
    assert is_library("a_package.inside")


def test_what_lies_elsewhere_or_is_unknown_is_the_users(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, [])  # as one that is installed as editable
    names = ["a_package", "__main__", "never_heard_of", "torch_of_mine", "conftest", "", None]
    assert [name for name in names if is_library(name)] == []
    assert all(map(is_users, names))


def test_libraries_and_this_package():
    import sklearn.svm

    for name in "torch.nn", "pyro.infer", "numpy", sklearn.svm.__name__, "random", "builtins", "_pytest.main":
        assert is_library(name), name
    assert is_discreet("torch.optim.adam")
    assert not is_discreet("random")
    assert is_fixed("pyro_vae.models.vae")
    for name in "pyro_vae.algorithms.svi", "pyro_vae.models.program", owners.__name__:
        assert is_library(name), name
        assert not is_fixed(name), name
