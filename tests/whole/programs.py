"""A grammar of Pyro models for hypothesis, and the log density of each by Pyro's own trace.

A program is a list of statements: latents, factors, deterministic values and observations, each in plates of its own,
perhaps under a mask or a scale. Parameters are bounded functions of latents that came before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

MASKS = ["no", "no", "no", "some", "all"]
SIZES = {"outer": (2, -2), "inner": (3, -1), "data": (5, -1)}  # of plates, with their dimensions
FRAMES = [(), ("outer",), ("inner",), ("outer", "inner")]
SEEN = [("data",), ("outer", "data")]  # plates of observations


def real(*numbers: float) -> Tensor:
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.float64)


# Each has a parameter e in (-1, 1), of the shape of the plates. A vector's first coordinate is what others depend on.
FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda e: dist.Normal(e, 1.3),
    "t": lambda e: dist.StudentT(4.0, e, 1.0),
    "logistic": lambda e: dist.Logistic(e, 0.7),
    "log-normal": lambda e: dist.LogNormal(e, 0.5),
    "gamma": lambda e: dist.Gamma(2.0 + e, 1.5),
    "half-Cauchy": lambda e: dist.HalfCauchy(1.5 + e),
    "exponential": lambda e: dist.Exponential(1.5 + e),
    "beta": lambda e: dist.Beta(2.0 + e, 1.5),
    "uniform": lambda e: dist.Uniform(e - 2.0, e + 2.0),
    "Pareto": lambda e: dist.Pareto(1.5 + e, 3.0),
    "von Mises": lambda e: dist.VonMises(e, 2.0),
    "Dirichlet": lambda e: dist.Dirichlet(torch.stack([2.0 + e, 1.5 - e, 2.0 + 0.0 * e], -1)),
    "vector": lambda e: dist.Normal(e[..., None] + real(-1.0, 0.0, 2.0), real(0.3, 1.0, 2.0)).to_event(1),
    "multivariate normal": lambda e: dist.MultivariateNormal(
        e[..., None] * real(1.0, -1.0), real(2.0, 0.5, 0.5, 1.0).reshape(2, 2)
    ),
}
ALONE: dict[str, Callable[[Tensor], Any]] = {
    "LKJ": lambda e: dist.LKJCholesky(3, 1.5 + e),
    "flat, positive": lambda e: dist.ImproperUniform(constraints.positive, (), ()),
    "flat": lambda e: dist.ImproperUniform(constraints.real, (), ()),
}  # these stand in no plate
LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda e: dist.Normal(e, 0.7),
    "t": lambda e: dist.StudentT(5.0, e, 0.5),
    "Poisson": lambda e: dist.Poisson((1.0 + e).exp()),
    "Bernoulli": lambda e: dist.Bernoulli(logits=2.0 * e),
    "categorical": lambda e: dist.Categorical(logits=torch.stack([e, -e, 0.5 * e], -1)),
}
BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sine": lambda x: 0.9 * torch.sin(x),
    "bell": lambda x: 0.9 * torch.exp(-(x**2)),
    "ratio": lambda x: x / (1.0 + x**2),
}


@dataclass(frozen=True)
class Statement:
    """One line of a program: ``kind`` is latent, factor, deterministic or observed."""

    kind: str
    name: str
    frame: tuple[str, ...]
    family: str = ""
    parents: tuple[str, ...] = ()
    bend: str = "tanh"
    masked: str = "no"  # all: the site's terms do not count; some: those of every second element
    scaled: float = 1.0
    way: str = "whole"  # of an observation: whole or missing (obs_mask)


@dataclass(frozen=True)
class Program:
    """A model: call it with data (2, 5) for its observations; of these it sees ``rows`` columns, a random subsample."""

    statements: tuple[Statement, ...]
    rows: int = SIZES["data"][0]

    def __call__(self, y: Tensor) -> None:
        made: dict[str, Tensor] = {}
        plates = {name: pyro.plate(name, size, dim=dim) for name, (size, dim) in SIZES.items() if name != "data"}
        plates["data"] = pyro.plate("data", SIZES["data"][0], subsample_size=self.rows, dim=SIZES["data"][1])
        y = y[:, plates["data"].indices]
        for one in self.statements:
            shape = torch.Size([*shape_of(one.frame)[:-1], self.rows]) if "data" in one.frame else shape_of(one.frame)
            parameter = torch.zeros(shape, dtype=y.dtype)
            for parent in one.parents:
                parameter = parameter + made[parent] / len(one.parents)
            parameter = 0.95 * BENDS[one.bend](parameter)
            with ExitStack() as stack:
                for name in one.frame:
                    stack.enter_context(plates[name])
                if one.masked != "no":
                    each = torch.arange(shape.numel()).reshape(shape) % 2 == 0
                    stack.enter_context(poutine.mask(mask=each if one.masked == "some" else torch.tensor(False)))
                if one.scaled != 1.0:
                    stack.enter_context(poutine.scale(scale=one.scaled))
                found = _run(one, parameter, y if "outer" in one.frame else y[0])
            if found is not None:
                made[one.name] = found


def shape_of(frame: tuple[str, ...]) -> torch.Size:
    """Return the shape of what stands in these plates."""
    dims = {SIZES[name][1]: SIZES[name][0] for name in frame}
    return torch.Size([dims.get(dim, 1) for dim in range(min(dims, default=0), 0)])


def _run(one: Statement, parameter: Tensor, y: Tensor) -> Tensor | None:
    if one.kind == "factor":
        pyro.factor(one.name, -0.5 * parameter**2)
        return None
    if one.kind == "deterministic":
        return pyro.deterministic(one.name, 2.0 * parameter)
    if one.kind == "latent":
        value = pyro.sample(one.name, {**FAMILIES, **ALONE}[one.family](parameter))
        return value[..., -1, 0] if one.family == "LKJ" else value[..., 0] if value.dim() > parameter.dim() else value
    observed = {"Poisson": y.abs().floor(), "Bernoulli": (y > 0).to(y), "categorical": (y.abs() % 3).floor()}
    given = observed.get(one.family, y)
    fn = LIKELIHOODS[one.family](parameter)
    if one.way == "missing":
        there = torch.arange(given.numel()).reshape(given.shape) % 3 != 1
        pyro.sample(one.name, fn, obs=torch.where(there, given, torch.zeros_like(given)), obs_mask=there)
    else:
        pyro.sample(one.name, fn, obs=given)
    return None


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of one to four latents, up to two other statements, and one or two observations."""
    made: list[Statement] = []
    kinds = ["latent"] * draw(st.integers(1, 4)) + draw(
        st.lists(st.sampled_from(["factor", "deterministic"]), max_size=2)
    )
    kinds = ["latent", *draw(st.permutations(kinds[1:])), *["observed"] * draw(st.integers(1, 2))]
    for number, kind in enumerate(kinds):
        frame = draw(st.sampled_from(SEEN if kind == "observed" else FRAMES))
        known = [one.name for one in made if one.kind in ("latent", "deterministic") and {*one.frame} <= {*frame}]
        parents = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
        families = LIKELIHOODS if kind == "observed" else FAMILIES if frame else {**FAMILIES, **ALONE}
        family = draw(st.sampled_from(sorted(families)))
        continuous = kind == "observed" and family in ("normal", "t")
        way = draw(st.sampled_from(["whole", "missing"])) if continuous else "whole"
        made.append(
            Statement(
                kind=kind,
                name=f"{kind[0]}{number}",
                frame=frame,
                family=family,
                parents=tuple(parents),
                bend=draw(st.sampled_from(sorted(BENDS))),
                masked=draw(st.sampled_from(MASKS)) if number and kind != "deterministic" else "no",
                scaled=draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])) if kind != "deterministic" else 1.0,
                way=way,
            )
        )
    return Program(tuple(made))


class _Placed(Messenger):
    """Give each latent its value by torch's own bijection from unconstrained numbers, and add up the log Jacobians."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.parts, self.ladj = parts, real(0.0)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.parts and not msg["is_observed"]:
            bend = biject_to(msg["fn"].support)
            unconstrained = self.parts[msg["name"]]
            msg["value"] = bend(unconstrained)
            msg["done"] = True
            self.ladj = self.ladj + bend.log_abs_det_jacobian(unconstrained, msg["value"]).sum()


def by_trace(model: Callable[..., Any], args: tuple[Any, ...], parts: dict[str, Tensor]) -> Tensor:
    """Return the log density of unconstrained values of all latents, by Pyro's trace and torch's bijections."""
    with _Placed(parts) as placed:
        trace = poutine.trace(model).get_trace(*args)
    return trace.log_prob_sum() + placed.ladj
