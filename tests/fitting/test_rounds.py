"""Rounds: what is enough, which is kept, with what tails and at which start a flow begins; runs that agree."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting import rounds
from pyro_flows.fitting.combine import _take, compare
from pyro_flows.fitting.fit import _in_vain, _of_others, default_steps
from pyro_flows.fitting.multimodal import MultimodalCandidate
from pyro_flows.fitting.rounds import Round, assess, unweighed
from pyro_flows.fitting.state import FitState, Run
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import Recipe, begin_at, set_df
from pyro_flows.inference.record import Stage
from pyro_flows.inference.training.loop import Training
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.weighing import Weighing
from pyro_flows.transforms import DiagonalAffine
from tests.models import real
from tests.registry import normal

DONE = Training([1.0], -1.0, converged=True, moving=False, why="stopped", skipped=0, falls=0)


def round_of(dim=2, training=DONE, flow=None, **changes):
    """A round with which all is well, but for the ``changes``."""
    good = torch.full((dim,), 0.01, dtype=torch.float64)
    given = {"k_hat": 0.1, "ess": 950.0, "elbo": 0.0, "log_evidence": 0.01, "mean_shift": good, "sd_shift": good}
    given |= {"widening": 0.0, "distance": 0.01, "broken": 0} | changes
    return Round(flow, Weighing(log_weights=torch.zeros(1000), **given), training, Stage("first round"))


# what is enough -------------------------------------------------------------------------------------------------------


ENOUGH = [
    ({}, True),
    ({"k_hat": 0.499}, True),
    ({"k_hat": 0.5}, False),
    ({"k_hat": 0.66, "ess": 980.0}, True),
    ({"k_hat": 0.66, "ess": 979.0}, False),
    ({"k_hat": 0.67, "ess": 980.0}, False),
    ({"log_evidence": 0.0399}, True),
    ({"log_evidence": 0.04}, False),
    ({"dim": 20, "log_evidence": 0.0399}, True),
    ({"dim": 20, "log_evidence": 0.0401}, False),
    ({"dim": 100, "log_evidence": 0.199}, True),
    ({"dim": 100, "log_evidence": 0.201}, False),
    ({"mean_shift": real(0.0, 0.1)}, True),
    ({"mean_shift": real(0.0, 0.101)}, False),
    ({"ess": 99.0}, False),
    ({"broken": 1}, False),
    ({"training": replace(DONE, converged=False)}, False),
]


@pytest.mark.parametrize(("changes", "enough"), ENOUGH)
def test_enough_from_both_sides(changes, enough):
    assert round_of(**changes).enough is enough


def test_a_round_whose_weights_are_even_but_for_their_tail():
    assert round_of(k_hat=0.5, ess=901.0).only_k_hat_fails
    assert not round_of(k_hat=0.49, ess=901.0).only_k_hat_fails
    assert not round_of(k_hat=0.5, ess=899.0).only_k_hat_fails
    assert not Round(None, unweighed(2, 7.0), DONE, Stage("first round")).only_k_hat_fails


def test_the_better_round_has_the_better_verdict_then_the_better_elbo():
    moved = real(0.0, 0.3)
    order = [
        round_of(k_hat=0.9, elbo=5.0),
        round_of(mean_shift=moved, elbo=4.0),
        round_of(elbo=-1.0, log_evidence=-0.9),
        round_of(elbo=0.0),
    ]
    assert sorted([order[at] for at in (2, 0, 3, 1)], key=lambda outcome: outcome.rank) == order
    bare = Round(None, unweighed(2, 7.0), DONE, Stage("first round"))
    assert not bare.weighed
    assert order[0].weighed
    assert not bare.enough
    assert bare.rank == (0.0, 7.0)


def test_a_run_keeps_its_best_round_and_all_losses():
    run, good, bad = Run(None, None), round_of(elbo=0.0), round_of(elbo=-1.0, log_evidence=-0.99)
    for outcome, losses in ((bad, [3.0]), (good, [3.0, 2.0]), (bad, [3.0, 2.0, 4.0])):
        run.take(outcome, SimpleNamespace(losses=losses))
    assert run.best.weighing is good.weighing
    assert run.best.stage is run.history[1]
    assert run.losses.tolist() == [3.0, 2.0, 4.0]


# the flow of a round --------------------------------------------------------------------------------------------------


def small():
    return Recipe("realnvp", {"layers": 2, "hidden": (4,)}, "student_t", around=(("affine", "auto"),)).build(2).double()


def check_begun():
    """A flow with other tails begins at a start: its standard deviations are those of the start."""
    flow = set_df(small(), 5.0)
    begin_at(flow, real(0.5, -0.5), real(0.7, 0.2))
    assert flow.recipe.df == flow.df == 5.0
    assert flow.base_distribution().base_dist.df[0].item() == 5.0
    affine = flow.bijection.layers[-1]
    torch.testing.assert_close(affine.loc, real(0.5, -0.5))
    sds = affine.scale_tril.diagonal() * math.sqrt(5.0 / 3.0)  # of draws of its base
    torch.testing.assert_close(sds, real(0.7, 0.2))
    z = normal(20, 2, seed=1)
    base = flow.base_distribution()
    moved = base.log_prob((z - affine.loc) / affine.scale_tril.diagonal()) - math.log(0.7 * 0.2 * 3.0 / 5.0)
    torch.testing.assert_close(flow().log_prob(z), moved)


def test_a_flow_with_other_tails_begins_at_a_start():
    check_begun()


def check_kept(monkeypatch):
    """What a round came to is kept apart from the flow that is trained on."""
    monkeypatch.setattr(rounds, "JUDGED_DRAWS", 400)

    def banana():
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(x.square(), 0.5))

    trainer = Trainer(small(), pf.LogDensity(banana), learning_rate=1e-2, batch=64)
    outcome = assess("first round", trainer, DONE)
    z = normal(20, 2, seed=1)
    before = outcome.flow().log_prob(z)
    trainer.step(1e-2)
    trainer.write()
    assert torch.equal(outcome.flow().log_prob(z), before)
    assert not torch.equal(trainer.flow().log_prob(z), before)


def test_a_round_keeps_its_flow(monkeypatch):
    check_kept(monkeypatch)


# runs -----------------------------------------------------------------------------------------------------------------


def at(loc, log_evidence=0.0, sd=1.0):
    map_ = DiagonalAffine(2, loc=torch.tensor(loc), scale=torch.full((2,), sd)).double()
    return round_of(flow=pf.Flow(map_), log_evidence=log_evidence)


def test_runs_that_agree():
    found, weights = compare([at([0.0, 1.0]), at([0.0, 1.0], 0.29)], ["a", "b"])
    assert not found
    assert weights == pytest.approx([1 / (1 + math.exp(0.29)), 1 / (1 + math.exp(-0.29))])


OTHERS = [
    (at([0.0, 2.0]), "runs disagree on b"),
    (at([0.0, 1.0], sd=2.0), "runs disagree on a"),
    (at([0.0, 1.0], 0.31), "log evidences of the runs differ by 0.31 nats"),
    (at([0.0, 1.0], -0.31), "log evidences of the runs differ by 0.31 nats"),
    (at([0.0, 1.0], math.nan), "log evidences of the runs differ by nan nats"),
]


@pytest.mark.parametrize(("other", "said"), OTHERS)
def test_runs_that_do_not_agree(other, said):
    found, weights = compare([at([0.0, 1.0]), other], ["a", "b"])
    assert any(reason.startswith(said) for reason in found), found
    assert sum(weights) == pytest.approx(1.0)


def test_runs_without_evidence_weigh_nothing():
    _, weights = compare([at([0.0, 1.0]), at([0.0, 1.0], math.nan), at([0.0, 1.0], math.log(3.0))], ["a", "b"])
    assert weights == pytest.approx([0.25, 0.0, 0.75])


# what comes of runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["nothing", "a table of coordinates", "a mixture"])
def test_chains_go_with_the_flow_that_they_began_at(taken):
    """An alarm: chains began at a poor flow, then exact tables took its place, and were judged by these chains."""
    flow, chains = location_scale(2, base="normal"), McmcDraws(torch.zeros(8, 4, 2), {}, {}, {})
    found = FitState(None, None, plain=flow, sampler=flow)
    found.runs[0].chains = chains
    if taken == "a mixture":
        found.sampler = FlowMixture([flow, flow])
    if taken == "a table of coordinates":
        assert _take(found, MultimodalCandidate(location_scale(2, base="normal"), "tables", Stage("tables"), True))
    assert found.chains is (chains if taken == "nothing" else None)


IN_VAIN = [
    ({}, False),
    ({"added": 1}, True),
    ({"added": 1, "disagreements": ["runs disagree on x"]}, False),  # they are mixed
    ({"added": 1, "copies": 2}, False),
]


@pytest.mark.parametrize(("given", "said"), IN_VAIN)
def test_runs_that_left_the_missed_mode_where_they_began(given, said):
    assert bool(_in_vain(FitState(None, None, **given))) == said


def test_other_runs_that_did_not_converge_are_counted():
    """Four runs of a mixture said four times that training did not converge, each with figures of its own."""
    stopped = replace(DONE, converged=False, why="training did not converge in 5200 steps (ELBO drift 0.1 nats)")
    runs = [SimpleNamespace(best=round_of(training=training)) for training in (stopped, DONE, stopped)]
    plan = SimpleNamespace(clock=SimpleNamespace(cut=False))
    assert _of_others(runs, plan) == ["training of 2 of the 3 other runs in the mixture did not converge"]
    assert _of_others(runs[1:2], plan) == []


@pytest.mark.parametrize(
    ("dim", "steps"), [(1, 6000), (50, 6000), (51, 6060), (100, 8485), (200, 12000), (201, 12000), (5000, 12000)]
)
def test_steps_by_dimension(dim, steps):
    assert default_steps(dim) == steps
