"""Which argument holds which observed site, and what data may be simulated."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.calibration.wiring import Case, check_wiring, filled, wire

Y = torch.tensor([0.3, -1.0, 2.0])


def mean_of(name="y", shape=()):
    """A model of y, under this name."""

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample(name, dist.Normal(mu, 1.0).expand(y.shape).to_event(y.dim()), obs=y)

    return model


def wired(model, *args, data=None, **kwargs):
    case = Case(args, kwargs)
    return wire(pf.LogDensity(model, args, kwargs), case, data)


def test_an_argument_is_found_by_identity_though_another_has_equal_values():
    case = wired(mean_of(), Y.clone(), Y)({"y": torch.ones(3)})
    assert torch.equal(case.args[0], Y)
    assert case.args[1].tolist() == [1.0, 1.0, 1.0]


def test_the_caller_s_tensor_stays_as_it_is():
    y = Y.clone()
    wired(mean_of(), torch.zeros(3), y)({"y": torch.ones(3)})
    assert torch.equal(y, Y)


def test_an_argument_is_found_by_equal_values():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y.clone())

    assert wired(model, torch.zeros(3), Y)({"y": torch.ones(3)}).args[1].tolist() == [1.0, 1.0, 1.0]


def test_two_arguments_with_equal_values_need_a_word():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y.clone())

    with pytest.raises(ValueError, match="'x' and 'y' both have its values"):
        wired(model, Y, Y.clone())
    for word in ("y", 1):
        found = wired(model, Y, Y.clone(), data={"y": word})
        assert found({"y": torch.ones(3)}).args[1].tolist() == [1.0, 1.0, 1.0]


def test_parts_of_an_argument_are_found_by_memory():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for row in range(2):
            pyro.sample(f"y_{row}", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y[:, row])

    y = torch.arange(6.0).reshape(3, 2)
    case = wired(model, y)({"y_0": torch.tensor([7.0, 8.0, 9.0]), "y_1": torch.zeros(3)})
    assert case.args[0].tolist() == [[7.0, 0.0], [8.0, 0.0], [9.0, 0.0]]


def test_dictionaries_and_keyword_arguments_hold_data_too():
    def model(batch, *, extra):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=batch["y"])
        pyro.sample("z", dist.Normal(mu, 1.0), obs=extra)

    found = wired(model, {"x": Y.clone(), "y": Y}, extra=torch.tensor(0.5))
    case = found({"y": torch.ones(3), "z": torch.tensor(4.0)})
    assert case.args[0]["y"].tolist() == [1.0, 1.0, 1.0]
    assert case.args[0]["x"].tolist() == Y.tolist()
    assert float(case.kwargs["extra"]) == 4.0
    told = wired(model, {"x": Y.clone(), "y": Y}, extra=torch.tensor(0.5), data={"y": "batch['y']", "z": "extra"})
    assert told({"y": torch.ones(3), "z": torch.tensor(4.0)}).args[0]["y"].tolist() == [1.0, 1.0, 1.0]


def test_whole_numbers_and_missing_values_stay_what_they_are():
    def model(n, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("n", dist.Poisson(mu.exp()).expand([3]).to_event(1), obs=n)
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).mask(~y.isnan()).to_event(1), obs=y)

    n, y = torch.tensor([1, 2, 0]), torch.tensor([0.5, torch.nan, 1.0])
    case = wired(model, n, y)({"n": torch.tensor([4.0, 5.0, 6.0]), "y": torch.tensor([1.0, 2.0, 3.0])})
    assert case.args[0].dtype == torch.int64
    assert case.args[0].tolist() == [4, 5, 6]
    assert case.args[1][[0, 2]].tolist() == [1.0, 3.0]
    assert bool(case.args[1][1].isnan())


def test_data_that_no_argument_holds_are_refused():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y.log())

    with pytest.raises(ValueError, match="site 'y': none of the arguments holds its values"):
        wired(model, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("data", "text"), [({"q": "y"}, "observed sites"), ({"y": "q"}, "'x', 'y'"), ({"y": 7}, "got 7")]
)
def test_words_that_do_not_fit_are_named(data, text):
    with pytest.raises(ValueError, match=text):
        wired(mean_of(), torch.zeros(3), Y, data=data)


def test_an_argument_of_another_size_is_refused():
    with pytest.raises(ValueError, match="not a part of it"):
        wired(mean_of(), torch.zeros(4), Y, data={"y": "x"})


# obs=None -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["y", "obs"])
def test_an_argument_that_is_none_is_filled_with_the_site_that_it_holds(site):
    def model(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample(site, dist.Normal(mu + x, 1.0).to_event(1), obs=y)

    case = filled(model, Case((torch.zeros(3),), {}), None)
    assert case.args[1].shape == (3,)
    assert wired(model, *case.args)({site: torch.ones(3)}).args[1].tolist() == [1.0, 1.0, 1.0]


def test_arguments_of_a_module_have_the_names_of_its_forward():
    class Model(torch.nn.Module):
        def forward(self, x, y=None):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + x, 1.0).to_event(1), obs=y)

    case = filled(Model(), Case((torch.zeros(3),), {}), None)
    assert wired(Model(), *case.args, data={"obs": "y"})({"obs": Y}).args[1].tolist() == Y.tolist()


def test_other_arguments_that_are_none_stay_so():
    def model(x, scale=None, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0 if scale is None else scale))
        pyro.sample("obs", dist.Normal(mu + x, 1.0).to_event(1), obs=y)

    case = filled(model, Case((torch.zeros(3),), {}), None)
    assert case.args[1] is None
    assert case.args[2].shape == (3,)


# check ----------------------------------------------------------------------------------------------------------------


def test_a_site_whose_distribution_depends_on_its_own_data_is_refused():
    def model(y):
        rho = pyro.sample("rho", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.Normal(rho * y[:-1], 1.0).to_event(1), obs=y[1:])

    density, case = pf.LogDensity(model, (Y,)), Case((Y,), {})
    with pytest.raises(ValueError, match="depends on the argument that holds its own data"):
        check_wiring(density, wire(density, case, None), {"rho": torch.tensor(0.5), "y": torch.ones(2)})


def test_data_that_the_model_does_not_see_are_refused():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

    density, case = pf.LogDensity(model, (torch.zeros(3), Y)), Case((torch.zeros(3), Y), {})
    wrong = wire(density, case, {"y": "x"})
    with pytest.raises(ValueError, match="still sees other data"):
        check_wiring(density, wrong, {"mu": torch.tensor(0.5), "y": torch.ones(3)})
