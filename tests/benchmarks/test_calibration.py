"""The benchmark of calibration makes rows, and a table of them."""

from __future__ import annotations

import pytest

from benchmarks import records
from benchmarks.calibration import running
from benchmarks.calibration.models import MODELS
from benchmarks.calibration.tables import section
from pyro_flows import LogDensity
from tests.benchmarks.pages import write_only


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "rows.csv"
    running.main(["--only", "poisson", "--method", "together", "--simulations", "10", "--out", str(file)])
    return file, records.read(file)


@pytest.mark.slow
def test_a_row_says_what_was_measured(rows):
    _, (row,) = rows
    assert (row["model"], row["method"], row["simulations"]) == ("poisson", "together", "10")
    assert float(row["cpu_seconds"]) > 0.0
    assert 0.0 < float(row["smallest_p"]) <= 1.0
    assert sum(int(part.split()[0]) for part in row["verdicts"].split(", ")) == 10


def test_the_table_compares_both_ways(rows, tmp_path):
    _, (row,) = rows
    alone = {**row, "method": "one by one", "cpu_seconds": str(12.0 * float(row["cpu_seconds"]))}
    known = {"rank_distance": "0.0150", "expected_distance": "0.0140", "together_seconds": row["cpu_seconds"]}
    text = section([row, {**alone, **known}])
    assert "times as long" not in section([row, {**alone, **known, "together_seconds": ""}])
    assert "12 times as long" in text
    assert "differ by 0.0150 on average" in text
    assert text.count("| poisson |") == 2
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- calibration: begin -->\n<!-- calibration: end -->\n\nB\n", encoding="utf-8")
    write_only(page, calibration_csv=rows[0])
    assert "| poisson | fit, side by side | 10 |" in page.read_text(encoding="utf-8")


def test_all_models_can_be_read():
    for model, args in MODELS.values():
        assert LogDensity(model, args).dim > 1
