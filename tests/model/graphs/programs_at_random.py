"""Random programs of tensors: what is done follows from a seed and from shapes, and not from values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.registry import normal

aten = torch.ops.aten
SIZES = (1, 1, 2, 3, 5, 7, 17, 127, 128, 129, 300, 1000)
MOST = 3000  # numbers in a tensor
Step = Callable[["Maker", Tensor], Tensor]


class Maker:
    """Chooses shapes, operands and operations by a seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.pool = random.Random(seed), []

    def shape(self, most: int = MOST) -> tuple[int, ...]:
        sizes: list[int] = []
        for _ in range(self.random.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6))):
            sizes.append(self.random.choice([size for size in SIZES if size <= most]))
            most //= sizes[-1]
        return tuple(sizes)

    def constant(self, *shape: int) -> Tensor:
        """Return numbers that are the same in each run, some in other orders in memory, some of one digit."""
        value = numbers(shape, self.random.randrange(10**6))
        if self.random.random() < 0.2:
            value = (2.0 * value).clamp(-2.0, 2.0).to(self.random.choice((torch.int64, torch.float32)))
        if self.random.random() < 0.3 and value.dim() > 1:
            return value.mT.contiguous().mT
        return value

    def partner(self, x: Tensor) -> Tensor:
        """Return numbers that go with others: of the pool, if some do, or constants."""
        fitting = [part for part in self.pool if fits(part, x)]
        if fitting and self.random.random() < 0.8:
            return self.random.choice(fitting).double()
        begin = self.random.randrange(x.dim() + 1)
        return self.constant(*(1 if self.random.random() < 0.3 else size for size in x.shape[begin:])).double()

    def axis(self, x: Tensor) -> int:
        return self.random.randrange(-x.dim(), x.dim())

    def axes(self, x: Tensor) -> list[int]:
        return self.random.sample(range(x.dim()), self.random.randint(1, x.dim()))

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def index(self, size: int, count: int, *, in_order: bool) -> Tensor:
        found = [self.random.randrange(size) for _ in range(count)]
        return torch.tensor(sorted(found) if in_order else found)


def numbers(shape: Sequence[int], seed: int) -> Tensor:
    return normal(1, *shape, seed=seed)[0].clone()


def fits(one: Tensor, other: Tensor) -> bool:
    try:
        return len(torch.broadcast_shapes(one.shape, other.shape)) <= 6 and one.numel() * other.numel() <= 9 * MOST
    except RuntimeError:
        return False


def compared(maker: Maker, x: Tensor) -> Tensor:
    truth = maker.random.choice((torch.lt, torch.ge))(x, 0.01234)
    other = maker.random.choice((torch.gt, torch.le))(x, maker.partner(x) + 0.01234)
    return maker.random.choice((truth & other, truth | other, ~other, torch.logical_not(x - x)))


def chosen(maker: Maker, x: Tensor) -> Tensor:
    truth = compared(maker, x)
    y = maker.partner(truth)
    ways = [lambda: torch.where(truth, x, y), lambda: torch.where(truth, y, x.sin())]
    if truth.shape == x.shape:
        ways.append(lambda: x.masked_fill(truth, 0.5))
    return maker.random.choice(ways)()


def reduced(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return maker.random.choice((x.sum(), x.sum(0), x.amax(0), x.mean(), torch.logsumexp(x, 0)))
    axes, keep = maker.axes(x), maker.flag()
    ways = [
        lambda: x.mean(axes, keep), lambda: x.amax(axes, keep), lambda: x.amin(axes, keep), lambda: x.mean(),
        lambda: torch.logsumexp(x, axes, keep) / 8.0, lambda: x.sum(axes, keep).tanh(), lambda: x.sum() / 100.0,
        lambda: (x > 0.01234).double().mean(axes),
    ]  # fmt: skip
    return maker.random.choice(ways)()


def viewed(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return x.expand(3) if maker.flag() else x.unsqueeze(0)
    axis, order = maker.axis(x), maker.random.sample(range(x.dim()), x.dim())
    begin, step = maker.random.randrange(x.shape[axis]), maker.random.choice((1, 2, 3))
    ways = [
        lambda: x.permute(order), lambda: x.permute(order), lambda: x.select(axis, begin), lambda: x.unsqueeze(axis),
        lambda: x.narrow(axis, begin, x.shape[axis] - begin), lambda: x.flip(maker.axes(x)), lambda: x.reshape(-1),
        lambda: aten.slice.Tensor(x, axis, begin, 10**6, step), lambda: x.squeeze(), lambda: x.clone(),
        lambda: x.unbind(axis)[begin], lambda: x.chunk(2, axis)[0],
    ]  # fmt: skip
    if x.dim() > 1:
        ways += [lambda: x.diagonal(maker.random.choice((-1, 0, 0)), -2, -1), lambda: x.tril(-1), lambda: x.triu()]
    return maker.random.choice(ways)()


def joined(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return torch.stack([x, x.sin(), maker.constant().double()], 0)
    axis = maker.axis(x)
    parts = [x, x.flip(axis), maker.constant(*x.shape).double(), x.narrow(axis, 0, 1).expand_as(x), x.cos()]
    some = maker.random.sample(parts, maker.random.randint(1, 3))
    return torch.stack(some, axis) if maker.flag() and x.dim() < 6 else torch.cat(some, axis)


def placed(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return aten.select_backward(x, [4], 0, 2)
    axis, size = maker.random.randrange(x.dim()), maker.random.choice((1, 2, 3))
    wide = [*x.shape]
    wide[axis] = x.shape[axis] * size + 1
    outer = [*x.shape[:axis], 3, *x.shape[axis:]]
    pads = [maker.random.choice((-1, 0, 1, 2)) if number > 2 else maker.random.choice((0, 2)) for number in x.shape]
    ways = [
        lambda: aten.slice_backward(x, wide, axis, 1, 10**9, size), lambda: aten.select_backward(x, outer, axis, 1),
        lambda: torch.nn.functional.pad(x, [part for pad in pads for part in (pad, abs(pad))], value=0.5),
        lambda: aten.diagonal_backward(x, [*x.shape, x.shape[-1] + 3], 1, -2, -1),
    ]  # fmt: skip
    return maker.random.choice(ways)()


def picked(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return x.reshape(1).index_select(0, torch.tensor([0, 0, 0]))
    axis, count = maker.random.randrange(x.dim()), maker.random.choice((2, 3, 20, 140))
    index = maker.index(x.shape[axis], count, in_order=maker.flag())
    shape = [count if place == axis else size for place, size in enumerate(x.shape)]
    spread = index.reshape([-1 if place == axis else 1 for place in range(x.dim())]).expand(shape)
    to = maker.index(5, x.shape[axis], in_order=maker.flag())
    zeros = torch.zeros([5 if place == axis else size for place, size in enumerate(x.shape)], dtype=x.dtype)
    ways = [lambda: x.index_select(axis, index), lambda: x.gather(axis, spread)]
    return maker.random.choice([*ways, lambda: zeros.index_add(axis, to, x).clamp(-3.0, 3.0)])()


def running(maker: Maker, x: Tensor) -> Tensor:
    if not x.dim():
        return x.cumsum(0)
    axis = maker.axis(x)
    return (x.cumsum(axis) if maker.flag() else (x / 3.0).cumprod(axis)) / 10.0


def multiplied(maker: Maker, x: Tensor) -> Tensor:
    """Products, triangular systems and Cholesky factors, of small matrices mostly."""
    size, columns = maker.random.choice((1, 2, 3, 6, 8)), maker.random.choice((1, 3, 9))
    rows = x.reshape(-1)[: x.numel() // size * size].reshape(-1, size)
    if not len(rows):
        return x
    batch = rows.unsqueeze(-1) * maker.constant(size, columns).double()
    matrix = rows.unsqueeze(-1) * rows.unsqueeze(-2) + torch.eye(size, dtype=x.dtype)
    ways = [
        lambda: rows @ maker.constant(size, columns).double() / size, lambda: (batch @ batch.mT)[:40] / columns,
        lambda: torch.addmm(maker.constant(columns).double(), rows, maker.constant(columns, size).double().mT) / size,
        lambda: rows[:40].mT @ rows[:40] / 40.0, lambda: aten.linalg_cholesky_ex(matrix)[0],
        lambda: aten.linalg_solve_triangular(matrix, batch, upper=maker.flag(), unitriangular=maker.flag()).tanh(),
        lambda: aten.linalg_solve_triangular(matrix, batch.mT, upper=maker.flag(), left=False).tanh(),
    ]  # fmt: skip
    return maker.random.choice(ways)()


def foreign(maker: Maker, x: Tensor) -> Tensor:
    """What torch does."""
    axis = maker.axis(x) if x.dim() else 0
    ways = [
        lambda: torch.lgamma(x.abs() + 1.0), lambda: torch.special.i0e(x), lambda: x.max(axis)[0],
        lambda: x.softmax(axis), lambda: x.roll(1), lambda: x.argmax(axis).double() / MOST, lambda: x.sort(axis)[0],
        lambda: torch.igamma(maker.partner(x).abs() + 0.5, x.abs()), lambda: x.round(decimals=9) * 0.0 + x,
    ]  # fmt: skip
    return maker.random.choice(ways)()


def pointwise(maker: Maker, x: Tensor) -> Tensor:
    y = maker.partner(x)
    ways = [
        lambda: x * y, lambda: (x + y) / 2.0, lambda: x - y, lambda: x / (1.0 + y * y), lambda: x.exp() / 9.0,
        lambda: x.abs().add(0.1).log(), lambda: x.sin(), lambda: y.tanh() * x, lambda: torch.maximum(x, y),
        lambda: torch.minimum(x, y), lambda: torch.sigmoid(x), lambda: torch.nn.functional.softplus(x),
        lambda: (y.square() + 1.0).rsqrt() * x, lambda: x.abs().add(0.1).pow(0.3), lambda: torch.addcmul(x, y, y),
        lambda: torch.erf(x), lambda: -x, lambda: 1.5 - x, lambda: x.clamp(-1.0, 2.0), lambda: torch.lerp(x, y, 0.7),
        lambda: torch.clamp(y, min=x), lambda: x.nan_to_num(), lambda: torch.nn.functional.silu(x) + y,
        lambda: torch.add(x, y, alpha=0.3), lambda: torch.xlogy(x, y.square() + 0.5), lambda: x**3 / 9.0,
    ]  # fmt: skip
    return maker.random.choice(ways)()


STEPS: tuple[Step, ...] = (chosen, reduced, viewed, viewed, joined, placed, picked, running, multiplied, foreign)


def program(seed: int, length: int) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[[int], list[Tensor]]]:
    """Return a function of tensors, and what gives it inputs: of the same shapes, with other numbers for each seed."""
    maker = Maker(seed)
    shapes = [maker.shape() for _ in range(maker.random.randint(1, 3))]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        chooser = Maker(seed + 1)
        chooser.pool = [*inputs]
        for _ in range(length):
            x = chooser.random.choice([*inputs, *chooser.pool[-6:]])
            step = pointwise if chooser.flag() else chooser.random.choice(STEPS)
            found = step(chooser, x.double())
            if 0 < found.numel() <= MOST and found.dim() <= 6:
                chooser.pool.append(found.clamp(-3.0, 3.0) if chooser.random.random() < 0.8 else found)
        last = chooser.pool[-1]
        outputs = [*chooser.random.sample(chooser.pool, min(3, len(chooser.pool))), last, last > 0.01234, last]
        return (*outputs, torch.ones(2), *inputs[:1], last.reshape(-1)[::2], last.unsqueeze(0))

    def inputs(number: int) -> list[Tensor]:
        parts = [numbers(shape, 1000 * number + place).clamp(-3.0, 3.0) for place, shape in enumerate(shapes)]
        return [part.mT.contiguous().mT if part.dim() > 1 and number % 2 else part for part in parts]

    return run, inputs
