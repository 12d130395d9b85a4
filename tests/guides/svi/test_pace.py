"""PathELBO learns how far steps move a flow, and gives Pyro's optimizers one vector."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_flows as pf
from pyro_flows.guides.store import Whole
from pyro_flows.guides.svi.pace import FIRST, Pace
from tests.models import normal, real

Y = real(1.3, 0.4, 2.2)


def shifted(y):
    """Normal means, far from the prior."""
    x = pyro.sample("x", dist.Normal(torch.zeros_like(y), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def trained(rate, steps, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pf.AutoRealNVP(shifted, layers=2, init="prior", **options)
    loss = pf.PathELBO(num_particles=16)
    svi = SVI(shifted, guide, pyro.optim.Adam({"lr": rate}), loss=loss)
    losses = [svi.step(Y) for _ in range(steps)]
    return guide, loss, svi, losses


def map_of(guide):
    with torch.no_grad():
        return guide._flow.log_prob(normal(20, 3, seed=4))


def gap(guide):
    log_evidence = float(dist.Normal(0.0, math.sqrt(4.25)).log_prob(Y).sum())
    torch.manual_seed(1)
    return log_evidence + pf.PathELBO(num_particles=4000).loss(shifted, guide, Y)


def test_learning_rates_that_differ_by_a_hundred_end_alike():
    small, large = (trained(rate, 120)[0] for rate in (1e-3, 1e-1))
    assert gap(small) < 0.05
    assert gap(large) < 0.05
    assert float((map_of(small) - map_of(large)).abs().max()) < 0.1


def test_an_own_cautious_leaves_steps_to_the_optimizer():
    for cautious in (True, False):
        guide, loss, *_ = trained(1e-3, 3, cautious=cautious)
        assert loss._kept[guide].pace is None
        assert not guide._paced
    with pytest.raises(ValueError, match="cautious: expected one of 'auto', got 'never'"):
        pf.AutoRealNVP(shifted, cautious="never")


def test_the_first_step_is_as_long_whatever_the_rate():
    for rate in (1e-3, 1e-1):
        guide, loss, *_ = trained(rate, 1)
        pace = loss._kept[guide].pace
        pace.follow()
        assert pace.begun
        assert pace.gain * rate == pytest.approx(FIRST, rel=1e-3)


@pytest.mark.parametrize("start", [0.0, 1e-3])
def test_a_rate_that_warms_up_ends_as_one_that_stays(start):
    guide = pf.AutoRealNVP(shifted, layers=2, init="prior").initialize(Y)
    optimizer, loss = torch.optim.Adam(guide.parameters(), 0.01), pf.PathELBO(num_particles=16)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(start, min(step / 60, 1.0)))
    torch.manual_seed(0)
    longest = []
    for _ in range(120):
        optimizer.zero_grad()
        loss.loss_and_grads(shifted, guide, Y)
        moved, gain = loss._kept[guide].pace._moved, loss._kept[guide].pace.gain
        longest.append(0.0 if moved is None else gain * float(moved.abs().max()))
        optimizer.step()
        warm.step()
    assert max(longest) < 4 * FIRST
    assert gap(guide) < 0.05


def test_steps_become_longer_along_the_gradient_and_shorter_against_it():
    flow = pf.realnvp(2, layers=2).double().slow()
    parameters = list(flow.parameters())
    pace = Pace(flow, parameters, unit=1.0)
    gradient = normal(sum(part.numel() for part in parameters), seed=1)
    x = normal(5, 2, seed=2)
    for sign, expected in ((-1.0, 1.0), (1.0, -1.0)):
        before = pace.gain
        for _ in range(3):
            pace.follow()
            pace(gradient)
            with torch.no_grad():
                pace._add(1e-9 * sign * gradient)
        assert math.copysign(1.0, pace.gain - before) == expected
    with torch.no_grad():
        value = flow.log_prob(x)
        pace._change(3.0)
        torch.testing.assert_close(flow.log_prob(x), value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_steps_end_short():
    """Where no flow of this size is exact, gradients keep their noise, which points back on average."""

    def bent():
        a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
        pyro.sample("b", dist.Normal(a * a, 0.5))

    guide, loss = pf.AutoRealNVP(bent, layers=2), pf.PathELBO(num_particles=16)
    svi = SVI(bent, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    gains = []
    for _ in range(300):
        svi.step()
        gains.append(loss._kept[guide].pace.gain)
    assert gains[-1] < 0.5 * max(gains)


def test_a_copy_a_pickle_and_another_loss_go_on_where_training_was():
    guide, _, svi, _ = trained(1e-2, 20)
    loaded = pickle.loads(pickle.dumps(guide)).attach(shifted, Y)
    for other in (copy.deepcopy(guide), loaded):
        torch.testing.assert_close(map_of(other), map_of(guide))
        assert other._paced
        kept = map_of(guide)
        loss = pf.PathELBO(num_particles=16)
        loss.loss_and_grads(shifted, other, Y)
        torch.testing.assert_close(map_of(other), kept)
        assert torch.equal(map_of(guide), kept)
    svi.step(Y)
    assert not torch.equal(map_of(guide), kept)


def test_pyro_gets_one_tensor_and_it_is_that_of_all_parameters():
    guide, _, svi, _ = trained(1e-2, 2)
    assert len(svi.optim.optim_objs) == 1
    assert list(svi.optim.get_state()) == ["AutoRealNVP.flow"]
    whole = guide._whole
    with torch.no_grad():
        whole.vector.fill_(0.25)
    assert all(bool((part == 0.25).all()) for part in guide.parameters())
    names = set(pyro.get_param_store().keys())
    flow = guide._flow.named_parameters()
    assert {f"AutoRealNVP.flow$$${name}" for name, _ in flow} <= names


def test_a_vector_holds_parameters_that_were_moved():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(1, 3))]
    whole = Whole(parameters)
    parameters[0].data = torch.full((2,), 7.0)
    assert whole.hold()
    assert whole.vector.tolist() == [7.0, 7.0, 0.0, 0.0, 0.0]
    whole.release()
    whole.vector.data.fill_(1.0)
    assert parameters[0].tolist() == [7.0, 7.0]
    parameters[0].data = parameters[0].data.double()
    assert not whole.hold()
    with pytest.raises(ValueError, match="one dtype"):
        Whole([torch.zeros(1), torch.zeros(1, dtype=torch.double)])


def test_layers_that_are_not_trained_stay_as_they_are():
    """Their gains would move them without their parameters."""
    guide = pf.AutoRealNVP(shifted, layers=2, hidden=(8,)).initialize(Y)
    couplings = guide.flow.bijection.layers[0]
    for parameter in couplings.parameters():
        parameter.data += 0.1
        parameter.requires_grad_(False)
    x = normal(4, guide.latent_dim, seed=3).to(next(couplings.parameters()))
    before, start = couplings(x), guide.affine(x)
    svi = SVI(shifted, guide, pyro.optim.Adam({"lr": 0.01}), pf.PathELBO(8))
    for _ in range(5):
        svi.step(Y)
    assert torch.equal(couplings(x), before)
    assert not torch.equal(guide.affine(x), start)
