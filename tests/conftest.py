"""What all tests share: a fixed seed, Pyro's parameter store left empty, and fallbacks that are errors."""

import gc
import signal
import threading
from pathlib import Path

import pyro
import pytest
import torch

from pyro_flows.support.process.fallbacks import strict

LONG = frozenset(Path(__file__).with_name("long.txt").read_text(encoding="utf-8").splitlines())

pytest.register_assert_rewrite("tests.invariants", "tests.state_invariants")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """No garbage is looked for among the half a million objects of a collection, then or later: a quarter of its time.

    They live as long as the process does.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that ``long.txt`` names are slow, too: those that took 1.5 CPU seconds or more in a run of the suite."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Signals reach their tests: shells start background jobs with SIGINT ignored, nohup with SIGHUP."""
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240229)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _no_fallbacks(request):
    """A slower way that is taken where something fails is an error, unless the test is marked ``falls_back``."""
    with strict(request.node.get_closest_marker("falls_back") is None):
        yield
