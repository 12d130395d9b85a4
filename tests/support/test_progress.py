"""What long calls say on stderr: a line for each stage in a file, one more at least every ten seconds, or nothing."""

import queue
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.support.process import progress
from pyro_flows.support.process.progress import Bar
from tests.posteriors import schools_posterior


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def without_seconds(written):
    return [line.rsplit(", ", 1)[0] for line in written]


@pytest.fixture
def shown(monkeypatch):
    """A queue of the lines, as they are written."""
    found, write = queue.Queue(), Bar._write

    def writing(bar, line, last=False):
        write(bar, line, last)
        found.put(line)

    monkeypatch.setattr(Bar, "_write", writing)
    return found


def test_a_stage_that_reports_nothing_has_a_line_every_ten_seconds(capsys, monkeypatch, shown):
    assert progress.BEAT["file"] == progress.EVERY["file"] == 10.0
    monkeypatch.setitem(progress.BEAT, "file", 0.1)
    began, count = time.monotonic(), 0
    with Bar("fit", True) as bar:
        bar.watch("training")
        bar.figures = "100 steps"
        while count < 5:
            count += "100 steps" in shown.get(timeout=60)
        bar.close("ok")
    took = time.monotonic() - began
    for thread in threading.enumerate():
        if thread.name == "pyro_flows progress":
            thread.join(60)
            assert not thread.is_alive()
    written = without_seconds(lines(capsys))
    assert written[0] == "fit: training"
    assert written[-1] == "fit: ok"  # nothing after the end
    assert 5 <= written.count("fit: training, 100 steps") <= took / 0.1


@pytest.mark.parametrize("delay", [60.0, 0.2])
def test_quick_calls_are_shown_once_they_take_long(capsys, monkeypatch, shown, delay):
    monkeypatch.setattr(progress, "DELAY", delay)
    with Bar("loo", True, quick=True) as bar:
        bar.watch("log likelihoods")
        if delay < 1.0:
            shown.get(timeout=60)
        bar.close("done")
    assert without_seconds(lines(capsys)) == (["loo: log likelihoods", "loo: done"] if delay < 1.0 else [])


def test_the_time_left_is_that_of_the_parts_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Bar("sbc", False)
    bar.count(20, 100)  # from a checkpoint: no part of the rate
    assert bar.done == "20 of 100"
    now[0] = 160.0
    bar.count(40, 100)
    assert bar.done == "40 of 100, about 3 min left"
    bar.count(100, 100)
    assert bar.done == "100 of 100"


# the calls ------------------------------------------------------------------------------------------------------------


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def guide(y):
    pyro.sample("mu", dist.Normal(y.sum() / (len(y) + 0.01), (len(y) + 0.01) ** -0.5))


Y = torch.tensor([0.4, 1.3, -0.2, 0.9])


@pytest.fixture(scope="module")
def posterior():
    return schools_posterior("ok", draws=400)


@pytest.mark.parametrize(
    ("task", "stages", "call"),
    [
        ("fit", {"reading the model", "judging"}, lambda _, shown: pf.fit(model, Y, max_steps=100, progress=shown)),
        ("fit_many", set(), lambda _, shown: pf.fit_many(model, [(Y,), (Y + 1.0,)], max_steps=50, progress=shown)),
        ("diagnose", {"searching for missed modes"}, lambda _, shown: pf.diagnose(model, guide, Y, progress=shown)),
        ("refine", {"running MCMC"}, lambda found, shown: found.refine(max_steps=20, progress=shown)),
        ("loo", {"log likelihoods at 400 draws"}, lambda found, shown: found.loo(progress=shown)),
        (
            "compare",
            {"the evidence of a", "the evidence of b"},
            lambda found, shown: pf.compare({"a": found, "b": found}, progress=shown),
        ),
        ("sbc", {"simulating"}, lambda _, shown: pf.sbc(model, Y, sampler=exact, simulations=10, progress=shown)),
    ],
)
def test_long_calls_name_their_stages(task, stages, call, posterior, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    call(posterior, True)
    written = without_seconds(lines(capsys))
    assert all(line.startswith(task) for line in written), written
    assert stages <= {line.split(": ", 1)[1] for line in written}
    assert len(written) > len(stages)  # the outcome
    call(posterior, False)
    assert lines(capsys) == []


def exact(y):
    return {"mu": y.sum() / 4.01 + 4.01**-0.5 * torch.randn(999)}


@pytest.mark.slow
def test_a_report_names_its_stages(posterior, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    posterior.report(tmp_path / "report.html")
    named = [line.split(": ", 1)[1].split(",")[0] for line in lines(capsys)]
    assert list(dict.fromkeys(named))[:4] == ["the table", "figures", "replicates of the data", "the page"]
    posterior.report(tmp_path / "report.html", progress=False)
    assert lines(capsys) == []
