"""Figures of flows and images: what is on them, errors; and that pyplot stays out of it."""

import numpy as np
import pytest
import torch

import pyro_flows as pf
from pyro_flows import datasets, plots


def image(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_layers_are_drawn_one_by_one_from_the_base_to_the_density():
    flow = pf.planar(2, layers=4)
    figure = plots.plot_layers(flow, count=200)
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == ["base", "layer 1", "layer 2", "layer 3", "layer 4"]
    first, last = (axes.collections[0].get_offsets() for axes in (drawn[0], drawn[-1]))
    assert np.allclose(flow.bijection(torch.tensor(np.asarray(first)).float()).detach(), last, atol=1e-5)
    some = plots.plot_layers(pf.planar(2, layers=32), count=50)
    assert len(some.axes) == 12
    assert some.axes[-1].get_title() == "layer 32"
    assert len(plots.plot_layers(pf.Flow(pf.transforms.Planar(2), base="uniform"), layers=[1]).axes) == 1
    with pytest.raises(ValueError, match="from 0 to 4"):
        plots.plot_layers(flow, layers=[5])
    with pytest.raises(ValueError, match="two dimensions or more and no context"):
        plots.plot_layers(pf.planar(1))
    with pytest.raises(ValueError, match="x and y: expected numbers from 0 to 2, got 3"):
        plots.plot_layers(pf.planar(3), 0, 3)
    with pytest.raises(ValueError, match="x and y: expected numbers from 0 to 2, got 'mu'"):
        plots.plot_layers(pf.planar(3), "mu")


@pytest.mark.parametrize("shape", [(4, 9), (4, 3, 3), (4, 1, 3, 3), (4, 3, 3, 3)])
def test_images_of_all_shapes_stand_row_by_row(shape):
    images = torch.arange(4.0).reshape(4, *[1] * (len(shape) - 1)).expand(shape) / 4.0
    sheet = image(plots.plot_images(images))
    assert sheet.shape == (7, 7, 3)  # two by two images of three pixels with a white line between
    assert np.allclose(sheet[[0, 0, 4, 4], [0, 4, 0, 4], 0], [0.0, 0.25, 0.5, 0.75])
    assert np.allclose(sheet[3], 1.0)


def test_images_with_a_shape_and_without_one():
    sheet = image(plots.plot_images(torch.full((2, 6), 300.0), (2, 3), columns=1, levels=255.0))
    assert sheet.shape == (5, 3, 3)
    with pytest.raises(ValueError, match="no square"):
        plots.plot_images(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"expected \(N, H, W\)"):
        plots.plot_images(torch.zeros(2, 2, 3, 3))


def test_walks_neighbors_spectra_and_losses(tmp_path):
    flow, points = pf.nice(9), torch.rand(20, 9)
    walk = image(plots.plot_interpolation(flow, points[:4], steps=5))
    assert walk.shape == (19, 19, 3)
    corners = walk[[0, 0, -3, -3], [0, -3, 0, -3], 0]
    assert np.allclose(corners, points[:4, 0], atol=1e-5)
    near = image(plots.plot_nearest(points[:2], points, count=2))
    assert near.shape == (7, 11, 3)
    assert np.allclose(near[:3, :3], near[:3, 4:7])  # the nearest to a training image is itself
    values = plots.plot_spectrum(flow).axes[0].lines[0].get_ydata()
    assert np.allclose(values, 1.0)
    figure = plots.plot_losses(torch.tensor([3.0, 2.0, float("nan")]), torch.zeros(0, 2))
    figure.savefig(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="got none"):
        plots.plot_losses(torch.zeros(0), torch.zeros(0, 2))


def test_figures_of_a_fit():
    fit = pf.fit_density("nice", datasets.toy("moons", 200), max_epochs=30, progress=False)
    assert len(fit.plot_samples().axes) == 1
    lines = fit.plot_losses().axes[0].lines
    assert len(lines) == 2
    assert len(lines[1].get_xdata()) == len(fit.checks)
    assert len(plots.plot_points(fit.sample(10), torch.zeros(5, 2)).axes) == 2
    with pytest.raises(ValueError, match="expected shape"):
        plots.plot_points(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="as the data's"):
        plots.plot_points(torch.zeros(3, 2), torch.zeros(3, 1))
    table = pf.fit_density("nice", torch.rand(50, 4), max_epochs=2, progress=False)
    assert image(table.plot_samples(9, image_shape=(2, 2))).shape == (8, 8, 3)
    assert [axes.get_title() for axes in table.plot_samples().axes] == [f"column {place}" for place in range(4)]
    assert len(plots.plot_points(torch.randn(50, 1), torch.randn(50, 1)).axes) == 1
    digits = pf.fit_density("nice", torch.rand(50, 9), max_epochs=2, progress=False)
    assert image(digits.plot_samples(9)).shape == (11, 11, 3)
