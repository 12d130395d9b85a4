"""Writes through boolean masks that depend on latents: batched, recorded, and equal to single runs."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.support.numbers.tensors import Memories, storage_of
from tests.invariants import close
from tests.model.test_tracing import alone
from tests.models import real
from tests.registry import RECORDED_FROM, normal

Y = normal(3, 4, seed=5)


def numbers(a):
    """A matrix (3, 4) that depends on the latents ``a`` (2,), and is below 0 in some places."""
    return a[0] * Y + a[1]


def by_number(a):
    x = numbers(a)
    x[x < 0.0] = 0.5
    return x


def by_scalar(a):
    x = numbers(a)
    x[x < 0.0] = a[0].exp()
    return x


def rows(a):
    x = numbers(a)
    x[x[:, 0] < 0.0] = torch.stack([a[0], a[1], a[0] * a[1], a[0]])
    return x


def one_value(a):
    x = numbers(a)
    x[x < 0.0] = a[:1] * 2.0
    return x


def columns(a):
    x = numbers(a)
    x[..., x[0] < 0.0] = a[1]
    x[:, x[1] < 0.0] = a[0].sin()
    return x


def in_a_row(a):
    x = numbers(a)
    x[1, x[1] < 0.0] = a[1]
    x[None, 2, ..., x[2] > 0.0] = a[0]
    return x


def into_constants(a):
    """A tensor without a batch axis, in which what the mask chooses depends on the latents."""
    x = torch.zeros(3, 4, dtype=Y.dtype)
    x[numbers(a) < 0.0] = 1.0
    return x * a[0]


def from_another(a):
    x, below = numbers(a), numbers(a) < 0.0
    x[below] = a[1] - 2.0 * (a * a).sum() * Y[below] + x[below]
    return x


def arithmetic(a):
    x = numbers(a)
    x[x < 0.0] += a[0]
    x[x > 1.0] *= a[1]
    x[x > 0.5] -= 1.0
    return x


def put(a):
    x = numbers(a)
    return x.index_put_((x < 0.0,), a[0])


def one_truth(a):
    x = numbers(a)
    x[a[0] > a[1]] = a[1]
    return x


def infinite_elsewhere(a):
    """What is not chosen has no part in a gradient."""
    x = torch.where(Y > 0.0, numbers(a), torch.inf)
    x[x.isfinite()] *= a[1]
    x[~x.isfinite()] = 0.0
    return x


WRITES = (
    by_number, by_scalar, rows, one_value, columns, in_a_row, into_constants, from_another, arithmetic, put, one_truth,
    infinite_elsewhere,
)  # fmt: skip


def written_by(write):
    def model(y):
        a = pyro.sample("a", dist.Normal(real(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(write(a), 1.0).to_event(2), obs=y)

    return model


def observing(likelihood):
    def model(y):
        a = pyro.sample("a", dist.Normal(real(0.2, 0.0), 0.3).to_event(1))
        pyro.sample("y", likelihood(a), obs=y)

    return model


def weights(a):
    """Three of them; the last is exactly 0."""
    return torch.cat([a.exp(), torch.zeros_like(a[:1])])


NAN = float("nan")
COUNTS, MISSING = real(3.0, 1.0, 0.0), real(1.0, NAN, 2.0)
PAIRS = torch.tensor([[0.1, 0.2], [0.5, NAN], [NAN, NAN]], dtype=torch.float64)
LIKELIHOODS = {
    "multinomial": (lambda a: dist.Multinomial(4, weights(a)), COUNTS),
    "multinomial by logits": (lambda a: dist.Multinomial(4, logits=weights(a)), COUNTS),
    "Dirichlet-multinomial": (lambda a: dist.DirichletMultinomial(1.0 + weights(a), 4), COUNTS),
    "one-hot": (lambda a: dist.OneHotCategorical(logits=weights(a)), real(0.0, 1.0, 0.0)),
    "geometric": (lambda a: dist.Geometric(torch.sigmoid(a[0]).expand(3)).to_event(1), COUNTS),
    "geometric by logits": (lambda a: dist.Geometric(logits=a[0].expand(3)).to_event(1), COUNTS),
    "zero-inflated Poisson": (
        lambda a: dist.ZeroInflatedPoisson(a[0].exp(), gate=torch.sigmoid(a[1])).expand([3]).to_event(1), COUNTS,
    ),
    "zero-inflated counts": (
        lambda a: dist.ZeroInflatedDistribution(dist.Geometric(logits=a[0]), gate_logits=a[1]).expand([3]).to_event(1),
        COUNTS,
    ),
    "masked mixture": (
        lambda a: dist.MaskedMixture(COUNTS > 0.5, dist.Normal(a[0], 1.0), dist.Exponential(a[1].exp())).to_event(1),
        COUNTS,
    ),
    "missing values": (lambda a: dist.NanMaskedNormal(a[0], a[1].exp()).expand([3]).to_event(1), MISSING),
    "missing values of pairs": (
        lambda a: dist.NanMaskedMultivariateNormal(a, a.exp().diag_embed()).expand([3]).to_event(1), PAIRS,
    ),
    "half-Cauchy": (lambda a: dist.HalfCauchy(a[0].exp()).expand([3]).to_event(1), COUNTS),
}  # fmt: skip
CASES = {
    **{write.__name__: (written_by(write), Y) for write in WRITES},
    **{name: (observing(likelihood), y) for name, (likelihood, y) in LIKELIHOODS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_batched_and_single_numbers_are_equal(name):
    model, y = CASES[name]
    density = pf.LogDensity(model, (y,))
    assert density.batched
    z = 0.4 * normal(6, density.dim, seed=9)
    batched = density.unrecorded(z)
    for _ in range(RECORDED_FROM + 1):
        recorded = density.value_and_grad(z)
    assert density.reason is None
    assert len(density._with_gradients.runners) == 1
    assert density.graph(z) is not None, "no part of a training step"
    moved = z + 0.3
    for one, other in zip(recorded, batched, strict=True):
        close(one, other, 1e-9)
    for one, other in zip(density.value_and_grad(moved), density.unrecorded(moved), strict=True):
        close(one, other, 1e-9)
    terms = density.log_likelihood(z)["y"] + density.log_prior(z)["a"]
    close(terms, batched[0], 1e-9)
    for one, other, tolerance in zip(batched, alone(density, z, plain=True), (1e-9, 1e-5), strict=True):
        close(one, other, tolerance)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_are_batched(name):
    model, y = CASES[name]
    density = pf.LogDensity(model, (y,))
    assert density.predictive(normal(4, 2, seed=3))["y"].shape == (4, *y.shape)
    assert density.prior(5)["y"].shape == (5, *y.shape)


def summed(a):
    x = numbers(a)
    return x - x[x < 0.0].sum()


def counted(a):
    x = numbers(a)
    return x + len(x[x < 0.0])


def logs(a):
    x = numbers(a)
    x[x > 0.0] = (1.0 + x[x > 0.0]).log()
    return x


@pytest.mark.falls_back
@pytest.mark.parametrize("write", [summed, counted, logs])
def test_what_depends_on_how_many_are_chosen_is_run_draw_by_draw(write):
    density = pf.LogDensity(written_by(write), (Y,))
    assert not density.batched
    z = 0.4 * normal(4, 2, seed=9)
    for one, other, tolerance in zip(
        density.value_and_grad(z), alone(density, z, plain=True), (1e-9, 1e-5), strict=True
    ):
        close(one, other, tolerance)


def test_a_mask_of_another_shape_is_refused_as_ever():
    def model(y):
        a = pyro.sample("a", dist.Normal(real(0.0, 0.0), 1.0).to_event(1))
        x = numbers(a)
        x[x[:, :1] < 0.0] = 0.0

    with pytest.raises(ValueError, match="IndexError: The shape of the mask"):
        pf.LogDensity(model, (Y,))


def test_memory_that_is_used_again_has_another_number():
    """Torch gives memory out again that has just become free, by the same address as a rule."""
    known, seen = Memories(), set()
    for count in range(50):
        one = torch.zeros(100)
        assert known.of(one) == known.of(one[3:]) == storage_of(one)
        seen.add(known.of(one))
        assert len(seen) == count + 1
        del one
