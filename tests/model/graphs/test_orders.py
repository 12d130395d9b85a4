"""Indexing by constants: gathered, and added up again in the gradient, as torch's own indexing does."""

import pytest
import torch

from pyro_flows.model.graphs.recording import record
from tests.registry import normal

aten = torch.ops.aten
ROWS = torch.tensor([2, 0, 1, 1, 3, 2, 2])
SQUARE = torch.tensor([[0, 3], [1, 1], [2, 0]])
MASK = torch.tensor([True, False, True, True])
GENERAL = aten.index.Tensor, aten.index_put.default


def with_gradient(function):
    """The function of x (S, ...) and its gradient, weighted so that no two entries are alike."""

    def both(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = function(leaf)
            weights = torch.arange(1.0, found.numel() + 1, dtype=x.dtype).reshape(found.shape)
            return found.detach(), torch.autograd.grad((weights * found.square()).sum(), leaf)[0]

    return both


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


CASES = {
    "rows": (lambda x: x[:, ROWS], (5, 4)),
    "of int32": (lambda x: x[:, ROWS.int()], (5, 4)),
    "from the end": (lambda x: x[:, -1 - ROWS], (5, 4)),
    "a square": (lambda x: x[:, SQUARE], (5, 4)),
    "a mask": (lambda x: x[:, MASK], (5, 4)),
    "a mask of two axes": (lambda x: x[:, MASK[:, None] & MASK[:3]], (5, 4, 3)),
    "two axes": (lambda x: x[:, ROWS, ROWS.flip(0)], (5, 4, 6)),
    "two axes that spread": (lambda x: x[:, ROWS[:, None], SQUARE[:, 0]], (5, 4, 3)),
    "one of no length": (lambda x: x[:, ROWS[:0]], (5, 4)),
    "the last axis": (lambda x: x[..., ROWS], (5, 2, 4)),
    "the first axis": (lambda x: x[ROWS], (4,)),
    "rows of vectors": (lambda x: x[:, ROWS], (5, 4, 3)),
    "rows of one number": (lambda x: x[:, ROWS], (5, 4, 1)),
    "of a transposed matrix": (lambda x: x.mT[:, ROWS], (4, 5)),
    "of two axes of a transposed one": (lambda x: x.mT[:, ROWS, ROWS], (5, 4, 4)),
    "two axes apart": (lambda x: x[ROWS, :, ROWS], (4, 5, 4)),
    "the same rows twice": (lambda x: x[:, ROWS] * x[:, ROWS].exp() + (2.0 * x)[:, ROWS], (5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_indexing(name, dtype):
    function, shape = CASES[name]
    both = with_gradient(function)
    x = normal(*shape, seed=0, dtype=dtype)
    module = record(both, x)
    for points in (x, 2.0 * x - 1.0):
        for found, expected in zip(module(points), both(points), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0.0)


def test_no_general_indexing_is_left():
    """Entries are gathered, rows of vectors selected, and equal orders are one constant."""
    for name in ("rows", "from the end", "a square", "a mask", "two axes", "rows of one number"):
        function, shape = CASES[name]
        found = targets(record(with_gradient(function), normal(*shape, seed=0)))
        assert not {*found} & {*GENERAL}, name
        assert aten.gather.default in found, name
        assert aten.index_add.default in found, name
    assert targets(record(lambda x: x[:, ROWS], normal(5, 4, 3, seed=0))) == [aten.index_select.default]
    module = record(with_gradient(CASES["the same rows twice"][0]), normal(5, 4, seed=0))
    assert sum(name.startswith("order_") for name, _ in module.named_buffers()) == 1
    assert targets(module).count(aten.expand.default) == 1


def test_an_order_that_depends_on_the_inputs_stays():
    """The order of x itself is no constant."""
    x = normal(1, 4, seed=0)
    module = record(lambda x: x[:, x[0].argsort()], x)
    assert aten.index.Tensor in targets(module)
    torch.testing.assert_close(module(-x), (-x).sort(1).values)
