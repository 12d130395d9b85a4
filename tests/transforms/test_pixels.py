"""Between whole numbers, the unit interval and the real line: safe ends, counted determinants, bounds that hold."""

import math

import pyro
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from tests.invariants import close
from tests.registry import IMAGE, randomize
from tests.state_invariants import copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.4])
def test_logit_is_safe_at_both_ends(alpha, dtype):
    """The same distance from 0 at both, finite, with finite gradients."""
    layer = pf.transforms.Logit(2, alpha=alpha)
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    x, ladj = layer.inverse_and_ladj(y)
    end = math.log(alpha / (1.0 - alpha))
    close(x.detach(), torch.tensor([[end, -end], [-end, end]], dtype=dtype), 1e-5)
    (gradient,) = torch.autograd.grad(x.sum() + ladj.sum(), y)
    assert gradient.isfinite().all()
    back, ladj_back = layer.forward_and_ladj(x)
    close(back.detach(), y.detach(), 1e-6)
    close(ladj_back, -ladj, 1e-4)


@pytest.mark.parametrize("size", [30.0, 1e4, 1e30])
def test_far_latents_reach_the_ends(size):
    """The value ends at the edge of what alpha leaves; the log-determinant goes on falling."""
    layer = pf.transforms.Logit(1, alpha=0.05)
    y, ladj = layer.forward_and_ladj(torch.tensor([[size], [-size]]))
    close(y, torch.tensor([[0.95 / 0.9], [-0.05 / 0.9]]), 1e-6)
    close(ladj, torch.tensor([-size - math.log(0.9)] * 2), 1e-6)


def test_logit_names_its_support():
    """A flow that ends in it refuses data in other units, as Pyro's distributions do."""
    flow = pf.multiscale_realnvp((1, 4, 4), layers=1, hidden=(4,), alpha=0.05)
    support = flow().support
    assert isinstance(support.base_constraint, constraints.interval)
    assert bool(support.check(torch.ones(1, 4, 4)))
    assert flow.log_prob(torch.zeros(3, 1, 4, 4)).isfinite().all()
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="support"):
        flow.log_prob(torch.full((3, 1, 4, 4), 128.0))


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("shape", [3, IMAGE], ids=str)
def test_levels_come_back(shape, levels, dtype, variational):
    """Whatever the noise, in the unit interval and on its level; with as many log densities as events."""
    event = (shape,) if isinstance(shape, int) else shape
    dequantize = pf.transforms.Dequantize(shape, levels=levels, variational=variational, hidden=(4,)).to(dtype)
    randomize(dequantize, sd=0.5)
    data = torch.randint(levels, (500, *event), generator=torch.Generator().manual_seed(1))
    y, log_q = dequantize(data)
    assert (y.dtype, y.shape, log_q.shape) == (dtype, data.shape, (500,))
    assert ((y >= 0.0) & (y < 1.0)).all()
    assert torch.equal(dequantize.levels_of(y), data)
    assert y.requires_grad == log_q.requires_grad == variational


def test_extreme_noise_stays_on_its_level():
    """Where rounding would lift a value to the next level."""
    dequantize = pf.transforms.Dequantize(1, levels=256, variational=True)
    with torch.no_grad():
        dequantize.conditioner.layers[-1].bias.copy_(torch.tensor([40.0, 0.0]))
    data = torch.arange(256)[:, None]
    y, log_q = dequantize(data)
    assert torch.equal(dequantize.levels_of(y), data)
    assert log_q.isfinite().all()


def test_it_starts_as_uniform_noise():
    """Kolmogorov's distance of 20 000 numbers from the uniform distribution: 1 seed in 1000 exceeds it."""
    dequantize = pf.transforms.Dequantize(20_000, levels=4, variational=True, hidden=(2,))
    y, log_q = dequantize(torch.zeros(20_000, dtype=torch.uint8), torch.Generator().manual_seed(1))
    noise = (4.0 * y.detach()).sort().values
    distance = (noise - torch.linspace(0.0, 1.0, 20_000)).abs().max()
    assert distance < 1.95 / math.sqrt(20_000)
    close(log_q.detach(), torch.tensor(20_000 * math.log(4.0)), 1e-5)


def test_variational_noise_has_the_density_that_it_says():
    """The mean of 1/q over draws is the volume, 1 (of one level, in units of u): to 4 standard errors."""
    dequantize = pf.transforms.Dequantize(1, levels=2, variational=True).double()
    with torch.no_grad():
        dequantize.conditioner.layers[-1].bias.copy_(torch.tensor([0.6, -0.2]))
        y, log_q = dequantize(torch.ones(100_000, 1), torch.Generator().manual_seed(1))
    weights = torch.exp(-log_q) * 2.0
    assert weights.std() > 0.1
    assert abs(weights.mean() - 1.0) < 4.0 * weights.std() / math.sqrt(len(weights))
    assert (2.0 * y - 1.0).mean() > 0.55  # the shift pushes up


def test_the_bound_holds_and_learned_noise_makes_it_tighter():
    """A density that is far from flat inside the levels: uniform noise loses what the variational one gains back."""
    flow = pf.Flow(
        pf.transforms.Compose([pf.transforms.DiagonalAffine(1, loc=[0.5], scale=[0.05]), pf.transforms.Rescale(1)])
    )
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    levels = torch.ones(2000, 1)  # the level [0.5, 1) of two: the probability is 1/2

    def bound(dequantize):
        y, log_q = dequantize(levels, torch.Generator().manual_seed(2))
        return (flow.log_prob(y) - log_q).mean()

    learned = pf.transforms.Dequantize(1, levels=2, variational=True, hidden=(4,))
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-bound(learned)).backward()
        optimizer.step()
    assert bound(pf.transforms.Dequantize(1, levels=2)) < -10.0
    assert math.log(0.5) - 0.5 < bound(learned) < math.log(0.5) + 0.02


def test_noise_follows_its_generator_and_copies():
    dequantize = randomize(pf.transforms.Dequantize(IMAGE, variational=True, hidden=(4,)), sd=0.3)
    data = torch.randint(256, (2, *IMAGE))
    first = dequantize(data, torch.Generator().manual_seed(5))
    for name, twin in copies(dequantize, pf.transforms.Dequantize(IMAGE, variational=True, hidden=(4,))):
        for got, expected in zip(twin(data, torch.Generator().manual_seed(5)), first, strict=True):
            close(got, expected, 0.0, name)
    assert not torch.equal(dequantize(data, torch.Generator().manual_seed(6))[0], first[0])


@pytest.mark.parametrize("bad", [[-1.0, 0.0], [4.0, 0.0], [0.5, 0.0], [float("nan"), 0.0]])
def test_only_whole_numbers_of_its_levels(bad):
    with pytest.raises(ValueError, match="data: expected whole numbers from 0 to 3"):
        pf.transforms.Dequantize(2, levels=4)(torch.tensor([bad]))
    with pytest.raises(ValueError, match=r"Dequantize: expected a tensor of shape \(\.\.\., 2\)"):
        pf.transforms.Dequantize(2, levels=4)(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"^levels: "):
        pf.transforms.Dequantize(2, levels=1)


def test_draws_beyond_the_unit_interval_go_to_the_ends():
    assert pf.transforms.Dequantize(3).levels_of(torch.tensor([-0.05, 1.0, 1.05])).tolist() == [0, 255, 255]


def test_bits_per_dimension_of_a_uniform_density_are_eight():
    """Of 256 levels, whatever the image: log2 256, with p(y) = 1 on the unit cube."""
    y, log_q = pf.transforms.Dequantize(IMAGE)(torch.randint(256, (3, *IMAGE)))
    flow = pf.Flow(pf.transforms.Logit(IMAGE, alpha=1e-12).double(), base="logistic")
    bits = (log_q - flow.log_prob(y.double())) / (math.prod(IMAGE) * math.log(2.0))
    close(bits.double(), torch.full((3,), 8.0, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, 1.0])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"^alpha: "):
        pf.transforms.Logit(2, alpha=alpha)
