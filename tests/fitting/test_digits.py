"""Fits of models in single precision that lose the digits of log p there, on all paths, against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import poisson

import pyro_flows as pf
from benchmarks.zoo import digits
from benchmarks.zoo.case import Case, Maker
from pyro_flows.posterior.draws import from_draws
from tests.slow import rest_slow

USABLE = ("ok", "corrected", "refined")
KINDS = {kind.__name__: number for number, kind in enumerate(digits.VARIANTS)}
QUICK = {"progress": False, "draws": 1000, "seed": 0}


def case_of(name: str) -> Case:
    pyro.clear_param_store()
    maker = Maker(5, KINDS[name])
    maker.large = False
    return digits.VARIANTS[KINDS[name]](maker)


def guide_of(case: Case) -> AutoMultivariateNormal:
    """A guide in single precision, at the moments of exact draws."""
    density = pf.LogDensity(case.model, case.args).in_double()
    z = density.unconstrain({name: torch.as_tensor(values) for name, values in case.exact.items()})
    guide = AutoMultivariateNormal(case.model)
    guide(*case.args)
    guide.loc.data.copy_(z.mean(0))
    root = torch.linalg.cholesky(torch.cov(z.mT).reshape(z.shape[1], -1)).float()
    guide.scale, guide.scale_tril = root.diagonal(), root / root.diagonal()[:, None]
    return guide


def check(case: Case, posterior: pf.Posterior) -> None:
    assert posterior.verdict.status in USABLE, posterior.verdict
    for name, exact in case.exact.items():
        mine = posterior.samples[name].double().numpy()
        assert np.abs((mine.mean(0) - exact.mean(0)) / exact.std(0)).max() < 0.2, name
        assert np.abs(np.log(mine.std(0) / exact.std(0))).max() < 0.14, name
    value, error, _ = posterior.evidence()
    assert abs(value - case.log_evidence) < 4.0 * error + 0.02
    assert error < 0.05
    assert abs(posterior.log_evidence - case.log_evidence) < 0.1


# These take seconds.
DEAR = ("many_rows", "trials")


@pytest.mark.parametrize("name", rest_slow(KINDS, lambda name: name not in DEAR))
def test_fits_are_right(name):
    case = case_of(name)
    check(case, pf.fit(case.model, *case.args, **QUICK))


REFINED = ("counts", "lines", "parameters")


@pytest.mark.parametrize("name", rest_slow(KINDS, REFINED.__contains__))
def test_guides_in_single_precision_are_judged_in_double_and_chains_finish_the_work(name):
    case = case_of(name)
    found = pf.diagnose(case.model, guide_of(case), *case.args, draws=1000)
    check(case, found)
    if name in REFINED:
        finished = found.refine(progress=False)
        assert finished.verdict.status == "refined"
        check(case, finished)


@pytest.mark.parametrize("name", ["counts", "constants", "lines"])
def test_data_sets_side_by_side_are_right(name):
    case = case_of(name)
    (data,) = case.args
    others = [{"y": data["y"] + float(number)} for number in range(4)]
    found = pf.fit_many(case.model, [(other,) for other in others], draws=1000, progress=False)
    assert {posterior.settings.get("side_by_side") for posterior in found} == {4}
    check(case, found[0])


@pytest.mark.slow
def test_a_trained_guide_of_ours_is_judged_in_double():
    case = case_of("constants")
    guide = pf.AutoRealNVP(case.model, layers=2).initialize(*case.args)
    exact = next(iter(case.exact.values()))
    guide.start_at(torch.as_tensor(exact.mean(0)).float(), torch.as_tensor(exact.std(0)).float())
    found = pf.diagnose(case.model, guide, *case.args, draws=1000)
    check(case, found)
    assert guide.flow is not found.flow
    check(case, found.refine(progress=False))


@pytest.mark.slow
def test_counts_are_left_out_in_double(tmp_path):
    """Poisson densities of counts of 24 million in single precision are off by nats each."""
    x = torch.linspace(-1.0, 1.0, 8)
    y = torch.poisson(torch.full((8,), 24e6, dtype=torch.float64), torch.Generator().manual_seed(0)).float()

    def model(y):
        level, slope = pyro.sample("level", dist.Normal(17.0, 1.0)), pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Poisson((level + slope * x).exp()), obs=y)

    found = pf.fit(model, y, **QUICK)
    level, slope = (found.samples[name].double().numpy()[:, None] for name in ("level", "slope"))
    expected = poisson.logpmf(y.double().numpy(), np.exp(level + slope * x.double().numpy()))
    np.testing.assert_allclose(found.log_likelihood()["y"].numpy(), expected, atol=1e-6)
    assert found.loo().elpd == pytest.approx(expected.mean(0).sum(), abs=5.0)
    found.save(tmp_path / "found")
    again = pf.load(tmp_path / "found", model, y)
    assert again.density.dtype == torch.float64
    assert again.evidence().value == pytest.approx(found.evidence().value, abs=1e-6)


def single_only(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x.dtype != torch.float32:
        raise TypeError("a user's own code that takes single precision only")
    pyro.factor("constant", torch.tensor(size))


@pytest.mark.filterwarnings("ignore:.*evidence.*hands on draws")
def test_what_rounding_leaves_is_in_the_note_and_in_the_error():
    found = pf.fit(single_only, 1e6, **QUICK)
    assert any("rounding changes the log density by up to 0.12 nats" in note for note in found.verdict.notes)
    assert found.evidence().standard_error == pytest.approx(0.12, abs=0.01)
    lost = pf.fit(single_only, 3e8, max_steps=20, escalate=False, refine=False, **QUICK)
    assert lost.verdict.status == "unreliable"
    assert any("the model does not run in double precision" in reason for reason in lost.verdict.reasons)
    assert math.isinf(lost.evidence().standard_error)


def test_chains_of_a_sampler_in_single_precision_are_told_to_have_lost_digits():
    """They were accepted and rejected by digits that are none."""
    draws = {"m": 0.3 * torch.randn(4, 500, 1, generator=torch.Generator().manual_seed(0))}

    def model(size):
        pyro.sample("m", dist.Normal(torch.zeros(1), 0.3).to_event(1))
        pyro.factor("constant", torch.tensor(size))

    assert pf.from_mcmc(draws, model, 3e8).verdict.status == "unreliable"
    assert pf.from_mcmc(draws, model, 0.0).verdict.status == "ok"
    assert pf.from_mcmc({"m": draws["m"].double()}, model, 3e8).verdict.status == "ok"


def test_far_draws_of_no_weight_are_on_no_bound():
    """Three of ten draws are from a wide normal distribution, and half of these are rounded to 0 or 1."""

    def model():
        pyro.sample("p", dist.Beta(torch.tensor(4.0), 4.0))

    def draw(count):
        sd = torch.where(torch.arange(count) % 10 < 3, 30.0, 0.8)
        z = (sd * torch.randn(count))[:, None]
        terms = [
            math.log(share) + dist.Normal(0.0, scale).log_prob(z[:, 0]) for share, scale in ((0.3, 30.0), (0.7, 0.8))
        ]
        return z, torch.logaddexp(*terms)

    torch.manual_seed(0)
    density = pf.LogDensity(model)
    assert density.on_bounds(draw(4000)[0])
    posterior = from_draws(density, draw, draws=4000, seed=0, guide=None, losses=torch.zeros(0))
    assert posterior.verdict.status == "corrected", posterior.verdict
    assert float(posterior.samples["p"].std()) == pytest.approx(1.0 / 6.0, rel=0.05)
