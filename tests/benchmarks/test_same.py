"""Two versions with equal fits: which models are compared, and what it means for tables."""

import importlib
import json

import numpy as np
import pytest

from benchmarks import ablation, fingerprints, records, same, sensitivity
from benchmarks.zoo import running as zoo_running


def row(number, accepted, seconds=1.0):
    return {"seed": "1", "number": str(number), "seconds": str(seconds), "ledger": json.dumps({"accepted": accepted})}


def test_each_way_through_the_methods_is_compared():
    rows = [row(number, ["Gaussian"]) for number in range(40)]
    rows += [row(100, ["mixture"], 50.0), row(101, ["mixture"], 60.0), row(102, [], 3.0), {"seed": "1", "number": "7"}]
    found = same.chosen(rows)
    assert found == same.chosen(rows[::-1])
    assert sum(number < 40 for _, number in found) == 5
    assert {(1, 100), (1, 102)} <= set(found)
    assert (1, 101) not in found


def test_stored_rows_have_many_ways():
    assert len(same.ways(records.read(zoo_running.OUT))) >= 20


@pytest.mark.slow
def test_a_version_makes_the_fits_that_it_makes(tmp_path, monkeypatch):
    root = records.RESULTS.parents[1]
    monkeypatch.setattr(same, "chosen", lambda rows: [(102, 17), (101, 8)])
    monkeypatch.setattr(fingerprints, "SAME", tmp_path / "same.csv")
    monkeypatch.setattr(fingerprints, "save", lambda version, package: None)
    assert same.main([str(root), str(root)]) == 0
    (kept,) = records.read(tmp_path / "same.csv")
    assert kept["before"] == kept["version"] == records.code_version()
    assert kept["models"] == "2"


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """Versions that rewrite all lines and have equal fits; the code as it stands has a line more than b."""
    lines = {"a": range(100), "b": range(500, 600), "c": range(900, 1000), "today": range(500, 601)}
    made = {
        name: {part: np.array(sorted(of), dtype=np.uint32) for part in fingerprints.PARTS} for name, of in lines.items()
    }
    monkeypatch.setattr(fingerprints, "load", lambda version, folder: made.get(version, {}))
    monkeypatch.setattr(fingerprints, "today", lambda: made["today"])
    monkeypatch.setattr(fingerprints, "same", lambda: [])
    fingerprints.changed.cache_clear()
    yield monkeypatch
    fingerprints.changed.cache_clear()


def test_lines_between_equal_versions_do_not_count(versions):
    assert fingerprints.changed("a", "fit") == 1.0
    fingerprints.changed.cache_clear()
    versions.setattr(fingerprints, "same", lambda: [("a", "b")])
    assert fingerprints.changed("a", "fit") == pytest.approx(0.01)
    assert fingerprints.changed("a", "step") == 1.0, "steps were not compared"
    assert fingerprints.changed("unknown", "fit") == fingerprints.UNKNOWN


def test_pairs_of_equal_versions_are_a_chain(versions):
    versions.setattr(fingerprints, "same", lambda: [("a", "c"), ("c", "b")])
    assert fingerprints.changed("a", "fit") == pytest.approx(0.01)


def test_thresholds_near_one_are_changed_by_their_distance_to_one():
    assert sensitivity.changed("R_HAT_CONVERGED", 1.01, 2.0) == pytest.approx(1.02)
    assert sensitivity.changed("ESS_SHARE_GOOD", 0.95, 0.5) == pytest.approx(0.975)
    assert sensitivity.changed("ESS_SHARE_LEAST", 0.1, 2.0) == pytest.approx(0.2)


def test_a_threshold_is_put_into_each_module_that_has_it(monkeypatch):
    from pyro_flows.inference.verdict import deciding
    from pyro_flows.support import thresholds

    monkeypatch.setattr(thresholds, "SHIFT_MOST", thresholds.SHIFT_MOST)
    before = thresholds.SHIFT_MOST
    having = sensitivity.put("SHIFT_MOST", 0.2)
    try:
        assert having >= 2
        assert deciding.SHIFT_MOST == thresholds.SHIFT_MOST == 0.2
    finally:
        sensitivity.put("SHIFT_MOST", before)


def test_only_doubtful_and_quick_models_are_tried():
    rows = records.read(zoo_running.OUT)
    chosen = sensitivity.models(rows)
    assert len(chosen) == len(set(chosen)) >= 10
    quick = {(int(one["seed"]), int(one["number"])) for one in rows if float(one["seconds"] or 1e9) < sensitivity.QUICK}
    assert set(chosen) <= quick


def test_a_part_is_switched_off_in_fits_in_which_it_acted():
    rows = records.read(zoo_running.OUT)
    for name, part in ablation.PARTS.items():
        module, attribute = part.replaced.split(":")
        there = getattr(importlib.import_module(module), attribute)
        assert part.by(there) is not there, name
    acted, chosen = ablation.models(rows, ablation.PARTS["Gaussian conditionals"], 3)
    assert acted > 3 == len(chosen)
    assert all(json.loads(row["ledger"])["accepted"] == ["Gaussian conditionals"] for row in chosen)


def test_a_method_that_is_switched_off_answers_nothing():
    rows = [row for row in records.read(zoo_running.OUT) if row["ledger"] and float(row["seconds"]) < 1.0]
    _, chosen = ablation.models(rows, ablation.PARTS["tables of coordinates"], 1)
    found = ablation.work("tables of coordinates", chosen)
    assert found["models"] == 1 == found["right"] + found["alarm"] + found["honest"]
    assert found["changed"] == 1, "the fit took the tables all the same"
    assert f"{chosen[0]['seed']}/{chosen[0]['number']}" in found["others"]
