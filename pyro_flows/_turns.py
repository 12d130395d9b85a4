"""One thread at a time, wherever something is used that belongs to the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
