"""How a command ends: exit codes, errors in one line, and signals."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from pyro_flows._fallbacks import Tried, first_line
from pyro_flows._interrupts import STATE, Interrupts, interruptible

DONE, ERROR, UNRELIABLE, INTERRUPTED = 0, 2, 3, 130  # exit codes; 130 is what shells give to Ctrl-C


@dataclass
class Ending:
    """What a command that is ended at once has come to."""

    interrupts: Interrupts  # the signals that came
    left: str = "no complete results were written"  # what is there, in words

    def say(self, text: str) -> None:
        """Print a line. After a signal the terminal may be gone, which is no reason not to go on."""
        try:
            typer.echo(text)
        except OSError:
            if not self.interrupts.came():
                raise


def guarded(work: Callable[[Ending], int], debug: bool, file: Path | None = None) -> None:
    """Run, and exit with the code that comes back; turn any error into one line, unless a traceback is asked for by
    ``debug``.

    Ctrl-C, SIGTERM and SIGHUP end the work as :func:`~pyro_flows.fit` says. An error that was raised below the user's
    Python file is shown with its kind and line.
    """
    ending = Ending(STATE)
    code = ERROR
    try:
        with Tried(lambda error: not debug) as tried, interruptible():
            code = work(ending)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        with suppress(OSError):
            typer.echo(f"pyro-flows: interrupted; {ending.left}.", err=True)
        code = INTERRUPTED
    if tried.error is not None:
        error = _own(tried.error, file)
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else "no message"
        if text.endswith(":") and len(lines) > 1:  # torch writes the values that it means into the next line
            text = f"{text} {lines[1].strip()}"
        line = _line(error, file)
        plain = isinstance(error, ValueError) and not line
        kind = "" if plain else f"{type(error).__name__}: "
        hint = "" if plain else f"{line} (--debug shows the traceback)"
        typer.echo(f"pyro-flows: error: {kind}{text}{hint}", err=True)
    raise typer.Exit(code)


def _own(error: Exception, file: Path | None) -> Exception:
    """The error of the user's file that an error was raised from, if it quotes that one; otherwise the error itself."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or first_line(cause) not in str(error) or _line(error, file):
        return error
    own = _own(cause, file)
    return own if _line(own, file) else error


def _line(error: Exception, file: Path | None) -> str:
    """The last line of the user's file that the error passed through, if any."""
    if file is None:
        return ""
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file.absolute()]
    return f" ({file.name}, line {passed[-1].lineno})" if passed else ""
