"""The progress bar of everything that takes long: time left and the numbers that matter."""

import contextlib
import sys
import weakref
from collections.abc import Iterator

from tqdm import tqdm

_bars: "weakref.WeakSet[tqdm]" = weakref.WeakSet()
_COMPILING = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, compiling]"


def progress_bar(total: int | None, description: str, unit: str, *, show: bool = True) -> tqdm:
    """A bar on standard error; where that is a file, a line every half minute.

    Args:
        total: Units of work; None if nobody knows.
        description: What is done.
        unit: Of work.
        show: Whether to show it.
    """
    from pyro_vae.compiled import function

    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    bar = tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        mininterval=0.1 if live else 30,
        dynamic_ncols=live,
        smoothing=0.05,
    )
    if show:
        _bars.add(bar)
        function.while_compiling = compiling
    return bar


def counted(bar: tqdm, count: int) -> Iterator[int]:
    """Numbers 0 to ``count`` - 1; the bar advances when the next is asked for."""
    for number in range(count):
        yield number
        bar.update()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Bars say so meanwhile, instead of how long a step takes; and do not take the seconds for a step's."""
    started = {bar: bar._time() for bar in _bars if not bar.disable}
    formats = {bar: bar.bar_format for bar in started}
    for bar in started:
        bar.bar_format = _COMPILING
        bar.refresh()
    try:
        yield
    finally:
        for bar, then in started.items():
            bar.bar_format = formats[bar]
            bar.last_print_t += bar._time() - then
