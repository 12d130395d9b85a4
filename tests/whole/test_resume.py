"""Calls that are stopped at any moment go on from their checkpoint, to the last digit of a call that was not stopped."""

import json
import os
import random
import signal
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import _journal
from pyro_flows._clock import Clock

Y = torch.tensor([1.0, 2.5, 0.5, 3.0, 1.5, 2.0])


class Stopped(BaseException):
    """No ``Exception``, so that nothing takes it for a failure of the model."""


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    pyro.sample("y", dist.Normal(mu, sigma).expand([len(y)]).to_event(1), obs=y)


def bent(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.sin(3.0 * x), 0.3))
    pyro.sample("y", dist.Normal(x * w, 0.5), obs=y)


def branching(y):
    """It cannot be batched, and has no value at some points."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if float(x.detach()) > 1.5:
        raise ValueError("too large")
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def by_start(**more):
    return pf.fit(normal, Y, draws=200, progress=False, **more)


def by_flow(**more):
    options = {"flow": "realnvp", "layers": 2, "max_steps": 150, "escalate": False, "refine": False}
    return pf.fit(bent, torch.tensor(0.4), draws=200, progress=False, **options, **more)


def by_rows(**more):
    options = {"escalate": False, "refine": False, "flow": "planar", "layers": 1, "max_steps": 12}
    return pf.fit(branching, torch.tensor(0.7), draws=100, progress=False, **options, **more)


def narrow(y):
    pyro.sample("x", dist.Normal(0.0, 0.3))
    pyro.sample("w", dist.Normal(0.0, 0.3))


def by_chains(**more):
    started = pf.diagnose(bent, narrow, torch.tensor(0.4), draws=400)
    return started.refine(chains=16, max_steps=100, progress=False, **more)


CALLS = [by_start, by_flow, by_chains, pytest.param(by_rows, marks=pytest.mark.falls_back)]


def numbers(posterior):
    """All that a call returns, but for seconds."""
    fields = {name: getattr(posterior, name) for name in ("z", "log_p", "log_q", "log_weights", "losses")}
    chains = {} if posterior.chains is None else {"chains": posterior.chains.z, **posterior.chains.state}
    tensors = {**fields, **posterior.samples, **chains}
    settings = {name: value for name, value in posterior.settings.items() if name != "seconds"}
    plain = [str(posterior.verdict), posterior.history, settings, posterior.log_evidence, posterior.k_hat]
    return {name: _journal.checksum([value]) for name, value in tensors.items()} | {"plain": repr(plain)}


def called(call, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that is cut so short is unreliable
        return numbers(call(**more))


def stopping(monkeypatch, at):
    """Raise at the ``at``-th look at the clock, as all evaluations take one; return the list of looks."""
    looks, look = [], Clock.look

    def counted(self):
        looks.append(None)
        if len(looks) == at:
            raise Stopped
        look(self)

    monkeypatch.setattr(Clock, "look", counted)
    return looks


@pytest.mark.parametrize("call", CALLS)
def test_a_call_goes_on_to_the_last_digit(call, tmp_path, monkeypatch):
    monkeypatch.setattr(_journal, "EVERY", 0.0)
    with monkeypatch.context() as patch:
        looks = stopping(patch, -1)
        expected = called(call)
    chance, path = random.Random(len(looks)), tmp_path / "kept"
    first = chance.randrange(len(looks) // 3, len(looks))
    for at in (first, chance.randrange(1, len(looks))):  # the second time, less may be left to do
        with monkeypatch.context() as patch:
            looks = stopping(patch, at)
            try:
                assert called(call, checkpoint=path) == expected
            except Stopped:
                pass
    assert path.exists()
    assert called(call, checkpoint=path) == expected
    assert called(call, checkpoint=path) == expected  # and once more, from all of it
