"""How a fit is bounded, broken off, and kept apart from other threads; what its line says while it runs."""

import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import LogDensity
from pyro_flows.fitting import rounds
from pyro_flows.inference.scoring import JUDGING
from pyro_flows.inference.starts import portfolio
from pyro_flows.inference.training import loop
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.posterior import draws
from pyro_flows.support.process import stages as _stages
from pyro_flows.support.process.clock import Clock, OutOfTime
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.threads import turn
from tests.interrupts import interrupting

Y = torch.tensor([0.3, -1.2, 2.0])
QUICK = {"max_steps": 120, "draws": 500, "layers": 2, "escalate": False, "progress": False}


def model(y):
    """Its posterior is skewed, so that no start fits it without training."""
    mu = pyro.sample("mu", dist.Gamma(2.0, 0.5))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def effects(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("n", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def slow(y):
    """A hundredth of a second a run, which cannot be batched."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    time.sleep(0.01)
    if mu.sum() > 1e9:
        return
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


# the door -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 0, 0.0, math.nan, "5", None, True, -math.inf, [3]])
def test_max_seconds_is_checked_at_the_door(bad):
    def never(*args):
        raise AssertionError("the model was run")

    with pytest.raises(ValueError, match=r"max_seconds: expected a number > 0 .*got .*\."):
        pf.fit(never, Y, max_seconds=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 10**9}, r"draws: expected an integer from 100 to 10000000, got 1000000000\. Take fewer"),
        ({"layers": 10**6}, r"layers: expected an integer from 1 to 1000, got 1000000\. Take fewer"),
        ({"runs": 10**6}, r"runs: expected an integer from 1 to 100, got 1000000\. Take fewer"),
        ({"seed": 10**30}, r"seed: expected an integer from 0 to"),
    ],
)
def test_numbers_beyond_reason_are_refused_before_the_model_is_run(options, message):
    def never(*args):
        raise AssertionError("the model was run")

    with pytest.raises(ValueError, match=message):
        pf.fit(never, Y, **options)
    if "draws" in options:
        with pytest.raises(ValueError, match=message):
            pf.diagnose(never, never, Y, **options)


def test_more_draws_than_the_memory_holds_are_refused_before_training(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**10)
    monkeypatch.setattr(Trainer, "step", None)
    with pytest.raises(ValueError, match=r"draws: expected at most \d+ of 1 coordinates.*got 50000\. Take fewer"):
        pf.fit(model, Y, draws=50_000, progress=False)


def test_an_infinite_bound_is_none():
    assert pf.fit(model, Y, max_seconds=math.inf, **QUICK).settings["max_seconds"] is None


# the bound ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on a tenth of a second with each run of a model, and not otherwise: busy machines lie."""
    now = itertools.count()
    runs = []
    monkeypatch.setattr("pyro_flows.support.process.clock.time.monotonic", lambda: 0.1 * len(runs) + 1e-6 * next(now))
    original = LogDensity._run

    def counted(self, z, **options):
        runs.append(z)
        return original(self, z, **options)

    monkeypatch.setattr(LogDensity, "_run", counted)
    return lambda: 0.1 * len(runs)


def unbatched(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    x = pyro.sample("x", dist.Normal(0.0, tau))
    if mu.sum() + x > 1e9:
        return
    pyro.sample("y", dist.Normal(mu + x, 1.0).to_event(1), obs=y)


@pytest.mark.falls_back  # the model branches on a latent
@pytest.mark.parametrize("seconds", [10.0, 60.0, pytest.param(300.0, marks=pytest.mark.slow)])
def test_the_bound_holds_for_the_whole_call(ticking, seconds):
    """Of a model whose portfolio alone takes a thousand runs: it is cut inside, and so is all that comes after."""
    found = pf.fit(unbatched, Y, max_seconds=seconds, progress=False)
    assert ticking() <= max(1.2 * seconds, seconds + 1.0)
    assert ticking() >= 0.5 * seconds, "most of the time is used"
    said = [reason for reason in found.verdict.reasons if reason.startswith(f"stopped at max_seconds={seconds:g}")]
    assert len(said) == 1
    assert "training" in said[0]
    assert not any("did not converge" in reason for reason in found.verdict.reasons), found.verdict.reasons
    (parts,) = [note for note in found.verdict.notes if note.startswith("skipped or cut short: ")]
    assert "searching for missed modes" in parts
    assert found.verdict.status == "unreliable"
    assert 2 <= len(found.z) < 4000
    assert len(found.samples["mu"]) == len(found.z) == found.settings["draws"]
    assert not found.density.clock.finite, "the density can be used on"
    assert len(found.density(torch.zeros(2, 5))) == 2


def waited():
    """Seconds that this thread was ready to run and others ran instead."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except OSError:
        return 0.0


@pytest.mark.slow
@pytest.mark.falls_back  # the model branches on a latent
def test_real_seconds_on_a_slow_model():
    began, before = time.monotonic(), waited()
    found = pf.fit(slow, Y, max_seconds=2.0, progress=False)
    assert time.monotonic() - began - (waited() - before) < 3.0
    assert any("stopped at max_seconds=2" in reason for reason in found.verdict.reasons)


@pytest.mark.slow
def test_a_bound_that_does_not_bind_changes_nothing():
    free, bound = as_ever(effects), pf.fit(effects, Y, max_seconds=1e4, **QUICK)
    assert torch.equal(free.z, bound.z)
    assert free.verdict == bound.verdict
    assert not any("max_seconds" in reason for reason in bound.verdict.reasons)


def test_runs_that_were_not_begun_are_said(monkeypatch):
    original, over = loop.train, []
    monkeypatch.setattr(Clock, "over", property(lambda clock: bool(over) and not clock.final))

    def train(trainer, budget, **options):
        found = original(trainer, budget, **options)
        over.append(True)
        return found

    monkeypatch.setattr("pyro_flows.fitting.methods.train", train)
    found = pf.fit(model, Y, runs=3, max_seconds=1e4, **QUICK)
    assert any("run 2 of 3" in note for note in found.verdict.notes)
    assert {stage["run"] for stage in found.history} == {0}


def test_parts_end_quietly_and_are_noted():
    clock = Clock(100.0)
    with clock.part("outer"):
        with clock.part("inner", share=0.0):
            clock.look()
            raise AssertionError
        clock.look()
        reached = True
    assert reached
    assert clock.cut == ["inner"]
    clock.end = clock.stop = -1.0
    with pytest.raises(OutOfTime):
        clock.look()
    with clock.part("late"):
        clock.look()
    assert clock.reasons() == ["stopped at max_seconds=100"]
    assert clock.notes() == ["skipped or cut short: inner, late"]
    clock.judging()
    clock.look()  # the last part is not ended by a look
    assert not issubclass(OutOfTime, Exception), "fallbacks to slower ways must not take it for a failure"


# Ctrl-C -------------------------------------------------------------------------------------------------------------


STAGES = {
    _stages.MODES: (portfolio, "laplace", 1, model),
    _stages.PATHS: (portfolio, "along_paths", 1, model),
    _stages.ELBOS: (portfolio, "_scored", 1, model),
    _stages.STARTS: ("pyro_flows.fitting.run", "portfolio", 1, model),
    _stages.PARAMETERIZING: ("pyro_flows.fitting.run", "choose_coordinates", 1, effects),
    _stages.TRAINING: (Trainer, "step", 75, model),
    _stages.MOMENTS: ("pyro_flows.fitting.run", "matched", 1, model),
    _stages.BEST_START: (rounds, "weigh", 1, model),
    _stages.WEIGHTS: (rounds, "weigh", 3, model),
    _stages.MISSED: ("pyro_flows.fitting.combine", "missed_modes", 1, model),
    JUDGING: (draws, "decide", 1, model),
}


def resolve(owner):
    return sys.modules[owner] if isinstance(owner, str) else owner


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_returns_what_there_is(monkeypatch, stage):
    owner, name, at, chosen = STAGES[stage]
    monkeypatch.setattr("pyro_flows.support.process.clock.AFTER_INTERRUPT", 1000.0)  # on a busy machine, too
    interrupting(monkeypatch, resolve(owner), name, at=at)
    with pytest.warns(UserWarning, match=r"fit: interrupted \(Ctrl-C\)"):
        found = pf.fit(chosen, Y, **QUICK)
    expected = "judging" if name == "decide" else stage
    assert any(f"interrupted (Ctrl-C) during: {expected}" in reason for reason in found.verdict.reasons)
    assert found.verdict.status != "ok"
    assert len(found.z) == 500
    assert torch.isfinite(found.log_q).all()
    torch.testing.assert_close(found.flow.log_prob(found.z), found.log_q, atol=1e-3, rtol=1e-4)
    assert found.guide.sample_posterior(3)
    assert pyro.settings.get("validate_distributions_pyro")
    assert not pyro.poutine.runtime._PYRO_STACK


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow if number % 3 else ()) for number, stage in enumerate(STAGES)]
)
def test_ctrl_c_raises_where_that_is_asked_for(monkeypatch, stage):
    owner, name, at, chosen = STAGES[stage]
    interrupting(monkeypatch, resolve(owner), name, at=at)
    with pytest.raises(KeyboardInterrupt):
        pf.fit(chosen, Y, raise_on_interrupt=True, **QUICK)


@pytest.mark.slow
@pytest.mark.falls_back  # the model branches on a latent
def test_ctrl_c_inside_of_a_model_is_the_users():
    runs = itertools.count()

    def pressed(y):
        if next(runs) == 60:
            raise KeyboardInterrupt
        unbatched(y)

    with pytest.warns(UserWarning, match="interrupted"):
        found = pf.fit(pressed, Y, **QUICK)
    assert found.verdict.status == "unreliable"


def test_ctrl_c_before_there_is_anything_to_keep_raises():
    def pressed(y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pf.fit(pressed, Y, **QUICK)


def test_a_second_ctrl_c_while_judging_raises(monkeypatch):
    interrupting(monkeypatch, Trainer, "step", at=75)
    interrupting(monkeypatch, draws, "decide")
    with pytest.raises(KeyboardInterrupt):
        pf.fit(model, Y, **QUICK)
    assert pyro.settings.get("validate_distributions_pyro")


@pytest.mark.slow
def test_an_interrupted_training_keeps_what_it_learned(monkeypatch):
    """Late in the training, of 360 steps or more: the draws are right but for the name."""
    options = {**QUICK, "max_steps": 1200}
    whole = pf.fit(model, Y, **options)
    interrupting(monkeypatch, Trainer, "step", at=400)
    with pytest.warns(UserWarning, match="interrupted"):
        cut = pf.fit(model, Y, **options)
    assert cut.elbo == pytest.approx(whole.elbo, abs=0.05)
    assert cut.verdict.status == "corrected" or "still changed" in str(cut.verdict)


def test_a_first_round_that_is_not_enough_is_the_only_one(monkeypatch):
    monkeypatch.setattr("pyro_flows.fitting.methods.multimodal", lambda *_, **__: None)
    monkeypatch.setattr(rounds.Round, "enough", False)
    found = pf.fit(model, Y, **{**QUICK, "max_steps": 40, "escalate": True, "refine": False})
    (only,) = (stage for stage in found.history if stage["batch"])
    chosen = {name: found.settings[name] for name in ("round", "batch", "step_size")}
    assert chosen == {"round": "first round", **{name: only[name] for name in ("batch", "step_size")}}


def test_a_real_ctrl_c():
    script = textwrap.dedent("""
        import sys, pyro, torch, pyro.distributions as dist, pyro_flows as pf
        from pyro_flows.inference.training.trainer import Trainer
        step = Trainer.step
        def told(self, rate, count=[0]):
            count[0] += 1
            if count[0] == 20:
                print("training", flush=True)
            step(self, rate)
        Trainer.step = told
        def model(y):
            mu = pyro.sample("mu", dist.Gamma(torch.full((4,), 2.0), 0.5).to_event(1))
            pyro.sample("y", dist.Normal(mu.cumsum(-1), 1.0).to_event(1), obs=y)
        found = pf.fit(model, torch.zeros(4), max_steps=10**6, draws=500, progress=True)
        print(found.verdict.status, found.verdict.reasons, len(found.z))
    """)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", script], **options) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "interrupted (Ctrl-C)" in out
    assert out.endswith("500\n")
    assert not out.startswith("ok")
    assert "UserWarning: fit: interrupted (Ctrl-C)" in errors
    assert "Traceback" not in errors
    last = [line for line in errors.splitlines() if line.startswith("fit:")][-1]
    assert f", {out.split()[0]}, " in last, "the verdict"


# threads ------------------------------------------------------------------------------------------------------------


def in_threads(*calls):
    found, errors = [None] * len(calls), []
    barrier = threading.Barrier(len(calls))

    def work(number):
        try:
            barrier.wait()
            found[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


@pytest.mark.parametrize("other", [model, pytest.param(effects, marks=pytest.mark.slow)])
def test_two_fits_in_two_threads_are_two_fits(other):
    calls = [lambda: pf.fit(model, Y, **QUICK), lambda: pf.fit(other, Y[:2], seed=3, **QUICK)]
    serial = [as_ever(model), calls[1]()]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    together = in_threads(*calls)
    for one, other in zip(serial, together, strict=True):
        assert torch.equal(one.z, other.z)
        assert one.elbo == other.elbo
        assert one.verdict == other.verdict
    assert pyro.settings.get("validate_distributions_pyro")
    assert dist.Normal(0.0, 1.0)._validate_args
    assert not pyro.poutine.runtime._PYRO_STACK
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_judging_densities_and_evaluations_take_turns_too():
    guide = pf.AutoRealNVP(effects, layers=2).initialize(Y)
    density, z = pf.LogDensity(effects, (Y,)), torch.linspace(-1.0, 1.0, 40).reshape(10, 4)
    points = torch.randn(200, 2)
    calls = [
        lambda: pf.diagnose(effects, guide, Y, draws=500).z,
        lambda: torch.cat([density.value_and_grad(z)[1] for _ in range(10)]),
        lambda: torch.cat([density(z).detach() for _ in range(10)]),
        lambda: pf.fit_density("planar", points, max_epochs=1, progress=False).log_prob(points),
        lambda: guide.quantiles([0.1, 0.9])["x"],
    ]
    serial = [call() for call in calls]
    for one, other in zip(serial, in_threads(*calls), strict=True):
        torch.testing.assert_close(one, other)
    assert pyro.settings.get("validate_distributions_pyro")


@pytest.mark.slow
@pytest.mark.falls_back  # the outer model is batched while the inner one would be recorded
def test_a_fit_inside_of_a_model_does_not_wait_for_itself():
    inner, centers = as_ever(model), []

    def outer(y):
        if len(centers) < 6:  # the first runs are of other kinds than the later ones, which are all alike
            with turn():
                centers.append(pf.diagnose(model, inner.guide, y, draws=100).z.mean())
        pyro.sample("x", dist.Normal(centers[0], 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])

    assert pf.LogDensity(outer, (Y,)).dim == 1
    assert len(centers) == 6


# gradients switched off ---------------------------------------------------------------------------------------------


@functools.cache
def as_ever(chosen):
    return pf.fit(chosen, Y, **QUICK)


@pytest.mark.parametrize(
    ("chosen", "mode"),
    [
        (model, torch.inference_mode),
        pytest.param(model, torch.no_grad, marks=pytest.mark.slow),
        pytest.param(effects, torch.inference_mode, marks=pytest.mark.slow),
        pytest.param(effects, torch.no_grad, marks=pytest.mark.slow),
        pytest.param(unbatched, torch.no_grad, marks=[pytest.mark.falls_back, pytest.mark.slow]),
        pytest.param(unbatched, torch.inference_mode, marks=[pytest.mark.falls_back, pytest.mark.slow]),
    ],
)
def test_fit_gives_the_same_where_gradients_are_off(chosen, mode):
    expected = as_ever(chosen)
    with mode():
        y = Y.clone()  # an inference tensor, in inference mode
        found = pf.fit(chosen, y, **QUICK)
        assert not torch.is_grad_enabled()
        judged = pf.diagnose(chosen, found.guide, y, draws=500)
    assert torch.equal(found.z, expected.z)
    assert found.verdict == expected.verdict
    assert not found.z.is_inference()
    assert torch.equal(judged.z, pf.diagnose(chosen, expected.guide, Y, draws=500).z)


@pytest.mark.parametrize("mode", [torch.inference_mode, pytest.param(torch.no_grad, marks=pytest.mark.slow)])
def test_densities_are_fitted_where_gradients_are_off(mode):
    points = torch.randn(100, 2)
    expected = pf.fit_density("planar", points, max_epochs=2, progress=False)
    with mode():
        found = pf.fit_density("planar", points.clone(), max_epochs=2, progress=False)
    assert torch.equal(found.log_prob(points), expected.log_prob(points))


# the line -----------------------------------------------------------------------------------------------------------


class Terminal:
    """A stderr that says it is one."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.slow
def test_the_line_names_stages_and_no_time_to_come(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    pf.fit(model, Y, **{**QUICK, "progress": True, "runs": 2})
    drawn = terminal.text.split("\r")
    assert drawn[1].startswith("fit: reading the model")
    for stage in (
        "optimizing to modes",
        "run 2 of 2: training",
        "searching for missed modes",
        "judging",
    ):
        assert stage in terminal.text
    assert terminal.text.count("\n") == 1
    assert terminal.text.endswith(" s\n")
    assert not any(word in terminal.text for word in ("%", "<", "it/s", "?"))
    assert drawn[-1].startswith("fit: 120 steps, trained flow, ")


def test_the_line_moves_while_a_stage_goes_on(monkeypatch):
    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("pyro_flows.support.process.progress.time.monotonic", lambda: now[0])
    bar = Bar("fit", True)
    bar.watch("finding starting points")
    for _ in range(5):
        now[0] += 0.2
        bar.watch(None)
    assert len(set(terminal.text.split("\r"))) == 7  # nothing, and six different lines
    assert "finding starting points, 1.0 s" in terminal.text


@pytest.mark.slow
def test_elsewhere_each_stage_is_a_line(capsys):
    found = pf.fit(model, Y, **{**QUICK, "progress": True})
    *stages, last = capsys.readouterr().err.splitlines()
    assert stages[0].startswith("fit: reading the model")
    assert [line.startswith("fit: judging") for line in stages].count(True) == 1
    assert last.startswith(f"fit: 120 steps, {found.method}, {found.verdict.status}, ")
    pf.fit(model, Y, **QUICK)
    pf.fit_density("planar", torch.randn(100, 2), max_epochs=1, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("fit_density:") for line in lines), "and none of a fit that shows nothing"


def test_a_notebook_gets_one_output_that_is_updated(monkeypatch):
    outputs = {}

    class Handle:
        def __init__(self, key):
            self.key = key

        def update(self, data, *, raw):
            outputs[self.key] = [*outputs[self.key], data["text/plain"]]

    def display(data, *, raw, display_id):
        outputs[len(outputs)] = [data["text/plain"]]
        return Handle(len(outputs) - 1)

    monkeypatch.setattr("pyro_flows.support.process.progress._display", lambda: display)
    pf.fit(model, Y, **{**QUICK, "progress": True})
    assert len(outputs) == 1
    assert outputs[0][0].startswith("fit: reading the model")
    assert outputs[0][-1].startswith("fit: 120 steps")


def test_a_fit_that_fails_ends_its_line(capsys):
    with pytest.raises(ValueError, match="model"):
        pf.fit(lambda: None, progress=True)
    assert "fit: ended by ValueError" in capsys.readouterr().err


def test_draws_of_a_slow_flow_are_bounded_too(monkeypatch):
    """A flow of which a draw takes a millisecond: 10,000 of them would take ten seconds."""
    from pyro_flows import Flow

    original, now, looks = Flow.draw, [0.0], itertools.count()
    monkeypatch.setattr("pyro_flows.support.process.clock.time.monotonic", lambda: now[0] + 1e-6 * next(looks))

    def draw(self, n):
        for _ in range(n):
            now[0] += 0.001
            torch.zeros(1)
        return original(self, n)

    monkeypatch.setattr(Flow, "draw", draw)
    posterior = pf.fit(model, Y, **{**QUICK, "draws": 4000, "refine": False}, max_seconds=2.0)
    assert now[0] < 4.0
    assert 8 <= len(posterior.z) < 4000
    assert "of 16,000 draws" in str(posterior.verdict)
    assert str(posterior.verdict).count("max_seconds=2") == 1, str(posterior.verdict)
