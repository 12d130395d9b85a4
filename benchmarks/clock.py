"""A stopwatch for the wall and for the processor; it needs nothing but Python, so that any interpreter can use it."""

from __future__ import annotations

import resource
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
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.monotonic(), sum(part.ru_utime + part.ru_stime for part in used)
