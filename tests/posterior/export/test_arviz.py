"""The ArviZ object: groups, names of dimensions, values, and what ArviZ's own functions make of it; 0.x and 1.x."""

import importlib
import json
import logging
import warnings
from importlib.metadata import version

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from tests.posteriors import (
    SCHOOLS,
    SPREAD,
    Y,
    any_posterior,
    exact,
    location,
    location_guide,
    schools_flow,
    schools_posterior,
)
from tests.posteriors import schools as schools_model

# Many posteriors here are of untrained guides: what is tested is the form of the object.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")

OLD = int(version("arviz").split(".")[0]) < 1
ALWAYS = {"posterior", "sample_stats", "log_prior", "unconstrained_posterior", "fit"}
DRAWN = {"posterior_predictive", "prior", "prior_predictive"}


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("arviz")


@pytest.fixture(scope="module")
def schools():
    return schools_posterior("ok")


@pytest.fixture(scope="module")
def corrected():
    return schools_posterior("corrected")


def groups(tree):
    """The names of groups, of either kind of object."""
    return set(tree.groups()) if OLD else {name.strip("/") for name in tree.groups} - {""}


def sizes(tree, group, name):
    values = tree[group][name]
    return dict(zip(values.dims, values.shape, strict=True))


# the object -----------------------------------------------------------------------------------------------------------


def test_groups(schools, corrected):
    expected = ALWAYS | DRAWN | {"log_likelihood", "observed_data"}
    assert groups(schools.to_arviz()) == expected
    assert groups(schools.to_arviz(predictive=False)) == expected - DRAWN
    assert groups(corrected.to_arviz()) == expected | {"raw_posterior", "raw_sample_stats"}


def test_attributes_are_numbers_and_strings(corrected):
    attrs = corrected.to_arviz(predictive=False).attrs
    assert all(type(value) in (int, float, str) for value in attrs.values())
    assert attrs["status"] == "corrected"
    assert attrs["sampling"] == "psis-resampled"
    assert attrs["verdict"] == str(corrected.verdict)
    assert (attrs["seed"], attrs["device"], attrs["dtype"]) == (0, "cpu", "float32")
    assert json.loads(attrs["settings"])["draws"] == 2000
    assert attrs["inference_library"] == "pyro_flows"
    assert schools_posterior("ok").to_arviz(predictive=False).attrs["sampling"] == "guide"
    flow = pf.diagnose(schools_model, schools_flow(), Y, draws=500)
    assert flow.to_arviz(predictive=False).attrs["sampling"] == "guide"


def test_draws_are_one_chain_and_as_in_samples(corrected):
    tree = corrected.to_arviz(predictive=False)
    assert sizes(tree, "posterior", "theta") == {"chain": 1, "draw": 2000, "school": SCHOOLS}
    assert sizes(tree, "posterior", "double") == {"chain": 1, "draw": 2000, "school": SCHOOLS}
    np.testing.assert_array_equal(tree["posterior"]["theta"].values[0], corrected.samples["theta"].numpy())
    np.testing.assert_array_equal(tree["unconstrained_posterior"]["theta"].values[0], corrected._used.numpy())
    np.testing.assert_array_equal(tree["raw_posterior"]["theta"].values[0], corrected.z.numpy())
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, Y.numpy())


def test_sample_stats_belong_to_the_draws_of_the_group(schools, corrected):
    shifted = dist.Normal(0.8 * Y + 0.15 * SPREAD, SPREAD).to_event(1)
    tree = corrected.to_arviz(predictive=False)
    for posterior, stats in (("posterior", "sample_stats"), ("raw_posterior", "raw_sample_stats")):
        drawn = torch.as_tensor(tree[posterior]["theta"].values[0])
        log_q, log_p = shifted.log_prob(drawn), corrected.density(drawn)
        source = log_p - corrected.log_evidence if stats == "sample_stats" else log_q  # resampled: the posterior's own
        np.testing.assert_allclose(tree[stats]["log_q"].values[0], source.numpy(), rtol=1e-4)
        np.testing.assert_allclose(tree[stats]["log_p"].values[0], log_p.numpy(), rtol=1e-4)
        np.testing.assert_array_equal(tree[stats]["lp"].values, tree[stats]["log_p"].values)
        assert np.exp(tree[stats]["log_weight"].values).sum() == pytest.approx(1.0)
    assert np.ptp(tree["sample_stats"]["log_weight"].values) == 0  # resampled: equal weights
    assert np.ptp(tree["raw_sample_stats"]["log_weight"].values) > 1
    raw = schools.to_arviz(predictive=False)["sample_stats"]["log_weight"].values[0]
    np.testing.assert_allclose(raw, schools.log_weights.numpy())


def test_prior_and_likelihood_add_up_to_the_log_density():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", 3):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(rate, scale), obs=y)

    posterior = any_posterior(model, torch.tensor([1.0, 2.0, 0.5]))
    tree = posterior.to_arviz(predictive=False)
    total = sum(values.sum(set(values.dims) - {"draw"}) for values in tree["log_prior"].data_vars.values())
    total = total + tree["log_likelihood"]["y"].sum(("chain", "group"))
    jacobian = posterior._used.sum(-1)  # every latent is exp(z)
    expected = posterior._used_log_p - jacobian
    np.testing.assert_allclose(total.values, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_an_evidence_without_support_is_left_out():
    for status in ("ok", "unreliable"):
        assert ("log_evidence" in schools_posterior(status).to_arviz(predictive=False)["fit"]) == (status == "ok")


def test_fit_group_holds_the_course_of_the_fit():
    posterior = pf.diagnose(schools_model, schools_flow(), Y, draws=500)
    trained = posterior.__class__(
        **{**vars(posterior), "losses": torch.tensor([3.0, 2.0]), "settings": {"seed": 0, "seconds": 1.5}}
    )
    group = trained.to_arviz(predictive=False)["fit"]
    assert group["elbo"].dims == ("step",)
    assert group["elbo"].values.tolist() == [-3.0, -2.0]
    assert float(group["k_hat"]) == trained.k_hat
    assert float(group["ess"]) == trained.ess
    assert float(group["seconds"]) == 1.5
    assert "elbo" not in posterior.to_arviz(predictive=False)["fit"]


# names of dimensions --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plates_events_and_phantom_axes():
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("row", 2, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))  # (2, 1): the second axis is no plate's
            pyro.sample("slope", dist.MultivariateNormal(torch.zeros(4), torch.eye(4)))
            with pyro.plate("column", 5, dim=-1):
                pyro.deterministic("sum", level + weights.sum() + torch.zeros(2, 5))
                pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    tree = any_posterior(model, torch.zeros(2, 5)).to_arviz()
    head = {"chain": 1, "draw": 200}
    assert sizes(tree, "posterior", "weights") == {**head, "weights_dim_0": 3}
    assert sizes(tree, "posterior", "level") == {**head, "row": 2}
    assert sizes(tree, "posterior", "slope") == {**head, "row": 2, "slope_dim_0": 4}
    assert sizes(tree, "posterior", "sum") == {**head, "row": 2, "column": 5}
    assert sizes(tree, "log_prior", "slope") == {**head, "row": 2}
    assert sizes(tree, "log_likelihood", "y") == {**head, "row": 2, "column": 5}
    assert sizes(tree, "posterior_predictive", "y") == {**head, "row": 2, "column": 5}
    assert sizes(tree, "prior", "slope") == {"chain": 1, "draw": 500, "row": 2, "slope_dim_0": 4}
    assert sizes(tree, "observed_data", "y") == {"row": 2, "column": 5}
    assert sizes(tree, "unconstrained_posterior", "weights") == {**head, "weights_unconstrained_dim_0": 2}
    assert sizes(tree, "unconstrained_posterior", "level") == {**head, "row": 2}


def test_deterministic_values_with_event_axes_inside_a_plate():
    def model():
        with pyro.plate("unit", 4):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.deterministic("powers", torch.stack([x, x**2, x**3], -1))  # (4, 3)
            pyro.deterministic("declared", torch.stack([x] * 4, -1), event_dim=1)  # (4, 4)
        pyro.deterministic("free", torch.zeros(2))

    tree = any_posterior(model).to_arviz(predictive=False)
    assert tree["posterior"]["powers"].dims == ("chain", "draw", "unit", "powers_dim_0")
    assert tree["posterior"]["declared"].dims == ("chain", "draw", "unit", "declared_dim_0")
    assert tree["posterior"]["free"].dims == ("chain", "draw", "free_dim_0")


def test_names_that_clash_or_hold_slashes():
    def model():
        with pyro.plate("a.x", 3), scope(prefix="a"):
            pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("draw", dist.Normal(0.0, 1.0))

    tree = any_posterior(model).to_arviz()
    assert sizes(tree, "posterior", "a.x") == {"chain": 1, "draw": 200, "a.x_dim": 3}
    assert sizes(tree, "posterior", "draw_") == {"chain": 1, "draw": 200}


@pytest.mark.parametrize("name", ["ci_bound", "variable", ""])
def test_names_that_tables_use_themselves(name, tmp_path):
    def model(plate, site):
        with pyro.plate(plate, 3):
            theta = pyro.sample(site, dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.zeros(3))

    for names in ((name, "x"), ("unit", name)):
        posterior = any_posterior(model, *names)
        table = posterior.summary()
        assert list(table.index) == [f"{names[1] or '_'}[{row}]" for row in range(3)]
        assert not table.isna().any(axis=None)
        assert list(posterior.sensitivity().table.index) == list(table.index)
        posterior.save(tmp_path / "saved")
        assert pf.load(tmp_path / "saved").summary().equals(table)


def test_a_site_with_the_name_of_a_dimension_stays():
    def model():
        with pyro.plate("a_dim_0", 3):
            pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b_dim_0", dist.Normal(0.0, 1.0))

    posterior = any_posterior(model)
    assert len(posterior.summary()) == 6 + 2 + 1
    assert sizes(posterior.to_arviz(predictive=False), "posterior", "a") == {
        "chain": 1, "draw": 200, "a_dim_0": 3, "a_dim_0_": 2
    }  # fmt: skip


def test_masked_entries_are_left_out():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    y = torch.arange(6.0).reshape(2, 3)

    def model(y, mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)

    posterior = any_posterior(model, y, mask)
    tree = posterior.to_arviz()
    entries = {"y_observed_entry": 4}
    for group in ("log_likelihood", "posterior_predictive"):
        assert sizes(tree, group, "y_observed") == {"chain": 1, "draw": 200, **entries}
    assert tree["observed_data"]["y_observed"].values.tolist() == [0.0, 2.0, 3.0, 4.0]
    assert tree["observed_data"]["y_observed_entry"].values.tolist() == ["0,0", "0,2", "1,0", "1,1"]
    mu = posterior.samples["mu"]
    expected = dist.Normal(mu[:, None], 1.0).log_prob(y[mask])
    np.testing.assert_allclose(tree["log_likelihood"]["y_observed"].values[0], expected.numpy(), rtol=1e-4)
    assert sizes(tree, "posterior", "y_unobserved") == {"chain": 1, "draw": 200, "y_unobserved_entry": 2}
    filled = posterior.samples["y"][:, ~mask]
    np.testing.assert_array_equal(tree["posterior"]["y_unobserved"].values[0], filled.numpy())
    assert tree["log_prior"]["y_unobserved"].dims == ("chain", "draw", "y_unobserved_entry")


def test_coords_and_dims_of_the_user(schools):
    names = list("ABCDEFGH")
    tree = schools.to_arviz(coords={"school": names})
    for group in ("posterior", "log_likelihood", "posterior_predictive", "prior", "observed_data"):
        assert tree[group]["school"].values.tolist() == names
    tree = schools.to_arviz(dims={"theta": ["place"]}, coords={"place": names})
    assert tree["posterior"]["theta"].dims == ("chain", "draw", "place")
    assert tree["posterior"]["double"].dims == ("chain", "draw", "school")
    assert tree["log_prior"]["theta"].dims == ("chain", "draw", "place")
    assert tree["posterior"]["place"].values.tolist() == names


def test_labels_and_names_of_dimensions_are_kept(schools):
    renamed = schools.assign_coords({"school": list("ABCDEFGH")}).assign_coords(dims={"theta": ["place"]})
    assert renamed.summary().index[0] == "theta[A]"
    assert "double[A]" in renamed.summary().index
    numbered = renamed.assign_coords({"place": np.arange(8) * 10})
    assert list(numbered.summary("theta").index)[-1] == "theta[70]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {"schol": [1]}}, r"coords, dimensions of sites: .*, got 'schol'\. Did you mean 'school'"),
        ({"coords": {"school": [1, 2]}}, r"coords\['school'\]: expected 8 labels, got 2"),
        ({"dims": {"theta": ["a", "b"]}}, r"dims\['theta'\]: expected 1 names for its dimensions \('school',\)"),
        ({"dims": {"theta": "a"}}, r"dims\['theta'\]: expected 1 names"),
        ({"dims": {"tehta": ["a"]}}, r"dims: expected one of .*'tehta'\. Did you mean 'theta'"),
        ({"coords": {"school": 3}}, r"coords\['school'\]: expected a list of labels, numbers or texts, got 3"),
        ({"coords": {"school": "ABCDEFGH"}}, r"coords\['school'\]: expected a list of labels.*, got 'ABCDEFGH'"),
        ({"coords": {"school": [[1]] * 8}}, r"coords\['school'\]: expected a list of labels"),
        ({"dims": {"theta": 3}}, r"dims\['theta'\]: expected 1 names"),
        ({"dims": {"theta": ["theta"]}}, r"dims\['theta'\]: .*, but 'theta' is a variable\. Name another"),
        ({"dims": {"theta": ["double"]}}, r"dims\['theta'\]: .*, but 'double' is a variable"),
        ({"dims": {"theta": ["draw"]}}, r"dims\['theta'\]: .*, but 'draw' is a dimension of the draws"),
        ({"dims": {"theta": ["a/b"]}}, r"dims\['theta'\]: .*, but 'a/b' has a slash"),
        ({"dims": {"theta": [""]}}, r"dims\['theta'\]: .*, but '' is empty"),
    ],
)
def test_coords_and_dims_that_do_not_fit(schools, options, message):
    with pytest.raises(ValueError, match=message):
        schools.to_arviz(predictive=False, **options)


@pytest.fixture(scope="module")
def two_plates():
    def model():
        for name, size in (("a", 3), ("b", 3), ("c", 2)):
            with pyro.plate(name.upper(), size):
                pyro.sample(name, dist.Normal(torch.zeros(2 if name == "c" else ()), 1.0).to_event(int(name == "c")))

    return any_posterior(model).assign_coords({"A": list("xyz")})


def test_variables_that_share_a_dimension_share_its_labels(two_plates, tmp_path):
    renamed = two_plates.assign_coords(dims={"b": ["A"]})
    for posterior in (renamed, two_plates.assign_coords(dims={"a": ["unit"], "b": ["unit"]})):
        assert [name for name in posterior.summary().index if name[0] != "c"] == [
            f"{site}[{label}]" for site in "ab" for label in "xyz"
        ]
        assert not posterior.summary().isna().any(axis=None)
    assert two_plates.to_arviz(dims={"b": ["A"]}, predictive=False)["posterior"]["b"].shape == (1, 200, 3)
    renamed.save(tmp_path / "saved")
    assert list(pf.load(tmp_path / "saved").summary("b").index) == ["b[x]", "b[y]", "b[z]"]
    twice = two_plates.assign_coords({"A": list("aab")})
    assert list(twice.summary("a", coords={"A": ["a"]}).index) == ["a[a]", "a[a]"]
    days = np.array(["2026-01-01", "2026-01-02", "2026-01-03"], dtype="datetime64[ns]")
    assert two_plates.assign_coords({"A": days}).summary("a").index[0].startswith("a[2026-01-01")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"c": ["A", "d"]}}, r"dims: expected .* under the name 'A', got .*'A\[x\]'.* of 3 and .* of 2"),
        ({"dims": {"c": ["d", "d"]}}, r"dims\['c'\]: .*, but 'd' is there twice"),
        ({"dims": {"b": ["A"]}, "coords": {"B": list("uvw")}}, "coords, dimensions of sites"),
    ],
)
def test_dimensions_that_cannot_be_one(two_plates, options, message):
    with pytest.raises(ValueError, match=message):
        two_plates.to_arviz(predictive=False, **options)
    with pytest.raises(ValueError, match="expected dimensions with the same entries under the name 'A'"):
        two_plates.assign_coords({"B": list("uvw")}).assign_coords(dims={"b": ["A"]})


def test_constant_data_are_arguments_that_are_not_observed():
    def model(x, y, count):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("point", count):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    tree = any_posterior(model, torch.arange(3.0), torch.zeros(3), 3).to_arviz(predictive=False)
    assert list(tree["constant_data"].data_vars) == ["x"]
    assert tree["constant_data"]["x"].dims == ("x_dim_0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in double, the model is wrapped
def test_constant_data_of_a_module_are_arguments_of_its_forward(dtype):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            with pyro.plate("point", 3):
                pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    args = torch.arange(3.0, dtype=dtype), torch.zeros(3, dtype=dtype)
    tree = any_posterior(Model(), *args).to_arviz(predictive=False)
    assert list(tree["constant_data"].data_vars) == ["x"]


# models that lack something -------------------------------------------------------------------------------------------


def test_enumerated_models_have_no_pointwise_likelihood():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("gap", mu[1] - mu[0])
        with pyro.plate("point", 4):
            which = pyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu[which.long()], 1.0), obs=y)

    tree = any_posterior(model, torch.tensor([-1.0, 1.0, -2.0, 2.0])).to_arviz()
    assert "log_likelihood" not in groups(tree)
    assert list(tree["posterior"].data_vars) == ["mu"]
    assert list(tree["prior"].data_vars) == ["mu"]
    assert sizes(tree, "posterior_predictive", "y")["point"] == 4


def test_improper_priors_are_not_drawn_from():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    tree = any_posterior(model, torch.tensor(1.0)).to_arviz()
    assert {"prior", "prior_predictive"}.isdisjoint(groups(tree))
    assert "posterior_predictive" in groups(tree)
    assert (tree["log_prior"]["mu"].values == 0).all()


@pytest.mark.slow
@pytest.mark.falls_back  # a sampler that fails for a batch is tried draw by draw
def test_what_cannot_be_drawn_is_left_out_with_a_note(caplog):
    class ScoreOnly(dist.Normal):
        def sample(self, *args, **kwargs):
            raise RuntimeError("no sampler for this one")

        rsample = sample

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", ScoreOnly(mu, 1.0), obs=y)

    posterior = any_posterior(model, torch.tensor(1.0))
    with caplog.at_level(logging.WARNING, "pyro_flows"):
        tree = posterior.to_arviz()
    assert DRAWN.isdisjoint(groups(tree))
    assert "no posterior_predictive: Undefined: after site 'y': RuntimeError: no sampler for this one" in caplog.text


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_a_model_without_data():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    tree = exact(model, model).to_arviz()
    assert groups(tree) == ALWAYS | {"prior"}


# what ArviZ does with it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thirty():
    y = 1.0 + torch.randn(30, generator=torch.Generator().manual_seed(0))
    return exact(location, location_guide, y, draws=4000), y


def exact_loo(y):
    """The leave-one-out predictive density of :func:`tests.posteriors.location`, in closed form."""
    precision = len(y) - 1 + 1 / 25
    return dist.Normal((y.sum() - y) / precision, (1 + 1 / precision) ** 0.5).log_prob(y)


def test_loo_gives_the_exact_value(az, thirty):
    posterior, y = thirty
    result = az.loo(posterior.to_arviz(predictive=False), pointwise=True)
    elpd = result.elpd_loo if OLD else result.elpd
    points = result.loo_i if OLD else result.elpd_i
    assert float(elpd) == pytest.approx(float(exact_loo(y).sum()), abs=0.05)
    assert points.dims == ("observation",)
    np.testing.assert_allclose(points.values, exact_loo(y).numpy(), atol=0.02)
    assert float(result.pareto_k.max()) < 0.5


@pytest.mark.parametrize(("shift", "stretch", "status"), [(0.0, 1.05, "ok"), (0.3, 1.2, "corrected")])
def test_loo_of_an_approximate_posterior_weights_draws_once(thirty, shift, stretch, status):
    """With ``log_p`` and ``log_q`` of ``sample_stats``: raw draws are weighted, resampled ones had their weighting."""
    import arviz_stats

    def guide(y):
        precision = len(y) + 1 / 25
        sd = precision**-0.5
        pyro.sample("mu", dist.Normal(y.sum() / precision + shift * sd, stretch * sd))

    _, y = thirty
    posterior = pf.diagnose(location, guide, y, draws=4000)
    assert posterior.verdict.status == status
    tree = posterior.to_arviz(predictive=False)
    stats = tree["sample_stats"]
    result = arviz_stats.loo_approximate_posterior(tree, stats["log_p"], stats["log_q"], pointwise=True)
    assert float(result.elpd) == pytest.approx(float(exact_loo(y).sum()), abs=0.05)
    np.testing.assert_allclose(result.elpd_i.values, exact_loo(y).numpy(), atol=0.02)
    if status == "corrected":  # weighted twice, it is off
        used = stats["log_q"].copy(data=posterior._used_log_q.double().numpy()[None])
        twice = arviz_stats.loo_approximate_posterior(tree, stats["log_p"], used)
        assert abs(float(twice.elpd) - float(exact_loo(y).sum())) > 0.1
        raw = tree["raw_sample_stats"]
        np.testing.assert_allclose(raw["log_q"].values[0], posterior.log_q.numpy(), rtol=1e-6)


def test_loo_counts_only_entries_that_a_mask_leaves(az):
    y = torch.cat([1.0 + torch.randn(20), torch.full((10,), 50.0)])
    mask = torch.arange(30) < 20

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("observation", 30), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = exact(model, lambda y: location_guide(y[mask]), y, draws=4000)
    result = az.loo(posterior.to_arviz(predictive=False))
    assert float(result.elpd_loo if OLD else result.elpd) == pytest.approx(float(exact_loo(y[mask]).sum()), abs=0.05)
    assert result.n_data_points == 20


def test_summary_of_arviz_agrees_with_ours(az, schools):
    ours, theirs = schools.summary(round_to="none"), az.summary(schools.to_arviz(predictive=False), round_to="none")
    assert list(ours.index) == list(theirs.index)
    np.testing.assert_allclose(ours["mean"], theirs["mean"].astype(float), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours["sd"], theirs["sd"].astype(float), rtol=1e-3)
    low, high = (theirs.columns[i] for i in (2, 3))
    np.testing.assert_allclose(ours.iloc[:, 2], theirs[low].astype(float), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.iloc[:, 3], theirs[high].astype(float), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ArviZ's and matplotlib's own making
@pytest.mark.parametrize(
    "name",
    ["plot_posterior", "plot_trace", "plot_pair", "plot_forest", "plot_ppc"]
    if OLD
    else ["plot_dist", "plot_trace", "plot_pair", "plot_forest", "plot_ppc_dist"],
)
def test_plots_of_arviz(az, corrected, name):
    import matplotlib

    matplotlib.use("Agg")
    tree = corrected.to_arviz()
    options = {} if "ppc" in name else {"var_names": ["theta"], "coords": {"school": [0, 1]}}
    drawn = getattr(az, name)(tree, **options)
    assert drawn is not None
    importlib.import_module("matplotlib.pyplot").close("all")


def test_netcdf_of_arviz(az, corrected, tmp_path):
    tree = corrected.to_arviz()
    tree.to_netcdf(tmp_path / "tree.nc")
    again = az.from_netcdf(tmp_path / "tree.nc")
    assert groups(again) == groups(tree)
    np.testing.assert_array_equal(again["posterior"]["theta"].values, tree["posterior"]["theta"].values)


# importing ------------------------------------------------------------------------------------------------------------


def test_float64_and_integer_data_keep_their_kind():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))
        with pyro.plate("unit", 3):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    posterior = pf.diagnose(model, AutoNormal(model), torch.tensor([1, 0, 2]), draws=200)
    tree = posterior.to_arviz()
    assert tree["posterior"]["rate"].dtype == np.float64
    assert tree["observed_data"]["y"].dtype == np.int64
