"""Simulation-based calibration accepts what is right and rejects what is wrong.

Of what is right, one seed in a hundred is rejected at 1 %; seeds are fixed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from pyro_flows.calibration import simulating
from pyro_flows.calibration.fit_many import Many
from pyro_flows.calibration.simulating import Augmented
from pyro_flows.calibration.wiring import Case
from pyro_flows.support.process.seeding import seeded
from tests.calibration.models import NOISE, X, exact, regression
from tests.posterior.export.test_arviz import groups

fit_many = sys.modules["pyro_flows.calibration.fit_many"]  # the module, not the function
Y = torch.tensor([0.5, -1.0, 0.3, 1.1, 0.0])
ALIKE = torch.stack([X[:, 1], X[:, 1] + 0.05], 1)


def from_exact(scale=1.0, shift=0.0, draws=199, at_hand=None):
    """Draws of the closed form; of posteriors that are ``scale`` too wide and ``shift`` sds off."""

    def sampler(x, y):
        both = (x, y) if at_hand is None else (torch.cat([x, at_hand[0]]), torch.cat([y, at_hand[1]]))
        mean, covariance = exact(*both)
        root = torch.linalg.cholesky(covariance)
        sds = covariance.diagonal().sqrt()
        return {"b": mean + shift * sds + scale * torch.randn(draws, 2) @ root.T}

    return sampler


def mean_field(x, y):
    """The normal with independent coordinates that is closest in reverse KL."""
    mean, covariance = exact(x, y)
    sds = torch.linalg.inv(covariance).diagonal().rsqrt()
    return {"b": mean + sds * torch.randn(199, 2)}


def check(sampler, *, simulations=100, x=X, **options):
    return pf.sbc(regression, x, Y, sampler=sampler, simulations=simulations, draws=199, progress=False, **options)


def test_exact_posteriors_are_uniform():
    found = check(from_exact())
    assert found.is_uniform(0.01)
    assert set(found.p_values()) == {"b[0]", "b[1]", "lp"}
    assert found.coverage()["90%"].to_numpy() == pytest.approx(0.9, abs=0.09)
    assert found.summary()["mean_rank"].to_numpy() == pytest.approx(0.5, abs=0.09)
    assert (found.summary()["p_symmetric"] > 0.01).all()


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "shift"), [(0.6, 0.0), (1.7, 0.0), (1.0, 0.6)])
def test_posteriors_that_are_wrong_are_rejected(scale, shift):
    found = check(from_exact(scale, shift), simulations=60)
    assert not found.is_uniform(0.01)
    assert (found.summary("b")["p_symmetric"].min() < 0.001) == (shift > 0.0)
    assert "not uniform" in str(found)


@pytest.mark.slow
def test_a_mean_field_on_a_correlated_target_is_rejected():
    found = check(mean_field, x=ALIKE)
    assert not found.is_uniform(0.01)
    _, covariance = exact(ALIKE, Y)
    narrower = (torch.linalg.inv(covariance).diagonal() * covariance.diagonal()).rsqrt()
    expected = 2.0 * dist.Normal(0.0, 1.0).cdf(1.96 * narrower) - 1.0
    assert found.coverage("b")["95%"].to_numpy() == pytest.approx(expected.numpy(), abs=0.13)
    assert expected.max() < 0.7


@pytest.mark.slow
def test_the_log_density_sees_what_no_parameter_shows():
    """Draws with the right margins, and without their correlation."""

    def independent(x, y):
        mean, covariance = exact(x, y)
        return {"b": mean + covariance.diagonal().sqrt() * torch.randn(199, 2)}

    p_values = check(independent, x=ALIKE).p_values()
    assert p_values["lp"] < 1e-3
    assert min(p_values["b[0]"], p_values["b[1]"]) > 1e-3
    assert list(check(independent, simulations=20, log_density=False).ranks) == ["b"]


@pytest.mark.slow
def test_fits_are_uniform():
    found = pf.sbc(regression, X, Y, simulations=32, draws=199, progress=False)
    assert found.is_uniform(0.01)
    assert sum(found.statuses.values()) == found.simulations == 32
    assert found.method == "fit"


@pytest.mark.slow
def test_a_guide_is_trained_and_ranked_by_its_own_draws():
    def guide(model):
        return AutoNormal(model, init_scale=0.3)

    options = {"draws": 99, "steps": 60, "learning_rate": 0.05, "progress": False}
    found = pf.sbc(regression, ALIKE, Y, guide=guide, simulations=12, **options)
    assert found.method == "guide"
    assert found.coverage("b")["95%"].max() < 0.9
    assert not list(pyro.get_param_store())


def judged(*, draws):
    """A sampler that returns a posterior of its exact draws."""

    def sampler(x, y):
        mean, covariance = exact(x, y)

        def guide(x, y):
            pyro.sample("b", dist.MultivariateNormal(mean, covariance))

        return pf.diagnose(regression, guide, x, y, draws=draws)

    return sampler


@pytest.mark.slow
def test_a_sampler_may_return_a_posterior():
    found = check(judged(draws=200), simulations=20)
    assert found.statuses == {"ok": 20}


# at the data in hand --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_the_data_in_hand_both_data_sets_count():
    right = check(from_exact(at_hand=(X, Y)), kind="posterior")
    assert right.is_uniform(0.01)
    assert "at the data in hand" in str(right)
    assert not check(from_exact(), kind="posterior").is_uniform(0.01)


def test_the_augmented_model_has_the_likelihood_of_both():
    other = torch.tensor([1.0, 0.0, 0.2, 0.3, -0.4])
    density = pf.LogDensity(Augmented(regression, Case((X, Y), {})), (X, other))
    both = pf.LogDensity(regression, (torch.cat([X, X]), torch.cat([Y, other])))
    z = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    torch.testing.assert_close(density(z), both(z))
    assert set(density.structure.observed) == {"y", "y (at hand)"}


@pytest.mark.slow
def test_fits_at_the_data_in_hand_are_uniform():
    found = pf.sbc(regression, X, Y, kind="posterior", simulations=16, draws=99, progress=False)
    assert found.is_uniform(0.01)
    assert any(name.endswith("posterior_sbc") for name in groups(found.to_arviz()))


def test_an_unreliable_posterior_at_hand_is_refused(monkeypatch):
    def unreliable(*args, **kwargs):
        def guide(x, y):
            pyro.sample("b", dist.Normal(torch.full((2,), 9.0), 0.01).to_event(1))

        return pf.diagnose(regression, guide, X, Y, draws=200)

    monkeypatch.setattr(simulating, "fit", unreliable)
    with pytest.raises(ValueError, match="posterior at the data in hand: unreliable"):
        check(from_exact(), kind="posterior", simulations=10)


# files, groups, figures -----------------------------------------------------------------------------------------------


def stopped_after(count, sampler):
    """The sampler, with Ctrl-C in the call after so many; and the list of its calls."""
    calls = []

    def stopping(x, y):
        calls.append(None)
        if len(calls) == count + 1:
            raise KeyboardInterrupt
        return sampler(x, y)

    return stopping, calls


@pytest.mark.slow
def test_a_run_that_was_stopped_keeps_what_it_has_and_goes_on(tmp_path):
    sampler, calls = stopped_after(20, from_exact())
    file = tmp_path / "ranks.checkpoint"
    with pytest.warns(UserWarning, match=r"sbc: interrupted \(Ctrl-C\) after 20 of 40 .* goes on from the checkpoint"):
        part = check(sampler, simulations=40, checkpoint=file)
    assert len(json.loads(file.read_text())["body"]["done"]) == part.simulations == 20
    assert "The run was interrupted after 20 of 40 simulations." in str(part)
    found = check(sampler, simulations=40, checkpoint=file)
    assert len(calls) == 21 + 20
    with seeded(5):
        whole = check(sampler, simulations=40)
    assert (found.ranks["b"] == whole.ranks["b"]).all()
    assert (part.ranks["b"] == whole.ranks["b"][:20]).all()
    assert "interrupted" not in str(found)
    assert [path.name for path in Path(tmp_path).iterdir() if path.suffix == ".checkpoint"] == ["ranks.checkpoint"]


def test_a_run_that_was_stopped_before_its_first_simulation_raises():
    with pytest.raises(KeyboardInterrupt):
        check(stopped_after(0, from_exact())[0], simulations=10)


def test_an_interrupted_run_counts_fits_that_were_to_be_made_again(tmp_path, monkeypatch):
    """To leave them out would be to leave out the failures. When it goes on, they are made again."""
    side_by_side, fit_each = Many._side_by_side, fit_many.fit_each
    alone = []

    def two_fail(many, numbers, bar):
        for number, found in zip(numbers, side_by_side(many, numbers, bar), strict=True):
            bad = replace(found.verdict, status="unreliable") if number in (2, 5) else found.verdict
            yield replace(found, verdict=bad)

    def stopped(model, cases, *rest):
        for number, posterior in fit_each(model, cases, *rest):
            alone.append(number)
            yield number, posterior
            if alone == [2]:
                raise KeyboardInterrupt

    def run(**options):
        return pf.sbc(regression, X, Y, simulations=10, draws=99, progress=False, **options)

    monkeypatch.setattr(Many, "_side_by_side", two_fail)
    monkeypatch.setattr(fit_many, "fit_each", stopped)
    file = tmp_path / "ranks.checkpoint"
    with pytest.warns(UserWarning, match="after 9 of 10 simulations"):
        part = run(checkpoint=file)
    assert part.simulations == 10
    assert part.statuses["unreliable"] == 1
    found = run(checkpoint=file)
    assert alone == [2, 5]
    assert "unreliable" not in found.statuses
    whole = run()
    assert alone == [2, 5, 2, 5]
    assert (found.ranks["b"] == whole.ranks["b"]).all()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "ranks.checkpoint"
    sampler = from_exact()
    check(sampler, simulations=10, checkpoint=file)
    for options in ({"simulations": 11}, {"simulations": 10, "seed": 1}, {"simulations": 10, "x": ALIKE}):
        with pytest.raises(ValueError, match=r"expected one of this call, got .* of another \(different: "):
            check(sampler, checkpoint=file, **options)
    file.write_bytes(file.read_bytes().replace(b"not judged", b"not_judged", 1))
    with pytest.raises(ValueError, match="damaged"):
        check(sampler, simulations=10, checkpoint=file)


def test_ranks_go_to_arviz_as_simuk_has_them():
    def model(x, y):
        with pyro.plate("column", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ b, NOISE), obs=y)

    found = pf.sbc(model, X, Y, sampler=from_exact(), simulations=20, draws=199, progress=False)
    group = found.to_arviz()["prior_sbc"]
    assert group["b"].dims == ("chain", "draw", "column")
    assert dict(group.sizes) == {"chain": 1, "draw": 20, "column": 2}
    assert (group["b"].to_numpy()[0] == found.ranks["b"]).all()
    assert group["b"].dtype.kind == "i"
    assert 0 <= int(group["b"].min()) <= int(group["b"].max()) <= 199


def test_unreliable_fits_are_counted_and_said():
    def bad(x, y):
        def guide(x, y):
            pyro.sample("b", dist.Normal(torch.full((2,), 9.0), 0.01).to_event(1))

        return pf.diagnose(regression, guide, x, y, draws=200)

    found = check(bad, simulations=10)
    assert found.statuses == {"unreliable": 10}
    assert "10 of the fits were unreliable (100%)" in str(found)


# errors ---------------------------------------------------------------------------------------------------------------


def test_draws_have_to_fit():
    with pytest.raises(ValueError, match="none of 'b'"):
        check(lambda x, y: {"q": y}, simulations=10)
    with pytest.raises(ValueError, match=r"199 or more draws of 'b', each of shape \(2,\), got shape \(50, 2\)"):
        check(from_exact(draws=50), simulations=10)
    with pytest.raises(ValueError, match=r"199 or more draws of 'b'.*got shape \(100, 2\)"):
        check(judged(draws=100), simulations=10)


def test_draws_of_a_posterior_without_its_model_are_ranked(tmp_path):
    posterior = judged(draws=200)(X, Y)
    posterior.save(tmp_path / "saved")
    loaded = pf.load(tmp_path / "saved")
    found = check(lambda *_: loaded, simulations=10)
    assert found.statuses == {"ok": 10}
    assert found.ranks["b"].tolist() == check(lambda *_: posterior, simulations=10).ranks["b"].tolist()


def test_models_that_cannot_be_simulated_are_refused():
    def factor(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.factor("more", -mu.square())

    def improper(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def nothing(y):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0))

    for model, text in (
        (factor, "'more': a factor"),
        (improper, "proper priors"),
        (nothing, "expected observed sites"),
    ):
        with pytest.raises(ValueError, match=text):
            pf.sbc(model, torch.tensor(0.4), simulations=10, progress=False)


def test_bad_options_are_named():
    for options, text in (({"kind": "postrior"}, "posterior"), ({"guide": AutoNormal, "sampler": mean_field}, "guide")):
        with pytest.raises(ValueError, match=text):
            pf.sbc(regression, X, Y, progress=False, **options)
    with pytest.raises(ValueError, match="var_names"):
        check(from_exact(), simulations=10).p_values("c")


def test_the_table_and_the_sentence_show_in_a_notebook():
    found = check(from_exact(), simulations=20)
    assert "<table" in found._repr_html_()
    assert "20 not judged" in str(found)
