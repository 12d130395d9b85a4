"""Recorded graphs run block by block: many elementwise operations at once, on numbers that stay in the cache.

Torch does one operation after the other: each is called, takes memory, and goes over all numbers. Here, an operation
on a block of numbers is a few nanoseconds of a loop in C, so that hundreds of them on few numbers, and a dozen on many,
take a third to a tenth of the time. Nothing is compiled for a graph. What is not elementwise is left to torch.

Source of the way to run: F. Alted, "Why modern CPUs are starving and what can be done about it", Computing in Science &
Engineering 2010, doi:10.1109/MCSE.2010.51 (numexpr).
"""

from __future__ import annotations

import array
import copy
import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.bindings import binding_of
from pyro_flows.model.graphs.fusion_groups import NUMBERS, FusionGroups, Rule
from pyro_flows.model.graphs.graph import has_tag, is_aten, is_pure, name_of
from pyro_flows.model.graphs.orders import MASKS
from pyro_flows.model.graphs.points import ADD, DIV, IDENTITY, MUL, SQRT, SUB
from pyro_flows.model.graphs.programs import BLOCK, library, program
from pyro_flows.model.graphs.rounding import rounds_alike, rounds_alike_where_tame
from pyro_flows.model.graphs.structured import STRUCTURED, side_by_side
from pyro_flows.model.graphs.views import STORE, Buffer, Call, Foreign, Given, Product, Unsuited, View, dense, span
from pyro_flows.support.process.fallbacks import fallback

THREADS, LARGE = 4, 2**16  # of torch's, and numbers of an operation in the mean, both at most
# numbers of a run, and of each call or operation of torch's in it, that are worth a thread
LONG, LONG_CALL = 2**18, 2**12
TASKS_FOR_A_CALL = 2  # that a call of the interpreter has to do in the mean, to gain time


def fused(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Fused | None:
    """Return a graph as a function that runs block by block; None if it would gain nothing, or where it cannot be done.

    Args:
        module: the graph.
        inputs: of the shapes, dtypes and strides of all later ones; the graph is run with them, and results compared.
    """
    if not is_pure(module) or any(value.device.type != "cpu" for value in inputs):
        return None
    if not any(value.dtype in NUMBERS for value in inputs) or any(map(_is_bound, module.graph.nodes)):
        return None
    run = library()
    if run is None:
        return None
    try:
        with torch.inference_mode():
            made = Fused(module, inputs, run)
            if not made.tasks or made.tasks < TASKS_FOR_A_CALL * made.calls:
                return None
            if torch.get_num_threads() > THREADS and made.numbers > LARGE * len(made.groups.tasks):
                return None  # torch divides operations on so many numbers among its threads
            found, expected = made(*inputs), tuple(value for _, value in made.groups.outputs)
            agrees = rounds_alike(module, inputs, found, expected) or rounds_alike_where_tame(module, inputs, made)
    except Unsuited:
        return None
    del made.groups
    if not agrees:
        fallback("not run block by block: other values")
        return None
    made.first = expected
    return made


def _is_bound(node: fx.Node) -> bool:
    """Whether it depends on what ran before it, or on how memory is laid out, or gives as many numbers as it finds."""
    if not is_aten(node):
        return False
    if name_of(node) == "index":
        indices = cast("Sequence[fx.Node | None]", node.args[1])
        found = [part.meta.get("val") for part in indices if part is not None]
        return any(value is None or value.dtype in MASKS for value in found)
    tags = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape)
    return any(has_tag(node, tag) for tag in tags) or name_of(node).startswith("as_strided")


class _Run(NamedTuple):
    """What one run is given, and what torch's operations return in it: by node and place, and by number of array."""

    given: list[Tensor]
    foreign: dict[object, Tensor]


class Fused:
    """A graph that runs block by block; call it with inputs like the first ones.

    Attributes:
        tasks: how many operations are done in blocks.
        calls: how many times the interpreter is called in a run.
        numbers: how many numbers all operations in blocks write.
        first: the results for the first inputs, as torch gave them.
    """

    first: tuple[Tensor, ...] = ()

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], run: Callable[..., object]) -> None:
        inputs = [value.clone() for value in inputs]  # later ones may share no memory, and have no numbers in one place
        self.groups = groups = FusionGroups(module, inputs, {**STRUCTURED, **MATRICES})
        self._run_program = run
        self._layouts = [(value.shape, value.stride()) for value in inputs]
        self._numbered = arrays = dict[Buffer, int]()
        for view in groups.inputs:
            arrays.setdefault(view.buffer, len(arrays) + 1)
        for one in groups.foreign:
            for view in one.results if isinstance(one, Foreign) else []:
                arrays.setdefault(view.buffer, len(arrays) + 1)
        self._program = done = program(groups, arrays)
        products = sum(isinstance(one, Product) for one in groups.foreign)
        self.tasks, self.calls = len(groups.tasks) + products, sum(isinstance(one, array.array) for one in done.steps)
        self.numbers = sum(math.prod(task.nest) for task in groups.tasks)
        self._taken = [(arrays[view.buffer], place) for place, view in enumerate(groups.inputs)]
        self._given_back = [(view, value.dtype) for view, value in groups.outputs]
        self._allocate()

    def _allocate(self) -> None:
        """Take memory of its own, and write down what a run does there."""
        done, arrays = self._program, self._numbered
        self._lock = threading.Lock()
        self._arena = torch.zeros(done.arena + 1, dtype=torch.float64)
        self._scratch = torch.zeros(done.scratch + BLOCK, dtype=torch.float64)
        self._arrays = (ctypes.c_void_p * (len(arrays) + 1))()
        self._arrays[0] = self._arena.data_ptr()
        self._constants = list[Tensor]()  # those that tasks read, which stay where they are
        for buffer, number in arrays.items():
            if isinstance(buffer.source, Tensor):
                value = buffer.source.detach()
                self._constants.append(value if buffer.positions else _precise(value))
                self._arrays[number] = self._constants[-1].data_ptr()
        self._steps = [self._step(one, arrays) for one in done.steps]
        self._results = [self._result(view, dtype) for view, dtype in self._given_back]

    @property
    def is_long(self) -> bool:
        """Whether a run takes so long, and so much of it in C, that two at once on two threads gain time."""
        return self.numbers >= LONG and self.numbers >= LONG_CALL * len(self._steps)

    def twin(self) -> Fused:
        """Return one that does the same in memory of its own, so that both can run at once."""
        other = copy.copy(self)
        other._allocate()
        return other

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run, without autograd."""
        with self._lock, torch.inference_mode():
            given = []
            for value, (shape, stride) in zip(inputs, self._layouts, strict=True):
                if value.shape != shape:
                    raise RuntimeError(f"expected inputs of shape {tuple(shape)}, got {tuple(value.shape)}.")
                if value.stride() != stride:
                    value = torch.empty_strided(shape, stride, dtype=value.dtype).copy_(value)
                given.append(value)
            held = [_precise(given[place]) for _, place in self._taken]
            for (number, _), value in zip(self._taken, held, strict=True):
                self._arrays[number] = value.data_ptr()
            run = _Run(given, {})
            for step in self._steps:
                step(run)
            return tuple(result(run) for result in self._results)

    # what is done ---------------------------------------------------------------------------------------------------

    def _step(self, one: array.array[int] | Foreign, arrays: dict[Buffer, int]) -> Callable[[_Run], object]:
        if isinstance(one, Foreign):
            return self._called(one, arrays)
        words = one.buffer_info()
        memory = ctypes.addressof(self._arrays), self._scratch.data_ptr(), self._program.registers
        run_program = self._run_program
        return lambda run: run_program(*words, *memory)

    def _called(self, one: Foreign, arrays: dict[Buffer, int]) -> Callable[[_Run], None]:
        function = binding_of(one.node)
        args, named = self._argument(one.args), self._argument([*one.kwargs.values()])
        results = [(view.buffer.source, arrays[view.buffer], view.sizes, view.strides) for view in one.results]
        table = self._arrays

        def called(run: _Run) -> None:
            found = function(*_at(run, args), **dict(zip(one.kwargs, _at(run, named), strict=True)))
            parts = (found,) if isinstance(found, Tensor) else found
            for part, (key, number, sizes, strides) in zip(parts, results, strict=True):
                if part.shape != sizes:
                    raise RuntimeError(f"expected {one.node} of shape {tuple(sizes)}, got {tuple(part.shape)}.")
                if part.stride() != strides:
                    part = torch.empty_strided(sizes, strides, dtype=part.dtype).copy_(part)
                run.foreign[key] = part
                run.foreign[number] = part = _precise(part)  # which stays for the run
                table[number] = part.data_ptr()

        return called

    def _argument(self, value: object) -> object:
        """Return an argument with tensors in the place of views, or what finds it in a run."""
        if isinstance(value, Given):
            return self._tensor(*value)
        if not isinstance(value, (list, tuple)):
            return value
        parts = [*map(self._argument, value)]
        changing = [(place, part) for place, part in enumerate(parts) if isinstance(part, _Found)]
        if not changing:
            return parts

        def filled(run: _Run) -> Sequence[object]:
            found = [*parts]
            for place, part in changing:
                found[place] = part.read(run)
            return found

        return _Found(filled)

    def _tensor(self, view: View, dtype: torch.dtype) -> Tensor | _Found:
        source = view.buffer.source
        if isinstance(source, Tensor):
            return torch.as_strided(source, view.sizes, view.strides, source.storage_offset() + view.offset).to(dtype)
        if source is None:
            begin = self._program.places[view.buffer] + view.offset
            fixed = torch.as_strided(self._arena, view.sizes, view.strides, begin)
            return fixed if dtype == torch.float64 else _Found(lambda run: fixed.to(dtype))

        def read(run: _Run) -> Tensor:
            value = run.given[source] if isinstance(source, int) else run.foreign[source]
            if view.offset != 0 or value.shape != view.sizes or value.stride() != view.strides:
                value = torch.as_strided(value, view.sizes, view.strides, value.storage_offset() + view.offset)
            return value if value.dtype == dtype else value.to(dtype)

        return _Found(read)

    def _result(self, view: View, dtype: torch.dtype) -> Callable[[_Run], Any]:
        found = self._tensor(view, dtype)
        return found.read if isinstance(found, _Found) else lambda run: found.clone()


class _Found(NamedTuple):
    """What is known in a run only."""

    read: Callable[[_Run], Any]


def _at(run: _Run, value: object) -> Any:
    return value.read(run) if isinstance(value, _Found) else value


def _precise(value: Tensor) -> Tensor:
    """Return numbers in double precision that lie as those of a tensor, of whatever type."""
    if value.dtype == torch.float64 or value.is_complex():  # which no task reads
        return value
    return torch.as_strided(value, (span(value),), (1,)).double()


# products, triangular systems and Cholesky factors of small matrices: number by number for all of a batch -------------

# Torch calls a library for each matrix of a batch, which takes a microsecond for a matrix of 3 by 3.
SMALL = 6  # rows or columns of a matrix that is taken apart
BATCH = 16  # matrices at least
PRODUCTS, PACKED = 2**20, 2**15  # numbers multiplied for one product, and numbers of its second factor, at most


def _product(groups: FusionGroups, call: Call) -> View:
    """Multiply one pair of matrices, or add their product to something."""
    *added, first, second = (groups.read(call, place) for place in range(len(call.args)))
    if call.kwargs:
        raise Unsuited
    view = _multiplied(groups, first.widened(0), second.widened(0)).at(0, 0)
    return groups.point(call.result, ADD, *added, view) if added else view


def _multiplied(groups: FusionGroups, first: View, second: View) -> View:
    """Multiply matrices (B, M, K) and (B, K, N), if these are not so large that torch does it faster."""
    batch, rows, inner = first.sizes
    columns = second.sizes[2]
    if rows * inner * columns > PRODUCTS or inner * columns > PACKED or first.index or second.index:
        raise Unsuited
    sizes = (batch, rows, columns)
    to = View(Buffer(prod(sizes), kept=True), 0, sizes, dense(sizes))
    one = Product(first, second, to, max(first.buffer.level, second.buffer.level))
    for view in one.taken:
        view.buffer.kept = True
    to.buffer.level = one.level
    groups.foreign.append(one)
    return to


def _products(groups: FusionGroups, call: Call) -> View:
    """Multiply matrices of a batch: number by number where rows and columns meet in few places."""
    first, second = groups.read(call, 0), groups.read(call, 1)
    rows, inner, columns = first.sizes[-2], first.sizes[-1], second.sizes[-1]
    if first.sizes[0] < BATCH or inner > SMALL or min(rows, columns) > SMALL or first.index or second.index:
        return _multiplied(groups, first, second)
    total: View | None = None
    for place in range(inner):
        one = groups.point(call.result, MUL, first.at(2, place).widened(2), second.at(1, place).widened(1))
        total = one if total is None else groups.point(call.result, ADD, total, one)
    if total is None:
        raise Unsuited
    return total


def _solved(groups: FusionGroups, call: Call) -> View:
    """Solve triangular systems, A X = B or X A = B, one row or column of X after the other."""
    factor, right, result = groups.read(call, 0), groups.read(call, 1), call.result
    size, rank, kwargs = factor.sizes[-1], result.dim(), call.kwargs
    if size > SMALL or prod(factor.sizes[:-2]) < BATCH or factor.index or right.index:
        raise Unsuited
    left, unit = kwargs.get("left", True), kwargs.get("unitriangular", False)
    axis = rank - 2 if left else rank - 1
    first, second = (rank - 2, rank - 2) if left else (rank - 1, rank - 2)  # axes of entries, one after the other
    order = [*range(size)][:: -1 if kwargs["upper"] == left else 1]
    batch = tuple(result.shape[:-2])
    factor, right = _over(factor, batch), _over(right, batch)
    found: dict[int, View] = {}
    for row in order:
        rest = right.at(axis, row)
        for known in found:
            entry = factor.at(first, row).at(second, known).widened(rank - 2)
            rest = groups.point(None, SUB, rest, groups.point(None, MUL, entry, found[known]))
        diagonal = factor.at(first, row).at(second, row).widened(rank - 2)
        found[row] = rest if unit else groups.point(None, DIV, rest, diagonal)
    return side_by_side(groups, [found[row].widened(axis) for row in range(size)], axis, result)


def _over(view: View, batch: tuple[int, ...]) -> View:
    """Return a view of matrices with as many axes before them as a batch has."""
    for _ in range(len(batch) + 2 - len(view.sizes)):
        view = view.widened(0)
    return view


def _factored(groups: FusionGroups, call: Call) -> View:
    """Return Cholesky factors, whose entries are not numbers where a matrix is not positive definite."""
    matrix, result = groups.read(call), call.result
    size, rank = matrix.sizes[-1], result.dim()
    if any(call.kwargs.values()) or size > SMALL or prod(matrix.sizes[:-2]) < BATCH or matrix.index:
        raise Unsuited
    found: dict[tuple[int, int], View] = {}
    for column in range(size):
        for row in range(column, size):
            entry = matrix.at(rank - 2, row).at(rank - 2, column)
            for known in range(column):
                entry = groups.point(None, SUB, entry, groups.point(None, MUL, found[row, known], found[column, known]))
            found[row, column] = (
                groups.point(None, SQRT, entry)
                if row == column
                else groups.point(None, DIV, entry, found[column, column])
            )
    buffer, strides = Buffer(span(result), fill=0.0), result.stride()
    for (row, column), view in found.items():
        begin = row * strides[-2] + column * strides[-1]
        groups.add(IDENTITY, [view], View(buffer, begin, view.sizes, strides[:-2]), STORE)
    return groups.whole(result, buffer)


MATRICES: dict[str, Rule] = {
    "mm": _product,
    "addmm": _product,
    "bmm": _products,
    "linalg_solve_triangular": _solved,
    "linalg_cholesky_ex": _factored,
}
