"""Ctrl-C at a chosen call of a function."""

import itertools


def interrupting(monkeypatch, owner, name, *, at=1):
    """Let the ``at``-th call of a function raise KeyboardInterrupt."""
    original, calls = getattr(owner, name), itertools.count(1)

    def function(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
