"""Many data sets of one model: posteriors are right, in order, judged, and whole."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.calibration import batch
from pyro_flows.calibration.processes import run_all, with_model
from pyro_flows.calibration.wiring import Case
from pyro_flows.flows.recipe import latent_recipe, start_at
from pyro_flows.inference.modes.missed_modes import Search, missed_together
from pyro_flows.inference.starts.portfolio import starts_together
from pyro_flows.model.stack import Stack
from pyro_flows.support.process.seeding import seeded
from tests.calibration.models import X, branching, counts, data_sets, exact, regression, two_modes
from tests.posterior.export.test_arviz import groups

COUNT = 6


Y = torch.zeros(5)


@pytest.fixture(scope="module")
def posteriors():
    return pf.fit_many(regression, data_sets(COUNT), draws=1000, progress=False)


def test_posteriors_are_right_and_in_order(posteriors):
    for args, posterior in zip(data_sets(COUNT), posteriors, strict=True):
        mean, covariance = exact(*args)
        found = posterior.samples["b"]
        sds = covariance.diagonal().sqrt()
        assert ((found.mean(0) - mean).abs() / sds).max() < 0.15
        assert (found.std(0) / sds - 1.0).abs().max() < 0.1
        assert posterior.verdict.status in ("ok", "corrected")
        assert posterior.settings["side_by_side"] == COUNT


def test_log_evidence_is_that_of_each_data_set(posteriors):
    for (x, y), posterior in zip(data_sets(COUNT), posteriors, strict=True):
        marginal = dist.MultivariateNormal(torch.zeros(len(y)), x @ x.T + 0.7**2 * torch.eye(len(y)))
        assert posterior.log_evidence == pytest.approx(float(marginal.log_prob(y)), abs=0.05)


def test_each_is_a_whole_posterior(posteriors, tmp_path):
    posterior, args = posteriors[2], data_sets(COUNT)[2]
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", regression, *args)
    assert torch.equal(again.samples["b"], posterior.samples["b"])
    observed = posterior.to_arviz()["observed_data"]["y"].to_numpy()
    assert observed.tolist() == pytest.approx(args[1].tolist())
    drawn = posterior.predictive()["y"]
    assert drawn.mean(0).numpy() == pytest.approx((args[0] @ exact(*args)[0]).numpy(), abs=0.2)
    assert posterior.history[-1]["stage"] == "side by side"
    assert posterior.settings["gradient_evaluations"] > 14 * 50, "those of the search count too"
    assert len(posterior.losses) == posterior.history[-1]["steps"]


def test_one_seed_gives_one_answer(posteriors):
    again = pf.fit_many(regression, data_sets(COUNT), draws=1000, progress=False)
    assert all(torch.equal(one.z, other.z) for one, other in zip(posteriors, again, strict=True))


def test_data_sets_have_draws_of_their_own(posteriors):
    mean, covariance = exact(*data_sets(COUNT)[0])
    other, _ = exact(*data_sets(COUNT)[1])
    sds = covariance.diagonal().sqrt()
    one, two = ((posteriors[k].z - center) / sds for k, center in ((0, mean), (1, other)))
    assert torch.corrcoef(torch.stack([one[:, 0], two[:, 0]]))[0, 1].abs() < 0.1


def test_normal_posteriors_take_no_training(posteriors):
    assert all(len(posterior.losses) == 0 and posterior.verdict.status == "ok" for posterior in posteriors)


def test_a_flow_that_was_asked_for_is_trained():
    found = pf.fit_many(regression, data_sets(4), flow="realnvp", draws=300, progress=False)
    assert all(len(posterior.losses) > 0 for posterior in found)
    assert all(posterior.flow.recipe.builder != "location_scale" for posterior in found)


def rate_of(y: torch.Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Poisson(rate), obs=y)


def test_importance_weights_correct_what_is_not_quite_normal():
    """The log of a rate with a Gamma(2 + y, 2) posterior has a skewness of -.15 to -.25."""
    sets = [torch.tensor(y) for y in (10.0, 15.0, 25.0, 60.0)]
    posteriors = pf.fit_many(rate_of, sets, progress=False)
    for y, posterior in zip(sets, posteriors, strict=True):
        exact = dist.Gamma(2.0 + y, torch.tensor(2.0))
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        found = torch.stack([(posterior.samples["rate"] <= q).double().mean() for q in gamma_quantiles(exact, levels)])
        torch.testing.assert_close(found, levels.double(), rtol=0.0, atol=0.03)
        assert len(posterior.losses) == 0
    corrected = [posterior.verdict for posterior in posteriors if posterior.verdict.status == "corrected"]
    assert corrected
    assert all("Gaussian, importance-resampled" in str(verdict) for verdict in corrected)


def gamma_quantiles(exact: dist.Gamma, levels: torch.Tensor) -> torch.Tensor:
    """Quantiles by many draws."""
    with seeded(0):
        return torch.quantile(exact.sample((200_000,)), levels)


def bent(y: torch.Tensor) -> None:
    """A scale of its own makes a neck, in which no affine map is right."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * log_scale.exp(), 0.5), obs=y)


def test_what_is_normal_along_a_coordinate_takes_slices_of_it():
    sets = [torch.tensor(y) for y in (0.0, 0.5, 1.0, 2.0, -1.0)]
    found = pf.fit_many(bent, sets, draws=1000, progress=False)
    grid = torch.linspace(-6.0, 6.0, 4001).double()
    for y, posterior in zip(sets, found, strict=True):
        density = dist.Normal(0.0, (grid.exp().square() + 0.25).sqrt()).log_prob(y) - 0.5 * grid.square()
        mean = float((torch.softmax(density, 0) * grid).sum())
        assert len(posterior.losses) == 0
        assert posterior.verdict.status == "ok"
        assert float(posterior.samples["log_scale"].mean()) == pytest.approx(mean, abs=0.1)


@pytest.mark.slow
def test_data_sets_of_other_shapes_are_fitted_by_themselves():
    """So is [0, 0, 1], whose weights do not pass: its posterior is too skewed for the Gaussian of the four."""
    sets = [torch.tensor(y) for y in ([1, 2, 0], [3, 3], [0, 0, 1], [4, 5, 7], [2, 2, 2])]
    found = pf.fit_many(counts, sets, draws=500, progress=False)
    for y, posterior in zip(sets, found, strict=True):
        shape, rate = 2.0 + float(y.sum()), 1.0 + len(y)
        assert float(posterior.samples["rate"].mean()) == pytest.approx(shape / rate, abs=0.2 * shape**0.5 / rate)
    assert ["side_by_side" in posterior.settings for posterior in found] == [True, False, False, True, True]


def test_keyword_arguments_and_what_data_sets_share():
    sets = [{"y": y} for _, y in data_sets(4)]
    found = pf.fit_many(regression, sets, model_kwargs={"x": data_sets(1)[0][0]}, draws=300, progress=False)
    mean, covariance = exact(*data_sets(4)[3])
    assert ((found[3].samples["b"].mean(0) - mean).abs() / covariance.diagonal().sqrt()).max() < 0.3


@pytest.mark.slow
@pytest.mark.falls_back
def test_a_model_that_takes_numbers_out_of_its_data_is_fitted_one_by_one():
    sets = [torch.tensor([0.5, 1.0, y]) for y in (0.0, 1.0, 2.0, 3.0)]
    found = pf.fit_many(branching, sets, draws=300, progress=False, max_steps=300, escalate=False)
    for y, posterior in zip(sets, found, strict=True):
        assert "side_by_side" not in posterior.settings
        assert float(posterior.samples["mu"].mean()) == pytest.approx(float(y.sum()) / 3.25, abs=0.15)


def test_what_would_be_unreliable_is_fitted_again(monkeypatch):
    def search(stack, flows, *, seed):
        return [
            Search((), "the guide misses a mode near here" if number == 1 else None) for number in range(len(flows))
        ]

    monkeypatch.setattr(batch, "missed_together", search)
    found = pf.fit_many(regression, data_sets(4), draws=300, progress=False)
    assert ["side_by_side" in posterior.settings for posterior in found] == [True, False, True, True]
    assert all(posterior.verdict.status != "unreliable" for posterior in found)


# the parts ------------------------------------------------------------------------------------------------------------


def narrow_flows(stack, places, scale):
    recipe = latent_recipe("realnvp", {"layers": 2}, affine="auto", base="student_t", df=15.0)
    with seeded(0):
        flows = [recipe.build_for_latents(stack.dim) for _ in places]
    for flow, place in zip(flows, places, strict=True):
        start_at(flow, torch.tensor(place), torch.full((stack.dim,), scale))
    return flows


def test_a_symmetric_mode_is_missed():
    stack = Stack([pf.LogDensity(two_modes, (torch.tensor(y),)) for y in (4.0, 5.0, 6.0, 7.0)])
    flows = narrow_flows(stack, [[2.0], [2.2], [2.4], [-2.6]], 0.12)
    with seeded(0):
        found = missed_together(stack, flows, seed=0)
    assert all(search.failures for search in found)


def peaks(y):
    """A peak at y, and one with twice its mass at a place that no symmetry leads to."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    near, far = dist.Normal(y, 0.3).log_prob(x), dist.Normal(8.0 - 0.5 * y, 0.8).log_prob(x) + 0.7
    pyro.factor("peaks", torch.logaddexp(near, far))


def test_a_mode_that_no_symmetry_leads_to_is_missed_too():
    places = [-1.0, 0.0, 1.0, 2.0]
    stack = Stack([pf.LogDensity(peaks, (torch.tensor(y),)) for y in places])
    with seeded(0):
        at_one = missed_together(stack, narrow_flows(stack, [[y] for y in places], 0.3), seed=0)
    assert all(search.missed and search.failures for search in at_one)


def test_nothing_is_missed_where_there_is_one_mode():
    sets = data_sets(4)
    stack = Stack([pf.LogDensity(regression, args) for args in sets])
    recipe = latent_recipe("realnvp", {"layers": 2}, affine="auto", base="student_t", df=15.0)
    with seeded(0):
        flows = [recipe.build_for_latents(2) for _ in sets]
        for flow, args in zip(flows, sets, strict=True):
            mean, covariance = exact(*args)
            start_at(flow, mean, torch.linalg.cholesky(covariance))
        found = missed_together(stack, flows, seed=0)
    assert all(not search.missed and not search.failures and search.passed for search in found)
    assert all("14 paths" in search.notes[0] for search in found)


def test_a_guide_that_is_too_narrow_is_found_by_wanderers():
    sets = data_sets(4)
    stack = Stack([pf.LogDensity(regression, args) for args in sets])
    flows = narrow_flows(stack, [exact(*args)[0].tolist() for args in sets], 0.03)
    with seeded(0):
        found = missed_together(stack, flows, seed=0)
    assert all(search.missed for search in found)


def test_starts_are_at_each_posterior():
    sets = data_sets(5)
    stack = Stack([pf.LogDensity(regression, args) for args in sets])
    for args, start in zip(sets, starts_together(stack, seed=0, df=15.0), strict=True):
        mean, covariance = exact(*args)
        assert ((start.loc - mean).abs() / covariance.diagonal().sqrt()).max() < 0.2
        torch.testing.assert_close(start.scale @ start.scale.T, covariance, rtol=0.15, atol=0.01)


# processes ------------------------------------------------------------------------------------------------------------


def test_what_comes_from_another_process_gets_its_model_back(posteriors):
    args = data_sets(COUNT)[1]
    sent = pickle.loads(pickle.dumps(posteriors[1]))
    assert sent.density is None
    back = with_model(sent, regression, Case(args, {}))
    assert torch.equal(back.density(back.z[:5]), posteriors[1].density(back.z[:5]))
    assert set(groups(back.to_arviz())) == set(groups(posteriors[1].to_arviz()))
    assert back.guide is not None
    assert not back.missing


@pytest.mark.slow
def test_processes_give_what_one_process_gives():
    pytest.importorskip("joblib")
    sets = data_sets(3)
    options = {"draws": 300, "progress": False, "together": False}
    here, there = (pf.fit_many(regression, sets, jobs=jobs, **options) for jobs in (1, 2))
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.samples["b"], other.samples["b"])
        assert one.verdict.status == other.verdict.status
        assert other.density is not None


def test_the_backend_that_joblib_was_told_is_taken():
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="threading", n_jobs=2):
        found = pf.fit_many(regression, data_sets(2), draws=200, progress=False, max_steps=300, escalate=False)
    assert all(posterior.verdict.status in ("ok", "corrected") for posterior in found)


class Waiting:
    """A task without a hash, as a data class of a dictionary."""

    __hash__ = None

    def __call__(self):
        return 1


@pytest.mark.parametrize("at_the_end", [False, True])
def test_tasks_need_no_hash_and_backends_no_generator(monkeypatch, at_the_end):
    """Dask hashes what it calls, and Ray gives all results at the end."""
    joblib = pytest.importorskip("joblib")
    delayed, called = joblib.delayed, []
    monkeypatch.setattr(joblib, "delayed", lambda function: called.append(hash(function)) or delayed(function))
    if at_the_end:
        monkeypatch.setattr("joblib._parallel_backends.ThreadingBackend.supports_return_generator", False)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert list(run_all([Waiting(), Waiting()], None)) == [1, 1]
    assert len(called) == 2


@pytest.mark.slow
def test_dask_on_one_machine():
    joblib = pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        found = pf.fit_many(regression, data_sets(3), draws=200, progress=False, together=False)
    assert [posterior.verdict.status for posterior in found] == ["ok"] * 3


# errors ---------------------------------------------------------------------------------------------------------------


def test_a_single_data_set_is_refused():
    with pytest.raises(ValueError, match="call fit"):
        pf.fit_many(regression, data_sets(1)[0][1])


@pytest.mark.parametrize("bad", [(X,), {"x": X, "z": Y}, [X, Y], (np.array(["a"]), Y)])
def test_a_data_set_that_the_model_does_not_take_is_named(bad):
    with pytest.raises(ValueError, match=r"data\[1\]: "):
        pf.fit_many(regression, [(X, Y), bad], progress=False)


@pytest.mark.slow
def test_a_data_set_outside_of_the_support_is_named():
    with pytest.raises(ValueError, match=r"data\[1\].*'y'"):
        pf.fit_many(counts, [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])], progress=False)


@pytest.mark.parametrize(("option", "value", "text"), [("jobs", 0, "jobs"), ("refine", "x", "x")])
def test_bad_options_are_named_before_any_work(option, value, text):
    with pytest.raises(ValueError, match=text):
        pf.fit_many(regression, data_sets(1), progress=False, **{option: value})


def test_processes_without_joblib_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pyro-flows\[parallel\]"):
        pf.fit_many(regression, data_sets(1), jobs=2, progress=False)


def test_no_data_sets_make_no_posteriors():
    assert pf.fit_many(regression, [], progress=False) == []


def bounded(y):
    top = pyro.sample("top", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Uniform(torch.zeros_like(top), top), obs=y)


@pytest.mark.slow
@pytest.mark.falls_back
def test_walls_are_those_of_each_data_set():
    data = [torch.tensor([0.2, 0.5, size], dtype=torch.float64) for size in (0.6, 1.0, 2.0, 3.0)]
    found = pf.fit_many(bounded, [(y,) for y in data], progress=False)
    below = torch.distributions.Normal(0.0, 1.0).cdf
    for posterior, y in zip(found, data, strict=True):
        assert posterior.verdict.status in ("ok", "corrected")
        # the log of the top is N(-3, 1) above that of the largest: raw draws of the first had a mean of 1e11
        wall = y.max().log()
        mean = float(math.exp(-2.5) * below(-2.0 - wall) / below(-3.0 - wall))
        assert float(posterior.samples["top"].mean()) == pytest.approx(mean, rel=0.03)
        assert posterior.settings["noncentered"]["top"]["wall_below"] == pytest.approx(float(y.max().log()), abs=1e-7)
        assert bool((posterior.samples["top"] > y.max()).all())


def test_a_posterior_of_many_can_be_refined():
    """Its graph has the data as inputs; chains need one of its own."""
    posterior = pf.fit_many(regression, data_sets(4), draws=200, progress=False)[2]
    refined = posterior.refine(max_steps=20, progress=False)
    assert refined.chains is not None


@pytest.mark.slow
def test_minus_one_is_a_process_for_each_processor():
    found = pf.fit_many(regression, data_sets(2), jobs=-1, together=False, progress=False)
    assert [one.verdict.status for one in found] == ["ok", "ok"]
