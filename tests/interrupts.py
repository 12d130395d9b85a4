"""Ctrl-C at a chosen call of a function, and signals to forked processes at chosen moments."""

import itertools
import multiprocessing
import os
import signal
import time
from contextlib import suppress

import torch


def interrupting(monkeypatch, owner, name, *, at=1):
    """Let the ``at``-th call of a function raise KeyboardInterrupt."""
    original, calls = getattr(owner, name), itertools.count(1)

    def function(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def in_a_fork(work, *, end=None, number=signal.SIGKILL, begin=None):
    """Return what ``work`` returns in a forked process, and its seconds; None if a signal ended it before.

    The signal is sent ``end`` seconds after the beginning. ``begin`` takes a function that says when that is: at once,
    by default.
    """
    context = multiprocessing.get_context("fork")
    inside, outside = context.Pipe()

    def run():
        torch.set_num_threads(1)
        began = []

        def begun():
            if not began:
                began.append(time.monotonic())
                outside.send(None)

        (begin or (lambda function: function()))(begun)
        found = work()
        outside.send((found, time.monotonic() - began[0]))

    process = context.Process(target=run)
    process.start()
    outside.close()
    inside.recv()
    if end is not None and not inside.poll(end):
        os.kill(process.pid, number)
    found = None
    with suppress(EOFError):
        found = inside.recv()
    process.join()
    return found
