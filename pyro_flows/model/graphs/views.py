"""Numbers in memory, and what is done with them: the parts of a recorded graph that runs block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.graph import name_of

LOAD, STORE, STORE_AT_ONCE, ADD_UP, LARGEST, SMALLEST = range(6)  # what is done with memory; see interpreter.c
Sizes = tuple[int, ...]


class Unsuited(Exception):
    """An operation is none that runs block by block."""


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
        changes: whether its tensor is a parameter, which may be changed between runs.
    """

    span: int
    source: int | Tensor | tuple[fx.Node, int] | None = None
    level: int = -1
    maker: Task | None = None
    kept: bool = False
    fill: float | None = None
    positions: bool = False
    changes: bool = False

    @property
    def constant(self) -> bool:
        return isinstance(self.source, Tensor) and not self.changes


@dataclass(frozen=True)
class View:
    """Numbers of a buffer; ``index`` gives the positions along one dimension."""

    buffer: Buffer
    offset: int
    sizes: Sizes
    strides: Sizes
    boolean: bool = False
    index: Buffer | None = None
    along: int = -1

    def at(self, axis: int, place: int) -> View:
        """Return one place along an axis, which goes."""
        sizes, strides = ((*part[:axis], *part[axis + 1 :]) for part in (self.sizes, self.strides))
        return View(self.buffer, self.offset + place * self.strides[axis], sizes, strides, self.boolean)

    def widened(self, axis: int) -> View:
        """Return the view with a new axis of one place."""
        sizes, strides = ((*part[:axis], new, *part[axis:]) for part, new in ((self.sizes, 1), (self.strides, 0)))
        return View(self.buffer, self.offset, sizes, strides, self.boolean)


@dataclass(eq=False)
class Task:
    """One instruction for all numbers of a nest: operands, and the view of the buffer that the results go to.

    A nest is given by its sizes, those above one.
    """

    code: int
    operands: tuple[View, ...]
    number: float
    to: View
    action: int
    nest: Sizes
    level: int = 0


@dataclass(eq=False)
class Foreign:
    """An operation that torch does, after the tasks of its level."""

    node: fx.Node
    args: Sequence[object]
    kwargs: Mapping[str, object]
    level: int = -1
    results: list[View] = field(default_factory=list)

    @property
    def taken(self) -> list[View]:
        return [*views_in((self.args, self.kwargs))]


@dataclass(eq=False)
class Product:
    """A product of matrices (B, M, K) and (B, K, N), done after the tasks of its level."""

    first: View
    second: View
    to: View
    level: int

    @property
    def taken(self) -> list[View]:
        return [self.first, self.second]


@dataclass(frozen=True)
class Call:
    """An operation to be done by tasks: its node, its arguments with views in the place of nodes, and its result."""

    node: fx.Node
    args: Sequence[object]
    kwargs: Mapping[str, object]
    result: Tensor

    @property
    def name(self) -> str:
        """Name of the operation."""
        return name_of(self.node)

    def view(self, place: int) -> View:
        """Return an argument that is a tensor."""
        view = self.args[place]
        if not isinstance(view, View):
            raise Unsuited
        return view

    def views(self, place: int) -> list[View]:
        """Return an argument that is a sequence of tensors."""
        return [*cast("Sequence[View]", self.args[place])]

    def integers(self, place: int) -> list[int]:
        """Return an argument that is one whole number or a sequence of them."""
        numbers = self.args[place]
        return [numbers] if isinstance(numbers, int) else [*cast("Sequence[int]", numbers)]


class Given(NamedTuple):
    """A view as torch's operations take it: numbers of another type where they are in the graph."""

    view: View
    dtype: torch.dtype


def dense(sizes: Sequence[int]) -> Sizes:
    """Return the strides of numbers that lie in the order of their sizes."""
    return tuple(prod(sizes[place + 1 :]) for place in range(len(sizes)))


def span(value: Tensor) -> int:
    """Return how many numbers lie between the first and the last one of a tensor, with both."""
    return reach(value.shape, value.stride()) if value.numel() else 0


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def spread_over(view: View, sizes: Sequence[int]) -> View:
    """Return a view of the sizes of a nest, with strides of zero where one number is for all."""
    if view.sizes == sizes:
        return view
    more = len(sizes) - len(view.sizes)
    old = zip(view.sizes, view.strides, sizes[more:], strict=True)
    strides = (0,) * more + tuple(0 if size == 1 != wanted else stride for size, stride, wanted in old)
    along = view.along + more if view.index is not None else -1
    return View(view.buffer, view.offset, tuple(sizes), strides, view.boolean, view.index, along)


def broadcast(shapes: Sequence[Sizes]) -> Sizes:
    """Return the sizes that go with all shapes; torch's function takes a hundred times as long."""
    whole = shapes[0]
    for shape in shapes[1:]:
        if shape != whole:
            rank = max(len(shape), len(whole))
            one, other = ((1,) * (rank - len(part)) + part for part in (shape, whole))
            whole = tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))
    return whole


def strides_in_nest(view: View) -> Sizes:
    return tuple(stride for size, stride in zip(view.sizes, view.strides, strict=True) if size > 1)


def is_aligned(view: View, nest: Sizes) -> bool:
    """Whether a view takes number by number what one task made in a nest of the same sizes."""
    maker = view.buffer.maker
    if maker is None or view.offset or view.index is not None or maker.nest != nest:
        return False
    return strides_in_nest(maker.to) == strides_in_nest(view)


def views_in(value: object) -> Iterator[View]:
    """Yield the views in arguments of an operation."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from views_in(part)
    elif isinstance(value, dict):
        yield from views_in([*value.values()])
