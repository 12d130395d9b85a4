r"""Sums of terms inside of a log density, as mixtures have them: each term is a density that can be climbed by itself.

Where a model computes :math:`\log \sum_k e^{a_k(z)}` (``torch.logsumexp`` and ``torch.logaddexp``; a
``MixtureSameFamily``; a discrete latent that is summed out), the modes of the whole are near those of the density with
one term in the place of the sum. In 100 dimensions the wide terms of a mixture rule nearly everywhere: no climb from
afar comes to a narrow one. A climb of its own term leads there from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_flows.inference.starts.climb import TICKS, climb
from pyro_flows.inference.starts.curvature import differences, inverse_roots_of, lower_triangular
from pyro_flows.inference.starts.prior import SAME, unit_of_modes, units_of
from pyro_flows.model.batching import hessians, quiet, values_and_grads, where_possible
from pyro_flows.model.faults import Undefined
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers.tensors import broadcast

SUMS, FEW = 16, 2  # at most, and with several results: with more, a model sums over paths, as those of Markov chains do
_SUMS = (torch.logsumexp, torch.Tensor.logsumexp, torch.special.logsumexp)
_PAIRS = (torch.logaddexp, torch.Tensor.logaddexp)
_GREATER = (torch.maximum, torch.Tensor.maximum, torch.max, torch.Tensor.max)  # the last two of two tensors
_ADDED = {"add", "__add__", "__radd__", "__iadd__", "add_"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply", "__imul__", "mul_"}
_QUOTIENTS = {"div", "__truediv__", "divide", "true_divide", "__itruediv__", "div_"}
_INNER = {"matmul", "__matmul__", "__rmatmul__", "dot", "inner", "mv"}  # of a vector with the last axis of another
_TOTALS, _STACKED = {"sum", "mean"}, {"stack", "cat", "hstack"}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
UNKNOWN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)  # forms that are not followed
MOST_TERMS = 64  # of a sum that is followed: a recursion of products and sums doubles them at each step
_ARITHMETIC = _ADDED | _PRODUCTS | _QUOTIENTS
_SHAPED = {"reshape", "unsqueeze", "squeeze", "expand", "__getitem__", "flatten", "clone", "to", "double"}

Number = Tensor | float


class Sums(TorchFunctionMode):
    r"""Looks at the sums of positive terms whose logarithm is taken, in order: :math:`\log \sum_k e^{a_k}`.

    ``torch.logsumexp`` and ``torch.logaddexp`` say what their terms are. Where a sum is written by hand, as
    ``m + torch.log(torch.exp(a - m) + torch.exp(b - m))``, the logarithms of its terms are carried along from ``exp``
    on, through products, quotients, stacks and sums, up to the ``log``. A term that underflows keeps its logarithm, so
    that it can be climbed from anywhere. The greater of two numbers counts as a sum of both: it is the limit of one,
    and a part of ``torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))``. ``softplus`` is not followed: the
    Jacobian of each probability has two of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logs: dict[int, tuple[Tensor, Tensor]] = {}  # of tensors, by their id: these are kept, and so is it
        self._terms: dict[int, tuple[Tensor, Tensor]] = {}  # logs of terms (..., K) of tensors that are sums
        self._long: dict[int, Tensor] = {}  # sums of too many terms, and what arithmetic made of them

    def __torch_function__(
        self, func: Callable[..., Tensor], types: object, args: tuple[Number, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        summed = terms = log = None
        with suppress(*UNKNOWN):  # before the function: what it changes in place is another number afterwards
            summed = self._summed(func, name, args, kwargs)
            terms, log = self._before(name, args, kwargs) if summed is None else (None, None)
        found = func(*args, **kwargs)
        if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
            changed = args[0] if name in _WRITES and args else found
            self._terms.pop(id(changed), None)
            self._logs.pop(id(changed), None)
        if summed is not None:
            return self.take(summed, found, func in _GREATER)
        long = terms is not None and terms.shape[-1] > MOST_TERMS
        if long or (name in _ARITHMETIC and any(id(part) in self._long for part in args)):
            self._long[id(found)] = found
            return found
        if terms is not None:
            same = terms[..., 0].numel() == found.numel()  # a total may have kept axes that were summed
            shaped = terms.reshape(*found.shape, -1) if same else terms.expand(*found.shape, -1)
            self._terms[id(found)] = found, shaped
        if log is not None:
            self._logs[id(found)] = found, log
        return found

    def take(self, terms: Tensor, total: Tensor, greater: bool) -> Tensor:
        """Return what is to stand for a sum, or the ``greater`` of two, given the logs of terms along a last axis."""
        raise NotImplementedError

    def _summed(
        self, func: Callable[..., Tensor], name: str, args: tuple[Number, ...], kwargs: Mapping[str, object]
    ) -> Tensor | None:
        """Return the logs (..., K) of the terms of a sum whose logarithm a function is about to return."""
        tensors = cast("tuple[Tensor, ...]", args)
        if func in _PAIRS or (func in _GREATER and len(args) == 2 and isinstance(args[1], Tensor)):
            return torch.stack(torch.broadcast_tensors(*tensors[:2]), -1)
        if func in _SUMS:
            return _last(tensors[0], kwargs.get("dim", args[1] if len(args) > 1 else None))
        if name not in ("log", "log1p") or not self._is_known(args[:1]):
            return None
        if name == "log":
            return self._terms[id(args[0])][1] if id(args[0]) in self._terms else None
        terms = self._addends(args[0])
        return torch.cat([torch.zeros_like(terms[..., :1]), terms], -1)

    def _is_known(self, parts: Sequence[Number]) -> bool:
        return any(id(part) in self._logs or id(part) in self._terms for part in parts)

    def _before(
        self, name: str, args: tuple[Number, ...], kwargs: Mapping[str, object]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logs of the terms of what a function is about to return, or its log; None where unknown."""
        if name == "exp":
            return None, cast(Tensor, args[0])
        parts = cast("Sequence[Number]", args[0]) if name in _STACKED and args else args[:2]
        if not self._is_known(parts):
            return None, None
        if name in _ADDED and "alpha" not in kwargs:
            return _joined([self._addends(part) for part in parts if isinstance(part, Tensor) or part != 0]), None
        if name in _PRODUCTS | _QUOTIENTS:
            return self._scaled(parts[0], parts[1], -1.0 if name in _QUOTIENTS else 1.0)
        if name in _INNER and all(torch.as_tensor(part).dim() == 1 for part in parts):
            return self._log(parts[0]) + self._log(parts[1]), None
        if name in _TOTALS and id(parts[0]) in self._logs:
            log = _last(self._log(parts[0]), kwargs.get("dim", args[1] if len(args) > 1 else None))
            return log - (math.log(log.shape[-1]) if name == "mean" else 0.0), None
        if name in _STACKED and not any(id(part) in self._terms for part in parts):
            return None, getattr(torch, name)([self._log(part) for part in parts], *args[1:], **kwargs)
        if name in _SHAPED and id(parts[0]) in self._logs:
            return None, getattr(torch.Tensor, name)(self._log(parts[0]), *args[1:], **kwargs)
        return None, None

    def _scaled(self, first: Number, second: Number, sign: float) -> tuple[Tensor | None, Tensor | None]:
        """Return the same of a product (sign 1) or of a quotient (sign -1)."""
        if id(second) in self._terms:
            if sign < 0.0 or id(first) in self._terms:
                return None, None
            first, second = second, first
        other = sign * self._log(second)
        if id(first) in self._terms:
            return self._addends(first) + other[..., None], None
        return None, self._log(first) + other

    def _log(self, x: Number) -> Tensor:
        """Return the log of a number or tensor: the one that is known, or a new one."""
        if id(x) in self._logs:
            return self._logs[id(x)][1]
        return torch.log(x if isinstance(x, Tensor) else torch.tensor(float(x)))

    def _addends(self, x: Number) -> Tensor:
        """Return the logs of the terms (..., K) of a tensor, of its own where it is no sum."""
        return self._terms[id(x)][1] if id(x) in self._terms else self._log(x)[..., None]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Return terms (..., K) of several sums, side by side."""
    parts = list(parts)
    shape = broadcast(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


def _last(x: Tensor, axis: object) -> Tensor:
    """Return x with some axes, all by default, moved to the end, and made one."""
    axes = [axis] if isinstance(axis, int) else [*(range(x.dim()) if axis is None else cast("Sequence[int]", axis))]
    return x if not axes else x.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))


class Counting(Sums):
    """Notes how many results each sum has, and of how many terms: one of each where a term is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def take(self, terms: Tensor, total: Tensor, greater: bool) -> Tensor:
        positive = terms.dim() > 0 and not bool(terms.isnan().any())
        self.sizes.append((total.numel(), terms.shape[-1]) if positive else (1, 1))
        return total


class Taking(Sums):
    """Takes the terms of one branch in the place of one of some ``sums``, whose numbers are given.

    The others are computed by ``logsumexp``: where all terms of a sum underflow, its own log has no gradient.
    """

    def __init__(self, branch: Tensor, sums: frozenset[int]) -> None:
        super().__init__()
        self.branch, self.sums, self.number = branch, sums, -1

    def take(self, terms: Tensor, total: Tensor, greater: bool) -> Tensor:
        self.number += 1
        results = total.numel()
        if self.number not in self.sums:
            return total
        if not greater:
            total = torch.logsumexp(terms, -1).reshape(total.shape)
        chosen = self.branch[1 : 1 + results, None].clamp_max(terms.shape[-1] - 1)  # of another sum, it may be more
        if len(chosen) < results:
            return total
        taken = torch.gather(terms.reshape(results, -1), 1, chosen).reshape(total.shape)
        return torch.where(self.branch[0] == self.number, taken, total)


class Terms:
    """A log density whose points (S, D + 1) say in their last number which branch they are in.

    Branches are rows (B, 1 + M): the number of a sum, and for each of its M results the term that is taken. There are
    none where the density has no sum of few terms, or is not batched.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density, self.dim = density, density.dim + 1
        self.numbers, self.written = density.numbers, density.written
        found = Counting()
        if density.batched:
            try:
                with quiet(), found:
                    density.single(z[0])
            except Undefined:  # no sum is known there
                found.sizes.clear()
        sums = [(number, size) for number, size in enumerate(found.sizes) if 1 < size[1] ** size[0] <= MOST_TERMS]
        sums = [(number, size) for number, size in sums if len(sums) <= SUMS and (size[0] == 1 or len(sums) <= FEW)]
        rows = [
            [number, *chosen] for number, (results, terms) in sums for chosen in product(range(terms), repeat=results)
        ]
        width = max((len(row) for row in rows), default=1)
        self._sums = frozenset(number for number, _ in sums)
        filled = [row + [0] * (width - len(row)) for row in rows[: 2 * MOST_TERMS]]  # densities in all
        self.branches = torch.tensor(filled, dtype=torch.long, device=z.device).reshape(-1, width)

    def value_and_grad(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the log densities (S,) of the branches, and their gradients (S, D + 1)."""
        with quiet():
            found = where_possible(lambda part: values_and_grads(self._value, part), z, (), (self.dim,))
        return found[0], found[1]

    def hessians(self, points: Tensor) -> Tensor:
        """Return the second derivatives (S, D, D) by the model's own coordinates."""
        try:
            with quiet():
                return hessians(self._value, points)[:, :-1, :-1]
        except RuntimeError:
            own = torch.arange(self.dim - 1, device=points.device)
            return torch.stack([differences(self, point, own)[:, :-1] for point in points])

    def _value(self, point: Tensor) -> Tensor:
        number = point[-1:].detach().nan_to_num(nan=0.0).clamp(0, len(self.branches) - 1)  # a lost climb has none
        branch = self.branches.index_select(0, number.round().long())[0]
        with Taking(branch, self._sums):
            return self.density.single(point[:-1])


class TopsOfTerms(NamedTuple):
    """Points (N, D) where terms are highest, roots L (N, D, D) of their Laplace covariances, log masses (N,)."""

    places: Tensor
    roots: Tensor
    evidence: Tensor
    edges: Tensor  # (M, D): where terms without a top are highest, as the lesser of two, to climb the whole from


@torch.no_grad()
def tops_of_terms(density: LogDensity, z: Tensor, rows: int) -> TopsOfTerms:
    """Climb from draws z (S, D) the densities that have one term in the place of a sum; return normals where it ends.

    Cost: that of :func:`places_of_terms`, and a Hessian for each of the highest ends, at most so many ``rows`` of these
    in all.
    """
    terms, points, edges = _climbed(density, z)
    points = points[: max(1, rows // density.dim)]
    if not len(points):
        return TopsOfTerms(z[:0], z[:0, :, None].expand(-1, -1, density.dim), z[:0, 0], edges)
    roots = lower_triangular(inverse_roots_of(terms.hessians(points))[0])
    size = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * density.dim * math.log(2.0 * math.pi)
    return _distinct(TopsOfTerms(points[:, :-1], roots, terms.value_and_grad(points)[0] + size, edges))


@torch.no_grad()
def places_of_terms(density: LogDensity, z: Tensor) -> Tensor:
    """Return where the paths of :func:`tops_of_terms` end (N, D), the highest first, one for each term.

    A term that is above the whole somewhere is none of a sum of densities, as where weights are normalized. Cost: one
    evaluation to find the sums; then up to 100 gradients, without a recorded graph, for each of three paths a term.
    """
    _, tops, edges = _climbed(density, z)
    return torch.cat([tops[:, :-1], edges])


def _climbed(density: LogDensity, z: Tensor) -> tuple[Terms, Tensor, Tensor]:
    """Return the terms, points (N, D + 1) at their tops, the highest first, and where those without one end (M, D)."""
    terms = Terms(density, z)
    count, starts = len(terms.branches), z[:3]
    which = torch.arange(count, device=z.device).repeat_interleave(len(starts)).to(z)
    points = torch.cat([starts.repeat(count, 1), which[:, None]], 1)
    if not count:
        return terms, points, z[:0]
    units = torch.cat([units_of(z, full=False), z.new_ones(1)]).expand(points.shape)
    ends = climb(terms, points, units, ticks=TICKS)
    heights = torch.where(ends.settled, ends.heights, -torch.inf).reshape(count, -1)
    best = heights.argmax(1) + len(starts) * torch.arange(count, device=z.device)
    points, heights = ends.points[best], heights.amax(1)
    topless = ~torch.isfinite(heights).repeat_interleave(len(starts)) & torch.isfinite(ends.heights)
    below = heights <= density(points[:, :-1]) + 1e-4 * (1.0 + heights.abs())  # but for rounding in single precision
    order = heights.argsort(descending=True)
    return terms, points[order[(below & torch.isfinite(heights))[order]]], ends.points[topless, :-1]


def _distinct(tops: TopsOfTerms) -> TopsOfTerms:
    """Return the normals that differ in place, or by 0.3 in the log of the width, from those with more mass."""
    kept: list[int] = []
    widths = tops.roots.diagonal(dim1=-2, dim2=-1).log().mean(-1)
    for number in tops.evidence.argsort(descending=True).tolist():
        away = tops.places[number] - tops.places[kept]
        x = torch.linalg.solve_triangular(tops.roots[kept], away[..., None], upper=False)[..., 0]
        near = x.norm(dim=-1) < SAME * unit_of_modes(x.shape[-1])
        if not bool((near & ((widths[kept] - widths[number]).abs() < 0.3)).any()):
            kept.append(number)
    return TopsOfTerms(tops.places[kept], tops.roots[kept], tops.evidence[kept], tops.edges)
