"""Whether two ways to run a graph give the same results but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

IN_A_ROW = 1e-2  # part of a relative tolerance that counts against the largest number in a row
HUGE = 1e6  # in units of a log density, or of a gradient in coordinates of about one
DIGITS = tuple(sign * 2.0**power for power in range(6) for sign in (1.0, -1.0))  # of the last place, by which points
# are moved to see how much depends on rounding
FARTHER = tuple(2.0 ** (16 + half / 2) for half in range(20))  # such digits of double precision, to both sides
SINGLE, MOST = 1e-3, 0.9  # tolerance in single precision, and the share of results that has to be within it
ALIKE, CLOSE = 10.0, 1e-12  # times the change of results by that, and part of them, that rounding may make
TAME = 2.0  # scales, and distances in units of scales, that cancel no digits
LOST = 0.1  # part of a result that such a change makes where no digits are left: numbers cancelled


def agree(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether numbers are equal but for rounding, and masks and counts are equal.

    Rounding takes more digits of results that are as large as `HUGE`, and of the small numbers in one row with large
    ones: such gradients stand at points where scales are next to nothing, and are differences of still larger numbers.
    """

    def close(one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not (other.is_floating_point() or other.is_complex()):
            return torch.equal(one, other)
        tolerance = 1e-8 if other.dtype == torch.float64 else 1e-3
        same = torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        same |= (other.abs() > HUGE) & torch.isclose(one, other, rtol=max(tolerance, 1e-5), equal_nan=True)
        if other.dim() > 1 and other.numel() and not same.all():
            largest = other.abs().where(torch.isfinite(other), 0).amax(-1, keepdim=True)
            same |= (one - other).abs() <= IN_A_ROW * tolerance * largest
        return bool(same.all())

    return all(close(one, other) for one, other in zip(found, expected, strict=True))


def _comparable(found: Tensor, expected: Tensor) -> Tensor:
    """Return results, with the expected ones in the place of few that single precision spoils.

    These are at points where it overflows, or where large numbers cancel: double precision gives others there.
    """
    if expected.dtype != torch.float32:
        return found
    usable = torch.isfinite(expected)
    alike = ~usable | torch.isclose(found, expected, rtol=SINGLE, atol=SINGLE)
    few = not usable.any() or float(alike[usable].double().mean()) >= MOST
    return torch.where(alike & usable, found, expected) if few else found


def rounds_alike(
    module: fx.GraphModule, inputs: Sequence[Tensor], found: Sequence[Tensor], expected: Sequence[Tensor]
) -> bool:
    """Whether what was found for some inputs is what a graph gives there, but for rounding.

    A graph that rounds to single precision on its way has results of that precision: torch's half-Cauchy density takes
    the precision of its scale, whatever that of its argument.
    """
    made = [node.meta.get("val") for node in module.graph.nodes if node.op == "call_function"]
    if any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in made):
        found, expected = (
            tuple(value.float() if value.dtype == torch.float64 else value for value in values)
            for values in (found, expected)
        )
    found = tuple(map(_comparable, found, expected))
    return agree(found, expected) or within_rounding(module, inputs, found, expected)


def tame(inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return inputs without large numbers, if there are some in single precision.

    This fails at some points: where a scale is next to nothing, a sum forgets its smaller term, and whoever never adds
    the two up has other results, and the better ones. Such points do not tell whether two ways do the same.
    """
    if all(value.dtype != torch.float32 for value in inputs):
        return None
    return [value.clamp(-TAME, TAME) if value.dtype == torch.float32 else value for value in inputs]


def rounds_alike_where_tame(
    module: fx.GraphModule, inputs: Sequence[Tensor], made: Callable[..., Sequence[Tensor]]
) -> bool:
    """Whether another way to run a graph gives the same results at :func:`tame` inputs, if these are all finite."""
    others = tame(inputs)
    if others is None:
        return False
    expected = module(*others)
    finite = all(bool(value.isfinite().all()) for value in expected)
    return finite and rounds_alike(module, others, made(*others), expected)


def within_rounding(
    module: fx.GraphModule, inputs: Sequence[Tensor], found: Sequence[Tensor], expected: Sequence[Tensor]
) -> bool:
    """Whether results differ no more than they do if inputs change by last digits, as with a matrix near singular.

    Where an input is added to a large number, its last digits are lost, and those of the sum change with larger steps
    only. Of steps in double precision to both sides, second differences are what rounding makes: Moré and Wild 2011,
    *Estimating computational noise*.

    A result in single precision counts as a whole where no digits are left of nearly all of its numbers: the small ones
    have the errors of the large ones.
    """
    largest = [torch.zeros_like(value, dtype=torch.float64) for value in expected]
    for digits in DIGITS:
        moved = [moved_by(value, digits) for value in inputs]
        for size, value, other in zip(largest, expected, module(*moved), strict=True):
            torch.maximum(size, _apart(other, value), out=size)
    for digits in FARTHER if all(value.dtype != torch.float32 for value in inputs) else ():
        above, below = (module(*[moved_by(value, step) for value in inputs]) for step in (digits, -digits))
        for size, value, *others in zip(largest, expected, above, below, strict=True):
            torch.maximum(size, _apart(0.5 * others[0] + 0.5 * others[1], value), out=size)
    return all(map(_is_rounding, found, expected, largest))


def _is_rounding(one: Tensor, value: Tensor, change: Tensor) -> bool:
    """Whether a result that is found differs from the expected one by not much more than the change by last digits."""
    apart, size = _apart(one, value), value.double().abs().nan_to_num(nan=0.0)
    near = apart <= ALIKE * change + CLOSE * size
    if bool(near.all()):
        return True
    lost = change.isfinite() & (change > 0.0) & (change >= LOST * size)
    if value.dtype != torch.float32 or not lost.any() or lost.sum() < MOST * ((size > 0.0) | (change > 0.0)).sum():
        return False
    return bool((near | (apart <= ALIKE * change[lost].max())).all())


def moved_by(value: Tensor, digits: float) -> Tensor:
    """Return numbers that differ by so many units of the last place, of one at least."""
    if not value.is_floating_point():
        return value
    return value + digits * torch.finfo(value.dtype).eps * (1.0 + value.abs())


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Return how far numbers are apart: not at all if both are not numbers, or the same infinity."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one.double() - other.double()).abs().nan_to_num(nan=math.inf))
