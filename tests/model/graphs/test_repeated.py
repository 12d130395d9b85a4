"""Numbers that are the same along an axis are computed once: same results, fewer numbers."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.model.graphs import fusion_groups
from pyro_flows.model.graphs.fused import fused
from pyro_flows.model.graphs.recording import record
from tests.registry import needs_interpreter

REAL = torch.float64
ROWS = 600
pytestmark = needs_interpreter


def expanded(x):
    return x[:, None].expand(len(x), ROWS)


DATA = torch.linspace(0.5, 2.0, ROWS, dtype=REAL)
FUNCTIONS = {
    "powers of a scale": lambda x: ((DATA / expanded(x).square().log1p()).sum(1), x),
    "a sum of equal numbers": lambda x: (expanded(x).exp().sum(1), expanded(x).sin().sum(1, keepdim=True)),
    "a sum over rows": lambda x: (expanded(x).exp().sum(0), expanded(x).softmax(1)),
    "constants": lambda x: ((x[:, None] + torch.ones(ROWS, dtype=REAL)).exp().sum(1), x),
    "parts of one operation": lambda x: (torch.nn.functional.softplus(expanded(x)) * DATA, x),
    "operations that torch does": lambda x: ((torch.lgamma(expanded(x).exp()) * DATA).sum(1), x.exp().sin()),
    "needed at full width": lambda x: (expanded(x).exp().reshape(-1).sin(), x.exp()),
    "results": lambda x: (expanded(x).exp(), torch.where(expanded(x) > 1.0, expanded(x).sin(), 1.0)),
    "integers": lambda x: ((expanded(x) > 1.0).double().sum(1), torch.where(expanded(x) > 1.0, DATA, 1.0).sum(1)),
    "numbers and halves": lambda x: ((expanded(x).float() * torch.ones(ROWS, dtype=REAL)).sum(1), x.exp()),
}
NO_LESS = ("needed at full width", "integers", "numbers and halves")  # numbers to be computed


def both_ways(function, x, monkeypatch):
    """The function of a graph, and the same without this."""
    module = record(function, x)
    with monkeypatch.context() as patched:
        patched.setattr(fusion_groups, "_repeated", lambda values: set())
        patched.setattr(fusion_groups, "LOOKED_AT", 0)
        wide = fused(module, (x,))
    return fused(module, (x,)), wide


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same(name, monkeypatch):
    function, x = FUNCTIONS[name], torch.linspace(0.5, 1.5, 5, dtype=REAL)
    narrow, wide = both_ways(function, x, monkeypatch)
    for found, other, expected in zip(narrow(2.0 * x), wide(2.0 * x), function(2.0 * x), strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(other, expected)
    assert narrow.numbers < wide.numbers or name in NO_LESS
    assert narrow.calls == wide.calls


def test_a_hierarchical_model_does_less_for_each_row(monkeypatch):
    """What is common to all rows is computed once, forwards and backwards."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=REAL), 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones((), dtype=REAL)))
        with pyro.plate("row", len(y)):
            rate = pyro.sample("rate", dist.Normal(mu, tau))
            pyro.sample("y", dist.Poisson(rate.exp()), obs=y)

    y = torch.poisson(torch.full((ROWS,), 3.0, dtype=REAL), generator=torch.Generator().manual_seed(0))
    z = 0.1 * torch.randn(16, ROWS + 2, dtype=REAL, generator=torch.Generator().manual_seed(1))
    density = pf.LogDensity(model, (y,))
    narrow, wide = both_ways(density._gradients, z, monkeypatch)
    torch.testing.assert_close(narrow(0.5 * z), density.unrecorded(0.5 * z), rtol=1e-10, atol=1e-10)
    assert narrow.numbers < 0.85 * wide.numbers
