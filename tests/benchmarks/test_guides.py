"""The benchmark of guides: a row, one for a run that raises, and the table."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import records
from benchmarks.guides import running as guides
from benchmarks.guides.models import MODELS
from benchmarks.guides.tables import elbos, guides_section


def test_rows_and_the_table(tmp_path, monkeypatch):
    file = tmp_path / "guides.csv"
    monkeypatch.setattr(guides, "elbo", functools.partial(guides.elbo, draws=500, most=500))
    choice = {"models": ["gp"], "rates": (0.01,), "seconds": 0.05, "out": file, "do": guides.work}
    rows = guides.bench(guides=["ours", "full_rank"], **choice)
    assert [row["error"] for row in rows] == ["", ""]
    assert all(float(row["elbo"]) < 0.0 for row in rows)
    assert rows[0]["layers"] == "4"
    monkeypatch.setitem(guides.GUIDES, "iaf", lambda model: 1 / 0)
    assert "ZeroDivisionError" in guides.bench(guides=["iaf"], **choice)[0]["error"]
    kept = records.read(file)
    assert len(kept) == 3
    assert guides.bench(guides=["ours"], **choice) == [rows[0]], "it is not done again"
    text = guides_section(kept)
    assert "| gp, 3 |" in text
    assert "| failed |" in text
    assert "of 1 models" in text


def test_an_elbo_that_is_no_number_is_a_failure():
    rows = {("gp", "iaf", rate): {"error": "", "elbo": value} for rate, value in ((0.1, "nan"), (0.01, "-2"))}
    assert elbos(rows, "gp", "iaf") == [-torch.inf, -2.0]


@pytest.mark.parametrize("name", ["schools_centered", "logistic", "horseshoe", "funnel"])
def test_the_elbo_of_a_guide_is_that_of_its_draws(name):
    """Many particles at once are as good as one by one: no model adds up over particles."""
    case = MODELS[name]
    arguments = case.arguments()
    guide = guides.GUIDES["full_rank"](case.model)
    guide(*arguments)
    from pyro.infer import Trace_ELBO

    together, error = guides.elbo(case.model, guide, arguments, draws=2000, most=2000)
    single = -Trace_ELBO(num_particles=200).loss(case.model, guide, *arguments)
    assert single == pytest.approx(together, abs=5.0 * error * 10**0.5)
