"""Published data sets: where their files are to be had, how they are checked and read."""

import gzip
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch

from pyro_vae.data.arrays import Arrays, DataError, as_array, reading, shuffled

DATA_DIR_VARIABLE = "PYRO_VAE_DATA"


class File(NamedTuple):
    """A published file: path below the data folder, ``algorithm:hexdigest``, and where it is to be had."""

    path: str
    checksum: str
    urls: tuple[str, ...]


class Source(NamedTuple):
    """A published data set.

    Attributes:
        forms: Sets of files that hold it, each complete by itself; the last is what gets downloaded.
        read: Takes the paths of one form; returns splits and the shape of a datum.
        provenance: Who published it.
    """

    forms: tuple[tuple[File, ...], ...]
    read: Callable[[list[Path]], tuple[Arrays, tuple[int, ...]]]
    provenance: str


def _files(prefix: str) -> tuple[File, ...]:
    """The files of the registry whose path begins so, in its order."""
    lines = Path(__file__).with_name("registry.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line.startswith(prefix)]
    return tuple(File(path, checksum, tuple(urls)) for path, checksum, *urls in rows)


def from_source(name: str, data_dir: str | Path | None) -> tuple[Arrays, tuple[int, ...], str]:
    """Splits, shape of a datum and provenance of a published data set, downloaded if need be."""
    source = SOURCES[name]
    default = os.environ.get(DATA_DIR_VARIABLE) or Path.home() / ".cache" / "pyro_vae"
    folder = Path(data_dir or default).expanduser()
    for form in source.forms:
        paths = [_find(file, folder) for file in form]
        if all(paths):
            break
    else:
        paths = [path or _download(name, file, folder) for file, path in zip(form, paths, strict=True)]
    for file, path in zip(form, paths, strict=True):
        _verify(path, file.checksum)
    splits, shape = reading(paths[0], f"{name} data", lambda: source.read(paths))
    return splits, shape, source.provenance


def _find(file: File, folder: Path) -> Path | None:
    candidates = folder / file.path, folder / Path(file.path).name
    return next((path for path in candidates if path.is_file()), None)


def _verify(path: Path, checksum: str) -> None:
    algorithm, expected = checksum.split(":")
    found = pooch.file_hash(path, algorithm)
    if found != expected:
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) is not the published file: its {algorithm} is {found}, "
            f"not {expected}. It may be empty, truncated or altered; delete it to download it again"
        )


def _download(name: str, file: File, folder: Path) -> Path:
    """Download into the folder: checked before it gets its name, so that it is whole or not there."""
    target = folder / file.path
    wanted = f"{name} is not in {folder} (looked for {file.path})"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise DataError(
            f"{wanted}, and cannot be downloaded into it ({error.strerror}): give a folder that holds it, or "
            f"one that can be written, as data_dir or in ${DATA_DIR_VARIABLE}"
        ) from error
    failures = []
    downloader = pooch.HTTPDownloader(progressbar=True, hooks={"response": _keep_packed})
    for url in file.urls:
        try:
            pooch.retrieve(url, file.checksum, target.name, target.parent, downloader=downloader)
            return target
        except OSError as error:  # of the network, too
            failures.append(f"{url}: {error}")
        except ValueError as error:
            failures.append(f"{url} is not the published file: {error}")
    listed = "\n  ".join(failures)
    raise DataError(
        f"{wanted}, and downloading it failed:\n  {listed}\nGet it by other means and put it at {target}"
    )


def _keep_packed(response: Any, **_: Any) -> None:
    """Some servers call a .gz file a page that they compressed, which requests would unpack."""
    response.raw.headers.pop("Content-Encoding", None)


def _read_idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    dims = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(content) != 4 + 4 * dims + math.prod(shape):
        raise DataError(f"{path} holds {len(content):,} bytes, too few or too many for an array {shape}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _read_mnist(paths: list[Path]) -> tuple[Arrays, tuple[int, ...]]:
    x, y, test_x, test_y = (_read_idx(path) for path in paths)
    y, test_y = y.astype(np.int64), test_y.astype(np.int64)
    last = len(x) * 5 // 6
    splits = {"train": (x[:last], y[:last]), "valid": (x[last:], y[last:]), "test": (test_x, test_y)}
    return splits, x.shape[1:]


def _read_static_mnist(paths: list[Path]) -> tuple[Arrays, tuple[int, ...]]:
    if len(paths) == 1:
        with np.load(paths[0]) as packed:
            x = {part: np.unpackbits(packed[part], axis=1) for part in ("train", "valid", "test")}
    else:  # text: one digit, one separator, 784 a line
        x = {
            part: np.frombuffer(path.read_bytes(), np.uint8)[::2].reshape(-1, 784) - ord("0")
            for part, path in zip(("train", "valid", "test"), paths, strict=True)
        }
    return {part: (rows, None) for part, rows in x.items()}, (28, 28)


def _loadmat(path: Path) -> dict:
    from scipy.io import loadmat

    return loadmat(path)


def _read_frey_face(paths: list[Path]) -> tuple[Arrays, tuple[int, ...]]:
    x = _loadmat(paths[0])["ff"].T
    return shuffled(x, None, "frey_face", {"train": len(x) - 365, "test": 365}), (28, 20)


def _upright(columns: np.ndarray) -> np.ndarray:
    """Images whose pixels were stored column by column, as rows of pixels row by row."""
    return columns.reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784)


def _read_caltech(paths: list[Path]) -> tuple[Arrays, tuple[int, ...]]:
    mat = _loadmat(paths[0])
    parts = {"train": "train", "valid": "val", "test": "test"}
    return {
        part: (_upright(mat[f"{key}_data"]), mat[f"{key}_labels"].ravel().astype(np.int64))
        for part, key in parts.items()
    }, (28, 28)


def _read_omniglot(paths: list[Path]) -> tuple[Arrays, tuple[int, ...]]:
    mat = _loadmat(paths[0])
    return {
        part: (as_array(_upright(mat[key].T), f"omniglot:{key}", dtype=torch.float64), None)
        for part, key in (("train", "data"), ("test", "testdata"))
    }, (28, 28)


def read_digits() -> tuple[Arrays, tuple[int, ...]]:
    """scikit-learn's 8x8 digits, whose grey levels are 0 to 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    return shuffled(x, y, "digits", {"train": 1297, "valid": 200, "test": 300}), (8, 8)


SOURCES = {
    "mnist": Source((_files("MNIST/"),), _read_mnist, "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, 1998"),
    "fashion_mnist": Source((_files("FashionMNIST/"),), _read_mnist, "H. Xiao, K. Rasul, R. Vollgraf, 2017"),
    "static_mnist": Source(
        (_files("binarized_mnist/binarized_mnist.npz"), _files("binarized_mnist/binarized_mnist_")),
        _read_static_mnist,
        "R. Salakhutdinov, I. Murray, 2008; as distributed by H. Larochelle",
    ),
    "frey_face": Source((_files("frey_face/"),), _read_frey_face, "B. Frey; from S. Roweis's data page"),
    "caltech_silhouettes": Source(
        (_files("caltech101_silhouettes/"),),
        _read_caltech,
        "B. Marlin, K. Swersky, B. Chen, N. de Freitas, 2010",
    ),
    "omniglot": Source(
        (_files("omniglot/"),),
        _read_omniglot,
        "B. Lake, R. Salakhutdinov, J. Tenenbaum, 2015; as prepared by Y. Burda, R. Grosse, R. Salakhutdinov",
    ),
}
