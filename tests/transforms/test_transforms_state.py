"""What a transform keeps and what it leaves alone: dtype, device, its own state, its copies, its inputs."""

import copy
import itertools
import pickle

import numpy as np
import pyro
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_flows as pf
from pyro_flows.inference.training import trainer as training
from pyro_flows.support.process.clock import unbounded
from pyro_flows.transforms import masks
from tests.invariants import close
from tests.registry import BARE, BASES, FLOWS, SMALL, TYPICAL, built, each, is_not_typical, make_flow, normal
from tests.state_invariants import check_follows_parameters, check_pure, copies, snapshot


class OnlyOn(TorchDispatchMode):
    """Fails at the first operation that makes a tensor on another device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{func} made a tensor on {tensor.device}"
        return out


@each(TYPICAL)
def test_dtype_is_kept(case):
    """Whatever the default dtype is."""
    before = torch.get_default_dtype()
    try:
        for dtype, default in itertools.product((torch.float32, torch.float64), repeat=2):
            torch.set_default_dtype(before)
            t = case.make(dtype=dtype)
            x, context = case.inputs(4, dtype=dtype)
            torch.set_default_dtype(default)
            for way in (t.forward_and_ladj, t.inverse_and_ladj):
                assert {tensor.dtype for tensor in way(x, context)} == {dtype}
            assert {tensor.dtype for tensor in t.forward_and_score(x, torch.ones_like(x), context)} == {dtype}
    finally:
        torch.set_default_dtype(before)


@each(TYPICAL)
def test_device_is_kept(case):
    """No operation leaves the device; vmap, as a numeric inverse looks at values to stop early, and meta has none."""
    t = case.make().to("meta")
    x, context = case.inputs(4)
    x, context = x.to("meta"), None if context is None else context.to("meta")
    axes = (0, None if context is None else 0)
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        with OnlyOn("meta"):
            y, ladj = torch.func.vmap(way, in_dims=axes)(x, context)
        assert (y.shape, ladj.shape) == (x.shape, (4,))
    if case.closed:
        with OnlyOn("meta"):
            t.forward_and_score(x, torch.ones_like(x), context)


def test_device_check_bites():
    with OnlyOn("meta"), pytest.raises(AssertionError, match="cpu"):
        torch.zeros(())


@pytest.mark.parametrize("base", BASES)
def test_flow_stays_on_its_device(base):
    """Validation is off: it looks at values."""
    flow = make_flow("realnvp", 3, base=base).to("meta")
    with pyro.validation_enabled(False), OnlyOn("meta"):
        distribution = flow()
        y = distribution.rsample((4,))
        assert distribution.log_prob(y).shape == (4,)
        assert flow.rsample_and_log_prob((2,))[1].shape == (2,)
    assert y.dtype == torch.float64


class Sum:
    """A log density without a model."""

    clock = unbounded()

    def value_and_grad(self, z):
        return z.sum(-1), torch.ones_like(z)


@pytest.mark.parametrize("blended", [False, True])
def test_a_training_step_stays_on_its_device_and_waits_for_nothing(blended, monkeypatch):
    """A tensor on meta has no value: whoever asks for one, as a GPU would have to be waited for, fails."""
    monkeypatch.setattr(training.Trainer, "_record", lambda self: None)
    flow = make_flow("realnvp", 3, base="student_t").to("meta")
    with pyro.validation_enabled(False):
        trainer = training.Trainer(flow, Sum(), learning_rate=1e-2, batch=8)
        with OnlyOn("meta"):  # a second step: the first one in ten looks at what there is
            trainer._blend = training.BLEND if blended else 0.0
            trainer._drawn = [trainer._points(8, training.DEFENSIVE if blended else 0.0)]
            trainer.step(1e-2)
    assert len(trainer._pending) == 1


@each(SMALL, slow=is_not_typical)
def test_a_pass_leaves_the_module_alone(case):
    check_pure(case.make(), *case.inputs(4))


@each(TYPICAL)
def test_inputs_are_left_alone(case):
    t = case.make()
    x, context = case.inputs(4)
    score = torch.ones_like(x)
    given = [tensor for tensor in (x, context, score) if tensor is not None]
    before = [(tensor.clone(), tensor._version) for tensor in given]
    t.forward_and_ladj(x, context)
    t.inverse_and_ladj(x, context)
    t.forward_and_score(x, score, context)
    for tensor, (value, version) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)
        assert not tensor.requires_grad


@each(SMALL, slow=is_not_typical)
def test_copies_after_a_pass_give_the_same_map(case):
    """deepcopy, pickle, torch.save, and state_dict into a module that was built otherwise: bit for bit."""
    t = case.make()
    x, context = case.inputs(4)
    expected = t.forward_and_ladj(x, context)
    t.inverse_and_ladj(x, context)
    for name, twin in copies(t, case.make(seed=5)):
        for got, value in zip(twin.forward_and_ladj(x, context), expected, strict=True):
            close(got, value, 0.0, name)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in t.parameters()}, f"{name} shares parameters"


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("base", BASES)
def test_copies_of_a_flow(name, base):
    flow, other = make_flow(name, 3, base=base), make_flow(name, 3, base=base, sd=0.4)
    y = flow().rsample((5,)).detach()
    before = snapshot(flow)
    expected = flow.log_prob(y)
    assert snapshot(flow)[0].keys() == before[0].keys()
    assert not torch.allclose(other.log_prob(y), expected)
    for kind, twin in copies(flow, other):
        close(twin.log_prob(y), expected, 0.0, kind)


def test_state_dict_carries_masks_and_permutations():
    """A layer built with another mask of the same size takes over mask, index and map; through a Compose too."""

    def chain(seed):
        layers = [
            pf.transforms.AffineCoupling(6, mask=masks.random(6, seed=seed), hidden=(4,)),
            pf.transforms.Permutation(6, seed=seed),
        ]
        return built(lambda: pf.transforms.Compose(layers), dtype=torch.float64, sd=0.3, seed=seed)

    source, target = chain(1), chain(2)
    x = normal(5, 6, seed=3)
    assert not torch.allclose(source(x), target(x))
    target.load_state_dict(source.state_dict())
    close(target(x), source(x), 0.0)
    close(target.inverse_and_ladj(x)[0], source.inverse_and_ladj(x)[0], 0.0)
    halves = pf.transforms.AffineCoupling(6, hidden=(4,))  # by slices, where the source selects by index
    halves.load_state_dict(source.layers[0].float().state_dict())
    close(halves(x.float()), source.layers[0](x.float()), 0.0)


@each(case for case in SMALL if not case.name.startswith(BARE))
def test_a_step_or_an_edit_changes_the_map(case):
    check_follows_parameters(case.make(), *case.inputs(4))


def test_a_bound_copies_and_pickles_without_its_memo():
    bound = make_flow("realnvp", 2).bijection.condition(None)
    x = normal(3, 2, seed=1)
    y = bound(x)
    for twin in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert twin._memo is None
        close(twin(x), y, 0.0)


def test_starts_are_copied():
    """Editing the tensors that a layer was built from does not edit the layer."""
    mask, loc, scale = torch.tensor([True, False]), torch.zeros(2), torch.ones(2)
    tril, order = torch.eye(2), torch.tensor([1, 0])
    layers = [
        pf.transforms.AffineCoupling(2, mask=mask),
        pf.transforms.DiagonalAffine(2, loc=loc, scale=scale),
        pf.transforms.LowerTriangularAffine(2, loc=loc, scale_tril=tril),
        pf.transforms.Permutation(order),
    ]
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for tensor in (mask, loc, scale, tril, order):
        tensor.fill_(1)
    for layer, state in zip(layers, before, strict=True):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, state[key]), (type(layer).__name__, key)


@pytest.mark.parametrize("tensor", [True, False], ids=["tensor", "numpy"])
def test_dtype_of_the_starts(tensor):
    """Floating tensors give the module their dtype; lists, integers and arrays take the default one."""
    give = torch.as_tensor if tensor else np.asarray
    dtype = torch.float64 if tensor else torch.float32
    x = torch.ones(2, dtype=dtype)
    diagonal = pf.transforms.DiagonalAffine(2, scale=give(np.array([2.0, 3.0])))
    full = pf.transforms.LowerTriangularAffine(2, scale_tril=give(np.array([[1.0, 0.0], [1.0, 2.0]])))
    for layer, expected in ((diagonal, [2.0, 3.0]), (full, [1.0, 3.0])):
        y, ladj = layer.forward_and_ladj(x)
        assert y.dtype == ladj.dtype == dtype
        close(y, torch.tensor(expected, dtype=dtype), 1e-6)
    whole = pf.transforms.LowerTriangularAffine(2, loc=[1, 2], scale_tril=[[1, 0], [1, 2]])
    close(whole(torch.ones(2)), torch.tensor([2.0, 5.0]), 1e-6)
