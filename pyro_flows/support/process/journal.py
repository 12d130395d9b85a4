"""Checkpoints of fits: the results of a call's expensive steps, in their order, so that it can be run anew from them.

A fit is determined by its seed. So a call that was stopped begins anew, and each step that stands in the file gives
its stored result: evaluations of a model by :func:`evaluated`, by their number, and what long loops have come to by
:func:`loop`. The first step that is missing is computed, and all later ones. Inputs are compared by a digest.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_flows.support.files.checkpoints import EVERY, REMEDY, Checkpoint
from pyro_flows.support.files.untrusted import require
from pyro_flows.support.process import ledger
from pyro_flows.support.process.interrupts import undisturbed

SHARE = 0.02  # of the time, that writing may take at most
DENSE = 1e6  # bytes of results for each second that they took, up to which they are kept; others are computed again
LEAST = 1000  # bytes that would be worth it: what took less than a millisecond is not looked at
T = TypeVar("T")
State = TypeVar("State")


class Step(NamedTuple):
    """A step that was done: a digest of its inputs, and its result: tensors and plain values in lists and dicts."""

    inputs: int
    result: object


class Journal(Checkpoint):
    """The steps of one call, and the file that they stand in."""

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, object]) -> None:
        super().__init__(path, about)
        self.evaluations: dict[int, Step] = {}
        self.loops: dict[str, Step] = {}
        self.count, self.begun, self.inside = 0, Counter[str](), 0
        self.stopped = self.new = False
        self.took = 0.0
        stored = self.read()
        if stored is not None:
            with self.reading():
                known = {key: Step(*step) for key, step in stored["steps"].items()}
                require(all(type(step.inputs) is int for step in known.values()), "a step has no digest")
            self.evaluations = {key: step for key, step in known.items() if isinstance(key, int)}
            self.loops = {key: step for key, step in known.items() if isinstance(key, str)}

    @property
    def idle(self) -> bool:
        """Whether nothing is to be kept: inside of a step, and once the call was cut, so that it goes another way."""
        return self.stopped or self.inside > 0

    def due(self, every: float | None = None) -> bool:
        """Whether it is time to write: ``every`` so many seconds, and not too often."""
        return time.monotonic() - self.last >= max(EVERY if every is None else every, self.took / SHARE)

    @undisturbed
    def keep(self) -> None:
        """Write the file, if there is anything new."""
        began = time.monotonic()
        if self.new:
            self.write({"steps": {key: list(step) for key, step in [*self.evaluations.items(), *self.loops.items()]}})
        self.new, self.last = False, time.monotonic()
        self.took = self.last - began

    def known(self, step: Step, digest: int, device: torch.device) -> object:
        """Return the stored result of a step, or raise a ValueError if its inputs are not those of this time."""
        if step.inputs != digest:
            raise ValueError(
                f"checkpoint: expected the numbers of the call that wrote {str(self.path)!r}, got others at a step. "
                f"The model is random, or the machine, its packages or threads are others. {REMEDY}"
            )
        return tree_map_only(Tensor, lambda value: value.to(device, copy=True), step.result)

    def add(
        self, number: int, inputs: Sequence[Tensor], found: object, changed: object,
        before: tuple[Mapping[str, object], Tensor] | None,
    ) -> None:  # fmt: skip
        """Add an evaluation, unless it has drawn random numbers: it will draw them again."""
        values = {}
        if before is not None:
            if not torch.equal(before[1], torch.get_rng_state()):
                return
            values = vars(changed) if vars(changed) != before[0] else {}
        self.evaluations[number] = self.step(checksum(inputs), [found, values])

    def step(self, digest: int, result: object) -> Step:
        """Return a step with its result."""
        self.new = True
        return Step(digest, _plain(result))


_open: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def keeping(path: str | os.PathLike[str] | None, about: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Keep what is done inside in a file, and take from it what was done before; None keeps nothing.

    The file stays there at the end: the same call comes to the same result at once.
    """
    if path is None:
        yield
        return
    token = _open.set(journal := Journal(path, about()))
    try:
        yield
        journal.new |= not journal.path.exists()  # each step may have been too quick to be kept
    finally:
        _open.reset(token)
        journal.keep()


def check(path: str | os.PathLike[str] | None) -> Path | None:
    """Refuse before the work a directory, or a file in a directory that cannot be written to.

    Returns the whole path, since a model may change the working directory.
    """
    if path is None:
        return None
    folder = Path(os.path.realpath(path)).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"checkpoint: expected a file in a directory that can be written to, got {str(path)!r}.")
    return Path(path).absolute()


def stop() -> None:
    """Keep nothing from now on: the work was cut, and goes another way than it would have gone."""
    journal = _open.get()
    if journal is not None and not journal.stopped:
        journal.stopped = True
        journal.keep()


def milestone() -> None:
    """Write what there is, unless that was done a moment ago: a method has ended."""
    journal = _open.get()
    if journal is not None and not journal.idle and journal.due(0.0):
        journal.keep()


# evaluations ----------------------------------------------------------------------------------------------------------


def evaluated(inputs: Sequence[Tensor], compute: Callable[[], T], changed: object = None) -> T:
    """Return what ``compute`` returns, from the checkpoint if it is there: tensors in lists and dicts.

    Args:
        inputs: tensors that it depends on.
        compute: without autograd.
        changed: an object of plain values that may change on the way; None if nothing does, random numbers included.
    """
    journal = _open.get()
    if journal is None or journal.idle:
        return compute()
    number = journal.count
    journal.count += 1
    if number in journal.evaluations:
        known = journal.known(journal.evaluations[number], checksum(inputs), inputs[0].device)
        with journal.reading():
            found, values = cast("tuple[T, dict[str, object]]", known)
            rows = {len(leaf) for leaf in tree_leaves(found)}
            require(rows == {len(inputs[0])}, f"a step has results for {rows} points")
            require(not values or values.keys() == vars(changed).keys(), "a step has other values")
        if values:
            vars(changed).update(values)
        return found
    before = None if changed is None else (dict(vars(changed)), torch.get_rng_state())
    began = time.perf_counter()
    journal.inside += 1
    try:
        found = compute()
    finally:
        journal.inside -= 1
    worth = DENSE * (time.perf_counter() - began)  # bytes
    if worth >= LEAST and sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(found)) <= worth:
        journal.add(number, inputs, found, changed, before)
    if journal.due():
        journal.keep()
    return found


# loops ----------------------------------------------------------------------------------------------------------------


class Loop:
    """A loop that can go on from any of its rounds: from its state, tensors and plain values in lists and dicts."""

    def take(self, put_back: Callable[[State], object]) -> bool:
        """Put back what the loop had come to, and let torch's random numbers go on from there; False if it begins."""
        return False

    def offer(self, make: Callable[[], object]) -> None:
        """Keep the state that ``make`` returns, if it is time to."""

    def end(self, make: Callable[[], object]) -> None:
        """Keep the last state."""


class _Kept(Loop):
    def __init__(self, journal: Journal, name: str, inputs: Sequence[Tensor]) -> None:
        self.journal, self.digest, self.device = journal, checksum(inputs), inputs[0].device
        self.key = f"{name} {journal.begun[name]}"
        journal.begun[name] += 1
        self.before = ledger.gradients()
        self.done = False

    def take(self, put_back: Callable[[State], object]) -> bool:
        if self.key not in self.journal.loops:
            return False
        known = self.journal.known(self.journal.loops[self.key], self.digest, self.device)
        with self.journal.reading():
            state, spent, random, self.done = cast(
                "tuple[State, list[tuple[list[str], int]], list[Tensor], bool]", known
            )
            put_back(state)
            for parts, count in spent:
                ledger.booked(count, tuple(parts))
            torch.set_rng_state(random[0].cpu())
            for of_device in random[1:]:
                torch.cuda.set_rng_state(of_device.cpu(), self.device)
        return True

    def offer(self, make: Callable[[], object]) -> None:
        if not self.journal.stopped and self.journal.due():
            self._keep(make(), False)
            self.journal.keep()

    def end(self, make: Callable[[], object]) -> None:
        if not (self.journal.stopped or self.done):
            self._keep(make(), True)
            if self.journal.due(1.0):
                self.journal.keep()

    def _keep(self, state: object, done: bool) -> None:
        spent = [[list(parts), count] for parts, count in (ledger.gradients() - self.before).items()]
        random = [torch.get_rng_state()]
        random += [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        self.journal.loops[self.key] = self.journal.step(self.digest, [state, spent, random, done])


@contextmanager
def loop(name: str, *inputs: Tensor) -> Iterator[Loop]:
    """Give what a loop had come to, and keep what it comes to. What is evaluated inside is not kept for itself.

    The name, how often it was entered before, and ``inputs`` tell it from other loops.
    """
    journal = _open.get()
    if journal is None or journal.idle:
        yield Loop()
        return
    kept = _Kept(journal, name, inputs)
    journal.inside += 1
    try:
        yield kept
    finally:
        journal.inside -= 1


# values ---------------------------------------------------------------------------------------------------------------


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a number that tells tensors from others: of their shapes, dtypes and numbers."""
    total = 0
    for part in tensors:
        numbers = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        total = zlib.crc32(numbers, zlib.crc32(f"{part.dtype} {tuple(part.shape)}".encode(), total))
    return total


def _plain(value: object) -> object:
    """Return a value as a file can hold it: copies of tensors, numbers and text in lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, float) else value  # those of numpy too
