"""Free labels: a mixture of three normals whose components may change places, six modes of equal mass."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

WEIGHTS, PLACES, SDS = (0.3, 0.4, 0.3), (-4.0, 0.5, 4.0), (0.8, 1.0, 0.6)


def labels(y: Tensor) -> None:
    """Weights, places and scales of three normals, with the same priors for all three."""
    one = torch.ones_like(y[:3])
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * one))
    places = pyro.sample("places", dist.Normal(0.0 * one, 5.0).to_event(1))
    sds = pyro.sample("sds", dist.LogNormal(0.0 * one, 0.5).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(places, sds)), obs=y)


def data(rows: int = 150) -> Tensor:
    """Simulated rows."""
    rng = np.random.default_rng(3)
    which = rng.choice(3, rows, p=WEIGHTS)
    return torch.as_tensor(np.asarray(PLACES)[which] + np.asarray(SDS)[which] * rng.standard_normal(rows))


def orders(places: Tensor) -> Tensor:
    """The order (S, 6) of the three places that each draw has."""
    order = places.argsort(1)
    known = torch.tensor([*itertools.permutations(range(3))], device=order.device)
    return (order[:, None] == known).all(-1)
