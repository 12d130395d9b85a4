"""Pyro's own guides, trained by Pyro's own SVI, on the same posteriors.

A guide gets the posterior as one site ``z``, the unconstrained vector, under the log density of
:class:`pyro_flows.LogDensity`. On the models as they are written, Pyro's guides could not start where a prior is
improper, would get a fixed support where it depends on a latent, and could not vectorize particles. The density's
recorded graph serves them as it serves ours. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import ComposeTransformModule, Permute, affine_coupling
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, init_to_value
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuide
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

import pyro_flows
from pyro_flows import AutoFlow, LogDensity, Posterior

COUPLINGS = 8
HIDDEN = (32, 32)
PARTICLES = 64  # of the rival with an equal number of gradients
GRADIENTS_AT_MOST = 400_000  # of the same

Model = Callable[..., None]


@dataclass(frozen=True)
class Rival:
    """A guide and how it is trained; without ``steps``, for as many gradients as our fit took."""

    make: Callable[[Model, Tensor], AutoGuide]
    learning_rate: float = 0.01
    steps: int | None = 2000
    particles: int = 1


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
    """Pyro's guide, which passes no init function on, with one."""

    def __init__(self, model: Model, start: Tensor) -> None:
        AutoContinuous.__init__(self, model, init_loc_fn=init_to_value(values={"z": start}))
        self._init_transform_fn = couplings
        self.transform = None
        self._prototype_tensor = torch.zeros_like(start[0])


RIVALS: dict[str, Rival] = {
    "AutoNormal": Rival(_normal),
    "AutoMultivariateNormal": Rival(_multivariate),
    "AutoNormalizingFlow": Rival(_Flow),
    "AutoNormalizingFlow, equal gradients": Rival(_Flow, learning_rate=5e-3, steps=None, particles=PARTICLES),
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
    """Train one rival and judge it by :func:`pyro_flows.diagnose`.

    Args:
        rival: which one.
        model: the Pyro model.
        args: its arguments.
        gradients: how many our fit took.
        seed: of the training and of the draws.
        draws: how many.
    """
    density = LogDensity(model, args)
    start_guide = AutoFlow(model, "nice", layers=1).initialize(*args)
    assert start_guide.affine is not None
    start = start_guide.affine.loc.detach().double()
    steps = rival.steps or max(1, min(gradients, GRADIENTS_AT_MOST) // rival.particles)

    def score(z: Tensor) -> Tensor:
        return _Score.apply(z.reshape(-1, density.dim), density).reshape(z.shape[:-1])

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with _double():
        guide = rival.make(_vector(density, score), start)
        many = rival.particles > 1
        elbo = Trace_ELBO(num_particles=rival.particles, vectorize_particles=many, max_plate_nesting=0)
        svi = SVI(guide.model, guide, Adam({"lr": rival.learning_rate}), elbo)
        for _ in range(steps):
            svi.step()
        found = pyro_flows.diagnose(_vector(density, density.single), guide, draws=draws, seed=seed)
    found.settings.update(gradient_evaluations=steps * rival.particles, steps=steps)
    pyro.clear_param_store()
    return found
