"""The benchmark of speed: workers that take turns, ratios, tables."""

import sys

import pytest

from benchmarks.speed import running as speed
from benchmarks.speed import tables as speed_tables
from benchmarks.speed.running import Case
from tests.benchmarks.test_posteriors import timed

SMALL = Case("steps", "student", 3, 4, 2)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    patch = pytest.MonkeyPatch()
    patch.setattr(speed, "SECONDS", 0.01)
    found = speed.measure(SMALL, {"zuko in Pyro": "no-python"}, rounds=2, only=[speed.EAGER, speed.RECORDED, "Pyro"])
    patch.undo()
    return found


@pytest.mark.slow
def test_methods_take_turns_in_processes_of_their_own(rows):
    assert [row["method"] for row in rows] == ["eager", "recorded", "Pyro", "recorded", "Pyro", "eager"]
    assert all(float(row["milliseconds"]) > 0.0 and float(row["megabytes"]) > 50.0 for row in rows)
    assert all(set(row) == set(speed.FIELDS) for row in rows)


def test_a_method_that_does_not_start_is_left_out(capsys):
    assert speed.measure(SMALL, {"NumPyro": sys.executable}, only=["NumPyro"], rounds=0) == []
    assert "NumPyro: left out" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round():
    found = [timed("eager", 1.0), timed("Pyro", 4.0), timed("eager", 10.0, round=1), timed("Pyro", 20.0, round=1)]
    assert speed.ratios(found, "Pyro") == {"eager": 3.0, "Pyro": 1.0}
    assert "times faster than Pyro: eager 3.0." in speed_tables.summary(found)
