"""The design is short, decision records have one form, and the index lists each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
RECORDS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
HEADINGS = ["Problem", "Options", "Decision", "Evidence"]
LONGEST, WIDEST = 60, 120  # lines of a record, and characters of a line outside of tables
LONGEST_DESIGN = 300


def wide(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > WIDEST and not line.startswith("|")]


def test_the_design_is_short():
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_DESIGN, "cases, figures and what did not help go to docs/decisions"
    assert not wide(text)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_has_the_form_of_the_others(path):
    text = path.read_text(encoding="utf-8")
    number = path.stem.partition("-")[0]
    assert text.startswith(f"# {number}. ")
    assert re.search(r"^- Date: 20\d\d-\d\d", text, flags=re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADINGS
    assert len(text.splitlines()) <= LONGEST
    assert not wide(text)


def test_records_are_numbered_without_gaps_and_listed_once():
    assert [int(path.stem[:4]) for path in RECORDS] == list(range(1, len(RECORDS) + 1))
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(\d{4})\]\((\1-[\w-]+\.md)\): ", index, flags=re.MULTILINE)
    assert sorted(name for _, name in listed) == [path.name for path in RECORDS]
