"""Draws inside of a seed are torch's own for it, and nothing outside changes."""

from __future__ import annotations

import torch

from pyro_flows.support.process import seeding
from pyro_flows.support.process.seeding import seeded


def test_draws_are_those_that_torch_makes_with_the_seed(monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.randn(3)
    for accelerated in (False, True):
        monkeypatch.setattr(seeding, "_accelerated", lambda accelerated=accelerated: accelerated)
        before = torch.get_rng_state()
        with seeded(5):
            assert torch.equal(torch.randn(3), expected)
        assert torch.equal(torch.get_rng_state(), before)
