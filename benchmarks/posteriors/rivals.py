"""Pyro's own guides, trained by Pyro's own SVI, on the same posteriors, with as many gradients as our fit took.

Each is trained at three learning rates, and the one with the best ELBO counts, by its own seconds.

A guide gets the posterior as one site ``z``, the unconstrained vector, under the log density of
:class:`pyro_flows.LogDensity`. On the models as they are written, Pyro's guides could not start where a prior is
improper, would get a fixed support where it depends on a latent, and could not vectorize particles. The density's
recorded graph serves them as it serves ours. Everything is float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import (
    ComposeTransformModule,
    Permute,
    affine_autoregressive,
    affine_coupling,
    iterated,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, init_to_value
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuide
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

import pyro_flows
from pyro_flows import AutoFlow, LogDensity, Posterior

COUPLINGS = 8
AUTOREGRESSIVE = 3  # transforms of AutoIAFNormal
HIDDEN = (32, 32)
PARTICLES = 64  # as many as the draws of a step of ours
RATES = (0.003, 0.02, 0.1)  # of Adam
GRADIENTS_AT_MOST = 400_000

Model = Callable[..., None]
Rival = Callable[[Model, Tensor], AutoGuide]


def couplings(dim: int, layers: int = COUPLINGS) -> ComposeTransformModule:
    """Return Pyro's affine couplings with a flip of the coordinates between each two of them.

    Without the flips, the first half of the coordinates would never be transformed.
    """
    flip = torch.arange(dim - 1, -1, -1)
    parts: list[Any] = []
    for _ in range(layers):
        parts += [affine_coupling(dim, list(HIDDEN)), Permute(flip)]
    return ComposeTransformModule(parts[:-1])


def _normal(model: Model, start: Tensor) -> AutoGuide:
    return AutoNormal(model, init_loc_fn=init_to_value(values={"z": start}))


def _multivariate(model: Model, start: Tensor) -> AutoGuide:
    return AutoMultivariateNormal(model, init_loc_fn=init_to_value(values={"z": start}))


class _Flow(AutoNormalizingFlow):
    """Pyro's guide, which passes no init function on, with one. So does its subclass AutoIAFNormal."""

    def __init__(self, model: Model, start: Tensor) -> None:
        AutoContinuous.__init__(self, model, init_loc_fn=init_to_value(values={"z": start}))
        self._init_transform_fn = couplings
        self.transform = None
        self._prototype_tensor = torch.zeros_like(start[0])


def _autoregressive(model: Model, start: Tensor) -> AutoGuide:
    guide = _Flow(model, start)
    guide._init_transform_fn = partial(iterated, AUTOREGRESSIVE, affine_autoregressive, hidden_dims=list(HIDDEN))
    return guide


RIVALS: dict[str, Rival] = {
    "AutoNormal": _normal,
    "AutoMultivariateNormal": _multivariate,
    "AutoNormalizingFlow": _Flow,
    "AutoIAFNormal": _autoregressive,
}


class _Score(torch.autograd.Function):
    """The log density with the gradient that was computed along with it, both 0 for draws where either is not finite.

    That is kinder than Pyro's SVI, which would go on with NaN in all parameters. Nobody reads the loss.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, density: LogDensity) -> Tensor:
        value, gradient = density.value_and_grad(z)
        good = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        ctx.save_for_backward(torch.where(good[:, None], gradient, 0.0))
        return torch.where(good, value, 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, None


def _vector(density: LogDensity, score: Callable[[Tensor], Tensor]) -> Model:
    """Return the model of one improper vector ``z`` under ``score``."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (density.dim,)))
        pyro.factor("posterior", score(z))

    return model


@contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(rival: Rival, model: Model, args: tuple[Any, ...], *, gradients: int, seed: int, draws: int) -> Posterior:
    """Train one rival at each of `RATES`, judge by :func:`pyro_flows.diagnose`, and return that of the best ELBO.

    Args:
        rival: which one.
        model: the Pyro model.
        args: its arguments.
        gradients: how many our fit took, and each training gets.
        seed: of the training and of the draws.
        draws: how many.
    """
    density = LogDensity(model, args)
    start_guide = AutoFlow(model, "nice", layers=1).initialize(*args)
    assert start_guide.affine is not None
    start = start_guide.affine.loc.detach().double()
    steps = max(1, min(gradients, GRADIENTS_AT_MOST) // PARTICLES)
    tried = [_trained(rival, density, start, rate, steps, seed, draws) for rate in RATES]
    return max(tried, key=lambda found: -math.inf if math.isnan(found.elbo) else found.elbo)


def _trained(
    rival: Rival, density: LogDensity, start: Tensor, rate: float, steps: int, seed: int, draws: int
) -> Posterior:
    """Train a rival at one learning rate, which its settings tell, with its seconds."""

    def score(z: Tensor) -> Tensor:
        return _Score.apply(z.reshape(-1, density.dim), density).reshape(z.shape[:-1])

    began = time.monotonic()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with _double():
        guide = rival(_vector(density, score), start)
        elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(guide.model, guide, Adam({"lr": rate}), elbo)
        for _ in range(steps):
            svi.step()
        found = pyro_flows.diagnose(_vector(density, density.single), guide, draws=draws, seed=seed)
    about = {"gradient_evaluations": steps * PARTICLES, "steps": steps, "rate": rate}
    found.settings.update(about, seconds=time.monotonic() - began)
    pyro.clear_param_store()
    return found
