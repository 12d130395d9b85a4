"""Products, triangular systems and Cholesky factors of small matrices, as tasks: number by number for all of a batch.

Torch calls a library for each matrix of a batch, which takes a microsecond for a matrix of 3 by 3.
"""

from __future__ import annotations

from math import prod

from pyro_flows.graphs.fusion_groups import FusionGroups, Rule
from pyro_flows.graphs.points import ADD, DIV, IDENTITY, MUL, SQRT, SUB
from pyro_flows.graphs.structured import side_by_side
from pyro_flows.graphs.views import STORE, Buffer, Call, Product, Unsuited, View, dense, span

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
