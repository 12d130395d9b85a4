"""Checkpoints of fits: the results of a call's expensive steps, in their order, so that it can be run anew from them.

A fit is determined by its seed. So a call that was stopped begins anew, and each step that stands in the file gives
its stored result: evaluations of a model by :func:`evaluated`, by their number, and what long loops have come to by
:func:`loop`. The first step that is missing is computed, and all later ones. Inputs are compared by a digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_flows import _ledger
from pyro_flows._fallbacks import Tried, first_line
from pyro_flows._files import replace_file
from pyro_flows._interrupts import undisturbed
from pyro_flows._untrusted import require

FORMAT = b"pyro_flows journal 1\n"  # then the digest of the rest, a line, JSON, a line, and the numbers
EVERY = 10.0  # seconds between two writes, at least,
SHARE = 0.02  # and the share of the time that writing may take
DENSE = 1e6  # bytes of results for each second that they took, up to which they are kept; others are computed again
LEAST = 1000  # bytes that would be worth it: what took less than a millisecond is not looked at
KINDS = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")  # of numbers
REMEDY = "Name a new file, or remove it to begin anew."
T = TypeVar("T")
State = TypeVar("State")


class Step(NamedTuple):
    """A step that was done: a digest of its inputs, the form of its result, and the numbers in it."""

    inputs: int
    form: object
    data: bytes


class Journal:
    """The steps of one call, and the file that they stand in.

    Args:
        path: of the file.
        about: what the call is of, plain values by their names.

    Raises:
        ValueError: if there is a file that is damaged, or of another call.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, object]) -> None:
        self.path = Path(path)
        self.about = json.loads(json.dumps(about, default=str))
        self.evaluations: dict[int, Step] = {}
        self.loops: dict[str, Step] = {}
        self.count, self.begun, self.inside = 0, Counter[str](), 0
        self.stopped = self.failed = self.new = False
        self.last, self.took = time.monotonic(), 0.0
        if self.path.exists():
            self._read()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be kept: inside of a step, and once the call was cut, so that it goes another way."""
        return self.stopped or self.inside > 0

    def due(self, every: float | None = None) -> bool:
        """Whether it is time to write: ``every`` so many seconds, and not too often."""
        return time.monotonic() - self.last >= max(EVERY if every is None else every, self.took / SHARE)

    @undisturbed
    def write(self) -> None:
        """Write the file, if there is anything new; the work goes on if that fails."""
        began = time.monotonic()
        if self.new:
            steps = [*self.evaluations.values(), *self.loops.values()]
            index = [[*self.evaluations, *self.loops], [[step.inputs, step.form, len(step.data)] for step in steps]]
            text = json.dumps({"about": self.about, "steps": index}).encode()
            body = b"\n".join([text, b"".join(step.data for step in steps)])
            try:
                replace_file(self.path, FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            except OSError as error:  # what has been found so far is worth more than its checkpoint
                if not self.failed:
                    warnings.warn(f"checkpoint: {error.strerror}; the work goes on.", stacklevel=2)
                self.failed = True
        self.new, self.last = False, time.monotonic()
        self.took = self.last - began

    def _read(self) -> None:
        shown = repr(str(self.path))
        whole = self.path.read_bytes()
        if not whole.startswith(FORMAT):
            what = "that of another release or call" if whole.startswith(b"pyro_flows") else "another file"
            raise ValueError(f"checkpoint: expected one of this release and call, got {what}, {shown}. {REMEDY}")
        found, _, body = whole[len(FORMAT) :].partition(b"\n")
        with self.reading():
            require(found.decode("ascii", "replace") == hashlib.sha256(body).hexdigest(), "its SHA-256 digest differs")
            text, _, data = body.partition(b"\n")
            stored = json.loads(text)
            keys, steps = stored["steps"]
            cut = _Cut(data)
            known = {key: _step(step, cut) for key, step in zip(keys, steps, strict=True)}
            require(cut.at == len(data), "it has more numbers than steps")
            require(isinstance(stored["about"], dict), "it does not say what it is of")
        names = [*self.about, *(name for name in stored["about"] if name not in self.about)]
        different = [name for name in names if stored["about"].get(name) != self.about.get(name)]
        if different:
            raise ValueError(
                f"checkpoint: expected one of this call, got {shown} of another (different: {', '.join(different)}). "
                f"{REMEDY}"
            )
        self.evaluations = {key: step for key, step in known.items() if isinstance(key, int)}
        self.loops = {key: step for key, step in known.items() if isinstance(key, str)}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read inside what the file has. It may be damaged, and any error then comes from that.

        Raises:
            ValueError: in the place of any other error.
        """
        with Tried() as tried:
            yield
        if tried.error is not None:
            why = "too deeply nested" if isinstance(tried.error, RecursionError) else first_line(tried.error)
            what = f"checkpoint: expected a whole file, got {str(self.path)!r}, damaged ({why}). {REMEDY}"
            raise ValueError(what) from tried.error

    def known(self, step: Step, digest: int, device: torch.device) -> object:
        """Return the stored result of a step.

        Raises:
            ValueError: if its inputs are not those of this time.
        """
        if step.inputs != digest:
            raise ValueError(
                f"checkpoint: expected the numbers of the call that wrote {str(self.path)!r}, got others at a step. "
                f"The model is random, or the machine, its packages or threads are others. {REMEDY}"
            )
        return _decoded(step.form, _Cut(step.data), device)

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
        data: list[bytes] = []
        form = _encoded(result, data)
        self.new = True
        return Step(digest, form, b"".join(data))


_open: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def keeping(path: str | os.PathLike[str] | None, about: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Keep what is done inside in a file, and take from it what was done before; None keeps nothing.

    The file stays there at the end: the same call comes to the same result at once.

    Raises:
        ValueError: as :class:`Journal` does.
    """
    if path is None:
        yield
        return
    journal = Journal(path, about())
    token = _open.set(journal)
    try:
        yield
    finally:
        _open.reset(token)
        journal.write()


def check(path: str | os.PathLike[str] | None) -> None:
    """Say before the work if no checkpoint can be written there.

    Raises:
        ValueError: for a directory, or a file in a directory that cannot be written to.
    """
    if path is None:
        return
    folder = Path(os.path.realpath(path)).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"checkpoint: expected a file in a directory that can be written to, got {str(path)!r}.")


def stop() -> None:
    """Keep nothing from now on: the work was cut, and goes another way than it would have gone."""
    journal = _open.get()
    if journal is not None and not journal.stopped:
        journal.stopped = True
        journal.write()


def milestone() -> None:
    """Write what there is, unless that was done a moment ago: a method has ended."""
    journal = _open.get()
    if journal is not None and not journal.idle and journal.due(0.0):
        journal.write()


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
        journal.write()
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
        self.before = _ledger.gradients()
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
                _ledger.booked(count, tuple(parts))
            _set_random_state(random, self.device)
        return True

    def offer(self, make: Callable[[], object]) -> None:
        if not self.journal.stopped and self.journal.due():
            self._keep(make(), False)
            self.journal.write()

    def end(self, make: Callable[[], object]) -> None:
        if not (self.journal.stopped or self.done):
            self._keep(make(), True)
            if self.journal.due(1.0):
                self.journal.write()

    def _keep(self, state: object, done: bool) -> None:
        spent = [[list(parts), count] for parts, count in (_ledger.gradients() - self.before).items()]
        random = _random_state(self.device)
        self.journal.loops[self.key] = self.journal.step(self.digest, [state, spent, random, done])


@contextmanager
def loop(name: str, *inputs: Tensor) -> Iterator[Loop]:
    """Give what a loop had come to, and keep what it comes to. What is evaluated inside is not kept for itself.

    Args:
        name: of the loop; one that is entered again is another one.
        inputs: tensors that tell it from other loops.
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


def _random_state(device: torch.device) -> list[Tensor]:
    found = [torch.get_rng_state()]
    return found if device.type != "cuda" else [*found, torch.cuda.get_rng_state(device)]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)


# values as JSON and bytes ---------------------------------------------------------------------------------------------


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a number that tells tensors from others: of their shapes, dtypes and numbers."""
    total = 0
    for part in tensors:
        total = zlib.crc32(_bytes_of(part), zlib.crc32(f"{part.dtype} {tuple(part.shape)}".encode(), total))
    return total


def _bytes_of(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _encoded(value: object, data: list[bytes]) -> object:
    """Return the form of a value as JSON has it, and add the numbers of its tensors to ``data``."""
    if isinstance(value, Tensor):
        data.append(_bytes_of(value))
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, Mapping):
        return {"items": {name: _encoded(part, data) for name, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encoded(part, data) for part in value]
    return value


class _Cut:
    """Cuts bytes into the numbers of tensors, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        require(type(size) is int and 0 <= size <= len(self.data) - self.at, "numbers are missing")
        self.at += size
        return self.data[self.at - size : self.at]


def _step(stored: tuple[int, object, int], cut: _Cut) -> Step:
    inputs, form, size = stored
    require(type(inputs) is int, "a step has no digest")
    require(_size(form) == size, "a step has other numbers than its form")
    return Step(inputs, form, cut.take(size))


def _size(form: object) -> int:
    """Return how many bytes the tensors of a form have."""
    if isinstance(form, list):
        return sum(map(_size, form))
    if not isinstance(form, dict):
        return 0
    if "items" in form:
        return sum(map(_size, form["items"].values()))
    name, shape = form["tensor"]
    require(name in KINDS, f"it has numbers of kind {name}")
    require(all(type(length) is int and length >= 0 for length in shape), "a shape is none")
    return math.prod(shape) * int(getattr(torch, name).itemsize)


def _decoded(form: object, cut: _Cut, device: torch.device) -> object:
    if isinstance(form, list):
        return [_decoded(part, cut, device) for part in form]
    if not isinstance(form, dict):
        return form
    if "items" in form:
        return {name: _decoded(part, cut, device) for name, part in form["items"].items()}
    name, shape = form["tensor"]
    data, dtype = bytearray(cut.take(_size(form))), getattr(torch, name)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).to(device)
