"""Tensors that are written entry by entry: what is read is what was written there, and the whole is put together once.

A loop of T steps with ``x[t] = f(x[t - 1])`` would copy all of x at each step, forwards and backwards, once its writes
are operations that return new tensors: T^2 numbers in place of T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from pyro_flows.model.graphs.graph import int_at, ints_at, new_node, node_at, sweep
from pyro_flows.model.graphs.sums import is_plain_sum, zeros

_aten = torch.ops.aten
_BY_INDEX = (  # for which no layout matters
    _aten.select_scatter.default, _aten.slice_scatter.default, _aten.select.int, _aten.slice.Tensor, _aten.add.Tensor
)  # fmt: skip
GROWTH = 4  # operations that may be added for each one that is there


@dataclass
class _Entries:
    """A tensor along an axis: ``base`` (None: zeros), but where entries were written."""

    like: Tensor
    axis: int
    base: fx.Node | None
    at: dict[int, fx.Node] = field(default_factory=dict)
    whole: fx.Node | None = None

    @property
    def count(self) -> int:
        return int(self.like.shape[self.axis])

    @property
    def entry(self) -> Tensor:
        """Shape and dtype of an entry."""
        return self.like.select(self.axis, 0)


def resolve(graph: fx.Graph) -> None:
    """Let reads take what was written, in a graph that changes no tensor in place; it stays right where that ends.

    Cost: about that of writing the graph down; it stops where the whole of a tensor is needed again and again.
    """
    sweep(graph)
    for node in list(graph.nodes):
        if node.target in (_aten.as_strided.default, _aten.as_strided_scatter.default):
            _select(graph, node)
    sweep(graph)
    _Resolver(graph).run()
    sweep(graph)


class _Resolver:
    """Goes through a graph once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.known, self.done = graph, dict[fx.Node, _Entries](), set[fx.Node]()
        self.left = GROWTH * len(graph.nodes)
        self.rules: dict[object, Callable[[fx.Node], _Entries | fx.Node | None]] = {
            _aten.select.int: self._select,
            _aten.select_scatter.default: self._write,
            _aten.select_backward.default: self._alone,
            _aten.add.Tensor: self._add,
            _aten.copy.default: self._copy,
            _aten.clone.default: self._clone,
        }

    def run(self) -> None:
        for node in list(self.graph.nodes):
            found = self._settled(node)
            if found is not node:
                for user in node.users:
                    if user.target is _aten.view.default:  # of what may have another layout
                        user.target = _aten.reshape.default
                node.replace_all_uses_with(found)
            if self.left < 0:
                return

    def _settled(self, node: fx.Node) -> fx.Node:
        """Apply the rule for a node; return it, or one of equal value."""
        rule = self.rules.get(node.target)
        with self.graph.inserting_before(node):
            found = rule(node) if rule is not None else None
            self.done.add(node)
            if isinstance(found, _Entries):
                self.known[node] = found
            elif found is not None:
                return found
            elif node.target is not _aten.new_empty_strided.default:  # which takes no values
                for source in node.all_input_nodes:
                    if source in self.known:
                        node.replace_input_with(source, self._whole(self.known[source]))
        return node

    # rules: entries, a node of equal value, or None -------------------------------------------------------------------

    def _select(self, node: fx.Node) -> fx.Node | None:
        source, axis, index = _axis_of(node)
        known = self.known.get(source)
        return None if known is None or known.axis != axis else self._entry(known, index)

    def _write(self, node: fx.Node) -> _Entries | None:
        source, axis, index = _axis_of(node, 2)
        part = node_at(node, 1)
        if part.meta["val"].dtype != node.meta["val"].dtype:
            return None
        known = self._along(axis, source, node)
        known.at[index] = part
        return known

    def _alone(self, node: fx.Node) -> _Entries:
        axis, like = int_at(node, 2) % len(ints_at(node, 1)), node.meta["val"]
        return _Entries(like, axis, None, {int_at(node, 3) % like.shape[axis]: node_at(node, 0)})

    def _add(self, node: fx.Node) -> _Entries | None:
        one, other = node.args[:2]
        if not is_plain_sum(node) or not (isinstance(one, fx.Node) and isinstance(other, fx.Node)) or one is other:
            return None
        few = next((part for part in (other, one) if part in self.known and self.known[part].base is None), None)
        if few is None:
            return None
        rest, added = (one if few is other else other), self.known[few]
        known = self._along(added.axis, rest, node)
        for index, part in added.at.items():
            if index in known.at or known.base is not None:
                old = self._entry(known, index)
                part = self._call(_aten.add.Tensor, (old, part), old.meta["val"])
            known.at[index] = part
        return known

    def _copy(self, node: fx.Node) -> fx.Node | None:
        to, source = node.args[:2]
        by_index = all(user.target in _BY_INDEX for user in node.users)
        if not by_index or not (isinstance(to, fx.Node) and isinstance(source, fx.Node)):
            return None
        like, value = node.meta["val"], source.meta["val"]
        if like.dtype != value.dtype or like.device != value.device:
            return None
        return source if like.shape == value.shape else self._call(_aten.expand.default, (source, [*like.shape]), like)

    def _clone(self, node: fx.Node) -> _Entries | None:
        source = node_at(node, 0)
        known = self.known.get(source)
        return None if known is None else self._along(known.axis, source, node)

    # parts ------------------------------------------------------------------------------------------------------------

    def _along(self, axis: int, source: fx.Node, by: fx.Node) -> _Entries:
        """Return a tensor's entries along an axis as those of the next one: a copy, where the tensor is read later."""
        known = self.known.get(source)
        if known is None:
            return _Entries(source.meta["val"], axis, source)
        if known.axis != axis:
            return _Entries(known.like, axis, self._whole(known))
        if all(user is by or user in self.done for user in source.users):
            return _Entries(known.like, axis, known.base, self.known.pop(source).at)
        self.left -= len(known.at) // 8
        return _Entries(known.like, axis, known.base, dict(known.at))

    def _entry(self, known: _Entries, index: int) -> fx.Node:
        if index not in known.at:
            if known.base is None:
                known.at[index] = self._zeros(known.entry)
            else:
                known.at[index] = self._call(_aten.select.int, (known.base, known.axis, index), known.entry)
        return known.at[index]

    def _zeros(self, like: Tensor) -> fx.Node:
        self.left -= 1
        return self._settled(zeros(self.graph, like))

    def _whole(self, known: _Entries) -> fx.Node:
        """Return the tensor, put together from its entries and from what lies between these."""
        if known.whole is None:
            parts, done = list[fx.Node](), 0
            for index in (*sorted(known.at), known.count):
                if index > done:
                    parts.append(self._unwritten(known, done, index))
                if index in known.at:
                    like = known.entry.unsqueeze(known.axis)
                    parts.append(self._call(_aten.unsqueeze.default, (known.at[index], known.axis), like))
                done = index + 1
            known.whole = self._call(_aten.cat.default, (parts, known.axis), known.like)
        return known.whole

    def _unwritten(self, known: _Entries, first: int, last: int) -> fx.Node:
        like = known.like.narrow(known.axis, first, last - first)
        if known.base is None:
            return self._zeros(like)
        return self._call(_aten.slice.Tensor, (known.base, known.axis, first, last), like)

    def _call(self, operation: Callable[..., object], arguments: tuple[Argument, ...], like: Tensor) -> fx.Node:
        self.left -= 1
        return self._settled(new_node(self.graph, operation, arguments, like))


def _axis_of(node: fx.Node, given: int = 1) -> tuple[fx.Node, int, int]:
    """Return the tensor that is selected from or written into, the axis and the index, ``given`` from there on."""
    source = node_at(node, 0)
    shape = source.meta["val"].shape
    axis = int_at(node, given) % len(shape)
    return source, axis, int_at(node, given + 1) % shape[axis]


# strides, by which autograd takes and writes parts of a contiguous tensor that was written into -----------------------


def _select(graph: fx.Graph, node: fx.Node) -> None:
    """Write what takes or writes a part by strides of a contiguous tensor as selections, one axis after the other."""
    written = node.target is _aten.as_strided_scatter.default
    if len(node.args) != 4 + written:
        return
    source = whole = node_at(node, 0)
    sizes, strides = ints_at(node, 1 + written), ints_at(node, 2 + written)
    while whole.target is _aten.select_scatter.default:
        whole = node_at(whole, 0)
    made = node_at(whole, 0) if whole.target is _aten.copy.default else whole
    if made.target is not _aten.new_empty_strided.default or ints_at(made, 2) != _contiguous(ints_at(made, 1)):
        return
    chosen = _chosen(ints_at(made, 1), list(zip(sizes, strides, strict=True)), int_at(node, 3 + written))
    if not chosen:
        return
    parts, like = [source], source.meta["val"]
    with graph.inserting_before(node):
        for axis, index in chosen:
            like = like.select(axis, index)
            parts.append(new_node(graph, _aten.select.int, (parts[-1], axis, index), like))
        if not written:
            node.replace_all_uses_with(parts[-1])
            return
        new = node_at(node, 1)
        for part, (axis, index) in zip(reversed(parts[:-1]), reversed(chosen), strict=True):
            new = new_node(graph, _aten.select_scatter.default, (part, new, axis, index), part.meta["val"])
    node.replace_all_uses_with(new)


def _chosen(shape: list[int], left: list[tuple[int, int]], offset: int) -> list[tuple[int, int]]:
    """Return axes of a contiguous tensor and an index along each, in turn, that leave these sizes and strides."""
    found = list[tuple[int, int]]()
    kept = list(left)
    for size, step in zip(shape, _contiguous(shape), strict=True):
        if kept and kept[0] == (size, step):
            kept.pop(0)
        else:
            found.append((len(left) - len(kept), (offset // step) % size))
            offset -= found[-1][1] * step
    return found if not kept and offset == 0 else []


def _contiguous(shape: list[int]) -> list[int]:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * max(size, 1))
    return steps
