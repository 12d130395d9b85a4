"""Operations that move numbers, sum them or choose among them, as tasks: joins, gradients of parts, indices, sums.

Each function takes the nests to add to and the operation, and returns the view of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import Tensor, fx

from pyro_flows.graphs.graph import node_at
from pyro_flows.graphs.points import ADD, EXP, FILL, IDENTITY, ISINF, LOG, MUL, ROUNDED, SUB, TIMES, WHERE
from pyro_flows.graphs.views import (
    ADD_UP,
    MAXIMUM,
    MINIMUM,
    STORE,
    Adding,
    Buffer,
    Call,
    Rule,
    Unsuited,
    View,
    read,
    span,
)  # fmt: skip

_aten = torch.ops.aten
AT_MOST = 16  # places along an axis, for running sums to be written one by one


# sums -----------------------------------------------------------------------------------------------------------------


def _summed(nests: Adding, call: Call) -> View:
    view = read(nests, call)
    total = reduced(nests, view, _axes(call), call.result, ADD_UP, 0.0)
    if call.node.target in (_aten.sum.dim_IntList, _aten.sum.default):
        return total
    return nests.point(call.result, TIMES, total, number=call.result.numel() / prod(view.sizes))


def _largest(nests: Adding, call: Call) -> View:
    action, fill = (MAXIMUM, -inf) if call.node.target is _aten.amax.default else (MINIMUM, inf)
    return reduced(nests, read(nests, call), _axes(call), call.result, action, fill)


def _every(nests: Adding, call: Call) -> View:
    """Say whether all truths along an axis hold, or any of them."""
    if nests.tensor(node_at(call.node, 0)).dtype != torch.bool:
        raise Unsuited
    every = call.node.target in (_aten.all.dim, _aten.all.default)
    action, fill = (MINIMUM, 1.0) if every else (MAXIMUM, 0.0)
    return reduced(nests, read(nests, call), _axes(call), call.result, action, fill)


def _axes(call: Call) -> Sequence[int] | None:
    if call.kwargs.get("dtype") is not None or "dim" in call.kwargs:
        raise Unsuited
    return call.integers(1) if len(call.args) > 1 and call.args[1] is not None else None


def reduced(
    nests: Adding, view: View, axes: Sequence[int] | None, result: Tensor, action: int, fill: float
) -> View:  # fmt: skip
    """Add a task that adds up numbers along some axes, or takes the largest or the smallest of them."""
    rank = len(view.sizes)
    gone = {axis % rank for axis in axes} if axes and rank else set(range(rank))
    kept = [axis for axis in range(rank) if axis not in gone]
    strides = iter(result.stride() if result.dim() == len(kept) else [result.stride()[axis] for axis in kept])
    onto = tuple(0 if axis in gone else next(strides) for axis in range(rank))
    buffer = Buffer(span(result), fill=fill)
    nests.add(IDENTITY, [view], View(buffer, 0, view.sizes, onto), action)
    return nests.whole(result, buffer)


def _log_of_sum(nests: Adding, call: Call) -> View:
    """Add exponentials of numbers without the largest of each sum, if that is finite."""
    view, result = read(nests, call), call.result
    rank = len(view.sizes)
    gone = {axis % rank for axis in call.integers(1) if rank} or set(range(rank))
    like = result.new_empty([1 if axis in gone else size for axis, size in enumerate(view.sizes)])
    largest = reduced(nests, view, [*gone], like, MAXIMUM, -inf)
    largest = nests.point(like, FILL, largest, nests.point(like, ISINF, largest))
    total = reduced(nests, nests.numbers(EXP, nests.numbers(SUB, view, largest)), [*gone], like, ADD_UP, 0.0)
    found = nests.point(like, ADD, nests.point(like, LOG, total), largest)
    if result.dim() == rank:
        return found
    strides = tuple(stride for axis, stride in enumerate(found.strides) if axis not in gone)
    return nests.point(result, IDENTITY, View(found.buffer, 0, tuple(result.shape), strides))


def _running(nests: Adding, call: Call) -> View:
    """Add or multiply up along a short axis."""
    view, result = read(nests, call), call.result
    axis = call.integer(1) % max(result.dim(), 1)
    if call.kwargs or not result.dim() or view.sizes[axis] > AT_MOST:
        raise Unsuited
    code = ADD if call.node.target is _aten.cumsum.default else MUL
    parts = [view.at(axis, 0)]
    for place in range(1, view.sizes[axis]):
        parts.append(nests.numbers(code, parts[-1], view.at(axis, place)))
    return stacked(nests, parts, axis, result)


def stacked(nests: Adding, parts: Sequence[View], axis: int, result: Tensor) -> View:
    """Put views next to each other along a new axis."""
    buffer, strides = Buffer(span(result)), result.stride()
    sizes, left = ((*part[:axis], *part[axis + 1 :]) for part in (result.shape, strides))
    for place, view in enumerate(parts):
        to = View(buffer, place * strides[axis], sizes, left, view.boolean)
        nests.add(IDENTITY, [view], to, STORE)
    return nests.whole(result, buffer)


# parts of tensors -----------------------------------------------------------------------------------------------------


def _joined(nests: Adding, call: Call) -> View:
    for part in call.node.all_input_nodes:
        nests.need_numbers(part)
    result = call.result
    axis = call.integer(1) % result.dim()
    if "dim" in call.kwargs:
        raise Unsuited
    if call.node.target is _aten.stack.default:
        return stacked(nests, call.views(0), axis, result)
    buffer, strides, begin = Buffer(span(result)), result.stride(), 0
    for view in call.views(0):
        to = View(buffer, begin * strides[axis], view.sizes, strides, view.boolean)
        nests.add(IDENTITY, [view], to, STORE)
        begin += view.sizes[axis]
    return nests.whole(result, buffer)


def _placed(nests: Adding, call: Call) -> View:
    """Put the gradient of a part of a tensor where the part is, and zeros elsewhere."""
    view, result = read(nests, call), call.result
    strides, rank = [*result.stride()], result.dim()
    if call.node.target is _aten.slice_backward.default:
        axis, step = call.integer(2) % rank, call.integer(5)
        begin = slice(call.integer(3), None, step).indices(result.shape[axis])[0] * strides[axis]
        strides[axis] *= step
    elif call.node.target is _aten.select_backward.default:
        axis = call.integer(2) % rank
        begin = (call.integer(3) % result.shape[axis]) * strides.pop(axis)
    else:
        offset, places = call.integer(2), (call.integer(3) % rank, call.integer(4) % rank)
        first, second = strides[places[0]], strides[places[1]]
        begin = offset * second if offset >= 0 else -offset * first
        for axis in sorted(places, reverse=True):
            del strides[axis]
        strides.append(first + second)
    buffer = Buffer(span(result), fill=0.0)
    nests.add(IDENTITY, [view], View(buffer, begin, view.sizes, tuple(strides)), ADD_UP)
    return nests.whole(result, buffer)


def _padded(nests: Adding, call: Call) -> View:
    """Put a tensor into a larger one that is filled with a number, or leave out its edges."""
    view, pads, result = read(nests, call), call.integers(1), call.result
    number = call.args[2] if len(call.args) > 2 else 0.0
    if not isinstance(number, (int, float)):
        raise Unsuited
    fill = float(number)
    buffer = Buffer(span(result), fill=float(fill != 0.0) if result.dtype == torch.bool else fill)
    sizes, begin, offset = [*view.sizes], 0, view.offset
    for pair in range(len(pads) // 2):
        axis, before, after = result.dim() - 1 - pair, pads[2 * pair], pads[2 * pair + 1]
        begin += max(before, 0) * result.stride()[axis]
        offset += max(-before, 0) * view.strides[axis]
        sizes[axis] += min(before, 0) + min(after, 0)
    if view.index is not None or not prod(sizes):
        raise Unsuited
    taken = View(view.buffer, offset, tuple(sizes), view.strides, view.boolean)
    nests.add(IDENTITY, [taken], View(buffer, begin, taken.sizes, result.stride()), STORE)
    return nests.whole(result, buffer)


def _flipped(nests: Adding, call: Call) -> View:
    """Read a tensor backwards along some axes."""
    view, rank = read(nests, call), call.result.dim()
    if view.index is not None:
        raise Unsuited
    strides, offset = [*view.strides], view.offset
    for axis in {axis % rank for axis in call.integers(1) if rank}:
        offset += (view.sizes[axis] - 1) * strides[axis]
        strides[axis] = -strides[axis]
    return nests.point(call.result, IDENTITY, View(view.buffer, offset, view.sizes, tuple(strides), view.boolean))


def _triangle(nests: Adding, call: Call) -> View:
    """Keep what is on one side of a diagonal."""
    view = read(nests, call)
    function = torch.tril if call.node.target is _aten.tril.default else torch.triu
    mask = function(torch.ones(call.result.shape[-2:], dtype=torch.float64), call.integer(1))
    kept, zero = (
        nests.whole(value, Buffer(span(value), source=value)) for value in (mask, mask.new_zeros((1,) * mask.dim()))
    )
    return nests.point(call.result, WHERE, view, zero, kept)


def _same(nests: Adding, call: Call) -> View:
    """Take a copy for what it is a copy of, if it lies in memory as that does."""
    view, result = read(nests, call), call.result
    boolean = result.dtype == torch.bool
    if boolean and not view.boolean:
        raise Unsuited
    if result.dtype == torch.float32 and nests.tensor(node_at(call.node, 0)).dtype == torch.float64:
        return nests.point(result, ROUNDED, view)
    alike = view.strides == result.stride() and view.offset == 0 and view.buffer.span == span(result)
    if alike and (view.buffer.source is None or view.boolean == boolean):  # torch knows others by their own types
        return View(view.buffer, 0, view.sizes, view.strides, boolean)
    return nests.point(result, IDENTITY, view)


def _copied(nests: Adding, call: Call) -> View:
    view = read(nests, call, 1)
    if call.result.dtype == torch.bool and not view.boolean:
        raise Unsuited
    return nests.point(call.result, IDENTITY, view)


# constant indices -----------------------------------------------------------------------------------------------------


def _picked(nests: Adding, call: Call) -> View:
    """Read entries along one dimension, in the order of constant indices."""
    source, result = read(nests, call), call.result
    axis = call.integer(1) % max(result.dim(), 1)
    index = _positions(nests, node_at(call.node, 2), axis, call.node.target is _aten.gather.default)
    if source.index is not None or len(source.sizes) != result.dim() or call.kwargs:
        raise Unsuited
    taken = View(source.buffer, source.offset, tuple(result.shape), source.strides, source.boolean, index, axis)
    return nests.point(result, IDENTITY, taken)


def _spread(nests: Adding, call: Call) -> View:
    """Add rows to zeros, at constant indices."""
    view, result = read(nests, call, 3), call.result
    axis = call.integer(1) % max(result.dim(), 1)
    if call.kwargs or not call.view(0).buffer.constant or bool(nests.tensor(node_at(call.node, 0)).any()):
        raise Unsuited
    index = _positions(nests, node_at(call.node, 2), axis, False)
    buffer = Buffer(span(result), fill=0.0)
    nests.add(IDENTITY, [view], View(buffer, 0, view.sizes, result.stride(), False, index, axis), ADD_UP)
    return nests.whole(result, buffer)


def _positions(nests: Adding, node: fx.Node, axis: int, spread: bool) -> Buffer:
    """Return constant indices along an axis, of which there may be copies along the others."""
    value = nests.tensor(node)
    if not nests.view(node).buffer.constant:
        raise Unsuited
    if spread and value.dim() > 1:
        first = value[tuple(slice(None) if place == axis else slice(0, 1) for place in range(value.dim()))]
        if not bool((value == first).all()):
            raise Unsuited
        value = first
    value = value.reshape(-1).to(torch.int64).contiguous()
    if len(value) < 2 or bool((value < 0).any()):
        raise Unsuited
    return Buffer(len(value), source=value, positions=True)


STRUCTURED: dict[object, Rule] = {
    _aten.sum.dim_IntList: _summed,
    _aten.sum.default: _summed,
    _aten.mean.dim: _summed,
    _aten.mean.default: _summed,
    _aten.amax.default: _largest,
    _aten.amin.default: _largest,
    _aten.all.dim: _every,
    _aten.all.default: _every,
    _aten.any.dim: _every,
    _aten.any.default: _every,
    _aten.logsumexp.default: _log_of_sum,
    _aten.cumsum.default: _running,
    _aten.cumprod.default: _running,
    _aten.cat.default: _joined,
    _aten.stack.default: _joined,
    _aten.slice_backward.default: _placed,
    _aten.select_backward.default: _placed,
    _aten.diagonal_backward.default: _placed,
    _aten.constant_pad_nd.default: _padded,
    _aten.flip.default: _flipped,
    _aten.tril.default: _triangle,
    _aten.triu.default: _triangle,
    _aten.clone.default: _same,
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten._to_copy.default: _same,
    _aten.copy.default: _copied,
    _aten.index_select.default: _picked,
    _aten.gather.default: _picked,
    _aten.index_add.default: _spread,
}
