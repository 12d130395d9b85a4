"""Conditional densities by default: no Gaussian where the data are none, contexts of all kinds, quantiles, files."""

import datetime
import decimal
import math

import numpy as np
import pytest
import torch

import pyro_flows as pf
from pyro_flows.densities.encoding import Encoding
from pyro_flows.densities.points import Rows
from pyro_flows.densities.standardizing import knots_of
from pyro_flows.transforms.networks import interpolated

LINEAR_GAUSSIAN = 0.3  # nats that a default has to be better by than a regression with normal noise


def bimodal(count, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = 2.0 * torch.rand(count, 1, generator=generator) - 1.0
    side = 1.0 - 2.0 * (torch.rand(count, 1, generator=generator) < torch.sigmoid(3.0 * x)).float()
    return side * (1.0 + 0.5 * x) + 0.2 * torch.randn(count, 1, generator=generator), scale * x


def truth(y, x):
    share = torch.sigmoid(3.0 * x)
    parts = [torch.distributions.Normal(side * (1.0 + 0.5 * x), 0.2).log_prob(y) for side in (-1.0, 1.0)]
    return torch.logaddexp(share.log() + parts[0], (-share).log1p() + parts[1]).mean()


def regression(y, x, y_test, x_test):
    """Log densities (N,) of a linear regression with normal noise."""
    one = torch.cat([torch.ones_like(x[:, :1]), x], 1).double()
    slope = torch.linalg.lstsq(one, y.double(), driver="gelsd").solution
    sd = (y - one @ slope).std()
    other = torch.cat([torch.ones_like(x_test[:, :1]), x_test], 1).double()
    return torch.distributions.Normal(other @ slope, sd).log_prob(y_test.double())[:, 0]


@pytest.fixture(scope="module")
def fitted():
    y, x = bimodal(1001, seed=0)  # of 1000 rows there are five flows
    return pf.fit_density(y, context=x, max_epochs=30, learning_rate=0.01, progress=False)


def test_the_default_has_two_modes(fitted):
    y, x = bimodal(1000, seed=0)
    y_test, x_test = bimodal(4000, seed=1)
    found = float(fitted.log_prob(y_test, x_test).mean())
    assert found > float(regression(y, x, y_test, x_test).mean()) + LINEAR_GAUSSIAN
    assert found > float(truth(y_test, x_test)) - 0.12
    assert found == pytest.approx(fitted.nats(y_test, x_test), abs=1e-4)
    assert torch.equal(fitted.log_prob(y_test[:, 0], x_test[:, 0]), fitted.log_prob(y_test, x_test))


def test_networks_see_normal_scores_of_columns_with_far_values():
    z = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([z, torch.exp(3.0 * z), (z > 2.9).float(), 3.0 * torch.ones_like(z), z.clamp_min(2.0)], 1)
    knots = knots_of(x)
    assert knots.shape == (2, 5, 37)
    found = interpolated(x, knots)
    inner = (z.abs() < 2.5)[:, 0]
    assert (found[inner, :2] - z[inner]).abs().max() < 0.1
    assert torch.allclose(found[:, 2], x[:, 2], atol=1e-6)
    assert found[:, 3].abs().max() < 1e-6
    assert found[(z < 2.0)[:, 0], 4].unique().numel() == 1
    assert found[:, 4].abs().max() < 4.0
    order = x[:, 4].argsort(stable=True)
    assert not (found[order, 4].diff() < 0.0).any()
    far = interpolated(torch.tensor([[-1e9, 1e9], [1e9, 1e9]]), knots[:, :2])
    assert far[0, 0] < -1e8
    assert torch.equal(far[:, 1], found[:, 1].amax().expand(2))
    assert knots_of(x[:, :1]) is None
    assert knots_of(x[:1]) is None
    one = torch.cat([torch.full((1, 1), 1e6), z])
    assert interpolated(one, knots_of(one)).abs().max() < 4.0
    assert (interpolated(one, knots_of(one))[1:][inner] - z[inner]).abs().max() < 0.1


def test_a_context_of_one_value_does_no_harm():
    """Networks saw it as it is: with a column of 1e8, the density was that of the regression."""
    (y, x), (y_test, x_test) = bimodal(1200, seed=0), bimodal(4000, seed=1)
    options = {"max_epochs": 10, "learning_rate": 0.01, "progress": False}
    alone = pf.fit_density(y, context=x, **options).nats(y_test, x_test)
    beside = (torch.cat([one, torch.full_like(one, 1e8)], 1) for one in (x, x_test))
    found = pf.fit_density(y, context=next(beside), **options)
    assert found.nats(y_test, next(beside)) > alone - 0.02


def test_quantiles_are_exact_and_do_not_cross(fitted):
    _, x = bimodal(20, seed=2)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    found = fitted.quantiles(levels, x)
    assert found.shape == (20, 5, 1)
    assert bool((found.diff(dim=1) > 0).all())
    back = torch.stack([fitted.pit(found[:, level], x)[:, 0] for level in range(5)], 1)
    assert torch.allclose(back, levels.expand(20, 5), atol=1e-3)
    drawn = fitted.sample(40_000, x[:1], seed=3)
    assert torch.allclose(torch.quantile(drawn[:, 0], levels), found[0, :, 0], atol=0.1)
    assert float((drawn[:, 0] < found[0, 2, 0]).double().mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fitted.quantiles([0.0, 0.5], x)
    with pytest.raises(ValueError, match="rows of 1 numbers"):
        fitted.quantiles([0.5], torch.zeros(3, 2))


def test_a_calibrated_density_has_uniform_transforms(fitted):
    y, x = bimodal(4000, seed=5)
    u = fitted.pit(y, x)[:, 0].double()
    assert u.shape == (4000,)
    off = (u.sort().values - torch.arange(4000).double() / 4000).abs().max()
    assert float(off) < 0.06
    twice = fitted.pit(2.0 * y, x)[:, 0].double()
    assert float(twice.std()) > 1.2 * math.sqrt(1 / 12)


@pytest.mark.parametrize("base", ["normal", "logistic", "student_t", "uniform"])
def test_quantiles_of_every_base(base):
    flow = pf.Flow(pf.transforms.DiagonalAffine(1, loc=torch.tensor([3.0]), scale=torch.tensor([0.2])), base=base)
    made = pf.DensityFit(flow, torch.zeros(1), torch.zeros(0, 2), math.nan, None, {}, "")
    levels = torch.tensor([0.1, 0.5, 0.8])
    at = made.quantiles(levels)
    assert at.shape == (3, 1)
    assert torch.allclose(made.pit(at)[:, 0], levels, atol=1e-4)
    drawn = made.sample(20_000, seed=0)
    assert torch.allclose(torch.quantile(drawn[:, 0], levels), at[:, 0], atol=0.02)


def test_a_context_of_one_column_may_be_numbers(fitted):
    x = bimodal(5, seed=3)[1]
    assert torch.equal(fitted.sample(5, x[:, 0], seed=0), fitted.sample(5, x, seed=0))
    assert torch.equal(fitted.sample(5, x[0], seed=0), fitted.sample(5, x[:1], seed=0))


def test_two_outputs_have_quantiles_and_transforms_by_draws():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=generator)
    y = torch.cat([x, -x], 1) + 0.3 * torch.randn(400, 2, generator=generator)
    found = pf.fit_density(y, context=x, max_epochs=8, learning_rate=0.003, progress=False)
    quantiles = found.quantiles([0.25, 0.75], x[:6], draws=4000)
    assert quantiles.shape == (6, 2, 2)
    middle = quantiles.mean(1)
    assert torch.allclose(middle, torch.cat([x[:6], -x[:6]], 1), atol=0.3)
    u = found.pit(y, x, draws=200)
    assert u.shape == (400, 2)
    assert torch.allclose(u.double().mean(0), torch.full((2,), 0.5).double(), atol=0.06)


# contexts -------------------------------------------------------------------------------------------------------------


def test_categories_and_missing_values_become_numbers():
    context = np.array([["a", 1.0], ["b", None], ["c", 4.0], ["a", np.nan]], dtype=object)
    found = Encoding.of(context)
    assert found.encode(context).tolist() == [
        [1, 0, 0, 1.0, 0],
        [0, 1, 0, 2.5, 1],
        [0, 0, 1, 4.0, 0],
        [1, 0, 0, 2.5, 1],
    ]
    assert Encoding.from_json(found.to_json()) == found
    assert found.width == 5
    with pytest.raises(
        ValueError, match=r"'d' in row 0 of column 0 is no category that the fit has \('a', 'b', 'c'\)\.$"
    ):
        found.encode([["d", 1.0]])
    with pytest.raises(ValueError, match="expected 2 columns, got 1"):
        found.encode([["a"]])


def test_whole_numbers_of_few_values_are_categories_and_others_are_not():
    assert Encoding.of(np.repeat([[1], [2], [3]], 10, 0)).width == 3
    zeros_and_ones = Encoding.of(torch.tensor([0, 1]).repeat(10))
    assert zeros_and_ones.encode(torch.tensor([1, 0])).tolist() == [[1.0], [0.0]]
    with pytest.raises(
        ValueError, match=r"3 in row 0 .* \(1, 2\)\. Whole numbers with at most 20 values, each in 10 rows or more, are"
    ):
        Encoding.of(np.repeat([1, 2], 10)).encode(np.array([3]))
    assert Encoding.of(np.arange(100)[:, None]) is None
    assert Encoding.of(np.array([1] * 10 + [2] * 9)) is None  # a fold of cross-validation may have no 2
    assert Encoding.of(np.array([[1.0], [2.0]])) is None
    assert Encoding.of(torch.tensor([True, False, True])).encode(torch.tensor([True, False])).tolist() == [[1.0], [0.0]]
    found = Encoding.of(np.array([[1.0], [np.nan], [3.0]]))
    assert found.encode(np.array([[np.nan], [5.0]])).tolist() == [[2.0, 1.0], [5.0, 0.0]]
    with pytest.raises(ValueError, match="no values at all"):
        Encoding.of(np.array([[np.nan], [np.nan]]))


def test_arrays_of_texts_are_categories():
    found = Encoding.of(np.array(["a", "b", "c", "a"]))
    assert found.encode(np.array(["c", "a"])).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert Encoding.of(np.array(["a", "a"])).encode(np.array(["a"])).tolist() == [[1.0]]


@pytest.mark.parametrize("kind", ["datetime64[D]", "timedelta64[s]", "complex"])
def test_times_and_complex_numbers_are_refused_with_the_remedy(kind):
    with pytest.raises(ValueError, match=r"context: column 0 is of .*; expected numbers or categories. Pass times as"):
        Encoding.of(np.arange(30).astype(kind))


@pytest.mark.parametrize("make", [lambda day: datetime.date(2020, 1, day), lambda day: decimal.Decimal(day)])
def test_objects_that_are_neither_numbers_nor_texts_are_refused(make):
    with pytest.raises(ValueError, match=r"context: column 0 is of (date|Decimal); expected numbers or categories"):
        Encoding.of(np.array([[make(day)] for day in range(1, 10)], dtype=object))


def test_pandas_categories_of_numbers_are_categories_and_its_missing_value_is_missing():
    pd = pytest.importorskip("pandas")
    codes = pd.DataFrame({"code": pd.Categorical([10, 30, 20, 10])})
    assert Encoding.of(codes).encode(codes).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert Encoding.of(codes["code"]).width == 3
    objects = np.array([["a"], [pd.NA], ["b"], [None]], dtype=object)
    assert Encoding.of(objects).encode(objects).tolist() == [[0, 0], [0, 1], [1, 0], [0, 1]]
    times = pd.DataFrame({"at": pd.date_range("2020", periods=4, tz="UTC")})
    with pytest.raises(ValueError, match="column 'at' is of Timestamp; expected numbers"):
        Encoding.of(times)


def test_contexts_that_are_no_table_are_refused():
    pd = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"context: expected rows of one length, got \[\[1.0\], \[2.0, 3.0\]\]"):
        Encoding.of([[1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="context: expected one or more columns, got none"):
        Encoding.of(pd.DataFrame(index=range(3)))
    with pytest.raises(ValueError, match="validation: expected a list or a tensor of numbers, got"):
        pf.fit_density("nice", torch.zeros(9, 2), validation=[torch.zeros(3), pd.DataFrame({"a": [1.0]})])


def test_masked_values_are_missing():
    masked = np.ma.masked_array(np.array([1.0, 2.0, 9.0]), [False, False, True])
    assert Encoding.of(masked).encode(masked).tolist() == [[1.0, 0.0], [2.0, 0.0], [1.5, 1.0]]
    with pytest.raises(ValueError, match="data: the value in row 2, column 0 is missing"):
        pf.fit_density(masked, progress=False)


def test_columns_of_a_data_frame_keep_their_order():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [0.5, 1.5], "b": [1.0, 3.0]})
    found = Encoding.of(frame)
    assert found.encode(frame).tolist() == found.encode(frame.to_numpy()).tolist() == [[0.5, 1.0], [1.5, 3.0]]
    with pytest.raises(ValueError, match=r"expected the columns 'a', 'b', got 'b', 'a'\. Pass them in the order"):
        found.encode(frame[["b", "a"]])
    with pytest.raises(ValueError, match=r"column 'a' had numbers in the fit, and has other values now"):
        found.encode([["x", "y"]])


def test_data_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "kind": pandas.Categorical(["u", "v", None, "w"]),
            "count": pandas.array([1, None, 3, 4], dtype="Int64"),
            "text": ["x", "y", "x", "y"],
            "yes": [True, False, True, True],
            "size": [0.5, np.nan, 1.5, 2.5],
        }
    )
    found = Encoding.of(frame)
    encoded = found.encode(frame)
    assert encoded.shape == (4, found.width)
    assert [column.width for column in found.columns] == [4, 2, 1, 1, 2]
    assert not bool(torch.isnan(encoded).any())
    with pytest.raises(ValueError, match=r"column 'text' has missing values \(row 1\), and had none in the fit"):
        found.encode(frame.assign(text=["x", None, "x", "y"]))


def test_a_fit_with_categories_and_missing_values_is_saved_and_loaded(tmp_path):
    generator = np.random.default_rng(0)
    kind = generator.choice(["low", "high", "none"], 600)
    size = generator.normal(size=600)
    y = np.where(kind == "high", 4.0, 0.0) + size * (kind != "none") + 0.3 * generator.normal(size=600)
    size = np.where(generator.uniform(size=600) < 0.2, np.nan, size)
    context = np.array(list(zip(kind, size, strict=True)), dtype=object)
    found = pf.fit_density(y, context=context, max_epochs=20, learning_rate=0.01, progress=False)
    given = [["high", 1.0], ["low", np.nan], ["none", 0.0]]
    middle = found.quantiles([0.5], given)[:, 0, 0]
    assert torch.allclose(middle, torch.tensor([5.0, 0.0, 0.0]), atol=0.5)
    assert found.sample(3, given).shape == (3, 1)
    found.save(tmp_path / "density")
    again = pf.DensityFit.load(tmp_path / "density")
    assert again.encoding == found.encoding
    assert torch.equal(again.log_prob(y, context), found.log_prob(y, context))
    assert torch.equal(again.quantiles([0.1, 0.9], given), found.quantiles([0.1, 0.9], given))
    pair = pf.fit_density(y, context=context, validation=(y, context), max_epochs=1, progress=False)
    assert math.isfinite(pair.validation)


def test_few_held_out_rows_leave_much_to_what_no_context_moves():
    """Ten held-out rows of a hundred liked a training that lost a nat. Many rows that gain go their own way."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(100, 3, generator=generator), torch.randn(100, 1, generator=generator)
    found = pf.fit_density(x[:, :1] - x[:, 1:2] + 0.5 * noise, context=x, seed=1, progress=False)
    assert found.settings["share_without_context"] > 0.2
    test_x, noise = torch.randn(4000, 3, generator=generator), torch.randn(4000, 1, generator=generator)
    exact = float(torch.distributions.Normal(0.0, 0.5).log_prob(0.5 * noise).mean())
    assert float(found.log_prob(test_x[:, :1] - test_x[:, 1:2] + 0.5 * noise, test_x).mean()) > exact - 0.1
    bent = pf.fit_density(test_x[:, :1] ** 2 + 0.1 * noise, context=test_x, max_epochs=4, progress=False)
    assert 1.0 / 402.0 <= bent.settings["share_without_context"] < 0.01


def test_far_from_all_contexts_the_density_is_still_near_that_of_the_regression(tmp_path):
    """Networks made all parts narrow there, and a point on the line was given e^-16 of what the regression gives it."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(90, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(90, 1, generator=generator)
    found = pf.fit_density(y, context=x, max_epochs=200, progress=False)
    far = 6.0 * torch.nn.functional.normalize(torch.randn(400, 3, generator=generator))
    at = far.sum(1, keepdim=True) + torch.randn(400, 1, generator=generator)
    known = regression(y, x, at, far)
    assert float((found.log_prob(at, far) - known).min()) > -3.0
    found.save(tmp_path / "density")
    assert torch.equal(pf.DensityFit.load(tmp_path / "density").log_prob(at, far), found.log_prob(at, far))
    alone = pf.fit_density(y[:60], context=x[:60], validation=(y[60:], x[60:]), max_epochs=200, progress=False)
    assert float((alone.log_prob(at, far) - known).min()) > -3.0
    alone.flow.mixture.share.zero_()
    assert float((alone.log_prob(at, far) - known).min()) < -6.0


def test_up_to_1000_rows_five_flows_hold_out_other_fifths():
    rows = Rows(torch.arange(23.0)[:, None], None, torch.zeros(()))
    parts = [held_out.take(torch.arange(len(held_out)))[0] for _, held_out in rows.splits(0.2, 5)]
    assert [len(part) for part in parts] == [5] * 5
    assert len(torch.cat(parts).unique()) == 23
    assert all(len(set(rest.indices.tolist()) & set(own.indices.tolist())) == 0 for rest, own in rows.splits(0.2, 5))
    y, x = bimodal(40, seed=0)
    options = {"context": x, "max_epochs": 1, "learning_rate": 0.01, "progress": False}
    found = pf.fit_density(y, **options)
    assert found.settings["flows"] == len(found.flow.mixture.members) == 5
    apart = [flow.bijection.layers[-1].loc for flow in found.flow.mixture.members]
    assert len(torch.stack(apart).unique()) == 5
    for other in ({"validation": (y[:9], x[:9])}, {"validation": None}, {"max_seconds": 1e-3}):
        assert "flows" not in pf.fit_density(y, **{**options, **other}).settings
    y, x = bimodal(1001, seed=0)
    assert "flows" not in pf.fit_density(y, **{**options, "context": x}).settings


def curve(count=2000):
    x = 4.0 * torch.rand(count, 1, generator=torch.Generator().manual_seed(0)) - 2.0
    return x, x**3 - 2.0 * x + 0.01 * torch.randn(count, 1, generator=torch.Generator().manual_seed(1))


def test_one_output_given_a_context_has_no_weight_decay():
    x, y = curve(200)
    options = {"context": x, "validation": None, "max_epochs": 1, "progress": False}
    assert pf.fit_density(y, **options).settings["weight_decay"] == 0.0
    assert pf.fit_density(torch.cat([y, y.square()], 1), **options).settings["weight_decay"] > 0.0
    assert pf.fit_density(y, weight_decay=0.1, **options).settings["weight_decay"] == 0.1
