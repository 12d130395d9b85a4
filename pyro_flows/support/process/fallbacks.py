"""Slower ways that are taken where a faster one fails: in the log for users, errors in the tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

logger = logging.getLogger("pyro_flows")
_strict = False


class Fallback(BaseException):
    """A slower way would have been taken, where :func:`strict` forbids it.

    It is no ``Exception``, so that no handler takes it for the failure of something else.
    """


@contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Make each fallback an error inside, or, with ``on=False``, allow them again; the tests do, for the process.

    >>> with strict():
    ...     try:
    ...         fallback("not compiled", RuntimeError("no compiler"))
    ...     except Fallback as error:
    ...         print(error)
    not compiled: RuntimeError: no compiler
    """
    global _strict
    before, _strict = _strict, on
    try:
        yield
    finally:
        _strict = before


def fallback(what: str, error: BaseException | None = None) -> str:
    """Say that a slower way is taken (``what`` is not done, such as "not recorded"), and why; return the sentence."""
    reason = what if error is None else f"{what}: {first_line(error)}"
    if _strict:
        raise Fallback(reason) from error
    logger.debug("%s", reason, exc_info=error)
    return reason


def passed_over(what: str, error: BaseException) -> None:
    """Log an error of a model's own code that something else takes the place of, with its traceback."""
    logger.debug("%s: %s", what, first_line(error), exc_info=error)


class Tried:
    """A context for what may raise anything: a model's own code, or a damaged file.

    An error for which ``passes`` holds is kept in ``error``, and not raised.

    >>> with Tried(lambda error: isinstance(error, ValueError)) as tried:
    ...     float("one")
    >>> tried.error
    ValueError("could not convert string to float: 'one'")
    """

    def __init__(self, passes: Callable[[Exception], bool] = lambda error: True) -> None:
        self.passes = passes
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) and self.passes(error) else None
        return self.error is not None


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__.lstrip('_')}: {lines[0].rstrip('.: ') if lines else 'no message'}"
