"""Saved posteriors: what is there after loading, with a model and without, and what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from pyro_flows.amortization import files as amortized
from pyro_flows.densities import files as density
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.posterior.export.files import FILES
from pyro_flows.priors import fitted as prior
from pyro_flows.support.files import bundles
from tests.posteriors import (
    NETCDF,
    OFF,
    SCHOOLS,
    TENSORS,
    TEXT,
    Y,
    exact,
    line,
    line_guide,
    same_group,
    schools,
    schools_flow,
    schools_posterior,
)
from tests.slow import rest_slow

# Many posteriors here are of guides that were not trained: what is tested is what a file keeps of them.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")

NAMES = {NETCDF, TENSORS, TEXT}
FIELDS = ("z", "log_p", "log_q", "log_weights", "_used", "_used_log_p", "_used_log_q", "losses")


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(1)
    posterior = pf.diagnose(schools, schools_flow(), Y, draws=1000)
    trained = {"losses": torch.tensor([3.0, 2.5]), "history": ({"stage": "training", "elbo": -2.5},)}
    return type(posterior)(**{**vars(posterior), **trained})


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("posterior") / "saved"
    fitted.save(path)
    return path


def same_trees(one, other):
    groups = [set(tree._groups(True)[0]) for tree in (one, other)]
    assert groups[0] == groups[1]
    for name, group in one._groups(True)[0].items():
        same_group(group, other._groups(True)[0][name])


def test_files(saved):
    assert {path.name for path in saved.iterdir()} == NAMES
    text = json.loads((saved / TEXT).read_text(encoding="utf-8"))
    assert text["format"] == "pyro_flows posterior"
    assert text["guide"]["flow"]["builder"] == "realnvp"
    tensors = torch.load(saved / TENSORS, weights_only=True)
    assert set(tensors) == {*(field.removeprefix("_") for field in FIELDS), "samples", "flow"}


def test_without_a_model(fitted, saved):
    again = pf.load(saved)
    for name in FIELDS:
        assert torch.equal(getattr(again, name), getattr(fitted, name)), name
    assert list(again.samples) == list(fitted.samples)
    assert all(torch.equal(again.samples[name], fitted.samples[name]) for name in fitted.samples)
    assert again.verdict == fitted.verdict
    assert (again.k_hat, again.ess, again.elbo) == (fitted.k_hat, fitted.ess, fitted.elbo)
    assert again.history == fitted.history
    assert again.settings == fitted.settings
    assert again.coordinates == fitted.coordinates
    assert again.guide is None
    assert again.density is None
    assert again.missing == {"guide": "loaded without a model", "density": "loaded without a model"}
    assert str(again) == str(fitted)
    assert again.summary().equals(fitted.summary())
    assert again.assign_coords({"school": list("abcdefgh")}).summary("theta").index[0] == "theta[a]"


def test_arviz_object_without_a_model(fitted, saved):
    again = pf.load(saved)
    same_trees(fitted, again)
    tree = again.to_arviz(coords={"school": list("abcdefgh")}, predictive=False)
    assert tree["posterior"]["school"].values.tolist() == list("abcdefgh")
    assert tree.attrs == fitted.to_arviz(predictive=False).attrs
    with pytest.raises(KeyError):
        tree["prior"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_is_rebuilt(dtype, tmp_path):
    guide = schools_flow(dtype)
    posterior = pf.diagnose(schools, guide, Y.to(dtype), draws=500)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    assert again.flow is not None
    assert again.flow.recipe == guide._flow.recipe
    assert next(again.flow.parameters()).dtype == dtype
    points = torch.randn(5, SCHOOLS, dtype=dtype)
    torch.testing.assert_close(again.flow.log_prob(points), guide._flow.log_prob(points), rtol=0, atol=0)
    assert not torch.allclose(guide._flow.log_prob(points), schools_flow(dtype)._flow.log_prob(points), atol=1e-6)


def test_with_the_model(fitted, saved):
    again = pf.load(saved, schools, Y)
    assert again.missing == {}
    points = {"theta": torch.randn(4, SCHOOLS)}
    torch.testing.assert_close(again.guide.log_prob(points), fitted.guide.log_prob(points), rtol=0, atol=0)
    torch.testing.assert_close(again.flow.log_prob(points["theta"]), again.guide.log_prob(points))
    assert again.flow is again.guide._flow
    torch.testing.assert_close(again.density(again.z), fitted.log_p, rtol=1e-6, atol=1e-5)
    assert torch.equal(again.predictive(draws=9)["y"], fitted.predictive(draws=9)["y"])
    same_trees(fitted, again)
    second = again.guide.sample_posterior(3)["theta"]
    assert second.shape == (3, SCHOOLS)


def test_with_keyword_arguments(tmp_path):
    x = torch.linspace(0.1, 1.0, 20)
    posterior = exact(line, line_guide, x, 2 * x)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", line, model_kwargs={"x": x, "y": 2 * x})
    assert again.predictive(torch.tensor([2.0]), draws=5)["y"].shape == (5, 1)


def test_the_largest_weights_may_be_equal(tmp_path):
    """Pareto smoothing puts quantiles above the largest weight onto it, so that several ratios have one weight."""
    schools_posterior("ok").save(tmp_path / "first")
    posterior = pf.load(tmp_path / "first")  # without its model, so its densities are those that are given
    level = -((torch.arange(len(posterior.z)) + 0.5) / len(posterior.z)).log()
    ratio = torch.where(level < 4.5, level, 3.6 + 0.2 * level)
    weights, _ = psis(ratio)
    assert int((weights == weights.max()).sum()) > 2
    dataclasses.replace(posterior, log_p=posterior.log_q + ratio, log_weights=weights).save(tmp_path / "saved")
    assert torch.equal(pf.load(tmp_path / "saved").log_weights, weights)


@pytest.mark.parametrize("name", rest_slow(["prior", "fit", "posterior", "chain", "draw"], ("fit", "draw").count))
def test_a_site_may_have_the_name_of_a_group_or_dimension(name, tmp_path):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample(name, dist.Normal(0.0, 1.0)), 1.0), obs=y)

    posterior = pf.diagnose(model, lambda y: pyro.sample(name, dist.Normal(0.5, 0.7)), torch.tensor(1.0), draws=200)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    assert torch.equal(again.samples[name], posterior.samples[name])
    same_trees(posterior, again)


@pytest.mark.parametrize("status", list(OFF))
def test_every_status_comes_back(status, tmp_path):
    posterior = schools_posterior(status, draws=500)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    assert again.verdict == posterior.verdict
    same_trees(posterior, again)
    if status == "corrected":
        with pytest.raises(ValueError, match=r"this needs the model: load\(path, model, \*args\)"):
            again.resample()
        assert torch.equal(pf.load(tmp_path / "saved", schools, Y).resample()["theta"], posterior.resample()["theta"])
    if status == "ok":
        assert torch.equal(again.resample(7)["theta"], posterior.resample(7)["theta"])


def test_numbers_that_are_not_finite_come_back(tmp_path):
    def model(y):
        pyro.sample("x", dist.Uniform(0.0, 1.0))
        pyro.factor("nowhere", torch.tensor(-torch.inf))

    def guide(y):
        pyro.sample("x", dist.Uniform(0.0, 1.0))

    posterior = pf.diagnose(model, guide, None, draws=100)
    assert posterior.k_hat == float("inf")
    posterior.save(tmp_path / "saved")
    json.loads((tmp_path / "saved" / TEXT).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = pf.load(tmp_path / "saved")
    assert again.k_hat == float("inf")
    assert again.log_evidence == float("-inf")
    assert np.isnan(again.verdict.mean_shift)


# what a loaded posterior lacks ----------------------------------------------------------------------------------------


def test_own_bijections_are_named_as_missing(tmp_path):
    own = pf.Flow(pf.transforms.Compose([pf.transforms.Planar(SCHOOLS)]))
    guide = pf.AutoFlow(schools, own).initialize(Y)
    pf.diagnose(schools, guide, Y, draws=200).save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", schools, Y)
    assert again.flow is None
    assert again.guide is None
    assert "its bijection is not one of the builders'" in again.missing["flow"]
    assert again.density is not None


def test_other_guides_are_named_as_missing(tmp_path):
    guide = AutoNormal(schools)
    posterior = pf.diagnose(schools, guide, Y, draws=200)
    assert posterior.missing == {"flow": "the guide (AutoNormal) is not a flow guide of pyro_flows"}
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    assert again.missing["flow"] == posterior.missing["flow"]
    assert again.guide_name == "AutoNormal"


def test_a_loaded_posterior_can_be_saved_again(saved, fitted, tmp_path):
    pf.load(saved).save(tmp_path / "copy")
    twice = pf.load(tmp_path / "copy")
    same_trees(fitted, twice)
    assert torch.equal(twice.z, fitted.z)
    assert twice.flow is not None


# what is refused ------------------------------------------------------------------------------------------------------


def test_only_own_directories_are_overwritten(fitted, saved, tmp_path):
    fitted.save(saved)  # its own, once more
    assert {path.name for path in saved.iterdir()} == NAMES
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"holds other files and no saved posterior\. Name a new or empty directory"):
        fitted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"path: expected a directory, .*thesis.tex' is a file"):
        fitted.save(tmp_path / "thesis.tex")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TEXT).write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="holds other files"):
        FILES.check_target(tmp_path / "other")
    assert FILES.check_target(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"


@pytest.mark.parametrize("lost", sorted(NAMES))
def test_missing_files_are_named(saved, tmp_path, lost):
    for name in NAMES - {lost}:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    with pytest.raises(ValueError, match=f"expected the directory of a saved posterior, .*{lost} missing"):
        pf.load(tmp_path)
    with pytest.raises(ValueError, match=r"guide\.pt, posterior\.json missing"):
        pf.load(tmp_path / "nowhere")


READERS = {
    "pf.load": pf.load,
    "pf.Amortized.load": lambda path: pf.Amortized.load(path, schools),
    "pf.DensityFit.load": pf.DensityFit.load,
    "pf.FittedPrior.load": pf.FittedPrior.load,
}


@pytest.mark.parametrize("bundle", [FILES, amortized.FILES, density.FILES, prior.FILES], ids=lambda one: one.what)
def test_a_directory_of_another_kind_names_what_reads_it(bundle, tmp_path):
    bundle.write(tmp_path, {}, dict.fromkeys(bundle.others, b""))
    own, others = bundles.READERS[bundle.format], dict(READERS)
    del others[own]
    for name, read in others.items():
        with pytest.raises(ValueError, match=rf"It is a saved {bundle.what}: read it with {own}\.$"):
            read(tmp_path)
        assert name in bundles.READERS.values()


def copy_with(saved, target, **changes):
    for name in NAMES:
        (target / name).write_bytes((saved / name).read_bytes())
    text = json.loads((target / TEXT).read_text(encoding="utf-8"))
    (target / TEXT).write_text(json.dumps({**text, **changes}), encoding="utf-8")
    return target


def test_other_versions_are_refused(saved, tmp_path):
    with pytest.raises(
        ValueError, match=r"format version 99, this release of pyro_flows reads version 3\. Read it with"
    ):
        pf.load(copy_with(saved, tmp_path, version=99))
    with pytest.raises(ValueError, match=r"posterior\.json was not written by pyro_flows"):
        pf.load(copy_with(saved, tmp_path, format="other"))


def test_another_model_or_other_data_are_refused(saved):
    with pytest.raises(ValueError, match=r"model: its log density differs by up to .* nats from the saved one"):
        pf.load(saved, schools, Y + 1)
    with pytest.raises(ValueError, match=r"model: expected the unconstrained coordinates \['theta\[0\]'"):
        pf.load(saved, line, Y)
    pf.load(saved, schools, Y.clone())


def test_saving_and_loading_are_silent_and_leave_the_random_state(fitted, tmp_path):
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.save(tmp_path / "saved")
        pf.load(tmp_path / "saved", schools, Y)
    assert torch.equal(before, torch.get_rng_state())
