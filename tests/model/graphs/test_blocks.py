"""Operations that are done block by block give what torch's do, at special values too."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch
from torch import Tensor

from pyro_flows.model.graphs import points, programs, views
from pyro_flows.model.graphs.fused import MATRICES, Fused
from pyro_flows.model.graphs.points import POINTS
from pyro_flows.model.graphs.programs import library
from pyro_flows.model.graphs.recording import record
from pyro_flows.model.graphs.structured import STRUCTURED
from tests.invariants import close
from tests.model.graphs.block_cases import CASES, MOVED, cube, special
from tests.registry import needs_interpreter, normal

aten = torch.ops.aten


def in_blocks(function, *inputs: Tensor) -> Fused:
    with torch.inference_mode():
        return Fused(record(function, *inputs), inputs, library())


def check(function, *inputs: Tensor, least: float = 1e-320) -> Fused:
    """Compare with torch; all that is done must be done in blocks."""
    made = in_blocks(function, *inputs)
    for got, expected in zip(made(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=least, equal_nan=True)
    assert not any(isinstance(one, views.Foreign) for one in made.groups.foreign)
    return made


def operation_called(name: str):
    name, _, overload = name.partition(".")
    return getattr(getattr(aten, name), overload or "default")


def names(cases) -> set[str]:
    return {name.partition(".")[0] for name in cases}


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_points_at_special_values(name):
    operation = operation_called(name)
    for case in CASES[name]:

        def function(*inputs: Tensor) -> tuple[Tensor]:
            given = iter(inputs)
            found = operation(*(next(given) if isinstance(part, Tensor) else part for part in case))  # noqa: B023
            return (found if isinstance(found, Tensor) else found[0],)

        check(function, *(part for part in case if isinstance(part, Tensor)))


@needs_interpreter
@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.rsub, torch.addcmul, torch.addcdiv])
def test_points_with_factors(operation):
    three = operation in (torch.addcmul, torch.addcdiv)
    named = {"value" if three else "alpha": 2.5}
    inputs = [normal(200, seed=seed) for seed in range(2 + three)]
    check(lambda *inputs: (operation(*inputs, **named),), *inputs, least=1e-13)


FOREIGN = ("_to_copy",)  # where torch does a part of what is tested


@needs_interpreter
@pytest.mark.parametrize("given", [cube, special])
@pytest.mark.parametrize("name", MOVED)
def test_structured_operations(name, given):
    function = MOVED[name]

    def results(x: Tensor) -> tuple[Tensor, ...]:
        found = function(x)
        return found if isinstance(found, tuple) else (found,)

    made = in_blocks(results, given())
    for got, expected in zip(made(given()), results(given()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
    foreign = any(isinstance(one, views.Foreign) for one in made.groups.foreign)
    assert foreign == (name in FOREIGN)


@needs_interpreter
@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 256, 5000])
def test_lengths_around_a_block(size):
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x.exp() + x[:, :1]
        return y, y.sum(1), y.sum(0), y.amax(1), y.flip(1)[:, ::2].sin(), (y.mT * x.mT).sum(), x.cumsum(0).mT.exp()

    check(function, normal(3, size, seed=1), least=1e-12)


@needs_interpreter
def test_numbers_without_dimensions():
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        moved = x.sum(0) + x.amax(0) * x.flip(0) - x.logsumexp(0)
        return moved, y * moved, torch.stack([x, x.exp()]), moved > 0.0

    check(function, normal(1, seed=1)[0], normal(3, 4, seed=2), least=1e-12)


def products(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    batch, small = x.reshape(-1, 3, 2), y[:2, :3].expand(20, 2, 3)
    return (
        x @ y.mT,
        x.mT @ x,
        torch.addmm(y[:, 0], x, y.mT),
        batch @ small,
        x.reshape(4, 10, 3) @ x.reshape(4, 10, 3).mT,
    )


def triangular(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    factors = x.reshape(-1, 2).exp()[:, :, None] * (1.0 + x.reshape(-1, 1, 2).square())
    right = y.reshape(1, 2, -1)
    ways = [(upper, unit) for upper in (False, True) for unit in (False, True)]
    solve = aten.linalg_solve_triangular
    given = {left: right if left else right.mT for left in (True, False)}
    return tuple(
        solve(factors, given[left].expand(one, -1, -1), upper=upper, left=left, unitriangular=unit)
        for upper, unit in ways
        for left in given
        for one in (1, 60)
    )


def factored(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Views of factors among the results: a factor is the first of two results."""
    rows = x.reshape(-1, 3, 1)
    factor = aten.linalg_cholesky_ex(rows * rows.mT + torch.eye(3, dtype=x.dtype))[0]
    return factor, factor.diagonal(0, -2, -1).log().sum(-1), factor.mT, factor[:, 1], factor[:, 0].exp()


@needs_interpreter
@pytest.mark.parametrize("function", [products, triangular, factored])
def test_matrices(function):
    made = check(function, normal(40, 3, seed=1), normal(4, 3, seed=2), least=1e-12)
    x, y = normal(3, 40, seed=3).mT, normal(3, 4, seed=4).mT
    for got, expected in zip(made(x, y), function(x, y), strict=True):
        close(got, expected, 1e-9)


@needs_interpreter
@pytest.mark.parametrize("function", [triangular, lambda x, y: (torch.where(torch.isfinite(x), x, 0.0),)])
def test_nothing_is_left_to_torch(function):
    made = check(function, normal(40, 3, seed=1), normal(4, 3, seed=2), least=1e-12)
    assert made.calls == len(made._steps)


@needs_interpreter
def test_matrices_that_are_not_positive_definite_have_no_factors():
    (found,) = in_blocks(lambda x: (aten.linalg_cholesky_ex(x)[0],), torch.eye(2).double().repeat(20, 1, 1))(
        -torch.eye(2).double().repeat(20, 1, 1)
    )
    assert found[:, 0, 0].isnan().all()


def test_all_operations_are_tested():
    assert names(CASES) == set(POINTS)
    assert names(MOVED) == set(STRUCTURED)
    assert set(MATRICES) == {"mm", "addmm", "bmm", "linalg_solve_triangular", "linalg_cholesky_ex"}


def test_codes_are_those_of_the_interpreter():
    source = resources.files("pyro_flows.model.graphs").joinpath("interpreter.c").read_text("utf-8")
    written = {int(code): text for code, text in re.findall(r"^ +(?:UNARY|BINARY)\((\d+), (.*)\)$", source, re.M)}
    codes = {key: value for key, value in vars(points).items() if key.isupper() and isinstance(value, int)}
    assert {*written, points.WHERE} == {*codes.values()}
    assert "case 96: /* where" in source
    for key in ("EXP", "LOG", "LOG1P", "EXPM1", "SQRT", "TANH", "SIN", "COS", "ATAN", "ERF", "ERFC", "FLOOR", "SINH"):
        assert written[codes[key]] == f"{key.lower()}(x)"
    for key, sign in {"TIMES": "x * s", "PLUS": "x + s", "FROM": "s - x", "OVER": "x / s", "UNDER": "s / x"}.items():
        assert written[codes[key]] == sign
    for key, sign in {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}.items():
        assert (written[codes[key]], written[codes[f"{key}2"]]) == (f"x {sign} s", f"x {sign} y")
    constants = dict(re.findall(r"\b([A-Z]+) = (-?\d+)", source))
    assert constants == {key: str(getattr(programs, key)) for key in ("BLOCK", "DIMS", "WIDE", "PRODUCT")}
    assert "enum { LOAD, STORE, STORE_AT_ONCE, ADD_UP, LARGEST, SMALLEST }" in source
    actions = views.LOAD, views.STORE, views.STORE_AT_ONCE, views.ADD_UP, views.LARGEST, views.SMALLEST
    assert actions == (0, 1, 2, 3, 4, 5)
