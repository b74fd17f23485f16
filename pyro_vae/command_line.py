"""What all scripts share: errors in one line instead of a stack trace."""

import signal
import sys
from collections.abc import Callable

from pyro_vae.errors import UserError

INTERRUPTED = 130  # as a shell reports it


def run(main: Callable[[], None]) -> None:
    """Call ``main``; end the process with one line on standard error if a user can mend what is wrong.

    A termination signal is treated like Ctrl-C, so that ``main`` can say how to go on.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
