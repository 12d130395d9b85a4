"""What all tests share: a fixed seed, Pyro's parameter store left empty, and fallbacks that are errors."""

import gc
import signal
import threading

import pyro
import pytest
import torch

from pyro_flows._fallbacks import strict

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


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Ctrl-C reaches the tests of it: a shell starts its background jobs with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240229)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _no_fallbacks(request):
    """A slower way that is taken where something fails is an error, unless the test is marked ``falls_back``."""
    with strict(request.node.get_closest_marker("falls_back") is None):
        yield
