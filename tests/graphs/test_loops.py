"""Loops in recorded graphs: found in linear time, recorded once a fit, one round compiled."""

import operator
import subprocess
import sys
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, fx

import pyro_flows as pf
from pyro_flows.graphs import batches, compiling
from pyro_flows.graphs.bindings import quicken
from pyro_flows.graphs.compiling import LOOPS_FROM, Plan, Runner, pays_at
from pyro_flows.graphs.outline import Outline
from pyro_flows.graphs.record import record
from pyro_flows.graphs.repeats import FEWEST, SHORTEST, repeats
from tests.invariants import close
from tests.registry import needs_compiler, normal


def oscillator(steps: int, every: int = 0):
    """Return the steps of two coupled numbers (S,), with something else between them each ``every`` steps."""

    def function(z: Tensor) -> tuple[Tensor, ...]:
        a, b, u, v = z.unbind(1)
        seen = []
        for step in range(steps):
            for size in (0.01, 0.02, 0.03):
                du, dv = (a - b * v).sin() * u, (b * u - a) * v.cos()
                u, v = u + size * du, v - size * dv
            if every and step % every == every - 1:
                seen.append(u)
                v = v.tanh()
                u = u + 0.1
        return (u, v, *seen)

    return function


def gradients(steps: int, every: int = 0):
    """Return the values (S,) and gradients (S, 4) of a sum of what :func:`oscillator` returns."""

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            value = sum(part.square() for part in oscillator(steps, every)(leaf))
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return function


def recurrent(z: Tensor) -> tuple[Tensor, ...]:
    """Rounds with vectors, matrices and whole numbers."""
    state, weights, counts = z, torch.arange(16.0, dtype=z.dtype).reshape(4, 4).sin(), torch.zeros(len(z), 1).long()
    for _ in range(12):
        both = torch.cat([state @ weights, state * state.sum(1, keepdim=True)], 1)
        first, second = both.chunk(2, 1)
        counts = counts + (first > 0.0).sum(1, keepdim=True)
        state = (first.tanh() + second.sigmoid()).softmax(1) * (1.0 + counts.clamp(max=1)) + state.cumsum(1) * 0.1
    return state, counts


def two_loops(z: Tensor) -> tuple[Tensor, ...]:
    return (*oscillator(10)(z), *recurrent(z))


LOOPS = {
    "values": oscillator(20),
    "interrupted": oscillator(40, 5),
    "gradients": gradients(20),
    "interrupted gradients": gradients(40, 5),
    "often interrupted gradients": gradients(30, 2),
    "recurrent": recurrent,
    "two": two_loops,
}


@pytest.mark.parametrize("name", LOOPS)
def test_calls_of_rounds_give_the_same_numbers(name):
    z = 0.5 * normal(6, 4, seed=0)
    module = record(LOOPS[name], z)
    outline = Outline(module)
    assert outline.inside >= 0.5 * sum(node.op == "call_function" for node in module.graph.nodes)
    calls = Counter()

    def counted(body: fx.GraphModule, number: int):
        def call(*inputs: Tensor):
            calls[number] += 1
            return body(*inputs)

        return call

    written = outline.called([counted(kind.body, number) for number, kind in enumerate(outline.kinds)])
    found = written(0.4 * z)
    assert all(count >= FEWEST for count in calls.values())
    assert len(calls) == len(outline.kinds)
    for got, expected in zip(found, LOOPS[name](0.4 * z), strict=True):
        close(got, expected, 1e-12)


def called(outline: Outline) -> fx.GraphModule:
    """Return the graph with calls of bodies that are not compiled."""
    return outline.called([lambda *inputs, body=kind.body: body(*inputs) for kind in outline.kinds])


def operations(module: fx.GraphModule) -> int:
    """How many a graph has, without those that only take a part of a tuple."""
    return sum(node.op == "call_function" and node.target is not operator.getitem for node in module.graph.nodes)


def test_interrupted_rounds_are_called_too():
    """Observations at each fifth step interrupt a loop and its gradient; hardly an operation is left outside."""
    module = record(gradients(80, 5), normal(6, 4, seed=0))
    outline = Outline(module)
    assert outline.inside >= 0.9 * operations(module)
    assert operations(called(outline)) < 0.25 * outline.inside


def test_what_does_not_repeat_is_left_alone():
    def function(z: Tensor) -> tuple[Tensor]:
        for number in range(200):
            z = (z * (1.0 + number)).sin() + number
        return (z,)

    nodes = [node for node in record(function, normal(3, 2, seed=1)).graph.nodes if node.op == "call_function"]
    assert repeats(nodes) == []
    assert repeats(nodes[: SHORTEST // 2]) == []


def test_rounds_share_no_operation():
    nodes = [node for node in record(two_loops, normal(3, 4, seed=2)).graph.nodes if node.op == "call_function"]
    found = repeats(nodes)
    places = [place for kind in found for one in kind.rounds for place in one]
    assert len(found) >= 2
    assert len(places) == len(set(places))


def test_rounds_whose_operations_need_what_lies_between_stay():
    """Something between two operations of a round that takes from the first and gives to the second."""

    def function(z: Tensor) -> tuple[Tensor]:
        for number in range(40):
            for power in range(10):
                z = z.sin() * (1.0 + power)
            if number % 4 == 0:
                z = z.cosh()
            z = z.cos() - 0.5
        return (z,)

    z = normal(3, 2, seed=3)
    outline = Outline(record(function, z))
    found = called(outline)(z)
    close(found[0], function(z)[0], 1e-12)


def calls_of(work) -> int:
    """Count the calls of Python functions, and of those written in C, that some work makes."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.slow
def test_time_is_linear_in_the_operations():
    """To record, look for loops, write them as calls, and make a function of the graph: twice the calls for twice."""
    z = normal(6, 4, seed=4)

    def work(steps: int):
        def run() -> None:
            module = record(gradients(steps, 5), z)
            outline = Outline(module)
            quicken(called(outline))
            quicken(module)

        return run

    work(10)()
    small, large = calls_of(work(100)), calls_of(work(200))
    assert large < 2.1 * small


# ---- recorders and runners -------------------------------------------------------------------------------------------


def growth(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    size = pyro.sample("size", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    sizes = []
    for _ in range(len(y)):
        size = size + 0.1 * (rate - size.tanh()).sin() * (1.0 + 0.1 * rate)
        sizes.append(size)
    pyro.sample("y", dist.Normal(torch.stack(sizes), 0.3).to_event(1), obs=y)


DATA = torch.linspace(0.0, 1.0, 20, dtype=torch.float64)


def test_a_long_model_is_recorded_once(monkeypatch):
    """Starts, races, training, checks and the verdict ask for batches of many sizes: one graph serves them all.

    Values of hundreds of draws have one of their own: they took ten times as long in as small pieces as gradients.
    """
    monkeypatch.setattr(batches, "LONG", 300)
    recorded = []

    def noted(function, *inputs):
        recorded.append((function.__name__, len(inputs[0])))
        return record(function, *inputs)

    monkeypatch.setattr(batches, "record", noted)
    pf.fit(growth, DATA, max_steps=60, escalate=False, refine=False, progress=False)
    assert recorded == [("_gradients", batches.LONG_ROWS), ("_plain_values", batches.ROWS_OF_VALUES)]


def test_a_long_graph_takes_batches_of_any_size(monkeypatch):
    plain = pf.LogDensity(growth, (DATA,))
    assert plain._values.unit is None
    monkeypatch.setattr(batches, "LONG", 300)
    monkeypatch.setattr(batches, "RECORDED_FROM", 1)
    monkeypatch.setattr(batches, "BORROWED", 1)
    density = pf.LogDensity(growth, (DATA,))
    assert density._values.unit == density._with_gradients.unit == batches.LONG_ROWS
    assert (density._values.large, density._with_gradients.large) == (batches.ROWS_OF_VALUES, batches.LONG_ROWS)
    for size in (1, 7, 128, 250, 1100):
        z = normal(size, 2, seed=size)
        value, grad = density.value_and_grad(z)
        expected = plain.unrecorded(z)
        close(value, expected[0], 1e-10)
        close(grad, expected[1], 1e-10)
        with torch.no_grad():
            close(density(z), expected[0], 1e-10)
    assert [[kind[0] for kind in density._values.runners], len(density._with_gradients.runners)] == [
        [batches.LONG_ROWS, 1024],
        1,
    ]
    assert density.graph(normal(4, 2, seed=0)) is None


def test_a_long_graph_of_gradients_is_lent_to_a_few_calls_for_values(monkeypatch):
    """One of values alone takes seconds, which few calls do not pay back. Large batches have one."""
    plain = pf.LogDensity(growth, (DATA,))
    monkeypatch.setattr(batches, "LONG", 300)
    monkeypatch.setattr(batches, "BORROWED", 5)
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
    assert [kind[0] for kind in density._values.runners] == [batches.LONG_ROWS, 1024]


@pytest.mark.parametrize(
    ("apiece", "rows"), [(1, (64, 1024)), (32, (64, 512)), (64, (64, 256)), (128, (32, 128)), (10_000, (16, 16))]
)
def test_rows_of_a_long_graph_follow_the_size_of_its_operations(apiece, rows):
    work = batches.Work()
    work.operations, work.numbers = 5000, 5000 * 2 * apiece
    assert work.rows(2) == rows
    work.operations = batches.LONG - 1
    assert work.rows(2) == (None, None)


def test_a_loop_costs_as_much_as_one_round():
    z = normal(6, 4, seed=5)
    short, long = (Plan(record(gradients(steps), z)) for steps in (LOOPS_FROM // 20, LOOPS_FROM // 5))
    assert long.seconds <= 1.01 * short.seconds
    assert long.saved > 3.0 * short.saved
    assert 0 < pays_at([long]) < pays_at([short])


def test_nothing_is_compiled_where_too_few_seconds_are_left(monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "_compiled", lambda module, inputs: asked.append(None) or quicken(module))
    z = normal(4, 4, seed=6)
    module = record(oscillator(3), z)
    seconds = Plan(module).seconds
    for left, times in ((seconds, 0), (10.0 * seconds, 1)):
        runner = Runner(module, compile=True, left=lambda left=left: left)
        runner(z)
        assert len(asked) == times
        assert runner.compiled == bool(times)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["interrupted gradients", "recurrent"])
def test_compiled_rounds_give_the_same_numbers(name, monkeypatch):
    monkeypatch.setattr(compiling, "LOOPS_FROM", 100)
    z = 0.5 * normal(6, 4, seed=7)
    runner = Runner(record(LOOPS[name], z), compile=True)
    assert runner._plan.outline is not None
    for got, expected in zip(runner(0.4 * z), LOOPS[name](0.4 * z), strict=True):
        close(got, expected, 1e-12)
    assert runner.compiled


AGAIN = """
import torch
from torch._dynamo.utils import counters
from pyro_flows.graphs.compiling import Runner
from pyro_flows.graphs.record import record
data = torch.full((5,), {value})
runner = Runner(record(lambda z: ((z * data).sin().sum(-1),), torch.ones(3, 5)), compile=True)
runner(torch.ones(3, 5))
assert runner.compiled
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
@pytest.mark.slow
def test_another_process_with_other_data_finds_compiled_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = [
        subprocess.run([sys.executable, "-c", AGAIN.format(value=value)], check=True, capture_output=True, text=True)
        for value in (1.5, 2.5)
    ]
    assert [int(process.stdout) for process in found] == [0, 1]


# ---- a fresh process -------------------------------------------------------------------------------------------------

COLD = """
import sys
import pyro, pyro.distributions as dist, torch
import pyro_flows as pf

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, 10.0), obs=y)

posterior = pf.fit(model, torch.tensor([28.0, 8.0, -3.0, 7.0]), max_steps=60, progress=False)
print([name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_fit_imports_no_compiler():
    """They take a second of a fit's three."""
    process = subprocess.run([sys.executable, "-c", COLD], check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "[]"
