"""How a command ends: exit codes, errors in one line, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from pyro_flows._fallbacks import first_line

DONE, ERROR, UNRELIABLE, INTERRUPTED = 0, 2, 3, 130  # exit codes; 130 is what shells give to Ctrl-C


def guarded(work: Callable[[], int], debug: bool, file: Path | None = None) -> None:
    """Run, and exit with the code that comes back; turn any error into one line, unless a traceback is asked for.

    Args:
        work: returns the exit code.
        debug: whether a traceback is shown.
        file: the user's Python file; an error that was raised below it is shown with its kind and line.
    """
    try:
        code = work()
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        typer.echo("pyro-flows: interrupted; no complete results were written.", err=True)
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        error = _own(error, file)
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else "no message"
        if text.endswith(":") and len(lines) > 1:  # torch writes the values that it means into the next line
            text = f"{text} {lines[1].strip()}"
        line = _line(error, file)
        plain = isinstance(error, ValueError) and not line
        kind = "" if plain else f"{type(error).__name__}: "
        hint = "" if plain else f"{line} (--debug shows the traceback)"
        typer.echo(f"pyro-flows: error: {kind}{text}{hint}", err=True)
        code = ERROR
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


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    seen: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note Ctrl-C, which raises ``KeyboardInterrupt`` as always: a fit may catch it and return what it has."""
    found = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler

    def note(number: int, frame: FrameType | None) -> None:
        found.seen = True
        signal.default_int_handler(number, frame)

    if before is not signal.default_int_handler or not main:  # someone else handles it, or nobody is to
        yield found
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
