"""Forks and threads beside a fit, and folders that are full, read-only or shared by two processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import pyro_flows as pf
from pyro_flows.support.process import threads
from pyro_flows.support.process.interrupts import interruptible
from tests.fitting.test_fit_control import QUICK, Y, model, slow

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
SECONDS = 120.0  # for a child, on a busy machine


def in_child(work, seconds=SECONDS):
    """Fork; return what the work's exit code is, or None if it has not ended in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Holding:
    """Another thread that is inside of a turn, in the middle of a run of a model, with everything changed."""

    def __enter__(self):
        self.inside, self.over = threading.Event(), threading.Event()

        def work():
            with threads.alone(), threads.few_threads(1), poutine.trace(), pyro.validation_enabled(False):
                self.inside.set()
                self.over.wait()

        self.thread = threading.Thread(target=work)
        self.thread.start()
        self.inside.wait()

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()


@needs_fork
def test_a_process_that_is_forked_while_another_thread_fits_can_fit():
    def work():
        settings = pyro.settings.get("validate_distributions_pyro"), len(poutine.runtime._PYRO_STACK)
        density = pf.LogDensity(model, (Y,))
        value = density(torch.zeros(2, density.dim))
        return 0 if settings == (True, 0) and bool(torch.isfinite(value).all()) and not threads._asked else 3

    with Holding():
        assert in_child(work) == 0
    assert in_child(work) == 0  # and while nobody does


@needs_fork
def test_a_process_that_is_forked_inside_of_a_turn_keeps_it():
    with threads.alone(), poutine.trace():
        assert in_child(lambda: 0 if threads._turn._is_owned() and len(poutine.runtime._PYRO_STACK) == 1 else 3) == 0


@needs_fork
def test_signals_of_a_forked_process_are_its_own():
    with interruptible():
        assert in_child(lambda: 0 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 3) == 0


@needs_fork
@pytest.mark.slow
@pytest.mark.falls_back  # the model is run draw by draw
def test_forks_during_a_fit():
    thread = threading.Thread(target=lambda: pf.fit(slow, Y, max_seconds=20.0, progress=False))
    thread.start()
    codes = []
    for _ in range(20):
        time.sleep(0.3)
        codes.append(in_child(lambda: 0 if pf.fit(model, Y, **{**QUICK, "max_steps": 50}) else 3))
    thread.join()
    assert codes == [0] * 20


@pytest.mark.falls_back  # the model is run draw by draw
@pytest.mark.filterwarnings("ignore")
def test_a_thread_that_uses_pyro_beside_a_fit_is_named():
    begun, stop, errors = threading.Event(), threading.Event(), []

    def beside():
        svi = SVI(model, pyro.infer.autoguide.AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        begun.wait()
        while not stop.is_set():
            try:
                svi.step(Y)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=beside)
    thread.start()

    def signalling(y):
        begun.set()
        slow(y)

    def fits():
        for _ in range(3):
            pf.fit(signalling, Y, max_seconds=20.0, progress=False)

    try:
        with pytest.raises(RuntimeError, match=r"Pyro: two threads use it at once.*in processes of their own"):
            fits()
    finally:
        stop.set()
        begun.set()
        thread.join()
        poutine.runtime._PYRO_STACK.clear()
        pyro.clear_param_store()


# folders --------------------------------------------------------------------------------------------------------------

SAVING = """
import sys
import pyro_flows as pf
posterior = pf.load(sys.argv[1])
for _ in range(20):
    posterior.save(sys.argv[2])
    assert len(pf.load(sys.argv[2]).z) == 400
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    def simple(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    folder = tmp_path_factory.mktemp("saved") / "posterior"
    guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))  # noqa: E731
    pf.diagnose(simple, guide, torch.tensor(1.0), draws=400, progress=False).save(folder)
    return folder


@pytest.mark.slow
def test_two_processes_save_to_one_place(saved, tmp_path):
    words = [sys.executable, "-c", SAVING, saved, tmp_path / "shared"]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
def test_a_command_whose_output_is_full_has_saved(tmp_path):
    (tmp_path / "models.py").write_text(
        "import pyro, pyro.distributions as dist\n"
        "def simple(y):\n"
        "    x = pyro.sample('x', dist.Normal(0.0, 1.0))\n"
        "    pyro.sample('y', dist.Normal(x, 1.0), obs=y)\n"
    )
    (tmp_path / "data.json").write_text('{"y": 1.0}')
    words = [sys.executable, "-m", "pyro_flows", "fit", f"{tmp_path}/models.py:simple"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*words, "--data", f"{tmp_path}/data.json", "--out", tmp_path / "out", "--draws", "200"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "No space left on device" in done.stderr
    assert len(pf.load(tmp_path / "out").z) == 200
