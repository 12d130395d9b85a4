"""Operations that move numbers, sum them or choose among them, as tasks: joins, gradients of parts, indices, sums.

Each rule takes the groups to add to and the operation, and returns the view of its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.fusion_groups import FusionGroups, Rule
from pyro_flows.model.graphs.graph import int_at, node_at
from pyro_flows.model.graphs.points import ADD, EXP, FILL, IDENTITY, ISINF, LOG, MUL, ROUNDED, SUB, TIMES, WHERE
from pyro_flows.model.graphs.views import ADD_UP, LARGEST, SMALLEST, STORE, Buffer, Call, Unsuited, View, span

AT_MOST = 16  # places along an axis, for running sums to be written one by one
REDUCED = {  # what is done with numbers along axes, and with which number it begins
    "sum": (ADD_UP, 0.0),
    "mean": (ADD_UP, 0.0),
    "amax": (LARGEST, -inf),
    "amin": (SMALLEST, inf),
    "all": (SMALLEST, 1.0),
    "any": (LARGEST, 0.0),
}


# sums -----------------------------------------------------------------------------------------------------------------


def _along_axes(groups: FusionGroups, call: Call) -> View:
    """Reduce numbers along axes to sum, mean, largest or smallest, and truths to whether all or any of them hold."""
    name, node = call.name, call.node
    if call.kwargs.get("dtype") is not None or "dim" in call.kwargs:
        raise Unsuited
    if name in ("all", "any") and groups.tensor(node_at(node, 0)).dtype != torch.bool:
        raise Unsuited
    view, axes = groups.read(call), call.integers(1) if len(call.args) > 1 and call.args[1] is not None else None
    found = reduced(groups, view, axes, call.result, *REDUCED[name])
    if name != "mean":
        return found
    return groups.point(call.result, TIMES, found, number=call.result.numel() / prod(view.sizes))


def reduced(
    groups: FusionGroups, view: View, axes: Sequence[int] | None, result: Tensor, action: int, fill: float
) -> View:  # fmt: skip
    """Add a task that adds up numbers along some axes, or takes the largest or the smallest of them."""
    rank = len(view.sizes)
    gone = {axis % rank for axis in axes} if axes and rank else set(range(rank))
    kept = [axis for axis in range(rank) if axis not in gone]
    strides = iter(result.stride() if result.dim() == len(kept) else [result.stride()[axis] for axis in kept])
    onto = tuple(0 if axis in gone else next(strides) for axis in range(rank))
    buffer = Buffer(span(result), fill=fill)
    groups.add(IDENTITY, [view], View(buffer, 0, view.sizes, onto), action)
    return groups.whole(result, buffer)


def _log_of_sum(groups: FusionGroups, call: Call) -> View:
    """Add exponentials of numbers without the largest of each sum, if that is finite."""
    view, result = groups.read(call), call.result
    rank = len(view.sizes)
    gone = {axis % rank for axis in call.integers(1) if rank} or set(range(rank))
    like = result.new_empty([1 if axis in gone else size for axis, size in enumerate(view.sizes)])
    largest = reduced(groups, view, [*gone], like, LARGEST, -inf)
    largest = groups.point(like, FILL, largest, groups.point(like, ISINF, largest))
    total = reduced(groups, groups.point(None, EXP, groups.point(None, SUB, view, largest)), [*gone], like, ADD_UP, 0.0)
    found = groups.point(like, ADD, groups.point(like, LOG, total), largest)
    if result.dim() == rank:
        return found
    strides = tuple(stride for axis, stride in enumerate(found.strides) if axis not in gone)
    return groups.point(result, IDENTITY, View(found.buffer, 0, tuple(result.shape), strides))


def _running(groups: FusionGroups, call: Call) -> View:
    """Add or multiply up along a short axis."""
    view, result = groups.read(call), call.result
    axis = int_at(call.node, 1) % max(result.dim(), 1)
    if call.kwargs or not result.dim() or view.sizes[axis] > AT_MOST:
        raise Unsuited
    code = ADD if call.name == "cumsum" else MUL
    parts = [view.at(axis, 0)]
    for place in range(1, view.sizes[axis]):
        parts.append(groups.point(None, code, parts[-1], view.at(axis, place)))
    return side_by_side(groups, [part.widened(axis) for part in parts], axis, result)


def side_by_side(groups: FusionGroups, parts: Iterable[View], axis: int, result: Tensor) -> View:
    """Put views next to each other along an axis."""
    buffer, strides, begin = Buffer(span(result)), result.stride(), 0
    for view in parts:
        sizes = (*result.shape[:axis], view.sizes[axis], *result.shape[axis + 1 :])
        to = View(buffer, begin * strides[axis], sizes, strides, view.boolean)
        groups.add(IDENTITY, [view], to, STORE)
        begin += view.sizes[axis]
    return groups.whole(result, buffer)


# parts of tensors -----------------------------------------------------------------------------------------------------


def _joined(groups: FusionGroups, call: Call) -> View:
    for part in call.node.all_input_nodes:
        groups.need_numbers(part)
    if "dim" in call.kwargs:
        raise Unsuited
    axis = int_at(call.node, 1) % call.result.dim()
    parts = [view.widened(axis) if call.name == "stack" else view for view in call.views(0)]
    return side_by_side(groups, parts, axis, call.result)


def _placed(groups: FusionGroups, call: Call) -> View:
    """Put the gradient of a part of a tensor where the part is, and zeros elsewhere."""
    view, result = groups.read(call), call.result
    strides, rank = [*result.stride()], result.dim()
    if call.name == "slice_backward":
        axis, step = int_at(call.node, 2) % rank, int_at(call.node, 5)
        begin = slice(int_at(call.node, 3), None, step).indices(result.shape[axis])[0] * strides[axis]
        strides[axis] *= step
    elif call.name == "select_backward":
        axis = int_at(call.node, 2) % rank
        begin = (int_at(call.node, 3) % result.shape[axis]) * strides.pop(axis)
    else:
        offset, places = int_at(call.node, 2), (int_at(call.node, 3) % rank, int_at(call.node, 4) % rank)
        first, second = strides[places[0]], strides[places[1]]
        begin = offset * second if offset >= 0 else -offset * first
        for axis in sorted(places, reverse=True):
            del strides[axis]
        strides.append(first + second)
    buffer = Buffer(span(result), fill=0.0)
    groups.add(IDENTITY, [view], View(buffer, begin, view.sizes, tuple(strides)), ADD_UP)
    return groups.whole(result, buffer)


def _padded(groups: FusionGroups, call: Call) -> View:
    """Put a tensor into a larger one that is filled with a number, or leave out its edges."""
    view, pads, result = groups.read(call), call.integers(1), call.result
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
    groups.add(IDENTITY, [taken], View(buffer, begin, taken.sizes, result.stride()), STORE)
    return groups.whole(result, buffer)


def _flipped(groups: FusionGroups, call: Call) -> View:
    """Read a tensor backwards along some axes."""
    view, rank = groups.read(call), call.result.dim()
    if view.index is not None:
        raise Unsuited
    strides, offset = [*view.strides], view.offset
    for axis in {axis % rank for axis in call.integers(1) if rank}:
        offset += (view.sizes[axis] - 1) * strides[axis]
        strides[axis] = -strides[axis]
    return groups.point(call.result, IDENTITY, View(view.buffer, offset, view.sizes, tuple(strides), view.boolean))


def _triangle(groups: FusionGroups, call: Call) -> View:
    """Keep what is on one side of a diagonal."""
    view = groups.read(call)
    mask = getattr(torch, call.name)(torch.ones(call.result.shape[-2:], dtype=torch.float64), int_at(call.node, 1))
    kept, zero = (
        groups.whole(value, Buffer(span(value), source=value)) for value in (mask, mask.new_zeros((1,) * mask.dim()))
    )
    return groups.point(call.result, WHERE, view, zero, kept)


def _same(groups: FusionGroups, call: Call) -> View:
    """Take a copy for what it is a copy of, if it lies in memory as that does."""
    view, result = groups.read(call), call.result
    boolean = result.dtype == torch.bool
    if boolean and not view.boolean:
        raise Unsuited
    if result.dtype == torch.float32 and groups.tensor(node_at(call.node, 0)).dtype == torch.float64:
        return groups.point(result, ROUNDED, view)
    alike = view.strides == result.stride() and view.offset == 0 and view.buffer.span == span(result)
    if alike and (view.buffer.source is None or view.boolean == boolean):  # torch knows others by their own types
        return View(view.buffer, 0, view.sizes, view.strides, boolean)
    return groups.point(result, IDENTITY, view)


def _copied(groups: FusionGroups, call: Call) -> View:
    view = groups.read(call, 1)
    if call.result.dtype == torch.bool and not view.boolean:
        raise Unsuited
    return groups.point(call.result, IDENTITY, view)


def _reshaped(groups: FusionGroups, call: Call) -> View:
    """Copy numbers that do not lie as they do after a change of shape."""
    view, result = groups.read(call), call.result
    like = torch.empty(view.sizes, dtype=result.dtype)
    return groups.whole(result, groups.point(like, IDENTITY, view).buffer)


# constant indices -----------------------------------------------------------------------------------------------------


def _picked(groups: FusionGroups, call: Call) -> View:
    """Read entries along one dimension, in the order of constant indices."""
    source, result = groups.read(call), call.result
    axis = int_at(call.node, 1) % max(result.dim(), 1)
    index = _positions(groups, node_at(call.node, 2), axis, call.name == "gather")
    if source.index is not None or len(source.sizes) != result.dim() or call.kwargs:
        raise Unsuited
    taken = View(source.buffer, source.offset, tuple(result.shape), source.strides, source.boolean, index, axis)
    return groups.point(result, IDENTITY, taken)


def _spread(groups: FusionGroups, call: Call) -> View:
    """Add rows to zeros, at constant indices."""
    view, result = groups.read(call, 3), call.result
    axis = int_at(call.node, 1) % max(result.dim(), 1)
    if call.kwargs or not call.view(0).buffer.constant or bool(groups.tensor(node_at(call.node, 0)).any()):
        raise Unsuited
    index = _positions(groups, node_at(call.node, 2), axis, False)
    buffer = Buffer(span(result), fill=0.0)
    groups.add(IDENTITY, [view], View(buffer, 0, view.sizes, result.stride(), False, index, axis), ADD_UP)
    return groups.whole(result, buffer)


def _positions(groups: FusionGroups, node: fx.Node, axis: int, spread: bool) -> Buffer:
    """Return constant indices along an axis, of which there may be copies along the others."""
    value = groups.tensor(node)
    if not groups.view(node).buffer.constant:
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


STRUCTURED: dict[str, Rule] = {
    **dict.fromkeys(REDUCED, _along_axes),
    "logsumexp": _log_of_sum,
    "cumsum": _running,
    "cumprod": _running,
    "cat": _joined,
    "stack": _joined,
    "slice_backward": _placed,
    "select_backward": _placed,
    "diagonal_backward": _placed,
    "constant_pad_nd": _padded,
    "flip": _flipped,
    "tril": _triangle,
    "triu": _triangle,
    "clone": _same,
    "alias": _same,
    "detach": _same,
    "_to_copy": _same,
    "copy": _copied,
    "view": _reshaped,
    "index_select": _picked,
    "gather": _picked,
    "index_add": _spread,
}
