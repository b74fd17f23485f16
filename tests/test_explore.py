"""The page to play with: what it asks of a run, and the page itself in headless Chromium."""

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from pyro_vae import quadrature
from pyro_vae.lab import Config, ConfigError, Facts, Run, build
from pyro_vae.lab.explorer import NUM_COMPLETIONS, Explorer, Plane, between
from pyro_vae.latents import posterior_mean
from pyro_vae.tasks import Mask, degraded

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


WHOLE, HALF = np.ones((8, 8), bool), np.arange(64).reshape(8, 8) < 32


def untrained(**settings):
    config = Config(**{"latent_dim": 4, "hidden": (20,), **settings})
    dataset = build.load_data(config)
    return Run(config, Facts.of(config, dataset), *build.build_pair(config, dataset))


# ------------------------------------------------------------------------------------ without a browser


def test_an_image_goes_to_its_code_and_back():
    run = untrained()
    explorer = Explorer(run)
    x = run.dataset.test.x[:1]
    image = x.reshape(8, 8).numpy()
    code, words = (ask(image, WHOLE) for ask in (explorer.encode, explorer.log_prob))
    np.testing.assert_allclose(code, posterior_mean(run.guide, x)[0], rtol=1e-5)
    assert re.fullmatch(r"log p\(x\) = -\d+\.\d ± \S+ nats.*", words)
    expected = run.model.likelihood(torch.as_tensor(code)).mean.reshape(8, 8).detach()
    np.testing.assert_allclose(explorer.decode(code), expected, rtol=1e-5)
    assert explorer.codes.shape == (300, 4)
    assert len(explorer.labels) == 300


def test_what_is_unknown_does_not_count():
    explorer = Explorer(untrained())
    results = []
    for fill in (0.0, 1.0):
        torch.manual_seed(0)
        image = np.full((8, 8), fill)
        image[:4] = 0.9  # bits: 1
        results.append((explorer.encode(image, HALF), explorer.log_prob(image, HALF)))
    images, std = explorer.complete(image, HALF)
    assert len(images) == NUM_COMPLETIONS
    for draw in images:
        assert (draw[:4] == 1).all()
    assert (std[:4] == 0).all()
    assert (std[4:] > 0).all()
    np.testing.assert_allclose(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert "log p(known part)" in results[0][1]
    assert "black and white" in results[0][1]  # of 0.9
    image[:4] = 1
    assert "black and white" not in explorer.log_prob(image, HALF)


def test_log_prob_of_a_part_is_exact():
    run = untrained(latent_dim=2)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(4)  # or all z explain an image alike
    explorer = Explorer(run)
    image = run.dataset.test.x[5]
    seen = torch.where(torch.as_tensor(HALF.reshape(-1)), image, torch.nan)[None]
    pair = degraded(run.model, run.guide, Mask(), seen)
    exact = quadrature(pair.model, *pair.batch).mean
    value, error = re.findall(r"(-\d\S*) ± (\S+)", explorer.log_prob(image.reshape(8, 8).numpy(), HALF))[0]
    assert float(value) == pytest.approx(exact, abs=0.05 + 4 * float(error))
    assert float(error) < 0.3


def test_grey_levels_and_classes():
    run = untrained(family="discretized_logistic", condition_on_labels=True)
    explorer = Explorer(run)
    assert explorer.num_classes == 10
    image = np.random.default_rng(0).random((8, 8))
    levels = explorer._flat(image) * 16
    torch.testing.assert_close(levels, levels.round())
    first, second = (explorer.decode(np.zeros(4), label) for label in (0, 7))
    assert np.abs(first - second).max() > 1e-3
    assert explorer.log_prob(image, WHOLE, 3).startswith("log p(x | class 3) = ")
    explorer = Explorer(untrained(family="bernoulli_cross_entropy"))
    assert "cross-entropy" in explorer.log_prob(image, WHOLE)


def test_autoencoders_and_codes_say_what_they_cannot():
    black = np.zeros((8, 8))
    explorer = Explorer(untrained(prior="flat"))
    assert explorer.log_prob(black, WHOLE) == "an autoencoder has no log p(x)"
    assert not explorer.completes
    with pytest.raises(ValueError, match="flat"):
        explorer.complete(black, HALF)
    explorer = Explorer(untrained(prior="codes"))
    words = explorer.log_prob(black, WHOLE)
    assert re.fullmatch(r"log p\(x\) ≥ -\d+\.\d nats, the bound of the encoder's codes", words)
    with pytest.raises(ValueError, match="discrete"):
        explorer.complete(black, HALF)


def test_what_cannot_be_explored_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="two latent dimensions"):
        Explorer(untrained(latent_dim=1))
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(100, 5)))
    with pytest.raises(ConfigError, match="no images"):
        Explorer(untrained(data=str(tmp_path / "table.npy"), family="diag_normal"))


def test_pixels_and_latents_are_inverse():
    explorer = Explorer(untrained())
    plane = Plane(explorer, 2, 1)
    z = plane.latent_at(200, 150)
    whole = np.zeros(4)
    whole[[2, 1]] = z
    np.testing.assert_allclose(plane.pixel_of(whole), (200, 150))
    assert plane.picture.size == (420, 420)


def test_lines_have_no_gaps():
    pixels = between((0, 0), (3, 9))
    assert {(0, 0), (3, 9)} <= pixels
    assert len(pixels) == 10
    assert between((4, 4), (4, 4)) == {(4, 4)}


# ------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the digits."""
    folder = tmp_path_factory.mktemp("explore") / "digits"
    settings = ["--epochs", "30", "--latent-dim", "4", "--hidden", "50", "--learning-rate", "3e-3"]
    settings += ["--test-samples", "10", "--out", folder]
    train = [sys.executable, ROOT / "scripts" / "train.py", *settings]
    subprocess.run(train, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def address(trained):
    """Of the page, until it is interrupted."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # NiceGUI looks for it
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "scripts" / "explore.py"), str(trained), "--no-browser"],
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise AssertionError(said)
    yield found[0]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


@pytest.fixture
def page(address):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        requests, faults = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_function("document.querySelector('[data-testid=plane] img')?.naturalWidth > 0")
        yield page
        elsewhere = (address, address.replace("http", "ws"), "data:", "blob:")
        assert [url for url in requests if not url.startswith(elsewhere)] == []
        assert faults == []
        browser.close()


def pixels(page, name):
    source = page.get_by_test_id(name).locator("img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def wait_until(page, condition):
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen within 10 s")


def drag(page, name, *places):
    """Press the mouse at the first place of a picture, and drag it to the others; places are shares of it."""
    box = page.get_by_test_id(name).bounding_box()
    for number, (x, y) in enumerate(places):
        where = box["x"] + x * box["width"], box["y"] + y * box["height"]
        page.mouse.move(*where, steps=1 if number == 0 else 5)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


@pytest.mark.slow
def test_dragging_decodes(page):
    before = pixels(page, "decoded")
    drag(page, "plane", (0.5, 0.5), (0.3, 0.3))
    wait_until(page, lambda: not np.array_equal(pixels(page, "decoded"), before))
    first = page.get_by_test_id("position").inner_text()
    assert re.fullmatch(r"z1 = [+-]\d\.\d\d, z2 = [+-]\d\.\d\d", first)
    page.get_by_label("horizontal").click()
    page.get_by_role("option", name="z3", exact=True).click()
    drag(page, "plane", (0.8, 0.8))
    position = page.get_by_test_id("position")
    wait_until(page, lambda: position.inner_text().startswith("z3 = "))
    slider = page.get_by_role("slider")  # of z3
    wait_until(
        page, lambda: f"z3 = {float(slider.get_attribute('aria-valuenow')):+.2f}" in position.inner_text()
    )
    page.get_by_label("vertical").click()
    page.get_by_role("option", name="z3", exact=True).click()  # horizontal gives way
    wait_until(page, lambda: re.match("z2 = .*, z3 = ", position.inner_text()))


@pytest.mark.slow
def test_drawing_erasing_and_completing(page):
    drag(page, "canvas", (0.2, 0.1), (0.8, 0.1))
    wait_until(page, lambda: pixels(page, "canvas")[0, 2:6].min() == 255)
    page.get_by_role("button", name="encode").click()
    words = page.get_by_test_id("words")
    wait_until(page, lambda: re.match(r"log p\(x\) = -\d+\.\d ± ", words.inner_text()))
    page.get_by_role("button", name="complete").click()
    page.get_by_text("Erase something first").wait_for()
    page.get_by_role("button", name="unknown").click()
    drag(page, "canvas", (0.05, 0.6), (0.95, 0.6))
    wait_until(page, lambda: (pixels(page, "canvas")[4] == (70, 110, 200)).all())
    assert words.inner_text() == ""
    page.get_by_role("button", name="complete").click()
    pictures = page.get_by_test_id("completions").locator("img")
    wait_until(page, lambda: pictures.count() == 7)
    page.get_by_role("button", name="encode").click()
    wait_until(page, lambda: words.inner_text().startswith("log p(known part) = "))


@pytest.mark.slow
def test_images_of_ones_own(page, tmp_path):
    Image.fromarray(np.tile(np.array([[255, 0]], np.uint8), (40, 20))).save(tmp_path / "stripes.png")
    (tmp_path / "text.png").write_text("no image")
    chooser = page.locator("input[type=file]")
    chooser.set_input_files(tmp_path / "text.png")
    page.get_by_text("is no image that can be read").wait_for()
    chooser.set_input_files(tmp_path / "stripes.png")
    wait_until(page, lambda: 50 < pixels(page, "canvas").mean() < 200)
    page.get_by_role("button", name="draw on it").click()
    wait_until(page, lambda: np.array_equal(pixels(page, "canvas")[..., 0], pixels(page, "decoded")))
    page.get_by_role("button", name="blank").click()
    wait_until(page, lambda: pixels(page, "canvas").max() == 0)
    page.get_by_role("button", name="test image").click()
    wait_until(page, lambda: pixels(page, "canvas").max() > 0)
    assert set(np.unique(pixels(page, "canvas"))) == {0, 255}  # a test image is of bits


@pytest.mark.slow
def test_pages_of_others_get_nothing(address):
    request = urllib.request.Request(address, headers={"Host": "somewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()


@pytest.mark.slow
def test_a_port_that_is_taken_is_explained(address, trained):
    port = address.rsplit(":", 1)[1]
    line = [sys.executable, ROOT / "scripts" / "explore.py", trained, "--no-browser", "--port", port]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen at 127.0.0.1, port {port}")
