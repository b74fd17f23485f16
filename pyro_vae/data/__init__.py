r"""Data: files -> tensors -> minibatches.

A :class:`Dataset` has fixed splits. Each :class:`Split` keeps its data as they were stored (bytes or bits, on
any device) and converts what is asked for, :math:`x = \mathrm{stored} / \mathrm{levels}`. Binarisation
happens here and nowhere else; results differ by nats between its ways:

- ``"dynamic"``: grey values are probabilities, and every batch draws its bits anew (as in Burda, Grosse &
  Salakhutdinov 2016). ``split.x``, for evaluation, is one draw: that of ``"fixed"``.
- ``"fixed"``: one seeded draw, the same on every machine.
- ``"threshold"``: x > 1/2.
- ``"dequantize"``: each grey level is spread over its bin, :math:`x = (\mathrm{stored} + u) /
  (\mathrm{levels} + 1)` with u uniform on [0, 1] and drawn anew for every batch. The mean log-density of such
  data, in bins, bounds the log-probability of the levels from below, so that densities compare with
  distributions of levels (Theis, van den Oord & Bethge, *A Note on the Evaluation of Generative Models*,
  2016).
- ``"none"``: x as it is. (Data that are stored as bits are always this.)

===================  ====================  =================  =============================================
name                 train/valid/test      datum              splits
===================  ====================  =================  =============================================
digits               1,297/200/300         8x8, 0 to 16       scikit-learn's, after a seeded shuffle
mnist                50,000/10,000/10,000  28x28, bytes       the last 10,000 of the 60,000 are ``valid``
fashion_mnist        50,000/10,000/10,000  28x28, bytes       the same
static_mnist         50,000/10,000/10,000  28x28, bits        Larochelle's fixed binarisation
frey_face            1,600/-/365           28x20, bytes       after a seeded shuffle
caltech_silhouettes  4,100/2,264/2,307     28x28, bits        Marlin's
omniglot             24,345/-/8,070        28x28, [0, 1]      that of the IWAE paper
your own             80 %/10 %/10 %        any                after a seeded shuffle, or as you split them
===================  ====================  =================  =============================================
"""

from pathlib import Path

import torch

from pyro_vae.arguments import checked
from pyro_vae.data.arrays import DataError
from pyro_vae.data.files import SOURCES, from_path, from_source, read_digits
from pyro_vae.data.splits import (
    BINARIZATIONS,
    Batches,
    Dataset,
    Split,
    batches,
    build,
    check_binarization,
    check_dtype,
    from_array,
)
from pyro_vae.errors import unknown

__all__ = [
    "BINARIZATIONS",
    "SOURCES",
    "Batches",
    "DataError",
    "Dataset",
    "Split",
    "batches",
    "from_array",
    "load",
]


@checked
def load(
    name: str | Path,
    *,
    binarization: str,
    data_dir: str | Path | None = None,
    missing: bool = False,
    dtype: torch.dtype | None = None,
) -> Dataset:
    """A data set by its name, or from a file or folder of your own.

    Args:
        name: A name in the table above; or a path: ``.npy`` (one array), ``.npz`` (arrays ``train``,
            ``test`` and perhaps ``valid``, with labels in ``train_labels``...; or ``x`` and perhaps ``y``),
            or a folder of images of one size (in subfolders ``train``, ``test``, ``valid``, if it has them;
            else the subfolders, if any, are the labels). Bytes are read as grey values 0..255, arrays of 0
            and 1 as bits, anything else as it is.
        binarization: One of ``BINARIZATIONS``.
        data_dir: Folder of the files, by default the environment variable ``PYRO_VAE_DATA`` or else
            ``~/.cache/pyro_vae``. It may be read-only; what is not there is downloaded into it.
        missing: A file of your own may hold nan where a number is missing (as of :func:`from_array`).
        dtype: Floating-point type of x, as in :func:`from_array`.

    Raises:
        DataError: If there is no such data set, it cannot be downloaded, a file is missing, truncated or
            fails its checksum, or the data are not what the binarisation needs.
    """
    check_binarization(binarization, missing=missing)
    dtype = check_dtype(dtype)
    levels = None
    if str(name) == "digits":
        (splits, shape), levels = read_digits(), 16.0
        provenance = "scikit-learn's load_digits: the test part of UCI's optical digits"
    elif str(name) in SOURCES:
        splits, shape, provenance = from_source(str(name), data_dir)
    elif Path(name).exists():
        (splits, shape), provenance = from_path(Path(name), missing=missing, dtype=dtype), str(name)
    elif Path(name).suffix or len(Path(name).parts) > 1:
        raise DataError(f"there is no file or folder {name}")
    else:
        raise DataError(unknown("data set", str(name), ["digits", *SOURCES]))
    return build(str(name), splits, shape, provenance, binarization, levels, dtype=dtype)
