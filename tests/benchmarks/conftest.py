"""What tests of benchmarks share."""

import functools

import pytest

from benchmarks import records


@pytest.fixture(autouse=True, scope="session")
def _each_file_is_parsed_once():
    """A version is a digest of all definitions of the package: two seconds of parsing, in each of thirty tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "definitions", functools.cache(records.definitions))
        yield
