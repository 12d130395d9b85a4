"""Parts of a flat graph that repeat, as the rounds of a loop do, found in time that is linear in its nodes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx

GRAM = 12  # operations in a row that tell a place in a round
SHORTEST = 16  # operations in a round
FEWEST = 8  # rounds
TRIES = 4  # lengths of rounds that are tried
EXTRA = 16  # operations between those of a round, at most
LEAST = 0.1  # operations in rounds of one kind, in those of the largest kind
_PRIME, _BASE = (1 << 61) - 1, 0x1F3D5B79A


class Repeat(NamedTuple):
    """Rounds of one kind: for each the places of its operations in a graph, in order; a few may lie between them."""

    rounds: tuple[tuple[int, ...], ...]

    @property
    def covered(self) -> int:
        """How many operations are in some round."""
        return sum(map(len, self.rounds))


def repeats(nodes: Sequence[fx.Node]) -> list[Repeat]:
    """Return rounds that no two share an operation, the kind that covers most first.

    Two operations are alike if they differ in the nodes among their arguments only.
    """
    labels = _labels(nodes)
    found: list[Repeat] = []
    while True:
        best = max((_rounds(labels, length) for length in _lengths(labels)), key=lambda one: one.covered, default=None)
        if best is None or not best.rounds or (found and best.covered < LEAST * found[0].covered):
            return found
        found.append(best)
        for places in best.rounds:
            for place in places:
                labels[place] = -1 - place  # like no other


def _labels(nodes: Sequence[fx.Node]) -> list[int]:
    known: dict[Any, int] = {}
    return [known.setdefault(_kind(node), len(known)) for node in nodes]


def _kind(node: fx.Node) -> Any:
    value = node.meta.get("val")
    like = (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None
    return node.target, _form(node.args), _form(tuple(node.kwargs.items())), like


def _form(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return type(value), value


def _lengths(labels: list[int]) -> Iterator[int]:
    """Yield distances at which the same operations come again, the most frequent ones first."""
    last: dict[tuple[int, ...], int] = {}
    distances: Counter[int] = Counter()
    for place in range(len(labels) - GRAM):
        gram = tuple(labels[place : place + GRAM])
        if gram in last:
            distances[place - last[gram]] += 1
        last[gram] = place
    often = (one for one, count in distances.most_common(4 * TRIES) if one >= SHORTEST and count >= one * (FEWEST - 1))
    yield from [*often][:TRIES]


def _rounds(labels: list[int], length: int) -> Repeat:
    """Return the rounds of one length that come most often; those that a few other operations interrupt are counted."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    windows = [*_windows(labels, length)]
    for place, value in enumerate(windows):
        starts = places[value]
        if not starts or place - starts[-1] >= length:
            starts.append(place)
    starts = max(places.values(), key=len, default=[])
    if len(starts) < FEWEST:
        return Repeat(())
    begins = starts[0] + _interrupted(labels, starts, length)  # where a round is interrupted, the next one begins
    body = labels[begins : begins + length]
    whole = [place for place in places[windows[begins]] if labels[place : place + length] == body]
    rounds: list[tuple[int, ...]] = []
    for start, stop in zip(whole, [*whole[1:], len(labels)], strict=True):
        rounds.append(tuple(range(start, start + length)))
        while (more := _with_gaps(labels, body, rounds[-1][-1] + 1, stop)) is not None:
            rounds.append(more)
    return Repeat(tuple(rounds))


def _interrupted(labels: list[int], starts: list[int], length: int) -> int:
    """Return how far rounds go on after a whole one until something else comes between, at the first such place."""
    for start, following in pairwise(starts):
        if length < following - start - length <= length + EXTRA:
            body, rest = labels[start : start + length], labels[start + length : start + 2 * length]
            return next(number for number, pair in enumerate(zip(body, rest, strict=True)) if pair[0] != pair[1])
    return 0


def _with_gaps(labels: list[int], body: list[int], first: int, stop: int) -> tuple[int, ...] | None:
    """Return the places of a round from ``first`` on, with few others between them, if there is one before ``stop``."""
    places: list[int] = []
    for place in range(first, min(stop, first + len(body) + EXTRA)):
        if labels[place] == body[len(places)]:
            places.append(place)
            if len(places) == len(body):
                return tuple(places)
    return None


def _windows(labels: list[int], length: int) -> Iterator[int]:
    """Yield a number for each window, equal where the windows are (and hardly anywhere else)."""
    power, value = pow(_BASE, length, _PRIME), 0
    for place, label in enumerate(labels):
        value = (value * _BASE + label + 7) % _PRIME
        if place >= length:
            value = (value - power * (labels[place - length] + 7)) % _PRIME
        if place >= length - 1:
            yield value
