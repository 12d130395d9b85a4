"""A stopwatch for the wall and for the processor; it needs nothing but Python, so that any interpreter can use it."""

from __future__ import annotations

import os
import time


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = self._read()

    def wall(self) -> float:
        """Return the seconds that have passed."""
        return self._read()[0] - self._wall

    def cpu(self) -> float:
        """Return the seconds that processors have spent on this process, and on children that ended: compilers."""
        return self._read()[1] - self._cpu

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), sum(os.times()[:4])
