"""Unknown keywords: the error lists the options, suggests the nearest, and says where data go."""

from __future__ import annotations

from typing import Any

import pytest

import pyro_flows as pf


@pytest.mark.parametrize(
    ("function", "wrong", "near"),
    [
        (pf.fit, "max_step", "max_steps"),
        (pf.diagnose, "draw", "draws"),
        (pf.fit_many, "job", "jobs"),
        (pf.sbc, "simulation", "simulations"),
        (pf.prior_predictive, "drawn", "draws"),
        (pf.fit_density, "sead", "seed"),
        (pf.compare, "site", "sites"),
        (pf.from_mcmc, "sead", "seed"),
        (pf.load, "model_kwarg", "model_kwargs"),
    ],
)
def test_an_unknown_keyword_lists_the_options(function, wrong, near):
    keywords: dict[str, Any] = {wrong: 1}
    with pytest.raises(TypeError, match=rf"no option '{wrong}'\. Did you mean '{near}'\? Options: .*{near}"):
        function(**keywords)


@pytest.mark.parametrize(
    ("method", "wrong", "near"),
    [
        ("refine", "max_step", "max_steps"),
        ("loo", "site", "sites"),
        ("evidence", "drawn", "draws"),
        ("summary", "var_name", "var_names"),
        ("predictive", "model_kwarg", "model_kwargs"),
        ("to_arviz", "coord", "coords"),
    ],
)
def test_methods_of_a_posterior_list_theirs(method, wrong, near):
    keywords: dict[str, Any] = {wrong: 1}
    with pytest.raises(TypeError, match=rf"{method}: no option '{wrong}'\. Did you mean '{near}'\? Options: .*{near}"):
        getattr(pf.Posterior, method)(object(), **keywords)


def test_it_says_where_data_go():
    with pytest.raises(TypeError, match=r"no option 'y'\. Options: .* Data go by position, or in model_kwargs"):
        pf.fit(lambda y: None, y=1)


@pytest.mark.parametrize("kind", [pf.DensityFit, pf.FittedPrior, pf.Amortized])
def test_methods_of_a_class_check_theirs(kind):
    more = [lambda y: None] * (kind is pf.Amortized)
    with pytest.raises(ValueError, match="path: expected a path, got None"):
        kind.load(None, *more)
    with pytest.raises(TypeError, match=r"load: no option 'paht'\. Did you mean 'path'"):
        kind.load(*more, paht="saved")
