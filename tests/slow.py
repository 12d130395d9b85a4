"""Some cases of a family in every run, and the rest as slow ones."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], usual: Callable[[Any], bool]) -> list[Any]:
    """Return all cases, those that are not ``usual`` with the marker ``slow``; a tuple is one of several arguments."""
    parts = [(case, case if type(case) is tuple else (case,)) for case in cases]
    return [case if usual(case) else pytest.param(*part, marks=pytest.mark.slow) for case, part in parts]
