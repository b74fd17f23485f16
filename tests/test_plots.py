import dataclasses
import io
import math

import numpy as np
import pytest
import torch

from pyro_vae import LogMarginal
from pyro_vae.lab import plots


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def result(khat=True, **changes):
    torch.manual_seed(0)
    fields = {
        "values": torch.randn(200) - 90,
        "std_error": torch.rand(200) / 10,
        "method": "importance_sampling",
        "bound": "lower",
        "settings": {"num_samples": 100, "data": "toy test", "data_checksum": "a", "effort": ""},
        "diagnostics": {"ess": torch.ones(200), **({"khat": torch.rand(200)} if khat else {})},
    }
    return LogMarginal(**(fields | changes))


def test_sandwich_shows_every_method_over_samples_and_data():
    curve = {10: torch.full((200,), -92.0), 100: torch.full((200,), -91.0)}
    sampled = result(curve=curve)
    exact = result(values=sampled.values + 0.5, method="quadrature", bound="exact")
    simulated = result(is_simulated=True, method="bidirectional")
    results = {"importance_sampling": sampled, "quadrature": exact, "bidirectional": simulated}
    over_k, per_datum = plots.sandwich(results).axes
    np.testing.assert_allclose(over_k.lines[0].get_xydata(), [[10, -92], [100, -91]])
    assert over_k.lines[1].get_ydata()[0] == pytest.approx(exact.mean)
    assert len(over_k.lines) == len(per_datum.lines) == 2
    np.testing.assert_allclose(per_datum.lines[0].get_ydata(), -0.5, rtol=1e-4)
    unconverged = dataclasses.replace(exact, std_error=torch.full((200,), math.inf))
    plots.sandwich({"quadrature": unconverged}).savefig(io.BytesIO())


def test_certificate_shows_the_gap_of_every_datum():
    bounds = result(diagnostics={"upper": result().values + torch.linspace(0.1, 0.3, 200)})
    (axes,) = plots.certificate(bounds).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.linspace(0.1, 0.3, 200), atol=1e-4)
    with pytest.raises(ValueError, match="no upper bounds"):
        plots.certificate(result())


def test_learning_curves_show_what_was_measured():
    elbos = [{"train/elbo": -50 - 900 / e, "valid/elbo": -60.0} for e in range(1, 40)]
    history = [{"epoch": e, "samples": 100 * e, **row} for e, row in enumerate(elbos, 1)]
    history.append({"epoch": 39, "samples": 3900, "test/elbo": -61.0})
    figure = plots.learning_curves(history)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"train", "valid", "test"}
    np.testing.assert_allclose(lines["train"].get_xdata(), 100 * np.arange(1, 40))
    np.testing.assert_allclose(lines["test"].get_ydata(), [-61.0])
    assert axes.get_ylim()[0] > -900
    assert png(figure)


def test_image_grids_put_images_side_by_side():
    x = torch.arange(12.0).reshape(3, 4) / 12
    figure = plots.image_grid([x, x.flip(0)], (2, 2), ["one", "two"])
    first, second = (axes.images[0].get_array() for axes in figure.axes)
    assert first.shape == (2, 6)
    np.testing.assert_allclose(first[:, 2:4], x[1].reshape(2, 2))
    np.testing.assert_allclose(second[:, :2], x[2].reshape(2, 2))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    assert png(plots.image_grid([torch.rand(3, 12)], (2, 2, 3)))
    for _ in range(20):  # rows of different lengths; beartype looks at one item of a sequence, by chance
        assert len(plots.image_grid([x, x[:2]], (2, 2)).axes) == 2
    assert figure.axes[0].images[0].get_cmap().name == "gray_r"
    assert plots.image_grid([1 - x / 4], (2, 2)).axes[0].images[0].get_cmap().name == "gray"
    with pytest.raises(ValueError, match="no images"):
        plots.image_grid([x], (4,))
    assert plots.is_image((8, 9, 1))
    assert not plots.is_image((3, 8, 9))


def test_the_manifold_is_even_in_probability():
    seen = []

    def decode(z):
        seen.append(z)
        return torch.cat([z, z], -1)

    figure = plots.manifold(decode, (2, 2), size=5)
    (z,) = seen
    probability = torch.special.ndtr(z)
    assert z.shape == (25, 2)
    # down the first axis z_1 falls, along the second z_2 rises
    torch.testing.assert_close(probability[::5, 0], torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]))
    torch.testing.assert_close(probability[:5, 1], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert figure.axes[0].images[0].get_array().shape == (10, 10)


def test_scatter_colours_by_class():
    figure = plots.scatter(torch.randn(50, 2), torch.arange(50) % 10)
    assert len(figure.axes[0].get_legend().legend_handles) == 10
    assert png(plots.scatter(torch.randn(50, 2)))


def test_histogram_shows_the_mean_and_both_errors():
    estimate = result()
    figure = plots.log_marginal(estimate)
    (axes,) = figure.axes
    assert sum(patch.get_height() for patch in axes.patches[:-1]) == 200
    assert axes.lines[0].get_xdata()[0] == pytest.approx(estimate.mean)
    both = math.hypot(estimate.monte_carlo_error, estimate.data_error)
    assert axes.patches[-1].get_x() == pytest.approx(estimate.mean - both)
    assert "Monte Carlo" in axes.get_legend().texts[0].get_text()
    assert axes.get_title() == "toy test"
    assert png(figure)


def test_khat_shows_the_limits():
    figure = plots.khat(result())
    (axes,) = figure.axes
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 0.7]
    assert len(axes.collections[0].get_offsets()) == 200
    assert png(figure)
    figure = plots.khat(result(diagnostics={"khat": torch.full((200,), math.inf)}))
    assert "100.0 %" in figure.axes[0].get_title()
    assert png(figure)
    with pytest.raises(ValueError, match="no k-hat"):
        plots.khat(result(khat=False))
