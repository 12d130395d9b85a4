"""Ctrl-C, SIGTERM and SIGHUP: the first ends a call with what it has come to, a second one at once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import pyro_flows as pf
from pyro_flows import cli
from pyro_flows.densities.ascent import Ascent
from pyro_flows.fitting import fit as fitting
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.support.process import stages
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.process.interrupts import NAMES, STATE, Released, interruptible
from pyro_flows.support.process.progress import Bar
from tests.calibration.test_sbc import check, from_exact
from tests.fitting.test_fit_control import QUICK, Y, model
from tests.interrupts import in_a_fork

SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def pressing(monkeypatch, owner, name, *, at, number):
    """Send a signal at the ``at``-th call of a function, and go on."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            press(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not STATE.calls
    assert not STATE.held


# the handler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_or_is_noted_and_the_second_raises(number):
    with interruptible() as found:
        with pytest.raises(KeyboardInterrupt):
            press(number)
        assert found.name == NAMES[signal.Signals(number).name]
    with interruptible() as found:
        found.hold(True)
        press(number)
        assert found.came()
        assert found.take()
        assert not found.take()
        with pytest.raises(KeyboardInterrupt):
            press(number)
    with interruptible() as found:
        assert not found.came()


def test_the_first_signal_waits_until_contexts_are_left():
    left = []

    @contextmanager
    def changing():
        yield
        press()
        left.append(1)

    with interruptible() as found:
        with changing():
            pass
        assert left == [1]
        assert found.take()


def test_the_first_signal_waits_until_a_module_is_imported(tmp_path, monkeypatch):
    """One that is left half made may not be imported again. A module that is imported to do the work is no such one."""
    sending = "import os, signal\nfrom pyro_flows.support.process.interrupts import interruptible\n"
    kill = "os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "signalling.py").write_text(f"{sending}{kill}whole = True\n")
    (tmp_path / "working.py").write_text(f"{sending}with interruptible():\n    {kill}")
    monkeypatch.syspath_prepend(tmp_path)
    with interruptible() as found:
        import signalling

        assert signalling.whole
        assert found.take()
    with pytest.raises(KeyboardInterrupt):
        import working  # noqa: F401


def test_parts_of_the_work_let_the_first_signal_through_and_what_is_between_them_does_not():
    clock, reached = Clock(), []
    with interruptible() as found:
        found.hold(True)
        with clock.part("first"):
            press()
            raise AssertionError
        assert clock.interrupted == "first"
    assert clock.reasons() == ["interrupted (Ctrl-C) during: first"]
    clock = Clock()
    with interruptible() as found:
        found.hold(True)
        with clock.part("whole"):
            with clock.part("first"):
                reached.append("first")
            found.hold(True)
            press(signal.SIGTERM)
            with clock.part("second"):
                clock.look()
                raise AssertionError
        with pytest.raises(KeyboardInterrupt), Released():
            press()
    assert clock.interrupted == "second"
    assert clock.reasons() == ["interrupted (SIGTERM) during: second"]


def test_handlers_of_the_program_and_ignored_signals_stay(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number)), signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible() as found:
            press(signal.SIGTERM)
            press(signal.SIGHUP)
            assert not found.came()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


# the calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_fit_is_judged(monkeypatch, number):
    name = NAMES[signal.Signals(number).name]
    pressing(monkeypatch, Trainer, "step", at=75, number=number)
    with pytest.warns(UserWarning, match=rf"fit: interrupted \({name}\) during: {stages.TRAINING}"):
        found = pf.fit(model, Y, **QUICK)
    assert any(f"interrupted ({name})" in reason for reason in found.verdict.reasons)
    assert len(found.z) == 500


def test_a_signal_that_comes_as_all_is_done_loses_nothing(monkeypatch):
    pressing(monkeypatch, Bar, "close", at=1, number=signal.SIGTERM)
    with pytest.warns(UserWarning, match="fit: SIGTERM came as all was done; nothing was cut"):
        found = pf.fit(model, Y, **{**QUICK, "max_steps": 100})
    assert len(found.z) == 500
    assert not any("interrupted" in reason for reason in found.verdict.reasons)


def test_a_refinement_is_judged(monkeypatch):
    found = pf.diagnose(*narrow(), draws=500)
    pressing(monkeypatch, pf.LogDensity, "value_and_grad", at=3, number=signal.SIGTERM)
    again = found.refine(progress=False)
    assert any("interrupted (SIGTERM)" in reason for reason in again.verdict.reasons)
    assert again.verdict.status == "unreliable"


def narrow():
    import pyro
    import pyro.distributions as dist

    def wide(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return wide, lambda y: pyro.sample("x", dist.Normal(y / 2, 0.3)), torch.tensor(1.0)


def test_many_fits_keep_those_that_are_done(monkeypatch):
    pressing(monkeypatch, Bar, "count", at=2, number=signal.SIGTERM)
    options = {"draws": 200, "together": False, "max_steps": 100, "progress": False}
    with pytest.warns(UserWarning, match=r"fit_many: interrupted \(SIGTERM\) after 2 of 3 data sets; others are None"):
        found = pf.fit_many(narrow()[0], [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3)], **options)
    assert [one is None for one in found] == [False, False, True]
    assert found[0].verdict.status == "ok"


@pytest.mark.slow
def test_a_calibration_is_of_what_was_finished(monkeypatch):
    pressing(monkeypatch, Bar, "count", at=20, number=signal.SIGHUP)
    with pytest.warns(UserWarning, match=r"sbc: interrupted \(SIGHUP\) after \d+ of 40 simulations"):
        found = check(from_exact(), simulations=40)
    assert 15 < found.settings["finished"] < 25


@pytest.mark.parametrize("at", [5, 60])
def test_a_density_is_what_it_had_come_to(monkeypatch, at):
    points = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 3.0 + 1.0
    pressing(monkeypatch, Ascent, "step", at=at, number=signal.SIGTERM)
    with pytest.warns(UserWarning, match=r"fit_density: interrupted \(SIGTERM\) after \d+ steps"):
        found = pf.fit_density("planar", points, max_epochs=30, progress=False)
    assert found.why.startswith("interrupted (SIGTERM)")
    assert torch.isfinite(found.log_prob(points)).all()


def test_of_five_densities_those_until_then(monkeypatch, capsys):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    pressing(monkeypatch, Ascent, "step", at=50, number=signal.SIGINT)
    options = {"context": x, "learning_rate": 0.01, "max_epochs": 20}
    with pytest.warns(UserWarning, match=r"fit_density: interrupted \(Ctrl-C\) after \d+ steps, in flow 3 of 5\. The"):
        found = pf.fit_density(x[:, :1] + x[:, 1:].square(), **options)
    assert "flow 3 of 5" in capsys.readouterr().err
    assert found.settings["flows"] == len(found.flow.mixture.members) == 3
    assert found.why.startswith("interrupted (Ctrl-C)")
    assert repr(found).startswith("DensityFit: the mean of 3 densities, the first of them: realnvp on 54 points")
    assert " s for all, step size 0.01: interrupted (Ctrl-C)" in repr(found)
    assert torch.isfinite(found.log_prob(x[:, :1], x)).all()


def loaded(path):
    """A posterior that may be unreliable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.UnreliableWarning)
        return pf.load(path)


# processes ------------------------------------------------------------------------------------------------------------

MODEL = """
import pyro
import pyro.distributions as dist

def funnel(y):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("row", len(y)):
        mu = pyro.sample("mu", dist.StudentT(3.0, 0.0, scale))
        pyro.sample("y", dist.Poisson(mu.exp()), obs=y)

def skewed(y):
    mu = pyro.sample("mu", dist.Gamma(2.0, 0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""
COUNTS = "3,1,0,7,2,30,1,0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "models.py").write_text(MODEL)
    (folder / "data.json").write_text(json.dumps({"y": [float(n) for n in COUNTS.split(",")]}))
    return folder


def started(words, lines):
    """Start a process, and wait until it has written so many lines on stderr, or says that it has begun."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    seen = []
    while len(seen) < lines:
        line = process.stderr.readline()
        if not line:
            break
        seen.append(line)
    return process, seen


def by_command(folder, out, lines, wait, number):
    words = [sys.executable, "-m", "pyro_flows", "fit", f"{folder}/models.py:funnel", "--data", folder / "data.json"]
    process, seen = started([*words, "--out", out, "--progress"], lines)
    time.sleep(wait)
    process.send_signal(number)
    stdout, err = process.communicate(timeout=300)
    err = "".join(seen) + err
    saved = loaded(out) if out.exists() else None
    return process.returncode, stdout, err, saved


@pytest.mark.slow
def test_a_command_saves_after_sigterm(folder, tmp_path):
    code, stdout, err, saved = by_command(folder, tmp_path / "out", 3, 0.0, signal.SIGTERM)
    assert code == 130, err
    assert err.endswith("pyro-flows: interrupted; these are the best results so far.\n")
    assert any("interrupted (SIGTERM)" in reason for reason in saved.verdict.reasons)
    assert stdout.startswith(str(saved.verdict))


def test_a_command_that_is_done_and_prints_or_saves_loses_nothing(folder, tmp_path, monkeypatch):
    """The first signal waits; what a second one leaves is told."""
    posterior = pf.diagnose(*narrow(), draws=500)
    monkeypatch.setattr(cli, "fit", lambda *args, **options: posterior)
    words = ["fit", f"{folder}/models.py:funnel", "--data", f"{folder}/data.json", "--out"]
    for number, (owner, name) in enumerate(
        [(type(posterior), "save"), (type(posterior), "summary"), (cli.plots, "plot_posterior"), (cli, "_draw")]
    ):
        with monkeypatch.context() as patch:
            pressing(patch, owner, name, at=1, number=signal.SIGHUP)
            done = CliRunner().invoke(cli.app, [*words, str(tmp_path / str(number))])
        assert done.exit_code == 130, done.output
        assert done.stderr.endswith("interrupted; these are the best results so far.\n")
        assert {path.name for path in (tmp_path / str(number)).iterdir()} > {"posterior.png", "posterior.nc"}
    with monkeypatch.context() as patch:
        pressing(patch, type(posterior), "save", at=1, number=signal.SIGINT)
        pressing(patch, cli.plots, "plot_posterior", at=1, number=signal.SIGINT)
        done = CliRunner().invoke(cli.app, [*words, str(tmp_path / "twice")])
    assert done.exit_code == 130
    assert f"interrupted; the posterior is in {tmp_path / 'twice'}, what goes with it may be missing" in done.stderr
    assert len(loaded(tmp_path / "twice").z) == 500


# twenty moments -------------------------------------------------------------------------------------------------------


def once_read(begun):
    """Call a function as a fit has read its model: from then on it returns what it has come to."""
    prepare = fitting.prepare

    def preparing(*args):
        begun()
        return prepare(*args)

    fitting.prepare = preparing


def by_script():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pf.fit(model, Y, **QUICK)
    return found.verdict.status, len(found.z), " ".join(str(one.message) for one in said)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_twenty_moments_of_a_script(number):
    chance, (_, seconds) = random.Random(int(number)), in_a_fork(by_script, begin=once_read)
    ends = [
        in_a_fork(by_script, end=chance.uniform(0.0, 0.95 * seconds), number=number, begin=once_read) for _ in range(20)
    ]
    assert {count for (_, count, _), _ in ends} == {500}
    cut = [status for (status, _, said), _ in ends if "fit: interrupted" in said]
    assert "ok" not in cut
    assert len(cut) > 10
    print(f"{signal.Signals(number).name}, script: {len(cut)} of 20 cut, all judged")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", SIGNALS)
def test_twenty_moments_of_a_command(folder, tmp_path, number):
    def command(place):
        words = [f"{folder}/models.py:skewed", "--data", f"{folder}/data.json", "--out", str(place), "--draws", "500"]
        done = CliRunner().invoke(cli.app, ["fit", *words, "--max-steps", "120", "--layers", "2", "--no-escalate"])
        return done.exit_code, done.stderr

    command(tmp_path / "first")  # what is imported on the way, forks need not import
    chance, (_, seconds) = random.Random(int(number)), in_a_fork(partial(command, tmp_path / "whole"), begin=once_read)
    codes = []
    for moment in range(20):
        place = tmp_path / str(moment)
        found = in_a_fork(
            partial(command, place), end=chance.uniform(0.0, 0.95 * seconds), number=number, begin=once_read
        )
        (code, said), _ = found
        assert place.exists(), (code, said)
        assert len(loaded(place).z) == 500
        assert "no complete results" not in said
        assert "Traceback" not in said
        codes.append(code)
    assert {*codes} <= {0, 3, 130}
    print(f"{signal.Signals(number).name}, command: {codes.count(130)} of 20 cut, all saved")
