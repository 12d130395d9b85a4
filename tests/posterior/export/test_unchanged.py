"""Data that change after a fit: small ones are the posterior's own, others are refused by name."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.model import unchanged

X = torch.tensor([-1.0, 0.0, 1.0, 2.0])
Y = torch.tensor([0.3, 1.1, -0.4, 0.8])


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)


def guide(*args, **kwargs):
    pyro.sample("a", dist.Normal(0.2, 0.38))


METHODS = {
    "to_arviz": lambda found: found.to_arviz(),
    "loo": lambda found: found.loo(progress=False),
    "refine": lambda found: found.refine(max_steps=2, progress=False),
    "predictive": lambda found: found.predictive(),
    "evidence": lambda found: found.evidence(),
    "log_likelihood": lambda found: found.log_likelihood(),
    "sensitivity": lambda found: found.sensitivity(),
    "compare": lambda found: pf.compare({"one": found, "other": found}, progress=False),
    "prior_from": lambda found: pf.prior_from(found, max_epochs=1, progress=False),
    "report": lambda found: found.report("report.html", progress=False),
    "save": lambda found: found.save("saved"),
    "plot_predictive": lambda found: pf.plots.plot_predictive(found),
}


def diagnosed(*args, model=regression, **kwargs):
    return pf.diagnose(model, guide, *args, draws=400, progress=False, **kwargs)


@pytest.fixture(scope="module")
def of_large_data():
    """A posterior that has no copy of its data, and these data."""
    x, y = X.clone(), Y.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unchanged, "COPIED", 0)
        return diagnosed(x, y), y


@pytest.mark.parametrize("name", METHODS)
def test_what_runs_the_model_again_refuses_data_that_have_changed(of_large_data, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, y = of_large_data
    before = found.summary()
    y += 100.0
    with pytest.raises(ValueError, match=r"argument 'y' has changed since the fit.*Fit again; or undo"):
        METHODS[name](found)
    pd.testing.assert_frame_equal(found.summary(), before)  # of the draws alone
    y.copy_(Y)
    assert found.predictive(draws=3)["y"].shape == (3, 4)


def test_small_data_are_the_posteriors_own():
    x, y = X.clone(), Y.clone()
    found = diagnosed(x, y)
    same = diagnosed(x, y)
    y += 100.0
    assert torch.equal(found.predictive()["y"], same.predictive()["y"])
    assert found.predictive()["y"].max() < 50.0
    assert found.evidence().value == same.evidence().value
    assert float(found.loo(progress=False).elpd) > -20.0


def test_a_fit_keeps_its_data_too():
    y = Y.clone()
    found = pf.fit(regression, X, y, progress=False, draws=400)
    y += 100.0
    assert np.array_equal(found.to_arviz()["observed_data"]["y"], Y.numpy())
    assert torch.equal(found.density.args[1], Y)


Pair = namedtuple("Pair", "x y")


@dataclass
class Data:
    x: object
    y: object


def kinds():
    """Arguments of many kinds, and changes of them in place."""
    array = lambda: np.array(Y.numpy(), dtype=np.float64)  # noqa: E731
    frame = pd.DataFrame({"x": X.numpy(), "y": array()})

    def write(container, key, value):
        container[key] = value

    def set_cell(given):
        given.loc[2, "y"] = 3.0

    wide = lambda: torch.randn(6, 8, generator=torch.Generator().manual_seed(0))  # noqa: E731
    return {
        "tensor": (Y.clone(), lambda given: given.mul_(2.0)),
        "one entry": (Y.clone(), lambda given: write(given, 3, 0.7)),
        "order": (Y.clone(), lambda given: given.copy_(given.flip(0))),
        "whole numbers": (torch.arange(5), lambda given: given.add_(1)),
        "bool": (torch.tensor([True, False]), lambda given: write(given, 0, False)),
        "a view": (wide()[:, ::2], lambda given: write(given, (1, 1), 9.0)),
        "half": (Y.half(), lambda given: given.add_(1)),
        "complex": (torch.tensor([1j, 2.0]), lambda given: given.add_(1)),
        "conjugate": (torch.tensor([1j, 2.0]).conj(), lambda given: given.add_(1j)),
        "sparse": (torch.eye(3).to_sparse(), lambda given: given.mul_(2.0)),
        "array": (array(), lambda given: write(given, 0, 5.0)),
        "transposed array": (np.asfortranarray(np.ones((3, 2))), lambda given: write(given, (0, 1), 5.0)),
        "masked array": (np.ma.masked_invalid([1.0, np.nan]), lambda given: write(given, 0, np.ma.masked)),
        "array of objects": (np.array([1, "a", None], dtype=object), lambda given: write(given, 1, "b")),
        "dates": (np.array(["2020-01-01"], dtype="M8[D]"), lambda given: write(given, 0, np.datetime64("2021-01-01"))),
        "table": (frame.copy(), set_cell),
        "a new column": (frame.copy(), lambda given: write(given, "z", 1.0)),
        "series": (frame["y"].copy(), lambda given: write(given, 1, 4.0)),
        "text in a table": (pd.DataFrame({"g": ["a", "b"]}), lambda given: write(given, "g", ["a", "c"])),
        "categories": (pd.DataFrame({"g": pd.Categorical(["a", "b"])}), lambda given: write(given, "g", ["a", "a"])),
        "list": ([0.1, 0.2], lambda given: given.append(0.3)),
        "nested list": ([[1, 2], [3, 4]], lambda given: write(given[1], 0, 7)),
        "list of tensors": ([X.clone(), Y.clone()], lambda given: given[1].add_(1.0)),
        "dict": ({"x": X.clone(), "y": Y.clone()}, lambda given: given["y"].add_(1.0)),
        "nested dicts": ({"a": {"b": [Y.clone()]}}, lambda given: given["a"]["b"][0].add_(1.0)),
        "a new key": ({"x": X.clone()}, lambda given: write(given, "z", 1)),
        "named tuple": (Pair(X.clone(), array()), lambda given: given.y.fill(1.0)),
        "data class": (Data(X.clone(), [1.0]), lambda given: given.y.append(2.0)),
    }


class Standing:
    """A density with these arguments."""

    def __init__(self, given):
        self.args, self.kwargs = (given,), {"n": 3, "given": given}
        self.structure = type("Structure", (), {"observed": {}})

    @staticmethod
    def model(data, n, given):
        raise AssertionError("not to be run")


@pytest.mark.parametrize("kind", kinds())
def test_each_kind_of_change_is_found(kind):
    given, change = kinds()[kind]
    density = Standing(given)
    before = unchanged.digests(density)
    assert unchanged.digests(density) == before
    change(given)
    with pytest.raises(ValueError, match="argument 'data' and argument 'given' have changed since the fit"):
        unchanged.check_unchanged(density, before, torch.zeros(0, 1), torch.zeros(0))


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind not in ("sparse", "data class")])
def test_copies_are_equal_and_do_not_change(kind):
    given, change = kinds()[kind]
    (copied, again), _ = unchanged.own((given, given), None)
    before = unchanged.digests(Standing(given))
    assert unchanged.digests(Standing(copied)) == before
    if isinstance(given, (torch.Tensor, np.ndarray, pd.DataFrame, pd.Series)):
        assert copied is again  # one object stays one
    change(given)
    assert unchanged.digests(Standing(copied)) == before


def test_what_is_large_or_no_data_is_not_copied(monkeypatch):
    module, empty, leaf = torch.nn.Linear(2, 1), [], torch.zeros(2, requires_grad=True)
    assert all(
        one is other
        for one, other in zip(unchanged.own((module, empty, leaf), None)[0], (module, empty, leaf), strict=True)
    )
    expanded = torch.zeros(1).expand(10**9)
    assert unchanged.own((expanded,), None)[0][0] is expanded
    monkeypatch.setattr(unchanged, "COPIED", 15)
    assert unchanged.own((Y,), None)[0][0] is Y


def test_what_a_model_reads_from_outside_is_compared_by_its_density():
    data, scale = {"y": Y.double()}, [1.0]

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * X, scale[0]).to_event(1), obs=data["y"])

    found = diagnosed(model=model)
    found.predictive()
    data["y"][:2] = data["y"][:2].flip(0)
    with pytest.raises(ValueError, match="the observed value of site 'y' has changed since the fit"):
        found.predictive()
    data["y"][:2] = data["y"][:2].flip(0)
    found.predictive()
    data["y"] = Y.double() + 0.1  # another tensor
    with pytest.raises(ValueError, match="the model reads from outside of its arguments"):
        found.loo(progress=False)
    data["y"] = Y.double()[:3]
    with pytest.raises(ValueError, match="it raises an error at a draw, and raised none in the fit"):
        found.to_arviz()


def test_parameters_of_the_model_that_are_trained_on_are_told():
    net = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.module("net", net)
        pyro.sample("y", dist.Normal(a * X + net(X[:, None]).squeeze(1).detach(), 1.0).to_event(1), obs=y)

    found = diagnosed(Y, model=model)
    found.predictive()
    with torch.no_grad():
        net.bias += 1.0
    with pytest.raises(ValueError, match="parameters of its own"):
        found.predictive()


def test_a_posterior_of_a_file_is_checked_as_well(tmp_path, monkeypatch):
    diagnosed(X, Y).save(tmp_path / "saved")
    monkeypatch.setattr(unchanged, "COPIED", 0)
    y = Y.clone()
    found = pf.load(tmp_path / "saved", regression, X, y)
    found.predictive()
    y += 1.0
    with pytest.raises(ValueError, match="argument 'y' has changed"):
        found.predictive()


def test_fits_side_by_side_keep_their_data():
    sets = [(X, Y + shift) for shift in (0.0, 0.5, 1.0, 1.5)]
    kept = [y.clone() for _, y in sets]
    found = pf.fit_many(regression, sets, draws=200, max_steps=200, progress=False)
    for _, y in sets:
        y += 100.0
    for posterior, y in zip(found, kept, strict=True):
        assert np.allclose(posterior.to_arviz()["observed_data"]["y"], y)
