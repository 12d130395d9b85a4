"""Places that chains seem to lack, and modes that are too many."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting.combine import MAX_COPIES
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import Sampler
from pyro_flows.inference.chains.starts import affine_flow, can_be_resumed, mixes_with_others
from pyro_flows.inference.modes.symmetries import group
from pyro_flows.model.dims import coordinate_names


def test_chains_join_others_only_if_nothing_is_between():
    def two(apart):
        def one():
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
            near = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(x)
            far = dist.Normal(torch.tensor([apart, 0.0]), 1.0).to_event(1).log_prob(x)
            pyro.factor("two", torch.logaddexp(near, far))

        return pf.LogDensity(one)

    for apart, together in ((1.0, True), (14.0, False)):
        density = two(apart)
        z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).to(density.dtype)
        names = coordinate_names(density.structure)
        with torch.no_grad():
            given = {"chains": 64, "kept": 64, "seed": 0, "independence": 0}
            sampler = Sampler.begin(Latent(affine_flow(z, torch.zeros(len(z))), density), names, z[:8], **given)
            sampler.run(300)
        assert mixes_with_others(sampler, torch.tensor([[apart, 0.0], [apart, 0.5]]).to(z)) == together


def test_too_many_equal_modes():
    def swap(first, second, dim=8):
        order = list(range(dim))
        order[first], order[second] = second, first
        return tuple(order), (1.0,) * dim

    assert group([], MAX_COPIES) == []
    assert len(group([swap(0, 1), swap(1, 2)], MAX_COPIES)) == 6
    assert group([swap(k, k + 1) for k in range(7)], MAX_COPIES) is None  # 8! = 40,320
    assert MAX_COPIES < 40_320


@pytest.mark.parametrize(("numbers", "resumed"), [({"kernel": {}}, True), ({}, False)])
def test_chains_of_another_sampler_are_not_gone_on_with(numbers, resumed):
    assert can_be_resumed(pf.McmcDraws(torch.zeros(8, 10, 2), {}, {}, numbers)) == resumed
