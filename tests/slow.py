"""Some cases of a family in every run, and the rest as slow ones."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], usual: Callable[[Any], bool]) -> list[Any]:
    """Return all cases, those that are not ``usual`` with the marker ``slow``."""
    return [case if usual(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases]
