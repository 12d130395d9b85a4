"""Planted modes: what they are, what is found of them, rows that resume, and the tables."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.search import planted, running
from benchmarks.search import tables as search_tables
from pyro_flows.posterior.report import page
from tests.benchmarks.pages import write_only


@pytest.mark.parametrize("kind", planted.SUMS)
def test_the_second_mode_has_its_mass_and_place(kind):
    case = planted.planted(kind, 2, 0.1, 3)
    density = pf.LogDensity(case.model())
    axis = torch.linspace(-1.0, 1.0, 401)
    square = torch.cartesian_prod(axis, axis)
    masses = [
        float(density(centre + reach * square).double().exp().mean() * (2.0 * reach) ** 2)
        for centre, reach in ((torch.zeros(2), 15.0), (case.centre, 0.6))
    ]
    assert masses[1] == pytest.approx(case.mass, abs=0.02)
    assert masses[0] == pytest.approx(1.0, abs=0.02)  # of both
    assert float(case.centre.norm()) == pytest.approx(case.distance, rel=1e-5)


def test_a_mode_as_wide_is_found_and_one_of_nearly_no_volume_is_not():
    assert planted.planted("none", 2, 1.0 / 3.0, 0).is_found()
    assert not planted.planted("none", 20, 0.02, 0).is_found()
    assert planted.planted("by hand", 20, 0.02, 0).is_found()


def test_blocks_are_done_once_and_make_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "BLOCK", 2)
    out, done = tmp_path / "search.csv", []

    def do(task):
        done.append(task)
        return running.measure(task, 2)

    told = {"sums": ["none"], "dims": [1], "widths": ["1"], "out": out, "do": do}
    running.bench(modes=2, **told)
    rows = running.bench(modes=4, **told)
    assert [task[4] for task in done] == ["0", "1"]
    assert records.read(out) == rows
    assert all(row["error"] == "" and len(row["found"].split()) == 2 for row in rows)
    found = sum(row["found"].count("1") for row in rows)
    page = tmp_path / "search.md"
    page.write_text("<!-- search: begin -->\n<!-- search: end -->\n")
    write_only(page, search_csv=out)
    text = page.read_text()
    assert f"| 1 | {25 * found} |" in text
    assert "of 4 in each cell" in text


def test_an_error_is_in_its_row():
    row = running.measure(("search", "none", "0", "1", "0", "v"), 1)
    assert row["error"]
    assert not math.isfinite(float(row["found"] or "nan"))


def test_what_a_report_says_is_what_was_measured():
    """Each share is within what the planted modes of its cell allow for."""
    rows = search_tables.newest(records.read(running.OUT))
    for dim, shares in page.FOUND.items():
        for said, width in zip(shares, page.WIDTHS, strict=True):
            own = [row for row in rows if (row["way"], row["sum"], row["dim"], row["width"]) == _cell(dim, width)]
            found = [mode["found"] for mode in search_tables.modes_of(own)]
            assert len(found) >= 10
            assert abs(sum(found) / len(found) - said / 100.0) < 0.25, (dim, width)
    assert page.searched(7) == page.searched(10)
    assert page.searched(1000) == page.searched(20)


def _cell(dim, width):
    return "search", "none", str(dim), width
