"""Warnings at the user's line: the one that goes with unreliable draws wherever they are handed on, and others."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

from torch.utils import _contextlib

HERE = str(Path(__file__).parents[2]) + os.sep

_warned: weakref.WeakKeyDictionary[object, set[tuple[CodeType, int]]] = weakref.WeakKeyDictionary()


class UnreliableWarning(UserWarning):
    """Draws are handed on that the verdict calls unreliable.

    Each line of code that takes such draws from a :class:`Posterior` warns once for each posterior, however often it
    runs. To silence it, once the verdict has been read:
    ``warnings.filterwarnings("ignore", category=pf.UnreliableWarning)``.

    >>> import warnings, pyro_flows as pf
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", pf.UnreliableWarning)
    ...     warnings.warn("read, and gone on", pf.UnreliableWarning)
    >>> issubclass(pf.UnreliableWarning, UserWarning)
    True
    """


def outside() -> int:
    """Return the ``stacklevel`` of the first caller outside of this package, for the function that calls this."""
    ours = (HERE, contextlib.__file__, _contextlib.__file__)  # the last two: of decorators
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


def warn_unreliable(owner: object, function: str, reasons: Sequence[str]) -> None:
    """Warn at the caller's line, once for each ``owner`` and line, that ``function`` hands on unreliable draws.

    Python's own record of warnings goes by text and line, so it would leave out a second posterior on the same line.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    place = (frame.f_code, frame.f_lineno)  # a file's name would not do: all that is typed is line 1 of "<stdin>"
    if place in _warned.get(owner, ()):
        return
    text = f"unreliable: {function} hands on draws that should not be used ({'; '.join(reasons)})."
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(
        text, UnreliableWarning, frame.f_code.co_filename, frame.f_lineno, module=module, registry={}
    )
    _warned.setdefault(owner, set()).add(place)  # a warning that was made an error comes again
