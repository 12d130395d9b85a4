"""Functions of a batch, recorded for sizes that come again; graphs that are compiled once that pays."""

import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.compiling import Runner, pays_at
from pyro_flows.graphs import record
from pyro_flows.recorder import PIECE, ROWS_AT_LEAST, ROWS_AT_MOST, Recorder, rows_for
from tests.invariants import close
from tests.registry import normal

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler: install g++ or clang++"
)


def function(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.sin().sum(-1), z.exp()


@pytest.mark.parametrize("size", [1, 5, 16, 17, 100])
def test_results_do_not_depend_on_pieces(size):
    z = normal(size, 3, seed=0)
    recorder = Recorder(function, numbers=PIECE)
    assert recorder.rows == ROWS_AT_LEAST
    for _ in range(3):
        for got, expected in zip(recorder(z), function(z), strict=True):
            close(got, expected, 1e-12)
    assert max(recorder.runners) <= recorder.rows
    assert len(recorder.runners) == 1


def test_sizes_that_do_not_come_again_are_not_recorded():
    recorder = Recorder(function, numbers=3)
    for size in range(1, 12):
        recorder(normal(size, 3, seed=size))
    assert not recorder.runners


@pytest.mark.parametrize(
    ("numbers", "rows"), [(1, ROWS_AT_MOST), (PIECE // 100, 64), (PIECE, ROWS_AT_LEAST), (100 * PIECE, ROWS_AT_LEAST)]
)
def test_rows(numbers, rows):
    assert rows_for(numbers) == rows


def test_memory_of_a_large_batch_is_bounded():
    """Values and pointwise likelihoods of many draws go through in pieces that the observations decide on."""
    seen = []

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        seen.append(torch._C._functorch.maybe_get_level(mu) if isinstance(mu, Tensor) else None)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    density = pf.LogDensity(model, (torch.zeros(100_000),))
    seen.clear()
    likelihood = density.log_likelihood(torch.zeros(64, 1))["y"]
    assert likelihood.shape == (64, 100_000)
    assert len(seen) == 4  # runs of 16 draws each


@needs_compiler
@pytest.mark.slow
def test_compiled_graphs_give_the_same_numbers():
    z = normal(40, 3, seed=1)
    runner = Runner(record(function, z), compile=True)
    other = normal(40, 3, seed=2)
    with torch.no_grad():
        for got, expected in zip(runner(other), function(other), strict=True):
            close(got, expected, 1e-12)
    assert runner.compiled


def test_compiling_waits_until_it_pays(monkeypatch):
    z = normal(64, 3, seed=3)
    runner = Runner(record(function, z))
    assert runner.compile_at > 1000  # a few operations on few numbers
    large = Runner(record(lambda z: ((z[:, :1] * torch.ones(100_000, dtype=z.dtype)).sin().sum(-1),), z))
    assert large.compile_at < 500
    asked = []
    monkeypatch.setattr(Runner, "_compile", lambda self, inputs: asked.append(self.runs))
    large.compile_at = 3
    for _ in range(5):
        large(z)
    assert asked == [3]


def test_without_a_compiler_everything_works(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", fail)
    z = normal(4, 3, seed=4)
    runner = Runner(record(function, z), compile=True)
    for got, expected in zip(runner(z), function(z), strict=True):
        close(got, expected, 1e-12)
    assert not runner.compiled


def test_compiled_code_that_gives_other_numbers_is_not_used(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda *_, **__: lambda z: (z.sum(-1), z))
    z = normal(4, 3, seed=5)
    runner = Runner(record(function, z), compile=True)
    for got, expected in zip(runner(z), function(z), strict=True):
        close(got, expected, 1e-12)
    assert not runner.compiled


def test_the_rule_looks_at_the_graph_alone():
    z = normal(64, 3, seed=6)
    assert pays_at([record(function, z)]) == pays_at([record(function, z + 1.0)])
