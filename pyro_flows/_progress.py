"""What a long call is doing, on one line that moves: in a terminal, in a notebook, or once at the end in a file."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

EVERY = 0.1  # seconds between two lines in a terminal,
EVERY_IN_NOTEBOOK = 0.5  # and in a notebook, where each is a message
UNTOLD = 1e9  # nats
SIGNS = "|/-\\"


def in_nats(elbo: float) -> str:
    """Return an ELBO for a line; nothing for one that a few draws beyond all mass have made.

    >>> in_nats(-3.456), in_nats(-1.2e22)
    ('ELBO -3.46, ', '')
    """
    return f"ELBO {elbo:.2f}, " if abs(elbo) < UNTOLD else ""


class Bar:
    """One line: the task, what it is at, figures, and the seconds so far. None to come, which nobody knows.

    In a terminal the line is written over and over on stderr; in a notebook it is one output that is updated, so that
    one line is left in a saved notebook too; anywhere else only the last line is written.

    Args:
        task: what begins the line.
        visible: whether anything is shown.
    """

    def __init__(self, task: str, visible: bool) -> None:
        self.task, self.stage, self.figures = task, "", ""
        self.began, self._drawn, self._turns, self._width = time.monotonic(), -1e9, 0, 0
        self._display = _display() if visible else None
        self._terminal = visible and self._display is None and _is_terminal()
        self._visible = visible
        self._handle: Any = None
        self._closed = False

    def watch(self, stage: str | None) -> None:
        """Name what is being done now, or say with None that it goes on."""
        if stage is not None and stage != self.stage:
            self.stage, self.figures = stage, ""
            self._draw()
        elif self._terminal or self._display is not None:
            every = EVERY if self._terminal else EVERY_IN_NOTEBOOK
            if time.monotonic() - self._drawn >= every:
                self._draw()

    def show(self, figures: str) -> None:
        """Show how far it has come."""
        self.figures = figures
        self.watch(None)

    def close(self, outcome: str) -> None:
        """Leave one last line; further calls do nothing."""
        if self._closed or not self._visible:
            return
        self._closed = True
        line = f"{self.task}: {outcome}, {time.monotonic() - self.began:.1f} s"
        if self._display is not None:
            self._publish(line)
        elif self._terminal:
            self._write(line, end="\n")
        else:
            print(line, file=sys.stderr, flush=True)

    def _draw(self) -> None:
        if self._closed or (self._display is None and not self._terminal):
            return
        self._drawn, self._turns = time.monotonic(), self._turns + 1
        parts = [self.stage, self.figures, f"{self._drawn - self.began:.1f} s"]
        line = f"{self.task}: {', '.join(filter(None, parts))} {SIGNS[self._turns % len(SIGNS)]}"
        if self._display is not None:
            self._publish(line)
        else:
            self._write(line)

    def _write(self, line: str, end: str = "") -> None:
        line = line[: shutil.get_terminal_size().columns - 1]
        print("\r" + line.ljust(self._width), end=end, file=sys.stderr, flush=True)
        self._width = len(line)

    def _publish(self, line: str) -> None:
        data = {"text/plain": line}
        if self._handle is None:
            assert self._display is not None
            self._handle = self._display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _is_terminal() -> bool:
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):
        return False


def _display() -> Callable[..., Any] | None:
    """Return the notebook's function for outputs, None outside of notebooks."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    found: Callable[..., Any] = importlib.import_module("IPython.display").display
    return found
