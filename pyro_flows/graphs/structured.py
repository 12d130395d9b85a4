"""Operations that move numbers, sum them or choose among them, as tasks: joins, gradients of parts, indices, sums.

Each function takes the nests to add to, the node, its arguments with views in the place of tensors, and its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, fx

from pyro_flows.graphs.points import ADD, EXP, FILL, IDENTITY, ISINF, LOG, MUL, ROUNDED, SUB, TIMES, WHERE
from pyro_flows.graphs.views import ADD_UP, MAXIMUM, MINIMUM, STORE, Adding, Buffer, Rule, Unsuited, View, span

_aten = torch.ops.aten
AT_MOST = 16  # places along an axis, for running sums to be written one by one


# sums -----------------------------------------------------------------------------------------------------------------


def _summed(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    nests.need_numbers(node.args[0])
    total = reduced(nests, args[0], _axes(args, kwargs), result, ADD_UP, 0.0)
    if node.target in (_aten.sum.dim_IntList, _aten.sum.default):
        return total
    return nests.point(result, TIMES, total, number=result.numel() / prod(args[0].sizes))


def _largest(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    nests.need_numbers(node.args[0])
    action, fill = (MAXIMUM, -inf) if node.target is _aten.amax.default else (MINIMUM, inf)
    return reduced(nests, args[0], _axes(args, kwargs), result, action, fill)


def _every(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Say whether all truths along an axis hold, or any of them."""
    nests.need_numbers(node.args[0])
    if nests.real[node.args[0]].dtype != torch.bool:
        raise Unsuited
    every = node.target in (_aten.all.dim, _aten.all.default)
    action, fill = (MINIMUM, 1.0) if every else (MAXIMUM, 0.0)
    return reduced(nests, args[0], _axes(args, kwargs), result, action, fill)


def _axes(args: Any, kwargs: Any) -> Sequence[int] | None:
    if kwargs.get("dtype") is not None:
        raise Unsuited
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    return [axes] if isinstance(axes, int) else axes


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


def _log_of_sum(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Add exponentials of numbers without the largest of each sum, if that is finite."""
    nests.need_numbers(node.args[0])
    view, rank = args[0], len(args[0].sizes)
    axes = [args[1]] if isinstance(args[1], int) else args[1]
    gone = {axis % rank for axis in axes if rank} or set(range(rank))
    like = result.new_empty([1 if axis in gone else size for axis, size in enumerate(view.sizes)])
    largest = reduced(nests, view, [*gone], like, MAXIMUM, -inf)
    largest = nests.point(like, FILL, largest, nests.point(like, ISINF, largest))
    total = reduced(nests, nests.numbers(EXP, nests.numbers(SUB, view, largest)), [*gone], like, ADD_UP, 0.0)
    found = nests.point(like, ADD, nests.point(like, LOG, total), largest)
    if result.dim() == rank:
        return found
    strides = tuple(stride for axis, stride in enumerate(found.strides) if axis not in gone)
    return nests.point(result, IDENTITY, View(found.buffer, 0, tuple(result.shape), strides))


def _running(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Add or multiply up along a short axis."""
    nests.need_numbers(node.args[0])
    view, axis = args[0], args[1] % max(result.dim(), 1)
    if kwargs or not result.dim() or view.sizes[axis] > AT_MOST:
        raise Unsuited
    code = ADD if node.target is _aten.cumsum.default else MUL
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


def _joined(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    for part in node.all_input_nodes:
        nests.need_numbers(part)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.dim()
    if node.target is _aten.stack.default:
        return stacked(nests, args[0], axis, result)
    buffer, strides, begin = Buffer(span(result)), result.stride(), 0
    for view in args[0]:
        to = View(buffer, begin * strides[axis], view.sizes, strides, view.boolean)
        nests.add(IDENTITY, [view], to, STORE)
        begin += view.sizes[axis]
    return nests.whole(result, buffer)


def _placed(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Put the gradient of a part of a tensor where the part is, and zeros elsewhere."""
    nests.need_numbers(node.args[0])
    view, strides = args[0], [*result.stride()]
    if node.target is _aten.slice_backward.default:
        axis, step = args[2] % result.dim(), args[5]
        begin = slice(args[3], args[4], step).indices(result.shape[axis])[0] * strides[axis]
        strides[axis] *= step
    elif node.target is _aten.select_backward.default:
        axis = args[2] % result.dim()
        begin = (args[3] % result.shape[axis]) * strides.pop(axis)
    else:
        (offset, first, second), rank = args[2:], result.dim()
        first, second = strides[first % rank], strides[second % rank]
        begin = offset * second if offset >= 0 else -offset * first
        places = sorted((args[3] % rank, args[4] % rank), reverse=True)
        for axis in places:
            del strides[axis]
        strides.append(first + second)
    buffer = Buffer(span(result), fill=0.0)
    nests.add(IDENTITY, [view], View(buffer, begin, view.sizes, tuple(strides)), ADD_UP)
    return nests.whole(result, buffer)


def _padded(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Put a tensor into a larger one that is filled with a number, or leave out its edges."""
    nests.need_numbers(node.args[0])
    view, pads = args[0], args[1]
    fill = float(args[2]) if len(args) > 2 else 0.0
    buffer = Buffer(span(result), fill=float(fill != 0.0) if result.dtype == torch.bool else fill)
    sizes, begin, offset = [*view.sizes], 0, view.offset
    for number in range(len(pads) // 2):
        axis, before, after = result.dim() - 1 - number, pads[2 * number], pads[2 * number + 1]
        begin += max(before, 0) * result.stride()[axis]
        offset += max(-before, 0) * view.strides[axis]
        sizes[axis] += min(before, 0) + min(after, 0)
    if view.index is not None or not prod(sizes):
        raise Unsuited
    taken = View(view.buffer, offset, tuple(sizes), view.strides, view.boolean)
    nests.add(IDENTITY, [taken], View(buffer, begin, taken.sizes, result.stride()), STORE)
    return nests.whole(result, buffer)


def _flipped(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Read a tensor backwards along some axes."""
    nests.need_numbers(node.args[0])
    view, rank = args[0], result.dim()
    if view.index is not None:
        raise Unsuited
    strides, offset = [*view.strides], view.offset
    for axis in {axis % rank for axis in args[1] if rank}:
        offset += (view.sizes[axis] - 1) * strides[axis]
        strides[axis] = -strides[axis]
    return nests.point(result, IDENTITY, View(view.buffer, offset, view.sizes, tuple(strides), view.boolean))


def _triangle(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Keep what is on one side of a diagonal."""
    nests.need_numbers(node.args[0])
    diagonal = args[1] if len(args) > 1 else 0
    function = torch.tril if node.target is _aten.tril.default else torch.triu
    mask = function(torch.ones(result.shape[-2:], dtype=torch.float64), diagonal)
    kept, zero = (
        nests.whole(value, Buffer(span(value), source=value)) for value in (mask, mask.new_zeros((1,) * mask.dim()))
    )
    return nests.point(result, WHERE, args[0], zero, kept)


def _same(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Take a copy for what it is a copy of, if it lies in memory as that does."""
    nests.need_numbers(node.args[0])
    view, boolean = args[0], result.dtype == torch.bool
    if boolean and not view.boolean:
        raise Unsuited
    if result.dtype == torch.float32 and nests.real[node.args[0]].dtype == torch.float64:
        return nests.point(result, ROUNDED, view)
    alike = view.strides == result.stride() and view.offset == 0 and view.buffer.span == span(result)
    if alike and (view.buffer.source is None or view.boolean == boolean):  # torch knows others by their own types
        return View(view.buffer, 0, view.sizes, view.strides, boolean)
    return nests.point(result, IDENTITY, view)


def _copied(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    nests.need_numbers(node.args[1])
    if result.dtype == torch.bool and not args[1].boolean:
        raise Unsuited
    return nests.point(result, IDENTITY, args[1])


# constant indices -----------------------------------------------------------------------------------------------------


def _picked(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Read entries along one dimension, in the order of constant indices."""
    nests.need_numbers(node.args[0])
    source, axis = args[0], args[1] % max(result.dim(), 1)
    index = _positions(nests, node.args[2], axis, node.target is _aten.gather.default)
    if source.index is not None or len(source.sizes) != result.dim() or kwargs:
        raise Unsuited
    taken = View(source.buffer, source.offset, tuple(result.shape), source.strides, source.boolean, index, axis)
    return nests.point(result, IDENTITY, taken)


def _spread(nests: Adding, node: fx.Node, args: Any, kwargs: Any, result: Tensor) -> View:
    """Add rows to zeros, at constant indices."""
    nests.need_numbers(node.args[3])
    axis, view = args[1] % max(result.dim(), 1), args[3]
    if kwargs or not args[0].buffer.constant or bool(nests.real[node.args[0]].any()):
        raise Unsuited
    index = _positions(nests, node.args[2], axis, False)
    buffer = Buffer(span(result), fill=0.0)
    nests.add(IDENTITY, [view], View(buffer, 0, view.sizes, result.stride(), False, index, axis), ADD_UP)
    return nests.whole(result, buffer)


def _positions(nests: Adding, node: Any, axis: int, spread: bool) -> Buffer:
    """Return constant indices along an axis, of which there may be copies along the others."""
    value = nests.real[node]
    if not nests.views[node].buffer.constant:
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


STRUCTURED: dict[Any, Rule] = {
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
