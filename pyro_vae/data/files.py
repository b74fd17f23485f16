"""Files and folders of a user's own."""

from pathlib import Path

import numpy as np
import torch

from pyro_vae.data.arrays import Arrays, DataError, as_array, as_labels, check_splits, reading, shuffled

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def from_path(
    path: Path, *, missing: bool = False, dtype: torch.dtype | None = None
) -> tuple[Arrays, tuple[int, ...]]:
    """Splits in a ``.npy`` or ``.npz`` file or a folder of images, and the shape of a datum.

    If ``missing``, files may hold nan. Floats are read as ``dtype``.
    """
    options = {"missing": missing, "dtype": dtype}
    if path.is_dir():
        parts = {part: path / part for part in ("train", "valid", "test") if (path / part).is_dir()}
        if {"train", "test"} <= set(parts):
            images = {part: _read_images(folder) for part, folder in parts.items()}
            # Of all splits together, so that a number is the same class in each.
            classes = sorted({name for _, names in images.values() for name in names})
            return check_splits(
                {part: (x, _numbered(names, classes)) for part, (x, names) in images.items()}, str(path)
            )
        if parts:
            raise DataError(
                f"{path} has {' and '.join(parts)}, but images that are split need at least train and test"
            )
        x, names = _read_images(path)
        return shuffled(x, _numbered(names, sorted(set(names))), str(path)), x.shape[1:]
    if path.suffix not in (".npy", ".npz"):
        raise DataError(
            f"{path} is neither .npy nor .npz nor a folder of images: give what reads it (pandas.read_csv, "
            "say) to pyro_vae.from_array, or save that by numpy.save"
        )
    content = reading(path, "a numpy file without pickled objects", lambda: _read_numpy(path))
    if isinstance(content, np.ndarray):
        x = as_array(content, str(path), **options)
        return shuffled(x, None, str(path)), x.shape[1:]
    if {"train", "test"} <= set(content):
        return check_splits(
            {
                part: (
                    as_array(content[part], f"{path}:{part}", **options),
                    as_labels(content[f"{part}_labels"], f"{path}:{part}")
                    if f"{part}_labels" in content
                    else None,
                )
                for part in ("train", "valid", "test")
                if part in content
            },
            str(path),
            dtype,
        )
    if "x" in content:
        x = as_array(content["x"], f"{path}:x", **options)
        labels = as_labels(content["y"], f"{path}:y") if "y" in content else None
        return shuffled(x, labels, str(path)), x.shape[1:]
    raise DataError(
        f"{path} holds arrays {sorted(content)}; it needs train and test (and perhaps valid), or x (and "
        "perhaps labels y)"
    )


def _read_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    with path.open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        return {key: content[key] for key in content.files}


def _numbered(names: list[str], classes: list[str]) -> np.ndarray | None:
    """Class names as numbers; None if there is but one class."""
    return np.array([classes.index(name) for name in names]) if len(classes) > 1 else None


def _read_images(folder: Path) -> tuple[np.ndarray, list[str]]:
    """All images below a folder, grey or RGB, and for each the subfolder it lies in."""
    from PIL import Image

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"there are no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a pixel: convert it to 8 bits, or give a .npy")
            return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))

    images = [reading(path, "an image", lambda path=path: read(path)) for path in paths]
    if any(image.ndim == 3 for image in images):
        images = [
            image if image.ndim == 3 else np.repeat(image[..., np.newaxis], 3, axis=-1) for image in images
        ]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"images differ in size: {path} is {image.shape}, {paths[0]} is {images[0].shape} (height, "
                "width): bring them to one size"
            )
    return np.stack(images), [str(path.parent.relative_to(folder)) for path in paths]
