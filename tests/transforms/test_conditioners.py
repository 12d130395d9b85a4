"""Networks that couplings condition by: weight norm, residual blocks, convolutions, contexts of images."""

import math

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import pyro_flows as pf
from pyro_flows.transforms.conditioners import forward_and_pull
from pyro_flows.transforms.networks import (
    ACTIVATIONS,
    Convolution,
    Dense,
    Network,
    NormedConv2d,
    NormedLinear,
    Residual,
    ResidualConvolution,
    Robust,
    RobustConvolution,
)
from tests.invariants import close
from tests.registry import HIDDEN, IMAGE, built, normal, randomize


@pytest.mark.parametrize("kind", [NormedLinear, NormedConv2d])
def test_weight_norm_is_that_of_torch(kind):
    """The same start as a plain layer, and the same function of direction and length after training."""
    layer = built(lambda: kind(3, 5), dtype=torch.float64, sd=0.0, seed=0)
    plain = torch.nn.Linear(3, 5) if kind is NormedLinear else torch.nn.Conv2d(3, 5, 3, padding="same")
    plain = plain.double()
    x = normal(4, 3, seed=1) if kind is NormedLinear else normal(4, 3, 6, 6, seed=1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    close(layer(x), plain(x), 1e-6)  # the lengths were worked out in float32
    randomize(layer, sd=0.3)
    with torch.no_grad():
        plain.bias.copy_(layer.bias)
    theirs = weight_norm(plain)
    theirs.parametrizations.weight.load_state_dict({"original0": layer.length, "original1": layer.weight})
    close(layer(x), theirs(x), 1e-12)


@pytest.mark.parametrize("kind", [Network, Robust, Residual, Convolution, ResidualConvolution])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_networks_start_at_what_they_are_told(kind, context_dim):
    """Whatever the input: their last layer starts without weights."""
    start = torch.tensor([1.0, -2.0, 0.5])
    network = kind(4, context_dim, 3, (6, 6), "silu", start)
    kept = torch.randn(5, 4, *((3, 3) if issubclass(kind, Convolution) else ()))
    out = network(kept, torch.randn(5, context_dim) if context_dim else None)
    expected = start.reshape(-1, *(1,) * (kept.dim() - 2)).expand_as(out)
    close(out.detach(), expected, 0.0)
    assert len(out) == 5


def test_convolutions_see_the_neighborhood_and_the_context():
    """3 x 3, 1 x 1, 3 x 3: five pixels across. The context reaches every pixel."""
    network = built(lambda: Convolution(1, 2, 1, (4, 4), "tanh"), dtype=torch.float64, sd=0.3, seed=0)
    kept, context = normal(1, 9, 9, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    out = network(kept, context)
    (gradient,) = torch.autograd.grad(out[0, 4, 4], kept, retain_graph=True)
    rows, columns = (gradient[0] != 0.0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 2, 6)
    for pixel in out[0].flatten()[:20]:
        assert torch.autograd.grad(pixel, context, retain_graph=True)[0].abs().min() > 0.0


@pytest.mark.parametrize("kind", [Convolution, RobustConvolution, ResidualConvolution])
@pytest.mark.parametrize(("batch", "about"), [((5,), (5,)), ((), ()), ((2, 5), (5,)), ((5,), (2, 5)), ((), (3,))])
def test_a_context_of_convolutions_is_a_constant_channel(kind, batch, about):
    network = built(lambda: kind(2, 3, 4, (6, 6), "relu"), dtype=torch.float64, sd=0.3, seed=0)
    kept, context = normal(*batch, 2, 4, 7, seed=1), normal(*about, 3, seed=2)
    shape = torch.broadcast_shapes(batch, about)
    seen = kept.asinh() if kind is RobustConvolution else kept
    both = [seen.expand(*shape, 2, 4, 7), context[..., None, None].expand(*shape, 3, 4, 7)]
    expected = network.layers(torch.cat(both, -3).reshape(-1, 5, 4, 7)).reshape(*shape, 4, 4, 7)
    close(network(kept, context), expected, 1e-12)


def test_a_robust_network_sees_far_values_by_their_logarithm():
    network = built(lambda: Robust(2, 3, 4, (6,), "relu"), dtype=torch.float64, sd=0.3, seed=0)
    kept, context = torch.tensor([[1e4, -0.5]], dtype=torch.float64), 1e4 * torch.ones(1, 3, dtype=torch.float64)
    seen = torch.tensor([[math.log(2e4), -math.asinh(0.5)]], dtype=torch.float64)
    close(network(kept, context), network.layers(torch.cat([seen, context], 1)), 1e-4)
    near = 1e-3 * kept.clamp(-1.0, 1.0)
    close(network(near, context), network.layers(torch.cat([near, context], 1)), 1e-6)


@pytest.mark.parametrize(("network", "kind"), [("mlp", Network), ("robust", Robust), ("residual", Residual)])
def test_couplings_of_vectors_take_either_network(network, kind):
    flow = pf.realnvp(4, layers=2, hidden=(8, 8), network=network)
    assert {type(part) for part in flow.modules() if isinstance(part, Network)} == {kind}


def test_a_dense_network_of_images_sees_all_kept_pixels():
    network = built(lambda: Dense(2, 3, 4, (6,), "silu", sides=(3, 5)), dtype=torch.float64, sd=0.3, seed=0)
    kept, context = normal(2, 3, 5, seed=1).requires_grad_(), normal(3, seed=2).requires_grad_()
    out = network(kept, context)
    assert out.shape == (4, 3, 5)
    for pixel in out.flatten()[::7]:
        for gradient in torch.autograd.grad(pixel, (kept, context), retain_graph=True):
            assert gradient.abs().min() > 0.0
    start = torch.arange(4.0)
    fresh = Dense(2, 0, 4, (6,), "relu", start, sides=(3, 5))(torch.randn(7, 2, 3, 5), None)
    assert torch.equal(fresh, start[:, None, None].expand(7, 4, 3, 5))


IMAGE_KINDS = {"convolution": Convolution, "robust": RobustConvolution, "residual": ResidualConvolution, "dense": Dense}


@pytest.mark.parametrize("network", [None, *IMAGE_KINDS])
def test_couplings_of_images_take_either_network(network):
    layer = pf.transforms.AffineCoupling(IMAGE, hidden=HIDDEN, network=network)
    assert type(layer.conditioner) is IMAGE_KINDS[network or "convolution"]


@pytest.mark.parametrize("build", [pf.glow, pf.multiscale_realnvp])
def test_flows_of_images_take_robust_networks(build):
    flow = build(IMAGE, hidden=HIDDEN)
    assert {type(part) for part in flow.modules() if isinstance(part, Network)} == {RobustConvolution}


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [Network, Robust, Residual, Convolution])
def test_the_way_back_to_what_is_kept_is_that_of_autograd(kind, activation, context_dim):
    network = built(lambda: kind(3, context_dim, 4, (6, 6), activation), dtype=torch.float64, sd=0.5, seed=0)
    kept = normal(5, 3, *((4, 4) if kind is Convolution else ()), seed=1).requires_grad_()
    context = normal(5, context_dim, seed=2) if context_dim else None
    out, pull = forward_and_pull(network, kept, context)
    close(out, network(kept, context), 0.0)
    cotangent = normal(*out.shape, seed=3)
    with torch.no_grad():
        found = pull(cotangent)
    close(found, torch.autograd.grad(out, kept, cotangent)[0], 1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("place", [None, "layers", "layers.0", "layers.1"])
@pytest.mark.parametrize("kind", [Network, Robust])
def test_hooks_on_a_network_are_part_of_the_way_back(kind, place):
    """Such a network is left to autograd."""
    network = built(lambda: kind(3, 0, 4, (6,), "tanh"), dtype=torch.float64, sd=0.5, seed=0)
    kept, cotangent = normal(5, 3, seed=1), normal(5, 4, seed=2)
    without = forward_and_pull(network, kept, None)[1](cotangent).detach()
    network.get_submodule(place or "").register_forward_hook(lambda layer, given, out: 2.0 * out)
    kept.requires_grad_()
    out, pull = forward_and_pull(network, kept, None)
    expected = torch.autograd.grad(network(kept, None), kept, cotangent)[0]
    close(out, network(kept, None), 0.0)
    close(pull(cotangent).detach(), expected, 1e-12)
    assert not torch.allclose(expected, without)
