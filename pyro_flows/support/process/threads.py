"""One thread at a time, wherever something is used that belongs to the process; and how many threads torch takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

VALIDATION = ("validate_distributions_pyro", "validate_distributions_torch", "validate_poutine", "validate_infer")

_turn: Any = threading.RLock()
_before: list[tuple[dict[str, bool], Tensor, int]] = []  # what the thread that is inside found: settings, random
# numbers, threads of torch
_dropped: list[Callable[[], object]] = []  # what else a forked process drops, see `drop_after_fork`


class Disturbed(BaseException):
    """Another thread uses Pyro: no ``Exception``, so that no fallback to a slower way takes it for one of a model."""


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread is inside, and keep others waiting.

    Pyro's handlers and its validation, torch's random numbers and number of threads, and the graphs kept here belong to
    the whole process: two threads that used them at once would get wrong numbers. So whatever changes one of them takes
    its turn. A thread that is inside may come in again; one that it waits for must not.
    """
    outermost = not _turn._is_owned()
    with _turn:
        if outermost and hasattr(os, "fork"):
            _note()
        try:
            yield
        except Disturbed as error:
            if not outermost:
                raise
            raise RuntimeError(str(error)) from error


@contextmanager
def alone() -> Iterator[None]:
    """Take a turn for a whole call, with gradients switched on whatever the caller switched off."""
    with turn(), torch.inference_mode(False), torch.enable_grad():
        yield


# forks ----------------------------------------------------------------------------------------------------------------


def drop_after_fork(function: Callable[[], object]) -> None:
    """Call a function in each process that is forked while another thread than the forking one is inside."""
    _dropped.append(function)


def _note() -> None:
    import pyro

    settings = {name: pyro.settings.get(name) for name in VALIDATION}
    _before[:] = [(settings, torch.get_rng_state(), torch.get_num_threads())]


def _renew() -> None:
    """Take a new lock in a forked process, where no other thread goes on, and put back what such a one has changed."""
    global _turn
    if _turn._is_owned():
        return
    idle = _turn.acquire(blocking=False)
    _turn = threading.RLock()
    if idle or not _before:
        return
    import pyro
    from pyro.poutine import runtime

    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack = []
    ((settings, random, threads),) = _before
    pyro.settings.set(**settings)
    torch.set_rng_state(random)
    torch.set_num_threads(threads)
    for function in _dropped:
        function()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


# how many threads torch takes -----------------------------------------------------------------------------------------

ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms

T = TypeVar("T")

_asked: list[int] = []  # threads that callers of ``few_threads`` had asked torch for; the first is the user's
drop_after_fork(_asked.clear)
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process: threads do not outlive a fork


@contextmanager
def few_threads(numbers: int, points: int = 64) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save; the caller's number comes back after.

    The rule looks at sizes (terms of the likelihood at a point, times points), not at clocks, so that one seed gives
    one answer. The number belongs to the process: to be called inside of a :func:`turn` only.
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
