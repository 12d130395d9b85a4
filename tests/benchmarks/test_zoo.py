"""The zoo: its references against the models' own densities, its judgement, its run that resumes, its tables."""

import os
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.zoo import FAMILIES, checking, family_of, judging, reporting, running, zoo
from benchmarks.zoo.case import Case
from tests.benchmarks.pages import write_only

SEED = 1
FIRST = 7  # families of the zoo in which cases had the numbers below
QUICK = range(3 * len(FAMILIES))  # cases whose references are checked in each run of the tests
SLOW = range(len(QUICK), 40 * len(FAMILIES))
LIMIT = 5.0  # standard errors; the largest of up to some thousand statistics
BRIDGED = 0.2  # standard error, nats, up to which bridge sampling says something


def referenced(case: Case) -> checking.LogDensity:
    """The density of a case whose exact draws can be checked; others are skipped."""
    if case.draw is None:
        pytest.skip("no posterior")
    try:
        density = checking.density_of(case)
        checking.unconstrained(density, case, case.draws(2))
    except (ValueError, checking.Unchecked) as error:
        pytest.skip(f"cannot be evaluated: {error}")
    if not density.batched:
        pytest.skip("too slow: its density is evaluated draw by draw")
    return density


def check(number: int, draws: int) -> None:
    case = zoo(SEED, number)
    density = referenced(case)
    assert checking.moved(case, density, draws) < LIMIT, case.name
    assert checking.stein(case, density, 2 * draws) < LIMIT, case.name
    if case.log_evidence is not None:
        estimate, error = checking.bridge(case, density, 2 * draws)
        if error < BRIDGED:
            assert estimate == pytest.approx(case.log_evidence, abs=LIMIT * error + 0.02), case.name


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", QUICK)
def test_exact_draws_are_those_of_the_model(number):
    check(number, 500)


@pytest.mark.slow
@pytest.mark.parametrize("number", SLOW)
def test_more_exact_draws_are_those_of_the_model(number):
    check(number, 1500)


def changed(case: Case, change) -> Case:
    """The same model with draws that are not exact."""
    return replace(case, draw=lambda count, rng: change(case.draw(count, rng)))


def moved_by(shift: float, scale: float):
    """A change of the first site: all draws by a part of an sd, and about their mean by a factor."""

    def change(draws):
        name = next(iter(draws))
        x = draws[name]
        mean, sd = x.mean(0), x.std(0)
        return {**draws, name: mean + shift * sd + scale * (x - mean)}

    return change


@pytest.mark.parametrize(("shift", "scale"), [(0.2, 1.0), (0.0, 1.25), (0.0, 0.8)])
@pytest.mark.parametrize("number", [3, 9, 10, 12, 14])
def test_the_checks_see_draws_that_are_a_little_off(number, shift, scale):
    case = zoo(SEED, number, among=FIRST)
    density = referenced(case)
    off = changed(case, moved_by(shift, scale))
    assert max(checking.moved(case, density, draw_from=off), checking.stein(case, density, draw_from=off)) > LIMIT


def wells() -> Case:
    """Two narrow wells of one number, with three quarters of the mass to the right."""

    def log_prob(x):
        left, right = (dist.Normal(torch.tensor(center), 0.5).log_prob(x) for center in (-4.0, 4.0))
        return torch.logaddexp(left + np.log(0.25), right + np.log(0.75))

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("wells", log_prob(x) - dist.Normal(0.0, 10.0).log_prob(x))

    def draw(count, rng):
        return {"x": np.where(rng.random(count) < 0.25, -4.0, 4.0) + 0.5 * rng.standard_normal(count)}

    regions = lambda draws: np.stack([draws["x"] < 0.0, draws["x"] >= 0.0], -1)  # noqa: E731
    return Case("wells", model, draw, log_evidence=0.0, regions=regions)


def test_the_checks_see_modes_with_wrong_masses():
    case = wells()
    density = checking.density_of(case)
    assert checking.moved(case, density) < LIMIT

    def equal(count, rng):
        return {"x": rng.choice([-4.0, 4.0], count) + 0.5 * rng.standard_normal(count)}

    assert checking.moved(case, density, draw_from=replace(case, draw=equal)) > LIMIT
    estimate, error = checking.bridge(case, density)
    assert estimate == pytest.approx(0.0, abs=LIMIT * error)
    assert 0.0 < error < 0.03


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_a_case_is_made_anew_from_its_seed_and_number():
    first, again, other = zoo(3, 4), zoo(3, 4), zoo(4, 4)
    assert (first.name, first.dtype) == (again.name, again.dtype)
    for name, values in first.exact.items():
        assert np.array_equal(values, again.exact[name])
    assert first.name != other.name
    streams = [first.draws(10, stream)[next(iter(first.exact))] for stream in (0, 1)]
    assert not np.array_equal(*streams)


def test_any_first_cases_cover_all_families_evenly():
    counts = Counter(map(family_of, range(60)))
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(ValueError, match="number: expected a number from 0 on, got -1"):
        zoo(1, -1)


# ---- judgement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_other_exact_draws_are_strictly_right(family):
    for number in [number for number in range(64) if family_of(number) == family]:
        case = zoo(2, number)
        if case.draw is not None:
            found = judging.compare(case, case.draws(4000, 7), 4000)
            assert found.strict <= 1.0, (number, case.name, found)


def test_errors_are_those_that_were_put_in():
    case = zoo(SEED, 9, among=FIRST)
    sample = case.exact["x"]
    mean, sd = sample.mean(0), sample.std(0)
    found = judging.compare(case, {"x": mean + 0.4 * sd + 1.5 * (sample - mean)}, 4000)
    assert found.mean == pytest.approx(0.4)
    assert found.sd == pytest.approx(np.log(1.5))
    assert found.ratio > 1.0
    assert judging.compare(case, {"x": sample + 0.15 * sd}, 4000).ratio < 1.0 < found.strict
    assert judging.compare(case, {"x": np.full_like(sample, np.nan)}, 4000).ratio == np.inf
    assert judging.compare(case, {}, 4000).ratio == np.inf


def test_a_mode_that_is_missing_is_wrong():
    case = wells()
    sample = case.draws(4000, 5)["x"]
    found = judging.compare(case, {"x": np.abs(sample)}, 4000)
    assert found.mode == pytest.approx(0.25, abs=0.01)
    assert found.mode_share == pytest.approx(1.0)
    assert found.ratio > 1.0


def test_angles_are_compared_modulo_their_period():
    case = zoo(SEED, 12, among=FIRST)
    turned = {name: values + (2.0 * np.pi if name in case.periods else 0.0) for name, values in case.exact.items()}
    assert case.periods
    assert judging.compare(case, turned, 4000).ratio < 0.1


def test_heavy_tails_are_judged_by_quantiles():
    case = zoo(SEED, 5, among=FIRST)
    assert case.heavy == {"x"}
    found = judging.compare(case, case.draws(4000, 3), 4000)
    assert np.isnan(found.mean)
    assert found.ratio < 1.0
    narrow = {"x": np.median(case.exact["x"], 0) + 0.5 * (case.exact["x"] - np.median(case.exact["x"], 0))}
    assert judging.compare(case, narrow, 4000).ratio > 1.0


def test_the_outcome_compares_the_verdict_with_the_errors():
    possible, impossible = zoo(SEED, 0, among=FIRST), zoo(SEED, 6, among=FIRST)
    for status in ("ok", "corrected"):
        assert judging.outcome(possible, status, 0.9) == "right"
        assert judging.outcome(possible, status, 1.1) == "lie"
        assert judging.outcome(impossible, status, np.inf) == "lie"
    assert judging.outcome(possible, "unreliable", 0.9) == "alarm"
    assert judging.outcome(possible, "unreliable", 1.1) == "honest"
    assert judging.outcome(impossible, "unreliable", np.inf) == "right"
    improper = zoo(SEED, 15, among=FIRST + 1)
    assert improper.improper
    assert judging.outcome(improper, "refined", np.inf) == "lie"
    assert judging.outcome(improper, "unreliable", np.inf) == "honest"
    assert judging.outcome(improper, "unreliable", np.inf, improper=True) == "right"
    assert judging.outcome(possible, "unreliable", 0.9, improper=True) == "alarm"
    assert judging.outcome_of_error(impossible, ValueError()) == "right"
    assert judging.outcome_of_error(possible, ValueError()) == "honest"
    assert judging.outcome_of_error(possible, IndexError()) == "crash"
    assert judging.outcome_of_error(impossible, RuntimeError()) == "crash"


# ---- running ---------------------------------------------------------------------------------------------------------


def made(task: running.Task, **figures: object) -> records.Row:
    """The row of a right fit, without a fit."""
    given = {"outcome": "right", "status": "ok", "strict_ratio": 0.5, "seconds": 2.0, "name": "a model", **figures}
    return {name: str(value) for name, value in {**running.blank(task), **given}.items()}


def test_bench_does_each_fit_once(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "code_version", lambda: "1")
    done = []

    def do(task):
        done.append(task.number)
        return made(task)

    out = tmp_path / "zoo.csv"
    running.bench(seed=1, models=3, out=out, do=do)
    rows = running.bench(seed=1, models=5, out=out, do=do)
    assert done == [0, 1, 2, 3, 4]
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert records.read(out) == rows
    running.bench(seed=2, models=1, out=out, do=do)
    running.bench(seed=1, models=5 + len(FAMILIES), families=["mirrored"], first=5, out=out, do=do)
    assert done[5:] == [0, 1 + len(FAMILIES)]
    running.bench(seed=1, models=20, first=15, jobs=3, out=out, do=do)
    assert sorted(done[7:]) == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match=r"families: expected some of mixtures, .*, got 'reptiles'"):
        running.bench(seed=1, models=1, families=["reptiles"], out=out, do=do)


def test_a_change_of_one_family_leaves_the_rows_of_others_valid():
    assert len({running.zoo_version(family) for family in FAMILIES}) == len(FAMILIES)
    mine = {name.rpartition(".")[-1] for name in running.sources("conjugate")}
    assert mine == {"case", "conjugate", "judging", "pieces"}
    assert "benchmarks.zoo.conjugate" in running.sources("faulty data")


def _dying(task, pipe):
    os._exit(3)


@pytest.mark.slow
def test_a_process_that_ends_is_a_crash_and_one_that_is_late_is_cut_off(monkeypatch):
    task = running.Task(SEED, 3, "1", "z", 0.0)
    row = running.work(task)
    assert (row["outcome"], row["error"]) == ("late", "cut off after 0 seconds")
    monkeypatch.setattr(running, "_child", _dying)
    row = running.work(replace(task, limit=60.0))
    assert (row["outcome"], row["error"]) == ("crash", "the process ended with 3")
    assert row["name"] == zoo(SEED, 3).name


@pytest.mark.slow
def test_a_fit_in_a_process_of_its_own_has_figures():
    row = running.work(running.Task(SEED, 25, "1", "z"))
    assert row["outcome"] == "right", row
    assert float(row["ratio"]) < 1.0
    assert float(row["seconds"]) > 0.1
    assert float(row["evidence_error"]) < 0.1


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_counts_by_family_with_lies_first(tmp_path):
    tasks = [running.Task(1, number, "1", "z") for number in (*range(7), len(FAMILIES))]
    outcomes = ["lie", "right", "alarm", "crash", "honest", "right", "late", "right"]
    rows = [made(task, outcome=found, error="") for task, found in zip(tasks, outcomes, strict=True)]
    rows[7]["strict_ratio"] = "1.2"
    old = made(running.Task(1, 0, "0", "z"), outcome="crash")
    body = reporting.table_rows(reporting.newest([old, *rows]))
    assert body[0][:7] == ["mixtures", "1", "0", "0", "1", "0", "0"]
    assert body[-1] == ["all", "1", "1", "1", "3", "1", "1", "8", "2", "2.0", "2"]
    assert [text.split()[1] for text in reporting.wanting(rows)] == ["lie", "crash", "alarm", "late", "honest"]

    page, file = tmp_path / "performance.md", tmp_path / "zoo.csv"
    records.write(file, running.FIELDS, rows)
    write_only(page, zoo_csv=file)
    text = page.read_text()
    assert text.index("| all | 1 | 1 | 1 | 3 |") < text.index("## Speed")
    assert "8 random models of seed 1" in text


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "number"), [(14, 38), (14, 49), (14, 290), (16, 127), (16, 257), (20, 71), (22, 73)])
def test_what_was_once_a_lie_is_none(seed, number):
    """Thin tails of scales, modes that touch in 141 dimensions, images, a bound's own sd, an unlucky sample."""
    case = zoo(seed, number, among=FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = pf.fit(case.model, *case.args, model_kwargs=case.kwargs, seed=number, progress=False)
    assert judging.figures(case, posterior)["outcome"] != "lie"
