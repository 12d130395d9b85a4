"""Traps of Pyro's parameter store: two guides in one session, parameters saved and loaded. Absent here."""

import gc
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

import pyro_flows as pf
from tests.guides.test_guides import KINDS, each_kind
from tests.invariants import close
from tests.models import normal, real
from tests.registry import randomize

Y = real(0.3, 1.2, -0.4)


def model(y):
    mu = pyro.sample("mu", dist.Normal(real(2.0), 3.0))
    sd = pyro.sample("sd", dist.HalfNormal(real(1.0)))
    pyro.sample("y", dist.Normal(mu, sd).expand([3]).to_event(1), obs=y)


def train(guide, steps=4, optimizer=None):
    svi = SVI(model, guide, optimizer or pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    return [svi.step(Y) for _ in range(steps)]


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def parameters(guide):
    return [parameter.detach().clone() for parameter in guide.parameters()]


def moved(guide, before):
    """Whether each parameter differs from what it was."""
    return [bool((new != old).any()) for new, old in zip(guide.parameters(), before, strict=True)]


def trains(guide):
    """Whether each parameter moves within a few steps (a last layer at zero holds the others back at first)."""
    guide.initialize(Y)
    before = parameters(guide)
    train(guide)
    return all(moved(guide, before))


Z = normal(5, 2, seed=81)


def density(guide):
    return guide.get_posterior().log_prob(Z).detach()


def narrow():
    """A model for Pyro's flow guide, which is float32 only."""
    pyro.sample("x", dist.Normal(torch.full((2,), 2.0), 0.5).to_event(1))


def pyros_guide():
    return AutoNormalizingFlow(narrow, partial(iterated, 2, affine_coupling, hidden_dims=[8]))


def pyros_steps(guide):
    svi = SVI(narrow, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(4):
        svi.step()


# a second guide in one session ---------------------------------------------------------------------------------------


def test_pyros_second_guide_does_not_train():
    pyros_steps(pyros_guide())
    second = pyros_guide()
    pyros_steps(second)
    before = [parameter.detach().clone() for parameter in second.transform.parameters()]
    pyros_steps(second)
    assert not any((new != old).any() for new, old in zip(second.transform.parameters(), before, strict=True))


@each_kind
def test_a_second_guide_trains(kind):
    first = KINDS[kind](model)
    train(first)
    kept = state(first)
    second = KINDS[kind](model)
    assert trains(second)
    for name, value in state(first).items():
        close(value, kept[name], 0.0, f"{name} of the first guide")
    assert all(one is not other for one, other in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"layers": 4}, {"layers": 1}, {"hidden": (4, 4)}, {"affine": "diagonal"}])
def test_a_second_guide_of_other_shapes_trains(options):
    train(KINDS["realnvp"](model))
    assert trains(KINDS["realnvp"](model, **options))


def test_guides_that_take_turns_keep_their_own_parameters():
    """As two that are trained alone, from the same start and the same noise."""
    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pyro.clear_param_store()
        guide = KINDS["realnvp"](model).initialize(Y)
        optimizer = pyro.optim.Adam({"lr": 0.02})
        for step in range(6):
            torch.manual_seed(100 * seed + step)
            train(guide, 1, optimizer)
        alone.append(state(guide))
    guides = []
    pyro.clear_param_store()
    for seed in (1, 2):
        torch.manual_seed(seed)
        guides.append((seed, KINDS["realnvp"](model).initialize(Y), pyro.optim.Adam({"lr": 0.02})))
    for step in range(6):
        for seed, guide, optimizer in guides:
            torch.manual_seed(100 * seed + step)
            train(guide, 1, optimizer)
    for (_, guide, _), expected in zip(guides, alone, strict=True):
        for name, value in state(guide).items():
            close(value, expected[name], 0.0, name)


def test_a_guide_made_after_another_was_collected_starts_afresh():
    guide = KINDS["realnvp"](model)
    train(guide, steps=10)
    trained = density(guide)
    del guide
    gc.collect()
    second = KINDS["realnvp"](model).initialize(Y)
    fresh = density(second)
    second(Y)  # registers it
    close(density(second), fresh, 0.0)
    assert (fresh - trained).abs().max() > 0.01
    assert trains(second)


def test_one_optimizer_for_two_guides():
    """Its state belongs to tensors, and the tensors to their guides."""
    optimizer = pyro.optim.Adam({"lr": 0.02})
    first, second = KINDS["realnvp"](model), KINDS["realnvp"](model)
    train(first, 4, optimizer)
    second.initialize(Y)
    before = parameters(second)
    train(second, 4, optimizer)
    assert all(moved(second, before))


def test_a_cleared_store_loses_nothing():
    guide = KINDS["realnvp"](model)
    train(guide)
    before = density(guide)
    pyro.clear_param_store()
    guide(Y)
    close(density(guide), before, 0.0)
    assert trains(guide)


def test_a_guide_of_a_scope_keeps_its_own_parameters_outside():
    """The store that comes back at the end of a scope has those of another guide, of another form here."""
    train(KINDS["realnvp"](model))
    for options in ({}, {"layers": 1}):
        with pyro.get_param_store().scope():
            guide = KINDS["realnvp"](model, **options)
            train(guide)
            before = density(guide)
        guide.sample_posterior(2)
        close(density(guide), before, 0.0)
        guide(Y)
        close(density(guide), before, 0.0)
        assert trains(guide)


# saved and loaded ----------------------------------------------------------------------------------------------------


def test_pyros_store_does_not_reach_a_new_guide(tmp_path):
    first = pyros_guide()
    pyros_steps(first)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    second = pyros_guide()
    pyros_steps(second)
    own, stored = list(second.transform.parameters()), dict(pyro.get_param_store().named_parameters())
    assert own
    assert not any(parameter is value for parameter in own for value in stored.values())


@each_kind
def test_the_store_reaches_a_new_guide(kind, tmp_path):
    """With the fixed start of the affine map, which lies elsewhere in the new guide, and training goes on."""
    first = KINDS[kind](model).initialize(Y)
    first.start_at(real(1.0, -1.0), real(0.5, 0.7))
    train(first, steps=8)
    expected, values = density(first), state(first)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    second = KINDS[kind](model)
    second(Y)
    close(density(second), expected, 0.0)
    for name, value in state(second).items():
        close(value, values[name], 0.0, name)
    assert trains(second)


@pytest.mark.parametrize("own", ["auto", True, False])
@pytest.mark.parametrize("saved", ["auto", True, False])
def test_the_store_brings_the_gains_of_its_parameters(saved, own, tmp_path):
    """Or their lack: parameters mean something else with other gains."""
    first = KINDS["realnvp"](model, cautious=saved).initialize(Y)
    SVI(model, first, pyro.optim.Adam({"lr": 0.02}), pf.PathELBO(4)).step(Y)  # by which "auto" has gains everywhere
    randomize(first.flow, sd=0.3, seed=5)
    expected = density(first)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    second = KINDS["realnvp"](model, cautious=own)
    second(Y)
    close(density(second), expected, 1e-12)
    assert trains(second)


def test_the_store_holds_the_tensors_of_one_guide(tmp_path):
    """Gains of a guide before would be loaded with the parameters of the next one."""
    train(KINDS["realnvp"](model))
    second = KINDS["realnvp"](model, cautious=False)
    train(second)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    third = KINDS["realnvp"](model)
    third(Y)
    close(density(third), density(second), 1e-12)


def test_the_store_of_another_guide_is_refused(tmp_path):
    train(KINDS["realnvp"](model))
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(
        ValueError, match=r"param store: .* has shape .* saved from another guide; call pyro.clear_param"
    ):
        KINDS["realnvp"](model, hidden=(5,))(Y)


def test_a_store_loaded_under_a_living_guide_is_taken_over(tmp_path):
    """A checkpoint: back to what was saved, whatever came after."""
    guide = KINDS["realnvp"](model)
    train(guide)
    expected = density(guide)
    pyro.get_param_store().save(tmp_path / "store")
    train(guide)
    assert (density(guide) - expected).abs().max() > 0
    pyro.get_param_store().load(tmp_path / "store")
    guide(Y)
    close(density(guide), expected, 0.0)
    assert trains(guide)


def test_the_store_trains_only_parameters():
    """It holds the masks and the start too. An optimizer is told of one vector, in which all parameters lie."""
    seen = []

    class Recorder(pyro.optim.PyroOptim):
        def __call__(self, parameters, *args, **kwargs):
            seen.extend(parameters)
            return super().__call__(parameters, *args, **kwargs)

    guide = KINDS["realnvp"](model)
    train(guide, 1, Recorder(torch.optim.Adam, {"lr": 0.02}))
    (vector,) = {id(tensor): tensor for tensor in seen}.values()
    own = list(guide.parameters())
    assert vector.numel() == sum(parameter.numel() for parameter in own)
    begin, end = vector.data_ptr(), vector.data_ptr() + vector.numel() * vector.element_size()
    assert all(begin <= parameter.data_ptr() < end for parameter in own)
    held = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert {id(value) for value in guide.state_dict(keep_vars=True).values()} == held


def test_a_layer_that_was_there_twice_leaves_the_store():
    """Its tensors have two names there. A guide of the same name drops those of an earlier one."""
    flip = pf.transforms.Permutation([1, 0])

    def tied(dim):
        layer = pf.transforms.AffineCoupling(dim, hidden=(4,))
        return pf.Flow(pf.transforms.Compose([layer, flip, layer]), dim=dim)

    train(pf.AutoFlow(model, tied))
    guide = pf.AutoFlow(model, lambda dim: pf.Flow(pf.transforms.DiagonalAffine(dim), dim=dim))
    assert len(train(guide)) == 4
    assert not any(".layers.0.layers." in name for name in pyro.get_param_store())
