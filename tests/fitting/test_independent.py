"""Independent coordinates are looked for before inference."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.verdict.methods import INDEPENDENT, TRAINED

REAL = torch.float64
PLACES = torch.tensor([-14.0, -3.0, 9.0], dtype=REAL)
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=REAL)
NOISE = 6.0


def model(y):
    with pyro.plate("rows", len(y)):
        kinds = dist.Categorical(SHARES)
        x = pyro.sample("x", dist.MixtureSameFamily(kinds, dist.Normal(PLACES, 1.0)))
        pyro.sample("y", dist.Normal(x, NOISE), obs=y)


def test_many_independent_coordinates_of_several_modes_are_tabulated():
    """A flow was trained, at one mode of some coordinates, and whether the search found another was chance."""
    y = torch.linspace(-16.0, 12.0, 40, dtype=REAL)
    found = pf.fit(model, y, progress=False)
    assert found.method == INDEPENDENT
    assert found.verdict.status != "unreliable"
    assert found.settings["gradient_evaluations"] < 60_000
    grid = torch.linspace(-30.0, 30.0, 20_001, dtype=REAL)[:, None]
    prior = torch.logsumexp(SHARES.log() + dist.Normal(PLACES, 1.0).log_prob(grid[..., None]), -1)
    weight = torch.softmax(prior + dist.Normal(grid, NOISE).log_prob(y), 0)
    mean = (weight * grid).sum(0)
    sd = (weight * (grid - mean).square()).sum(0).sqrt()
    x = found.samples["x"]
    assert float(((x.mean(0) - mean) / sd).abs().max()) < 0.1
    assert float((x.std(0) / sd).log().abs().max()) < 0.08


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_whoever_asks_for_a_flow_gets_one():
    def skewed():
        pyro.sample("z", dist.Gamma(torch.full((3,), 0.5, dtype=REAL), 1.0).to_event(1))

    assert pf.fit(skewed, progress=False, draws=1000).method == INDEPENDENT
    assert pf.fit(skewed, flow="realnvp", refine=False, progress=False, draws=1000).method == TRAINED


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_a_table_of_one_mode_gets_a_run_at_another(seed):
    """Nor did chains have to visit the second mode, since a normal at its top held next to none of its mass."""
    dim, share = 16, 0.036

    def model():
        z = torch.stack(
            [pyro.sample(f"z{number}", dist.Normal(PLACES.new_tensor(0.0), 10.0)) for number in range(dim)], -1
        )
        funnel = dist.Normal(6.0, (0.5 * (z[..., :1] - 9.0)).exp()).log_prob(z[..., 1:]).sum(-1)
        second = dist.Normal(9.0, 1.0).log_prob(z[..., 0]) + funnel
        both = torch.logaddexp(math.log(1.0 - share) + normal(1.0, z), math.log(share) + second)
        pyro.factor("both", both - normal(10.0, z))

    found = pf.fit(model, seed=seed, progress=False)
    assert found.verdict.status != "unreliable"
    # of 4000 draws, .003 is a standard error
    assert float((found.samples["z0"] > 4.5).double().mean()) == pytest.approx(share, abs=0.012)


def normal(sd, z):
    return dist.Normal(0.0, sd).log_prob(z).sum(-1)
