import functools
import gzip
import hashlib
import io
import os
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.io import savemat

from pyro_vae.data import BINARIZATIONS, SOURCES, DataError, batches, files, from_array, load

relaxed = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ------------------------------------------------------------------------------- published data sets


DIGITS = load("digits", binarization="none")


def test_digits():
    assert (len(DIGITS.train), len(DIGITS.valid), len(DIGITS.test)) == (1297, 200, 300)
    assert DIGITS.shape == (8, 8)
    assert DIGITS.data_dim == 64
    assert DIGITS.train.stored.dtype == torch.uint8
    assert DIGITS.train.x.dtype == torch.float32
    assert set(DIGITS.train.x.unique().tolist()) == {level / 16 for level in range(17)}
    assert DIGITS.train.labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "mean", "labels"),
    [
        ("mnist", (50_000, 10_000, 10_000), (28, 28), (0.132515,), [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]),
        ("fashion_mnist", (50_000, 10_000, 10_000), (28, 28), (0.286849,), [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]),
        ("static_mnist", (50_000, 10_000, 10_000), (28, 28), (0.1325122449,), None),
        ("frey_face", (1600, None, 365), (28, 20), None, None),
        ("caltech_silhouettes", (4100, 2264, 2307), (28, 28), (0.539015,), None),
    ],
)
def test_published_data_sets(shared_data, name, sizes, shape, mean, labels):
    dataset = load(name, binarization="none", data_dir=shared_data)
    splits = (dataset.train, dataset.valid, dataset.test)
    assert tuple(None if split is None else len(split) for split in splits) == sizes
    assert dataset.shape == shape
    assert dataset.train.stored.dtype == torch.uint8
    if mean:
        assert dataset.test.x.double().mean().item() == pytest.approx(mean[0], abs=1e-6)
    if labels:
        assert dataset.test.labels[:10].tolist() == labels
    assert len(dataset.checksum) == 64


def test_frey_face_is_a_seeded_shuffle_of_upright_faces(shared_data):
    frey = load("frey_face", binarization="none", data_dir=shared_data)
    together = torch.cat([frey.train.stored, frey.test.stored]).double()
    assert together.mean().item() == pytest.approx(154.4609, abs=1e-4)
    assert len(together.unique(dim=0)) > 1900
    # Neighbours in the film are nearly equal; after a shuffle they are not.
    distance = (frey.train.x[1:] - frey.train.x[:-1]).abs().mean()
    assert distance > 0.05


def test_silhouettes_are_upright(shared_data):
    train = load("caltech_silhouettes", binarization="none", data_dir=shared_data).train
    # Faces (labels 1, 2) are taller than wide: their dark columns are narrower than their rows are high.
    faces = 1 - train.x.reshape(-1, 28, 28)[train.labels == 2]
    assert faces.amax(2).sum(1).mean() > faces.amax(1).sum(1).mean()


def test_the_environment_variable_says_where_data_are(shared_data, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DATA", str(shared_data))
    assert len(load("frey_face", binarization="none").test) == 365


def mnist_like_files(folder, checksums=None):
    """Six training and two test images of 28x28 in MNIST's layout."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (6, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(6),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(2),
    }
    digests = {}
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        content = gzip.compress(header + array.astype(np.uint8).tobytes())
        (folder / f"{name}.gz").write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


@pytest.fixture
def serve(tmp_path):
    """The address of a web server over tmp_path, on this machine."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def end_headers(self):
        if self.path.endswith(".gz"):  # as Apache has it, which does not mean that it is to be unpacked
            self.send_header("Content-Encoding", "x-gzip")
        super().end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def small_mnist(tmp_path, monkeypatch, serve):
    """A publisher of a small MNIST."""
    digests = mnist_like_files(tmp_path / "publisher")
    form = tuple(
        file._replace(checksum=f"sha256:{digest}", urls=(f"{serve}/publisher/{name}.gz",))
        for file, (name, digest) in zip(SOURCES["mnist"].forms[0], digests.items(), strict=True)
    )
    monkeypatch.setitem(SOURCES, "mnist", SOURCES["mnist"]._replace(forms=(form,)))
    return tmp_path


def test_what_is_missing_is_downloaded_once(small_mnist):
    dataset = load("mnist", binarization="none", data_dir=small_mnist / "cache")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (5, 1, 2)
    assert dataset.valid.labels.tolist() == [5]
    without_a_publisher(small_mnist)
    again = load("mnist", binarization="none", data_dir=small_mnist / "cache")
    assert again.checksum == dataset.checksum


def test_a_damaged_download_leaves_nothing_behind(small_mnist):
    damaged = small_mnist / "publisher" / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DataError, match="not the published file"):
        load("mnist", binarization="none", data_dir=small_mnist / "cache")
    names = {path.name for path in (small_mnist / "cache" / "MNIST" / "raw").iterdir()}
    assert names == {"train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"}


def without_a_publisher(folder):
    for path in (folder / "publisher").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("words", "prepare"),
    [
        (r"(?s)downloading it failed.*put it at", without_a_publisher),
        ("cannot be downloaded into it", lambda folder: (folder / "cache").write_text("")),
        pytest.param(
            "one that can be written",
            lambda folder: (folder / "cache").mkdir(mode=0o500),
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
def test_a_download_that_fails_is_explained(small_mnist, words, prepare):
    prepare(small_mnist)
    with pytest.raises(DataError, match=words):
        load("mnist", binarization="none", data_dir=small_mnist / "cache")


@pytest.mark.parametrize("damage", [b"", b"not gzip", None])
def test_damaged_local_files_are_named(small_mnist, damage):
    load("mnist", binarization="none", data_dir=small_mnist / "cache")
    path = small_mnist / "cache" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz .* is not the published file"):
        load("mnist", binarization="none", data_dir=small_mnist / "cache")


def test_omniglot(tmp_path, monkeypatch, serve):
    """A small file of the layout of chardata.mat, downloaded and checked."""
    upright = np.zeros((3, 28, 28))
    upright[0, 0, :] = 1  # a horizontal line at the top
    upright[1, :, 5] = 0.5
    columns = upright.transpose(0, 2, 1).reshape(3, 784).T
    publisher = tmp_path / "publisher" / "chardata.mat"
    publisher.parent.mkdir()
    savemat(publisher, {"data": columns, "testdata": columns[:, :2], "target": np.zeros((50, 3))})
    (file,) = SOURCES["omniglot"].forms[0]
    assert file.checksum == "md5:21ecaf34373511aa7691cf2e0802aa3d"
    digest = hashlib.md5(publisher.read_bytes()).hexdigest()
    small = files.File(file.path, f"md5:{digest}", (f"{serve}/publisher/chardata.mat",))
    monkeypatch.setitem(SOURCES, "omniglot", SOURCES["omniglot"]._replace(forms=((small,),)))
    dataset = load("omniglot", binarization="none", data_dir=tmp_path / "cache")
    assert len(dataset.train) == 3
    assert dataset.valid is None
    np.testing.assert_allclose(dataset.train.x.reshape(3, 28, 28), upright)
    np.testing.assert_allclose(dataset.test.x.reshape(2, 28, 28), upright[:2])


def test_static_mnist_from_text_files(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2, (4, 784))
    paths = [tmp_path / f"{part}.amat" for part in ("train", "valid", "test")]
    for path in paths:
        np.savetxt(path, rows, fmt="%d")
    splits, shape = files._read_static_mnist(paths)
    assert shape == (28, 28)
    for x, labels in splits.values():
        np.testing.assert_array_equal(x, rows)
        assert labels is None


def test_idx_of_a_wrong_size_is_refused(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + b"12345"))
    with pytest.raises(DataError, match="too few or too many"):
        files._read_idx(path)
    path.write_bytes(gzip.compress(b"PNG!"))
    with pytest.raises(DataError, match="not an IDX file"):
        files._read_idx(path)


# ---------------------------------------------------------------------------------- binarisation


def test_dynamic_batches_are_drawn_anew_with_the_grey_values_as_probabilities():
    digits = load("digits", binarization="dynamic")
    index = torch.arange(50)
    draws = torch.stack([digits.train.minibatch(index) for _ in range(400)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    grey = digits.train.stored[:50] / 16
    # 3,200 means of 400 draws: the largest deviation is about 4 standard errors
    assert ((draws.mean(0) - grey).abs() <= 5 * (grey * (1 - grey) / 400).sqrt()).all()
    assert torch.equal(digits.train.x, digits.train.x)


def test_dynamic_evaluation_is_the_fixed_draw():
    dynamic, fixed = (load("digits", binarization=how) for how in ("dynamic", "fixed"))
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(dynamic, part).x, getattr(fixed, part).x)
    minibatch = fixed.train.minibatch(torch.arange(9))
    assert torch.equal(minibatch, fixed.train.x[:9])


def test_the_fixed_draw_is_the_same_everywhere():
    """Pins the draw: a result of today can be compared with one of another machine or year."""
    bits = load("digits", binarization="fixed").test.x.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest().startswith("6d6da1f2e09bbd64")


def test_threshold():
    x = np.array([[0, 127, 128, 255]] * 4, dtype=np.uint8)
    assert from_array(x, binarization="threshold").train.x[0].tolist() == [0, 0, 1, 1]


def test_bits_stay_bits():
    x = np.array([[0, 1, 1, 0]] * 5)
    for binarization in ("dynamic", "fixed", "threshold", "none"):
        train = from_array(x, binarization=binarization).train
        assert train.binarization == "none"
        assert "stored as bits" in train.description
        assert train.x[0].tolist() == [0, 1, 1, 0]


def test_every_description_says_how_it_was_binarised():
    for binarization in BINARIZATIONS:
        assert f"binarization {binarization}" in load("digits", binarization=binarization).test.description


# ------------------------------------------------------------------------------------- your own data


def test_an_array_is_split_and_shuffled_the_same_way_every_time():
    x = torch.arange(200.0).reshape(100, 2)
    y = torch.arange(100)
    dataset = from_array(x, y, name="mine")
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [80, 10, 10]
    everything = torch.cat([dataset.train.x, dataset.valid.x, dataset.test.x])
    assert torch.equal(everything.sort(0).values, x)
    assert not torch.equal(everything, x)
    assert torch.equal(dataset.test.x[:, 0], 2.0 * dataset.test.labels)
    assert torch.equal(from_array(x).test.x, dataset.test.x)
    assert from_array(x).checksum == dataset.checksum
    assert from_array(x + 1).checksum != dataset.checksum


def test_shape_and_levels():
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
    dataset = from_array(images)
    assert dataset.shape == (4, 5, 3)
    assert dataset.data_dim == 60
    assert dataset.train.levels == 255
    real = from_array(np.linspace(-3, 9, 40).reshape(10, 4))
    assert real.train.levels == 1
    assert real.train.x.max() <= 9


def test_npy_and_npz(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "labelled.npz", x=x, y=np.arange(20))
    np.savez(tmp_path / "split.npz", train=x[:12], test=x[12:], train_labels=np.arange(12))
    assert load(tmp_path / "x.npy", binarization="none").checksum == from_array(x).checksum
    labelled = load(tmp_path / "labelled.npz", binarization="none")
    assert torch.equal(labelled.test.x, torch.tensor(x[labelled.test.labels.numpy()], dtype=torch.float32))
    split = load(tmp_path / "split.npz", binarization="none")
    torch.testing.assert_close(split.test.x, torch.tensor(x[12:], dtype=torch.float32))
    assert split.valid is None
    assert split.train.labels.tolist() == list(range(12))
    assert split.test.labels is None


def save_images(folder, count, mode="L", size=(5, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03}.png")


def test_a_folder_of_images(tmp_path):
    save_images(tmp_path / "flat", 10)
    dataset = load(tmp_path / "flat", binarization="none")
    assert dataset.shape == (4, 5)
    assert dataset.train.labels is None
    save_images(tmp_path / "classes" / "a", 6)
    save_images(tmp_path / "classes" / "b", 6, mode="RGB")
    dataset = load(tmp_path / "classes", binarization="none")
    assert dataset.shape == (4, 5, 3)
    assert sorted(dataset.train.labels.unique().tolist()) == [0, 1]
    save_images(tmp_path / "split" / "train", 7)
    save_images(tmp_path / "split" / "test", 3)
    dataset = load(tmp_path / "split", binarization="dynamic")
    assert (len(dataset.train), dataset.valid, len(dataset.test)) == (7, None, 3)


def test_a_folder_is_the_same_class_in_every_split(tmp_path):
    for folder, count in (("train/a", 4), ("train/b", 4), ("train/c", 4), ("test/c", 3)):
        save_images(tmp_path / folder, count)
    dataset = load(tmp_path, binarization="none")
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.test.labels.tolist() == [2] * 3


def without_a_test_set(folder):
    save_images(folder / "train", 4)
    save_images(folder / "valid", 4)


def of_sixteen_bits(folder):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "deep.png")


def of_two_sizes(folder):
    save_images(folder, 3)
    save_images(folder / "z", 1, size=(9, 9))


def in_two_units(folder):
    grey = np.arange(24, dtype=np.uint8).reshape(6, 4)
    np.savez(folder / "x.npz", train=grey, test=grey / 255)


def of_pickles(folder):
    np.savez(folder / "x.npz", x=np.array([{"a": 1}], dtype=object))
    assert zipfile.is_zipfile(folder / "x.npz")


@pytest.mark.parametrize(
    ("words", "save"),
    [
        ("at least train and test", without_a_test_set),
        (r"deep.png.*more than 8 bits", of_sixteen_bits),
        (r"z/000.png is \(9, 9\)", of_two_sizes),
        ("all in one unit", in_two_units),
        ("without pickled objects", of_pickles),  # which are not executed
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, words, save):
    save(tmp_path)
    archive = tmp_path / "x.npz"
    with pytest.raises(DataError, match=words):
        load(archive if archive.exists() else tmp_path, binarization="none")


def test_tensors_of_sixteen_bits_are_numbers():
    assert from_array(torch.linspace(0, 1, 20, dtype=torch.bfloat16).reshape(10, 2)).train.x.max() == 1.0


@relaxed
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".npy", ".npz", ".txt", ""]))
def test_rubbish_files_give_one_message(tmp_path, content, suffix):
    path = tmp_path / f"rubbish{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="rubbish"):
        load(path, binarization="none")


@relaxed
@given(data=st.data())
def test_damaged_files_give_data_or_one_message(tmp_path, data):
    """Any byte of a good file may be wrong, or the end missing."""
    kind = data.draw(st.sampled_from([".npy", ".npz", "images"]))
    buffer = io.BytesIO()
    x = np.arange(24, dtype=np.uint8).reshape(6, 4)
    if kind == ".npy":
        np.save(buffer, x)
    elif kind == ".npz":
        np.savez(buffer, x=x)
    else:
        Image.fromarray(x).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] = data.draw(st.integers(0, 255))
    else:
        content = content[:position]
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / ("x.png" if kind == "images" else f"x{kind}")
    path.write_bytes(bytes(content))
    try:
        dataset = load(folder if kind == "images" else path, binarization="none")
    except DataError as error:
        assert "damaged" in str(error)
    else:
        assert dataset.train.x.isfinite().all()
    finally:
        path.unlink()


@relaxed
@given(
    x=hnp.arrays(
        dtype=st.one_of(
            hnp.floating_dtypes(), hnp.integer_dtypes(), hnp.boolean_dtypes(), hnp.complex_number_dtypes()
        ),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    ),
    binarization=st.sampled_from(BINARIZATIONS),
)
def test_any_array_gives_data_or_one_message(x, binarization):
    try:
        dataset = from_array(x, binarization=binarization)
    except DataError:
        return
    sizes = [len(split) for split in (dataset.train, dataset.valid, dataset.test)]
    assert sum(sizes) == len(x)
    assert dataset.train.x.isfinite().all()
    if binarization != "none":
        assert ((dataset.train.x == 0) | (dataset.train.x == 1)).all()


# ------------------------------------------------------------------------------------------ batches


def test_an_epoch_has_every_datum_once_in_a_new_order():
    split = from_array(np.arange(2, 1002.0).reshape(500, 2)).train
    epochs = batches(split, 64, seed=3)
    assert len(epochs) == 7
    first = [x for (x,) in epochs]
    assert [len(x) for x in first] == [64] * 6 + [16]
    second = torch.cat([x for (x,) in epochs])
    assert not torch.equal(torch.cat(first), second)
    assert torch.equal(torch.cat(first).sort(0).values, second.sort(0).values)
    assert torch.equal(second.sort(0).values, split.x.sort(0).values)


def test_batches_go_on_from_their_state():
    split = load("digits", binarization="dynamic").train
    epochs = batches(split, 100, seed=1)
    list(epochs)
    state = epochs.state_dict()
    expected = torch.cat([x for (x,) in epochs])
    resumed = batches(split, 100, seed=7)
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([x for (x,) in resumed]), expected)
    assert not torch.equal(torch.cat([x for (x,) in batches(split, 100, seed=7)]), expected)


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (TypeError, r"from_array\(x\).train", lambda: batches(torch.zeros(3, 2))),
        (TypeError, r"from_array\(x\).train", lambda: batches(DIGITS)),
        (
            *(ValueError, r"context is a tensor of shape \(5, 10\), but must have a row"),
            lambda: batches(DIGITS.train, 100, context=torch.zeros(5, 10)),
        ),
        (ValueError, "there would be no batch", lambda: batches(DIGITS.valid, 201, drop_last=True)),
    ],
)
def test_batches_that_cannot_be_made_are_refused(error, words, make):
    with pytest.raises(error, match=words):
        make()


def test_epochs_of_any_size_are_drawn_with_replacement():
    epochs = batches(DIGITS.train, 100, epoch_size=5250)
    assert len(epochs) == 53
    index = torch.cat(epochs.indices())
    assert len(index) == 5250
    counts = index.bincount(minlength=len(DIGITS.train)).double()
    # Poisson but for the fixed sum: mean and variance are 5250 / 1297.
    assert counts.var() == pytest.approx(counts.mean().item(), rel=0.2)
    assert [len(x) for (x,) in epochs][-1] == 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_drawn_on_the_device():
    split = load("digits", binarization="dynamic").train.to("cuda")
    (x,) = next(iter(batches(split)))
    assert x.is_cuda
    assert split.stored.dtype == torch.uint8


def test_dequantised_levels_are_spread_over_their_bins():
    digits = load("digits", binarization="dequantize")
    levels, x = DIGITS.test, digits.test.x
    assert digits.test.bin_width == 1 / 17
    assert torch.equal((x * 17).floor(), levels.stored.float())
    assert torch.equal(x, load("digits", binarization="dequantize").test.x)
    drawn = torch.stack([digits.test.minibatch(torch.arange(20)) for _ in range(300)])
    inside = drawn * 17 - levels.stored[:20]
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert abs(inside.mean() - 0.5) < 0.01
    assert abs(inside.var() - 1 / 12) < 0.01
    assert "binarization dequantize (one draw" in digits.test.description


def test_batches_come_with_their_context():
    digits = DIGITS.train
    context = torch.nn.functional.one_hot(digits.labels, 10).float()
    seen = 0
    for x, c in batches(digits, 100, context=context):
        assert c.shape == (len(x), 10)
        seen += len(x)
        for datum, labels in zip(x[:3], c[:3], strict=True):
            place = (digits.x == datum).all(1).nonzero()[0, 0]
            assert torch.equal(context[place], labels)
    assert seen == len(digits)


def test_missing_numbers_are_kept_where_they_are_announced():
    x = np.random.RandomState(0).randn(20, 3)
    x[3, 1] = np.nan
    dataset = from_array(x, missing=True)
    parts = (dataset.train, dataset.valid, dataset.test)
    assert sum(int(part.x.isnan().sum()) for part in parts) == 1


# --------------------------------------------------------------- what says that a number is missing

NUMBERS = np.random.RandomState(0).randint(-5, 300, (30, 3)).astype(float)
GAPS = np.random.RandomState(1).rand(30, 3) < 0.3
WITH_NONE = [
    [None if gap else x for x, gap in zip(*rows, strict=True)] for rows in zip(NUMBERS, GAPS, strict=True)
]


def with_gaps():
    """The same numbers and gaps in everything that people hold numbers in."""
    pandas = pytest.importorskip("pandas")
    masked = np.ma.array(np.where(GAPS, -999.0, NUMBERS), mask=GAPS)
    frame = pandas.DataFrame(WITH_NONE, columns=list("abc"), dtype=float)
    fields = np.ma.array(np.zeros(30, [("a", float), ("b", int), ("c", float)]))
    for column, field in enumerate("abc"):
        fields[field] = masked[:, column]
        fields[field].mask = GAPS[:, column]
    yield from {
        "nan": np.where(GAPS, np.nan, NUMBERS),
        "masked": masked,
        "hard mask": np.ma.array(masked, hard_mask=True),
        "masked integers": masked.astype(int),
        "masked float32": masked.astype(np.float32),
        "masked objects": masked.astype(object),
        "masked images": masked.reshape(30, 3, 1),
        "masked rows": list(masked),
        "masked fields": fields,
        "masked constants": [[np.ma.masked if x is None else x for x in row] for row in WITH_NONE],
        "MaskedTensor": torch.masked.masked_tensor(torch.tensor(NUMBERS), torch.tensor(~GAPS)),
        "None": WITH_NONE,
        "DataFrame": frame,
        "Int64": frame.astype("Int64"),
        "Float64": frame.astype("Float64"),
        "objects with NA": frame.astype(object).where(~GAPS, pandas.NA),
        "objects with NaT": frame.astype(object).where(~GAPS, pandas.NaT),
        "dictionary": {name: frame[name].tolist() for name in "abc"},
        "xarray": pytest.importorskip("xarray").DataArray(frame.to_numpy()),
    }.items()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_what_is_missing_is_nan_wherever_it_is_said():
    expected = from_array(np.where(GAPS, np.nan, NUMBERS), missing=True).train.x
    for kind, x in with_gaps():
        found = from_array(x, missing=True).train.x
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=kind)
        with pytest.raises(DataError, match=f"missing, as {GAPS.sum()} of 90 numbers are"):
            from_array(x)


def test_null_of_polars_and_arrow_is_missing():
    columns = {"a": [1, None, 300] * 10, "b": [0.5, None, 2.0] * 10}
    expected = from_array(np.array([[1, 0.5], [np.nan] * 2, [300, 2]] * 10), missing=True).train.x
    for module, table in ("polars", "DataFrame"), ("pyarrow", "table"):
        x = getattr(pytest.importorskip(module), table)(columns)
        torch.testing.assert_close(from_array(x, missing=True).train.x, expected, equal_nan=True)


def test_bits_may_be_missing():
    masked = np.ma.array(NUMBERS > 100, mask=GAPS)
    assert from_array(masked, missing=True).train.x.nan_to_num(7).unique().tolist() == [0, 1, 7]


# -------------------------------------------------------------------------- types and whole numbers

LARGE = 2**24 + 1


@pytest.mark.parametrize(
    "x",
    [
        np.array([[LARGE, 1]] * 9),
        np.array([[LARGE, 1]] * 9, dtype=np.uint64),
        np.array([[float(LARGE), 1.0]] * 9),
        np.array([[float(LARGE), 0.5]] * 9),  # a column of counts beside one of reals
        torch.tensor([[LARGE, 1]] * 9),
        [[LARGE, 0.5]] * 9,
        {"count": [LARGE] * 9, "real": [0.5] * 9},
    ],
)
def test_whole_numbers_are_not_rounded(x):
    with pytest.raises(DataError, match=r"16777217, a whole number that a 32-bit float rounds.*dtype="):
        from_array(x)
    kept = from_array(x, dtype=torch.float64)
    assert kept.train.x.dtype == torch.float64
    assert kept.train.x[0, 0] == LARGE
    assert next(iter(batches(kept.train)))[0][0, 0] == LARGE


def test_what_a_float_holds_is_taken():
    assert from_array([[2**24, 3]] * 9).train.x.max() == 2**24
    reals = np.random.RandomState(0).randn(9, 2) * 1e20  # of which each is a whole number
    assert from_array(reals).train.x.dtype == torch.float32


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_data_have_the_type_that_is_asked_for(binarization):
    for dataset in load("digits", binarization=binarization, dtype=torch.float64), None:
        if dataset is None:
            torch.set_default_dtype(torch.float64)
            dataset = load("digits", binarization=binarization)
        assert dataset.test.x.dtype == torch.float64
        assert next(iter(batches(dataset.train)))[0].dtype == torch.float64
    if binarization == "none":
        assert dataset.train.x.mul(16).frac().abs().max() == 0


def test_the_last_smaller_batch_can_be_dropped():
    split = from_array(np.arange(2, 202.0).reshape(100, 2)).train
    kept, dropped = (list(batches(split, 30, drop_last=drop)) for drop in (False, True))
    assert [len(x) for (x,) in kept] == [30, 30, 20]
    assert [len(x) for (x,) in dropped] == [30, 30] == [30] * len(batches(split, 30, drop_last=True))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(kept, dropped, strict=False))


def test_numbers_that_differ_by_less_than_a_float_tells_are_not_rounded():
    far = np.random.RandomState(0).rand(30, 3)
    far[:, 1] += 1e9
    with pytest.raises(DataError, match=r"\[:, 1\] varies by 0.\d+ about 1000000000.*32-bit float.*offset"):
        from_array(far)
    kept = from_array(far, dtype=torch.float64).train.x[:, 1]
    assert len(kept.unique()) == len(kept)
    constant = np.full((30, 2), 0.1) + 1e-17 * np.arange(30)[:, None]
    assert from_array(constant).train.x.dtype == torch.float32


def test_yes_and_no_beside_bytes_are_no_grey_values():
    table = {"age": np.array([57, 30, 41] * 10, np.uint8), "smoker": np.array([True, False] * 15)}
    assert set(from_array(table).train.x.unique().tolist()) == {0.0, 1.0, 30.0, 41.0, 57.0}
    assert set(from_array({"smoker": table["smoker"]}).train.x.unique().tolist()) == {0.0, 1.0}
    assert from_array({"grey": table["age"]}).train.x.max() == torch.tensor(57 / 255)


# ---------------------------------------------------------------------------------- what is refused

HALVES = np.full((10, 2), 0.5)
WITH_NAN = np.where(GAPS, np.nan, NUMBERS)
BITS = torch.zeros(10, 3)


@pytest.mark.parametrize(
    ("words", "take"),
    [
        ("none of them empty", lambda: from_array(np.zeros((0, 3)))),
        ("none of them empty", lambda: from_array(np.zeros((5, 0)))),
        ("at least two axes", lambda: from_array(np.zeros(5))),
        ("at least two axes", lambda: from_array(None)),
        ("array", lambda: from_array({"a": np.zeros(0), "b": np.zeros(0)})),
        ("2 data: too few", lambda: from_array(np.zeros((2, 3)))),
        ("not numbers", lambda: from_array(np.array([["a", "b"]] * 5))),
        ("not numbers", lambda: from_array(np.array([[1j, 0]] * 5))),
        ("differ in length", lambda: from_array([[1, 2], [3]])),
        (r"\[1, 1\] is nan", lambda: from_array(np.array([[0.0, 1.0], [2.0, np.nan], [3.0, 4.0]]))),
        (r"\[2, 0\] is -inf", lambda: from_array(np.array([[0.0, 1.0], [2.0, 5.0], [-np.inf, 4.0]]))),
        (r"\[0, 1\] is inf", lambda: from_array(np.array([[0.0, np.inf], [2.0, 3.0]] * 2, np.float16))),
        (r"\[0, 0\] is inf as a 32-bit float", lambda: from_array(np.array([[1e300, 1.0]] * 4))),
        (r"column 2 \('red'\)", lambda: from_array(np.array([[1, 2, "red"]] * 9, dtype=object))),
        (r"column 1 \('blue'\)", lambda: from_array(np.array([[1, "blue", "3"]] * 9))),
        (r"x\.astype\(float\)", lambda: from_array(np.array([["1", "2"]] * 9))),
        (
            r"array\['colour'\] holds text, such as 'red'",
            lambda: from_array({"size": [1.0] * 9, "colour": ["red"] * 9}),
        ),
        ("dates as numbers", lambda: from_array(np.array([["2020-01-01"] * 2] * 9, dtype="datetime64[D]"))),
        ("x.to_dense", lambda: from_array(torch.eye(9).to_sparse())),
        (r"array\[0\]\[1\] is .* not a number", lambda: from_array([[1, len]] * 9)),
        ("64-bit float rounds", lambda: from_array([[2**53 + 1, 0]] * 9, dtype=torch.float64)),
        ("64-bit float rounds", lambda: from_array([[2**53 + 1, 0.5]] * 9, dtype=torch.float64)),
        (
            "64-bit float rounds",
            lambda: from_array(np.array([[2**63 + 1, 0]] * 9, np.uint64), dtype=torch.float64),
        ),
        ("missing=True", lambda: from_array(WITH_NAN)),
        ("inf", lambda: from_array(np.where(GAPS, np.inf, NUMBERS), missing=True)),
        ("taken as they are", lambda: from_array(WITH_NAN, missing=True, binarization="dynamic")),
        (
            "grey values k / 255",
            lambda: from_array(np.ma.array(NUMBERS.clip(0, 255).astype(np.uint8), mask=GAPS), missing=True),
        ),
        ("all 90 numbers of array are missing", lambda: from_array(np.ma.masked_all((30, 3)), missing=True)),
        (
            "10 of 30 labels .* are missing",
            lambda: from_array(NUMBERS, np.ma.array([0, 1, 2] * 10, mask=[0, 0, 1] * 10)),
        ),
        ("10 of 30 labels .* are missing", lambda: from_array(NUMBERS, [0, None, 1] * 10)),
        ("text, such as 'a'", lambda: from_array(NUMBERS, ["a", "b", "c"] * 10)),
        ("10 data but 9 labels", lambda: from_array(HALVES, np.arange(9))),
        ("whole numbers", lambda: from_array(HALVES, np.linspace(0, 1, 10))),
        ("hold -1: number the classes from 0", lambda: from_array(HALVES, np.arange(10) - 1)),
        (r"from -1 to 7: divide", lambda: from_array(np.array([[-1.0, 7.0]] * 5), binarization="dynamic")),
        ("real numbers", lambda: from_array(torch.randn(10, 3), binarization="dequantize")),
        ("holds bits", lambda: from_array(BITS, binarization="dequantize")),
        ("Did you mean 'fashion_mnist'", lambda: load("fashon_mnist", binarization="none")),
        ("Did you mean 'dynamic'", lambda: load("digits", binarization="dinamic")),
        ("no file or folder", lambda: load("nowhere/x.npy", binarization="none")),
    ],
)
def test_useless_data_and_unknown_names_are_refused(words, take):
    with pytest.raises(DataError, match=words):
        take()
