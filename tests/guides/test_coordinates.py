"""The coordinates of hierarchical sites that a guide chooses: they go wherever its parameters go."""

import copy
import io
import logging
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

import pyro_flows as pf
from pyro_flows.guides import setup
from tests.invariants import close
from tests.models import normal, real
from tests.registry import randomize

Y, OTHER, X = 2.0 + normal(5, seed=3), 9.0 * normal(5, seed=4), normal(3, 5, seed=12)


def groups(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def made(y=Y, **options):
    return pf.AutoRealNVP(groups, **{"layers": 2, "hidden": (8,), **options}).initialize(y)


@pytest.fixture(scope="module")
def trained():
    """A guide with a flow that is far from where it began, so that coordinates matter."""
    guide = made()
    assert set(guide.structure.noncentered) == {"theta"}
    randomize(guide.flow, sd=0.2, seed=5)
    return guide


def answers(guide, y=Y):
    """Densities of the guide at given values, its medians, and its ELBO by Pyro's own handlers."""
    values = {"mu": normal(4, seed=6), "tau": normal(4, seed=7).exp(), "theta": normal(4, 5, seed=8)}
    pyro.set_rng_seed(0)
    loss = Trace_ELBO(num_particles=3).loss(groups, guide, y)
    return [guide.log_prob(values, y).detach(), guide.median(y)["theta"], real(loss)]


def check(guide, trained):
    for found, expected in zip(answers(guide), answers(trained), strict=True):
        close(found, expected, 1e-9)
    assert guide.structure.noncentered == trained.structure.noncentered


OTHERS = {"other data": {"y": OTHER}, "centered": {"noncentered": ()}, "non-centered": {"noncentered": ["theta"]}}
others = pytest.mark.parametrize("other", OTHERS)


@others
def test_a_state_brings_its_coordinates(trained, other):
    guide = made(**OTHERS[other])
    assert guide.structure.noncentered != trained.structure.noncentered
    guide.load_state_dict(trained.state_dict())
    check(guide, trained)


@others
def test_so_does_the_state_of_a_module_around(trained, other):
    around = nn.ModuleList([made(**OTHERS[other])])
    around.load_state_dict(nn.ModuleList([trained]).state_dict())
    check(around[0], trained)


@others
def test_so_does_pyros_store(trained, other, tmp_path):
    first = copy.deepcopy(trained)
    first(Y)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    guide = made(**OTHERS[other])
    guide(Y)
    check(guide, trained)


@others
def test_so_do_tensors_that_are_written_in_place(trained, other):
    """As DistributedDataParallel sends those of the first process to the others."""
    guide = made(**OTHERS[other])
    for mine, theirs in zip(guide.state_dict().values(), trained.state_dict().values(), strict=True):
        mine.data.copy_(theirs)
    check(guide, trained)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "double"])
def test_copies_keep_them(trained, way):
    trained(Y)
    assert len(list(pyro.get_param_store().items()))  # which leaves a weak reference at each tensor
    if way == "pickle":
        guide = pickle.loads(pickle.dumps(trained)).attach(groups, Y)
    elif way == "torch.save":
        torch.save(trained, file := io.BytesIO())
        guide = torch.load(io.BytesIO(file.getvalue()), weights_only=False).attach(groups, Y)
    else:
        guide = copy.deepcopy(trained)
        guide = guide.double() if way == "double" else guide
    check(guide, trained)
    guide.load_state_dict(made(noncentered=()).state_dict())
    assert not guide.structure.noncentered
    assert trained.structure.noncentered


def test_a_pickled_guide_without_its_model_says_what_it_needs(trained):
    with pytest.raises(RuntimeError, match=r"loaded without its model; give it one with guide.attach"):
        pickle.loads(pickle.dumps(trained)).sample_posterior(3)


def older(guide):
    """A state as it was before it held coordinates."""
    return {name: value.clone() for name, value in guide.state_dict().items() if setup.CENTERING not in name}


def without(own, gone):
    return {name: value for name, value in own.items() if name not in gone}


@pytest.mark.parametrize("by_store", [False, True])
def test_a_state_without_coordinates_is_one_of_the_model_or_of_what_was_asked_for(by_store):
    for options, expected in (({}, ()), ({"noncentered": ["theta"]}, ["theta"])):
        first, second = made(noncentered=expected), made(OTHER, **options)
        randomize(first.flow, sd=0.2, seed=9)
        if by_store:
            first(Y)
            held = pyro.get_param_store().get_state()
            gone = {f"AutoRealNVP.{setup.CENTERING}"}
            assert gone < set(held["params"])
            pyro.clear_param_store()
            pyro.get_param_store().set_state({part: without(own, gone) for part, own in held.items()})
            second(Y)
        else:
            second.load_state_dict(older(first))
        check(second, first)


def test_a_state_of_other_sites_is_refused(trained):
    def more(y):
        with pyro.plate("two", 2):
            tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(real(0.0), 1.0))
            pyro.sample("y", dist.Normal(theta, tau.sum()), obs=y)

    guide = pf.AutoRealNVP(more, layers=2, hidden=(8,)).initialize(Y)
    assert setup.CENTERING not in guide.state_dict()
    with pytest.raises(RuntimeError, match=f'Unexpected key.* "{setup.CENTERING}"'):
        guide.load_state_dict(trained.state_dict())


def test_path_elbo_follows_a_state(trained, tmp_path):
    first, guide, loss = copy.deepcopy(trained), made(OTHER), pf.PathELBO(num_particles=200)
    expected = loss.loss(groups, first, Y)
    first(Y)
    pyro.get_param_store().save(tmp_path / "store")
    followed = pf.PathELBO(num_particles=200)
    svi = SVI(groups, guide, pyro.optim.SGD({"lr": 0.0}), followed)
    svi.step(Y)
    pyro.get_param_store().load(tmp_path / "store")
    loaded = svi.step(Y)
    assert followed.reason is None
    assert guide.structure.noncentered == trained.structure.noncentered
    assert abs(loaded - expected) < 0.15 * abs(expected)
    guide.load_state_dict(made(OTHER, noncentered=()).state_dict())
    svi.step(Y)
    assert not followed._kept_of(groups, guide, (Y,), {}).structure.noncentered


def test_a_verdict_is_in_the_coordinates_of_the_store(trained, tmp_path):
    first = copy.deepcopy(trained)
    first(Y)
    expected = pf.diagnose(groups, first, Y, draws=200, progress=False)
    pyro.get_param_store().save(tmp_path / "store")
    run = made(OTHER)
    run(Y)
    for guide in (run, pf.AutoRealNVP(groups, layers=2, hidden=(8,))):
        pyro.get_param_store().load(tmp_path / "store")
        found = pf.diagnose(groups, guide, Y, draws=200, progress=False)
        close(found.log_weights, expected.log_weights, 1e-9)


# which guides choose --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"init": "prior"}, {"init_scale": 0.1}, {"init_loc_fn": pyro.infer.autoguide.init_to_mean}, {"affine": "none"}],
)
def test_where_a_guide_starts_does_not_matter(trained, options):
    guide = made(**options)
    assert guide.structure.noncentered == trained.structure.noncentered
    if "init_scale" in options:
        close(guide.affine.scale_tril, 0.1 * torch.eye(7).double(), 0.0)


def test_guides_that_keep_the_models_coordinates(caplog):
    """A flow that is given as it is, a part of a list, and a guide whose model's density is not known."""
    flow = pf.realnvp(7, layers=2).double()
    assert not pf.AutoFlow(groups, flow, affine="none").initialize(Y).structure.noncentered
    part, whole = pf.AutoRealNVP(poutine.block(groups, hide=["mu"]), layers=2), AutoGuideList(groups)
    whole.append(part)
    whole.append(AutoNormal(poutine.block(groups, expose=["mu"])))
    whole(Y)
    assert not part.structure.noncentered

    def drawn(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[rows])

    with caplog.at_level(logging.DEBUG, "pyro_flows"):
        assert not pf.AutoRealNVP(drawn, layers=2).initialize(Y).structure.noncentered
    assert "starts at the prior, in the model's coordinates" in caplog.text


def test_models_without_hierarchical_sites_are_left_alone(monkeypatch):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(real(0.0), 1.0)), 1.0), obs=y)

    monkeypatch.setattr(setup, "choose_coordinates", None)
    guide = pf.AutoRealNVP(model, layers=2).initialize(Y)
    assert setup.CENTERING not in guide.state_dict()
    assert not guide.structure.dependent


@pytest.mark.parametrize("groups", ["vectorized", "written out"])
def test_a_guides_own_run_of_the_model_ends_with_the_last_latent(groups):
    """A likelihood may take long. A model that catches errors does not see how its run ends."""
    places, ended = [], []

    def model(y):
        try:
            mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
            tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
            if groups == "vectorized":
                with pyro.plate("groups", len(y)):
                    theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                each = [pyro.sample(f"theta_{row}", dist.Normal(mu, tau)) for row in range(len(y))]
                theta = torch.stack(each)
            places.append("likelihood")
        except Exception:
            places.append("caught")
            raise
        finally:
            ended.append(True)
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)

    guide = pf.AutoRealNVP(model, layers=2, hidden=(8,)).initialize(Y)
    assert any(name.startswith("theta") for name in guide.structure.noncentered)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        places.clear(), ended.clear()
        svi.step(Y)
        assert places == ["likelihood"]  # of the model
        assert len(ended) == 2


def test_medians_are_those_of_the_values(trained):
    """And not the values at the medians of the coordinates."""
    median, middle = trained.median(Y), trained.quantiles([0.5], Y)
    draws = trained.sample_posterior(1000, Y)
    for name, value in median.items():
        assert bool(((value - middle[name][0]).abs() < 0.01 * draws[name].std(0)).all()), name


@pytest.mark.parametrize("batch", [(), (3, 1), (2, 3, 1)])
def test_the_transform_ends_in_pyros_unconstrained_values(trained, batch):
    x = normal(*batch, 7, seed=10)
    transform = trained.get_transform()
    y = transform(x)
    close(transform.inv(y.clone()), x, 1e-9)
    values = {site["name"]: value for site, value in trained._unpack_latent(y)}
    values = {"mu": values["mu"].reshape(batch), "tau": values["tau"].exp().reshape(batch), "theta": y[..., 2:]}
    ladj = trained.get_transform().log_abs_det_jacobian(x, y)
    expected = trained.get_base_dist().log_prob(x) - ladj - values["tau"].log()
    close(trained.log_prob(values, Y).detach(), expected.detach(), 1e-9)


# guides with plates ---------------------------------------------------------------------------------------------------


def rows(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    a = pyro.sample("a", dist.Normal(mu, 0.5))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def weights(y):
    """Rows depend on each other, so all latents are in the flow."""
    tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
    with pyro.plate("columns", 3):
        a = pyro.sample("a", dist.Normal(0.0, tau))
    pyro.sample("y", dist.Normal(a @ X, 1.0).to_event(1), obs=y)


BOTH = {"rows": (rows, {"noncentered": ["a"]}), "weights": (weights, {})}


@pytest.mark.parametrize("name", BOTH)
def test_guides_with_plates_have_coordinates_for_their_flow(name):
    model, options = BOTH[name]
    first, second = (pf.AutoHierarchicalFlow(model, layers=2, **own) for own in (options, {"noncentered": ()}))
    for guide in (first, second):
        guide.initialize(Y)
    assert [set(guide.top.structure.noncentered) for guide in (first, second)] == [{"a"}, set()]
    posteriors = [pf.diagnose(model, guide, Y, draws=1000, progress=False) for guide in (first, second)]
    one, other = (posterior.samples["a"].double() for posterior in posteriors)
    assert bool(((one.mean(0) - other.mean(0)).abs() < 0.3 * other.std(0)).all())
    assert abs(posteriors[0].log_evidence - posteriors[1].log_evidence) < 0.1
    randomize(first.top.flow, sd=0.1, seed=11)
    second.load_state_dict(first.state_dict())
    found = []
    for guide in (first, second):
        pyro.set_rng_seed(1)
        found.append(guide.sample_posterior(3, Y)["a"])
    close(*found, 1e-9)
    for guide, expected in ((first, {"a"} if options else set()), (second, set())):
        guide.load_state_dict(older(guide))
        assert set(guide.top.structure.noncentered) == expected


@pytest.mark.parametrize("size", [1, 7])
def test_data_of_another_size_are_named(size):
    guide = made()
    steps = [SVI(groups, guide, pyro.optim.Adam({}), loss).step for loss in (Trace_ELBO(), pf.PathELBO(2))]
    for ask in (*steps, guide.median, lambda y: pf.diagnose(groups, guide, y, progress=False)):
        ask(Y)
        with pytest.raises(ValueError, match=r"site 'theta'.* got .*\((1,|7,|5,)\)\. For data of another size"):
            ask(normal(size, seed=9))
