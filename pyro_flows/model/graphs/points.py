"""Operations that act on each number by itself: torch's, by name, written with instructions of ``interpreter.c``.

An instruction takes registers, or a register and a number. What a code does stands in ``interpreter.c``; both
must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

import torch

from pyro_flows.model.graphs.views import Unsuited, View

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


def _instruction(code: int) -> Written:
    return lambda emit, *operands: emit(code, *operands)


_times = _with_number(MUL, TIMES, TIMES)
_plus = _with_number(ADD, PLUS, PLUS)
_minus = _with_number(SUB, PLUS, FROM, lambda number: -float(number))
_over = _with_number(DIV, OVER, UNDER)


def _with_alpha(join: Written) -> Written:
    """Add a number times the second operand, or take it away."""
    return lambda emit, x, y, alpha=1: join(emit, x, y if alpha == 1 else _times(emit, y, alpha))


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


_OF_THE_SAME_NAME = (  # each is one instruction
    "neg abs exp log log1p expm1 sqrt rsqrt square sigmoid tanh sin cos tan atan sinh cosh asinh erf erfc sign floor "
    "isnan isinf maximum minimum xlogy"
)
POINTS: dict[str, Written] = {
    **{name: _instruction(globals()[name.upper()]) for name in _OF_THE_SAME_NAME.split()},
    "reciprocal": _instruction(INVERSE),
    "sgn": _instruction(SIGN),
    "logical_not": _instruction(IS_ZERO),
    "bitwise_not": _instruction(IS_ZERO),
    "logical_and": _instruction(AND),
    "logical_or": _instruction(OR),
    "bitwise_and": _instruction(AND),
    "bitwise_or": _instruction(OR),
    "lt": _with_number(LT2, LT),
    "le": _with_number(LE2, LE),
    "gt": _with_number(GT2, GT),
    "ge": _with_number(GE2, GE),
    "eq": _with_number(EQ2, EQ),
    "ne": _with_number(NE2, NE),
    "add": _with_alpha(_plus),
    "sub": _with_alpha(_minus),
    "rsub": lambda emit, x, y, alpha=1: _with_alpha(_minus)(emit, y, x, alpha),
    "mul": _times,
    "div": _over,
    "pow": _power,
    "addcmul": _added_to(_times),
    "addcdiv": _added_to(_over),
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": lambda emit, x, high: _clamped(emit, x, None, high),
    "where": lambda emit, condition, x, y: emit(WHERE, x, y, condition),
    "masked_fill": _filled,
    "nan_to_num": _finite,
    "sigmoid_backward": lambda emit, cotangent, y: _times(emit, cotangent, _times(emit, _minus(emit, 1.0, y), y)),
    "tanh_backward": lambda emit, cotangent, y: _times(emit, cotangent, _minus(emit, 1.0, emit(SQUARE, y))),
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "silu": lambda emit, x: _over(emit, x, _plus(emit, emit(EXP, emit(NEG, x)), 1.0)),
    "silu_backward": _silu_backward,
    "lerp": _between,
    "relu": lambda emit, x: emit(AT_LEAST, x, number=0.0),
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": lambda emit, cotangent, x, _: _times(emit, cotangent, emit(SIGMOID, emit(NEG, x))),
}
