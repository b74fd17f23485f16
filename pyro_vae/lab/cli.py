"""The commands ``pyro-vae train | estimate | plot | sweep | explore``, and manners that all programs share.

``python -m pyro_vae`` is the same, and so are the scripts of these names. Errors that a user can mend end a
program with one line, not with a stack trace.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.errors import UserError, unknown

INTERRUPTED = 130  # as a shell reports it
COMMANDS = {  # where each is: a module with the dataclass Arguments and the functions parse and main
    "train": "pyro_vae.lab.commands.train",
    "estimate": "pyro_vae.lab.commands.estimate",
    "plot": "pyro_vae.lab.commands.plot",
    "sweep": "pyro_vae.lab.commands.sweep",
    "explore": "pyro_vae.lab.commands.explore",
}


def main(command: str | None = None) -> None:
    """Run a command of the laboratory, by default the one that the command line names first."""
    run(lambda: _main(command))


def _main(command: str | None) -> None:
    arguments = sys.argv[1:]
    if command is None:
        if not arguments or arguments[0].startswith("-"):
            _outer(arguments)
            return
        command, *arguments = arguments
    if command not in COMMANDS:
        raise UserError(unknown("command", command, COMMANDS))
    module = importlib.import_module(COMMANDS[command])
    module.main(module.parse(arguments, program(command)))


def _outer(words: Sequence[str]) -> None:
    """Answer ``--help``, ``--version`` and requests for shell completion."""
    modules = {name: importlib.import_module(module) for name, module in COMMANDS.items()}
    if "--version" in words:
        from importlib.metadata import version

        print(f"pyro_vae {version('pyro_vae')}")
    elif words and words[0].startswith("--tyro-"):  # shell completion
        import tyro

        kinds = {name: module.Arguments for name, module in modules.items()}
        tyro.extras.subcommand_cli_from_dict(kinds, prog=program(), args=list(words))
    elif set(words) <= {"-h", "--help"}:
        print(f"usage: {program()} COMMAND ...\n")
        for name, module in modules.items():
            print(f"  {name:10}{module.Arguments.__doc__.splitlines()[0]}")
        print(f"\n{program()} COMMAND --help lists all settings of a command;")
        print("--tyro-print-completion bash (or zsh) prints what lets a shell complete them.")
    else:
        raise UserError(unknown("option", words[0], ("--help", "--version", "--tyro-print-completion")))


def program(command: str | None = None) -> str:
    """The words by which this program, or a command of it, was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        words = ["python -m pyro_vae"]
    elif called.suffix == ".py":
        return f"python {called}"  # a script is one command
    else:
        words = [called.name]
    return " ".join([*words, command] if command else words)


def exit_interrupted(advice: str) -> None:
    """End the process after Ctrl-C, and say how to go on."""
    print(f"\n{advice}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def run(main: Callable[[], Any]) -> None:
    """Call ``main``; end the process with one line on standard error if a user can mend what is wrong.

    A termination signal is treated like Ctrl-C, so that ``main`` can say how to go on.
    """
    if _machine_is_busy():
        # Threads that wait by spinning make a lone run up to 1.6 times faster, and two runs on one machine
        # several times slower each.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _machine_is_busy() -> bool:
    """True if others have kept more than half of the processors busy during the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
