"""Mixtures of flows, and that all parts of a posterior whose runs disagree describe one distribution."""

import copy
import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.recipe_json import from_json, to_json


def affine(loc, scale):
    """A normal distribution as a flow."""
    layer = pf.transforms.DiagonalAffine(len(loc))
    layer.loc.copy_(torch.as_tensor(loc))
    layer.scale.copy_(torch.as_tensor(scale))
    return pf.Flow(layer)


LOC, SCALE = [1.0, 5.0, -2.0], [0.3, 1.0, 2.0]
ORDER, SIGNS = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, -1.0])


def moved():
    """One flow twice, once moved by a permutation that is not its own inverse."""
    parts = [Component(0, math.log(0.3)), Component(0, math.log(0.7), ORDER, SIGNS)]
    return FlowMixture([affine(LOC, SCALE)], parts)


def exact(z):
    """The density of ``moved``, coordinate by coordinate."""
    there = dist.Normal(torch.tensor(LOC), torch.tensor(SCALE)).to_event(1)
    # z = signs * x[order] has the moments of x in the new places
    here = dist.Normal(SIGNS * torch.tensor(LOC)[ORDER], torch.tensor(SCALE)[ORDER]).to_event(1)
    return torch.logaddexp(math.log(0.3) + there.log_prob(z), math.log(0.7) + here.log_prob(z))


def test_density_of_moved_copies_is_exact():
    z = 4.0 * torch.randn(50, 3)
    torch.testing.assert_close(moved().log_prob(z), exact(z))
    torch.testing.assert_close(moved().log_prob(z.reshape(5, 10, 3)), exact(z).reshape(5, 10))


def test_copies_of_copies_stand_at_the_images_of_all_moves():
    """The first moves were forgotten, and parts stood twice at the images of the last ones."""
    here, first, second = ((0, 1, 2), (1.0, 1.0, 1.0)), ((0, 1, 2), (-1.0, 1.0, 1.0)), ((0, 2, 1), (1.0, 1.0, 1.0))
    once = FlowMixture.copied(affine(LOC, SCALE), [here, first])
    twice = FlowMixture.copied(once, [here, second])
    z = 4.0 * torch.randn(50, 3)
    images = [z, z * torch.tensor([-1.0, 1.0, 1.0])]
    images += [image[:, [0, 2, 1]] for image in images]
    normal = dist.Normal(torch.tensor(LOC), torch.tensor(SCALE)).to_event(1)
    expected = torch.logsumexp(torch.stack([normal.log_prob(image) for image in images]), 0) - math.log(4.0)
    torch.testing.assert_close(twice.log_prob(z), expected)
    again = FlowMixture.copied(twice, [here, first, second])
    assert len(again.components) == 4
    torch.testing.assert_close(again.log_prob(z), expected)


def test_draws_have_the_shares_and_places_of_the_parts():
    z, log_q = moved().draw(20_000)
    torch.testing.assert_close(log_q, exact(z))
    near = dist.Normal(SIGNS * torch.tensor(LOC)[ORDER], torch.tensor(SCALE)[ORDER]).to_event(1).log_prob(z)
    far = dist.Normal(torch.tensor(LOC), torch.tensor(SCALE)).to_event(1).log_prob(z)
    own = z[near > far]
    assert len(own) / len(z) == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(own.mean(0), SIGNS * torch.tensor(LOC)[ORDER], atol=0.1, rtol=0.0)
    assert not torch.equal(own[:100], z[:100]), "draws come in random order"


def test_distribution_in_a_pyro_program():
    mixture = moved()
    fn = mixture()
    assert fn.event_shape == (3,)
    assert fn.batch_shape == ()
    assert fn.sample((4, 2)).shape == (4, 2, 3)
    wide = fn.expand((5,))
    z = wide.sample((2,))
    assert z.shape == (2, 5, 3)
    assert wide.log_prob(z).shape == (2, 5)
    assert wide.log_prob(torch.zeros(3)).shape == (5,)
    with pyro.plate("n", 4):
        assert pyro.sample("x", fn).shape == (4, 3)


def test_gradients_of_draws_are_those_of_the_parts():
    """The derivative of E z by a flow's shift is the weight of its parts, with their signs and places."""
    mixture = moved()
    flow = mixture.members[0]
    z = mixture.rsample((4000,))
    (values,) = flow.parameters()  # shifts, then log scales
    gradient = torch.autograd.grad(z.sum(1).mean(), values)[0][:3]
    expected = torch.tensor([0.3 - 0.7, 0.3 - 0.7, 0.3 + 0.7]) * torch.tensor(SCALE)  # shifts are in units of scale
    torch.testing.assert_close(gradient, expected, atol=0.08, rtol=0.0)


def test_a_part_that_overflows_far_away_adds_nothing():
    class Overflows(pf.transforms.DiagonalAffine):
        def inverse_and_ladj(self, y, context=None):
            x, ladj = super().inverse_and_ladj(y, context)
            return x, ladj + torch.where(y[:, 0] > 50.0, torch.nan, 0.0)

    bad = pf.Flow(Overflows(1))
    good = affine([100.0], [1.0])
    found = FlowMixture([bad, good]).log_prob(torch.tensor([[100.0]]))
    assert float(found.detach()) == pytest.approx(math.log(0.5) - 0.5 * math.log(2 * math.pi))


def test_state_and_settings_rebuild_it():
    parts = [Component(0, -1.0), Component(1, -2.0, torch.tensor([1, 0]), torch.tensor([1.0, -1.0]))]
    mixture = FlowMixture([pf.realnvp(2, layers=2), pf.planar(2, layers=3)], parts).double()
    twin = from_json(json.loads(json.dumps(to_json(mixture)))).double()
    twin.load_state_dict(mixture.state_dict())
    z = torch.randn(20, 2, dtype=torch.float64)
    assert torch.equal(twin.log_prob(z), mixture.log_prob(z))
    assert json.loads(json.dumps(to_json(twin))) == json.loads(json.dumps(to_json(mixture)))
    assert torch.equal(pickle.loads(pickle.dumps(mixture)).log_prob(z), mixture.log_prob(z))
    assert to_json(FlowMixture([affine([0.0], [1.0])])) is None, "no builder knows this flow"


def test_runs_of_next_to_no_weight_are_left_out():
    flows = [affine([float(i)], [1.0]) for i in range(3)]
    mixture = FlowMixture.of(flows, [3.0, 1e-3, 1.0])
    assert mixture.members == [flows[0], flows[2]]
    assert [round(math.exp(part.log_weight), 6) for part in mixture.components] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("flows", "parts", "message"),
    [
        ([], None, "flows: expected one or more Flows, got none"),
        ([torch.nn.Identity()], None, "flows: expected one or more Flows, got Identity"),
        ([affine([0.0], [1.0]), affine([0.0, 0.0], [1.0, 1.0])], None, "of one dimension"),
        ([affine([0.0], [1.0])], [], "components: expected at least one"),
        ([affine([0.0], [1.0])], [Component(1)], "components: flow 1 does not exist, there are 1"),
        ([affine([0.0], [1.0])], [Component(0, -math.inf)], "log weights with a finite sum"),
        ([affine([0.0, 0.0], [1.0, 1.0])], [Component(0, 0.0, torch.tensor([0, 0]))], "expected a permutation"),
        ([affine([0.0], [1.0])], [Component(0, 0.0, None, torch.tensor([0.5]))], "expected 1 numbers 1 or -1"),
    ],
)
def test_bad_parts_are_named(flows, parts, message):
    with pytest.raises(ValueError, match=message):
        FlowMixture(flows, parts)


# in a guide and a posterior -----------------------------------------------------------------------------------------


def halves():
    """Two modes of equal mass; a guide finds one."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    near, far = ((x - c).div(0.3).square().sum() for c in (-8.0, 8.0))
    pyro.factor("modes", torch.logaddexp(-0.5 * near, -0.5 * far))


def guide_of(mixture, model=halves):
    return AutoFlow.of(mixture, pf.LogDensity(model).structure, model)


def two():
    return FlowMixture.of([affine([-8.0, -8.0], [0.3, 0.3]), affine([8.0, 8.0], [0.3, 0.3])], [0.5, 0.5])


def test_a_guide_holds_a_mixture():
    guide = guide_of(two())
    left = (guide.sample_posterior(4000)["x"][:, 0] < 0).double().mean()
    assert float(left) == pytest.approx(0.5, abs=0.03)
    assert guide()["x"].shape == (2,)
    drawn = Predictive(halves, guide=guide, num_samples=200, return_sites=["x"])()["x"].reshape(200, 2)
    assert 0.3 < float((drawn[:, 0] < 0).double().mean()) < 0.7
    low, high = guide.quantiles([0.1, 0.9])["x"][:, 0]
    assert float(low) == pytest.approx(-8.25, abs=0.1)
    assert float(high) == pytest.approx(8.25, abs=0.1)
    assert guide.median()["x"].shape == (2,)
    assert guide.get_posterior().event_shape == (2,)
    values = guide.sample_posterior(5)
    torch.testing.assert_close(guide.log_prob(values), guide.flow.log_prob(values["x"]))


def test_a_guide_with_a_mixture_is_judged_as_what_it_draws():
    posterior = pf.diagnose(halves, guide_of(two()), draws=2000)
    assert posterior.verdict.status == "ok", str(posterior.verdict)
    torch.testing.assert_close(posterior.flow.log_prob(posterior.z), posterior.log_q)
    single = pf.diagnose(halves, guide_of(FlowMixture([affine([8.0, 8.0], [0.3, 0.3])])), draws=2000)
    assert posterior.log_evidence - single.log_evidence == pytest.approx(math.log(2.0), abs=0.02)


def test_a_guide_with_a_mixture_is_copied_pickled_and_trains():
    guide = guide_of(two())
    z = torch.randn(10, 2)
    assert torch.equal(copy.deepcopy(guide).flow.log_prob(z), guide.flow.log_prob(z))
    assert torch.equal(pickle.loads(pickle.dumps(guide)).flow.log_prob(z), guide.flow.log_prob(z))
    weights = guide.flow.log_weights.clone()
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    svi = SVI(halves, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=8))
    losses = [svi.step() for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    assert torch.equal(guide.flow.log_weights, weights)
    assert guide.affine is None


def test_what_needs_a_transform_refuses_a_mixture():
    guide = guide_of(two())
    with pytest.raises(ValueError, match="a mixture of flows has no transform"):
        guide.get_transform()
    with pytest.raises(ValueError, match="a mixture of flows has no transform"):
        pyro.poutine.trace(NeuTraReparam(guide).reparam(halves)).get_trace()
    with pytest.raises(ValueError, match="flow: expected a Flow"):
        pf.fit_density(guide.flow, torch.randn(50, 2))


@pytest.fixture(scope="module")
def disagreeing():
    """Three runs of which some find the left mode and some the right one."""
    options = {"runs": 3, "max_steps": 120, "escalate": False, "layers": 2, "draws": 2000, "progress": False}
    return pf.fit(halves, **options)


def share(x):
    return float((x[:, 0] < 0).double().mean())


@pytest.mark.slow
def test_runs_that_disagree_are_one_distribution(disagreeing, tmp_path):
    posterior = disagreeing
    assert any("runs disagree" in reason for reason in posterior.verdict.reasons), str(posterior.verdict)
    raw = share(posterior.z)
    assert 0.1 < raw < 0.9, "the runs found one mode only"
    assert isinstance(posterior.flow, FlowMixture)
    assert posterior.guide.flow is posterior.flow
    assert share(posterior.guide.sample_posterior(4000)["x"]) == pytest.approx(raw, abs=0.05)
    torch.testing.assert_close(posterior.flow.log_prob(posterior.z), posterior.log_q, atol=1e-3, rtol=1e-4)
    assert posterior.settings["sampler"] == to_json(posterior.flow)
    again = pf.diagnose(halves, posterior.guide, draws=2000)
    assert again.elbo == pytest.approx(posterior.elbo, abs=0.1)
    assert share(again.z) == pytest.approx(raw, abs=0.05)

    posterior.save(tmp_path / "saved")
    bare, whole = pf.load(tmp_path / "saved"), pf.load(tmp_path / "saved", halves)
    for loaded in (bare, whole):
        assert torch.equal(loaded.flow.log_prob(posterior.z), posterior.flow.log_prob(posterior.z))
    assert share(whole.guide.sample_posterior(4000)["x"]) == pytest.approx(raw, abs=0.05)
    assert whole.guide.flow is whole.flow
    assert whole.settings["sampler"]["builder"] == "mixture"
