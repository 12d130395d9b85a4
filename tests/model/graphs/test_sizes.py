"""How many rows recorded graphs have, and what goes through them."""

import torch

from pyro_flows.model.graphs.recorder import Recorder
from tests.model.graphs.test_recorder import function
from tests.registry import normal


def sizes(recorder: Recorder) -> list[int]:
    return [kind[0] for kind in recorder.runners]


def test_graphs_of_their_own():
    """One batch has the same digits at the first call and at the hundredth: chains go on from there."""
    recorder = Recorder(function, numbers=3, own=True)
    for size in (5, 7):
        first, again = (recorder(normal(size, 3, seed=size)) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert sizes(recorder) == [5, 7]
