"""One method of one case of ``speed.py``, in a process of its own: repeat a step for as long as each line asks."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

HIDDEN = (32, 32)
LEARNING_RATE = 1e-3
Step = Callable[[], object]


def student(dim: int) -> Any:
    """``theta ~ normal(0, I), y_i ~ student_t(5; theta_i + theta_{i-1} / 2, 0.5)``, i cyclic, in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    y = torch.linspace(-1.0, 1.0, dim)

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.StudentT(5.0, theta + 0.5 * theta.roll(1, -1), 0.5).to_event(1), obs=y)

    return model


def schools(_: int) -> Any:
    """Rubin's eight schools, non-centered, in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", 8):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)

    return model


def regression(rows: int) -> Any:
    """A linear regression with four slopes and an unknown scale, in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    y = x.sum(-1) + torch.randn(rows, generator=generator)

    def model() -> None:
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(slopes @ x.T, scale), obs=y)

    return model


MODELS = {"student": student, "eight schools": schools, "regression": regression, "products alone": schools}


def ours(case: dict[str, Any], method: str) -> Step:
    """A training step of ours on couplings alone, or on the guide that ``fit`` makes."""
    import pyro_flows as pf
    from pyro_flows.inference.training import trainer as training

    model = MODELS[case["case"]](case["rows"] or case["dim"])
    density = pf.LogDensity(model)
    if method == "recorded, the guide of fit":
        flow = pf.AutoRealNVP(model, layers=case["layers"], hidden=HIDDEN, df=15.0).initialize().flow
    else:
        flow = pf.realnvp(case["dim"], layers=case["layers"], hidden=HIDDEN, base="normal")
    if method == "products":
        return products(flow, case["batch"])
    trainer = training.Trainer(flow, density, learning_rate=LEARNING_RATE, batch=case["batch"])
    trainer._recordable = method != "eager"
    return lambda: trainer.step(LEARNING_RATE)


def gradient(case: dict[str, Any], method: str) -> Step:
    """The gradient of the ELBO by autograd, with or without the term that has mean zero; the model's is recorded."""
    import torch

    import pyro_flows as pf
    from pyro_flows.inference.training.objectives import path

    density = pf.LogDensity(schools(0))
    flow = getattr(pf, case["case"])(case["dim"], layers=case["layers"], base="normal")
    parameters = list(flow.parameters())

    def plain() -> torch.Tensor:
        z, log_q = flow.rsample_and_log_prob((case["batch"],))
        _, score = density.value_and_grad(z)
        return log_q.mean() - (score * z).sum() / case["batch"]

    def step() -> None:
        loss = path(flow, density, case["batch"]).loss if method == "path gradient" else plain()
        torch.autograd.grad(loss, parameters)

    return step


def products(flow: Any, batch: int) -> Step:
    """The matrix products of a step alone: each layer's three times, forward, with the score and back, and weights'.

    Products of few columns are computed as products of few rows, which is faster.
    """
    import torch

    from pyro_flows.model.graphs.bindings import NARROW

    weights = [part.detach() for part in flow.parameters() if part.dim() == 2]
    inputs = [torch.randn(batch, weight.shape[1]) for weight in weights]
    outputs = [torch.randn(batch, weight.shape[0]) for weight in weights]

    def product(first: torch.Tensor, second: torch.Tensor) -> None:
        if second.shape[1] <= NARROW < len(first):
            torch.mm(second.t(), first.t())
        else:
            torch.mm(first, second)

    def step() -> None:
        with torch.inference_mode():
            for weight, x, y in zip(weights, inputs, outputs, strict=True):
                product(x, weight.t())
                product(y, weight)
                product(y, weight)
                product(y.t(), x)

    return step


def in_pyro(case: dict[str, Any], method: str) -> Step:
    """A step of Pyro's SVI with its own flow guide, or with zuko's flow."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormalizingFlow
    from pyro.optim import Adam  # type: ignore[attr-defined]

    from benchmarks.posteriors.rivals import couplings

    model, dim, layers = MODELS[case["case"]](case["dim"]), case["dim"], case["layers"]
    if method == "Pyro":
        guide = AutoNormalizingFlow(model, lambda dim: couplings(dim, layers))
    else:
        guide = zuko_guide(model, dim, layers)
    elbo = Trace_ELBO(num_particles=case["batch"], vectorize_particles=True, max_plate_nesting=1)
    inference = SVI(model, guide, Adam({"lr": LEARNING_RATE}), elbo)
    pyro.set_rng_seed(0)
    return lambda: inference.step()


def zuko_guide(model: Any, dim: int, layers: int) -> Any:
    """zuko's couplings as Pyro's own documentation puts them into a guide."""
    import pyro
    import zuko
    from pyro.contrib.zuko import ZukoToPyro
    from pyro.infer.autoguide import AutoContinuous

    class Guide(AutoContinuous):
        def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
            super()._setup_prototype(*args, **kwargs)
            self.flow = zuko.flows.RealNVP(dim, transforms=layers, hidden_features=HIDDEN)

        def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
            pyro.module("flow", self.flow)
            return ZukoToPyro(self.flow())

    return Guide(model)


def in_numpyro(case: dict[str, Any], _: str) -> Step:
    """A jitted step of NumPyro's SVI with inverse autoregressive flows of the same number and widths."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoIAFNormal

    dim = case["dim"]
    y = jnp.linspace(-1.0, 1.0, dim)
    effects = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model() -> None:
        if case["case"] == "student":
            theta = numpyro.sample("theta", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
            numpyro.sample("y", dist.StudentT(5.0, theta + 0.5 * jnp.roll(theta, 1), 0.5).to_event(1), obs=y)
            return
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        raw = numpyro.sample("raw", dist.Normal(jnp.zeros(8), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(mu + tau * raw, sigma).to_event(1), obs=effects)

    guide = AutoIAFNormal(model, num_flows=case["layers"], hidden_dims=list(HIDDEN))
    inference = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO(num_particles=case["batch"]))
    state = [inference.init(jax.random.PRNGKey(0))]
    update = jax.jit(inference.update)

    def step() -> None:
        state[0], loss = update(state[0])
        loss.block_until_ready()

    return step


def bare(case: dict[str, Any], method: str) -> Step:
    """Sample and score, or score, without gradients."""
    import torch

    dim, batch, layers = case["dim"], case["batch"], case["layers"]
    y = torch.randn(batch, dim)
    if method.startswith("ours"):
        import pyro_flows as pf

        flow = pf.realnvp(dim, layers=layers, hidden=HIDDEN, activation="relu", base="normal")  # as the others have it
        draw: Step = lambda: flow.rsample_and_log_prob((batch,))  # noqa: E731
        score: Step = lambda: flow.log_prob(y)  # noqa: E731
        if method == "ours, compiled":
            draw, score = torch.compile(draw), torch.compile(score)
    else:
        draw, score = peer(method, dim, layers, batch, y)
    run = draw if case["case"] == "sample and score" else score

    def step() -> None:
        with torch.no_grad():
            run()

    return step


def peer(method: str, dim: int, layers: int, batch: int, y: Any) -> tuple[Step, Step]:
    """A peer's couplings of the same number and widths: to sample and score, and to score."""

    import torch
    from torch import nn

    if method == "zuko":
        import zuko

        flow = zuko.flows.RealNVP(dim, transforms=layers, hidden_features=HIDDEN)
        return lambda: flow().rsample_and_log_prob((batch,)), lambda: flow().log_prob(y)
    if method == "nflows":
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow
        from nflows.nn.nets import ResidualNet
        from nflows.transforms import base, coupling
        from nflows.utils.torchutils import create_alternating_binary_mask

        def net(inputs: int, outputs: int) -> nn.Module:
            return ResidualNet(inputs, outputs, hidden_features=HIDDEN[0], num_blocks=1)

        masks = [create_alternating_binary_mask(dim, even=layer % 2 == 0) for layer in range(layers)]
        stack = base.CompositeTransform([coupling.AffineCouplingTransform(mask, net) for mask in masks])
        other = Flow(stack, StandardNormal([dim]))
        return lambda: other.sample_and_log_prob(batch), lambda: other.log_prob(y)
    if method == "normflows":
        import normflows as nf

        parts = []
        for layer in range(layers):
            mask = (torch.arange(dim) % 2 == layer % 2).float()
            nets = [nf.nets.MLP([dim, *HIDDEN, dim], init_zeros=True) for _ in range(2)]
            parts.append(nf.flows.MaskedAffineFlow(mask, *nets))
        normal = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), parts)
        return lambda: normal.sample(batch), lambda: normal.log_prob(y)
    import pyro.distributions as dist

    from benchmarks.posteriors.rivals import couplings

    transformed = dist.TransformedDistribution(
        dist.Normal(torch.zeros(dim), 1.0).to_event(1), list(couplings(dim, layers).parts)
    )

    def scored() -> Any:
        transformed.clear_cache()
        return transformed.log_prob(y)

    def drawn() -> Any:
        transformed.clear_cache()
        return transformed.log_prob(transformed.rsample((batch,)))  # from the cache, as in SVI

    return drawn, scored


def build(case: dict[str, Any], method: str) -> Step:
    """Return the step of a method."""
    if method == "NumPyro":
        return in_numpyro(case, method)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    if case["part"] in ("flows", "gradients"):
        return (bare if case["part"] == "flows" else gradient)(case, method)
    return in_pyro(case, method) if method in ("Pyro", "zuko in Pyro") else ours(case, method)


def main() -> None:
    """Build, warm up, and obey: each line on standard input is the seconds of a turn."""
    began = time.perf_counter()
    step = build(json.loads(sys.argv[1]), sys.argv[2])
    for _ in range(20):
        step()
    print(json.dumps({"setup_seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            step()
            count += 1
        milliseconds = 1e3 * (time.perf_counter() - began) / count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
        print(json.dumps({"milliseconds": milliseconds, "megabytes": peak}), flush=True)


if __name__ == "__main__":
    main()
