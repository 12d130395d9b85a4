"""Every result names the method that made it: told from the sampler, and said wherever a result is shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.gaussian_conditionals import nested
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.parts import location_scale, marginals, sliced
from pyro_flows.flows.recipe import PARTS, start_at, with_affine
from pyro_flows.inference.verdict import methods
from pyro_flows.inference.verdict.methods import WORKS, bibtex, named
from pyro_flows.posterior.export.methods_text import OF_BUILDERS, is_affine, method_of, methods_text
from tests.posteriors import Y, location, schools, schools_chains, schools_flow, schools_posterior


def started(builder, **options):
    """A flow of a guide, begun at a Gaussian far from zero and in small units."""
    flow = with_affine(builder(3, base="student_t", df=15.0, **options), "tril")
    start_at(flow, torch.tensor([1e4, -3.0, 0.0]), torch.tensor([1e-1, 1e3, 1.0]))
    return flow


def moved(flow, by=0.02):
    """A flow all of whose parameters have moved, as by a few steps of training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return flow


@pytest.mark.parametrize("builder", [pf.realnvp, pf.nice, pf.planar, pf.spline])
def test_a_flow_at_its_start_is_a_gaussian_and_a_trained_one_is_not(builder):
    flow = started(builder)
    assert method_of(flow) == methods.GAUSSIAN
    assert method_of(flow.double()) == methods.GAUSSIAN
    assert method_of(moved(started(builder))) == methods.TRAINED


def test_samplers_of_each_kind():
    each = sliced(3), nested(3, held=(0,), entries=2), marginals(3), moved(location_scale(3))
    assert [method_of(one) for one in each] == [
        methods.GRID,
        methods.CONDITIONALS,
        methods.INDEPENDENT,
        methods.GAUSSIAN,
    ]
    assert method_of(marginals(1)) == methods.TABULATED
    parts = [location_scale(2), moved(location_scale(2))]
    assert method_of(FlowMixture(parts)) == methods.MIXTURE
    assert method_of(FlowMixture(parts, [Component(1)])) == methods.GAUSSIAN
    assert method_of(FlowMixture([moved(started(pf.realnvp))])) == methods.TRAINED
    assert not is_affine(moved(started(pf.realnvp), by=1e-3))


def test_builders_of_methods_are_registered():
    assert set(OF_BUILDERS) <= set(PARTS)
    assert len(OF_BUILDERS) == sum(bool(method.builder) for method in methods.METHODS.values())


def test_a_method_without_a_sentence_of_its_own_is_described_by_its_meaning(gaussian, monkeypatch):
    builder = gaussian.flow.recipe.builder
    monkeypatch.setitem(methods.METHODS, "new", methods.Method("a new map", "the map's", ("Rue2009",), builder))
    monkeypatch.setitem(OF_BUILDERS, builder, "new")
    assert method_of(gaussian.flow) == "new"
    posterior = replace(gaussian, verdict=replace(gaussian.verdict, guide_method="new"))
    assert "The approximation was a new map (Rue et al. 2009). " in methods_text(posterior)


def test_a_uniform_cube_is_no_gaussian():
    assert method_of(pf.Flow(location_scale(2).bijection, dim=2, base="uniform")) == methods.TRAINED


# fits -----------------------------------------------------------------------------------------------------------------


def bent():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z - x**2, 0.5), obs=torch.tensor(0.0))


@pytest.fixture(scope="module")
def gaussian():
    return pf.fit(location, torch.tensor([0.3, 1.2, 0.8]), draws=400, progress=False)


@pytest.fixture(scope="module")
def grid():
    return pf.fit(bent, draws=400, progress=False)


def test_what_was_asked_stays(gaussian, grid):
    assert (gaussian.method, grid.method) == ("Gaussian", "conditional Laplace grid")
    for posterior in (gaussian, grid):
        assert posterior.settings["flow"] == "auto"
    assert grid.settings["sampler"]["builder"] == "sliced"
    asked = pf.fit(location, torch.zeros(3), flow="nice", layers=2, draws=200, progress=False)
    assert (asked.method, asked.settings["asked"]) == ("Gaussian", {"flow": "nice", "layers": 2})


@pytest.mark.parametrize("name", ["gaussian", "grid"])
def test_the_method_stands_wherever_a_result_is_shown(name, request, tmp_path):
    posterior = request.getfixturevalue(name)
    method = posterior.method
    first, verdict = str(posterior).splitlines()
    assert f": {method}, 400 draws, " in first
    assert verdict.startswith(f"ok: {method} (k-hat ")
    assert method in posterior._repr_html_().partition("<table")[0]
    assert posterior.to_arviz(predictive=False).attrs["method"] == method
    assert method in pf.plots.plot_posterior(posterior).get_suptitle()
    pairs = pf.plots.plot_pairs if len(posterior.samples) > 1 else pf.plots.plot_posterior
    assert f"{method} (ok)" in str([text.get_text() for text in both(pairs, posterior).findobj(_text())])
    page = posterior.report(tmp_path / "report.html", predictive=False).read_text()
    assert f"Method: {method}." in page
    assert posterior.methods_text().partition("(")[0] in page
    posterior.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "posterior.json").read_text())["verdict"]["guide_method"] == method
    loaded = pf.load(tmp_path / "saved")
    assert loaded.method == method
    assert loaded.to_arviz().attrs["method"] == method
    assert loaded.methods_text() == posterior.methods_text()
    assert loaded.references() == posterior.references()


def _text():
    from matplotlib.text import Text

    return Text


def both(draw, posterior):
    """A figure of a posterior and of another one, with a legend."""
    names = list(posterior.samples)
    chosen = names[:2] if draw is pf.plots.plot_pairs else [names]
    other = {"compare": posterior} if draw is pf.plots.plot_pairs else {}
    return draw(posterior if other else {posterior.method: posterior, "again": posterior}, *chosen, **other)


def test_guides_chains_and_refinements():
    guide = pf.diagnose(schools, schools_flow(), Y, draws=400)
    assert guide.method == "guide"
    assert "guide (AutoFlow), " in str(guide)
    refined = schools_chains()
    assert (refined.method, refined.verdict.guide_method) == ("MCMC", "guide")
    assert str(refined.verdict).startswith("refined: MCMC, converged (R-hat 1.")
    assert refined.to_arviz(predictive=False).attrs["method"] == "MCMC"
    draws = {"mu": 0.4 * torch.randn(4, 300, generator=torch.Generator().manual_seed(0))}
    chains = pf.from_mcmc(draws, location, torch.zeros(4))
    assert chains.method == "MCMC"
    assert str(chains.verdict).startswith("ok: MCMC (R-hat 1.0")
    assert "ELBO" not in str(chains)


# evidence that nothing supports ---------------------------------------------------------------------------------------


def test_no_evidence_of_chains_whose_guide_has_poor_weights():
    refined = schools_chains()
    assert refined.verdict.k_hat > refined.verdict.k_threshold
    assert "evidence" not in str(refined)
    good = schools_posterior("ok", draws=500).refine(max_steps=400)
    assert "log evidence" in str(good)
    assert "ELBO" not in str(good)


# text for papers ------------------------------------------------------------------------------------------------------


def test_a_paragraph_says_what_was_done(gaussian, grid):
    for posterior, words in (
        (gaussian, ("a Gaussian (an affine map of a Student-t base with 60 degrees of freedom)", "Zhang et al. 2022")),
        (grid, ("tabulated", f"on a grid of {grid.settings['sampler']['slices']} values (Rue et al. 2009)")),
        (schools_posterior("corrected", draws=400), ("guide of the authors' own", "were importance-resampled")),
        (schools_posterior("unreliable", draws=400), ("The result is unreliable, and should not be reported: k-hat",)),
    ):
        text = posterior.methods_text()
        for word in (*words, f"k-hat was {posterior.verdict.k_hat:.2f}", f"pyro_flows {pf.__version__}", "PyTorch"):
            assert word in text
        assert f"The seed was {posterior.settings['seed']}." in text
        assert f"{4 * posterior.settings['draws']:,} draws were weighted" in text


def test_a_paragraph_states_the_threshold_that_decided():
    found = schools_posterior("unreliable", draws=400)
    why = ("k-hat 0.54 is not below 0.5 and weighting changes the results, so the weights have infinite variance",)
    told = {"k_hat": 0.54, "k_threshold": 0.7, "mean_shift": 0.004, "sd_shift": 0.3, "reasons": why}
    text = replace(found, verdict=replace(found.verdict, **told)).methods_text()
    assert "k-hat was 0.54 (threshold 0.50)" in text
    assert (
        "no mean by 0.01 posterior standard deviations or more, and no standard deviation by a factor of 1.35" in text
    )
    assert f"should not be reported: {why[0]}" in text
    assert "the search for missed modes" not in text


def test_a_paragraph_tells_of_runs(gaussian):
    assert "runs" not in gaussian.methods_text()
    twice = replace(gaussian, settings={**gaussian.settings, "runs": 2})
    assert "2 independent runs agreed." in twice.methods_text()
    reasons = ("runs disagree on x (R-hat 1.20)",)
    differ = replace(twice, verdict=replace(gaussian.verdict, status="corrected", reasons=reasons))
    assert "2 independent runs disagreed" in differ.methods_text()


@pytest.mark.slow
def test_a_paragraph_on_chains():
    refined = schools_posterior("unreliable", draws=500).refine("hmc", max_steps=400)
    text, figures = refined.methods_text(), refined.verdict.chains
    for word in (f"{figures.chains} Markov chains of Hamiltonian Monte Carlo", f"R-hat was {figures.r_hat:.3f}"):
        assert word in text
    assert f"effective sample size {figures.ess_bulk:.0f} in the bulk" in text
    assert "k-hat" not in text
    assert {"Neal2011", "Vehtari2021", "Margossian2024"} <= cited(refined.references())
    assert "Robnik2023" in cited(schools_posterior("ok", draws=500).refine(max_steps=400).references())


def cited(entries):
    return set(re.findall(r"^@\w+\{(\w+),", entries, flags=re.MULTILINE))


def test_only_what_is_cited_is_listed(gaussian, grid):
    for posterior in (gaussian, grid):
        text, keys = posterior.methods_text(), cited(posterior.references()) - {"pyro_flows"}
        assert keys == {key for key in WORKS if named(key) in text}


def test_each_work_has_an_address_and_balanced_braces():
    for key, (_, _, _, year, where) in WORKS.items():
        assert {"eprint", "doi"} & set(where), key
        assert key.endswith(str(year))
        entry = bibtex([key], "0")
        assert entry.count("{") == entry.count("}")
        assert entry.isascii(), "BibTeX wants escapes of LaTeX"
        assert {"journal", "volume"} <= set(where) or "journal" not in where or key == "Margossian2024"
    for method in methods.METHODS.values():
        assert set(method.cites) <= set(WORKS)
