"""How many threads torch takes, and parts of a task on all of them at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from pyro_flows._turns import drop_after_fork

ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms

T = TypeVar("T")

_asked: list[int] = []  # threads that callers of ``few_threads`` had asked torch for; the first is the user's
drop_after_fork(_asked.clear)
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process: threads do not outlive a fork


@contextmanager
def few_threads(numbers: int, points: int = 64) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save; the caller's number comes back after.

    The rule looks at sizes (terms of the likelihood at a point, times points), not at clocks, so that one seed gives
    one answer. The number belongs to the process: to be called inside of a turn only (``_turns.py``).
    """
    before = torch.get_num_threads()
    _asked.append(before)
    torch.set_num_threads(1 if points * numbers < ONE_THREAD_BELOW else cores())
    try:
        yield
    finally:
        _asked.pop()
        torch.set_num_threads(before)


def cores() -> int:
    """Return how many threads may work at once: as many as torch had before :func:`few_threads`."""
    return _asked[0] if _asked else torch.get_num_threads()


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions on as many threads as there are cores, each with one thread of torch; return their results.

    The functions must change nothing that they share. The first one runs on this thread. Of several errors, the first
    function's is raised, once all have ended. Cost: some 50 microseconds; it pays if each call takes half a millisecond
    outside of Python.
    """
    if len(calls) < 2 or cores() < 2:
        return [call() for call in calls]
    before = torch.get_num_threads()
    pool = _pool(cores() - 1)
    torch.set_num_threads(1)
    try:
        others = [pool.submit(call) for call in calls[1:]]
        try:
            first = calls[0]()
        finally:
            for other in others:
                other.exception()  # waits
        return [first, *(other.result() for other in others)]
    finally:
        torch.set_num_threads(before)


def _pool(count: int) -> ThreadPoolExecutor:
    """Return threads of this process that wait for work; they are made once."""
    key = os.getpid(), count
    if key not in _pools:
        ready = threading.Barrier(count + 1)
        pool = ThreadPoolExecutor(
            count, thread_name_prefix="pyro_flows", initializer=torch.set_num_threads, initargs=(1,)
        )
        for _ in range(count):
            pool.submit(ready.wait)
        ready.wait()  # each has set its number, which is that of threads to come, too: the caller sets it again
        _pools[key] = pool
    return _pools[key]
