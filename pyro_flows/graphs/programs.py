"""Nests of tasks written as programs for ``native.c``, and the memory that they share."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from pyro_flows.graphs.nests import Nests
from pyro_flows.graphs.views import STORE, Buffer, Foreign, Task, Unsuited, View, is_aligned, views_in
from pyro_flows.graphs.points import IDENTITY, WHERE

BLOCK, DIMS = 128, 6  # of native.c
LOAD, STORE_AT_ONCE = 0, 2
ARENA = 0  # the number of the array that tasks share
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


@dataclass
class Program:
    """What is run: words for the interpreter and foreign operations in turns.

    Attributes:
        steps: each the words of nests, or a foreign operation.
        arena: how many numbers tasks share.
        registers: how many blocks of numbers are needed.
        places: where in the arena a buffer begins.
    """

    steps: list[list[int] | Foreign]
    arena: int
    registers: int
    places: dict[Buffer, int]


def program(nests: Nests, arrays: dict[Buffer, int]) -> Program:
    """Write nests in the order of their levels.

    Args:
        nests: to write.
        arrays: the number of the array of each buffer that is an input, a constant or a foreign result; constants that
            tasks read are added.
    """
    ordered = _ordered(nests)
    places, size = _places(nests, ordered)
    filled: set[Buffer] = set()
    steps: list[list[int] | Foreign] = []
    registers = 0
    for one in ordered:
        if isinstance(one, Foreign):
            steps.append(one)
            continue
        written = _Written(one, places, arrays, filled)
        registers = max(registers, written.registers)
        if steps and isinstance(steps[-1], list):
            steps[-1] += written.words
        else:
            steps.append(written.words)
    return Program(steps, size, registers, places)


def _ordered(nests: Nests) -> list[list[Task] | Foreign]:
    """Return nests and foreign operations in the order of their levels, nests first."""
    groups: defaultdict[tuple[int, tuple[int, ...]], list[Task]] = defaultdict(list)
    for task in nests.tasks:
        groups[task.level, task.nest].append(task)
    foreign: defaultdict[int, list[Foreign]] = defaultdict(list)
    for one in nests.foreign:
        foreign[one.level].append(one)
    by_level: defaultdict[int, list[list[Task]]] = defaultdict(list)
    for (level, _), tasks in groups.items():
        by_level[level].append(tasks)
    found: list[list[Task] | Foreign] = []
    for level in sorted({*by_level, *foreign}):
        found += by_level[level]
        found += foreign[level]
    return found


def _places(nests: Nests, ordered: Sequence[list[Task] | Foreign]) -> tuple[dict[Buffer, int], int]:
    """Return where each kept buffer of tasks begins, and how much is used at most: memory is used again."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for step, one in enumerate(ordered):
        for task in [] if isinstance(one, Foreign) else one:
            if task.to.buffer.kept:
                first.setdefault(task.to.buffer, step)
            for view in (*task.operands, task.to):
                last[view.buffer] = step
        if isinstance(one, Foreign):
            for view in views_in((one.args, one.kwargs)):
                last[view.buffer] = step
    for view, _ in nests.outputs:
        last[view.buffer] = len(ordered)
    born: defaultdict[int, list[Buffer]] = defaultdict(list)
    dying: defaultdict[int, list[Buffer]] = defaultdict(list)
    for buffer, step in first.items():
        born[step].append(buffer)
        dying[last[buffer]].append(buffer)
    places: dict[Buffer, int] = {}
    free: list[tuple[int, int]] = [(0, 2**62)]  # begin and end
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


@dataclass
class _Written:
    """One nest in words."""

    tasks: list[Task]
    places: dict[Buffer, int]
    arrays: dict[Buffer, int]
    filled: set[Buffer]
    memories: list[Memory] = field(default_factory=list)
    registers: int = 0

    def __post_init__(self) -> None:
        self.sizes = self.tasks[0].nest
        self.loads: dict[object, Memory] = {}
        self.made: dict[Buffer, int] = {}  # of a buffer: which task of the nest makes it
        taken = [[self._source(view) for view in task.operands] for task in self._numbered()]
        stores = [self._store(task) for task in self.tasks]
        self.memories = [*self.loads.values(), *(store for store in stores if store is not None)]
        self._choose_inner()
        self.words = self._write(taken, stores)

    def _numbered(self) -> list[Task]:
        for number, task in enumerate(self.tasks):
            if task.to.buffer.maker is task:
                self.made[task.to.buffer] = number
        return self.tasks

    def _source(self, view: View) -> Memory | int:
        """Return where an operand comes from: memory, or a task of this nest."""
        number = self.made.get(view.buffer)
        if number is not None and is_aligned(view, self.sizes):
            return number
        strides = [stride for size, stride in zip(view.sizes, view.strides, strict=True) if size > 1]
        along = -1 if view.index is None else sum(size > 1 for size in view.sizes[: view.along])
        key = view.buffer, view.offset, tuple(strides), view.index
        return self.loads.setdefault(key, Memory(LOAD, view.buffer, view.offset, strides, view.index, along))

    def _store(self, task: Task) -> Memory | None:
        to = task.to
        if not to.buffer.kept:
            return None
        strides = [stride for size, stride in zip(to.sizes, to.strides, strict=True) if size > 1]
        along = -1 if to.index is None else sum(size > 1 for size in to.sizes[: to.along])
        return Memory(task.action, to.buffer, to.offset, strides, to.index, along)

    def _choose_inner(self) -> None:
        """Join dimensions that are one in memory; take the one last that costs least to go along."""
        sizes = [*self.sizes]
        order = len(sizes) - 1
        while order > 0:
            before, size = order - 1, sizes[order]
            if all(
                one.strides[before] == one.strides[order] * size and one.along not in (before, order)
                for one in self.memories
            ):
                sizes[before : order + 1] = [sizes[before] * size]
                for one in self.memories:
                    del one.strides[before]
                    one.along -= one.along > before
            order -= 1
        if len(sizes) > DIMS:
            raise Unsuited
        if sizes:
            inner = min(range(len(sizes)), key=lambda axis: self._cost(sizes, axis))
            for row in (sizes, *(one.strides for one in self.memories)):
                row.append(row.pop(inner))
            for one in self.memories:
                if one.along == inner:
                    one.along = len(sizes) - 1
                elif one.along > inner:
                    one.along -= 1
        more = DIMS - len(sizes)
        self.sizes = (1,) * more + tuple(sizes)
        for one in self.memories:
            one.strides = [0] * more + one.strides
            one.along = one.along + more if one.index is not None else -1

    def _cost(self, sizes: Sequence[int], axis: int) -> float:
        total = prod(sizes)
        blocks = total // sizes[axis] * math.ceil(sizes[axis] / BLOCK)
        apart = 0.0
        for one in self.memories:
            if one.along == axis:
                apart += INDEXED if one.kind == LOAD else ADDED
            elif one.strides[axis] not in (0, 1):
                apart += APART
        each = PER_BLOCK + PER_MEMORY * len(self.memories) + PER_INSTRUCTION * len(self.tasks)
        return blocks * each + total * apart

    def _write(self, taken: list[list[Memory | int]], stores: list[Memory | None]) -> list[int]:
        loads = [*self.loads.values()]
        for number, load in enumerate(loads):
            load.register, load.single = number, load.strides[-1] == 0 and load.along != DIMS - 1
        never = len(taken)
        last = [number if stores[number] is None else never for number in range(len(taken))]  # taker of each result
        for number, sources in enumerate(taken):
            for source in sources:
                if isinstance(source, int):
                    last[source] = max(last[source], number)
        for number, task in reversed([*enumerate(self.tasks)]):
            if task.code == IDENTITY and isinstance(source := taken[number][0], int):
                last[source] = max(last[source], last[number])
        ends: defaultdict[int, list[int]] = defaultdict(list)
        for number, until in enumerate(last):
            ends[until].append(number)
        self.registers, free = len(loads), []
        held: list[tuple[int, bool]] = []  # register and whether it holds one number, of each task
        owned: dict[int, int] = {}
        instructions: list[int] = []
        for number, (task, sources) in enumerate(zip(self.tasks, taken, strict=True)):
            regs = [held[part] if isinstance(part, int) else (part.register, part.single) for part in sources]
            store = stores[number]
            if task.code == IDENTITY:
                held.append(regs[0])
            else:
                single = all(one for _, one in regs)
                at_once = store is not None and store.kind == STORE and store.strides[-1] == 1 and not single
                if at_once and store is not None and store.along < 0:
                    store.kind, register = STORE_AT_ONCE, self.registers
                    self.registers += 1
                elif store is None and free:
                    register = owned[number] = free.pop()
                else:
                    register = self.registers
                    self.registers += 1
                    if store is None:
                        owned[number] = register
                held.append((register, single))
                instructions += _instruction(task, register, single, regs)
            if store is not None:
                store.register, store.single = held[-1]
            free += [owned.pop(done) for done in ends[number] if done in owned]
        return self._in_words(instructions)

    def _in_words(self, instructions: list[int]) -> list[int]:
        words: list[int] = []
        fills = 0
        for one in self.memories:
            if one.kind != LOAD and one.buffer.fill is not None and one.buffer not in self.filled:
                self.filled.add(one.buffer)
                words += [ARENA, self.places[one.buffer], one.buffer.span, _bits(one.buffer.fill)]
                fills += 1
        for one in self.memories:
            array, offset = self._array(one)
            index = -1 if one.index is None else self.arrays.setdefault(one.index, len(self.arrays) + 1)
            register = one.register | (int(one.single) << 32 if one.kind not in (LOAD, STORE_AT_ONCE) else 0)
            words += [one.kind, register, array, offset, *one.strides, index, one.along]
        words += instructions
        head = [4 + DIMS + len(words), len(self.memories), len(instructions) // 9, fills, *self.sizes]
        return head + words

    def _array(self, one: Memory) -> tuple[int, int]:
        if one.buffer.source is None:
            return ARENA, self.places[one.buffer] + one.offset
        return self.arrays.setdefault(one.buffer, len(self.arrays) + 1), one.offset


def _instruction(task: Task, register: int, single: bool, regs: list[tuple[int, bool]]) -> list[int]:
    (a, a_single), (b, b_single), (c, c_single) = [*regs, *[regs[0]] * (3 - len(regs))]
    a_step = int(not a_single) | (int(not c_single) << 1 if task.code == WHERE else 0)
    return [task.code, int(single), register, a, b, c, a_step, int(not b_single), _bits(task.number)]


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])
