"""Reports from the shell."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pyro_flows import cli
from tests.posteriors import schools_posterior

MODEL = """
import pyro
import pyro.distributions as dist
import torch


def mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("unreliable", 3)])
@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")
def test_of_a_saved_posterior(status, code, tmp_path):
    schools_posterior(status, draws=200).save(tmp_path / "saved")
    done = run("report", tmp_path / "saved", "--title", "Schools")
    assert done.exit_code == code, done.output
    assert f"{status}: " in done.output
    text = (tmp_path / "saved" / "report.html").read_text()
    assert '<meta name="generator" content="pyro_flows report">' in text
    assert "<h1>Schools</h1>" in text


@pytest.mark.slow
def test_after_a_fit_and_with_its_model(tmp_path):
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "data.json").write_text(json.dumps({"y": [0.5, 1.5, 1.0]}))
    model, data = f"{tmp_path / 'models.py'}:mean", tmp_path / "data.json"
    report = tmp_path / "page.html"
    options = ("--out", tmp_path / "out", "--draws", 200, "--max-steps", 40, "--no-refine", "--no-progress")
    done = run("fit", model, "--data", data, *options, "--report", report)
    assert done.exit_code in (0, 3), done.output
    assert f"Wrote the report to {report}." in done.output
    assert "def mean(y)" in report.read_text()
    done = run("report", tmp_path / "out", "--model", model, "--data", data, "--out", tmp_path / "other.html")
    assert done.exit_code in (0, 3), done.output
    assert "def mean(y)" in (tmp_path / "other.html").read_text()


def test_errors_come_before_any_work(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "models.py").write_text(MODEL)
    model = f"{tmp_path / 'models.py'}:mean"
    done = run("fit", model, "--data", "none.json", "--out", tmp_path / "out", "--report", tmp_path / "mine.html")
    assert (done.exit_code, "is no earlier report" in done.output) == (2, True)
    done = run("report", tmp_path / "none")
    assert (done.exit_code, "expected the directory of a saved posterior" in done.output) == (2, True)
    done = run("report", tmp_path, "--model", model)
    assert (done.exit_code, "expected --model and --data together" in done.output) == (2, True)
    done = run("report", tmp_path / "none", "--out", tmp_path / "mine.html" / "report.html")
    assert (done.exit_code, "expected a file that can be written" in done.output) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.html", "models.py"}
