"""Operations that act on each number by itself: torch's, written with instructions of ``interpreter.c``.

An instruction takes registers, or a register and a number. What a code does stands in ``interpreter.c``; both
must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

import torch

from pyro_flows.graphs.views import Unsuited, View

_aten = torch.ops.aten
IDENTITY, NEG, ABS, EXP, LOG, LOG1P, EXPM1, SQRT, INVERSE, RSQRT, SQUARE, SIGMOID, TANH = range(13)
SIN, COS, ATAN, ERF, ERFC, SIGN, ISNAN, ISINF, IS_ZERO, IS_NOT_ZERO = range(13, 23)
TIMES, PLUS, FROM, OVER, UNDER, POWER, AT_LEAST, AT_MOST = range(23, 31)  # with a number
LT, LE, GT, GE, EQ, NE, NAN_TO, INF_TO, MINUS_INF_TO, CUBE, FLOOR, TAN, SINH, COSH, ASINH, ROUNDED = range(31, 47)
ADD, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM, LT2, LE2, GT2, GE2, EQ2, NE2, AND, OR, FILL, XLOGY = range(64, 81)
WHERE = 96
COMPARED = (*range(LT, NE + 1), *range(LT2, OR + 1), ISNAN, ISINF, IS_ZERO, IS_NOT_ZERO)
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def is_truth(code: int, operands: Sequence[View], number: float) -> bool:
    """Whether an instruction, with views for operands, gives zeros and ones."""
    if code == MUL:  # such as of isfinite
        return all(view.boolean for view in operands)
    if code not in (IDENTITY, FILL, WHERE):
        return code in COMPARED
    return number in (0.0, 1.0) and all(view.boolean for view in operands)


Operand = View | float | None


class Writer(Protocol):
    """Adds an instruction: its code, its operands, and a number. Raises :class:`Unsuited` if an operand is no view."""

    def __call__(self, code: int, *operands: Operand, number: float = 0.0) -> View: ...


Written = Callable[..., View]
_POWERS = {1.0: IDENTITY, 2.0: SQUARE, 3.0: CUBE, 0.5: SQRT, -1.0: INVERSE, -0.5: RSQRT}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_number(
    pair: int, single: int, swapped: int | None = None, change: Callable[[float], float] = float
) -> Written:
    """Write an operation of two operands, one of which may be a number."""

    def write(emit: Writer, x: Operand, y: Operand) -> View:
        if _is_number(y):
            return emit(single, x, number=change(y))
        if _is_number(x):
            if swapped is None:
                raise Unsuited
            return emit(swapped, y, number=float(x))
        return emit(pair, x, y)

    return write


def _one(code: int) -> Written:
    return lambda emit, x: emit(code, x)


_times = _with_number(MUL, TIMES, TIMES)
_plus = _with_number(ADD, PLUS, PLUS)
_minus = _with_number(SUB, PLUS, FROM, lambda number: -float(number))
_over = _with_number(DIV, OVER, UNDER)


def _added(emit: Writer, x: Operand, y: Operand, alpha: float = 1) -> View:
    return _plus(emit, x, y if alpha == 1 else _times(emit, y, alpha))


def _taken(emit: Writer, x: Operand, y: Operand, alpha: float = 1) -> View:
    return _minus(emit, x, y if alpha == 1 else _times(emit, y, alpha))


def _taken_from(emit: Writer, x: Operand, y: Operand, alpha: float = 1) -> View:
    return _taken(emit, y, x, alpha)


def _power(emit: Writer, x: Operand, y: Operand) -> View:
    if not _is_number(y):
        return emit(POW, x, y)
    code = _POWERS.get(float(y))
    return emit(POWER, x, number=float(y)) if code is None else emit(code, x)


def _clamped(emit: Writer, x: View, low: Operand = None, high: Operand = None) -> View:
    for limit, code, pair in ((low, AT_LEAST, MAXIMUM), (high, AT_MOST, MINIMUM)):
        if _is_number(limit):
            x = emit(code if limit == limit else PLUS, x, number=float(limit))  # a limit that is no number makes none
        elif limit is not None:
            x = emit(pair, x, limit)
    return x


def _chosen(emit: Writer, condition: Operand, x: Operand, y: Operand) -> View:
    return emit(WHERE, x, y, condition)


def _filled(emit: Writer, x: Operand, mask: Operand, number: Operand) -> View:
    return emit(FILL, x, mask, number=float(number)) if _is_number(number) else emit(WHERE, number, x, mask)


def _finite(emit: Writer, x: View, *numbers: float | None) -> View:
    most = torch.finfo(torch.float64).max
    given = [*numbers, None, None, None]
    for code, number, otherwise in zip((NAN_TO, INF_TO, MINUS_INF_TO), given, (0.0, most, -most), strict=False):
        x = emit(code, x, number=otherwise if number is None else float(number))
    return x


def _added_to(join: Written) -> Written:
    """Add a product or a quotient, and a number times it."""
    return lambda emit, x, y, z, value=1: _plus(emit, x, join(emit, y if value == 1 else _times(emit, y, value), z))


def _softplus(emit: Writer, x: Operand, beta: float = 1, threshold: float = 20) -> View:
    scaled = _times(emit, x, beta)
    soft = _over(emit, emit(LOG1P, emit(EXP, scaled)), beta)
    return emit(WHERE, x, soft, emit(GT, scaled, number=float(threshold)))


def _softplus_backward(emit: Writer, gradient: Operand, x: Operand, beta: float, threshold: float) -> View:
    scaled = _times(emit, x, beta)
    soft = _times(emit, gradient, emit(SIGMOID, scaled))
    return emit(WHERE, gradient, soft, emit(GT, scaled, number=float(threshold)))


def _log_sigmoid(emit: Writer, x: Operand) -> View:
    return _minus(emit, emit(AT_MOST, x, number=0.0), emit(LOG1P, emit(EXP, emit(NEG, emit(ABS, x)))))


def _silu_backward(emit: Writer, gradient: Operand, x: Operand) -> View:
    soft = emit(SIGMOID, x)
    return _times(emit, _times(emit, gradient, soft), _plus(emit, _times(emit, x, _minus(emit, 1.0, soft)), 1.0))


def _between(emit: Writer, x: Operand, y: Operand, weight: Operand) -> View:
    """Go from the nearer end, as torch does: what is there is then met without rounding."""
    far = _minus(emit, y, x)
    from_x = _plus(emit, x, _times(emit, far, weight))
    rest = 1.0 - weight if _is_number(weight) else _minus(emit, 1.0, weight)
    from_y = _minus(emit, y, _times(emit, far, rest))
    if _is_number(weight):
        return from_x if abs(weight) < 0.5 else from_y
    return emit(WHERE, from_x, from_y, emit(LT, emit(ABS, weight), number=0.5))


POINTS: dict[object, Written] = {
    _aten.neg.default: _one(NEG),
    _aten.abs.default: _one(ABS),
    _aten.exp.default: _one(EXP),
    _aten.log.default: _one(LOG),
    _aten.log1p.default: _one(LOG1P),
    _aten.expm1.default: _one(EXPM1),
    _aten.sqrt.default: _one(SQRT),
    _aten.rsqrt.default: _one(RSQRT),
    _aten.reciprocal.default: _one(INVERSE),
    _aten.square.default: _one(SQUARE),
    _aten.sigmoid.default: _one(SIGMOID),
    _aten.tanh.default: _one(TANH),
    _aten.sin.default: _one(SIN),
    _aten.cos.default: _one(COS),
    _aten.tan.default: _one(TAN),
    _aten.atan.default: _one(ATAN),
    _aten.sinh.default: _one(SINH),
    _aten.cosh.default: _one(COSH),
    _aten.asinh.default: _one(ASINH),
    _aten.erf.default: _one(ERF),
    _aten.erfc.default: _one(ERFC),
    _aten.sign.default: _one(SIGN),
    _aten.sgn.default: _one(SIGN),
    _aten.floor.default: _one(FLOOR),
    _aten.isnan.default: _one(ISNAN),
    _aten.isinf.default: _one(ISINF),
    _aten.logical_not.default: _one(IS_ZERO),
    _aten.bitwise_not.default: _one(IS_ZERO),
    _aten.add.Tensor: _added,
    _aten.add.Scalar: _added,
    _aten.sub.Tensor: _taken,
    _aten.sub.Scalar: _taken,
    _aten.rsub.Tensor: _taken_from,
    _aten.rsub.Scalar: _taken_from,
    _aten.mul.Tensor: _times,
    _aten.mul.Scalar: _times,
    _aten.div.Tensor: _over,
    _aten.div.Scalar: _over,
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _power,
    _aten.addcmul.default: _added_to(_times),
    _aten.addcdiv.default: _added_to(_over),
    _aten.maximum.default: lambda emit, x, y: emit(MAXIMUM, x, y),
    _aten.minimum.default: lambda emit, x, y: emit(MINIMUM, x, y),
    _aten.clamp.default: _clamped,
    _aten.clamp.Tensor: _clamped,
    _aten.clamp_min.default: _clamped,
    _aten.clamp_min.Tensor: _clamped,
    _aten.clamp_max.default: lambda emit, x, high: _clamped(emit, x, None, high),
    _aten.clamp_max.Tensor: lambda emit, x, high: _clamped(emit, x, None, high),
    _aten.where.self: _chosen,
    _aten.masked_fill.Scalar: _filled,
    _aten.masked_fill.Tensor: _filled,
    _aten.nan_to_num.default: _finite,
    _aten.logical_and.default: lambda emit, x, y: emit(AND, x, y),
    _aten.logical_or.default: lambda emit, x, y: emit(OR, x, y),
    _aten.bitwise_and.Tensor: lambda emit, x, y: emit(AND, x, y),
    _aten.bitwise_or.Tensor: lambda emit, x, y: emit(OR, x, y),
    _aten.sigmoid_backward.default: lambda emit, cotangent, y: _times(
        emit, cotangent, _times(emit, _minus(emit, 1.0, y), y)
    ),
    _aten.tanh_backward.default: lambda emit, cotangent, y: _times(emit, cotangent, _minus(emit, 1.0, emit(SQUARE, y))),
    _aten.softplus.default: _softplus,
    _aten.softplus_backward.default: _softplus_backward,
    _aten.silu.default: lambda emit, x: _over(emit, x, _plus(emit, emit(EXP, emit(NEG, x)), 1.0)),
    _aten.silu_backward.default: _silu_backward,
    _aten.lerp.Tensor: _between,
    _aten.lerp.Scalar: _between,
    _aten.relu.default: lambda emit, x: emit(AT_LEAST, x, number=0.0),
    _aten.xlogy.Tensor: lambda emit, x, y: emit(XLOGY, x, y),
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten.log_sigmoid_backward.default: lambda emit, cotangent, x, _: _times(
        emit, cotangent, emit(SIGMOID, emit(NEG, x))
    ),
}
_COMPARISONS = {
    "lt": (LT, LT2),
    "le": (LE, LE2),
    "gt": (GT, GT2),
    "ge": (GE, GE2),
    "eq": (EQ, EQ2),
    "ne": (NE, NE2),
}
for _name, (_single, _pair) in _COMPARISONS.items():
    for _kind in ("Scalar", "Tensor"):
        POINTS[getattr(getattr(_aten, _name), _kind)] = _with_number(_pair, _single)
