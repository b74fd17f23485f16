"""``explore``: play with a trained run in the browser: drag through its latent plane, draw, erase, complete.

Opens a local page (pip install -e ".[explore]"). A point dragged over the codes of test data is decoded at
once; an image of one's own is drawn or uploaded, encoded and edited; what is erased counts as unknown and is
completed in several ways; log p of the image is estimated, with its error. Nothing listens beyond this
machine, unless --host says so.
"""

import contextlib
import dataclasses
import io
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pyro_vae.lab import runs
from pyro_vae.lab.config import ConfigError
from pyro_vae.lab.explorer import Explorer, Plane, between, data_uri, with_unknown

if TYPE_CHECKING:
    import numpy as np

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Play with a trained run in the browser: drag through its latent plane, draw, erase, complete."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, of images."""
    data_dir: Path | None = None
    """Folder of the data files, if not where they were."""
    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own lets others in."""
    port: int = 0
    """Port to listen at; 0: any that is free."""
    browser: bool = True
    """Open the page in a browser."""


def parse(words: Sequence[str], program: str) -> Arguments:
    """Read the command line."""
    return tyro.cli(Arguments, prog=program, args=words)


def main(arguments: Arguments) -> None:
    """Load the run and serve the page until interrupted."""
    try:
        from nicegui import app, ui
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ConfigError(f"the page needs NiceGUI: pip install -e '.[explore]' ({error})") from error
    explorer = Explorer(runs.load_run(arguments.run, data_dir=arguments.data_dir, device="cpu"))
    port = free_port(arguments.host, arguments.port)
    if arguments.host in LOOPBACK:  # also against pages of others that resolve a name of theirs to here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        ui.run(
            lambda: Page(explorer, arguments.run.name).build(),
            host=arguments.host,
            port=port,
            title=f"{arguments.run.name}: latent space",
            favicon="🔎",
            reload=False,
            show=arguments.browser,
            timeout_graceful_shutdown=2,
        )


def free_port(host: str, port: int) -> int:
    """The port, or one that is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen at {host}, port {port} ({error}): try another --port"
            ) from error
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------- page


class Page:
    """A visitor's page, with a z and an image of their own.

    Args:
        explorer: Of the run.
        name: Of the run.
    """

    def __init__(self, explorer: Explorer, name: str) -> None:
        import numpy as np

        self.explorer, self.name = explorer, name
        self.z = explorer.codes.mean(0).astype(float)
        self.image = np.zeros(explorer.shape)
        self.known = np.ones(explorer.shape[:2], dtype=bool)
        self.last_pixel: tuple[int, int] | None = None
        self.is_decoding = self.is_stale = False
        self.changes = 0  # of the image: an answer to an earlier one is dropped

    def build(self) -> None:
        """Lay it out."""
        from nicegui import ui

        config = self.explorer.config
        ui.add_css(".px img {image-rendering: pixelated} .px, .plane {cursor: crosshair; user-select: none}")
        ui.label(f"{self.name}: {config.data}, {config.latent_dim} latent dimensions").classes("text-lg")
        width = f"width: {round(280 * self.explorer.shape[1] / self.explorer.shape[0])}px"
        dims = {i: f"z{i + 1}" for i in range(config.latent_dim)}
        with ui.row(wrap=False).classes("gap-8"):
            with ui.column().classes("items-center"):
                ui.label("Drag over the codes of test data")
                with ui.row():
                    changed = {"on_change": self.show_plane}
                    self.horizontal = ui.select(dims, label="horizontal", value=0, **changed).classes("w-24")
                    self.vertical = ui.select(dims, label="vertical", value=1, **changed).classes("w-24")
                events = ["mousedown", "mousemove"]
                self.scatter = ui.interactive_image(on_mouse=self.drag, events=events, sanitize=False)
                self.scatter.classes("plane").style("width: 420px").props('data-testid="plane"')
                self.position = ui.label().props('data-testid="position"')
                if len(dims) > 2:
                    with ui.row(wrap=False).classes("items-center w-96"):
                        self.other = ui.select(dims, label="further", value=2, on_change=self.show_marker)
                        self.other.classes("w-24")
                        low, high = self.explorer.codes.min().item(), self.explorer.codes.max().item()
                        ends = {"min": min(low, -4.0), "max": max(high, 4.0)}
                        self.slider = ui.slider(**ends, step=0.01, value=0, on_change=self.slide)
            with ui.column().classes("items-center"):
                ui.label("E[x | z]")
                self.decoded = ui.interactive_image(data_uri(self.explorer.decode(self.z)))
                self.decoded.classes("px").style(width).props('data-testid="decoded"')
                if self.explorer.num_classes:
                    labels = list(range(self.explorer.num_classes))
                    self.label = ui.select(labels, label="class", value=0, on_change=self.refresh)
                ui.button("draw on it →", on_click=self.take_decoded)
                self.completions = ui.row().classes("w-72 gap-2").props('data-testid="completions"')
            with ui.column().classes("items-center"):
                ui.label("Your image: draw, or erase what shall be unknown")
                tools = {"draw": "draw", "rub": "rub out", "erase": "unknown"}
                if not self.explorer.config.system.has_log_prob:
                    tools.pop("erase")  # a deterministic encoder takes whole images
                self.tool = ui.toggle(tools, value="draw")
                events = ["mousedown", "mousemove", "mouseup", "mouseleave"]
                self.canvas = ui.interactive_image(on_mouse=self.paint, events=events)
                self.canvas.classes("px").style(width).props('data-testid="canvas"')
                with ui.row():
                    ui.button("blank", on_click=self.blank)
                    ui.button("test image", on_click=self.take_test_image)
                ui.upload(
                    label="an image file",
                    auto_upload=True,
                    max_files=1,
                    max_file_size=2**22,
                    on_upload=self.upload,
                    on_rejected=lambda: ui.notify("An image file of 4 MB at most", type="negative"),
                ).classes("w-72")
                with ui.row():
                    ui.button("encode", on_click=self.encode)
                    self.completing = ui.button("complete", on_click=self.complete)
                    self.completing.set_visibility(self.explorer.completes)
                self.words = ui.label().classes("w-72").props('data-testid="words"')
        self.show_plane()
        self.show_canvas()

    @property
    def chosen_label(self) -> int:
        """The class that the programs are given."""
        return self.label.value if self.explorer.num_classes else 0

    def show_plane(self) -> None:
        """Draw the plane of the chosen dimensions; where they are one, the unchanged menu gives way."""
        if self.horizontal.value == self.vertical.value:
            first, second = self.plane.dims
            if self.horizontal.value == first:
                self.horizontal.set_value(second)
            else:
                self.vertical.set_value(first)
            return
        self.plane = Plane(self.explorer, self.horizontal.value, self.vertical.value)
        self.scatter.set_source(self.plane.picture)  # served by its own address, so that the marker is cheap
        self.show_marker()

    def show_marker(self) -> None:
        """Show where z is."""
        x, y = self.plane.pixel_of(self.z)
        self.scatter.set_content(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="white" stroke="red" stroke-width="3"/>'
        )
        self.position.set_text(", ".join(f"z{i + 1} = {self.z[i]:+.2f}" for i in self.plane.dims))
        if len(self.z) > 2:
            self.slider.set_value(round(self.z[self.other.value], 2))

    async def refresh(self) -> None:
        """Decode the newest z; what moves while that runs is decoded next."""
        from nicegui import run

        self.is_stale = True
        if self.is_decoding:
            return
        self.is_decoding = True
        try:
            while self.is_stale:
                self.is_stale = False
                image = await run.io_bound(self.explorer.decode, self.z.copy(), self.chosen_label)
                if image is None or self.decoded.is_deleted:  # shutting down, or the page was closed
                    return
                self.decoded.set_source(data_uri(image))
        finally:
            self.is_decoding = False

    async def drag(self, event: Any) -> None:
        """Move z to the mouse."""
        if event.buttons & 1:
            self.z[list(self.plane.dims)] = self.plane.latent_at(event.image_x, event.image_y)
            self.show_marker()
            await self.refresh()

    async def slide(self, event: Any) -> None:
        """Move z along another dimension, unless it is there already."""
        if abs(event.value - self.z[self.other.value]) < 0.01:
            return
        self.z[self.other.value] = event.value
        self.show_marker()
        await self.refresh()

    def show_canvas(self) -> None:
        """Draw the image; what was said of the one before is gone."""
        self.changes += 1
        self.canvas.set_source(data_uri(with_unknown(self.image, self.known)))
        self.words.set_text("")
        self.completions.clear()

    def paint(self, event: Any) -> None:
        """Draw, rub out or erase along the mouse, with a brush of 2 x 2 pixels."""
        if not event.buttons & 1:
            self.last_pixel = None
            return
        height, width = self.known.shape
        pixel = (min(max(int(event.image_y), 0), height - 1), min(max(int(event.image_x), 0), width - 1))
        for row, column in between(self.last_pixel or pixel, pixel):
            brush = slice(row, row + 2), slice(column, column + 2)
            self.known[brush] = self.tool.value != "erase"
            self.image[brush] = float(self.tool.value == "draw")
        self.last_pixel = pixel
        self.show_canvas()

    def put(self, image: "np.ndarray") -> None:
        """Take another image, all of it known."""
        self.image[:] = image
        self.known[:] = True
        self.show_canvas()

    def blank(self) -> None:
        """An empty image."""
        self.put(0 * self.image)

    def take_decoded(self) -> None:
        """The decoded image."""
        self.put(self.explorer.decode(self.z, self.chosen_label))

    def take_test_image(self) -> None:
        """One of the test data."""
        import numpy as np

        number = int(np.random.default_rng().integers(len(self.explorer.test)))
        if self.explorer.num_classes:
            self.label.set_value(int(self.explorer.test_labels[number]))
        self.put(self.explorer.test[number].reshape(self.explorer.shape).numpy())

    async def upload(self, event: Any) -> None:
        """An image from a file, in the size of the data."""
        import numpy as np
        from nicegui import ui
        from PIL import Image, UnidentifiedImageError

        try:
            picture = Image.open(io.BytesIO(await event.file.read()))
            height, width, *colours = self.explorer.shape
            picture = picture.convert("RGB" if colours == [3] else "L").resize((width, height))
        except (UnidentifiedImageError, OSError) as error:
            ui.notify(f"{event.file.name} is no image that can be read ({error})", type="negative")
            return
        finally:
            event.sender.reset()
        self.put(np.asarray(picture).reshape(self.explorer.shape) / 255)

    async def encode(self) -> None:
        """Put z where the image is encoded, and then say how likely the image is."""
        from nicegui import run

        self.words.set_text("estimating log p ...")
        changes, asked = self.changes, (self.image.copy(), self.known.copy(), self.chosen_label)

        def is_gone() -> bool:
            return self.words.is_deleted or changes != self.changes

        try:
            code = await run.io_bound(self.explorer.encode, *asked)
            if code is None or is_gone():
                return
            self.z[:] = code
            self.show_marker()
            await self.refresh()
            words = await run.io_bound(self.explorer.log_prob, *asked)
        except ValueError as error:
            words = f"this run cannot encode the image: {error}"
        if words is not None and not is_gone():
            self.words.set_text(words)

    async def complete(self) -> None:
        """Show what the image may be where it is unknown."""
        from nicegui import run, ui

        if self.known.all():
            ui.notify("Erase something first: what is unknown is completed", type="warning")
            return
        self.completing.disable()
        self.words.set_text("drawing from p(unknown | known) ...")
        words, found, changes = "", None, self.changes
        try:
            found = await run.io_bound(
                self.explorer.complete, self.image.copy(), self.known.copy(), self.chosen_label
            )
        except ValueError as error:
            words = f"this run cannot complete images: {error}"
        if self.words.is_deleted:
            return
        self.completing.enable()
        if changes != self.changes:
            return
        self.words.set_text(words)
        if found is None:
            return
        images, std = found
        self.completions.clear()
        with self.completions:
            for title, image in [*(("a draw", image) for image in images), ("uncertainty", std / 0.5)]:
                with ui.column().classes("items-center gap-0"):
                    ui.interactive_image(data_uri(image)).classes("px w-20")
                    ui.label(title).classes("text-xs")
