"""Numbers that are the same along an axis are computed once: same results, fewer and narrower operations."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.graphs import narrowing
from pyro_flows.graphs.recording import record

REAL = torch.float64
ROWS = 600


def wide(module):
    """How many results are as wide as all rows."""
    return sum(narrowing._numbers(node) >= ROWS for node in module.graph.nodes if node.op == "call_function")


def recorded(function, x, monkeypatch):
    """A graph as it is recorded, and as it was without this pass."""
    with monkeypatch.context() as patched:
        patched.setattr("pyro_flows.graphs.recording.narrow", lambda module, inputs: module)
        before = record(function, x)
    return record(function, x), before


def same(function, x, monkeypatch):
    after, before = recorded(function, x, monkeypatch)
    other = x + 0.3 * torch.rand_like(x)
    for found, expected, real in zip(after(other), before(other), function(other), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found, real)
    return wide(after), wide(before)


def expanded(x):
    return x[:, None].expand(len(x), ROWS)


SLOW = torch.ops.aten.exp.default, torch.ops.aten.log1p.default
DATA = torch.linspace(0.5, 2.0, ROWS, dtype=REAL)
FUNCTIONS = {
    "powers of a scale": lambda x: ((DATA / expanded(x).square().log1p()).sum(1),),
    "a sum of equal numbers": lambda x: (expanded(x).exp().sum(1), expanded(x).exp().sum(1, keepdim=True)),
    "a sum over rows": lambda x: (expanded(x).exp().sum(0),),
    "ones and zeros": lambda x: (
        ((x[:, None] + DATA) * torch.ones(len(x), ROWS, dtype=REAL) + torch.zeros(ROWS, dtype=REAL)).sum(1),
    ),
    "needed at full width": lambda x: (expanded(x).exp().reshape(-1), (expanded(x).exp() + DATA).cumsum(1)),
    "integers": lambda x: ((expanded(x) > 1.0).long().sum(1), torch.where(expanded(x) > 1.0, DATA, 1.0).sum(1)),
    "numbers and halves": lambda x: ((expanded(x).float() * torch.ones(ROWS, dtype=REAL)).sum(1),),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same(name, monkeypatch):
    after, before = same(FUNCTIONS[name], torch.rand(5, dtype=REAL) + 0.5, monkeypatch)
    assert after <= before
    if name in ("powers of a scale", "a sum of equal numbers", "ones and zeros"):
        assert after < before


def test_what_is_needed_at_full_width_is_expanded_from_a_narrow_result(monkeypatch):
    """Narrow results without users had been dropped before they were expanded, and the whole graph was given up."""
    after, before = recorded(lambda x: (expanded(x).exp().log1p().reshape(-1),), torch.rand(5, dtype=REAL), monkeypatch)
    widths = [
        [narrowing._numbers(node) for node in module.graph.nodes if node.target in SLOW] for module in (before, after)
    ]
    assert widths == [[5 * ROWS] * 2, [5] * 2]


def test_a_hierarchical_model_does_less_for_each_row(monkeypatch):
    """What is common to all rows is computed once: 4 results in 10 are narrower, forwards and backwards."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=REAL), 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones((), dtype=REAL)))
        with pyro.plate("row", len(y)):
            rate = pyro.sample("rate", dist.Normal(mu, tau))
            pyro.sample("y", dist.Poisson(rate.exp()), obs=y)

    y = torch.poisson(torch.full((ROWS,), 3.0, dtype=REAL))
    z = 0.1 * torch.randn(16, ROWS + 2, dtype=REAL)
    graph = pf.LogDensity(model, (y,)).graph(z)
    value, slope = graph(z)
    with monkeypatch.context() as patched:
        patched.setattr("pyro_flows.graphs.recording.narrow", lambda module, inputs: module)
        plain = pf.LogDensity(model, (y,)).graph(z)
    torch.testing.assert_close((value, slope), plain(z), rtol=1e-10, atol=1e-10)
    assert wide(graph) < 0.7 * wide(plain)


def parts(x, spans):
    """The gradient of functions of parts of a vector."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        total = sum((leaf[:, begin:end].exp() * (begin + 1.0)).sum() for begin, end in spans)
        return (torch.autograd.grad(total, leaf)[0],)


SPANS = {
    "in order": [(0, 1), (1, 2), (2, 700)],
    "in another order, with gaps": [(650, 690), (3, 600)],
    "that overlap": [(0, 400), (300, 700)],
}


@pytest.mark.parametrize("name", SPANS)
def test_gradients_of_parts_are_put_side_by_side(name, monkeypatch):
    x = torch.rand(4, 700, dtype=REAL)
    after, before = recorded(lambda x: parts(x, SPANS[name]), x, monkeypatch)
    torch.testing.assert_close(after(x), before(x))
    left = [node for node in after.graph.nodes if node.target is torch.ops.aten.slice_backward.default]
    assert bool(left) == (name == "that overlap")


def test_a_graph_that_does_not_run_is_not_taken(monkeypatch):
    def refuses(self, *inputs):
        raise RuntimeError("view size is not compatible with input tensor's size and stride")

    monkeypatch.setattr(narrowing.fx.Interpreter, "run", refuses)
    after, before = recorded(FUNCTIONS["powers of a scale"], torch.rand(5, dtype=REAL), monkeypatch)
    assert wide(after) == wide(before)
