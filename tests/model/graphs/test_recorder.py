"""Functions of a batch, recorded for sizes that come again; graphs that are compiled once that pays."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.model.graphs.graph import Stitcher
from pyro_flows.model.graphs.recorder import RECORDED_FROM, Recorder
from pyro_flows.model.graphs.recording import record
from pyro_flows.model.graphs.runner import Runner
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.numbers.tensors import PIECE, ROWS_AT_LEAST
from tests.invariants import close
from tests.registry import needs_interpreter, normal


def function(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.sin().sum(-1), z.exp()


@pytest.mark.parametrize("size", [1, 5, 16, 17, 100])
def test_results_do_not_depend_on_pieces(size):
    z = normal(size, 3, seed=0)
    recorder = Recorder(function, numbers=PIECE // 8)
    assert recorder.rows == ROWS_AT_LEAST
    for _ in range(RECORDED_FROM + 1):
        for got, expected in zip(recorder(z), function(z), strict=True):
            close(got, expected, 1e-12)
    assert max(kind[0] for kind in recorder.runners) <= recorder.rows
    assert len(recorder.runners) == 1


def test_memory_of_a_large_batch_is_bounded():
    """Values and pointwise likelihoods of many draws go through in pieces that the observations decide on."""
    runs = []

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        runs.append(None)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    density = pf.LogDensity(model, (torch.zeros(100_000),))
    runs.clear()
    likelihood = density.log_likelihood(torch.zeros(24, 1))["y"]
    assert likelihood.shape == (24, 100_000)
    assert len(runs) == 3  # of 8 draws each


def test_a_graph_may_have_constants_before_an_input_that_comes_late():
    """A training step has: its data are constants of the density, and the learning rate comes in after that."""
    data, z, rate = normal(5, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    whole = Stitcher()
    first = whole.add(record(lambda z: ((z + data).sin().sum(-1),), z), [whole.input(z)])
    module = whole.finish(whole.add(record(lambda a, b: (a * b,), rate, rate.clone()), [*first, whole.input(rate)]))
    runner = Runner(module)
    for _ in range(2):
        close(runner(z, rate)[0], (z + data).sin().sum(-1) * rate, 1e-12)


@needs_interpreter
@pytest.mark.parametrize("alike", [False, True])
def test_the_first_run_gives_the_numbers_of_torch_unless_later_ones_are_to_be_the_same(alike):
    z = 3.0 * normal(64, 3, seed=3)
    runner = Runner(record(function, z), alike=alike)
    first, second = runner(z), runner(z)
    recorded = runner._recorded(z)
    for one, other, plain in zip(first, second, recorded, strict=True):
        assert torch.equal(one, other if alike else plain)


def test_results_belong_to_the_caller():
    """Constants of the graph, and the input itself, are copied."""
    recorder = Recorder(lambda z: (torch.ones_like(z), z.detach()), numbers=3)
    z = normal(4, 3, seed=10)
    for _ in range(RECORDED_FROM + 1):
        ones, same = recorder(z)
        assert torch.equal(ones, torch.ones(4, 3, dtype=z.dtype))
        ones.neg_()
        same.neg_()


@pytest.mark.falls_back
def test_forgetting_gives_recording_another_try():
    broken = [True]

    def fails_at_first(z: Tensor) -> tuple[Tensor]:
        if broken[0]:
            z.sum().item()
        return (z.exp(),)

    recorder = Recorder(fails_at_first, numbers=3)
    z = normal(4, 3, seed=11)
    for _ in range(RECORDED_FROM):
        recorder(z)
    assert recorder.reason.startswith("not recorded")
    recorder.forget()
    broken[0] = False
    for _ in range(RECORDED_FROM):
        recorder(z)
    assert recorder.reason is None
    assert len(recorder.runners) == 1


def test_a_cache_keeps_what_was_used_last():
    cache = Cache(2)
    made = [cache.of(key, lambda key=key: key.upper()) for key in "abab"]
    assert made == ["A", "B", "A", "B"]
    assert cache["a"] == "A"  # used, so that the other one is the oldest
    assert cache.put("c", "C") == ["b"]
    assert ([*cache], cache.values()) == (["a", "c"], ["A", "C"])
    assert cache.of("a", lambda: "anew") == "A"
    assert cache.put("d", "D") == ["c"]
    cache.clear()
    assert not cache
    assert "a" not in cache


def with_an_edge(z: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.where(z[:, 0] < 1.0, -z[:, 0], -torch.inf),)


@pytest.mark.parametrize(
    ("changed", "repeats"),
    [([], True), ([7], True), ([20], False), ([7, 20], False), ([7, 8, 9], False)],
    ids=["none", "at the edge", "elsewhere", "both", "too many"],
)
def test_a_graph_may_differ_where_the_last_digit_decides(changed, repeats):
    """One of 1024 points at the edge of a support was the end of recording, and the fit of it was slow."""
    points = torch.linspace(0.0, 0.9, 100)[:, None]
    points[7:10] = 1.0
    other = with_an_edge(points)[0]
    other[changed] = -1.0
    assert Recorder(with_an_edge, 1)._repeats((other,), points) == repeats


def test_graphs_of_their_own():
    """One batch has the same digits at the first call and at the hundredth: chains go on from there."""
    recorder = Recorder(function, numbers=3, own=True)
    for size in (5, 7):
        first, again = (recorder(normal(size, 3, seed=size)) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert [kind[0] for kind in recorder.runners] == [5, 7]
