"""Figures of calibration and quantiles: what is on them, errors."""

import numpy as np
import pytest
import torch

from pyro_flows import plots


def test_uniform_transforms_stay_inside_the_band():
    u = (torch.arange(400) + 0.5) / 400
    axes = plots.plot_pit(u).axes[0]
    line = axes.lines[-1].get_ydata()
    assert np.abs(line).max() < 0.01
    narrow = plots.plot_pit(0.5 + 0.5 * (u - 0.5)).axes[0].lines[-1].get_ydata()
    assert narrow.min() < -0.2
    assert narrow.max() > 0.2
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert 0.03 < band.max() < 0.08


def test_each_coordinate_has_a_panel():
    figure = plots.plot_pit(torch.rand(50, 4, generator=torch.Generator().manual_seed(0)), names=list("abcd"))
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == list("abcd")
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        plots.plot_pit(torch.tensor([0.2, 1.2]))


def test_quantiles_are_bands_in_the_order_of_x():
    x = torch.tensor([2.0, 0.0, 1.0])
    quantiles = torch.stack([x - 1.0, x, x + 1.0], 1)
    figure = plots.plot_quantiles(x, quantiles[..., None], [0.1, 0.5, 0.9], y=x, name="age")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "age"
    assert axes.lines[-1].get_xydata().tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert len(axes.collections) == 1
    with pytest.raises(ValueError, match="rising levels"):
        plots.plot_quantiles(x, quantiles, [0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"expected shape \(3, 2\)"):
        plots.plot_quantiles(x, quantiles, [0.1, 0.9])
    with pytest.raises(ValueError, match="one output for each of 3"):
        plots.plot_quantiles(x, quantiles, [0.1, 0.5, 0.9], y=torch.zeros(2))
