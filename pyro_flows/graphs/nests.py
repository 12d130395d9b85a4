"""Operations of a recorded graph put into nests: loops over the same numbers, which are run block by block.

Each result is a *buffer* of double precision numbers, and a view of one is an offset, sizes and strides. What a run of
the graph gave says which results share memory and how they lie there. An operation is a *task*: it is done for all
numbers of its nest. It belongs to the *level* after those that it waits for, or to theirs, where it takes number by
number what they made. Tasks of one level and of the same sizes are one nest: between them, numbers stay in registers.

What is no task is *foreign*, and left to torch: matrix products, decompositions, special functions.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, fx

from pyro_flows.graphs.graph import is_aten
from pyro_flows.graphs.points import (
    ADD,
    COMPARED,
    EXP,
    FILL,
    IDENTITY,
    ISINF,
    LARGEST,
    LOG,
    POINTS,
    SUB,
    SUMS,
    TIMES,
    WHERE,
)

_aten = torch.ops.aten
STORE, ADD_UP, MAXIMUM, MINIMUM = 1, 3, 4, 5  # what is done with results; see native.c
CHAINED = (IDENTITY, FILL, WHERE, *COMPARED)  # whose results may be boolean
_SAME = (_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.lift_fresh_copy.default)
_CAST = (_aten._to_copy.default, _aten.to.dtype)
_MADE = ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like", "empty_like")


class Unsuited(Exception):
    """An operation is no task."""


@dataclass(eq=False)
class Buffer:
    """Numbers that lie one after the other: an input, a constant, what tasks made, or a foreign result.

    Attributes:
        span: how many numbers.
        source: an input's number, a constant tensor, or the node and the place of a foreign result; None for tasks.
        level: of the last task that writes it; the next one may read it.
        maker: the task that makes all of it, number by number.
        kept: whether it has to be in memory.
        fill: what is in it before tasks add to it.
        positions: whether it holds indices.
    """

    span: int
    source: Any = None
    level: int = -1
    maker: Task | None = None
    kept: bool = False
    fill: float | None = None
    positions: bool = False


@dataclass(frozen=True)
class View:
    """Numbers of a buffer; ``index`` gives the positions along one dimension."""

    buffer: Buffer
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    boolean: bool = False
    index: Buffer | None = None
    along: int = -1


@dataclass(eq=False)
class Task:
    """One instruction for all numbers of a nest: operands, and the view of the buffer that the results go to."""

    code: int
    operands: tuple[View, ...]
    number: float
    to: View
    action: int
    nest: tuple[int, ...]
    level: int = 0


@dataclass(eq=False)
class Foreign:
    """An operation that torch does, after the tasks of its level."""

    node: fx.Node
    args: Any
    kwargs: Any
    level: int
    results: list[View] = field(default_factory=list)


def dense(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of numbers that lie in the order of their sizes."""
    return tuple(prod(sizes[place + 1 :]) for place in range(len(sizes)))


class Nests:
    """The tasks and the foreign operations of a graph, and where its results are.

    Args:
        module: a graph without changes in place.
        inputs: to run it with.
        narrow: at most so many times as many numbers as a buffer has, for a foreign result.

    Attributes:
        tasks: in order.
        foreign: in order.
        outputs: a view for each result, and the result itself.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.tasks: list[Task] = []
        self.foreign: list[Foreign] = []
        self.views: dict[fx.Node, Any] = {}
        self.real: dict[fx.Node, Any] = {}
        self.owner: dict[int, tuple[Buffer, int]] = {}  # of a storage: buffer, and where it begins
        self.outputs: list[tuple[View, Tensor]] = []
        left = iter(enumerate(inputs))
        for node in module.graph.nodes:
            if node.op == "placeholder":
                number, value = next(left)
                self._own(node, value, Buffer(span(value), source=number))
            elif node.op == "get_attr":
                self._constant(node, getattr(module, str(node.target)).detach())
            elif node.op == "output":
                for part in node.args[0]:
                    view = self.views[part]
                    keep(view)
                    self.outputs.append((view, self.real[part]))
            else:
                self._operation(node)
        self._put_off()
        for task in self.tasks:
            for view in task.operands:
                if not (view.buffer.level == task.level and is_aligned(view, task.nest)):
                    keep(view)

    def _put_off(self) -> None:
        """Do the tasks of a nest with later ones of the same sizes, if nothing waits for them in between."""
        groups: defaultdict[tuple[int, ...], defaultdict[int, list[Task]]] = defaultdict(lambda: defaultdict(list))
        readers: defaultdict[Buffer, list[tuple[Task, View]]] = defaultdict(list)
        for task in self.tasks:
            groups[task.nest][task.level].append(task)
            for view in task.operands:
                readers[view.buffer].append((task, view))
        needed = {view.buffer: one.level for one in reversed(self.foreign) for view in views_in((one.args, one.kwargs))}

        def can_wait(task: Task, level: int) -> bool:
            if needed.get(task.to.buffer, level) < level:
                return False
            for reader, view in readers[task.to.buffer]:
                together = is_aligned(view, reader.nest)
                if not (together and reader.level == task.level) and reader.level < level + (not together):
                    return False
            return True

        for levels in groups.values():
            *earlier, goal = sorted(levels)
            for level in reversed(earlier):
                if not all(can_wait(task, goal) for task in levels[level]):
                    goal = level
                    continue
                for task in levels[level]:
                    task.level = goal
                    task.to.buffer.level = max(task.to.buffer.level, goal)

    # what results are ---------------------------------------------------------------------------------------------

    def _own(self, node: fx.Node, value: Tensor, buffer: Buffer) -> None:
        self.real[node], self.views[node] = value, self._whole(value, buffer)
        self.owner.setdefault(value.untyped_storage()._cdata, (buffer, value.storage_offset()))

    @staticmethod
    def _whole(value: Tensor, buffer: Buffer) -> View:
        return View(buffer, 0, tuple(value.shape), value.stride(), value.dtype == torch.bool)

    def _constant(self, node: fx.Node, value: Tensor) -> None:
        self.real[node] = value
        self.views[node] = self._whole(value, Buffer(span(value), source=value))

    def _operation(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.real.__getitem__)  # type: ignore[misc]
        result = self._run(node, args, kwargs)
        self.real[node] = result
        known = [self.views[part] for part in node.all_input_nodes]
        if not isinstance(result, Tensor):
            if node.target is operator.getitem:
                self.views[node] = self.views[node.args[0]][node.args[1]]  # type: ignore[index]
                return
            parts = [self._shared(part) for part in result] if isinstance(result, (list, tuple)) else [None]
            self.views[node] = parts if all(part is not None for part in parts) else self._leave(node, result)
            return
        if node.target is operator.getitem:
            self.views[node] = self.views[node.args[0]][node.args[1]]  # type: ignore[index]
        elif all(_is_constant(view) for view in known) or _name(node) in _MADE:
            self._constant(node, result)
        elif (shared := self._shared(result)) is not None:
            self.views[node] = shared
        else:
            try:
                self.views[node] = self._made(node, result)
            except Unsuited:
                self.views[node] = self._leave(node, result)
            buffer = self.views[node].buffer
            self.owner[result.untyped_storage()._cdata] = buffer, result.storage_offset() - self.views[node].offset

    @staticmethod
    def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is _aten.view.default:
            return torch.reshape(*args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _shared(self, value: Any) -> View | None:
        """Return the view of a buffer that shares memory with a result, if one does."""
        known = self.owner.get(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None
        if known is None:
            return None
        buffer, begin = known
        offset = value.storage_offset() - begin
        return View(buffer, offset, tuple(value.shape), value.stride(), value.dtype == torch.bool)

    def _leave(self, node: fx.Node, result: Any) -> Any:
        """Leave an operation to torch."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.views.__getitem__)  # type: ignore[misc]
        taken = [view for part in node.all_input_nodes for view in views_in(self.views[part])]
        for view in taken:
            keep(view)
        one = Foreign(node, args, kwargs, max((view.buffer.level for view in taken), default=-1))
        self.foreign.append(one)
        parts = [result] if isinstance(result, Tensor) else list(result)
        for place, part in enumerate(parts):
            buffer = Buffer(span(part), source=(node, place), level=one.level, kept=True)
            one.results.append(self._whole(part, buffer))
            self.owner[part.untyped_storage()._cdata] = buffer, part.storage_offset()
        return one.results[0] if isinstance(result, Tensor) else one.results

    def _need_numbers(self, node: Any) -> None:
        """Raise :class:`Unsuited` if numbers have another precision, or are boolean and not ours."""
        value, view = self.real[node], self.views[node]
        if not isinstance(value, Tensor) or value.dtype.is_complex or not value.numel():
            raise Unsuited
        if isinstance(view.buffer.source, Tensor):
            return  # made double precision
        if value.dtype != torch.float64 and (value.dtype != torch.bool or view.buffer.source is not None):
            raise Unsuited

    # tasks --------------------------------------------------------------------------------------------------------

    def _made(self, node: fx.Node, result: Tensor) -> View:
        """Make an operation one task or some; raise :class:`Unsuited` if it is none."""
        if not is_aten(node) or not result.numel() or result.dtype not in (torch.float64, torch.bool):
            raise Unsuited
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.views.__getitem__)  # type: ignore[misc]
        target = node.target
        if target in (_aten.index_select.default, _aten.gather.default):
            return self._picked(node, args, result)
        if target is _aten.index_add.default and not kwargs:
            return self._spread(node, args, result)
        for part in node.all_input_nodes:
            self._need_numbers(part)
        if target in SUMS:
            return self._summed(args[0], _axes(args, kwargs), result, SUMS[target] == 0.0)
        if target in LARGEST:
            action = MAXIMUM if target is _aten.amax.default else MINIMUM
            return self._reduced(args[0], _axes(args, kwargs), result, action, LARGEST[target])
        if target in (_aten.cat.default, _aten.stack.default):
            return self._joined(target, args, kwargs, result)
        if target in (_aten.slice_backward.default, _aten.select_backward.default):
            return self._placed(target, args, result)
        if target is _aten.constant_pad_nd.default:
            return self._padded(args, result)
        if target is _aten.flip.default:
            return self._flipped(args, result)
        if target is _aten.logsumexp.default:
            return self._log_of_sum(args[0], args[1], result)
        if target is _aten.copy.default:
            return self.point(result, IDENTITY, args[1])
        if target in _SAME or target in _CAST:
            return self._same(args[0], result)
        write = POINTS.get(target)
        if write is None:
            raise Unsuited
        return self._point(write, args, kwargs, result)

    def _point(self, write: Callable[..., Any], args: Any, kwargs: Any, result: Tensor) -> View:
        count = len(self.tasks)

        def emit(code: int, *operands: Any, number: float = 0.0) -> View:
            if not all(isinstance(part, View) for part in operands) or (result.dtype == torch.bool and code not in CHAINED):
                raise Unsuited
            return self.point(result, code, *operands, number=number)

        try:
            found = write(emit, *args, **kwargs)
        except (TypeError, Unsuited):
            found = NotImplemented
        if not isinstance(found, View) or found.sizes != tuple(result.shape):
            del self.tasks[count:]
            raise Unsuited
        return found

    def point(self, like: Tensor, code: int, *operands: View, number: float = 0.0) -> View:
        """Add a task whose results lie as those of ``like``, one for each number of its operands."""
        sizes = broadcast([view.sizes for view in operands] + ([tuple(like.shape)] if code == IDENTITY else []))
        strides = like.stride() if sizes == like.shape else dense(sizes)
        buffer = Buffer(1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)))
        to = View(buffer, 0, tuple(sizes), tuple(strides), like.dtype == torch.bool)
        self._add(code, operands, number, to, STORE)
        buffer.maker = self.tasks[-1]
        return to

    def _add(self, code: int, operands: Sequence[View], number: float, to: View, action: int, sizes: Any = None) -> None:
        sizes = to.sizes if sizes is None else sizes
        taken = tuple(spread_over(view, sizes) for view in operands)
        task = Task(code, taken, number, to, action, to_nest(sizes))
        task.level = max(level_for(view, task.nest) for view in taken)
        to.buffer.level = max(to.buffer.level, task.level)
        self.tasks.append(task)

    def _same(self, view: View, result: Tensor) -> View:
        """Take a copy for what it is a copy of, if it lies in memory as that does."""
        if result.dtype == torch.bool and not view.boolean:
            raise Unsuited
        if view.strides == result.stride() and view.offset == 0 and view.index is None and view.buffer.span == span(result):
            return View(view.buffer, 0, view.sizes, view.strides, result.dtype == torch.bool)
        return self.point(result, IDENTITY, view)

    def _summed(self, view: View, axes: Sequence[int] | None, result: Tensor, mean: bool) -> View:
        total = self._reduced(view, axes, result, ADD_UP, 0.0)
        if not mean:
            return total
        return self.point(result, TIMES, total, number=result.numel() / prod(view.sizes))

    def _reduced(self, view: View, axes: Sequence[int] | None, result: Tensor, action: int, fill: float) -> View:
        rank = len(view.sizes)
        gone = {axis % rank for axis in axes} if axes else set(range(rank))
        kept = [axis for axis in range(rank) if axis not in gone]
        strides = iter(result.stride() if result.dim() == len(kept) else [result.stride()[axis] for axis in kept])
        onto = tuple(0 if axis in gone else next(strides) for axis in range(rank))
        buffer = Buffer(span(result), fill=fill)
        self._add(IDENTITY, [view], 0.0, View(buffer, 0, view.sizes, onto), action)
        return self._whole(result, buffer)

    def _log_of_sum(self, view: View, axes: Sequence[int], result: Tensor) -> View:
        """Add exponentials of what is left of numbers without the largest of each sum, if that is finite."""
        rank = len(view.sizes)
        gone = {axis % rank for axis in ([axes] if isinstance(axes, int) else axes)} or set(range(rank))
        single = [1 if axis in gone else size for axis, size in enumerate(view.sizes)]
        like = result.new_empty(()).expand(single).contiguous()
        largest = self._reduced(view, [*gone], like, MAXIMUM, -inf)
        largest = self.point(like, FILL, largest, self.point(like, ISINF, largest))
        whole = result.new_empty(()).expand(view.sizes).contiguous()
        away = self.point(whole, EXP, self.point(whole, SUB, view, largest))
        total = self.point(like, LOG, self._reduced(away, [*gone], like, ADD_UP, 0.0))
        found = self.point(like, ADD, total, largest)
        if result.dim() == rank:
            return found
        strides = tuple(stride for axis, stride in enumerate(found.strides) if axis not in gone)
        return self.point(result, IDENTITY, View(found.buffer, 0, tuple(result.shape), strides))

    def _padded(self, args: Any, result: Tensor) -> View:
        """Put a tensor into a larger one that is filled with a number."""
        view, pads = args[0], args[1]
        if any(pad < 0 for pad in pads):
            raise Unsuited
        buffer = Buffer(span(result), fill=float(args[2]) if len(args) > 2 else 0.0)
        begin = sum(pad * stride for pad, stride in zip(pads[::2], reversed(result.stride()), strict=False))
        self._add(IDENTITY, [view], 0.0, View(buffer, begin, view.sizes, result.stride()), STORE)
        return self._whole(result, buffer)

    def _flipped(self, args: Any, result: Tensor) -> View:
        """Read a tensor backwards along some axes."""
        view, rank = args[0], result.dim()
        if view.index is not None:
            raise Unsuited
        strides, offset = [*view.strides], view.offset
        for axis in {axis % rank for axis in args[1]}:
            offset += (view.sizes[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
        return self.point(result, IDENTITY, View(view.buffer, offset, view.sizes, tuple(strides), view.boolean))

    def _joined(self, target: Any, args: Any, kwargs: Any, result: Tensor) -> View:
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.dim()
        buffer, whole, begin = Buffer(span(result)), result.stride(), 0
        for view in args[0]:
            if target is _aten.stack.default:
                sizes, strides = view.sizes, whole[:axis] + whole[axis + 1 :]
                length = 1
            else:
                sizes, strides, length = view.sizes, whole, view.sizes[axis] if len(view.sizes) == result.dim() else 0
            if length and prod(sizes):
                to = View(buffer, begin * whole[axis], sizes, tuple(strides), view.boolean)
                self._add(IDENTITY, [view], 0.0, to, STORE)
            begin += length
        return self._whole(result, buffer)

    def _placed(self, target: Any, args: Any, result: Tensor) -> View:
        """Put the gradient of a part of a tensor where the part is, and zeros elsewhere."""
        view, axis = args[0], args[2] % result.dim()
        strides = list(result.stride())
        buffer = Buffer(span(result), fill=0.0)
        if target is _aten.slice_backward.default:
            begin = slice(args[3], args[4], args[5]).indices(result.shape[axis])[0] * strides[axis]
            strides[axis] *= args[5]
        else:
            begin = (args[3] % result.shape[axis]) * strides.pop(axis)
        if prod(view.sizes):
            self._add(IDENTITY, [view], 0.0, View(buffer, begin, view.sizes, tuple(strides)), ADD_UP)
        return self._whole(result, buffer)

    def _picked(self, node: fx.Node, args: Any, result: Tensor) -> View:
        """Read entries along one dimension, in the order of constant indices."""
        source, axis = args[0], args[1] % max(result.dim(), 1)
        self._need_numbers(node.args[0])
        index = self._positions(node.args[2], axis, node.target is _aten.gather.default)
        if source.index is not None or len(source.sizes) != result.dim() or node.kwargs:
            raise Unsuited
        taken = View(source.buffer, source.offset, tuple(result.shape), source.strides, source.boolean, index, axis)
        return self.point(result, IDENTITY, taken)

    def _spread(self, node: fx.Node, args: Any, result: Tensor) -> View:
        """Add rows to zeros, at constant indices."""
        zeros, axis, view = self.real[node.args[0]], args[1] % max(result.dim(), 1), args[3]  # type: ignore[index]
        self._need_numbers(node.args[3])
        if not _is_constant(args[0]) or bool(zeros.any()) or not prod(view.sizes):
            raise Unsuited
        index = self._positions(node.args[2], axis, False)
        buffer = Buffer(span(result), fill=0.0)
        to = View(buffer, 0, view.sizes, result.stride(), False, index, axis)
        self._add(IDENTITY, [view], 0.0, to, ADD_UP)
        return self._whole(result, buffer)

    def _positions(self, node: Any, axis: int, spread: bool) -> Buffer:
        """Return constant indices along an axis, of which there may be copies along the others."""
        value, view = self.real[node], self.views[node]
        if not _is_constant(view):
            raise Unsuited
        if spread and value.dim() > 1:
            first = value[tuple(slice(None) if place == axis else slice(0, 1) for place in range(value.dim()))]
            if not bool((value == first).all()):
                raise Unsuited
            value = first.flatten()
        value = value.reshape(-1).to(torch.int64)
        if len(value) < 2 or bool((value < 0).any()):
            raise Unsuited
        return Buffer(len(value), source=value.contiguous(), positions=True)


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::") if is_aten(node) else ""  # type: ignore[union-attr]


def views_in(value: Any) -> Iterator[View]:
    """Yield the views in arguments of an operation."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from views_in(part)
    elif isinstance(value, dict):
        yield from views_in([*value.values()])


def _is_constant(views: Any) -> bool:
    return all(isinstance(view.buffer.source, Tensor) for view in views_in(views))


def _axes(args: Any, kwargs: Any) -> Sequence[int] | None:
    if kwargs.get("dtype") is not None:
        raise Unsuited
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    return [axes] if isinstance(axes, int) else axes


def span(value: Tensor) -> int:
    """Return how many numbers lie between the first and the last one of a tensor, with both."""
    if not value.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


def keep(view: View) -> None:
    view.buffer.kept = True


def spread_over(view: View, sizes: Sequence[int]) -> View:
    """Return a view of the sizes of a nest, with strides of zero where one number is for all."""
    more = len(sizes) - len(view.sizes)
    old = zip(view.sizes, view.strides, sizes[more:], strict=True)
    strides = (0,) * more + tuple(0 if size == 1 != wanted else stride for size, stride, wanted in old)
    along = view.along + more if view.index is not None else -1
    return View(view.buffer, view.offset, tuple(sizes), strides, view.boolean, view.index, along)


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the sizes that go with all shapes; torch's function takes a hundred times as long."""
    whole = shapes[0]
    for shape in shapes[1:]:
        if shape != whole:
            rank = max(len(shape), len(whole))
            one, other = ((1,) * (rank - len(part)) + part for part in (shape, whole))
            whole = tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))
    return whole


def to_nest(sizes: Iterable[int]) -> tuple[int, ...]:
    """Return the sizes of a nest: those above one."""
    return tuple(size for size in sizes if size > 1)


def strides_in_nest(view: View) -> tuple[int, ...]:
    return tuple(stride for size, stride in zip(view.sizes, view.strides, strict=True) if size > 1)


def is_aligned(view: View, nest: tuple[int, ...]) -> bool:
    """Whether a view takes number by number what one task made in a nest of the same sizes."""
    maker = view.buffer.maker
    if maker is None or view.offset or view.index is not None or to_nest(maker.to.sizes) != nest:
        return False
    return strides_in_nest(maker.to) == strides_in_nest(view)


def level_for(view: View, nest: tuple[int, ...]) -> int:
    """Return the first level at which a view can be read in a nest."""
    level = view.buffer.level
    if is_aligned(view, nest):
        return level
    return level + 1
