"""Results that are pickled and copied: for joblib, Dask and multiprocessing."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_flows as pf
from tests.posteriors import OFF, SCHOOLS, Y, new_schools_posterior, same_group, schools, schools_flow

# Most guides here were not trained: what is tested is what comes back of them.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")


def fitted():
    """A posterior of a flow guide, with a model and data that cannot be pickled."""
    runs, lock = [], threading.Lock()
    secret = torch.full((SCHOOLS,), 1234.5)

    def model(y, x=None):
        with lock:
            runs.append(None)
        with pyro.plate("school", SCHOOLS):
            theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
            pyro.deterministic("double", 2 * theta)
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    guide = pf.AutoRealNVP(model, layers=2, hidden=(8,)).initialize(Y, secret)
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()).step(Y, secret)
    return pf.diagnose(model, guide, Y, secret, draws=200), runs


def same_draws(one, other):
    for name in ("z", "log_p", "log_q", "log_weights", "_used", "_used_log_p", "_used_log_q", "losses"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(one.samples[name], other.samples[name]) for name in one.samples)
    assert one.verdict == other.verdict
    assert (one.k_hat, one.ess, one.elbo, one.log_evidence) == (other.k_hat, other.ess, other.elbo, other.log_evidence)
    assert str(one) == str(other)


def test_a_posterior_is_pickled_without_its_model_and_data():
    posterior, runs = fitted()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        pickle.dumps(posterior.density)
    before = len(runs)
    data = pickle.dumps(posterior)
    again = pickle.loads(data)
    assert len(runs) == before
    assert torch.full((SCHOOLS,), 1234.5).numpy().tobytes() not in data
    assert Y.numpy().tobytes() not in data
    same_draws(posterior, again)
    assert again.density is None
    assert again.guide is None
    assert again.missing["density"] == again.missing["guide"] == "unpickled without a model"
    z = posterior.z[:5]
    torch.testing.assert_close(again.flow.log_prob(z), posterior.flow.log_prob(z), rtol=0, atol=0)
    assert again.summary().equals(posterior.summary())
    assert again.assign_coords({"school": list("abcdefgh")}).summary("theta").index[0] == "theta[a]"
    assert torch.equal(again.resample(9, force=True)["theta"], posterior.resample(9, force=True)["theta"])
    assert posterior.density is not None  # and the original keeps what it has
    torch.testing.assert_close(posterior.density(z), posterior.log_p[:5])  # a batch of another size rounds differently
    same_draws(again, pickle.loads(pickle.dumps(again)))


def test_what_needs_the_model_says_so():
    again = pickle.loads(pickle.dumps(new_schools_posterior("corrected", draws=200)))
    for ask in (again.predictive, again.resample):
        with pytest.raises(
            ValueError, match=r"this needs the model, but the posterior was unpickled without a model\."
        ):
            ask()
    with pytest.warns(UserWarning, match=r"only the groups posterior, sample_stats, .* are there: it was unpickled"):
        tree = again.to_arviz()
    with pytest.raises(KeyError):
        tree["log_likelihood"]


@pytest.mark.parametrize("status", list(OFF))
def test_the_groups_that_need_no_model_are_those_of_the_original(status):
    posterior = new_schools_posterior(status, draws=200)
    again = pickle.loads(pickle.dumps(posterior))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups, attrs = again._groups(True)
    whole, all_attrs = posterior._groups(True)
    assert {"posterior", "sample_stats", "unconstrained_posterior", "fit"} <= set(groups)
    assert all(group.identical(whole[name]) for name, group in groups.items())
    assert attrs == all_attrs


def test_an_unpickled_posterior_can_be_saved_and_gets_its_model_back(tmp_path):
    posterior = new_schools_posterior(draws=200)
    again = pickle.loads(pickle.dumps(posterior))
    with pytest.warns(UserWarning, match="only the groups"):
        again.save(tmp_path / "saved")
    bare = pf.load(tmp_path / "saved")
    assert "unpickled without a model" in bare.missing["groups"]
    with pytest.warns(UserWarning, match="only the groups"):
        bare.to_arviz()
    back = pf.load(tmp_path / "saved", schools, Y)
    same_draws(posterior, back)
    assert "groups" not in back.missing
    for name, group in back._groups(True)[0].items():
        same_group(group, posterior._groups(True)[0][name])


@pytest.mark.parametrize("loaded", [False, True])
def test_a_loaded_posterior_is_pickled_with_what_it_has(tmp_path, loaded):
    posterior = new_schools_posterior(draws=200)
    posterior.save(tmp_path / "saved")
    first = pf.load(tmp_path / "saved", *((schools, Y) if loaded else ()))
    again = pickle.loads(pickle.dumps(first))
    same_draws(posterior, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.to_arviz()


def test_a_pickle_is_not_longer_than_its_draws():
    """The raw draws are cut from a pool of four times as many, which must not go along."""
    posterior = pf.diagnose(schools, AutoNormal(schools), Y, draws=5000)
    assert len(pickle.dumps(posterior)) < 12 * posterior.z.numel() * 4


def test_flows_of_ones_own_that_cannot_be_pickled_stay_behind_with_the_reason():
    class Local(pf.transforms.Planar):
        pass

    guide = pf.AutoFlow(schools, pf.Flow(Local(SCHOOLS))).initialize(Y)
    posterior = pf.diagnose(schools, guide, Y, draws=200)
    again = pickle.loads(pickle.dumps(posterior))
    assert again.flow is None
    assert "it could not be pickled" in again.missing["flow"]
    same_draws(posterior, again)


@pytest.mark.slow
def test_another_process_needs_no_model(tmp_path):
    (tmp_path / "models.py").write_text(
        "import pyro, pyro.distributions as dist\n"
        "def model(y):\n"
        "    pyro.sample('y', dist.Normal(pyro.sample('x', dist.Normal(0.0, 1.0)), 1.0), obs=y)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from models import model
    finally:
        sys.path.remove(str(tmp_path))
    posterior = pf.diagnose(model, pf.AutoPlanar(model, layers=2), torch.tensor(0.5), draws=200)
    (tmp_path / "posterior.pickle").write_bytes(pickle.dumps(posterior))
    program = "import pickle, sys; p = pickle.load(open(sys.argv[1], 'rb')); print(len(p.z), 'models' in sys.modules)"
    words = [sys.executable, "-c", program, tmp_path / "posterior.pickle"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[0] == "200 False", done.stderr


# copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "AutoNormal", "function", "loaded"])
def test_copies_have_all_that_the_original_has(tmp_path, kind):
    if kind in ("function", "loaded"):
        posterior = new_schools_posterior(draws=200)
    else:
        guide = schools_flow() if kind == "flow" else AutoNormal(schools)
        posterior = pf.diagnose(schools, guide, Y, draws=200)
    if kind == "loaded":
        posterior.save(tmp_path / "saved")
        posterior = pf.load(tmp_path / "saved")
    for how in (copy.copy, copy.deepcopy):
        again = how(posterior)
        assert again is not posterior
        same_draws(posterior, again)
        assert again.missing == posterior.missing
        for name, group in again._groups(True)[0].items():
            same_group(group, posterior._groups(True)[0][name])
        if kind != "loaded":
            assert torch.equal(again.predictive(draws=9)["y"], posterior.predictive(draws=9)["y"])
        if how is copy.deepcopy:
            again.z.zero_()
            assert posterior.z.any()
        if kind == "flow":
            assert again.flow is again.guide._flow
            assert (again.flow is posterior.flow) == (how is copy.copy)
            assert again.guide.sample_posterior(3)["theta"].shape == (3, SCHOOLS)


def test_flows_that_pyro_knows_are_pickled_and_copied():
    """Pyro leaves weak references on parameters, which pickle refuses."""
    flow = pf.realnvp(2, layers=2)

    def model():
        pyro.module("flow", flow)
        return pyro.sample("z", flow())

    guide = pyro.infer.autoguide.AutoNormal(model)
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step()
    assert any(hasattr(parameter, "unconstrained") for parameter in flow.parameters())
    y = torch.randn(4, 2)
    for again in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert isinstance(again, nn.Module)
        torch.testing.assert_close(again.log_prob(y), flow.log_prob(y), rtol=0, atol=0)
        assert again.recipe == flow.recipe


def test_densities_and_verdicts_are_pickled_and_copied():
    fit = pf.fit_density("nice", torch.randint(17, (100, 3)), levels=17, max_epochs=2, progress=False)
    for again in (pickle.loads(pickle.dumps(fit)), copy.deepcopy(fit), copy.copy(fit)):
        assert torch.equal(again.sample(5, seed=1), fit.sample(5, seed=1))
        assert again.summary() == fit.summary()
        assert again.levels == fit.levels
    verdict = new_schools_posterior("unreliable", draws=200).verdict
    assert pickle.loads(pickle.dumps(verdict)) == copy.deepcopy(verdict) == verdict
