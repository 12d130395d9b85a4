"""The benchmark of named models: references fit their models, and lies are counted."""

import json

import numpy as np
import pytest
import torch

import pyro_flows as pf
from benchmarks import tables
from benchmarks.named import running as named


@pytest.mark.parametrize("name", ["seeds", "lkj_effects"])
def test_reference_moments_are_those_of_the_models_sites(name):
    reference = json.loads(named.REFERENCE.read_text(encoding="utf-8"))[name]
    density = pf.LogDensity(named.MODELS[name].model, named.MODELS[name].data())
    shapes = {latent.name: tuple(latent.shape) for latent in density.structure.latents}
    assert {site: np.shape(found["mean"]) for site, found in reference["sites"].items()} == shapes
    assert reference["r_hat"] < 1.01
    assert reference["divergent"] == 0
    middle = {site: torch.tensor(found["mean"])[None].double() for site, found in reference["sites"].items()}
    if name == "seeds":  # means of Cholesky factors are none
        assert bool(torch.isfinite(density(density.unconstrain(middle))).all())


@pytest.mark.parametrize("name", ["factor_36", "items_76", "mirrored_20"])
def test_mirrored_models_are_mirrored(name):
    density = pf.LogDensity(named.MODELS[name].model, named.MODELS[name].data())
    z = torch.randn(5, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = density.constrain(z)
    flipped = {site: -x if site in ("loading", "score", "ability") else x for site, x in values.items()}
    assert torch.allclose(density(density.unconstrain(flipped)), density(z), rtol=0, atol=1e-8)


def row(**given):
    return {**dict.fromkeys(named.FIELDS, ""), "model": "seeds", "runs": "1", "seed": "0", "version": "v", **given}


def test_a_wrong_fit_that_is_not_called_so_is_counted():
    good = row(status="ok", mean_error="0.05", sd_error="0.09", k_hat="0.1", seconds="3")
    rows = [good, row(**{**good, "seed": "1", "sd_error": "0.2"}), row(**{**good, "seed": "2", "status": "unreliable"})]
    assert [named.right(each) for each in rows] == [True, False, True]
    text = named.section(rows, tables.table, tables.about)
    assert "| seeds | 1 |  | 0.05 | 0.20 | 0.10 |  | 2 ok, 1 unreliable | 1 | 3 |" in text


def test_halves_are_judged_by_the_share_of_draws_on_one_side():
    assert named.right(row(left="0.55"))
    assert not named.right(row(left="0.75"))
    assert not named.right(row(status="ok"))  # a fit that failed has neither
