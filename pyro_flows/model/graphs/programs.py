"""Nests of tasks written as programs for ``interpreter.c``, and the memory that they share."""

from __future__ import annotations

import array
import ctypes
import functools
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

from pyro_flows.model.graphs.fusion_groups import FusionGroups
from pyro_flows.model.graphs.points import IDENTITY, WHERE
from pyro_flows.model.graphs.views import (
    LOAD,
    STORE,
    STORE_AT_ONCE,
    Buffer,
    Foreign,
    Product,
    Sizes,
    Task,
    Unsuited,
    View,
    is_aligned,
)
from pyro_flows.support.process.fallbacks import fallback

BLOCK, DIMS = 128, 6  # of interpreter.c
ARENA = 0  # the number of the array that tasks share
WORDS = 9  # of an instruction
WIDE, PRODUCT = 8, -1  # of interpreter.c
PER_BLOCK, PER_MEMORY, PER_INSTRUCTION = 10.0, 6.0, 4.0  # nanoseconds
APART, INDEXED, ADDED = 1.2, 2.0, 4.0  # for a number out of line, by an index, or added by an index


@dataclass(eq=False)
class Memory:
    """One operand in memory, or one place for results: strides in all dimensions of its nest."""

    kind: int
    buffer: Buffer
    offset: int
    strides: list[int]
    index: Buffer | None = None
    along: int = -1
    register: int = -1
    single: bool = False

    def is_one(self, axis: int, size: int) -> bool:
        """Whether an axis of this size and the one before it are one in memory."""
        return self.strides[axis - 1] == self.strides[axis] * size and self.along not in (axis - 1, axis)

    def join(self, axis: int) -> None:
        """Make an axis and the one before it one."""
        del self.strides[axis - 1]
        self.along -= self.along >= axis

    def move_last(self, axis: int) -> None:
        self.strides.append(self.strides.pop(axis))
        if self.along == axis:
            self.along = len(self.strides) - 1
        elif self.along > axis:
            self.along -= 1


@dataclass
class Written:
    """One nest in words.

    Args:
        tasks: all of one level and one nest.
        places: where in the arena a buffer begins.
        arrays: the number of the array of other buffers; those that are met first are added.
        filled: buffers that are filled already; those that are filled here are added.

    Attributes:
        words: the program.
        registers: how many blocks of numbers it needs.
    """

    tasks: list[Task]
    places: dict[Buffer, int]
    arrays: dict[Buffer, int]
    filled: set[Buffer]

    def __post_init__(self) -> None:
        self.sizes = self.tasks[0].nest
        self.loads: dict[object, Memory] = {}
        self.made = {task.to.buffer: number for number, task in enumerate(self.tasks) if task.to.buffer.maker is task}
        taken = [[self._source(view) for view in task.operands] for task in self.tasks]
        stores = [_memory(task.action, task.to) if task.to.buffer.kept else None for task in self.tasks]
        self.memories = [*self.loads.values(), *(store for store in stores if store is not None)]
        self._choose_inner()
        self.registers = 0
        self.words = self._in_words(self._instructions(taken, stores))

    def _source(self, view: View) -> Memory | int:
        """Return where an operand comes from: memory, or a task of this nest."""
        number = self.made.get(view.buffer)
        if number is not None and is_aligned(view, self.sizes):
            return number
        load = _memory(LOAD, view)
        return self.loads.setdefault((view.buffer, view.offset, tuple(load.strides), view.index), load)

    # the order of dimensions ----------------------------------------------------------------------------------------

    def _choose_inner(self) -> None:
        """Join dimensions that are one in memory; take the one last that costs least to go along."""
        sizes = [*self.sizes]
        for order in range(len(sizes) - 1, 0, -1):
            if all(one.is_one(order, sizes[order]) for one in self.memories):
                sizes[order - 1 : order + 1] = [sizes[order - 1] * sizes[order]]
                for one in self.memories:
                    one.join(order)
        if len(sizes) > DIMS:
            raise Unsuited
        if sizes:
            inner = min(range(len(sizes)), key=lambda axis: self._cost(sizes, axis))
            sizes.append(sizes.pop(inner))
            for one in self.memories:
                one.move_last(inner)
        more = DIMS - len(sizes)
        self.sizes = (1,) * more + tuple(sizes)
        for one in self.memories:
            one.strides = [0] * more + one.strides
            one.along += more if one.index is not None else 0

    def _cost(self, sizes: Sequence[int], axis: int) -> float:
        total = prod(sizes)
        blocks = total // sizes[axis] * math.ceil(sizes[axis] / BLOCK)
        each = PER_BLOCK + PER_MEMORY * len(self.memories) + PER_INSTRUCTION * len(self.tasks)
        apart = 0.0
        for one in self.memories:
            if one.along == axis:
                apart += INDEXED if one.kind == LOAD else ADDED
            elif one.strides[axis] not in (0, 1):
                apart += APART
        return blocks * each + total * apart

    # instructions ---------------------------------------------------------------------------------------------------

    def _instructions(self, taken: list[list[Memory | int]], stores: list[Memory | None]) -> list[int]:
        """Return the words of all instructions; give each load and each task a register."""
        for number, load in enumerate(self.loads.values()):
            load.register, load.single = number, load.strides[-1] == 0 and load.along != DIMS - 1
        self.registers = len(self.loads)
        free: list[int] = []
        ends = _ends(self.tasks, taken, stores)
        own: dict[int, int] = {}  # registers that are free after the last task that takes them
        held: list[tuple[int, bool]] = []  # the register of each task, and whether it holds one number for all
        words: list[int] = []
        for number, (task, sources, store) in enumerate(zip(self.tasks, taken, stores, strict=True)):
            given = [held[part] if isinstance(part, int) else (part.register, part.single) for part in sources]
            if task.code == IDENTITY:
                held.append(given[0])
            else:
                single = all(one for _, one in given)
                if store is None and free:
                    register = free.pop()
                else:
                    register, self.registers = self.registers, self.registers + 1
                if store is None:
                    own[number] = register
                elif store.kind == STORE and store.strides[-1] == 1 and store.index is None and not single:
                    store.kind = STORE_AT_ONCE
                held.append((register, single))
                words += _instruction(task, register, single, given)
            if store is not None:
                store.register, store.single = held[-1]
            free += [own.pop(done) for done in ends[number] if done in own]
        return words

    def _in_words(self, instructions: list[int]) -> list[int]:
        words: list[int] = []
        fills = 0
        for one in self.memories:
            if one.kind != LOAD and one.buffer.fill is not None and one.buffer not in self.filled:
                self.filled.add(one.buffer)
                words += [ARENA, self.places[one.buffer], one.buffer.span, _bits(one.buffer.fill)]
                fills += 1
        for one in self.memories:
            array, begin = ARENA, self.places.get(one.buffer, 0)
            if one.buffer.source is not None:
                array = self._array(one.buffer)
            index = -1 if one.index is None else self._array(one.index)
            later = one.kind not in (LOAD, STORE_AT_ONCE)  # stored after the instructions
            register = one.register | (int(one.single) << 32 if later else 0)
            words += [one.kind, register, array, begin + one.offset, *one.strides, index, one.along]
        words += instructions
        return [4 + DIMS + len(words), len(self.memories), len(instructions) // WORDS, fills, *self.sizes, *words]

    def _array(self, buffer: Buffer) -> int:
        return self.arrays.setdefault(buffer, len(self.arrays) + 1)


def _memory(kind: int, view: View) -> Memory:
    """Return what is in memory without dimensions of one place."""
    strides = [stride for size, stride in zip(view.sizes, view.strides, strict=True) if size > 1]
    along = -1 if view.index is None else sum(size > 1 for size in view.sizes[: view.along])
    return Memory(kind, view.buffer, view.offset, strides, view.index, along)


def _ends(
    tasks: Sequence[Task], taken: Sequence[Sequence[Memory | int]], stores: Sequence[Memory | None]
) -> dict[int, list[int]]:  # fmt: skip
    """Return which results are taken for the last time by each task; those that are stored at the end stay."""
    never = len(tasks)
    last = [number if store is None else never for number, store in enumerate(stores)]
    for number in reversed(range(never)):
        until = last[number] if tasks[number].code == IDENTITY else number  # whose register is that of its operand
        for source in taken[number]:
            if isinstance(source, int):
                last[source] = max(last[source], until)
    ends: defaultdict[int, list[int]] = defaultdict(list)
    for number, until in enumerate(last):
        ends[until].append(number)
    return ends


def _instruction(task: Task, register: int, single: bool, given: list[tuple[int, bool]]) -> list[int]:
    (a, a_single), (b, b_single), (c, c_single) = [*given, *[given[0]] * (3 - len(given))]
    a_step = int(not a_single) | (int(not c_single) << 1 if task.code == WHERE else 0)
    return [task.code, int(single), register, a, b, c, a_step, int(not b_single), _bits(task.number)]


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def product_in_words(one: Product, places: dict[Buffer, int], arrays: dict[Buffer, int]) -> tuple[list[int], int]:
    """Return the words of a product of matrices, and how many numbers are packed for it."""
    batch, rows, inner = one.first.sizes
    columns = one.second.sizes[2]
    words = [rows, inner, columns, batch]
    for view in (one.first, one.second, one.to):
        known = view.buffer.source is None
        array = ARENA if known else arrays.setdefault(view.buffer, len(arrays) + 1)
        following, row, column = view.strides
        words += [array, view.offset + (places[view.buffer] if known else 0), row, column, following]
    return [2 + len(words), PRODUCT, *words], inner * math.ceil(columns / WIDE) * WIDE


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

EXTENSION = "pyro_flows.model.graphs._interpreter"  # no module of Python's: a shared library, loaded by ctypes


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
