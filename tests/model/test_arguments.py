"""Arguments that are no tensors: arrays, tables and lists of numbers, whether a model runs with them or not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch

import pyro_flows as pf
from pyro_flows.model.arguments import usable

X, Y = [[0.0, 1.0], [1.0, 2.0], [2.0, 0.5]], [0.3, 1.1, 1.9]
TABLE = pd.DataFrame({"a": [0, 1, 2], "b": [1.0, 2.0, 0.5]})


def regression(x, y):
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slopes + 0.1 * y.std(), 1.0), obs=y)


WITH_TENSORS = torch.tensor(X), torch.tensor(Y)


@pytest.mark.parametrize(
    ("x", "y", "dtype"),
    [
        (np.array(X), np.array(Y), torch.float64),
        (np.array(X, dtype=np.float32), np.array(Y, dtype=np.float16), torch.float32),
        (np.array(X).astype(">f8")[::-1][::-1], np.array(Y[::-1], dtype=np.longdouble)[::-1], torch.float64),
        (TABLE, pd.Series(Y, index=[7, 8, 9]), torch.float64),
        (TABLE.astype({"a": "Int64", "b": "Float64"}), pd.Series(Y, dtype="Float64"), torch.float64),
        (TABLE.to_numpy(), pd.Index(Y), torch.float64),
        (torch.tensor(X), Y, torch.float32),
        (X, tuple(Y), torch.float32),
        (X, np.ma.masked_array(Y, [False] * 3), torch.float64),
    ],
)
def test_numbers_of_all_kinds_are_taken(x, y, dtype):
    """Their log density is that of tensors, in the precision that they have."""
    density, expected = pf.LogDensity(regression, (x, y)), pf.LogDensity(regression, WITH_TENSORS)
    assert density.structure.observed["y"].dtype == dtype
    z = expected.structure.points(1.0)
    torch.testing.assert_close(density(z.to(density.dtype)).float(), expected(z), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "uint16", "uint32", "uint64", "int64", "bool", "list", "boolean", "Int8"]
)
def test_whole_numbers_are_int64_and_truths_bool(kind):
    def model(y):
        rate = pyro.sample("rate", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Binomial(1, rate).expand(y.shape).to_event(1), obs=y)

    listed = [1, 0, 1]
    y = (
        listed
        if kind == "list"
        else pd.Series(listed, dtype=kind)
        if kind in ("boolean", "Int8")
        else np.array(listed, kind)
    )
    (taken,) = pf.LogDensity(model, (y,)).args
    assert taken.tolist() == listed
    assert taken.dtype == (torch.bool if kind.startswith("bool") else torch.int64)


@pytest.mark.parametrize("y", [torch.tensor([1, 0, 1]), [1, 0, 1], np.array([1, 0, 1]), pd.Series([True, False, True])])
def test_whole_numbers_are_floats_where_a_density_refuses_them(y):
    """torch's Bernoulli takes no whole numbers; groups beside them stay indices."""

    def model(x, group, y):
        rate = pyro.sample("rate", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=rate[group] * x), obs=y)

    for x in (np.array(Y), torch.tensor(Y)):
        density = pf.LogDensity(model, (x, np.array([0, 1, 1]), y))
        expected = pf.LogDensity(
            model,
            (
                torch.as_tensor(x),
                torch.tensor([0, 1, 1]),
                torch.tensor([1.0, 0.0, 1.0], dtype=torch.as_tensor(x).dtype),
            ),
        )
        z = expected.structure.points(1.0)
        assert density.dtype == torch.as_tensor(x).dtype
        torch.testing.assert_close(density(z), expected(z))


def test_what_a_model_runs_with_stays():
    """Lists of sizes, tables whose columns a model takes itself, arrays that it turns into tensors."""

    def model(sizes, frame, days, y):
        x = pyro.sample("x", dist.Normal(torch.zeros(*sizes), 1.0).to_event(len(sizes)))
        slope = torch.as_tensor(frame["b"].to_numpy()).mean() + torch.from_numpy(days).sum()
        with pyro.plate("data", sizes.index(3) + 3):
            pyro.sample("y", dist.Normal(x.sum() * slope, 1.0), obs=y)

    frame = TABLE.assign(town=["Oslo", "Rome", "Bern"])
    sizes, days = [3, 2], np.arange(3)
    args, _ = usable(model, (sizes, frame, days, torch.tensor(Y)), {})
    assert args[0] is sizes
    assert args[1] is frame
    assert args[2] is days
    args, _ = usable(model, (sizes, frame, days, Y), None)  # the one list that has to be a tensor
    assert args[0] is sizes
    assert args[1] is frame
    assert args[2] is days
    torch.testing.assert_close(args[3], torch.tensor(Y))


def test_names_and_lists_of_tensors_stay():
    def model(parts, names, data):
        values = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in names]
        for number, part in enumerate(parts):
            pyro.sample(f"y_{number}", dist.Normal(values[number], 1.0).expand(part.shape).to_event(1), obs=part)
        pyro.sample("z", dist.Normal(values[0], 1.0).expand([3]).to_event(1), obs=data["z"])

    density = pf.LogDensity(model, ([np.ones(2), np.ones(3)], ["a", "b"]), {"data": {"z": pd.Series(Y)}})
    assert list(density.structure.observed) == ["y_0", "y_1", "z"]
    assert density.args[1] == ["a", "b"]
    assert isinstance(density.args[0], list)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (TABLE.assign(town=["a", "b", "c"]), r"argument 'x', column 'town': expected numbers, got .* pd\.to_numeric"),
        (
            TABLE.assign(town=pd.Categorical([1, 2, 2])),
            r"argument 'x', column 'town': .* got category\. .*\.cat\.codes",
        ),
        (TABLE.assign(day=pd.to_datetime(["2024-01-01"] * 3)), r"column 'day': .* got times\. Use a number of days"),
        (np.array([["a", "b"]] * 3), r"argument 'x': expected numbers, got values of dtype <U1"),
        (np.array([[None, 1.0]] * 3), r"argument 'x': expected numbers, got values of dtype object"),
        (np.ma.masked_invalid([[np.nan, 1.0]] * 3), r"argument 'x': .* got masked values\. .*obs_mask=~y\.mask"),
        (scipy.sparse.csr_matrix(X), r"argument 'x': expected numbers, got a sparse matrix\. Use \.toarray\(\)"),
        (
            np.array([[2**64 - 1, 1]] * 3, dtype=np.uint64),
            r"argument 'x': .* got whole numbers above the range of int64",
        ),
    ],
)
def test_what_holds_no_numbers_is_named(x, said):
    with pytest.raises(ValueError, match=said):
        pf.fit(regression, x, np.array(Y), progress=False)
    with pytest.raises(ValueError, match=r"argument 'x'\['deep'\]"):
        pf.LogDensity(lambda x, y: regression(x["deep"], y), ({"deep": x}, np.array(Y)))


def test_missing_values_are_named():
    def model(x, y):
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ slopes, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"site 'y': 1 of 1 observed values are NaN\. .*obs_mask="):
        pf.fit(model, np.array(X), pd.Series([1, None, 2], dtype="Int64"), progress=False)


def test_errors_of_the_model_are_its_own():
    def model(frame, y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand(y.shape).to_event(1), obs=y + torch.tensor(frame["misspelt"]))

    with pytest.raises(KeyError, match="misspelt"):
        pf.fit(model, TABLE, torch.tensor(Y), progress=False)


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(Y, dtype="float32"),
        pytest.param(np.array(Y, dtype=np.float32), marks=pytest.mark.slow),
        pytest.param(Y, marks=pytest.mark.slow),
    ],
)
def test_all_functions_take_them(y):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0 + 0.0 * y), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(y.sum() / 4, 0.5))

    def sampler(y):
        return {"mu": y.sum() / 4 + 0.5 * torch.randn(99)}

    quick = {"draws": 500, "progress": False}
    tensor = torch.tensor(Y)
    posterior = pf.fit(model, y, **quick)
    torch.testing.assert_close(posterior.samples, pf.fit(model, tensor, **quick).samples)
    assert posterior.predictive(y, draws=10)["y"].shape == (10, 3)
    assert pf.diagnose(model, guide, y, draws=500).verdict.status == "ok"
    (one,) = pf.fit_many(model, [y], **quick)
    assert one.samples["mu"].shape == (500,)
    assert pf.prior_predictive(model, y, draws=20)["y"].shape == (20, 3)
    found = pf.sbc(model, y, sampler=sampler, simulations=10, draws=99, progress=False)
    assert found.ranks["mu"].shape == (10,)
