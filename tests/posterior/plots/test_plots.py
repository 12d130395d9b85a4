"""Figures: what is on them, robust ranges, errors; and that pyplot stays out of it."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.posterior.plots.parts import regions
from tests.posteriors import SCHOOLS, Y, any_posterior, schools, schools_posterior


@pytest.fixture(scope="module")
def ok():
    return schools_posterior("ok", draws=1000)


@pytest.fixture(scope="module")
def corrected():
    return schools_posterior("corrected", draws=1000)


def with_losses(posterior, losses):
    return type(posterior)(**{**vars(posterior), "losses": losses})


def texts(figure):
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


# ELBO -----------------------------------------------------------------------------------------------------------------


def test_elbo_range_is_not_ruled_by_the_first_steps(ok):
    generator = torch.Generator().manual_seed(0)
    losses = 15.2 + 0.1 * torch.randn(500, generator=generator) + 1e6 * torch.exp(-torch.arange(500.0))
    losses[0], losses[7] = torch.inf, torch.nan
    figure = plots.plot_elbo(with_losses(ok, losses))
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert -17 < low < -15.4
    assert -15.0 < high < -14
    assert axes.get_xlabel() == "optimization step"
    assert axes.get_ylabel() == "ELBO (nats)"
    steps, median, _ = axes.lines
    assert len(steps.get_xdata()) == len(median.get_xdata()) == 500
    late = median.get_ydata()[100:]
    assert np.abs(late + 15.2).max() < 0.1  # smoothed: the steps scatter by .3
    assert {"guide: ok", f"final {ok.elbo:.2f}"} <= set(texts(figure))


@pytest.mark.parametrize("losses", [[1.0], [3.0, 3.0], [float("nan")] * 3, [float("inf"), 2.0, 1.0]])
def test_elbo_of_short_and_broken_runs(ok, losses, tmp_path):
    plots.plot_elbo(with_losses(ok, torch.tensor(losses))).savefig(tmp_path / "elbo.png")
    assert (tmp_path / "elbo.png").stat().st_size > 5000


def test_elbo_of_an_unreliable_fit_has_no_final_line():
    posterior = with_losses(schools_posterior("unreliable", draws=500), torch.linspace(50.0, 40.0, 60))
    _, median = plots.plot_elbo(posterior).axes[0].lines
    assert median.get_label() == "running median"


def test_elbo_needs_steps(ok):
    with pytest.raises(
        ValueError, match=r"expected one with optimization steps, got none \(diagnose does not optimize\)"
    ):
        plots.plot_elbo(ok)


# marginals ------------------------------------------------------------------------------------------------------------


def test_one_panel_for_each_scalar(ok):
    figure = plots.plot_posterior(ok)
    named = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert named == [f"{name}[{i}]" for name in ("theta", "double") for i in range(SCHOOLS)]
    assert "Posterior marginals · guide: ok" in texts(figure)


def test_histogram_interval_and_mean(ok):
    values = ok.samples["theta"][:, 2].numpy()
    axes = plots.plot_posterior(ok, "theta").axes[2]
    bar, dot = axes.lines
    np.testing.assert_allclose(bar.get_xdata(), np.quantile(values, [0.055, 0.945]))
    assert dot.get_xdata()[0] == pytest.approx(values.mean(), rel=1e-5)
    heights = axes.patches[-1].get_data().values
    edges = axes.patches[-1].get_data().edges
    inside = np.mean((values >= edges[0]) & (values <= edges[-1]))
    assert (heights * np.diff(edges)).sum() == pytest.approx(inside)


def test_many_scalars_are_capped_with_a_note(ok):
    figure = plots.plot_posterior(ok, max_panels=5)
    assert "Posterior marginals · 5 of 16 scalars · guide: ok" in texts(figure)
    assert sum(bool(axes.get_title(loc="left")) for axes in figure.axes) == 5


def test_constant_broken_and_matrix_valued_sites(tmp_path):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        pyro.deterministic("fixed", torch.tensor(3.5))
        pyro.deterministic("broken", x.sum() * torch.nan)

    figure = plots.plot_posterior(any_posterior(model))
    found = texts(figure)
    assert {"x[0, 0]", "x[1, 1]", "= 3.5", "no finite draws"} <= set(found)
    figure.savefig(tmp_path / "posterior.png")


def test_marginals_of_unknown_sites(ok):
    with pytest.raises(
        ValueError, match=r"var_names: expected one of 'double', 'theta', got 'tehta'\. Did you mean 'theta'"
    ):
        plots.plot_posterior(ok, ["tehta"])


# pairs ----------------------------------------------------------------------------------------------------------------


def test_pairs_of_a_list_are_refused(ok):
    with pytest.raises(TypeError, match=r"names such as 'theta\[3\]', got a list\. Pass var_names="):
        plots.plot_pairs(ok, ["theta"])


def test_pairs_are_scattered_as_transformed(ok):
    figure = plots.plot_pairs(ok, "theta[0]", "double[1]", transform={"double": torch.exp})
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("theta[0]", "exp double[1]")
    (points,) = axes.lines
    np.testing.assert_allclose(points.get_xdata(), ok.samples["theta"][:, 0].numpy())
    np.testing.assert_allclose(points.get_ydata(), ok.samples["double"][:, 1].double().exp().numpy(), rtol=1e-5)
    assert {"theta[0] and exp double[1]", "guide: ok"} <= set(texts(figure))
    assert not figure.legends


def test_what_is_compared_are_raw_draws(ok, corrected):
    """The regions of a guide that is off lie where its own draws lie, not where resampling moves them."""
    far = pf.diagnose(schools, lambda y: pyro.sample("theta", dist.Normal(y * 0 + 5.0, 0.5).to_event(1)), Y, draws=500)
    figure = plots.plot_pairs(corrected, "theta[0]", "theta[1]", compare=far, labels=("ours", "theirs"))
    assert {"ours (corrected): all draws, 50 % and 90 %", "theirs (unreliable): 50 % and 90 % of its draws"} <= set(
        texts(figure)
    )
    (axes,) = figure.axes
    assert axes.get_xlim()[1] > 5.5
    assert axes.get_ylim()[0] < 1.0
    own = plots.plot_pairs(ok, "theta[0]", "theta[1]", compare=corrected)
    ours, regions = (found for found in own.axes[0].collections if not found.get_facecolor().size)
    assert tuple(ours.get_edgecolor()[0]) != tuple(regions.get_edgecolor()[0])
    inner = regions.get_paths()[-1].vertices
    raw = corrected.z[:, 0].double().numpy()
    assert inner[:, 0].mean() == pytest.approx(np.median(raw), abs=0.25 * raw.std())


@pytest.mark.parametrize("width", [3.7, 4.6, 5.4])
def test_legends_of_pairs_stay_inside(ok, corrected, width):
    """Long names are wrapped."""
    names = {"flow": ok, "full-rank Gaussian guide of Pyro's": corrected}
    figure = plots.plot_pairs(names, "theta[0]", "theta[1]", width=width)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    assert "full-rank Gaussian" in figure.legends[0].get_texts()[1].get_text()


def test_regions_hold_their_share():
    from matplotlib.figure import Figure
    from matplotlib.path import Path

    points = np.random.default_rng(0).normal(size=(20000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    axes = Figure().add_subplot()
    axes.set_xlim(-5, 5)
    axes.set_ylim(-5, 5)
    regions(axes, points)
    lines = axes.collections[-1].get_paths()
    shares = [Path(line.vertices).contains_points(points).mean() for line in lines]
    assert shares == pytest.approx([0.9, 0.5], abs=0.04)


def test_scalars_that_are_none(ok):
    with pytest.raises(
        ValueError, match=r"'theta': expected one scalar; site 'theta' has shape \(8,\), so 'theta\[0\]', say"
    ):
        plots.plot_pairs(ok, "theta", "double[0]")
    with pytest.raises(ValueError, match=r"'theta\[9\]': expected one scalar"):
        plots.plot_pairs(ok, "theta[9]", "double[0]")
    with pytest.raises(ValueError, match=r"var_names: expected one of 'double', 'theta', got 'eta'"):
        plots.plot_pairs(ok, "eta", "double[0]")


def test_figures_are_files_without_pyplot(ok, tmp_path):
    before = set(sys.modules)
    figures = {"posterior": plots.plot_posterior(ok), "pairs": plots.plot_pairs(ok, "theta[0]", "theta[1]")}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_the_elbo_of_a_fit_that_needed_no_steps():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)

    posterior = pf.fit(model, torch.tensor([1.0, 2.0, 3.0]), progress=False, draws=500)
    assert len(posterior.losses) == 0
    (axes,) = plots.plot_elbo(posterior).axes
    (final,) = axes.lines
    assert final.get_ydata()[0] == pytest.approx(posterior.elbo)
    assert "nothing had to be trained" in axes.get_title(loc="left") + axes.get_title()
