"""The stopwatch of density steps: what it times is a step of training, ours and the bare loop's."""

import math

import pytest
import torch

import pyro_flows as pf
from benchmarks.density import speed as density_speed


def test_the_bare_loop_is_the_same_model(monkeypatch):
    """Its loss at the start is that of our NICE with the same weights and scales: additive layers, one scaling."""
    torch.manual_seed(0)
    data = torch.randint(256, (50, 6), dtype=torch.uint8)
    seen = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: seen.append(float(loss.detach())))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: seen.append(self.param_groups[0]["params"]))
    density_speed.bare_nice(data, 4000, (8,))()
    loss, parameters = seen
    flow = pf.nice(6, layers=4, hidden=(8,), activation="relu", mask="alternating", base="logistic")
    for layer, number in zip(reversed(flow.bijection.layers[1:]), range(4), strict=True):
        layer.conditioner.load_state_dict(
            dict(zip(layer.conditioner.state_dict(), parameters[4 * number : 4 * number + 4], strict=True))
        )
    y = (data[torch.randint(50, (4000,))] + torch.rand(4000, 6)) / 256.0
    ours = -float((flow.log_prob((y - 0.13) / 0.3) - 6 * math.log(0.3)).mean().detach())
    assert loss == pytest.approx(ours, abs=0.1)
