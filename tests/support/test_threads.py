"""How many threads torch takes, and parts of a task on several of them at once."""

import os
import subprocess
import sys
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.model.graphs import Recorder
from pyro_flows.support.process.threads import ONE_THREAD_BELOW, at_once, cores, few_threads
from tests.invariants import close
from tests.registry import needs_interpreter, normal
from tests.slow import rest_slow


@pytest.fixture
def two():
    """Two threads, as a user with two cores has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_problems_take_one_thread_and_large_ones_those_of_the_caller(two):
    with few_threads(10):
        assert (torch.get_num_threads(), cores()) == (1, 2)
        with few_threads(ONE_THREAD_BELOW, points=1):
            assert (torch.get_num_threads(), cores()) == (2, 2)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == cores() == 2


@pytest.mark.slow
def test_all_of_a_fit_takes_one_thread(two):
    seen = []

    def model(y):
        seen.append(torch.get_num_threads())
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.StudentT(4.0, mu, tau), obs=y)

    posterior = pf.fit(model, normal(8, seed=0), draws=500, seed=0)
    read = seen.index(1)
    assert len(seen) > read + 10
    assert set(seen[read:]) == {1}
    del seen[:]
    pf.diagnose(model, posterior.guide, normal(8, seed=0), draws=500)
    assert set(seen[seen.index(1) :]) == {1}
    assert torch.get_num_threads() == 2


def test_functions_run_at_once_and_results_keep_their_order(two):
    met = threading.Barrier(2, timeout=20)  # which two functions pass together or not at all

    def call(number):
        met.wait()
        return number, torch.get_num_threads()

    assert at_once([lambda: call(0), lambda: call(1)]) == [(0, 1), (1, 1)]
    assert torch.get_num_threads() == 2


def test_one_core_calls_one_function_after_the_other():
    with few_threads(1):
        here = threading.get_ident()
        if cores() == 1:
            assert at_once([threading.get_ident] * 3) == [here] * 3


def test_an_error_comes_once_all_have_ended(two):
    ended = []

    def fails():
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        at_once([fails, lambda: ended.append(1)])
    with pytest.raises(ValueError, match="this one"):
        at_once([lambda: ended.append(2), fails])
    assert sorted(ended) == [1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_are_made_anew_in_a_forked_process():
    code = (
        "import os, torch\nfrom pyro_flows.support.process.threads import at_once\ntorch.set_num_threads(2)\n"
        "two = [lambda: 1, lambda: 2]\nassert at_once(two) == [1, 2]\n"
        "child = os.fork()\nif child == 0:\n    os._exit(0 if at_once(two) == [1, 2] else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=100)


def _long(z):
    x = z[:, :, None] + torch.linspace(0.0, 1.0, 500).to(z)
    for _ in range(10):
        x = x + 0.1 * x.sin()
    return x.sum((1, 2)), x.sum(2)


@needs_interpreter
@pytest.mark.parametrize("size", rest_slow([16, 300], (300).__eq__))
def test_results_do_not_depend_on_the_number_of_threads(two, size):
    z = normal(size, 4, seed=1)
    recorder = Recorder(_long, 2000)
    for _ in range(6):
        for got, expected in zip(recorder(z), _long(z), strict=True):
            close(got, expected, 1e-12)
    alone = size <= recorder.rows
    assert recorder.reason is None
    assert [len(one._twins) for one in recorder.runners.values()] == [0 if alone else 1]
