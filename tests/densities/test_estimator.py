"""A density as an estimator by scikit-learn's conventions."""

import numpy as np
import pytest
import torch

import pyro_flows as pf

FAST = {"max_epochs": 2, "learning_rate": 0.01}


def pairs(count=120):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(count, 3))
    return X, X[:, 0] + 0.5 * rng.normal(size=count)


def test_rows_and_outputs_given_rows():
    X, y = pairs()
    plain = pf.DensityEstimator(**FAST).fit(X, y)
    assert plain.score_samples(X).shape == (120,)
    assert plain.score(X) == pytest.approx(plain.score_samples(X).mean())
    assert plain.sample(5).shape == (5, 3)
    given = pf.DensityEstimator(conditional=True, max_epochs=30).fit(X, y)
    assert given.score(X, y) == pytest.approx(given.score_samples(X, y).mean())
    assert given.score(X, y) > given.score(X, y[::-1])
    assert given.sample(X=X).shape == (120, 1)
    assert given.sample(3, X=X).shape == (3, 120, 1)
    assert np.array_equal(given.sample(3, X=X)[0], given.sample(X=X))
    assert given.predict_quantiles(X[:4], [0.1, 0.9]).shape == (4, 2)
    with pytest.raises(ValueError, match="conditional=True"):
        plain.predict_quantiles(X)
    with pytest.raises(ValueError, match="outputs whose density"):
        given.score_samples(X)
    with pytest.raises(ValueError, match="rows that outputs"):
        given.sample(3)


def test_parameters():
    made = pf.DensityEstimator("spline", max_epochs=3)
    assert made.get_params()["flow"] == "spline"
    assert made.set_params(batch=16) is made
    assert made.batch == 16
    assert repr(made) == "DensityEstimator(batch=16, flow='spline', max_epochs=3)"
    with pytest.raises(ValueError, match="Invalid parameter 'epochs'"):
        made.set_params(epochs=1)


def test_seeds_are_drawn_as_in_scikit_learn(monkeypatch):
    X, _ = pairs(40)
    drawn = int(np.random.RandomState(3).randint(2**31))
    by_state, by_seed = (
        pf.DensityEstimator("nice", random_state=state, **FAST).fit(X) for state in (np.random.RandomState(3), drawn)
    )
    assert np.array_equal(by_state.score_samples(X), by_seed.score_samples(X))
    assert not np.array_equal(by_state.sample(4), by_state.sample(4))
    assert np.array_equal(by_seed.sample(4), by_seed.sample(4))
    assert np.array_equal(by_seed.sample(4, random_state=np.random.RandomState(3)), by_seed.sample(4))
    monkeypatch.setattr(np.random, "randint", np.random.RandomState(3).randint)
    assert np.array_equal(
        by_seed.set_params(random_state=None).sample(4), by_state.set_params(random_state=drawn).sample(4)
    )
    with pytest.raises(ValueError, match=r"random_state: expected .* got a Generator"):
        by_seed.sample(4, random_state=np.random.default_rng(0))


def test_contexts_may_be_missing_or_categories():
    pandas = pytest.importorskip("pandas")
    X, y = pairs()
    frame = pandas.DataFrame({"a": X[:, 0], "b": np.where(X[:, 1] > 0, "up", "down")})
    frame.loc[3, "a"] = np.nan
    found = pf.DensityEstimator(conditional=True, **FAST).fit(frame, y)
    assert found.score_samples(frame, y).shape == (120,)
    with pytest.raises(ValueError, match=r"to float: .*encode categories. Only X of an estimator with cond"):
        pf.DensityEstimator(**FAST).fit(frame)
    with pytest.raises(ValueError, match="feature names should match"):
        found.score_samples(frame.rename(columns={"a": "c"}), y)


def test_lists_keep_their_numbers_and_one_column_is_no_table():
    rows = [[number / 7.0, "ab"[number % 2]] for number in range(60)]
    found = pf.DensityEstimator(conditional=True, max_epochs=1).fit(rows, [row[0] % 1.7 for row in rows])
    assert found.fit_.encoding.width == 2
    assert found.predict_quantiles(rows[:3], 0.5).shape == (3, 1)
    column = pytest.importorskip("pandas").Series(range(60))
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        pf.DensityEstimator(conditional=True).fit(column, column)


def test_searches_and_pipelines():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y = pairs()
    assert sklearn.base.clone(pf.DensityEstimator(batch=7)).batch == 7
    scores = cross_val_score(make_pipeline(StandardScaler(), pf.DensityEstimator(conditional=True, **FAST)), X, y, cv=2)
    assert np.isfinite(scores).all()
    search = GridSearchCV(pf.DensityEstimator("nice", max_epochs=1), {"learning_rate": [1e-4, 1e-2]}, cv=2).fit(X)
    assert search.best_params_["learning_rate"] in (1e-4, 1e-2)


# What scikit-learn's checks ask of estimators that these are not.
NOT_OURS: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_scikit_learn():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    torch.manual_seed(0)
    found = checks.check_estimator(
        pf.DensityEstimator(**FAST), expected_failed_checks=NOT_OURS, on_skip=None, on_fail=None
    )
    failed = {one["check_name"]: repr(one["exception"]) for one in found if one["status"] == "failed"}
    assert not failed
    assert sum(one["status"] == "passed" for one in found) >= 30
