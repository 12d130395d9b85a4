"""Many fits in one process: memory, descriptors, threads, files and seconds level off."""

import os
import tempfile
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import Phase, given, settings
from pyro import poutine

import pyro_flows as pf
from benchmarks.zoo import zoo
from tests.whole.programs import programs
from tests.whole.test_properties import USUAL, Y

FITS = int(os.environ.get("SOAK", "120"))
ROUNDS = 4  # through the same models; the first one warms up
GROWTH = 50.0  # megabytes
SLOWER = 1.1  # times, in yardsticks
FLOWS = ("auto", "realnvp", "nice", "planar", "spline")
QUICK = {"draws": 200, "max_steps": 60, "escalate": False, "refine": False, "progress": False}
SMALL = 12  # latents of a model of the zoo


def models(count):
    """Return so many models with their arguments: programs of the grammar, and every third one of the zoo."""
    found = []

    @settings(USUAL, max_examples=count, phases=[Phase.generate])
    @given(programs())
    def add(program):
        found.append((program, (Y,), {}))

    add()
    cases = [case for case in (zoo(7, number) for number in range(2 * count)) if case.dim <= SMALL]
    mixed = [cases[number // 3] if number % 3 == 2 else found[number] for number in range(count)]
    return [one if isinstance(one, tuple) else (one.model, one.args, one.kwargs) for one in mixed]


def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def usual():
    x = pyro.sample("x", dist.Normal(torch.zeros(50), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.cumsum(0), 1.0).to_event(1), obs=torch.ones(50))


def yardstick():
    """Return the CPU seconds of a fixed piece of work, which other processes make longer as they do a fit.

    Half of it is what Python does, in caches that these take away, and half is arithmetic.
    """
    began = time.process_time()
    for _ in range(40):
        poutine.trace(usual).get_trace().log_prob_sum()
    x = torch.linspace(-1.0, 1.0, 40_000).reshape(200, 200)
    for _ in range(40):
        x = torch.tanh(x @ x)
    return time.process_time() - began


def held(folder):
    """Return descriptors, threads and files of this process."""
    return [sum(1 for _ in Path(place).iterdir()) for place in ("/proc/self/fd", "/proc/self/task", folder)]


@pytest.mark.slow
@pytest.mark.falls_back  # the zoo has models that no batch goes through
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process holds")
def test_fits_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken = models(FITS // ROUNDS)
    rounds, refused = [], set()  # of a round: yardsticks, megabytes, descriptors, threads, files
    for _ in range(ROUNDS):
        began, yards = time.process_time(), 0.0
        for number, (model, args, kwargs) in enumerate(taken):
            pyro.clear_param_store()
            torch.manual_seed(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    pf.fit(model, *args, model_kwargs=kwargs, flow=FLOWS[number % len(FLOWS)], **QUICK)
                except ValueError:
                    refused.add(number)
            yards += yardstick()
        seconds = time.process_time() - began - yards
        rounds.append([seconds / yards, megabytes(), *held(tmp_path)])
        print(f"{len(taken)} models, {len(refused)} refused, {seconds:.1f} CPU-s:", *rounds[-1])
    first, last = rounds[1], rounds[-1]
    assert last[1] - rounds[0][1] < GROWTH
    assert last[2:] == first[2:]
    assert last[0] < SLOWER * first[0]
    assert len(refused) < len(taken) / 10
