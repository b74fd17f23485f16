"""The progress bar of everything that takes long: time left and the numbers that matter."""

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, *, show: bool = True) -> tqdm:
    """A bar on standard error; where that is a file, a line every half minute."""
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        mininterval=0.1 if live else 30,
        dynamic_ncols=live,
        smoothing=0.05,
    )
