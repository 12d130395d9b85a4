"""A function of a batch of points, recorded for the batch sizes that come again, in pieces that fit a cache."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.graph import first_result, is_pure
from pyro_flows.model.graphs.recording import Unrecordable, record
from pyro_flows.model.graphs.rounding import DIGITS, agree, moved_by
from pyro_flows.model.graphs.runner import Runner
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.numbers.tensors import ROWS_AT_LEAST, nearby, rows_for
from pyro_flows.support.process.fallbacks import Tried, fallback
from pyro_flows.support.process.journal import evaluated

RECORDED_FROM = 2  # the piece at which it is recorded: recording takes as long as ten calls, and a fit makes hundreds
A_PIECE = 2**12  # numbers that each operation might handle in the time that a call of a graph takes besides
RECORDING = 2**20  # the same for the time that it takes to record a graph of one more size
BORROWED = 100  # pieces that a graph with further results serves: one of its own takes seconds, where it is long
ROUNDED = 0.02  # of the points that a graph is checked at, that may be where the function depends on rounding
SMALL = 0.25  # of such a piece, up to which a batch goes through in small ones

Kind = tuple[int, torch.dtype, torch.device]
T = TypeVar("T")


class RecorderState(TypedDict):
    """What decides by which graphs batches go: rows of the graphs with an example, and the counts of both counters."""

    graphs: list[tuple[int, Tensor]]
    counts: list[list[tuple[int, str, str, int]]]


class Recorder:
    """Apply ``function``, which maps (S, D) to a tuple of tensors with S rows, by recorded graphs.

    A graph is for one number of rows. Batches of another size are filled up, or go through it piece by piece, until
    what this wastes would have paid for a graph of their own. Where there are cores, and pieces take long enough, some
    go through at once. A graph is checked at new points when it is recorded; where recording fails or the check does,
    the function itself is called from then on, and :attr:`reason` says why.

    Args:
        function: what to record.
        numbers: how many numbers it handles at one point.
        given: tensors that the function takes after the points: inputs of the graphs, not constants.
        unit: how many rows all pieces have, so that there is one graph; None if batches may have graphs of their own.
        large: how many rows pieces of larger batches have, if not as many.
        whole: a recorder of a function whose first results are those of this one. With a unit, its graph serves the
            first hundred pieces, and a part of it the others.
        own: whether each batch that is no larger than a piece has a graph of its own from its first call on, so that
            one point and batch size always give the same digits.
        before: what to do with points of a batch before it is recorded, such as to record what the function calls.
        changed: an object of plain values, the only one that the function changes. With it, results may come from the
            checkpoint of a call.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        numbers: int,
        given: Sequence[Tensor] = (),
        *,
        unit: int | None = None,
        large: int | None = None,
        whole: Recorder | None = None,
        own: bool = False,
        before: Callable[[Tensor], object] = lambda z: None,
        changed: object = None,
    ) -> None:
        self._changed = changed
        self._function, self.given, self.unit, self.whole = function, tuple(given), unit, whole
        self._numbers, most = max(numbers, 1), rows_for(numbers)
        self._own, self._at, self._before = own, 1 if own else RECORDED_FROM, before
        self.rows = most if unit is None else min(unit, most)
        self.large = self.rows if large is None else max(self.rows, min(large, most))
        self.reason: str | None = None
        self.runners: Cache[Kind, Runner] = Cache(8)
        self._calls: Counter[Kind] = Counter()  # with a unit, by the size of a piece; otherwise all under size 0
        self._wasted: Counter[Kind] = Counter()  # numbers, by the size of a batch that had no graph of its own
        self._examples: dict[Kind, Tensor] = {}  # a row (1, D) of the batches that graphs were recorded for

    def function(self, z: Tensor) -> tuple[Tensor, ...]:
        """Call the function itself."""
        return self._function(z, *self.given)

    def sharing(self, given: Sequence[Tensor]) -> Recorder:
        """Return a recorder with other given tensors of the same shapes, which takes and adds to the same graphs."""
        other = copy.copy(self)
        other.given = tuple(given)
        return other

    @torch.no_grad()
    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results, without a graph of autograd's."""
        if self.reason is not None:
            return tuple(self._evaluated([z], partial(self.function, z), self._changed))
        z = z.contiguous()
        rows = self._size(z)
        if len(z) == rows:
            return tuple(part.clone() for part in self._pieces([z])[0])  # not the graph's own constants
        short = -len(z) % rows
        filled = torch.cat([z, z[-1:].expand(short, -1)]) if short else z
        parts = zip(*self._pieces(filled.split(rows)), strict=True)
        return tuple(torch.cat(part)[: len(z)] for part in parts)

    def _size(self, z: Tensor) -> int:
        """Return how many rows the pieces of a batch have: those of the graph that wastes least, or its own number."""
        count = len(z)
        if self.unit is not None:
            return self.rows if count <= max(self.rows, SMALL * self.large) else self.large
        if self._own or not count:
            return min(count, self.rows)
        known = [size for size, *like in self.runners if like == [z.dtype, z.device]]
        if not known:
            least = max(ROWS_AT_LEAST, 1 << (A_PIECE // self._numbers).bit_length() >> 1, count)
            return min(1 << (least - 1).bit_length(), self.rows)

        def cost(size: int) -> int:
            return -(-count // size) * (size * self._numbers + A_PIECE)

        mine, best = min(count, self.rows), min(known, key=cost)
        kind = mine, z.dtype, z.device
        self._wasted[kind] += max(cost(best) - cost(mine), 0)
        return best if self._wasted[kind] < RECORDING else mine

    def graph(self, z: Tensor) -> fx.GraphModule | None:
        """Return the graph for batches like ``z``, to be made part of a larger one.

        None if there is none, if it changes tensors in place, or if such batches do not go through as they are.
        """
        if self.reason is not None or len(z) > self.rows or self.unit is not None:
            return None
        kind = len(z), z.dtype, z.device
        if kind not in self.runners and not self._record(z.contiguous()):
            return None
        module = self.runners[kind].module
        return module if is_pure(module) else None

    def forget(self) -> None:
        """Drop the graphs, and what is known of whether they can be recorded."""
        self.runners.clear()
        self._calls.clear()
        self._wasted.clear()
        self.reason = None

    def state(self) -> RecorderState:
        """Return what decides by which graphs batches go, so that a run may go on elsewhere to the last digit."""
        counts = [
            [(rows, str(dtype), str(device), count) for (rows, dtype, device), count in counter.items()]
            for counter in (self._calls, self._wasted)
        ]
        return {"graphs": [(kind[0], self._examples[kind]) for kind in self.runners], "counts": counts}

    def put_back(self, state: RecorderState) -> None:
        """Go on from what :meth:`state` returned: record the graphs that there were, and count on."""
        for rows, row in state["graphs"]:
            kind = rows, row.dtype, row.device
            if kind in self.runners or self._record(row.expand(rows, -1).contiguous()):
                self.runners[kind]  # the last one that was used
        for counter, counts in zip((self._calls, self._wasted), state["counts"], strict=True):
            counter.clear()
            for rows, dtype, device, count in counts:
                counter[rows, getattr(torch, dtype.removeprefix("torch.")), torch.device(device)] = count

    def _pieces(self, pieces: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the results for pieces of one size: by the function until there is a graph, then all at once."""
        found = list[tuple[Tensor, ...]]()
        while len(found) < len(pieces):
            runner, lent = self._runner(pieces[len(found)])
            if runner is None:
                piece = pieces[len(found)]
                found.append(self._evaluated([piece], partial(self.function, piece), self._changed))
                continue
            rest = pieces[len(found) :]
            results = self._evaluated(rest, partial(runner.many, [(piece, *self.given) for piece in rest]))
            found += [tuple(each[:1]) for each in results] if lent else results
        return found

    def _evaluated(self, pieces: Sequence[Tensor], compute: Callable[[], T], changed: object = None) -> T:
        return compute() if self._changed is None else evaluated(pieces, compute, changed)

    def _runner(self, z: Tensor) -> tuple[Runner | None, bool]:
        """Return the graph for such a piece, recorded if due, and whether it is the whole's, with more results."""
        kind = len(z), z.dtype, z.device
        if kind not in self.runners:
            called = kind if self.unit is not None else (0, z.dtype, z.device)
            self._calls[called] += 1
            due = self._calls[called] >= self._at
            lent = self._of_whole(z, due=due) if self._calls[called] < BORROWED else None
            if lent is not None:
                return lent, True
            if not due or not self._record(z):
                return None, False
        return self.runners[kind], False

    def _of_whole(self, z: Tensor, *, due: bool) -> Runner | None:
        """Return the graph of the whole for such batches, recorded if it is due; None if there is none."""
        if self.unit is None or self.whole is None or len(z) != self.whole.rows:
            return None
        kind = len(z), z.dtype, z.device
        if kind not in self.whole.runners and not (due and self.whole.reason is None and self.whole._record(z)):
            return None
        return self.whole.runners[kind]

    def _record(self, z: Tensor) -> bool:
        """Record for such batches; return whether the graph repeats what the function gives at new points."""
        fresh = nearby(z)
        self._before(z)
        with Tried(lambda error: not isinstance(error, torch.linalg.LinAlgError)) as tried:  # which is of these points
            whole = self._of_whole(z, due=True)
            graph = record(self._function, z, *self.given) if whole is None else first_result(whole.module)
            runner = Runner(graph)
            recorded = runner(fresh, *self.given)
        if tried.error is not None:
            known = isinstance(tried.error, Unrecordable)
            self.reason = str(tried.error) if known else fallback("not recorded", tried.error)
            return False
        if not self._repeats(recorded, fresh):
            self.reason = fallback("not recorded: the graph gave other values at new points")
            return False
        self._examples[len(z), z.dtype, z.device] = z[:1].clone()
        for gone in self.runners.put((len(z), z.dtype, z.device), runner):
            self._calls.pop(gone, None)
            self._wasted.pop(gone, None)
        return True

    def _repeats(self, recorded: tuple[Tensor, ...], z: Tensor) -> bool:
        """Whether recorded results are the function's own, but at few points where those depend on rounding as well.

        At the edge of a support, the last digit of a point makes the density finite or not.
        """
        expected = self.function(z)
        if agree(recorded, expected):
            return True

        def rows(results: tuple[Tensor, ...], number: int) -> list[Tensor]:
            return [part[number : number + 1] for part in results]

        differ = [number for number in range(len(z)) if not agree(rows(recorded, number), rows(expected, number))]
        if not 0 < len(differ) <= ROUNDED * len(z):
            return False
        moved = [self.function(moved_by(z[differ], digits)) for digits in DIGITS]
        return all(
            any(not agree(rows(other, place), rows(expected, number)) for other in moved)
            for place, number in enumerate(differ)
        )
