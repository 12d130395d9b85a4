"""Long graphs, as those of loops are: recorded once a fit, for batches of any size."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.model import runs
from pyro_flows.model.graphs import recorder
from tests.invariants import close
from tests.registry import normal


def growth(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    size = pyro.sample("size", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    sizes = []
    for _ in range(len(y)):
        size = size + 0.1 * (rate - size.tanh()).sin() * (1.0 + 0.1 * rate)
        sizes.append(size)
    pyro.sample("y", dist.Normal(torch.stack(sizes), 0.3).to_event(1), obs=y)


DATA = torch.linspace(0.0, 1.0, 20, dtype=torch.float64)


def test_a_long_graph_takes_batches_of_any_size(monkeypatch):
    plain = pf.LogDensity(growth, (DATA,))
    assert plain._values.unit is None
    monkeypatch.setattr(runs, "LONG", 300)
    monkeypatch.setattr(recorder, "RECORDED_FROM", 1)
    monkeypatch.setattr(recorder, "BORROWED", 1)
    density = pf.LogDensity(growth, (DATA,))
    assert density._values.unit == density._with_gradients.unit == runs.LONG_ROWS
    assert (density._values.large, density._with_gradients.large) == (runs.ROWS_OF_VALUES, runs.LONG_ROWS)
    for size in (1, 7, 128, 250, 1100):
        z = normal(size, 2, seed=size)
        value, grad = density.value_and_grad(z)
        expected = plain.unrecorded(z)
        close(value, expected[0], 1e-10)
        close(grad, expected[1], 1e-10)
        with torch.no_grad():
            close(density(z), expected[0], 1e-10)
    assert [[kind[0] for kind in density._values.runners], len(density._with_gradients.runners)] == [
        [runs.LONG_ROWS, 1024],
        1,
    ]
    assert density.graph(normal(4, 2, seed=0)) is None


def test_a_long_graph_of_gradients_is_lent_to_a_few_calls_for_values(monkeypatch):
    """One of values alone takes seconds, which few calls do not pay back. Large batches have one."""
    plain = pf.LogDensity(growth, (DATA,))
    monkeypatch.setattr(runs, "LONG", 300)
    monkeypatch.setattr(recorder, "BORROWED", 5)
    density = pf.LogDensity(growth, (DATA,))
    made = []
    for call in range(1, 7):
        z = normal(9, 2, seed=call)
        with torch.no_grad():
            close(density(z), plain.unrecorded(z)[0], 1e-10)
        made.append((len(density._with_gradients.runners), len(density._values.runners)))
    assert made == [(0, 0), (1, 0), (1, 0), (1, 0), (1, 1), (1, 1)]
    with torch.no_grad():
        density(normal(1100, 2, seed=0))
        density(normal(1100, 2, seed=0))
    assert [kind[0] for kind in density._values.runners] == [runs.LONG_ROWS, 1024]
