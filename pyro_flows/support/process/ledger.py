"""What a fit spent, by part: seconds of the processor and gradients; what its searches found, and what it accepted."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

Parts = tuple[str, ...]


class Ledger:
    """The account of a fit. Parts stand inside of each other; what is spent counts once, for all that are open."""

    def __init__(self) -> None:
        self.seconds: dict[Parts, float] = {}  # of the processor, by the parts that were open, the outermost first
        self.gradients: Counter[Parts] = Counter()  # of the log density, likewise
        self.found: Counter[str] = Counter()  # how many regions that a candidate lacks each search has found
        self.accepted: list[str] = []  # the tests that a candidate has passed, in their order
        self.said: dict[str, object] = {}  # at the end: ``method``, ``status``, ``steps``
        self.open: Parts = ()
        self._since = used_seconds()

    def book(self, now_open: Parts) -> Parts:
        """Count the seconds since the last call for the parts open until now; return these."""
        before, since = self.open, self._since
        self.open, self._since = now_open, used_seconds()
        self.seconds[before] = self.seconds.get(before, 0.0) + self._since - since
        return before

    def as_json(self) -> str:
        """Return all of it as one line of JSON, with parts by the names of the innermost."""
        spent: dict[str, list[float]] = {}
        columns: tuple[Mapping[Parts, float], ...] = (self.seconds, self.gradients)
        for column, counts in enumerate(columns):
            for parts, count in counts.items():
                spent.setdefault(parts[-1] if parts else "other", [0, 0])[column] += count
        spent = {part: [round(seconds, 2), gradients] for part, (seconds, gradients) in spent.items()}
        return json.dumps({**self.said, "accepted": self.accepted, "found": self.found, "spent": spent})


_kept: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Keep a ledger of all calls inside.

    >>> with ledger() as kept, counted("finding starting points"), counted("tracing"):
    ...     booked(64)
    >>> kept.gradients
    Counter({('finding starting points', 'tracing'): 64})
    """
    kept = Ledger()
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        kept.book(())
        _kept.reset(token)


@contextmanager
def counted(part: str) -> Iterator[None]:
    """Count what is spent inside under this name, if a ledger is kept."""
    kept = _kept.get()
    if kept is None:
        yield
        return
    before = kept.book((*kept.open, part))
    try:
        yield
    finally:
        kept.book(before)


def booked(gradients: int, parts: Parts | None = None) -> None:
    """Count gradients for the parts that are open, or for others."""
    kept = _kept.get()
    if kept is not None:
        kept.gradients[kept.open if parts is None else parts] += gradients


def gradients() -> Counter[Parts]:
    """Return the gradients that were counted so far."""
    kept = _kept.get()
    return Counter() if kept is None else Counter(kept.gradients)


def found(search: str, regions: int) -> None:
    """Note how many regions a search has found that a candidate lacks."""
    kept = _kept.get()
    if kept is not None and regions:
        kept.found[search] += regions


def accepted(test: str) -> None:
    """Note a test that a candidate has passed, so that nothing else is tried in its place."""
    kept = _kept.get()
    if kept is not None:
        kept.accepted.append(test)


def said(**values: object) -> None:
    """Note what is known at the end."""
    kept = _kept.get()
    if kept is not None:
        kept.said.update(values)


def used_seconds() -> float:
    """Return the seconds that processors have spent on this process and on children of it that ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system
