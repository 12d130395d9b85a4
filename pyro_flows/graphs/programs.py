"""Nests of tasks written as programs for ``interpreter.c``, and the memory that they share."""

from __future__ import annotations

import array
import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from pyro_flows._fallbacks import fallback
from pyro_flows.graphs.fusion_groups import FusionGroups
from pyro_flows.graphs.views import Buffer, Foreign, Product, Sizes, Task, Unsuited
from pyro_flows.graphs.writing import BLOCK, Written, product_in_words


@dataclass
class Program:
    """What is run: words for the interpreter and foreign operations in turns.

    Attributes:
        steps: each the words of nests and products, or a foreign operation.
        arena: how many numbers tasks share.
        registers: how many blocks of numbers are needed.
        scratch: how many numbers these are, with those of a matrix behind them.
        places: where in the arena a buffer begins.
    """

    steps: list[array.array[int] | Foreign]
    arena: int
    registers: int
    scratch: int
    places: dict[Buffer, int]


def program(groups: FusionGroups, arrays: dict[Buffer, int]) -> Program:
    """Write nests in the order of their levels.

    Args:
        groups: to write.
        arrays: the number of the array of each buffer that is an input, a constant or a foreign result; constants that
            tasks read are added.
    """
    ordered = _ordered(groups)
    places, size = _places(groups, ordered)
    filled: set[Buffer] = set()
    steps: list[array.array[int] | Foreign] = []
    registers = most = 0
    for one in ordered:
        if isinstance(one, Foreign):
            steps.append(one)
            continue
        if isinstance(one, Product):
            words, packed = product_in_words(one, places, arrays)
            most = max(most, packed)
        else:
            written = Written(one, places, arrays, filled)
            words, registers = written.words, max(registers, written.registers)
        if registers > 2**16:  # whose pointers lie on the stack
            raise Unsuited
        if steps and isinstance(steps[-1], array.array):
            steps[-1].extend(words)
        else:
            steps.append(array.array("q", words))
    return Program(steps, size, registers, registers * BLOCK + most, places)


def _ordered(groups: FusionGroups) -> list[list[Task] | Foreign | Product]:
    """Return nests and foreign operations in the order of their levels, nests first."""
    nests: defaultdict[tuple[int, Sizes], list[Task]] = defaultdict(list)
    for task in groups.tasks:
        nests[task.level, task.nest].append(task)
    by_level = [(level, tasks) for (level, _), tasks in nests.items()] + [(one.level, one) for one in groups.foreign]
    return [one for _, one in sorted(by_level, key=lambda pair: pair[0])]


def _places(groups: FusionGroups, ordered: Sequence[list[Task] | Foreign | Product]) -> tuple[dict[Buffer, int], int]:
    """Return where each kept buffer of tasks begins, and how much is used at most: memory is used again."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for step, one in enumerate(ordered):
        written = [task.to for task in one] if isinstance(one, list) else [one.to] if isinstance(one, Product) else []
        for view in written:
            if view.buffer.kept:
                first.setdefault(view.buffer, step)
        taken = [view for task in one for view in task.operands] if isinstance(one, list) else one.taken
        for view in (*taken, *written):
            last[view.buffer] = step
    for view, _ in groups.outputs:
        last[view.buffer] = len(ordered)
    born: defaultdict[int, list[Buffer]] = defaultdict(list)
    dying: defaultdict[int, list[Buffer]] = defaultdict(list)
    for buffer, step in first.items():
        born[step].append(buffer)
        dying[last[buffer]].append(buffer)
    places: dict[Buffer, int] = {}
    free = [(0, 2**62)]  # begin and end
    most = 0
    for step in range(len(ordered)):
        for buffer in born[step]:
            length = _padded(buffer.span)
            number = next(n for n, (begin, end) in enumerate(free) if end - begin >= length)
            begin, end = free[number]
            places[buffer], free[number] = begin, (begin + length, end)
            most = max(most, begin + length)
        free += [(places[buffer], places[buffer] + _padded(buffer.span)) for buffer in dying[step]]
        free = _merged(free) if dying[step] else free
    return places, most


def _padded(count: int) -> int:
    return -(-count // 8) * 8  # a line of the cache


def _merged(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(part for part in free if part[0] < part[1]):
        if found and found[-1][1] == begin:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found


# the interpreter in C that runs them: an extension built with the package ---------------------------------------------

EXTENSION = "pyro_flows.graphs._interpreter"  # no module of Python's: a shared library, loaded by ctypes


@functools.cache
def library() -> Callable[..., object] | None:
    """Return ``run_program`` of ``interpreter.c``; None where the package was built without a compiler of C.

    Cost: a millisecond, once a process.

    >>> run = library()
    """
    found = find_spec(EXTENSION)
    if found is None or found.origin is None:
        return None
    try:
        run = ctypes.CDLL(found.origin).run_program
    except (OSError, AttributeError) as error:
        fallback("no code of its own for elementwise operations", error)
        return None
    run.restype = None
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return run


def interpreter_is_built() -> bool:
    """Return whether graphs run block by block: whether the extension in C was built with the package."""
    return library() is not None
