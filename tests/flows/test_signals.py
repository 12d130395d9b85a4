"""Flows of signals: how samples are grouped, contexts by frames, other lengths, and learning from crops."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows import datasets
from pyro_flows.densities import training
from pyro_flows.flows.signals import at_length
from pyro_flows.transforms import masks
from tests.invariants import close, jacobian
from tests.registry import SIGNAL, built, make_flow, normal

SMALL = {"group": 4, "levels": 2, "hidden": (8, 8)}


@pytest.mark.parametrize("group", [2, 3, 8])
def test_squeeze_groups_samples(group):
    """Both channels of a group stay together; every other sample comes first."""
    x = torch.arange(2 * 48, dtype=torch.float64).reshape(2, 48)
    layer = pf.transforms.Squeeze((2, 48), group=group)
    y, ladj = layer.forward_and_ladj(x)
    assert (tuple(y.shape), float(ladj)) == ((2 * group, 48 // group), 0.0)
    assert sorted(y[:, 1].tolist()) == sorted(x[:, group : 2 * group].flatten().tolist())
    moved = y[: 2 * (group // 2), 0]
    assert moved.tolist() == x[:, 1:group:2].T.flatten().tolist()
    assert torch.equal(layer.inv(y), x)
    assert layer.inverse_shape(y.shape) == layer.event_shape == (2, 48)


def test_squeeze_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="dim: expected a length divisible by 5"):
        pf.transforms.Squeeze((1, 12), group=5)
    with pytest.raises(ValueError, match="group: "):
        pf.transforms.Squeeze((1, 12), group=1)


@pytest.mark.parametrize("wrong", [{"group": 5}, {"levels": 4}, {"frames": 4}, {"layers": 0}, {"frames": 2}])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pf.waveglow((1, 36), **{"context_dim": 9, "group": 4, "levels": 2, "hidden": (4,), **wrong})
    with pytest.raises(ValueError, match="dim: "):
        pf.waveglow((1, 4, 4))


def test_a_signal_keeps_some_channels_unless_a_context_tells_all():
    nothing = torch.zeros(SIGNAL)
    with pytest.raises(ValueError, match=r"mask: .* one True \(kept\)"):
        pf.transforms.AffineCoupling(SIGNAL, mask=nothing)
    kind = partial(pf.transforms.AffineCoupling, SIGNAL, mask=nothing, context_dim=6, frames=3)
    layer = built(kind, dtype=torch.float64, sd=0.3, seed=0)
    x, context = normal(5, *SIGNAL, seed=1), normal(5, 6, seed=2)
    y, _ = layer.forward_and_ladj(x, context)
    scale = layer.forward_and_ladj(torch.ones_like(x), context)[0] - layer.forward_and_ladj(0 * x, context)[0]
    close(y, scale * x + layer.forward_and_ladj(0 * x, context)[0], 1e-9)


def test_frames_act_where_they_are():
    """A frame reaches its own samples and, through convolutions over frames and times, those nearby."""
    kind = partial(pf.transforms.AffineCoupling, (2, 40), context_dim=10, frames=10, hidden=(4,))
    layer = built(kind, dtype=torch.float64, sd=0.3, seed=0)
    x, context = normal(2, 40, seed=1), normal(10, seed=2)
    other = context.clone()
    other[5] += 1.0
    differ = (layer.forward_and_ladj(x, context)[0] != layer.forward_and_ladj(x, other)[0])[1].nonzero().flatten()
    assert differ.tolist() == list(range(16, 28))  # three frames of four times


@pytest.mark.parametrize("context_dim", [0, 3])
def test_samples_across_a_group_meet(context_dim):
    flow = make_flow("waveglow", (1, 12), context_dim=context_dim, sd=0.2, group=4)
    x = normal(8, 1, 12, seed=1)
    context = normal(8, 3, seed=2) if context_dim else None
    matrix = jacobian(lambda point: flow.bijection.forward_and_ladj(point, context)[0], x, 2).abs().amax(0)
    assert ((matrix > 0.0).sum(1) > 3).sum() >= 6
    assert (matrix.amax(0) > 0.0).all()


def test_other_lengths_have_the_same_weights():
    """Away from the ends, a longer signal is described as a shorter one is."""
    flow = make_flow("waveglow", (1, 240), context_dim=30 * 2, frames=30, sd=0.1, group=4)
    longer = at_length(flow, 320)
    assert (longer.event_shape, longer.context_dim) == ((1, 320), 80)
    y, context = normal(1, 320, seed=1), normal(80, seed=2)
    whole, _ = longer.bijection.inverse_and_ladj(y, context)
    part, _ = flow.bijection.inverse_and_ladj(y[:, :240], context[:60])
    close(whole[:, :160], part[:, :160], 1e-12)
    assert not torch.allclose(whole[:, 236:240], part[:, 236:240])
    with pytest.raises(ValueError, match="length: expected whole frames of 8 samples, got 317"):
        at_length(flow, 317)
    with pytest.raises(ValueError, match="flow: "):
        at_length(pf.realnvp(2), 4)


# learning from crops --------------------------------------------------------------------------------------------------


def recordings(count=60, seed=0):
    """Noise that an AR(2) process of a loudness that changes makes, and the log loudness of each 8 samples."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(count, 40, 1, generator=generator)
    noise = 100.0 * torch.randn(count, 320, generator=generator) * loud.exp().repeat_interleave(8, 1)[..., 0]
    wave = torch.zeros(count, 320)
    for time in range(2, 320):
        wave[:, time] = 1.2 * wave[:, time - 1] - 0.5 * wave[:, time - 2] + noise[:, time]
    return list(zip(wave.round().clamp(-32768, 32767).to(torch.int16), loud, strict=True))


def fitted(path=None, **more):
    crops = datasets.Crops(recordings(), length=64, count=64)
    torch.manual_seed(0)
    flow = pf.waveglow((1, 64), frames=8, context_dim=8, **SMALL)
    flow.bijection.start_from(*next(iter(DataLoader(crops, 64))))
    held = tuple(next(iter(DataLoader(crops, 32))))
    about = {"learning_rate": 5e-3, "progress": False, "checkpoint": path, **more}
    return pf.fit_density(flow, DataLoader(crops, 16), validation=held, **about), flow, held


def test_a_conditional_flow_of_signals_learns_and_is_saved(tmp_path):
    fit, start, (y, context) = fitted(max_epochs=30)
    assert fit.settings["preprocess"] is None
    gained = (fit.validation - float(start.log_prob(y, context).detach().mean())) / 64
    assert gained > 0.5  # nats a sample
    loud, quiet = torch.full((200, 8), 1.0), torch.full((200, 8), -1.0)
    ratio = fit.sample(200, loud, seed=0).std() / fit.sample(200, quiet, seed=0).std()
    assert 1.7 < ratio < 1.5 * math.exp(2.0)
    cold = fit.sample(200, loud, temperature=0.5, seed=0)
    assert cold.std() < 0.8 * fit.sample(200, loud, seed=0).std()
    fit.save(tmp_path / "fit")
    back = pf.DensityFit.load(tmp_path / "fit")
    assert torch.equal(back.log_prob(y, context), fit.log_prob(y, context))
    assert back.flow.recipe == fit.flow.recipe


def test_a_training_by_crops_goes_on(tmp_path, monkeypatch):
    """From a checkpoint of three epochs, it ends where a training that was not broken off ends."""
    whole, *_ = fitted(max_epochs=6)
    steps, step = [], training.Ascent.step

    def stop(self, *args):
        steps.append(1)
        if len(steps) == 14:
            raise OSError("broken off")
        return step(self, *args)

    monkeypatch.setattr(training.Ascent, "step", stop)
    monkeypatch.setattr("pyro_flows.densities.fit_density.SAVE_EVERY", 0.0)
    with pytest.raises(OSError, match="broken off"):
        fitted(tmp_path / "checkpoint", max_epochs=6)
    monkeypatch.setattr(training.Ascent, "step", step)
    again, _, (y, context) = fitted(tmp_path / "checkpoint", max_epochs=6)
    assert torch.equal(again.losses, whole.losses)
    assert torch.equal(again.log_prob(y, context), whole.log_prob(y, context))


def test_masks_of_signals():
    assert masks.channels((4, 3)).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    with pytest.raises(ValueError, match="shape: "):
        masks.checkerboard((4, 3))
