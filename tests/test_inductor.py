"""What Inductor keeps on disk: damaged, shared, or nowhere to be kept."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import CompiledFunction, NotCompiledWarning
from pyro_vae.compiled.inductor import compile_graph
from pyro_vae.compiled.state import CaptureError

FILES = {"3h/c3h.py": b"def call(): ...", "ec/cec.main.so": bytes(range(256)) * 8, "locks/c.lock": b""}
X = torch.linspace(0, 1, 7)


def graph():
    return make_fx(lambda x: (torch.sin(x),))(X)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(cache, monkeypatch):
    """Files that an Inductor made, which takes those that it finds unread, as torch's does."""
    made = []

    def inductor(*_, **__):
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        for name, content in FILES.items():
            if not (folder / name).exists():
                made.append(name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        found = [(folder / name).read_bytes() for name in FILES]
        return lambda *_: found

    monkeypatch.setattr("torch._inductor.compile", inductor)
    return made


def rewritten(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def replaced(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


DAMAGES = {
    "cut": rewritten(lambda content: content[: random.Random(0).randrange(len(content))]),
    "empty": rewritten(lambda content: b""),
    "zeros": rewritten(lambda content: content[: len(content) // 2].ljust(len(content), b"\0")),
    "a bit": rewritten(flipped),
    "longer": rewritten(lambda content: content + b"x"),
    "gone": Path.unlink,
    "folder": replaced(lambda path: (path / "file").mkdir(parents=True)),
    "pipe": replaced(os.mkfifo),
    "link": replaced(lambda path: path.symlink_to(path)),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("ending", [".main.so", ".py", ".json"])
def test_damaged_files_are_made_anew(cache, made, ending, how):
    for _ in range(2):
        assert compile_graph(graph(), [X], {})() == [*FILES.values()]
    other = make_fx(lambda x: (torch.cos(x),))(X)
    assert compile_graph(other, [X], {})() == [*FILES.values()]
    assert made == [*FILES]  # once, also for graphs that differ in little
    (path,) = cache.rglob(f"*{ending}")
    DAMAGES[how](path)
    for _ in range(2):
        assert compile_graph(graph(), [X], {})() == [*FILES.values()]
    assert made == [*FILES, *FILES]  # once more
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache)


def test_folders_are_sealed_only_once_all_is_done(cache, made, monkeypatch):
    """A compiler that is killed leaves files that are cut short, in a folder that was sealed before, too."""
    compile_graph(graph(), [X], {})
    (seal,) = cache.rglob("*.json")
    assert sorted(json.loads(seal.read_text())) == sorted(FILES)
    inductor = torch._inductor.compile

    def killed(*_, **__):
        assert not seal.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("torch._inductor.compile", killed)
    with pytest.raises(KeyboardInterrupt):
        compile_graph(graph(), [X], {})
    monkeypatch.setattr("torch._inductor.compile", inductor)
    compile_graph(graph(), [X], {})
    assert made == [*FILES, *FILES]


def test_a_folder_in_place_of_a_lock(cache, made):
    compile_graph(graph(), [X], {})
    (lock,) = (cache / "compiled_programs").glob("*.lock")
    DAMAGES["folder"](lock)
    assert compile_graph(graph(), [X], {})() == [*FILES.values()]


def test_damaged_headers_are_done_without(cache, tmp_path, monkeypatch):
    from torch._inductor.exc import CppCompileError

    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr("torch._inductor.codecache._HEADER_DIR", str(headers))
    is_header = True

    def inductor(*_, options):
        if not is_header or options.get("cpp_cache_precompile_headers", True):
            raise CppCompileError(["g++"], "a.cpp: In function\na.cpp:1: fatal error: Python.h: not found\n")
        return lambda *_: "right"

    monkeypatch.setattr("torch._inductor.compile", inductor)
    assert compile_graph(graph(), [X], {})() == "right"
    assert not headers.exists()
    headers.mkdir()
    is_header = False
    words = r"could not compile its graph \(.*fatal error: Python.h: not found\)$"
    with pytest.raises(CaptureError, match=words):
        compile_graph(graph(), [X], {})
    assert headers.exists()  # it took a while to make them, and they are not the cause


@pytest.mark.parametrize("place", ["a file", "in a file", "file in it", "too long"])
def test_where_nothing_can_be_kept_the_setting_is_named(tmp_path, monkeypatch, place):
    """Also the parts of torch that run before Inductor make its folder."""
    elsewhere = {"in a file": tmp_path / "file" / "cache", "too long": tmp_path / ("x" * 300)}
    path = elsewhere.get(place, tmp_path / "file")
    if place == "file in it":
        path.mkdir()
        (path / "compiled_programs").touch()
    else:
        (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))

    def sine(x):
        return {"y": x.sin()}

    function = CompiledFunction(sine, (sine,), always=True)
    function(X)  # "always" is from the second call on
    with pytest.warns(NotCompiledWarning, match="set TORCHINDUCTOR_CACHE_DIR") as caught:
        outputs, _ = function(X)
    assert torch.equal(outputs["y"], X.sin())
    assert str(path) in str(caught[0].message)


@pytest.mark.parametrize(
    "words",
    ["final link failed: No space left on device", "File size limit exceeded", "Read-only file system"],
)
def test_what_a_compiler_cannot_write_names_the_settings(cache, monkeypatch, words):
    from torch._inductor.exc import CppCompileError

    def full(*_, **__):
        raise RuntimeError("InductorError") from CppCompileError(["g++"], f"collect2: error\nld: {words}")

    monkeypatch.setattr("torch._inductor.compile", full)
    with pytest.raises(CaptureError, match=f"{words}.*TORCHINDUCTOR_CACHE_DIR.*{cache}.*TMPDIR"):
        compile_graph(graph(), [X], {})


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from pyro_vae.compiled.inductor import compile_graph
import torch._inductor.compile_fx  # before it forks
from torch.fx.experimental.proxy_tensor import make_fx

x = torch.linspace(0, 1, 7)
options = {"fallback_random": True, "cpp.vec_isa_ok": True}

def compiles():
    graph = make_fx(lambda x: (torch.sin(x) * 2 + x.tanh(),))(x)
    torch.testing.assert_close(compile_graph(graph, [x], options)(x)[0], torch.sin(x) * 2 + x.tanh())
"""


def run_child(code, **environment):
    child = subprocess.run(
        [sys.executable, "-c", CHILD + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stderr


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_processes_survive_shared_objects_that_were_cut_short(tmp_path):
    """And two of them compile the same at once. Each cut ends a process that loads the object as it is."""
    run_child(
        """
def start():
    if child := os.fork():
        return child
    status = 1
    try:
        compiles()
        status = 0
    finally:
        os._exit(status)

def end(child):
    assert os.waitpid(child, 0)[1] == 0

cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
children = [start(), start()]
for child in children:
    end(child)
(library,) = cache.rglob("*.main.so")
size = library.stat().st_size
was = library.stat().st_ino
end(start())
assert library.stat().st_ino == was  # not made anew
os.truncate(library, size // 2)
end(start())
assert library.stat().st_size == size
""",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )


@needs_compiler
def test_compiling_says_nothing_of_cuda_and_needs_no_cache(tmp_path):
    said = run_child(
        """
import logging
compiles()
assert "torch.utils.cpp_extension" in sys.modules
logging.getLogger("torch.utils.cpp_extension").warning("another word")
""",
        TORCHINDUCTOR_CACHE_DIR="/dev/null/cache",
        CUDA_HOME=str(tmp_path),
        HOME="/nonexistent",
    )
    folder = "cannot make its cache folder /dev/null/cache (Not a directory)"
    assert f"{folder}: set TORCHINDUCTOR_CACHE_DIR" in said
    assert "another word" in said
    assert "No CUDA runtime" not in said
