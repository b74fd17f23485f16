"""Files: published data sets, downloaded and checked; and those of users, in arrays or images."""

import gzip
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pooch
import torch

from pyro_vae.data.arrays import PARTS, Arrays, DataError, as_array, as_labels, shuffled, stored_type

DATA_DIR_VARIABLE = "PYRO_VAE_DATA"
T = TypeVar("T")


def reading(path: Path, what: str, read: Callable[[], T]) -> T:
    """Call ``read``; whatever a foreign format's reader raises becomes one message about the file."""
    try:
        return read()
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} does not fit in memory ({error})") from error
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as {what}; it may be empty, truncated or of another format "
            f"({type(error).__name__}: {error})"
        ) from error


# ------------------------------------------------------------------ published data sets


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
        provenance: Publishers.
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
            x = {part: np.unpackbits(packed[part], axis=1) for part in PARTS}
    else:  # text: one digit, one separator, 784 a line
        x = {
            part: np.frombuffer(path.read_bytes(), np.uint8)[::2].reshape(-1, 784) - ord("0")
            for part, path in zip(PARTS, paths, strict=True)
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


# ------------------------------------------------------------------ files and folders of users

_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def from_path(
    path: Path, *, missing: bool = False, dtype: torch.dtype | None = None
) -> tuple[Arrays, tuple[int, ...]]:
    """Splits in a ``.npy`` or ``.npz`` file or a folder of images, and the shape of a datum.

    If ``missing``, files may hold nan. Floats are read as ``dtype``.
    """
    if path.is_dir():
        content = _read_folder(path)
    elif path.suffix in (".npy", ".npz"):
        content = reading(path, "a numpy file without pickled objects", lambda: _read_numpy(path))
    else:
        raise DataError(
            f"{path} is neither .npy nor .npz nor a folder of images: give what reads it (pandas.read_csv, "
            "say) to pyro_vae.from_array, or save that by numpy.save"
        )

    def part(key: str, labels: str) -> tuple[np.ndarray, np.ndarray | None]:
        name = str(path) if len(content) == 1 else f"{path}:{key}"
        x = as_array(content[key], name, missing=missing, dtype=dtype)
        return x, as_labels(content[labels], name, len(x)) if labels in content else None

    if {"train", "test"} <= set(content):
        splits = {name: part(name, f"{name}_labels") for name in PARTS if name in content}
        return _check_splits(splits, str(path), dtype), splits["train"][0].shape[1:]
    if "x" in content:
        x, labels = part("x", "y")
        return shuffled(x, labels, str(path)), x.shape[1:]
    raise DataError(
        f"{path} holds arrays {sorted(content)}; it needs train and test (and perhaps valid), or x (and "
        "perhaps labels y)"
    )


def _check_splits(splits: Arrays, name: str, dtype: torch.dtype | None) -> Arrays:
    """Splits that fit each other; DataError if they do not."""
    shapes = {part: x.shape[1:] for part, (x, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the splits of {name} differ in the shape of a datum: {shapes}")
    if len({x.dtype for x, _ in splits.values()}) > 1:
        if any(x.dtype == np.uint8 and x.max() > 1 for x, _ in splits.values()):
            raise DataError(f"some splits of {name} hold bytes and others floats: give all in one unit")
        floats = stored_type(dtype or torch.get_default_dtype())
        splits = {part: (x.astype(floats), labels) for part, (x, labels) in splits.items()}
    return splits


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        return {"x": content} if isinstance(content, np.ndarray) else dict(content)


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    """Images as the arrays of a ``.npz``; the subfolders they lie in, if there are several, are labels."""
    parts = [part for part in PARTS if (path / part).is_dir()]
    if parts and not {"train", "test"} <= set(parts):
        raise DataError(
            f"{path} has {' and '.join(parts)}, but images that are split need at least train and test"
        )
    images = {part: _read_images(path / part) for part in parts} or {"x": _read_images(path)}
    # Of all splits together, so that a number is the same class in each.
    classes = sorted({name for _, names in images.values() for name in names})
    content = {part: x for part, (x, _) in images.items()}
    if len(classes) > 1:
        for part, (_, names) in images.items():
            key = "y" if part == "x" else f"{part}_labels"
            content[key] = np.array([classes.index(name) for name in names])
    return content


def _read_images(folder: Path) -> tuple[np.ndarray, list[str]]:
    """All images below a folder, grey or RGB, and for each the subfolder it lies in."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not paths:
        raise DataError(f"there are no images ({', '.join(sorted(_IMAGES))}) in {folder}")
    images = [reading(path, "an image", lambda path=path: _read_image(path)) for path in paths]
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, axis=-1) for image in images]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"images differ in size: {path} is {image.shape}, {paths[0]} is {images[0].shape} (height, "
                "width): bring them to one size"
            )
    return np.stack(images), [str(path.parent.relative_to(folder)) for path in paths]


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path} has more than 8 bits a pixel: convert it to 8 bits, or give a .npy")
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
