"""The benchmark of new processes: rows, and a table of their medians."""

from __future__ import annotations

import pytest

from benchmarks import records
from benchmarks.cold import __main__ as cold
from tests.benchmarks.pages import write_only


@pytest.mark.slow
def test_rows_and_the_table(tmp_path, monkeypatch, capsys):
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(cold, "run", lambda seed: [1.0, 0.25, next(seconds), "ok"])
    file = tmp_path / "cold.csv"
    cold.main(["--repeats", "3", "--seeds", "1", "--out", str(file)])
    rows = records.read(file)
    assert [float(row["fit"]) for row in rows] == [1.0, 2.0, 3.0], "the first process does not count"
    assert {row["version"] for row in rows} == {records.code_version()}
    assert "| 0 | 1.00 | 0.25 | 2.00 | 3.25 | 2.25 to 4.25 | ok |" in capsys.readouterr().out
    page = tmp_path / "page.md"
    write_only(page, cold_csv=file)
    assert "3.25 | 2.25 to 4.25 | ok" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_process_gives_seconds_and_a_verdict():
    *seconds, verdict = cold.run(0)
    assert len(seconds) == len(cold.PARTS)
    assert all(value > 0.0 for value in seconds)
    assert verdict == "ok"
