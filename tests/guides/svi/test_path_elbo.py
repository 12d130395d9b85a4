"""The ELBO with path gradients in Pyro's own SVI, and where a guide starts."""

import copy
import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from pyro_flows.guides.svi.path_elbo import CHECKED_EVERY, MOST_RECORDED, Arguments, RecordedStep, eager_step
from tests.models import normal, real

SD = 0.5
Y = real(1.3, 0.4, 2.2)


def conjugate(y):
    """Normal means of normal data: the posterior is normal, and the evidence known."""
    x = pyro.sample("x", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, SD).to_event(1), obs=y)


def log_evidence(y):
    return float(dist.Normal(0.0, math.sqrt(1.0 + SD * SD)).log_prob(y).sum())


def counts(y):
    """A log rate for each count: the prior's own rates overflow nothing, but are far off."""
    level = pyro.sample("level", dist.Normal(real(0.0), 10.0))
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Normal(level, 1.0))
        pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


def svi_of(model, guide, particles=16, rate=0.01):
    loss = pf.PathELBO(num_particles=particles)
    return SVI(model, guide, pyro.optim.Adam({"lr": rate}), loss=loss), loss


def gradients(guide):
    return torch.cat([parameter.grad.flatten() for parameter in guide.parameters()])


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("kind", [pf.AutoRealNVP, pf.AutoNICE, pf.AutoPlanar])
@pytest.mark.parametrize("cautious", [True, False])
def test_a_recorded_step_is_that_of_autograd(kind, cautious):
    guide = kind(conjugate, layers=2, cautious=cautious).initialize(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow, density, x = guide._flow, pf.LogDensity(conjugate, (Y,)), normal(16, 3, seed=1)
    parameters = list(guide.parameters())
    step = RecordedStep(flow, density, Arguments((Y,), {}), x)
    for one, other in zip(step(x, [Y]), eager_step(flow, density, parameters, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_other_data_go_through_the_same_graph():
    guide = pf.AutoRealNVP(conjugate, layers=2, cautious=True)
    svi, loss = svi_of(conjugate, guide)
    svi.step(Y)
    kept = loss._kept[guide]
    steps = len(kept._steps)
    for shift in (0.5, -0.5):
        other, parameters = Y + shift, list(guide.parameters())
        guide.zero_grad()
        torch.manual_seed(3)
        value = loss.loss_and_grads(conjugate, guide, other)
        torch.manual_seed(3)
        x = kept.points(16)
        terms, gradient = eager_step(guide._flow, pf.LogDensity(conjugate, (other,)), parameters, x)
        assert value == pytest.approx(-float(terms.mean()), rel=1e-9)
        torch.testing.assert_close(gradients(guide), gradient, rtol=1e-9, atol=1e-9)
        assert loss.loss(conjugate, guide, other) != loss.loss(conjugate, guide, Y)
    assert len(kept._steps) == steps
    svi.step(Y[:2].repeat(2)[:3])
    assert loss.reason is None


def test_the_gradient_vanishes_at_the_posterior():
    """Without the score term no draw has any, and not only their mean. The Student-t base is nearly normal here."""
    guide = pf.AutoRealNVP(conjugate, layers=2, base="normal", cautious=True)
    loss = pf.PathELBO(num_particles=16)
    loss.loss_and_grads(conjugate, guide, Y)
    away = float(gradients(guide).abs().max())
    guide.zero_grad()
    Trace_ELBO(num_particles=16).loss_and_grads(conjugate, guide, Y)
    assert away < 1e-3
    assert float(gradients(guide).abs().max()) > 0.05


@pytest.mark.parametrize("optimizer", ["pyro", "clipped", "scheduler", "torch"])
def test_any_optimizer_trains(optimizer):
    guide = pf.AutoRealNVP(conjugate, layers=2, init="prior")
    loss = pf.PathELBO(num_particles=16)
    if optimizer == "torch":
        guide.initialize(Y)
        steps = torch.optim.Adam(guide.parameters(), lr=0.03)
        for _ in range(300):
            steps.zero_grad()
            loss.loss_and_grads(conjugate, guide, Y)
            steps.step()
    else:
        made = {
            "pyro": lambda: pyro.optim.Adam({"lr": 0.03}),
            "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.03}),
            "scheduler": lambda: pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.999}
            ),
        }
        svi = SVI(conjugate, guide, made[optimizer](), loss=loss)
        for _ in range(300):
            svi.step(Y)
    assert loss.reason is None
    elbo = -sum(loss.loss(conjugate, guide, Y) for _ in range(100)) / 100
    assert log_evidence(Y) - elbo < 0.05


def _weighted(y, weight):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    with pyro.poutine.scale(scale=weight), pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_batches_of_two_sizes_and_a_number_that_changes():
    data = normal(50, seed=5) + 2.0
    whole = pf.AutoFlow(_weighted, "planar", layers=2)
    svi, loss = svi_of(_weighted, whole, particles=64, rate=0.02)
    for step in range(300):
        part = data[:32] if step % 2 else data[32:]
        svi.step(part, torch.tensor(len(data) / len(part)))
    assert loss.reason is None
    assert len(loss._kept[whole]._steps) == 2
    mean = float(data.sum() / (len(data) + 1 / 9))
    assert float(whole.median()["mu"]) == pytest.approx(mean, abs=0.05)


@pytest.mark.falls_back
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("why", ["AutoNormal", "parameters", "draw by draw", "ndarray", "'part'"])
def test_what_has_no_path_gradient_gets_the_elbo_of_pyro(why, caplog):
    def model(y, extra=None):
        scale = pyro.param("scale", real(1.0)) if why == "parameters" else 1.0
        x = pyro.sample("x", dist.Normal(torch.zeros_like(y), scale).to_event(1))
        if why == "draw by draw":
            float(x.sum())
        if why == "'part'":
            pyro.sample("part", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, SD).to_event(1), obs=y)

    known = pyro.poutine.block(model, hide=["part"])
    guide = AutoNormal(model) if why == "AutoNormal" else pf.AutoRealNVP(known, layers=2)
    unused = {"extra": np.ones(3)} if why == "ndarray" else {}
    with caplog.at_level(logging.DEBUG, "pyro_flows"):
        svi, loss = svi_of(model, guide, particles=4)
        assert math.isfinite(svi.step(Y, **unused))
    assert loss.reason.startswith("Trace_ELBO is used")
    assert why.partition(" ")[0] in loss.reason or why == "draw by draw"
    assert any("Trace_ELBO is used" in record.message for record in caplog.records)
    assert math.isfinite(svi.evaluate_loss(Y, **unused))


def test_a_guide_of_two_models_reads_each():
    other, guide = pyro.poutine.scale(conjugate, scale=2.0), pf.AutoRealNVP(conjugate, layers=2)
    loss = pf.PathELBO(num_particles=2000)
    one, two = loss.loss(conjugate, guide, Y), loss.loss(other, guide, Y)
    assert two > one + 1.0, "its log density is twice as large"
    assert loss.loss(conjugate, guide, Y) == pytest.approx(one, abs=0.05)


def of_draws(loss, model, guide, *args):
    """The loss by many draws."""
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    return many.loss(model, guide, *args) - sum(loss.loss(model, guide, *args) for _ in range(400)) / 400


@pytest.mark.falls_back
def test_a_handler_around_a_step_is_followed():
    guide, loss = pf.AutoRealNVP(conjugate, layers=2), pf.PathELBO(num_particles=200)
    whole = loss.loss(conjugate, guide, Y)
    assert loss.reason is None
    with pyro.poutine.scale(scale=0.1):
        assert loss.loss(conjugate, guide, Y) == pytest.approx(0.1 * whole, abs=0.01)
    assert loss.reason.startswith("Trace_ELBO is used: a handler")


class Weighted(pyro.nn.PyroModule):
    """A model that reads a weight which is none of its arguments, as annealing changes it."""

    weight = 1.0

    def forward(self, y):
        _weighted(y, self.weight)


def test_a_graph_is_recorded_anew_where_the_model_reads_something_else():
    model, y = Weighted(), normal(20, seed=5) + 2.0
    guide = pf.AutoRealNVP(model, layers=2)
    svi, loss = svi_of(model, guide)
    svi.step(y)
    model.weight = 0.1
    for _ in range(CHECKED_EVERY):
        svi.step(y)
    assert of_draws(loss, model, guide, y) == pytest.approx(0.0, abs=0.1)
    assert loss._kept[guide]._recorded == 2
    for _ in range(2 * CHECKED_EVERY):
        svi.step(y)
    assert loss.reason is None
    assert loss._kept[guide]._recorded == 2, "a graph that agrees is kept"


def test_a_comparison_of_a_graph_runs_the_model_once():
    """Also of a minibatch that is new: to read its structure anew took as long as twenty steps."""
    runs = []

    def model(y):
        runs.append(len(y))
        _weighted(y, 1.0)

    y = normal(20, seed=5) + 2.0
    svi, loss = svi_of(model, pf.AutoRealNVP(model, layers=2))
    svi.step(y)
    before = len(runs)
    for step in range(2 * CHECKED_EVERY):
        svi.step(y + 0.01 * step)
    assert loss.reason is None
    assert len(runs) - before == 2


@pytest.mark.falls_back
def test_a_model_in_a_new_handler_at_each_step_keeps_its_pace():
    """As with a weight that is annealed: few graphs are recorded, and the optimizer's unit is found."""
    guide, loss, y = pf.AutoRealNVP(conjugate, layers=2), pf.PathELBO(num_particles=4), Y
    optimizer = pyro.optim.Adam({"lr": 1e-4})
    for step in range(MOST_RECORDED + 3):
        weighted = pyro.poutine.scale(conjugate, scale=0.5 + 0.01 * step)
        SVI(weighted, guide, optimizer, loss=loss).step(y)
    kept = loss._kept[guide]
    assert kept.pace.begun
    assert kept.pace.gain > 1.0, "the optimizer's steps of 1e-4 are made as long as usual"
    assert "change too often" in loss.reason


@pytest.mark.falls_back
def test_rows_that_a_mask_leaves_out_may_be_more_or_fewer():
    def model(y):
        _weighted(y[~y.isnan()], 1.0)

    y, fewer = (normal(20, seed=5) + 2.0 for _ in range(2))
    y[3], fewer[5:9] = math.nan, math.nan
    guide = pf.AutoRealNVP(model, layers=2)
    svi, loss = svi_of(model, guide)
    svi.step(y)
    assert "a shape depends on values" in loss.reason
    for data in (fewer, y):
        assert of_draws(loss, model, guide, data) == pytest.approx(0.0, abs=0.1)


@pytest.mark.falls_back
def test_a_module_that_pyro_is_not_told_of_is_trained():
    net = torch.nn.Linear(1, 1, dtype=torch.float64)

    def model(y):
        _weighted(y - net(real(1.0)[None]), 1.0)

    guide, loss = pf.AutoRealNVP(model, layers=2), pf.PathELBO(num_particles=4)
    loss.loss_and_grads(model, guide, Y)
    assert "parameters of its own" in loss.reason
    assert all(bool(part.grad.abs() > 0.0) for part in net.parameters())


def test_a_step_without_a_finite_gradient_leaves_the_parameters_as_they_are():
    guide = pf.AutoRealNVP(conjugate, layers=2, cautious=True)
    svi, loss = svi_of(conjugate, guide)
    svi.step(Y)
    with torch.no_grad():
        kept = [parameter.clone() for parameter in guide.parameters()]
    guide.zero_grad()
    value = loss.loss_and_grads(conjugate, guide, torch.full_like(Y, math.nan))
    assert math.isnan(value)
    assert not bool(gradients(guide).any())
    assert all(torch.equal(one, other) for one, other in zip(kept, guide.parameters(), strict=True))


def test_a_guide_with_another_flow_is_read_anew():
    guide, loss = pf.AutoRealNVP(conjugate, layers=2), pf.PathELBO(num_particles=8)
    loss.loss_and_grads(conjugate, guide, Y)
    first = guide.flow
    guide.flow = copy.deepcopy(first)
    first.zero_grad()
    loss.loss_and_grads(conjugate, guide, Y)
    assert gradients(guide).isfinite().all()
    assert all(parameter.grad is None for parameter in first.parameters())


def test_an_elbo_module_trains_by_an_optimizer_of_torch():
    guide = pf.AutoRealNVP(conjugate, layers=2).initialize(Y)
    module = pf.PathELBO(num_particles=16)(conjugate, guide)
    pyro.set_rng_seed(1)
    value = module(Y)
    (2.0 * value).backward()
    got = gradients(guide)
    guide.zero_grad()
    pyro.set_rng_seed(1)
    loss = pf.PathELBO(num_particles=16)
    assert loss.loss_and_grads(conjugate, guide, Y) == pytest.approx(float(value.detach()), abs=1e-6)
    torch.testing.assert_close(got, 2.0 * gradients(guide))
    guide.zero_grad()

    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        module(Y).backward()
        optimizer.step()
    values = torch.stack([module(Y).detach() for _ in range(20)])
    assert float(values.mean()) == pytest.approx(-log_evidence(Y), abs=0.02)


@pytest.mark.falls_back
def test_an_elbo_module_of_another_guide_has_the_gradient_of_trace_elbo():
    guide = AutoNormal(conjugate)
    guide(Y)
    module = pf.PathELBO(num_particles=4)(conjugate, guide)
    module(Y).backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())


def test_bad_options():
    with pytest.raises(ValueError, match="num_particles: expected an integer >= 1, got 0"):
        pf.PathELBO(num_particles=0)
    with pytest.raises(ValueError, match="init: expected one of 'auto', 'prior', got 'best'"):
        pf.AutoRealNVP(conjugate, init="best")


# where a guide starts -------------------------------------------------------------------------------------------------


def test_a_guide_starts_where_a_fit_does():
    guide, at_prior = (pf.AutoRealNVP(conjugate, layers=2, init=init).initialize(Y) for init in ("auto", "prior"))
    loss = pf.PathELBO(num_particles=2000)
    assert log_evidence(Y) + loss.loss(conjugate, guide, Y) < 0.02
    assert log_evidence(Y) + loss.loss(conjugate, at_prior, Y) > 1.0
    given = pf.AutoRealNVP(conjugate, layers=2, init_scale=1.0).initialize(Y)
    assert float(given.affine.scale_tril.diagonal().min()) == 1.0


def groups(y):
    """Means of groups, written centered: the scale of five of them may be next to zero."""
    scale = pyro.sample("scale", dist.HalfNormal(real(1.0)))
    with pyro.plate("groups", len(y)):
        mean = pyro.sample("mean", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_a_guide_takes_the_coordinates_of_a_fit():
    """There, the posterior of five means and their scale has no funnel."""
    y = 0.3 * normal(5, seed=3)
    found = {}
    for noncentered in ((), "auto"):
        guide = pf.AutoRealNVP(groups, layers=2, noncentered=noncentered).initialize(y)
        found[noncentered] = pf.PathELBO(num_particles=4000).loss(groups, guide, y)
        assert set(guide.structure.noncentered) == set(noncentered and ["mean"])
    assert found["auto"] < found[()] - 0.3
    svi, loss = svi_of(groups, guide)
    svi.step(y)
    assert loss.reason is None
    assert guide.sample_posterior(3)["mean"].shape == (3, 5)
    with pytest.raises(ValueError, match="noncentered: expected one of 'auto', got 'mean'"):
        pf.AutoRealNVP(groups, noncentered="mean")


def test_a_start_overflows_nothing():
    y = torch.poisson(torch.exp(3.0 + normal(60, seed=2)), generator=torch.Generator().manual_seed(0))
    guide, theirs = pf.AutoRealNVP(counts, layers=2), AutoNormal(counts)
    ours = pf.PathELBO(num_particles=200).loss(counts, guide, y)
    theirs(y)
    assert ours < Trace_ELBO(num_particles=200).loss(counts, theirs, y) - 100.0


def level(y, rows):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 10.0))
    with pyro.plate("rows", len(y), subsample=rows):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def test_rows_that_the_caller_gives_are_inputs_of_the_graph():
    """A fifth of the rows counts five times: the guide starts at their mean, with the precision of all."""
    y, (few, others) = 3.0 + normal(60, seed=4), torch.arange(60).split([12, 48])
    guide = pf.AutoRealNVP(level, layers=2).initialize(y, few)
    assert float(guide.affine.loc) == pytest.approx(float(y[few].mean()), abs=0.05)
    assert float(guide.affine.scale_tril) == pytest.approx(60.01**-0.5, rel=0.1)
    svi, loss = svi_of(level, guide)
    svi.step(y, few)
    assert loss.reason is None
    (recorded,) = loss._kept[guide]._steps.values()
    x = normal(16, 1, seed=1)
    for rows in (few, others[:12]):

        def repeated(y, rows=rows):
            level(y[rows].repeat(5), torch.arange(60))

        expected = eager_step(guide._flow, pf.LogDensity(repeated, (y,)), recorded.parameters, x)
        for one, other in zip(recorded(x, [y, rows]), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="subsampled"):
        pf.LogDensity(level, (y, few))


def test_a_loss_is_evaluated_before_the_first_step():
    """Pyro switches gradients off for it, and recording takes some."""
    guide = pf.AutoRealNVP(conjugate, layers=2)
    svi, loss = svi_of(conjugate, guide)
    assert math.isfinite(svi.evaluate_loss(Y))
    assert loss.reason is None


def in_turn(first, second):
    for name in (first, second):
        pyro.sample(name, dist.Normal(real({"a": -3.0, "b": 3.0}[name]), 1.0))


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_latents_in_another_order_are_not_taken_for_each_other():
    """A guide's coordinates are those of the first run; Pyro's own loss and ``diagnose`` go by names."""
    guide = pf.AutoRealNVP(in_turn, layers=2).initialize("a", "b")
    svi, _ = svi_of(in_turn, guide)
    with pytest.raises(ValueError, match=r"expected site 'a' with 1 coordinates, as in the first run, got 'b'.* order"):
        svi.step("b", "a")
    for _ in range(20):
        svi.step("a", "b")
    posterior = pf.diagnose(in_turn, guide, "b", "a", draws=500, progress=False)
    assert posterior.samples["a"].mean() == pytest.approx(-3.0, abs=0.3)
    assert posterior.verdict.status != "unreliable"


def rows_or_data(y=None):
    scale = pyro.sample("scale", dist.HalfNormal(real(1.0)))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


@pytest.mark.falls_back
@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_data_that_come_after_the_first_run_or_are_left_out_are_named():
    before, after = (pf.AutoRealNVP(rows_or_data, layers=2) for _ in range(2))
    before.initialize()
    assert before.structure.noncentered
    for loss in (pf.PathELBO(4), Trace_ELBO()):
        with pytest.raises(ValueError, match=r"site 'y': expected a latent, as in the first run, got data"):
            SVI(rows_or_data, before, pyro.optim.Adam({"lr": 0.01}), loss).step(Y)
    svi, _ = svi_of(rows_or_data, after)
    svi.step(Y)
    with pytest.raises(
        ValueError, match=r"expected no further site, .* got 'y' with 3\. A site without data is a latent"
    ):
        svi.evaluate_loss()


def test_data_that_fit_are_taken_after_data_that_do_not():
    guide = pf.AutoRealNVP(counts, layers=2, hidden=(4,), init="prior", noncentered=())
    svi, loss = svi_of(counts, guide, particles=4)
    y = real(1.0, 3.0, 2.0)
    svi.step(y)
    with pytest.raises(ValueError, match="'rate' with 3 coordinates, as in the first run, got 'rate' with 2"):
        svi.step(y[:2])
    loss.num_particles = 8
    assert math.isfinite(svi.step(y))
