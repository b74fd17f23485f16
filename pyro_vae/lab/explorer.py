"""Answers of a run to the page of ``explore``: codes, images, log p, completions, and their pictures."""

import base64
import io
import threading
from typing import TYPE_CHECKING, Any

from pyro_vae.lab.choices import FAMILIES, PRIORS
from pyro_vae.lab.config import ConfigError
from pyro_vae.lab.runs import Run

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

UNKNOWN = (70, 110, 200)  # the colour of what was erased
NUM_CODES = 2000
NUM_COMPLETIONS = 6


class Explorer:
    """Answers of a run to the page. Images are arrays (height, width), or (height, width, 3), in [0, 1].

    Args:
        run: Of images.

    Raises:
        ConfigError: If the data are no images, or z has one dimension only.
    """

    def __init__(self, run: Run) -> None:
        import torch

        from pyro_vae.lab import plots
        from pyro_vae.latents import posterior_mean

        self.run, self.config, self.shape = run, run.config, run.facts.shape
        if not plots.is_image(self.shape):
            raise ConfigError(f"data of shape {self.shape} are no images, so that there is nothing to draw")
        if self.config.latent_dim < 2:
            raise ConfigError("a plane takes two latent dimensions, and this run has one")
        run.model.eval()
        run.guide.eval()
        test = run.dataset.test
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:NUM_CODES]
        self.codes = posterior_mean(run.guide, *(part[chosen] for part in run.arguments(test))).numpy()
        self.labels = None if test.labels is None else test.labels[chosen].numpy()
        self.num_classes = run.facts.num_classes
        self.test, self.test_labels = test.x, test.labels
        # Pyro's handlers are one stack for all threads; decoding needs none of them.
        self._lock = threading.Lock()

    def _context(self, label: int) -> "tuple[Tensor, ...]":
        return self.run.context(1, [label] if self.num_classes else None)

    def _flat(self, image: "np.ndarray") -> "Tensor":
        """A datum such as the run was trained on: bits, or grey levels."""
        import torch

        x = torch.as_tensor(image, dtype=torch.float32).reshape(1, -1)
        if self.config.family == "bernoulli":
            return (x >= 0.5).float()
        levels = self.run.facts.levels
        return (x * levels).round() / levels if levels > 1 else x

    def _is_of_bits(self, image: "np.ndarray", known: "np.ndarray") -> bool:
        return bool(((image[known] == 0) | (image[known] == 1)).all())

    @property
    def completes(self) -> bool:
        """True if p(z | known) can be drawn from, and annealed to: z are real numbers with a density."""
        return not PRIORS[self.config.chosen_prior].unmapped

    def decode(self, z: "np.ndarray", label: int = 0) -> "np.ndarray":
        """E[x | z]."""
        labels = [label] if self.num_classes else None
        return self.run.decode(z[None], labels).reshape(self.shape).clamp(0, 1).numpy()

    def encode(self, image: "np.ndarray", known: "np.ndarray", label: int = 0) -> "np.ndarray":
        """The mean of q(z | x), of a guess of x where something is unknown."""
        from pyro_vae.latents import posterior_mean

        with self._lock:
            x, context = self._flat(image), self._context(label)
            if not known.all() and self.config.system.has_log_prob:
                x = self._degraded(x, known, context).batch[1]
            return posterior_mean(self.run.guide, x, *context)[0].numpy()

    def log_prob(self, image: "np.ndarray", known: "np.ndarray", label: int = 0) -> str:
        """The log p of what is known, in words: by importance sampling, or by annealing where that fails."""
        from pyro_vae.marginal_likelihood import importance_sampling
        from pyro_vae.tasks import annealed

        if not self.config.system.has_log_prob:
            return f"{self.config.system.noun} has no log p(x)"
        with self._lock:
            x, context = self._flat(image), self._context(label)
            pair, what = (self.run.model, self.run.guide, (x, *context)), "log p(x)"
            if not known.all():
                pair, what = self._degraded(x, known, context), "log p(known part)"
            model, guide, batch = pair
            # Of a part, the guide proposes one completion of many, and k-hat cannot see the others.
            anneals = self.completes and not known.all()
            if not anneals:
                count = 2000 if self.config.system.draws else 1
                found = importance_sampling(model, guide, *batch, num_samples=count, progress=False)
                anneals = self.completes and found.khat[0] > 0.7
            if anneals:
                found = annealed(model, guide, *batch, num_chains=32, progress=False)
        if context:
            what = f"{what[:-1]} | class {label})"
        words = f"{what} = {found.mean:.1f} ± {found.monte_carlo_error:.2g} nats"
        if found.is_of_codes:
            words = f"{what} ≥ {found.mean:.1f} nats, the bound of the encoder's codes"
        if not FAMILIES[self.config.family].is_density:
            words += " (of the cross-entropy, which is no log-likelihood)"
        if self.config.family == "bernoulli" and not self._is_of_bits(image, known):
            words += " (of the image in black and white, such as the run was trained on)"
        if found.khat is not None and found.khat[0] > 0.7:
            words += f" (k-hat {found.khat[0]:.1f}: too low, and the error is not to be relied on)"
        return words

    def _degraded(self, x: "Tensor", known: "np.ndarray", context: "tuple[Tensor, ...]") -> Any:
        import math

        import torch

        from pyro_vae.tasks import Mask, degraded

        seen = torch.where(self._mask(known), x, math.nan)
        return degraded(self.run.model, self.run.guide, Mask(), seen, *context)

    def _mask(self, known: "np.ndarray") -> "Tensor":
        """Numbers that are known, given the pixels that are."""
        import torch

        mask = torch.as_tensor(known)
        return mask.unsqueeze(-1).expand(self.shape).reshape(-1) if len(self.shape) == 3 else mask.reshape(-1)

    def complete(
        self, image: "np.ndarray", known: "np.ndarray", label: int = 0
    ) -> "tuple[list[np.ndarray], np.ndarray]":
        """Draws of what the whole image may be, and the standard deviation of every pixel.

        Raises:
            ValueError: If the run has no posterior to draw from.
        """
        from pyro_vae.tasks import inpaint

        with self._lock:
            found = inpaint(
                self.run.model,
                self.run.guide,
                self._flat(image),
                self._mask(known),
                *self._context(label),
                num_samples=NUM_COMPLETIONS,
                num_chains=NUM_COMPLETIONS,
                num_draws=12,
                num_warmup=60,
                num_leapfrog=5,
                progress=False,
            )
        images = [draw.reshape(self.shape).clamp(0, 1).numpy() for draw in found.samples[:, 0]]
        return images, found.std[0].reshape(self.shape).numpy()


# ------------------------------------------------------------------------------------------- pictures


def data_uri(image: "np.ndarray") -> str:
    """A PNG; numbers in [0, 1] are grey or colour, bytes as they are."""
    import numpy as np
    from PIL import Image

    if image.dtype.kind == "f":
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_unknown(image: "np.ndarray", known: "np.ndarray") -> "np.ndarray":
    """The image in bytes, with a colour of its own where it is unknown."""
    import numpy as np

    grey = (image.clip(0, 1) * 255).round().astype(np.uint8)
    colour = grey if grey.ndim == 3 and grey.shape[2] == 3 else np.stack([grey.squeeze()] * 3, -1)
    return np.where(known[..., None], colour, np.uint8(UNKNOWN)).astype(np.uint8)


def between(first: tuple[int, int], second: tuple[int, int]) -> set[tuple[int, int]]:
    """Pixels on the line between two: a fast mouse leaves some out."""
    count = max(abs(second[0] - first[0]), abs(second[1] - first[1]), 1)
    rows, columns = second[0] - first[0], second[1] - first[1]
    return {
        (round(first[0] + rows * k / count), round(first[1] + columns * k / count)) for k in range(count + 1)
    }


class Plane:
    """The picture of two latent dimensions, and where in it is which z.

    Args:
        explorer: Whose codes are shown.
        horizontal: Dimension, counted from 0.
        vertical: Another one.
        size: Pixels a side.
    """

    def __init__(self, explorer: Explorer, horizontal: int, vertical: int, size: int = 420) -> None:
        import numpy as np
        from matplotlib.figure import Figure
        from PIL import Image

        self.dims, self.size = (horizontal, vertical), size
        codes = explorer.codes[:, self.dims]
        low, high = np.quantile(codes, [0.002, 0.998], axis=0)
        margin = 0.15 * (high - low) + 1e-6
        self.low, self.high = low - margin, high + margin
        figure = Figure(figsize=(size / 100, size / 100), dpi=100)
        axes = figure.add_axes((0.15, 0.12, 0.83, 0.86))
        points = axes.scatter(*codes.T, c=explorer.labels, s=4, cmap="tab10")
        if explorer.labels is not None:
            axes.legend(*points.legend_elements(num=None), fontsize=6, handletextpad=0, loc="upper right")
        axes.set(
            xlim=(self.low[0], self.high[0]),
            ylim=(self.low[1], self.high[1]),
            xlabel=f"z{horizontal + 1}",
            ylabel=f"z{vertical + 1}",
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.picture = Image.open(buffer)
        self._axes = axes.transData

    def latent_at(self, x: int | float, y: int | float) -> "np.ndarray":
        """The two numbers of z at a pixel."""
        return self._axes.inverted().transform((x, self.size - y)).clip(self.low, self.high)

    def pixel_of(self, z: "np.ndarray") -> tuple[float, float]:
        """The pixel of a z."""
        x, y = self._axes.transform(z[list(self.dims)])
        return x, self.size - y
