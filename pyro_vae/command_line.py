"""What all scripts share: errors in one line instead of a stack trace, and manners on a shared machine."""

import os
import signal
import sys
import threading
from collections.abc import Callable

from pyro_vae.errors import UserError

INTERRUPTED = 130  # as a shell reports it
ENDS_WITH_INPUT = (
    "PYRO_VAE_ENDS_WITH_INPUT"  # in the environment: when standard input ends, so does the process
)


def run(main: Callable[[], None]) -> None:
    """Call ``main``; end the process with one line on standard error if a user can mend what is wrong.

    A termination signal is treated like Ctrl-C, so that ``main`` can say how to go on. So is the end of
    standard input, if the environment says so: so a process notices that the one which started it was killed.
    """
    if _machine_is_busy():
        # Threads that wait by spinning make a lone run up to 1.6 times faster, and two runs on one machine
        # several times slower each.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.environ.pop(ENDS_WITH_INPUT, None):
        threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock the end of the interpreter would wait for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _machine_is_busy() -> bool:
    """Whether others have kept more than half of the processors busy during the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
