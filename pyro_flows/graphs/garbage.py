"""Work that makes many objects, none of which is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Do not look for cycles of garbage inside.

    Thousands of new nodes set the collector off again and again, and it looks at all of them: a third of the time in
    which a loop of 22,000 operations is recorded.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
