"""One thread at a time, wherever something is used that belongs to the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
