"""Escalation: what is enough, each kind of round and what it changes, growing layers and tails, runs that agree."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import McmcDraws
from pyro_flows._clock import unbounded
from pyro_flows._progress import Bar
from pyro_flows._stages import TRIAL_RUN
from pyro_flows.fitting import escalation
from pyro_flows.fitting.agreement import compare
from pyro_flows.fitting.combine import _take
from pyro_flows.fitting.combined import Combined
from pyro_flows.fitting.conclude import _in_vain, _never_good
from pyro_flows.fitting.escalation import Round, rounds, unweighed
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.run import Run
from pyro_flows.fitting.several import Several
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import Recipe, grow, set_df
from pyro_flows.results.stage import Stage
from pyro_flows.starts.start import Start
from pyro_flows.training.loop import BATCH, STEP_SIZE, Budget, Training
from pyro_flows.training.trainer import Trainer
from pyro_flows.transforms import DiagonalAffine
from pyro_flows.verdict.weighing import Weighing
from tests.models import real
from tests.registry import normal, randomize

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
    ({"k_hat": 0.6, "ess": 951.0, "log_evidence": 0.0099}, True),
    ({"k_hat": 0.6, "ess": 949.0, "log_evidence": 0.0099}, False),
    ({"k_hat": 0.6, "ess": 951.0, "log_evidence": 0.0101}, False),
    ({"k_hat": 0.67, "ess": 951.0, "log_evidence": 0.0099}, False),
    ({"log_evidence": 0.0399}, True),
    ({"log_evidence": 0.04}, False),
    ({"dim": 20, "log_evidence": 0.0399}, True),
    ({"dim": 20, "log_evidence": 0.0401}, False),
    ({"dim": 100, "log_evidence": 0.199}, True),
    ({"dim": 100, "log_evidence": 0.201}, False),
    ({"dim": 40, "k_hat": 0.6, "ess": 951.0, "log_evidence": 0.0199}, True),
    ({"dim": 40, "k_hat": 0.6, "ess": 951.0, "log_evidence": 0.0201}, False),
    ({"mean_shift": real(0.0, 0.1)}, True),
    ({"mean_shift": real(0.0, 0.101)}, False),
    ({"ess": 99.0}, False),
    ({"broken": 1}, False),
    ({"training": replace(DONE, converged=False)}, False),
]


@pytest.mark.parametrize(("changes", "enough"), ENOUGH)
def test_enough_from_both_sides(changes, enough):
    assert round_of(**changes).enough is enough


def test_a_round_that_lacks_tails_only():
    assert round_of(k_hat=0.9).tails_only
    assert not round_of(k_hat=0.9, log_evidence=0.05).tails_only
    assert not round_of(k_hat=0.9, training=replace(DONE, converged=False)).tails_only


def test_a_round_whose_weights_are_even_but_for_their_tail():
    assert round_of(k_hat=0.5, ess=951.0).lacks_a_tail
    assert not round_of(k_hat=0.49, ess=951.0).lacks_a_tail
    assert not round_of(k_hat=0.5, ess=949.0).lacks_a_tail
    assert not Round(None, unweighed(2, 7.0), DONE, Stage("first round")).lacks_a_tail


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


# rounds ---------------------------------------------------------------------------------------------------------------


def banana():
    x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
    pyro.sample("y", dist.Normal(x.square(), 0.5))


def wish(recipe, density, first=None, budget=200, monkeypatch=None, **more):
    """All rounds, each of three steps in the place of a whole training; what was asked of each."""
    asked = []

    def three_steps(trainer, left, *, cool, name, **_):
        asked.append(SimpleNamespace(name=name, cool=cool, left=left.steps, trainer=trainer))
        for _ in range(3):
            trainer.step(1e-4)
        trainer.write()
        return replace(DONE, losses=trainer.losses[-3:], converged=False)

    monkeypatch.setattr(escalation, "train", three_steps)
    monkeypatch.setattr(escalation, "JUDGED_DRAWS", 400)
    flow = recipe.build_for_latents(2).double()
    trainer = Trainer(flow, density, learning_rate=3e-3, batch=BATCH)
    trainer.losses = [2.0] * 10  # of the rounds before
    start = Start("best", real(0.5, -0.5), real(0.7, 0.2))
    first = round_of(k_hat=0.9, log_evidence=1.0) if first is None else first
    options = {"seed": 0, "report": lambda *_: None} | more
    made = [
        SimpleNamespace(
            name=outcome.stage.stage,
            trainer=trainer,
            outcome=outcome,
            layers=outcome.flow.recipe.options["layers"],
            losses=list(trainer.losses),
        )
        for trainer, outcome in rounds(plan_of(recipe), trainer, first, start, Budget(budget), **options)
    ]
    return asked, made


@pytest.fixture
def density():
    return pf.LogDensity(banana)


def plan_of(recipe):
    asked = {
        "draws": 400,
        "seed": 0,
        "runs": 1,
        "max_steps": 200,
        "train_model": False,
        "escalate": True,
        "refine": None,
    }
    return Plan(banana, (), {}, recipe, clock=unbounded(), bar=Bar("fit", False), **asked)


def small(**changes):
    given = {"builder": "realnvp", "options": {"layers": 2, "hidden": (4,)}, "base": "student_t"} | changes
    return Recipe(**given, around=(("affine", "auto"),))


def check_rounds(density, monkeypatch):
    """The order, and what each round changes: the batch, the number of layers, the base's tails, a new start."""
    annealed = []

    def anneal(trainer, steps, **_):
        annealed.append((steps, copy.deepcopy(trainer.flow), trainer))

    monkeypatch.setattr(escalation, "anneal", anneal)
    asked, made = wish(small(), density, monkeypatch=monkeypatch)
    names = ["larger batch", "more layers", "heavier tails", "tempering"]
    assert [step.name for step in made] == [step.name for step in asked] == names
    assert [step.layers for step in made] == [2, 6, 6, 6]
    assert [step.outcome.flow.df for step in made] == [15.0, 15.0, 5.0, 5.0]
    assert [step.outcome.flow.base_distribution().base_dist.df[0].item() for step in made] == [15.0, 15.0, 5.0, 5.0]
    assert [step.trainer.batch for step in made] == [4 * BATCH] * 4
    assert [step.trainer.learning_rate for step in made] == [STEP_SIZE] * 4
    # each has the steps that the rounds before have left, and their losses
    assert [step.left for step in asked] == [190, 187, 184, 181]
    assert [len(step.losses) for step in made] == [13, 16, 19, 22]
    assert all(step.cool == escalation.COOL for step in asked)
    # what a round came to is kept apart from the flow that is trained on
    assert len({id(step.outcome.flow) for step in made} | {id(made[-1].trainer.flow)}) == 5
    # tempering begins anew, where the fit began
    ((steps, fresh, trainer),) = annealed
    assert steps == int(0.4 * 181)
    assert trainer is made[-1].trainer
    assert fresh.df == 5.0
    affine = fresh.bijection.layers[-1]
    torch.testing.assert_close(affine.loc, real(0.5, -0.5))
    sds = affine.scale_tril.diagonal() * math.sqrt(5.0 / 3.0)  # of draws of its base
    torch.testing.assert_close(sds, real(0.7, 0.2))
    z = normal(20, 2, seed=1)
    base = fresh.base_distribution()
    moved = base.log_prob((z - affine.loc) / affine.scale_tril.diagonal()) - math.log(0.7 * 0.2 * 3.0 / 5.0)
    torch.testing.assert_close(fresh().log_prob(z), moved)


def test_the_rounds_in_their_order(density, monkeypatch):
    check_rounds(density, monkeypatch)


def test_tails_come_first_where_they_alone_are_short(density, monkeypatch):
    _, made = wish(small(), density, first=round_of(k_hat=0.9), monkeypatch=monkeypatch)
    assert [step.name for step in made] == ["heavier tails", "larger batch", "more layers"]
    assert [step.outcome.flow.df for step in made] == [5.0] * 3
    assert [step.layers for step in made] == [2, 2, 6]


def test_rounds_that_can_do_nothing_are_left_out(density, monkeypatch):
    """A base without tails to change."""
    _, made = wish(small(base="normal"), density, monkeypatch=monkeypatch)
    assert [step.name for step in made] == ["larger batch", "more layers", "tempering"]
    _, made = wish(small(df=5.0), density, monkeypatch=monkeypatch)
    assert "heavier tails" not in [step.name for step in made]


def test_a_flow_that_was_given_does_not_grow(density, monkeypatch):
    own = small(builder=pf.realnvp(2, layers=2, hidden=(4,)).double(), options={})
    _, made = wish(own, density, monkeypatch=monkeypatch)
    assert [step.name for step in made] == ["larger batch", "tempering"]
    assert all(step.layers == 2 for step in made)


@pytest.mark.parametrize(("budget", "count"), [(10, 0), (11, 1), (13, 1), (14, 2)])
def test_rounds_end_with_the_budget(density, monkeypatch, budget, count):
    asked, made = wish(small(), density, budget=budget, monkeypatch=monkeypatch)
    assert len(made) == len(asked) == count


def test_tempering_trains_on_flatter_densities_first(density, monkeypatch):
    betas = []

    class Watched(Trainer):
        def step(self, learning_rate):
            betas.append(self.beta)
            super().step(learning_rate)

    monkeypatch.setattr(escalation, "Trainer", Watched)
    wish(small(), density, budget=40, monkeypatch=monkeypatch)
    assert betas[:9] == [1.0] * 9  # three rounds of three steps
    tempered = betas[9:-3]
    assert len(tempered) == int(0.4 * 21)
    assert 0.01 < tempered[0] < 0.02
    assert tempered == sorted(tempered)
    assert tempered[-1] == betas[-1] == 1.0


@pytest.mark.slow  # rounds of short fits, and the settings of the one that was kept, are in test_fit_control
def test_a_fit_that_is_not_enough_goes_on(monkeypatch):
    """Two affine layers cannot bend as the banana does: later rounds are run, and the best one is kept."""
    monkeypatch.setattr("pyro_flows.modes.population.FEW", 0)  # no mixture comes from the prior instead
    monkeypatch.setattr("pyro_flows.fitting.run.slices_of", lambda *_, **__: None)  # nor slices along x

    def bent():
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        pyro.factor("bend", -0.5 * ((pyro.sample("y", dist.Normal(real(0.0), 30.0)) - 3.0 * x.square()) / 0.1) ** 2)

    posterior = pf.fit(bent, layers=2, max_steps=2600, draws=500, refine=False, progress=False)
    stages = [stage for stage in posterior.history if stage["k_hat"] is not None and stage["steps"] is not None]
    assert [stage["stage"] for stage in stages][:2] == ["first round", "larger batch"]
    assert [stage["batch"] for stage in stages][:2] == [BATCH, 4 * BATCH]
    assert posterior.settings["round"] in [stage["stage"] for stage in stages]
    kept = next(stage for stage in stages if stage["stage"] == posterior.settings["round"])
    assert posterior.settings["batch"] == kept["batch"]
    assert sum(stage["steps"] for stage in stages) <= 2600
    single = pf.fit(bent, layers=2, max_steps=100, draws=500, refine=False, progress=False, escalate=False)
    assert [stage["stage"] for stage in single.history if stage["k_hat"] is not None] == ["first round"]


# growing --------------------------------------------------------------------------------------------------------------


def check_grown(kind, affine, dim=3):
    """The distribution after growing is the one before it, and the new layers can be trained."""
    before = Recipe(kind, {"layers": 4, "hidden": (8,)}, "student_t", around=(("affine", affine),)).build(dim).double()
    randomize(before, sd=0.1, seed=1)
    set_df(before, 7.0)
    z, flow = 2.0 * normal(50, dim, seed=2), grow(before, 4)
    assert flow.recipe.options["layers"] == 8
    assert sum(p.numel() for p in flow.parameters()) > sum(p.numel() for p in before.parameters())
    assert flow.df == 7.0
    torch.testing.assert_close(flow().log_prob(z), before().log_prob(z), rtol=0.0, atol=1e-6)
    x, ladj = before.bijection.forward_and_ladj(z)
    again, ladj_again = flow.bijection.forward_and_ladj(z)
    torch.testing.assert_close(again, x, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(ladj_again, ladj, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["realnvp", "nice", "planar"])
@pytest.mark.parametrize("affine", ["tril", "diagonal"])
def test_a_flow_that_grows_stays_the_distribution_that_it_was(kind, affine):
    check_grown(kind, affine)


# runs -----------------------------------------------------------------------------------------------------------------


def at(loc, log_evidence=0.0, sd=1.0):
    map_ = DiagonalAffine(2, loc=torch.tensor(loc), scale=torch.full((2,), sd)).double()
    return round_of(flow=pf.Flow(map_), log_evidence=log_evidence)


def test_runs_that_agree():
    found = compare([at([0.0, 1.0]), at([0.0, 1.0], 0.29)], ["a", "b"])
    assert found.holds
    assert found.weights == pytest.approx([1 / (1 + math.exp(0.29)), 1 / (1 + math.exp(-0.29))])


OTHERS = [
    (at([0.0, 2.0]), "runs disagree on b"),
    (at([0.0, 1.0], sd=2.0), "runs disagree on a"),
    (at([0.0, 1.0], 0.31), "log evidences of the runs differ by 0.31 nats"),
    (at([0.0, 1.0], -0.31), "log evidences of the runs differ by 0.31 nats"),
    (at([0.0, 1.0], math.nan), "log evidences of the runs differ by nan nats"),
]


@pytest.mark.parametrize(("other", "said"), OTHERS)
def test_runs_that_do_not_agree(other, said):
    found = compare([at([0.0, 1.0]), other], ["a", "b"])
    assert not found.holds
    assert any(reason.startswith(said) for reason in found.disagreements), found.disagreements
    assert sum(found.weights) == pytest.approx(1.0)


def test_runs_without_evidence_weigh_nothing():
    found = compare([at([0.0, 1.0]), at([0.0, 1.0], math.nan), at([0.0, 1.0], math.log(3.0))], ["a", "b"])
    assert found.weights == pytest.approx([0.25, 0.0, 0.75])


# fits that were cut short ---------------------------------------------------------------------------------------------


def history(*k_hats, kept=-1, converged=False):
    stages = [Stage(name, k_hat=k) for name, k in zip(("first round", *escalation.ALL), k_hats, strict=False)]
    stages.insert(0, Stage(TRIAL_RUN, elbo=0.0))
    return Run(0, best=round_of(training=replace(DONE, converged=converged)), kept=stages[kept], history=stages)


CUT_SHORT = [
    (history(0.2), False),
    (history(0.9), False),  # its own k-hat is judged elsewhere
    (history(0.5, 0.3), False),
    (history(0.51, 0.3), True),
    (history(math.inf, 0.3), True),
    (history(0.51, 0.3, converged=True), False),
    (history(0.3, 0.9, kept=1), True),
    (Run(0), False),
]


@pytest.mark.parametrize(("run", "said"), CUT_SHORT)
def test_a_fit_that_was_cut_short_after_poor_rounds(run, said):
    found = _never_good(run)
    assert bool(found) == said
    assert not said or found[0].startswith("training did not converge, and an earlier round had k-hat")


@pytest.mark.parametrize("taken", ["nothing", "a table of coordinates", "a mixture"])
def test_chains_go_with_the_flow_that_they_began_at(taken):
    """An alarm: chains began at a poor flow, then exact tables took its place, and were judged by these chains."""
    flow, chains = location_scale(2, base="normal"), McmcDraws(torch.zeros(8, 4, 2), {}, {}, {})
    run = Run(0, chains=chains)
    found = Combined(runs=[run], plain=flow, sampler=flow)
    if taken == "a mixture":
        found.sampler = FlowMixture([flow, flow])
    if taken == "a table of coordinates":
        assert _take(found, Several(location_scale(2, base="normal"), "tables", Stage("tables"), True))
    assert found.chains is (chains if taken == "nothing" else None)


IN_VAIN = [
    ({}, False),
    ({"added": 1}, True),
    ({"added": 1, "disagreements": ["runs disagree on x"]}, False),  # they are mixed
    ({"added": 1, "copies": 2}, False),
]


@pytest.mark.parametrize(("given", "said"), IN_VAIN)
def test_runs_that_left_the_missed_mode_where_they_began(given, said):
    assert bool(_in_vain(Combined(**given))) == said
