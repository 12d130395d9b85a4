"""How many rows recorded graphs have, and what goes through them."""

import pytest
import torch

from pyro_flows.model.graphs.recorder import A_PIECE, RECORDED_FROM, RECORDING, Recorder
from pyro_flows.support.numbers.tensors import PIECE, ROWS_AT_MOST
from tests.invariants import close
from tests.model.graphs.test_recorder import function
from tests.registry import normal


def sizes(recorder: Recorder) -> list[int]:
    return [kind[0] for kind in recorder.runners]


def test_batches_of_all_sizes_share_a_graph():
    """A fit had a dozen graphs, each of another number of points, and half of its time went into recording them."""
    recorder = Recorder(function, numbers=PIECE // ROWS_AT_MOST)
    for size in (3, 70, 1, 20, 33, 17, 32, 5):
        z = normal(size, 3, seed=size)
        for got, expected in zip(recorder(z), function(z), strict=True):
            close(got, expected, 1e-12)
    assert sizes(recorder) == [128]


@pytest.mark.parametrize(("first", "size"), [(16, 64), (64, 16)])
def test_a_size_that_wastes_much_gets_a_graph_of_its_own(first, size):
    numbers = 1000
    recorder = Recorder(function, numbers=numbers)
    for _ in range(RECORDED_FROM):
        recorder(normal(first, 3, seed=1))
    z = normal(size, 3, seed=2)
    pieces = -(-size // first)
    wasted = pieces * (first * numbers + A_PIECE) - size * numbers - A_PIECE
    for _ in range(RECORDING // wasted):
        recorder(z)
    assert sizes(recorder) == [first]
    for got, expected in zip(recorder(z), function(z), strict=True):
        close(got, expected, 1e-12)
    assert sizes(recorder) == [first, size]
    recorder(normal(size - 1, 3, seed=3))
    assert sizes(recorder) == [first, size]


def test_graphs_of_their_own():
    """One batch has the same digits at the first call and at the hundredth: chains go on from there."""
    recorder = Recorder(function, numbers=3, own=True)
    for size in (5, 7):
        first, again = (recorder(normal(size, 3, seed=size)) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert sizes(recorder) == [5, 7]
