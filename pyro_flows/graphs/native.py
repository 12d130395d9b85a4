"""The interpreter in C that runs programs of :mod:`pyro_flows.graphs.programs`: an extension built with the package."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from importlib.util import find_spec

from pyro_flows._fallbacks import fallback

EXTENSION = "pyro_flows.graphs._interpreter"  # no module of Python's: a shared library, loaded by ctypes


@functools.cache
def library() -> Callable[..., object] | None:
    """Return ``run_program`` of ``interpreter.c``; None where the package was built without a compiler of C.

    Cost: a millisecond, once a process.

    >>> run = library()
    """
    found = find_spec(EXTENSION)
    if found is None or found.origin is None:
        return None
    try:
        run = ctypes.CDLL(found.origin).run_program
    except (OSError, AttributeError) as error:
        fallback("no code of its own for elementwise operations", error)
        return None
    run.restype = None
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return run


def interpreter_is_built() -> bool:
    """Return whether graphs run block by block: whether the extension in C was built with the package."""
    return library() is not None
