"""Every posterior that can be saved can be loaded, and is the one that was saved."""

import math
import resource
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows as pf
from pyro_flows.flows.recipe import set_df
from pyro_flows.posterior.export.files import FILES
from pyro_flows.support.files import bundles
from tests.posteriors import NETCDF, SCHOOLS, TENSORS, TEXT, Y, schools, schools_flow, schools_posterior

# Most guides here were not trained: what is tested is what comes back of them.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two posteriors of one model, saved."""
    folder = tmp_path_factory.mktemp("pair")
    for name, shift in (("old", 0.0), ("new", 0.15)):
        posterior = schools_posterior("corrected" if shift else "ok", draws=200)
        posterior.save(folder / name)
    return folder / "old", folder / "new"


def copied(source, target):
    target.mkdir()
    for name in (NETCDF, TENSORS, TEXT):
        (target / name).write_bytes((source / name).read_bytes())
    return target


# coordinates ----------------------------------------------------------------------------------------------------------


def nested(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("school", SCHOOLS):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("noncentered", [False, True, ["theta"]])
def test_a_diagnosed_guide_comes_back_in_its_own_coordinates(tmp_path, noncentered):
    guide = pf.AutoRealNVP(nested, layers=2, noncentered=noncentered)
    posterior = pf.diagnose(nested, guide, Y, draws=200)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", nested, Y)
    expected = {"theta": None} if noncentered else {}
    assert again.density.structure.noncentered == posterior.density.structure.noncentered == expected
    assert torch.allclose(again.density(again.z), posterior.log_p, rtol=1e-5)  # recorded or not: other last digits
    assert torch.equal(again.density.constrain(again._used)["theta"], again.samples["theta"])
    values = {name: value[:5] for name, value in posterior.samples.items()}
    torch.testing.assert_close(again.guide.log_prob(values), guide.log_prob(values), rtol=0, atol=0)


# flows ----------------------------------------------------------------------------------------------------------------


def points(flow, count=5):
    return flow.rsample_and_log_prob((count,))[0].detach()


def fitted_flow(preprocess="standardize"):
    y = 0.8 * Y + torch.randn(300, SCHOOLS, generator=torch.Generator().manual_seed(0))
    options = {"preprocess": preprocess, "max_epochs": 2, "progress": False}
    return pf.fit_density(pf.realnvp(SCHOOLS, layers=2, hidden=(8,)), y, **options).flow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("affine", "preprocess"), [("tril", "standardize"), ("diagonal", "whiten"), ("none", "whiten")]
)
def test_a_guide_with_a_flow_that_was_fitted_to_data(tmp_path, affine, preprocess):
    guide = pf.AutoFlow(schools, fitted_flow(preprocess), affine=affine).initialize(Y)
    posterior = pf.diagnose(schools, guide, Y, draws=200)
    posterior.save(tmp_path / "saved")
    z = points(guide._flow)
    for again in (pf.load(tmp_path / "saved"), pf.load(tmp_path / "saved", schools, Y)):
        assert "flow" not in again.missing
        torch.testing.assert_close(again.flow.log_prob(z), guide._flow.log_prob(z), rtol=0, atol=0)
    torch.testing.assert_close(again.guide._flow.log_prob(z), guide._flow.log_prob(z), rtol=0, atol=0)


def test_a_guide_whose_flow_is_another_guides(tmp_path):
    """Two affine maps, two kinds of tails, and the degrees of freedom of the inner one changed."""
    inner = schools_flow()._flow
    set_df(inner, 7.0)
    guide = pf.AutoFlow(schools, inner).initialize(Y)
    twice = pf.AutoFlow(schools, guide._flow, affine="diagonal").initialize(Y)
    posterior = pf.diagnose(schools, twice, Y, draws=200)
    posterior.save(tmp_path / "saved")
    z = points(twice._flow)
    for again in (pf.load(tmp_path / "saved"), pf.load(tmp_path / "saved", schools, Y)):
        assert again.flow.df == 7.0
        torch.testing.assert_close(again.flow.log_prob(z), twice._flow.log_prob(z), rtol=0, atol=0)


class Own(pf.transforms.Bijection):
    """A shift, which no builder makes."""

    def __init__(self):
        super().__init__()
        self.dim = SCHOOLS
        self.shift = nn.Parameter(torch.ones(SCHOOLS))

    def forward_and_ladj(self, x, context=None):
        return x + self.shift, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - self.shift, y.new_zeros(y.shape[:-1])


def changes():
    def longer(flow):
        flow.bijection = pf.transforms.Compose([*flow.bijection.layers, Own()])

    def bounded(flow):  # the same names and shapes
        flow.bijection.layers[0].layers[0].log_scale_bound = 1e-3

    def lighter(flow):
        flow.df = 100.0

    def other(flow):
        flow.base = "normal"

    def nonsense(flow):
        flow.recipe = replace(flow.recipe, options={**flow.recipe.options, "layers": 5})

    return longer, bounded, lighter, other, nonsense


@pytest.mark.parametrize("change", changes())
def test_a_flow_that_was_changed_by_hand_is_left_out_with_the_reason(tmp_path, change):
    guide = schools_flow()
    change(guide._flow)
    posterior = pf.diagnose(schools, guide, Y, draws=200)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", schools, Y)
    assert again.flow is None
    assert "it was changed after a builder made it, so it cannot be rebuilt" in again.missing["flow"]
    assert torch.equal(again.samples["theta"], posterior.samples["theta"])


def test_a_guide_of_double_precision_for_a_model_of_single(tmp_path):
    guide = pf.AutoRealNVP(schools, layers=2, hidden=(8,)).double().initialize(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    posterior = pf.diagnose(schools, guide, Y, draws=200)
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", schools, Y)
    z = points(guide._flow)
    assert z.dtype == torch.float64
    torch.testing.assert_close(again.guide._flow.log_prob(z), guide._flow.log_prob(z), rtol=0, atol=0)


def test_numbers_of_history_and_settings_come_back_as_numbers(tmp_path):
    posterior = schools_posterior(draws=200)
    history = ({"stage": "first round", "elbo": -math.inf, "k_hat": math.inf, "label": "inf", "steps": [1, 2.5]},)
    changed = type(posterior)(**{**vars(posterior), "history": history})
    changed.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    assert again.history[0]["elbo"] == -math.inf
    assert again.history[0]["k_hat"] == math.inf
    assert again.history[0]["steps"] == [1, 2.5]


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NETCDF, TENSORS, TEXT])
def test_flipped_bytes_and_files_of_another_save_are_refused(pair, tmp_path, name):
    copy = copied(pair[0], tmp_path / "copy")
    data = (copy / name).read_bytes()
    for place in range(0, len(data), max(len(data) // 40, 1)):
        changed = bytearray(data)
        changed[place] ^= 4
        (copy / name).write_bytes(bytes(changed))
        with pytest.raises(ValueError, match="path: ") as caught:
            FILES.read(copy)
        assert str(copy) in str(caught.value)
    (copy / name).write_bytes((pair[1] / name).read_bytes())
    with pytest.raises(ValueError, match="is damaged"):
        pf.load(copy)


def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_the_old(pair, tmp_path):
    copy, new = copied(pair[0], tmp_path / "copy"), pf.load(pair[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, 20_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="copy' could not be written"):
                new.save(copy)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(pf.load(copy).z, pf.load(pair[0]).z)
    assert [item.name for item in tmp_path.iterdir()] == ["copy"]


def test_each_save_goes_through_the_one_writer(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(bundles, "replace_directory", lambda path, files: written.append((path, set(files))))
    schools_posterior(draws=200).save(tmp_path / "posterior")
    fit = pf.fit_density("nice", torch.randn(50, 2), max_epochs=1, progress=False)
    fit.save(tmp_path / "density")
    assert written == [
        (tmp_path / "posterior", {NETCDF, TENSORS, TEXT}),
        (tmp_path / "density", {"density.pt", "density.json"}),
    ]
    assert not list(tmp_path.iterdir())
