"""Labels that a posterior keeps: in tables, ArviZ objects, files and pickles."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import pyro_flows as pf
from tests.posteriors import Y, schools, schools_posterior

NAMES = list("ABCDEFGH")


def first(posterior):
    return posterior.summary().index[0]


@pytest.fixture
def labeled():
    return schools_posterior("ok", draws=200).assign_coords({"school": NAMES})


@pytest.mark.slow
def test_labels_are_kept_and_the_posterior_is_not_changed(labeled, tmp_path):
    plain = schools_posterior("ok", draws=200)
    assert first(plain.assign_coords({"school": torch.arange(10, 18)})) == "theta[10]"
    assert first(plain) == "theta[0]"
    assert first(labeled) == "theta[A]"
    assert first(pickle.loads(pickle.dumps(labeled))) == "theta[A]"
    groups = labeled.to_arviz()
    for group in ("posterior", "observed_data", "log_likelihood", "posterior_predictive", "prior"):
        assert groups[group]["school"].to_numpy().tolist() == NAMES, group
    labeled.save(tmp_path / "saved")
    assert first(pf.load(tmp_path / "saved")) == "theta[A]"
    loaded = pf.load(tmp_path / "saved", schools, Y)
    assert first(loaded.refine(max_steps=50)) == "theta[A]"
    assert first(pf.load(tmp_path / "saved").assign_coords({"school": NAMES[::-1]})) == "theta[H]"


def test_names_of_dimensions(labeled):
    renamed = labeled.assign_coords(dims={"theta": ["place"]})
    assert first(renamed) == "theta[A]"
    assert first(renamed.assign_coords({"place": np.arange(8) * 10})) == "theta[0]"
    assert list(renamed.assign_coords({"place": np.arange(8) * 10}).summary("theta").index)[-1] == "theta[70]"
    assert "double[A]" in renamed.summary().index
