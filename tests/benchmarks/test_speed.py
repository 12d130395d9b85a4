"""The benchmark of speed: workers that take turns, ratios, tables."""

import sys
from dataclasses import replace

import pytest

from benchmarks import tables
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


def test_slopes_of_growth():
    base = Case("growth", "student", 20, 64)
    cases = [replace(base, dim=dim) for dim in (10, 100, 1000)] + [replace(base, batch=128)]
    data = [Case("growth", "regression", 5, 64, 8, count) for count in (100, 10_000)]
    times = [1.0, 2.0, 8.0, 3.0, 1.0, 10.0]
    found = [timed("recorded", time, case) for time, case in zip(times, [*cases, *data], strict=True)]
    text = speed_tables.section(found, tables.table)
    assert "| D | 10 to 1000 | 1.00 | 8.00 | 0.45 | 0.60 | 300 |" in text
    assert "| rows of data | 100 to 10000 | 1.00 | 10.00 | 0.50 | 0.50 | 300 |" in text


def test_every_part_has_a_table():
    found = [timed(method, 2.0, case) for case in speed.CASES for method in speed.methods(case)]
    text = speed_tables.section(found, tables.table)
    assert "| score | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 1.00 (zuko) |" in text
    assert "| planar | 2.00 | 2.00 | 1.00 |" in text
    assert "| 256 | 2.00 | 2.00 | 100 % |" in text
