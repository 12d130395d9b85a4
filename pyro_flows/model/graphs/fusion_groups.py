"""Operations of a recorded graph put into nests of loops over the same numbers, which are run block by block.

Each result is a *buffer* of double precision numbers, and a view of one is an offset, sizes and strides. What a run of
the graph gave says which results share memory and how they lie there. An operation is a *task*: it is done for all
numbers of its nest. It belongs to the *level* after those that it waits for, or to theirs, where it takes number by
number what they made. Tasks of one level and of the same sizes are one nest: between them, numbers stay in registers.
What is the same along an axis is computed once: its view has a stride of zero there.

What is no task is *foreign*, and left to torch: matrix products, decompositions, special functions.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from pyro_flows.model.graphs.graph import has_tag, int_at, is_aten, node_at, operation_of
from pyro_flows.model.graphs.points import COMPARED, FLOATS, IDENTITY, POINTS, Operand, is_truth
from pyro_flows.model.graphs.recording import kind_of
from pyro_flows.model.graphs.views import (
    STORE,
    Buffer,
    Call,
    Foreign,
    Given,
    Product,
    Sizes,
    Task,
    Unsuited,
    View,
    broadcast,
    dense,
    is_aligned,
    reach,
    span,
    spread_over,
    strides_in_nest,
    views_in,
)
from pyro_flows.support.numbers.tensors import storage_of

_aten = torch.ops.aten
NUMBERS = torch.float64, torch.float32, torch.bool  # all of them double precision here
LOOKED_AT = 2**20  # numbers of a constant that may be the same along an axis
Value = TypeVar("Value", Tensor, View)
Rule = Callable[["FusionGroups", Call], View]  # adds the tasks of an operation, and returns its result


class FusionGroups:
    """The tasks and the foreign operations of a graph, and where its results are.

    Args:
        module: a graph without changes in place.
        inputs: to run it with.
        rules: for operations that do not act on each number by itself, by name.

    Attributes:
        tasks: in order.
        foreign: operations of torch's and products of matrices, in order.
        inputs: a view for each.
        outputs: a view for each result, and the result itself.
        views: of the result of each operation.
        real: these results, of this run.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        self.tasks: list[Task] = []
        self.foreign: list[Foreign | Product] = []
        self.views: dict[fx.Node, View | list[View]] = {}
        self.real: dict[fx.Node, object] = {}
        self.owner: dict[int, tuple[Buffer, int, torch.dtype]] = {}  # of a storage: buffer, where it begins, and dtype
        self.inputs: list[View] = []
        self.outputs: list[tuple[View, Tensor]] = []
        left = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.real[node] = value = next(left)
                self.views[node] = view = self.whole(value, Buffer(span(value), source=len(self.inputs)))
                self.inputs.append(view)
                self._own(value, view)
            elif node.op == "get_attr":
                value = getattr(module, str(node.target))
                self._constant(node, value.detach(), changes=value.requires_grad)
            elif node.op == "output":
                for part in node.args[0]:
                    if part not in self.views:
                        raise Unsuited
                    view = self.view(part)
                    view.buffer.kept = True
                    self.outputs.append((view, self.tensor(part)))
            else:
                self._operation(node)
        self._put_off()
        for task in self.tasks:
            for view in task.operands:
                if not (view.buffer.level == task.level and is_aligned(view, task.nest)):
                    view.buffer.kept = True

    def _put_off(self) -> None:
        """Do the tasks of a nest with later ones of the same sizes, if nothing waits for them in between."""
        groups: defaultdict[Sizes, defaultdict[int, list[Task]]] = defaultdict(lambda: defaultdict(list))
        readers: defaultdict[Buffer, list[tuple[Task, bool]]] = defaultdict(list)
        for task in self.tasks:
            groups[task.nest][task.level].append(task)
            for view in task.operands:
                readers[view.buffer].append((task, is_aligned(view, task.nest)))
        needed: dict[Buffer, int] = {}
        for one in self.foreign:
            needed |= {view.buffer: min(one.level, needed.get(view.buffer, one.level)) for view in one.taken}

        def can_wait(task: Task, level: int) -> bool:
            if needed.get(task.to.buffer, level) < level:
                return False
            return all(
                (together and reader.level == task.level) or reader.level >= level + (not together)
                for reader, together in readers[task.to.buffer]
            )

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

    @staticmethod
    def whole(value: Tensor, buffer: Buffer, offset: int = 0) -> View:
        """Return the view that lies in a buffer as a result lies in its memory."""
        return View(buffer, offset, tuple(value.shape), value.stride(), value.dtype == torch.bool)

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the result of an operation that has one."""
        value = self.real[node]
        if not isinstance(value, Tensor):
            raise Unsuited
        return value

    def view(self, node: fx.Node) -> View:
        """Return the view of the result of an operation that has one."""
        view = self.views[node]
        if not isinstance(view, View):
            raise Unsuited
        return view

    def _constant(self, node: fx.Node, value: Tensor, *, changes: bool = False) -> None:
        if not changes and 1 < value.numel() <= LOOKED_AT:
            shape = value.shape
            for axis in range(value.dim()):
                first = value.narrow(axis, 0, 1)
                value = first if bool((value == first).all()) else value
            value = value.expand(shape)
        self.real[node] = value
        self.views[node] = view = self.whole(value, Buffer(span(value), source=value, changes=changes))
        if changes:
            self._own(value, view)

    def _own(self, value: Tensor, view: View) -> None:
        """Know the buffer of a result, for those that share memory with it."""
        self.owner[storage_of(value)] = view.buffer, int(value.storage_offset()) - view.offset, value.dtype

    def _operation(self, node: fx.Node) -> None:
        args, kwargs = _mapped(node, self.real)
        views = (_aten.view.default, _aten._unsafe_view.default)
        assert callable(node.target)
        function: Callable[..., object] = torch.reshape if node.target in views else node.target
        if has_tag(node, torch.Tag.pointwise) and not has_tag(node, torch.Tag.nondeterministic_seeded):
            function = partial(_once, function)
        result = self.real[node] = function(*args, **kwargs)
        if node.target is operator.getitem:
            several = self.views[node_at(node, 0)]
            assert isinstance(several, list)
            self.views[node] = several[int_at(node, 1)]
        elif not isinstance(result, (Tensor, list, tuple)):
            raise Unsuited
        elif not isinstance(result, Tensor):
            parts = [self._shared(part) for part in result]
            shared = [part for part in parts if part is not None]
            self.views[node] = shared if len(shared) == len(parts) else self._several(node, result)
        elif all(view.buffer.constant for part in node.all_input_nodes for view in views_in(self.views[part])) or (
            is_aten(node) and kind_of(operation_of(node)).by_shape
        ):
            self._constant(node, result)
        elif (view := self._shared(result)) is not None:
            self.views[node] = view
        else:
            try:
                self.views[node] = self._made(node, result)
            except Unsuited:
                (self.views[node],) = self._leave(node, [result])

    def _several(self, node: fx.Node, results: Sequence[Tensor]) -> list[View]:
        """Return the views of an operation with several results, of which the first may be all that is used."""
        if all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
            with suppress(Unsuited):
                return [self._made(node, results[0])]
        return self._leave(node, results)

    def _shared(self, value: object) -> View | None:
        """Return the view of a buffer that shares memory with a result, if one does."""
        if not isinstance(value, Tensor) or storage_of(value) not in self.owner:
            return None
        buffer, begin, dtype = self.owner[storage_of(value)]
        if value.dtype != dtype or value.is_conj() or value.is_neg():
            raise Unsuited  # such as parts of complex numbers
        return self.whole(value, buffer, int(value.storage_offset()) - begin)

    def _leave(self, node: fx.Node, results: Sequence[Tensor]) -> list[View]:
        """Leave an operation to torch."""
        if not all(isinstance(part, Tensor) for part in results):
            raise Unsuited
        axes = _repeated(results)
        given = {part: Given(_thin(self.view(part), axes), self.tensor(part).dtype) for part in node.all_input_nodes}
        one = Foreign(node, *_mapped(node, given))
        one.level = max((view.buffer.level for view in one.taken), default=-1)
        self.foreign.append(one)
        for view in one.taken:
            view.buffer.kept = True
        views = list[View]()
        for place, part in enumerate(results):
            views.append(self.whole(part, Buffer(span(part), source=(node, place), level=one.level, kept=True)))
            one.results.append(_thin(views[-1], axes))
            self._own(part, views[-1])
        return views

    # tasks --------------------------------------------------------------------------------------------------------

    def _made(self, node: fx.Node, result: Tensor) -> View:
        """Make an operation one task or some; raise :class:`Unsuited` if it is none."""
        tasks, foreign = len(self.tasks), len(self.foreign)
        try:
            view = self._tasks_for(node, result)
            like = self.whole(result, view.buffer)
            if view.sizes != like.sizes or strides_in_nest(view) != strides_in_nest(like):
                raise Unsuited
        except (Unsuited, TypeError):
            del self.tasks[tasks:], self.foreign[foreign:]
            raise Unsuited from None
        self._own(result, view)
        return view

    def _tasks_for(self, node: fx.Node, result: Tensor) -> View:
        if not is_aten(node) or not result.numel() or result.dtype not in NUMBERS:
            raise Unsuited
        call = Call(node, *_mapped(node, self.views), result)
        if call.name in self.rules:
            return self.rules[call.name](self, call)
        if call.name not in POINTS:
            raise Unsuited
        for part in node.all_input_nodes:
            self.need_numbers(part)
        dtypes = {self.tensor(part).dtype for part in node.all_input_nodes}
        truth = result.dtype == torch.bool
        if truth and len(dtypes & FLOATS) > 1:
            raise Unsuited  # torch may compare in either precision

        def emit(code: int, *operands: Operand, number: float = 0.0) -> View:
            views = [part for part in operands if isinstance(part, View)]
            if len(views) < len(operands):
                raise Unsuited
            if truth and not is_truth(code, views, number):
                raise Unsuited  # such as the sum of truths
            if code in COMPARED and torch.float32 in dtypes:
                number = float(torch.tensor(number, dtype=torch.float32))  # as it is compared there
            return self.point(result, code, *views, number=number)

        return POINTS[call.name](emit, *call.args, **call.kwargs)

    def read(self, call: Call, place: int = 0) -> View:
        """Return an argument whose numbers tasks can read; raise :class:`Unsuited` if they cannot."""
        self.need_numbers(node_at(call.node, place))
        return call.view(place)

    def need_numbers(self, node: fx.Node) -> None:
        """Raise :class:`Unsuited` if a value is none that tasks can read: it is empty, complex, or not precise."""
        value = self.tensor(node)
        if not value.numel() or value.dtype.is_complex:
            raise Unsuited
        buffer = self.view(node).buffer  # of a parameter of another type, there would be a copy that stays what it is
        if not buffer.constant and value.dtype not in ((torch.float64,) if buffer.changes else NUMBERS):
            raise Unsuited

    def point(self, like: Tensor | None, code: int, *operands: View, number: float = 0.0) -> View:
        """Add a task with one result for each number of its operands, in memory as ``like``, or else in their order."""
        shapes = [view.sizes for view in operands]
        sizes = broadcast(shapes if like is None or code != IDENTITY else [*shapes, tuple(like.shape)])
        if like is None or sizes != like.shape:
            axes = _repeated(operands)
            strides = dense([1 if axis - len(sizes) in axes else size for axis, size in enumerate(sizes)])
            strides = tuple(0 if axis - len(sizes) in axes else step for axis, step in enumerate(strides))
        else:
            axes, strides = _repeated([like]), like.stride()
        to = View(Buffer(reach(sizes, strides)), 0, sizes, strides, like is not None and like.dtype == torch.bool)
        self.add(code, [_thin(view, axes) for view in operands], _thin(to, axes), STORE, number=number)
        to.buffer.maker = self.tasks[-1]
        return to

    def add(self, code: int, operands: Sequence[View], to: View, action: int, *, number: float = 0.0) -> None:
        """Add a task for all numbers of ``to``."""
        taken = tuple(spread_over(view, to.sizes) for view in operands)
        task = Task(code, taken, number, to, action, tuple(size for size in to.sizes if size > 1))
        task.level = max(view.buffer.level + (not is_aligned(view, task.nest)) for view in taken)
        to.buffer.level = max(to.buffer.level, task.level)
        self.tasks.append(task)


# numbers that are the same along an axis, since a plate expands its parameters to all of its rows ---------------------


def _repeated(values: Sequence[object]) -> set[int]:
    """Return the axes, counted from the last one, along which all of these tensors or views are expanded."""
    wide, fixed = set[int](), set[int]()
    for part in values:
        if isinstance(part, (Tensor, View)):
            sizes, strides = (part.shape, part.stride()) if isinstance(part, Tensor) else (part.sizes, part.strides)
            for axis in range(-len(sizes), 0):
                (fixed if strides[axis] else wide).update([axis] if sizes[axis] > 1 else [])
    return wide - fixed


def _once(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Apply an operation on each number by itself once for numbers that are the same along an axis."""
    axes = _repeated(args) if not any(isinstance(part, Tensor) for part in kwargs.values()) else set()
    if not axes:
        return function(*args, **kwargs)
    sizes = broadcast([tuple(part.shape) for part in args if isinstance(part, Tensor)])
    thin = [_thin(part, axes) if isinstance(part, Tensor) else part for part in args]
    result = function(*thin, **kwargs)
    return result.expand(sizes) if isinstance(result, Tensor) else function(*args, **kwargs)


def _thin(value: Value, axes: Collection[int]) -> Value:
    """Return a tensor or a view with one place along these axes, counted from the last one."""
    if isinstance(value, Tensor):
        for axis in axes:
            value = value.narrow(axis, 0, 1) if -axis <= value.dim() else value
        return value
    rank = len(value.sizes)
    if not any(-axis <= rank and value.sizes[axis] > 1 for axis in axes):
        return value
    if any(value.sizes[axis] > 1 and value.strides[axis] for axis in axes if -axis <= rank):
        raise Unsuited
    return replace(value, sizes=tuple(1 if axis - rank in axes else size for axis, size in enumerate(value.sizes)))


def _mapped(node: fx.Node, values: Mapping[fx.Node, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a node with values in the place of nodes."""
    value_of = cast("Callable[[fx.Node], Argument]", values.__getitem__)  # which fx leaves as they are
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    return args, {**kwargs}
