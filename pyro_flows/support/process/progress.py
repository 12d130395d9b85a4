"""What a long call is doing: one line that moves, in a terminal or a notebook; a line for each stage in a file."""

from __future__ import annotations

import importlib
import operator
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from pyro_flows.support.process.interrupts import undisturbed

EVERY = {"terminal": 0.1, "notebook": 0.5, "file": 10.0}  # seconds between two lines of one stage, at least,
BEAT = {"terminal": 1.0, "file": 10.0}  # and at most; in a notebook, outputs of other threads may go astray
DELAY = 2.0  # seconds before a quick call is shown
UNTOLD = 1e9  # nats
SIGNS = "|/-\\"


def in_nats(elbo: float) -> str:
    """Return an ELBO for a line; nothing for one that a few draws beyond all mass have made.

    >>> in_nats(-3.456), in_nats(-1.2e22)
    ('ELBO -3.46, ', '')
    """
    return f"ELBO {elbo:.2f}, " if abs(elbo) < UNTOLD else ""


class Bar:
    """One line: the task, its stage, how many of how many are done, figures, and the seconds so far.

    In a terminal the line is written over and over on stderr. In a notebook it is one output that is updated, so that
    one line is left in a saved notebook too. Anywhere else, such as in a log, each stage is a line on stderr as it
    begins; a stage of more than ten seconds has one more every ten seconds, and the end has one.

    As a context it keeps the line moving while nothing is reported, and says at the end what error there was.

    Args:
        task: what begins the line.
        visible: whether anything is shown.
        quick: whether it takes less than two seconds as a rule: nothing is shown before these are over.

    >>> with Bar("fit", visible=False) as bar:
    ...     bar.watch("training")
    ...     bar.count(3, 8)
    >>> bar.stage, bar.done
    ('training', '3 of 8')
    """

    def __init__(self, task: str, visible: bool, *, quick: bool = False) -> None:
        self.task, self.stage, self.figures, self.done = task, "", "", ""
        self.began, self._turns, self._width = time.monotonic(), 0, 0
        self._display = _display() if visible else None
        self._place = "notebook" if self._display is not None else "terminal" if _is_terminal() else "file"
        self._visible, self._shown_from = visible, self.began + (DELAY if quick else 0.0)
        self._drawn = self._shown_from - (BEAT.get(self._place, 0.0) if quick else 0.0)
        self._first: tuple[int, float] | None = None  # count and time, from which the time left is estimated
        self._update: Callable[..., object] | None = None  # of what a notebook shows
        self._over, self._writing = threading.Event(), threading.Lock()

    def __enter__(self) -> Self:
        if self._visible and self._place in BEAT:
            threading.Thread(target=self._beat, name="pyro_flows progress", daemon=True).start()
        return self

    @undisturbed
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close(f"ended by {kind.__name__}")
        self._over.set()

    def watch(self, stage: str | None) -> None:
        """Name what is being done now, or say with None that it goes on."""
        if stage is not None and stage != self.stage:
            self.stage, self.figures = stage, ""
            self._draw()
        elif self._visible and time.monotonic() - self._drawn >= EVERY[self._place]:
            self._draw()

    def show(self, figures: str) -> None:
        """Show how far the stage has come."""
        self.figures = figures
        self.watch(None)

    def count(self, done: int, of: int) -> None:
        """Show how many parts of the task are done, and about how long the others will take, as those since the first
        call have."""
        now = time.monotonic()
        first, since = self._first = self._first or (done, now)
        left = (of - done) * (now - since) / (done - first) if done > first else 0.0
        self.done = f"{done} of {of}" + (f", about {_duration(left)} left" if left > 0.0 else "")
        self.watch(None)

    def close(self, outcome: str) -> None:
        """Leave one last line; further calls do nothing."""
        if self._over.is_set():
            return
        self._over.set()
        now = time.monotonic()
        if self._visible and now >= self._shown_from:
            self._write(f"{self.task}: {outcome}, {now - self.began:.1f} s", last=True)

    def _beat(self) -> None:
        """Draw the line while nothing else does."""
        every = BEAT[self._place]
        while not self._over.wait(max(self._drawn + every - time.monotonic(), 0.0)):
            if time.monotonic() - self._drawn >= every:
                self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if not self._visible or self._over.is_set() or now < self._shown_from:
            return
        self._drawn, self._turns = now, self._turns + 1
        if not (self.stage or self.done):
            return
        parts = [self.stage, self.done, self.figures, f"{now - self.began:.1f} s"]
        self._write(f"{self.task}: {', '.join(filter(None, parts))}")

    def _write(self, line: str, last: bool = False) -> None:
        with self._writing:
            if self._over.is_set() and not last:
                return
            if self._place == "file":
                _print(line, "\n")
                return
            line += "" if last else f" {SIGNS[self._turns % len(SIGNS)]}"
            if self._display is not None:
                data = {"text/plain": line}
                if self._update is None:
                    self._update = operator.attrgetter("update")(self._display(data, raw=True, display_id=True))
                else:
                    self._update(data, raw=True)
                return
            line = line[: shutil.get_terminal_size().columns - 1]
            _print("\r" + line.ljust(self._width), "\n" if last else "")
            self._width = len(line)


def _print(line: str, end: str) -> None:
    with suppress(OSError):  # the terminal is gone, the work goes on
        print(line, end=end, file=sys.stderr, flush=True)


def unseen(stage: str) -> None:
    """Take the place of :meth:`Bar.watch` where nothing is shown."""


def _duration(seconds: float) -> str:
    """Return a duration in two digits or so.

    >>> _duration(41.3), _duration(300), _duration(20000)
    ('41 s', '5 min', '5.6 h')
    """
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400.0 else f"{seconds / 3600:.1f} h"


def _is_terminal() -> bool:
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):
        return False


def _display() -> Callable[..., object] | None:
    """Return the notebook's function for outputs, None outside of notebooks."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return importlib.import_module("IPython.display").display
