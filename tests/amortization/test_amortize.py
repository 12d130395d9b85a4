"""One flow for all data sets of a form: its answers are exact where they say so, and name data that it cannot know."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows as pf
from pyro_flows.amortization.amortized import Pilot, left_out
from pyro_flows.amortization.building import Read, couplings, exchangeable_rows, simulate
from pyro_flows.amortization.form import Scale, bound, ess_share
from pyro_flows.amortization.networks import Conditional, Pooled, Sorted, matched, perceptron
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import set_df, start_at, with_preprocess
from pyro_flows.flows.recipe_json import not_rebuilt
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.weighing import log_mean, tempered
from pyro_flows.posterior.report.page import recipe
from pyro_flows.priors import making
from pyro_flows.transforms.fixed import Preprocess
from tests.calibration.models import NOISE, X, branching, exact, regression, two_modes

FAST = {"simulations": 6000, "max_epochs": 12, "progress": False}
DATA = torch.tensor([0.4, -1.1, 0.3, 1.2, -0.2])


@pytest.fixture(scope="module")
def amortized():
    return pf.amortize(regression, X, torch.zeros(5), **FAST)


@pytest.fixture(scope="module")
def data_sets():
    return pf.LogDensity(regression, (X, torch.zeros(5))).prior(12, seed=3)["y"]


def test_answers_are_those_of_the_closed_form(amortized, data_sets):
    for y in data_sets:
        posterior = amortized(X, y)
        assert posterior.verdict.status in ("ok", "corrected")
        mean, covariance = exact(X, y)
        sds = covariance.diagonal().sqrt()
        draws = posterior.samples["b"]
        assert ((draws.mean(0) - mean).abs() < 0.15 * sds).all()
        assert ((draws.std(0) / sds).log().abs() < 0.12).all()
        evidence = dist.MultivariateNormal(torch.zeros(5), X @ X.T + NOISE**2 * torch.eye(5)).log_prob(y)
        assert posterior.log_evidence == pytest.approx(float(evidence), abs=0.05)


def test_draws_with_nearly_even_weights_are_resampled_too(amortized, monkeypatch):
    """A mean of draws is off by as much as the square root of S/ESS - 1 tells: .14 sds, where ESS/S is .98."""
    mean, covariance = exact(X, DATA)
    given, root = type(amortized._parts.conditional).given, torch.linalg.cholesky(covariance)

    def off(parts, features, dtype):
        flow = location_scale(2, base="normal").to(given(parts, features, dtype)._like)
        start_at(flow, mean + 0.09 * root[:, 0], root)
        return flow

    monkeypatch.setattr(type(amortized._parts.conditional), "given", off)
    posterior = amortized(X, DATA)
    assert 0.98 < posterior.verdict.ess_ratio < 0.998
    assert posterior.verdict.status == "corrected"
    assert f"ESS/S {posterior.verdict.ess_ratio:.4f} is below 0.9984" in posterior.verdict.reasons[0]
    assert ((posterior.samples["b"].mean(0) - mean).abs() < 0.05 * covariance.diagonal().sqrt()).all()


def test_an_answer_is_an_ordinary_posterior(amortized, tmp_path):
    posterior = amortized.posterior(X, DATA, draws=400, seed=1)
    assert posterior.method == "amortized flow"
    assert posterior.samples["b"].shape == (400, 2)
    assert any("no search for missed modes" in note for note in posterior.verdict.notes)
    assert "trained by maximum likelihood on 6,000 simulations" in posterior.methods_text()
    assert "eprint = {2409.04332}" in posterior.references()
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", regression, X, DATA)
    assert again.method == "amortized flow"
    assert torch.allclose(again.flow.log_prob(posterior.z), posterior.log_q, atol=1e-4)
    same = amortized.posterior(X, DATA, draws=400, seed=1)
    assert torch.equal(same.z, posterior.z)
    assert not torch.equal(amortized.posterior(X, DATA, draws=400, seed=2).z, posterior.z)


def test_an_answer_draws_from_the_flow_as_it_was_trained(amortized, data_sets):
    parts = amortized._parts
    for y, features in zip(data_sets[:4], parts.features({"y": data_sets[:4]}).float(), strict=True):
        posterior = amortized.posterior(X, y, draws=100)
        z, log_q = posterior.z, posterior.log_q
        assert torch.allclose(log_q, parts.conditional.flow.log_prob(z, features.expand(len(z), -1)), atol=1e-3)


def test_the_effective_share_is_that_of_weights():
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    assert ess_share(weights.log() + 1000.0) == pytest.approx(36.0 / 14.0 / 4.0)
    assert ess_share(torch.full((4,), torch.nan)) == 0.0


def test_arguments_come_by_name_and_as_arrays(amortized):
    one, other = amortized(X, DATA), amortized(x=X, y=DATA.numpy())
    assert torch.equal(one.z, other.z)


@pytest.mark.slow
def test_chains_go_on_where_an_answer_is_unreliable(amortized):
    far = DATA + torch.tensor([30.0, -30.0, 25.0, 40.0, -20.0])
    posterior = amortized.posterior(X, far, escalate=True)
    assert posterior.verdict.status in ("corrected", "refined")
    mean, covariance = exact(X, far)
    assert ((posterior.samples["b"].mean(0) - mean).abs() < 0.2 * covariance.diagonal().sqrt()).all()


def test_data_outside_of_the_prior_predictive_are_named_and_never_ok(amortized, data_sets):
    assert sum(bool(amortized.outside(X, y)) for y in data_sets) == 0
    for y in data_sets:
        for change in (torch.full((5,), 50.0), torch.tensor([0.0, 30.0, 0.0, 0.0, 0.0]), 8.0 * X[:, 1].sign()):
            (said,) = amortized.outside(X, y + change)
            assert said.startswith("the data are outside of what the prior predicts")
            verdict = amortized(X, y + change).verdict
            assert verdict.status != "ok"
            assert said in verdict.reasons
    assert "y[1] is farther out" in amortized.outside(X, DATA + torch.tensor([0.0, 300.0, 0.0, 0.0, 0.0]))[0]


def test_many_data_sets_at_once(amortized, data_sets):
    samples, log_weights = amortized.samples({"y": data_sets}, 500)
    assert samples["b"].shape == (12, 500, 2)
    for number, y in enumerate(data_sets):
        evidence = dist.MultivariateNormal(torch.zeros(5), X @ X.T + NOISE**2 * torch.eye(5)).log_prob(y)
        assert float(log_mean(log_weights[number])) == pytest.approx(float(evidence), abs=0.2)
    with pytest.raises(ValueError, match=r"data\['y'\]: expected shape \(K, \*\(5,\)\)"):
        amortized.samples({"y": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"site 'y': expected missing values \(NaN\) where amortize was given them"):
        amortized.samples({"y": torch.tensor([[0.0] * 5, [math.nan] * 5])})


@pytest.mark.parametrize("way", [pickle.dumps, copy.deepcopy])
def test_it_is_saved_and_not_pickled(amortized, way):
    with pytest.raises(TypeError, match=r"Amortized: .* not pickled or copied\. Use save"):
        way(amortized)


@pytest.mark.slow
def test_answers_are_calibrated(amortized):
    found = pf.sbc(regression, X, DATA, sampler=amortized, simulations=40, seed=1, progress=False)
    assert found.is_uniform(0.01)
    assert found.method == "Amortized"
    assert found.statuses.get("unreliable", 0) <= 3


def test_an_answer_has_a_report_and_makes_a_prior(amortized, monkeypatch):
    posterior = amortized.posterior(X, DATA, draws=400, seed=1)
    text = recipe(posterior)
    assert "# amortized = pf.amortize(regression, ...), or pf.Amortized.load(...)" in text
    assert "posterior = amortized.posterior(x, y, draws=400, seed=1)\n" in text
    scope = {"amortized": amortized, "x": X, "y": DATA}
    exec(text, scope)
    assert torch.equal(scope["posterior"].z, posterior.z)
    monkeypatch.setattr(making, "OWN_ERROR_MOST", 0.0)
    monkeypatch.setattr(making, "STEPS", 2)
    making._own(posterior, ["b"], 0)  # its flow, which is frozen, is trained on


@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")
def test_double_precision_as_the_default(amortized, tmp_path):
    amortized.save(tmp_path / "saved")
    evidence = amortized.posterior(X, DATA).log_evidence
    torch.set_default_dtype(torch.float64)
    try:
        again = pf.Amortized.load(tmp_path / "saved", regression, X, torch.zeros(5))
        assert again.posterior(X, DATA).log_evidence == pytest.approx(evidence, abs=0.05)
        options = {"simulations": 1000, "max_epochs": 1, "progress": False}
        made = pf.amortize(regression, X.double(), torch.zeros(5), **options)
        assert made.posterior(X.double(), DATA.double()).samples["b"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_saved_flow_answers_as_before(amortized, tmp_path):
    amortized.save(tmp_path / "saved")
    again = pf.Amortized.load(tmp_path / "saved", regression, X, torch.zeros(5))
    assert again.settings == amortized.settings
    one, other = amortized(X, DATA), again(X, DATA)
    assert torch.allclose(one.z, other.z, atol=1e-5)
    assert one.verdict.status == other.verdict.status
    with pytest.raises(ValueError, match="log density is not that of the saved one"):
        pf.Amortized.load(tmp_path / "saved", regression, X + 0.1, torch.zeros(5))
    with pytest.raises(ValueError, match="encoder: expected the one of the training, which was 'default'"):
        pf.Amortized.load(tmp_path / "saved", regression, X, torch.zeros(5), encoder=Own())
    (tmp_path / "saved" / "amortized.pt").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        pf.Amortized.load(tmp_path / "saved", regression, X, torch.zeros(5))


class Sometimes:
    """An amortized flow whose answers to some data are unreliable."""

    def __init__(self, answers):
        self.answers = answers

    def posterior(self, *args, **options):
        if float(args[1][0]) < 0.0:
            return pf.diagnose(regression, narrow, *args, draws=200, progress=False)
        return self.answers.posterior(*args, **options)


def narrow(x, y):
    pyro.sample("b", dist.Normal(5.0 * torch.ones(2), 0.01).to_event(1))


@pytest.mark.slow
def test_many_fits_begin_with_the_answers_of_the_flow(amortized):
    sets = [(X, DATA), (X, -DATA), (X, 0.5 * DATA)]
    found = pf.fit_many(regression, sets, draws=500, amortized=Sometimes(amortized), progress=False)
    methods = [posterior.method for posterior in found]
    assert methods[0] == methods[2] == "amortized flow"
    assert methods[1] not in ("amortized flow", "guide")
    assert all(posterior.verdict.status != "unreliable" for posterior in found)
    options = {"amortized": amortized, "simulations": 10, "progress": False}
    assert pf.sbc(regression, X, DATA, **options).statuses.keys() <= {"ok", "corrected"}
    with pytest.raises(ValueError, match="amortized: expected kind='prior'"):
        pf.sbc(regression, X, DATA, kind="posterior", **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, torch.zeros(4)), r"argument 1 of shape \(5,\)"),
        ((X + 1.0, DATA), "argument 0 is no data, and differs"),
        ((X, torch.tensor([0.0, math.nan, 0.0, 0.0, 0.0])), "site 'y': expected missing values"),
        ((X, torch.tensor([0.0, math.inf, 0.0, 0.0, 0.0])), "site 'y': expected finite data"),
        ((X, "y"), "argument 1 to hold numbers, since it is data, got 'y'"),
    ],
    ids=["shape", "covariates", "missing", "infinite", "no numbers"],
)
def test_other_data_are_refused(amortized, args, message):
    with pytest.raises(ValueError, match=message):
        amortized(*args)


# what is trained ------------------------------------------------------------------------------------------------------


def conditional(flow, dim, encoder=None, entries=6):
    """A flow with random weights everywhere, as if it were trained."""
    with torch.random.fork_rng():
        torch.manual_seed(dim)
        found = Conditional(couplings(flow, dim, 2, 64), encoder or perceptron(entries), entries)
        for parameter in found.flow.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        last = Preprocess(torch.randn(dim), 0.5 + torch.rand(dim), torch.randn(entries, dim))
    found.trained(with_preprocess(found.flow, last).double())
    return found


@pytest.mark.parametrize("dim", [1, 2, 5, 60])
@pytest.mark.parametrize("flow", ["realnvp", "spline"])
def test_the_flow_of_one_data_set_is_the_conditional_flow_there(flow, dim):
    made = conditional(flow, dim)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, generator=generator, dtype=torch.float64)
    plain = made.given(features, torch.float64)
    z = plain.draw(7)[0]
    assert plain.context_dim == 0
    assert torch.allclose(plain.log_prob(z), made.flow.log_prob(z, features.expand(7, -1)), atol=1e-8)
    assert not_rebuilt(plain) is None
    other = made.given(features + 1.0, torch.float64)
    assert not torch.allclose(other.log_prob(z), plain.log_prob(z))


def test_weights_have_no_tail_where_the_posterior_has_heavier_tails_than_the_trained_flow():
    flow = conditional("realnvp", 3).given(torch.zeros(6, dtype=torch.float64), torch.float64)
    posterior = set_df(copy.deepcopy(flow), 5.5)  # 7 in the training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z, log_q = flow.draw(20_000)
    assert psis(posterior.log_prob(z) - log_q)[1] < 0.1


def test_a_poor_flow_is_replaced_by_its_base_at_the_weighted_moments():
    """A bent flow that is two sds off, and as wide; the base reaches a normal posterior in three moves."""
    flow = conditional("realnvp", 3).given(torch.zeros(6, dtype=torch.float64), torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = flow.draw(4000)[0]
        shape = torch.tensor([[0.7, 0.0, 0.0], [0.3, 0.5, 0.0], [0.0, 0.2, 0.6]], dtype=torch.float64)
        root = torch.linalg.cholesky(z.mT.cov()) @ shape
        posterior = dist.MultivariateNormal(z.mean(0) + 2.0 * z.std(0), scale_tril=root)
        shares = []
        for _ in range(4):
            z, log_q = flow.draw(2048)
            log_weights = posterior.log_prob(z) - log_q
            shares.append(ess_share(log_weights))
            flow = matched(flow, z, log_weights)
    assert shares[0] < 0.1 < 0.6 < shares[3], shares
    assert not_rebuilt(flow) is None
    assert tempered(log_weights) == 1.0
    assert ess_share(tempered(30.0 * log_weights) * 30.0 * log_weights) == pytest.approx(0.1, abs=0.001)
    nowhere = torch.full((2048,), -math.inf, dtype=torch.float64)
    assert matched(flow, z, nowhere) is flow


def test_data_of_heavy_tails_come_by_asinh():
    rows = torch.cat([torch.distributions.StudentT(1.0).sample((4000, 3)), torch.randn(4000, 2)], 1).double()
    scale = Scale(rows, [3, 2], exchangeable=1)
    assert scale.heavy.tolist() == [True, True, True, False, False]
    point = rows[7].clone().requires_grad_()
    jacobian = torch.func.jacrev(lambda row: scale(row[None])[0])(point)
    assert torch.allclose(jacobian.slogdet().logabsdet, scale.log_slope(scale(point[None]))[0])
    counts = torch.zeros(100, 2, dtype=torch.float64)
    counts[0] = 1.0
    assert torch.isfinite(Scale(counts, [2], exchangeable=1)(counts)).all()


def iid(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_rows_with_covariates_are_not_pooled_though_the_data_that_were_given_are_all_alike():
    def slope(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    x = torch.linspace(-1.0, 1.0, 20)
    read = simulate(slope, bound(slope, (x, torch.zeros(20)), {}), None, 100, 0, seed=0)
    assert exchangeable_rows(read) == 1
    same = Read(*read[:3], {name: torch.cat([torch.zeros(1, 20), values]) for name, values in read.observed.items()})
    assert exchangeable_rows(same) == 1  # the first data set tells nothing
    read = simulate(slope, bound(slope, (torch.ones(20), torch.zeros(20)), {}), None, 100, 0, seed=0)
    assert exchangeable_rows(read) == 20


def pairs(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape", "kind"), [(iid, (20,), Sorted), (pairs, (20, 2), Pooled)])
def test_rows_that_are_exchangeable_are_sorted_if_each_is_a_number_and_else_pooled(model, shape, kind):
    amortized = pf.amortize(model, torch.randn(shape), simulations=1000, max_epochs=1, progress=False)
    assert amortized.settings["rows"] == 20
    assert any(isinstance(layer, kind) for layer in amortized._parts.conditional.flow.modules())
    y = torch.linspace(-2.0, 1.0, math.prod(shape)).reshape(shape)
    one, other = (amortized.posterior(value, draws=100).z for value in (y, y.flip(0)))
    assert torch.allclose(one, other, atol=1e-4)
    assert not amortized(y).flow.context_dim


class Own(nn.Module):
    """An encoder that is told the shape that it gets."""

    def __init__(self, width=3):
        super().__init__()
        self.width, self.layer, self.shapes = width, nn.Linear(5, 3), set()

    def forward(self, y):
        self.shapes.add(tuple(y.shape[1:]))
        return self.layer(y)[:, : self.width] if self.width else self.layer(y).sum()


@pytest.mark.slow
def test_an_encoder_of_the_callers_gets_the_data():
    encoder = Own()
    found = pf.amortize(regression, X, DATA, encoder=encoder, simulations=1000, max_epochs=1, progress=False)
    assert encoder.shapes == {(5,)}
    assert found(X, DATA).samples["b"].shape == (4000, 2)
    with pytest.raises(ValueError, match="encoder: expected a tensor of shape"):
        pf.amortize(regression, X, DATA, encoder=Own(0), simulations=1000, progress=False)
    with pytest.raises(ValueError, match="encoder: expected a torch module"):
        pf.amortize(regression, X, DATA, encoder=len, progress=False)


@pytest.mark.falls_back
def test_a_model_that_takes_numbers_out_of_its_data():
    amortized = pf.amortize(branching, torch.arange(4.0), simulations=2000, max_epochs=8, progress=False)
    y = torch.tensor([0.5, -1.0, 1.5, 0.0])
    assert amortized.outside(y) == ()
    posterior = amortized(y)
    precision = 4.0 + 0.25
    assert float(posterior.samples["mu"].mean()) == pytest.approx(float(y.sum()) / precision, abs=0.1)
    assert amortized.outside(y + 1000.0)
    with pytest.raises(ValueError, match="does not take many data sets at once"):
        amortized.samples({"y": torch.zeros(2, 4)})


def with_gaps(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)), pyro.poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.slow
def test_missing_values_stay_where_they_are():
    y = torch.tensor([0.3, math.nan, 1.1, -0.4])
    amortized = pf.amortize(with_gaps, y, simulations=2000, max_epochs=8, progress=False)
    posterior = amortized(y)
    assert float(posterior.samples["mu"].mean()) == pytest.approx(1.0 / 4.0, abs=0.1)
    assert float(posterior.samples["mu"].std()) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="expected missing values"):
        amortized(torch.zeros(4))


def test_values_that_are_masked_out_do_not_count():
    """In simulations they depend on the latents, and the flow must not learn from them."""

    def few(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    seen = torch.tensor([True, True, False, False, False, False])
    read = simulate(few, bound(few, (torch.zeros(6), seen), {}), None, 100, 0, seed=0)
    assert read.form.sizes == [2]
    amortized = pf.amortize(few, torch.zeros(6), seen, simulations=2000, max_epochs=8, progress=False)
    posterior = amortized(torch.tensor([1.0, 2.0, 50.0, 50.0, 50.0, 50.0]), seen)
    assert float(posterior.samples["mu"].mean()) == pytest.approx(1.0, abs=0.1)
    assert not any("outside" in reason for reason in posterior.verdict.reasons)


def test_data_of_which_nothing_counts_are_refused():
    with pytest.raises(ValueError, match="args: expected data with at least one value that is neither missing"):
        pf.amortize(with_gaps, torch.full((3,), math.nan), progress=False)


def factored(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.factor("more", -mu.square())


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(("model", "message"), [(factored, "a factor"), (improper, "expected proper priors")])
def test_models_that_cannot_draw_their_data_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        pf.amortize(model, torch.tensor(0.0), progress=False)


@pytest.mark.slow
def test_one_dimension_with_two_modes():
    amortized = pf.amortize(two_modes, torch.tensor(1.0), simulations=30_000, max_epochs=20, progress=False)
    posterior = amortized(torch.tensor(9.0))
    assert posterior.verdict.status in ("ok", "corrected")
    x = posterior.samples["x"]
    assert 0.4 < float((x > 0.0).float().mean()) < 0.6
    assert float((x.abs() - 3.0).abs().quantile(0.99)) < 0.4


@pytest.mark.parametrize(("noise", "dtype"), [(1.0, torch.float32), (1e-3, torch.float64)])
def test_precision_is_that_of_simulated_data_under_their_own_parameters(noise, dtype):
    """Under data in hand, parameters from the tail of a Cauchy prior lose digits in any model."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("groups", 8):
            theta = pyro.sample("theta", dist.Normal(1e3, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    read = simulate(model, bound(model, (torch.full((8,), 1e3),), {}), None, 64, 64, seed=0)
    assert read.density.dtype == dtype


@pytest.mark.parametrize(("second", "said"), [(0.3, True), (0.0, False)])
def test_a_moved_flow_that_leaves_out_drawn_modes_is_known(second, said):
    """Its own draws have even weights: none of them is near the second mode."""
    near = dist.Normal(torch.zeros(2).double(), 0.3).to_event(1)
    far = dist.Normal(torch.tensor([3.0, 0.0]).double(), 0.2).to_event(1)

    def density(z):
        return torch.logaddexp(near.log_prob(z) + math.log1p(-second), far.log_prob(z) + math.log(second + 1e-300))

    torch.manual_seed(0)
    broad, narrow = (location_scale(2, diagonal=True).double() for _ in range(2))
    start_at(broad, torch.zeros(2), torch.full((2,), 1.5))
    start_at(narrow, torch.zeros(2), torch.full((2,), 0.3))
    seen, pilot = (Pilot.of(flow, density, 2000) for flow in (broad, narrow))
    assert ess_share(pilot.log_weights) > 0.8
    assert left_out(narrow, pilot, [seen]) == said
