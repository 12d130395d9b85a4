"""Models as users write them: numbers of data, loops, writes in place, sequential plates, modules with priors."""

import math
import re

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from torch import Tensor

import pyro_flows as pf
from pyro_flows.model.graphs import record
from pyro_flows.support.process.fallbacks import Fallback, fallback, strict
from tests.invariants import close
from tests.models import gauss, real
from tests.registry import RECORDED_FROM, normal

X, Y = normal(20, seed=1), normal(20, seed=2)


def numbers_of_data(x, y):
    """``float``, ``int``, ``.item()``, ``if``, ``tolist`` and numpy, on data and on what is computed from them."""
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    scale, above = float(x.std()), int((x > 0).sum())
    shape = torch.as_tensor(np.asarray(x) / scale + np.asarray(x.mean()))
    if (x[:, None] - x).abs().max() > 0.0 and not bool(torch.isnan(y).any()):
        shape = shape + y.abs().max().item() + 0.1 * above + sum(y.tolist())
    pyro.sample("y", dist.Normal(a * shape, 1.0).to_event(1), obs=y)


def growth(ts, y):
    """Runge-Kutta steps whose size is a number of the data."""
    rate = pyro.sample("rate", dist.LogNormal(real(0.0), 0.3))
    step, x, path = float(ts[1] - ts[0]), rate.new_tensor(0.1), []
    for _ in range(len(ts)):
        first = rate * x * (1.0 - x)
        middle = x + 0.5 * step * first
        x = x + step * rate * middle * (1.0 - middle)
        path.append(x)
    pyro.sample("y", dist.Normal(torch.stack(path), 0.1).to_event(1), obs=y)


def sequential(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    for i in pyro.plate("rows", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(a * x[i], 1.0), obs=y[i])


def latents_in_a_loop(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    for i in pyro.plate("rows", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(a * x[i], 0.5))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def filled(x, y):
    """A list written as a tensor: what is read is multiplied by a latent, so autograd needs it as it was."""
    phi = pyro.sample("phi", dist.Uniform(real(-1.0), 1.0))
    mean = torch.zeros(len(y), dtype=y.dtype)
    mean[0] = phi
    for t in range(1, len(y)):
        mean[t] = phi * mean[t - 1] + 0.1 * float(x[t])
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def imputed(x, y):
    """Copies of data, with latents in some places; and arithmetic in place."""
    a = pyro.sample("a", dist.Normal(real(0.0, 0.0), 1.0).to_event(1))
    full = y.clone()
    full[3:5] = a
    rest = x - 1.0
    rest[x > 0.0] = a[0]
    rest *= a[1]
    covariance = torch.eye(2, dtype=y.dtype)
    covariance.view(-1)[::3] += a.exp()
    factor = torch.linalg.cholesky(covariance)
    pyro.sample("full", dist.Normal(rest, 1.0).to_event(1), obs=0.0 * full.detach() + y)
    pyro.factor("sums", -(full.square().sum()) - factor.sum())


def process(x, y):
    """A Gaussian process that is built in the model; its modules draw random numbers as they are made."""
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.variance = PyroSample(dist.LogNormal(real(0.0), 1.0))
    kernel.lengthscale = PyroSample(dist.LogNormal(real(0.0), 1.0))
    gp.models.GPRegression(x, y, kernel, noise=real(0.1)).model()


MODELS = {
    "numbers": (numbers_of_data, (X, Y)),
    "growth": (growth, (torch.linspace(0.0, 2.0, 40, dtype=torch.float64), normal(40, seed=3))),
    "sequential": (sequential, (X, Y)),
    "latents in a loop": (latents_in_a_loop, (X[:4], Y[:4])),
    "filled": (filled, (X, Y)),
    "imputed": (imputed, (X, Y)),
    "process": (process, (X, Y)),
}


def alone(density: pf.LogDensity, z: Tensor, *, plain: bool) -> tuple[Tensor, Tensor]:
    """Values, and gradients by central differences, each point by itself."""
    if plain:
        density._writes = None
    step = 1e-5 * torch.eye(density.dim, dtype=z.dtype)
    with torch.no_grad():
        values = torch.stack([density.single(row) for row in z])
        slopes = [[(density.single(row + d) - density.single(row - d)) / 2e-5 for d in step] for row in z]
    return values, torch.tensor(slopes, dtype=z.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_batched_and_single_numbers_are_equal(name):
    model, args = MODELS[name]
    density = pf.LogDensity(model, args)
    assert density.batched
    z = 0.3 * normal(5, density.dim, seed=7)
    batched = density.unrecorded(z)
    for _ in range(RECORDED_FROM + 1):
        recorded = density.value_and_grad(z)
    assert density.reason is None
    assert len(density._with_gradients.runners) == 1
    assert density.graph(z) is not None, "no part of a training step"
    for one, other in zip(recorded, batched, strict=True):
        close(one, other, 1e-9)
    moved = z + 0.1
    for one, other in zip(density.value_and_grad(moved), density.unrecorded(moved), strict=True):
        close(one, other, 1e-9)
    for one, other, tolerance in zip(batched, alone(density, z, plain=True), (1e-9, 1e-5), strict=True):
        close(one, other, tolerance)


# ---- the tape --------------------------------------------------------------------------------------------------------


def test_data_are_constants_and_latents_are_not():
    data = normal(6, seed=5)

    def function(x: Tensor) -> Tensor:
        return x * float(data.exp().sum()) + data.tanh().exp()

    module = record(function, normal(6, seed=6))
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    assert len(called) == 2
    other = normal(6, seed=7)
    close(module(other), function(other), 1e-12)
    with pytest.raises(RuntimeError, match="taken out of a tensor"):
        record(lambda x: x * float(x.sum()), data)


def test_constants_that_change_later_keep_what_they_were():
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        held = torch.ones(3, dtype=x.dtype)
        before = x + held
        held.mul_(2.0)
        between = x + held
        held[1] = 5.0
        return before, between, x + held

    x = normal(3, seed=1)
    for one, other in zip(record(function, x)(x), function(x), strict=True):
        assert torch.equal(one, other)


# ---- fallbacks -------------------------------------------------------------------------------------------------------


def test_fallbacks_are_errors_in_the_tests_and_remarks_for_users(caplog):
    with pytest.raises(Fallback, match="not compiled: ValueError: no"):
        fallback("not compiled", ValueError("no"))
    with strict(False), caplog.at_level("DEBUG", logger="pyro_flows"):
        assert fallback("not compiled", ValueError("no.\nmore")) == "not compiled: ValueError: no"
    assert "not compiled" in caplog.text


def number_of_a_latent(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    pyro.sample("y", dist.Normal(a, math.exp(a.item())), obs=y)


def branch(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    if a > 0:
        pyro.factor("positive", a)


def numpy_of_a_latent(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    pyro.factor("f", torch.as_tensor(np.tanh(a.detach().numpy())))


OUTSIDE = torch.zeros(3, dtype=torch.float64)


def writes_outside(x, y):
    a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
    OUTSIDE[1] = a.detach()
    pyro.factor("f", gauss(a, OUTSIDE.sum(), 1.0))


@pytest.mark.falls_back
@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (number_of_a_latent, "keep it a tensor"),
        (branch, r"torch\.where"),
        (numpy_of_a_latent, "torch functions"),
        (writes_outside, r"torch\.stack"),
    ],
)
def test_what_cannot_be_batched_says_what_it_costs_and_what_to_change(model, remedy, caplog):
    with caplog.at_level("WARNING", logger="pyro_flows"):
        density = pf.LogDensity(model, (X, Y))
    assert not density.batched
    assert "draw by draw" in density.reason
    assert "40 times" in density.reason
    assert [record.message for record in caplog.records] == [density.reason]
    with strict(), pytest.raises(Fallback, match="draw by draw"):
        pf.LogDensity(model, (X, Y))

    assert re.search(remedy, density.reason)


def test_numbers_from_a_generator_of_the_model_are_constants():
    """Generated code has no name for a generator; what is drawn with one is the same at each run."""

    def model(y):
        a = pyro.sample("a", dist.Normal(real(0.0), 1.0))
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(len(y), generator=generator, dtype=y.dtype)
        noise += torch.empty_like(y).uniform_(generator=generator)
        pyro.sample("y", dist.Normal(a * noise, 1.0).to_event(1), obs=y)

    density = pf.LogDensity(model, (Y,))
    z = normal(5, 1, seed=4)
    for _ in range(RECORDED_FROM + 1):
        recorded = density.value_and_grad(z)
    assert density.reason is None
    for one, other in zip(recorded, density.unrecorded(z), strict=True):
        close(one, other, 1e-9)


def test_a_generator_that_draws_from_inputs_is_refused():
    generator = torch.Generator()
    with pytest.raises(RuntimeError, match=r"drawn with a torch\.Generator from what depends on the latents"):
        record(lambda p: (torch.bernoulli(p, generator=generator),), torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_small_constants_of_any_strides_are_compared(dtype):
    """A vector of one number may have a stride of 0; a conjugate has its numbers elsewhere."""

    def function(x):
        one = torch.ones((), dtype=dtype).clone()
        alike = (one.expand(1), one.expand(1, 1)[0], one.clone()[None], one.clone()[None].conj(), torch.empty(0, 3))
        return tuple(torch.where(x > 0.0, part.sum(), 0 * part.sum()) for part in alike) + tuple(
            torch.where(x[:1] > 0.0, part, part) for part in alike[:4]
        )

    x = torch.tensor([0.5, -1.0])
    for found, expected in zip(record(function, x)(-x), function(-x), strict=True):
        assert torch.equal(found, expected)
