"""ActNorm starts from data by an explicit call; BatchNorm learns its statistics in the direction of the density."""

import pytest
import torch

import pyro_flows as pf
from tests.invariants import close
from tests.registry import HIDDEN, IMAGE, IMAGE_FLOWS, built, make_flow, normal

SHAPES = [4, (3, 4, 2)]
CHECKERED = {"mask": pf.transforms.masks.checkerboard((1, 2, 2)), "hidden": HIDDEN}


def data(shape, count=64, seed=1):
    """Correlated points with a mean and a spread of their own in each coordinate."""
    event = (shape,) if isinstance(shape, int) else shape
    x = normal(count, *event, seed=seed)
    scale = torch.linspace(0.1, 300.0, event[0], dtype=torch.float64).reshape(-1, *(1,) * (len(event) - 1))
    return scale * (x + 0.5 * x.roll(1, 1)) - 7.0 * scale


def moments(x, shape):
    flat = x.movedim(1, -1).reshape(-1, x.shape[1])
    return flat.mean(0), flat.var(0, correction=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_start_from_data(shape):
    """Mean 0 and variance 1 of each coordinate or channel, and the very map that does it afterwards."""
    layer = pf.transforms.ActNorm(shape).double()
    with torch.no_grad():
        layer.conditioner.values.add_(0.3)
    y = data(shape)
    x = layer.start_from(y)
    mean, variance = moments(x, shape)
    close(mean, torch.zeros_like(mean), 1e-10)
    close(variance, torch.ones_like(variance), 1e-10)
    close(layer.inverse_and_ladj(y)[0], x, 0.0)
    assert (layer.conditioner.values == 0.0).all()
    twin = pf.transforms.ActNorm(shape).double()
    twin.load_state_dict(layer.state_dict())
    close(twin(x), y, 1e-10)


def test_a_chain_starts_layer_by_layer():
    """Each ActNorm standardizes what reaches it; layers of other kinds stay as they are."""
    layers = [
        pf.transforms.ActNorm(4),
        pf.transforms.AffineCoupling(4, hidden=HIDDEN),
        pf.transforms.ActNorm(4),
        pf.transforms.LULinear(4, seed=1),
    ]
    chain = built(lambda: pf.transforms.Compose(layers), dtype=torch.float64, sd=0.3, seed=0)
    others = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in (layers[1], layers[3])]
    y = data(4)
    x = chain.start_from(y)
    middle = pf.transforms.Compose(layers[2:]).inverse_and_ladj(y)[0]
    for part in (x, middle):
        mean, variance = moments(part, 4)
        close(mean, torch.zeros_like(mean), 1e-10)
        close(variance, torch.ones_like(variance), 1e-10)
    close(chain.inverse_and_ladj(y)[0], x, 1e-10)
    for layer, before in zip((layers[1], layers[3]), others, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", IMAGE_FLOWS)
def test_image_flows_start_from_data(name):
    """With all nested scales: after it the ActNorm nearest to the data standardizes, and the rest are set too."""
    flow = make_flow(name, IMAGE)
    y = data(IMAGE)
    x = flow.bijection.start_from(y)
    close(x, flow.bijection.inverse_and_ladj(y)[0], 1e-9)
    assert x.std() < 10.0 < y.std()
    for part in flow.bijection.modules():
        if isinstance(part, pf.transforms.ActNorm):
            assert not torch.equal(part.scale, torch.ones_like(part.scale))


def test_with_context_the_start_sees_it():
    layer = pf.transforms.MultiScale(
        pf.transforms.Compose(
            [pf.transforms.ActNorm((1, 2, 2)), pf.transforms.AffineCoupling((1, 2, 2), **CHECKERED, context_dim=3)]
        )
    )
    chain = built(lambda: layer, dtype=torch.float64, sd=0.3, seed=0)
    y, context = data((2, 2, 2)), normal(64, 3, seed=4)
    x = chain.start_from(y, context)
    close(x, chain.inverse_and_ladj(y, context)[0], 1e-12)
    close(x[:, :1], y[:, :1], 0.0)
    mean, variance = moments(x[:, 1:], (1, 2, 2))
    close(mean, torch.zeros_like(mean), 1e-10)
    close(variance, torch.ones_like(variance), 1e-10)


def test_start_is_explicit():
    layer = pf.transforms.ActNorm(3)
    layer.inverse_and_ladj(100.0 + torch.randn(10, 3))
    assert (layer.loc == 0.0).all()


def test_a_constant_coordinate_keeps_its_scale():
    layer = pf.transforms.ActNorm(2)
    close(layer.start_from(torch.tensor([[1.0, 5.0], [3.0, 5.0]])), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_refused(bad):
    layer = pf.transforms.ActNorm(2)
    with pytest.raises(ValueError, match="y: expected finite data"):
        layer.start_from(torch.tensor([[1.0, bad], [0.0, 0.0]]))
    assert torch.equal(layer.loc, torch.zeros(2))


@pytest.mark.parametrize("kind", [pf.transforms.ActNorm, pf.transforms.BatchNorm])
def test_one_point_has_no_variance(kind):
    layer = kind(3)
    with pytest.raises(ValueError, match="at least 2 points"):
        layer.start_from(torch.zeros(1, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_in_train_mode(shape):
    """The batch's own statistics, their log-determinant, and running averages that move by the momentum."""
    layer = pf.transforms.BatchNorm(shape, momentum=0.25, epsilon=1e-9).double()
    y = data(shape)
    x, ladj = layer.inverse_and_ladj(y)
    mean, variance = moments(x, shape)
    close(mean, torch.zeros_like(mean), 1e-9)
    close(variance, torch.ones_like(variance), 1e-6)
    mean, variance = moments(y, shape)
    close(layer.running_mean, 0.25 * mean, 1e-9)
    close(layer.running_variance, 0.75 + 0.25 * variance, 1e-6)
    pixels = y[0].numel() // y.shape[1]
    close(ladj, (-0.5 * pixels * variance.log().sum()).expand(len(y)), 1e-6)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    close(layer(layer.inverse_and_ladj(y)[0]), y, 1e-9)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_batch_norm_refuses_to_sample_in_train_mode():
    flow = pf.Flow(pf.transforms.Compose([pf.transforms.AffineCoupling(2), pf.transforms.BatchNorm(2)]))
    y = torch.randn(8, 2)
    assert flow.log_prob(y).shape == (8,)
    for draw in (flow().rsample, flow.rsample_and_log_prob, flow.sample_with_score):
        with pytest.raises(RuntimeError, match=r"BatchNorm.*eval\(\)"):
            draw((3,))
    flow.eval()
    assert flow().sample((3,)).shape == (3, 2)


def test_batch_norm_trains_by_maximum_likelihood():
    """In train mode the loss falls; in eval mode the same flow has nearly the same likelihood on the data."""
    points = data(2, 512).float()
    flow = built(
        lambda: pf.Flow(pf.transforms.Compose([pf.transforms.AffineCoupling(2), pf.transforms.BatchNorm(2)])),
        dtype=torch.float32,
        sd=0.0,
        seed=0,
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = -flow.log_prob(points).mean()
        loss.backward()
        optimizer.step()
    entropy = 0.5 * torch.logdet(2.0 * torch.pi * torch.e * torch.cov(points.T))
    assert loss < entropy + 0.1
    assert abs(-flow.eval().log_prob(points).mean() - loss) < 0.05
