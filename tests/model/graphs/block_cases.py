"""Operations that go block by block, with what they are tested on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.registry import normal

aten = torch.ops.aten
inf, nan = math.inf, math.nan
MILD = torch.tensor(
    [nan, inf, -inf, 0.0, -0.0, 1e-300, 1e-20, -1e-8, 0.1, 0.5, -0.5, 1.0, -1.0, 1.0 - 1e-16, 2.0, -2.0, 2.5, 3.0, -3.0,
     5.9, -5.9, 19.9, 20.0, 20.1, -26.0, 37.5, -37.5, 123.4, -700.0, 1e6, -1e10, math.pi, -math.pi / 2, 1e15, -1e100],
    dtype=torch.float64,
)  # fmt: skip
EDGES = torch.tensor(
    [1e308, -1e308, 5e-324, -5e-324, 2.3e-308, 709.7, 710.5, -710.5, 745.0, -745.2, 1e22, 2.0**52 + 0.5, 0.5 - 1e-16],
    dtype=torch.float64,
)  # fmt: skip
NUMBERS = (2.0, 1.0, 0.5, -1.0, -0.5, 3.0, 0.0, 2.5, -2.0, inf, nan, 2, 0)


def pairs(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each value with each other one, and a third one."""
    first, second = values.repeat_interleave(len(values)), values.repeat(len(values))
    return first, second, first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]


A, B, C = pairs(torch.cat([MILD, EDGES]))
X, Y, Z = pairs(MILD)  # where numbers in between may overflow otherwise than torch's
TRUTH, OTHER = torch.arange(len(A)) % 3 == 0, torch.arange(len(A)) % 2 == 0
ONE, TWO = (A,), (A, B)
NUMBERED = [(A, number) for number in NUMBERS]
OF_ONE = (
    "neg", "abs", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "square", "sigmoid", "tanh",
    "sin", "cos", "tan", "atan", "sinh", "cosh", "asinh", "erf", "erfc", "sign", "sgn", "floor", "isnan",
    "isinf", "logical_not", "softplus", "silu", "relu", "nan_to_num", "log_sigmoid_forward",
)  # fmt: skip
OF_TWO = (
    "add.Tensor", "sub.Tensor", "rsub.Tensor", "mul.Tensor", "div.Tensor", "pow.Tensor_Tensor", "maximum",
    "minimum", "logical_and", "logical_or", "clamp_min.Tensor", "clamp_max.Tensor", "xlogy.Tensor",
    "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "eq.Tensor", "ne.Tensor",
)  # fmt: skip
WITH_NUMBER = (
    "add.Scalar", "sub.Scalar", "rsub.Scalar", "mul.Scalar", "div.Scalar", "pow.Tensor_Scalar", "clamp_min",
    "clamp_max", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar", "eq.Scalar", "ne.Scalar",
)  # fmt: skip
CASES: dict[str, list] = {
    **{name: [ONE] for name in OF_ONE},
    **{name: [TWO] for name in OF_TWO},
    **dict.fromkeys(WITH_NUMBER, NUMBERED),
    "bitwise_not": [(TRUTH,)],
    "bitwise_and.Tensor": [(TRUTH, OTHER)],
    "bitwise_or.Tensor": [(TRUTH, OTHER)],
    "where.self": [(TRUTH, A, B), (OTHER, TRUTH, OTHER)],
    "masked_fill.Scalar": [(A, TRUTH, 2.5), (A, TRUTH, nan), (OTHER, TRUTH, 1)],
    "masked_fill.Tensor": [(A, TRUTH, torch.tensor(1.5, dtype=torch.float64))],
    "clamp": [(A, low, high) for low in (None, -1.0, nan) for high in (1.0, inf, -2, nan)] + [(A, 0.0)],
    "clamp.Tensor": [(A, B, C), (A, None, C), (A, B)],
    "nan_to_num": [ONE, (A, 1.0), (A, None, 2.0, 3.0)],
    "softplus": [ONE, (X, 2.0, 10.0)],
    "addcmul": [(X, Y, Z)],
    "addcdiv": [(X, Y, Z)],
    "sigmoid_backward": [(X, Y.clamp(0.0, 1.0))],
    "tanh_backward": [(X, Y.clamp(-1.0, 1.0))],
    "softplus_backward": [(X, Y, 1.0, 20.0), (X, Y, 2.0, 10.0)],
    "silu_backward": [(X, Y)],
    "log_sigmoid_backward": [(X, Y, aten.log_sigmoid_forward(Y)[1])],
    "lerp.Tensor": [(X, Y, Z.clamp(0.0, 1.0))],
    "lerp.Scalar": [(X, Y, weight) for weight in (0.0, 0.3, 0.5, 0.9, 1.0)],
}


def cube() -> Tensor:
    return normal(4, 5, 6, seed=0)


def special() -> Tensor:
    """A row of each: infinities, no number, and all the same."""
    x = cube()
    x[0, 0], x[1, 1, 2], x[2, 2, 2], x[3, 3], x[2, 4, :2] = -inf, inf, nan, 0.5, torch.tensor([inf, -inf])
    return x


INDEX, SORTED = torch.tensor([4, 0, 0, 2, 4, 1]), torch.tensor([0, 0, 1, 1, 1, 3])
ALONG = INDEX.reshape(1, -1, 1).expand(4, 6, 6)
MOVED = {
    "sum": lambda x: x.sum(),
    "sum.dim_IntList": lambda x: (x.sum(0), x.sum((0, 2), True), x.mT.sum(-1), x.sum(1).sum(0)),
    "mean": lambda x: x.mean(),
    "mean.dim": lambda x: (x.mean(1), x.mean((-1, 0), True)),
    "amax": lambda x: (x.amax(0), x.amax((1, 2), True), x.amax(), x.permute(2, 0, 1).amax(1)),
    "amin": lambda x: (x.amin(0), x.amin((1, 2), True), x.amin(), x.permute(2, 0, 1).amin(1)),
    "all.dim": lambda x: ((x > -0.9).all(0), (x > -0.9).all(-1, True)),
    "any.dim": lambda x: ((x > 1.5).any(0), (x > 1.5).any(-1, True)),
    "all": lambda x: ((x > -9.0).all(), (x > 0.0).all()),
    "any": lambda x: ((x > 0.0).any(), (x > 9.0).any()),
    "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((0, 2), True), x.mT.logsumexp(-1), x.logsumexp((0, 1, 2))),
    "cumsum": lambda x: (x.cumsum(0), x.mT.cumsum(-1)),
    "cumprod": lambda x: (x.cumprod(1), x.cumprod(-1)),
    "cat": lambda x: (torch.cat([x, x[:, 1:3].exp(), torch.ones(4, 2, 6, dtype=x.dtype)], 1), torch.cat([x, x], -1)),
    "stack": lambda x: (torch.stack([x, x.flip(0)], -1), torch.stack([x[0], x[1].sin()])),
    "slice_backward": lambda x: (
        aten.slice_backward(x, [4, 11, 6], 1, 1, 99, 2), aten.slice_backward(x, [6, 5, 6], 0, -4, 99, 1)
    ),
    "select_backward": lambda x: (
        aten.select_backward(x, [4, 5, 3, 6], 2, 1), aten.select_backward(x, [3, 4, 5, 6], 0, -1)
    ),
    "diagonal_backward": lambda x: (
        aten.diagonal_backward(x, [4, 5, 6, 8], 1, -2, -1), aten.diagonal_backward(x, [7, 4, 6, 5], -1, 0, 2)
    ),
    "constant_pad_nd": lambda x: (
        torch.constant_pad_nd(x, [1, 2, -1, 3], 2.5), torch.constant_pad_nd(x > 0.0, [0, 1], 2)
    ),
    "flip": lambda x: (x.flip(0, -1), x.mT.flip(1)),
    "tril": lambda x: (x.tril(), x.tril(-1), (x > 0.0).tril(1)),
    "triu": lambda x: (x.triu(), x.triu(2)),
    "clone": lambda x: (aten.clone(x.exp()), aten.clone(x.mT, memory_format=torch.contiguous_format)),
    "alias": lambda x: aten.alias(x.exp()),
    "detach": lambda x: aten.detach(x.exp()),
    "_to_copy": lambda x: ((x > 0.0).double(), torch.special.i0e(x).ge(0.5).double(), x.float(), (x * 2.0).float()),
    "copy": lambda x: (aten.copy(x, x[:, :1]), aten.copy(x, x[0] > 0.0)),
    "view": lambda x: (x[:, :1].expand(4, 5, 6).exp().view(20, 6), x[..., :1].expand(4, 5, 6).sin().view(-1)),
    "index_select": lambda x: (
        x.index_select(1, INDEX), x.mT.index_select(-1, INDEX), x[..., 0].index_select(0, SORTED)
    ),
    "gather": lambda x: (
        x.gather(1, ALONG), x[:, :, 0].gather(0, SORTED[:, None].expand(6, 5)), x.gather(1, ALONG[:2, :3])
    ),
    "index_add": lambda x: (
        *(torch.zeros(4, 7, 6).double().index_add(1, index[:5], x) for index in (INDEX, SORTED)),
        *(torch.zeros(4, 5, 7).double().index_add(2, index, x) for index in (INDEX, SORTED)),
    ),
}  # fmt: skip
