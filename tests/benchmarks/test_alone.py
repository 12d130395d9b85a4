"""The benchmark of fits by a flow alone: a row, and the table."""

import pytest

from benchmarks import alone, records
from benchmarks.posteriors import judging
from tests.benchmarks.pages import write_only

ROW = {
    **dict.fromkeys(alone.FIELDS, ""),
    **{"kind": "wide", "model": "500", "seed": "0", "version": "0.1.0-1", "dim": "500", "status": "ok"},
    **{"method": "trained flow", "raw_mean": "0.05", "raw_sd": "0.03", "used_mean": "0.05", "used_sd": "0.03"},
    **{"machine": "one", "software": "two"},
}


def test_the_table_counts_what_is_right_and_what_only_says_so(tmp_path):
    wrong = {**ROW, "model": "1000", "used_mean": "0.3"}
    failed = {**ROW, "model": "3000", "error": "ValueError: no", "status": "", "used_mean": "", "used_sd": ""}
    text = alone.section([ROW, wrong, failed])
    assert "latents observed with their neighbor: 1 of 3 right, 2 usable, 1 of these not right." in text
    assert "| 3000 | 500 | ValueError: no |" in text
    file, page = tmp_path / "rows.csv", tmp_path / "page.md"
    records.write(file, alone.FIELDS, [ROW])
    page.write_text("# A\n\n<!-- alone: begin -->\n<!-- alone: end -->\n", encoding="utf-8")
    write_only(page, alone_csv=file)
    assert "1 of 1 right" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_row_is_a_fit_by_a_flow():
    row = alone.work("wide", "3", 0, "0.1.0-1", None)
    assert judging.right(row, "used")
    assert row["status"] == "ok"
    assert row["dim"] == "3"
