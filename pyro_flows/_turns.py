"""One thread at a time, wherever something is used that belongs to the process; and how many threads torch takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms

_turn = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread is inside, and keep others waiting.

    Pyro's handlers and its validation, torch's random numbers and number of threads, and the graphs kept here belong to
    the whole process: two threads that used them at once would get wrong numbers. So whatever changes one of them takes
    its turn. A thread that is inside may come in again; one that it waits for must not.
    """
    with _turn:
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Take a turn for a whole call, with gradients switched on whatever the caller switched off."""
    with _turn, torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save; the caller's number comes back after.

    The rule looks at sizes, not at clocks, so that one seed gives one answer.

    Args:
        numbers: terms of the likelihood in one batch.
    """
    before = torch.get_num_threads()
    if numbers < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
