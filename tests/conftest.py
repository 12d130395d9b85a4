"""What all tests share: a fixed seed, and Pyro's parameter store left empty."""

import pyro
import pytest
import torch

pytest.register_assert_rewrite("tests.invariants", "tests.state_invariants")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240229)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
