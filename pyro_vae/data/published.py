"""Published data sets: where their files are to be had, how they are checked and read."""

import dataclasses
import gzip
import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pyro_vae.data.arrays import Arrays, DataError, as_array, reading, shuffled

DATA_DIR_VARIABLE = "PYRO_VAE_DATA"


@dataclasses.dataclass(frozen=True)
class File:
    """A published file: path below the data folder, ``algorithm:hexdigest``, and where it is to be had."""

    path: str
    checksum: str
    urls: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A published data set.

    Attributes:
        forms: Sets of files that hold it, each complete by itself; the last is what gets downloaded.
        read: Takes the paths of one form; returns splits and the shape of a datum.
        provenance: Who published it.
    """

    forms: tuple[tuple[File, ...], ...]
    read: Callable[[list[Path]], tuple[Arrays, tuple[int, ...]]]
    provenance: str


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
    for path in folder / file.path, folder / Path(file.path).name:
        if path.is_file():
            return path
    return None


def _verify(path: Path, checksum: str) -> None:
    algorithm, expected = checksum.split(":")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) is not the published file: its {algorithm} is {found}, "
            f"not {expected}. It may be empty, truncated or altered; delete it to download it again"
        )


def _download(name: str, file: File, folder: Path) -> Path:
    """Download into the folder: checked before it gets its name, so that it is whole or not there."""
    target = folder / file.path
    wanted = f"{name} is not in {folder} (looked for {file.path})"
    if not file.urls:
        raise DataError(f"{wanted}, and there is no address to download it from")
    from torchvision.datasets.utils import download_url

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise DataError(
            f"{wanted}, and cannot be downloaded into it ({error.strerror}): give a folder that holds it, or "
            f"one that can be written, as data_dir or in ${DATA_DIR_VARIABLE}"
        ) from error
    failures = []
    with temporary as part:
        for url in file.urls:
            try:
                download_url(url, part, target.name)
                _verify(Path(part) / target.name, file.checksum)
            except (OSError, RuntimeError, DataError) as error:
                failures.append(f"{url}: {error}")
                continue
            os.replace(Path(part) / target.name, target)
            return target
    raise DataError(
        f"{wanted}, and downloading it failed:\n  "
        + "\n  ".join(failures)
        + f"\nGet it by other means and put "
        f"it at {target}"
    )


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


def _mnist_like(folder: str, mirrors: tuple[str, ...], provenance: str, checksums: dict[str, str]) -> Source:
    form = tuple(
        File(f"{folder}/raw/{name}.gz", f"sha256:{digest}", tuple(f"{url}/{name}.gz" for url in mirrors))
        for name, digest in checksums.items()
    )
    return Source((form,), _read_mnist, provenance)


# torchvision's folders and mirrors; static MNIST either as text files or packed in one .npz.
SOURCES = {
    "mnist": _mnist_like(
        "MNIST",
        ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, 1998",
        {
            "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": _mnist_like(
        "FashionMNIST",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
        "H. Xiao, K. Rasul, R. Vollgraf, 2017",
        {
            "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "static_mnist": Source(
        (
            (
                File(
                    "binarized_mnist/binarized_mnist.npz",
                    "sha256:50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5",
                ),
            ),
            tuple(
                File(
                    f"binarized_mnist/binarized_mnist_{part}.amat",
                    f"sha256:{digest}",
                    (
                        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
                        f"binarized_mnist_{part}.amat",
                    ),
                )
                for part, digest in (
                    ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
                    ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
                    ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
                )
            ),
        ),
        _read_static_mnist,
        "R. Salakhutdinov, I. Murray, 2008; as distributed by H. Larochelle",
    ),
    "frey_face": Source(
        (
            (
                File(
                    "frey_face/frey_rawface.mat",
                    "sha256:265a83a23adb081755cd3de375509828e690324d1d60f076b8ecebc840d59c64",
                    ("https://cs.nyu.edu/~roweis/data/frey_rawface.mat",),
                ),
            ),
        ),
        _read_frey_face,
        "B. Frey; from S. Roweis's data page",
    ),
    "caltech_silhouettes": Source(
        (
            (
                File(
                    "caltech101_silhouettes/caltech101_silhouettes_28_split1.mat",
                    "sha256:eb6735e8d84b1850fabc5590124aab1755e90c9fd28123585324398405e1e42a",
                    ("https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat",),
                ),
            ),
        ),
        _read_caltech,
        "B. Marlin, K. Swersky, B. Chen, N. de Freitas, 2010",
    ),
    "omniglot": Source(
        (
            (
                File(
                    "omniglot/chardata.mat",
                    "md5:21ecaf34373511aa7691cf2e0802aa3d",
                    ("https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat",),
                ),
            ),
        ),
        _read_omniglot,
        "B. Lake, R. Salakhutdinov, J. Tenenbaum, 2015; as prepared by Y. Burda, R. Grosse, R. Salakhutdinov",
    ),
}
