"""Random programs give block by block what torch gives."""

from __future__ import annotations

import pytest
import torch

from pyro_flows.model.graphs.views import Foreign
from tests.invariants import close
from tests.model.graphs.programs_at_random import program
from tests.model.graphs.test_blocks import in_blocks
from tests.registry import needs_interpreter
from tests.slow import rest_slow

PROGRAMS, TOGETHER = 100, 20


@needs_interpreter
@pytest.mark.parametrize("first", rest_slow(range(0, PROGRAMS, TOGETHER), lambda first: 2 * first < PROGRAMS))
def test_random_programs(first):
    tasks = foreign = 0
    for seed in range(first, first + TOGETHER):
        run, inputs = program(seed, length=5 + seed % 36)
        made = in_blocks(run, *inputs(0))
        before = []
        for number in (0, 1, 2):
            given = inputs(number)
            found = made(*given)
            for got, expected in zip(found, run(*given), strict=True):
                close(got, expected, 1e-10, f"program {seed}, inputs {number}")
            for part, copy in before:
                assert torch.equal(part, copy)
            before = [(part, part.clone()) for part in found]
        tasks += len(made.groups.tasks)
        foreign += sum(isinstance(one, Foreign) for one in made.groups.foreign)
    assert tasks > 10 * TOGETHER
    assert foreign > 0
