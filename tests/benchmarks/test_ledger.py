"""The ledger: fits of all tables as one list, and what forbids a change of the fit."""

import json
from pathlib import Path

import pytest

from benchmarks import ledger, records
from benchmarks.ledger import Entry, difference, entries
from benchmarks.standing import TABLES
from benchmarks.zoo import running

RESULTS = records.RESULTS


def entry(outcome="right", status="ok", seconds=5.0, **account):
    """One fit."""
    return Entry(outcome, status, seconds, account)


def many(*extra, right=98):
    """So many right fits, and others."""
    return {("zoo", "1", str(k)): one for k, one in enumerate([*[entry()] * right, *extra])}


def test_the_stored_rows_of_all_tables_are_entries_with_known_outcomes():
    found = entries(RESULTS)
    assert {key[0] for key in found} == set(TABLES)
    assert {one.outcome for one in found.values()} <= set(ledger.OUTCOMES)
    assert sum(key[0] == "posteriordb" for key in found) == len(TABLES["posteriordb"].rows())


def test_an_outcome_follows_from_the_draws_and_the_verdict():
    row = {"error": "", "status": "ok"}
    assert ledger.outcome(True, row) == "right"
    assert ledger.outcome(False, row) == "lie"
    assert ledger.outcome(True, {**row, "status": "unreliable"}) == "alarm"
    assert ledger.outcome(False, {**row, "status": "unreliable"}) == "honest"
    assert ledger.outcome(False, {**row, "error": "ValueError: no"}) == "crash"


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (many(entry("lie")), "1 lies, 0 are allowed"),
        (many(entry("alarm"), entry("alarm")), "2 alarms of 100, 1% are allowed"),
        (many(*[entry("honest")] * 4, right=96), "96 of 100 right, 97% are asked for"),
        (many(entry(seconds=11.0)), "1 fits took twice as long"),
        ({key: entry(seconds=6.0) for key in many()}, "slower in the median, 1.1 times is allowed"),
    ],
)
def test_what_makes_answers_worse_or_slower_is_named(after, said):
    before = {key: entry() for key in after}
    assert f"Not allowed: {said}." in difference(before, after).splitlines()
    assert "Not allowed" not in difference(before, before)


def test_changed_verdicts_and_methods_have_a_line_each():
    key = ("named", "radon", "1", "0")
    one, two = entry(method="MCMC", status="refined"), entry(method="trained flow")
    text = difference({key: one, **many()}, {key: two, **many()})
    assert "named radon 1 0: right, refined, MCMC -> right, ok, trained flow" in text.splitlines()
    assert difference({("a",): one}, {("b",): one}) == "No fit is in both."


def test_a_run_writes_to_its_own_folder_and_goes_on(tmp_path, monkeypatch):
    """Two fits of the zoo, the second time none."""
    done = []

    def fit(task):
        done.append(task)
        row = {**running.blank(task), "outcome": "right", "status": "ok", "seconds": "1.0", "name": "one"}
        return {**row, "ledger": json.dumps({"method": "MCMC", "accepted": ["first round"], "found": {}, "spent": {}})}

    monkeypatch.setattr(running.bench, "__kwdefaults__", {**running.bench.__kwdefaults__, "do": fit})
    monkeypatch.setitem(ledger.QUICK, "zoo", (("--seeds", "1", "--models", "2"),))
    for _ in range(2):
        ledger.main(["--quick", "--only", "zoo", "--out", str(tmp_path)])
    assert len(done) == 2
    assert [one.method for one in entries(tmp_path).values()] == ["MCMC", "MCMC"]
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["zoo.csv"]
