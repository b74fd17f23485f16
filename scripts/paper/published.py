"""Values of figures 2 and 3 of Kingma & Welling, *Auto-Encoding Variational Bayes*, arXiv 1312.6114.

Digitised from the vector graphics of the paper's PDF, the axes calibrated on their tick marks, interpolated
in the logarithm of the number of samples. Lines jitter by about 0.3 nats on MNIST. Values are nats per datum:
the lower bound in figure 2, log p(x) in figure 3; None where the figure shows nothing.
"""

Curve = list[tuple[float, float]]  # (training samples, value)

_MNIST_SAMPLES = (1e6, 2e6, 5e6, 1e7, 2e7, 5e7, 1e8, 2e8)
_FREY_SAMPLES = (1e5, 1e6, 2e6, 5e6, 1e7, 2e7, 5e7, 1e8)
_FIGURE_3_SAMPLES = (1e6, 2e6, 5e6, 1e7, 2e7, 3e7, 4e7, 5e7, 6e7)

# (data, latent dimensions, algorithm, split) -> values
_FIGURE_2: dict[tuple[str, int, str, str], tuple[float, ...]] = {
    ("mnist", 3, "aevb", "train"): (-155.3, -147.4, -141.9, -138.3, -135.3, -132.2, -130.3, -128.4),
    ("mnist", 3, "aevb", "test"): (-152.9, -146.2, -141.2, -138.0, -135.8, -134.0, -133.4, -133.4),
    ("mnist", 3, "wake_sleep", "train"): (-157.1, -152.2, -148.1, -146.1, -144.4, -141.7, -140.2, -139.0),
    ("mnist", 3, "wake_sleep", "test"): (-155.1, -150.7, -147.0, -144.8, -142.9, -140.5, -138.9, -137.7),
    ("mnist", 5, "aevb", "train"): (-141.0, -133.0, -126.8, -123.7, -121.1, -118.3, -116.5, -114.8),
    ("mnist", 5, "aevb", "test"): (-138.9, -132.1, -126.6, -124.1, -122.0, -120.1, -119.1, -118.8),
    ("mnist", 5, "wake_sleep", "train"): (-145.9, -136.7, -131.0, -128.1, -125.9, -123.6, -122.2, -121.0),
    ("mnist", 5, "wake_sleep", "test"): (-142.5, -134.8, -129.7, -127.2, -125.1, -123.1, -121.9, -121.0),
    ("mnist", 10, "aevb", "train"): (-129.6, -120.4, -111.7, -107.7, -104.9, -102.2, -100.7, -99.4),
    ("mnist", 10, "aevb", "test"): (-128.3, -119.6, -111.9, -108.5, -106.2, -104.5, -103.7, -103.3),
    ("mnist", 10, "wake_sleep", "train"): (-137.3, -126.8, -117.9, -113.7, -111.1, -108.4, -106.9, -106.0),
    ("mnist", 10, "wake_sleep", "test"): (-134.9, -125.7, -117.4, -113.5, -110.9, -108.6, -107.6, -106.5),
    ("mnist", 20, "aevb", "train"): (-126.3, -116.7, -108.1, -104.2, -101.7, -99.4, -98.2, -97.3),
    ("mnist", 20, "aevb", "test"): (-124.2, -115.9, -108.3, -104.8, -102.7, -101.0, -100.2, -99.6),
    ("mnist", 20, "wake_sleep", "train"): (-134.2, -121.1, -111.8, -108.3, -106.3, -105.0, -104.1, -103.5),
    ("mnist", 20, "wake_sleep", "test"): (-130.8, -120.0, -111.6, -108.3, -106.6, -105.4, -104.6, -104.1),
    ("mnist", 200, "aevb", "train"): (-121.8, -111.8, -105.9, -103.4, -101.4, -99.6, -98.4, -97.6),
    ("mnist", 200, "aevb", "test"): (-119.9, -111.6, -106.3, -103.9, -102.3, -100.9, -100.3, -99.6),
    ("mnist", 200, "wake_sleep", "train"): (-133.5, -119.4, -112.3, -109.0, -107.0, -105.0, -104.0, -103.1),
    ("mnist", 200, "wake_sleep", "test"): (-130.8, -118.8, -112.0, -109.1, -107.1, -105.5, -104.6, -103.8),
    ("frey_face", 2, "aevb", "train"): (239, 664, 693, 806, 835, 863, 900, 935),
    ("frey_face", 2, "aevb", "test"): (378, 673, 707, 801, 823, 845, 866, 872),
    ("frey_face", 5, "aevb", "train"): (239, 729, 867, 1000, 1076, 1130, 1190, 1233),
    ("frey_face", 5, "aevb", "test"): (390, 761, 890, 988, 1044, 1079, 1105, 1115),
    ("frey_face", 10, "aevb", "train"): (243, 758, 900, 1046, 1217, 1322, 1413, 1463),
    ("frey_face", 10, "aevb", "test"): (407, 792, 909, 1039, 1171, 1257, 1301, 1307),
    ("frey_face", 20, "aevb", "train"): (235, 715, 878, 1104, 1255, 1335, 1428, 1488),
    ("frey_face", 20, "aevb", "test"): (384, 754, 895, 1083, 1200, 1262, 1304, 1312),
}
# Wake-sleep stays where it ignores z on Frey Face: one curve for all numbers of latents.
_FREY_WAKE_SLEEP = {
    "train": (190, 577, 578, 578, 578, 578, 578, 579),
    "test": (388, 568, 568, 569, 569, 569, 569, 569),
}

# (training data, algorithm, split) -> values
_FIGURE_3: dict[tuple[int, str, str], tuple[float | None, ...]] = {
    (1000, "aevb", "train"): (-129.1, -123.3, -118.0, -114.4, -111.6, -110.3, -109.7, -109.3, -109.1),
    (1000, "aevb", "test"): (-147.2, -144.7, -143.2, -142.9, -142.9, -143.0, -143.2, -143.2, -143.2),
    (1000, "mcem", "train"): (-139.3, -131.5, -123.6, -118.3, -113.6, -111.5, -110.5, -109.7, -109.2),
    (1000, "mcem", "test"): (-152.3, -147.8, -143.9, -142.4, -141.9, -141.5, -141.4, -141.6, -141.6),
    (1000, "wake_sleep", "train"): (None, -135.8, -130.0, -128.3, -128.2, -127.0, -126.3, -126.1, -125.5),
    (1000, "wake_sleep", "test"): (None, -149.7, -147.6, -146.6, -146.3, -146.3, -146.0, -145.4, -144.8),
    (50000, "aevb", "train"): (None, None, -137.7, -135.5, -133.6, -132.4, -131.8, -131.4, -131.1),
    (50000, "aevb", "test"): (None, None, -144.0, -142.3, -140.8, -139.7, -139.1, -138.4, -138.2),
    (50000, "wake_sleep", "train"): (None, -149.4, -144.4, -140.7, -138.8, -137.4, -137.2, -137.3, -137.1),
    (50000, "wake_sleep", "test"): (None, -148.5, -146.2, -143.2, -141.7, -140.4, -140.4, -140.7, -140.8),
    (50000, "mcem", "train"): (None, None, None, None, None, -164.1, -157.7, -152.7, -148.8),
    (50000, "mcem", "test"): (None, None, None, None, None, -165.6, -159.9, -154.5, -150.4),
}


def figure2(data: str, latent_dim: int, algorithm: str, split: str) -> Curve:
    """Return a curve of figure 2; empty if the figure shows none."""
    if data == "mnist":
        return _curve(_MNIST_SAMPLES, _FIGURE_2.get((data, latent_dim, algorithm, split), ()))
    if algorithm == "wake_sleep":
        return _curve(_FREY_SAMPLES, _FREY_WAKE_SLEEP[split])
    return _curve(_FREY_SAMPLES, _FIGURE_2.get((data, latent_dim, algorithm, split), ()))


def figure3(num_train: int, algorithm: str, split: str) -> Curve:
    """Return a curve of figure 3."""
    return _curve(_FIGURE_3_SAMPLES, _FIGURE_3.get((num_train, algorithm, split), ()))


def _curve(samples: tuple[float, ...], values: tuple[float | None, ...]) -> Curve:
    return [(x, value) for x, value in zip(samples, values, strict=False) if value is not None]
