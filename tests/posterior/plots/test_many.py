"""Figures of several posteriors, of several kinds of draws, of weights and replicates; chosen as in ArviZ."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.posterior.plots import parts
from pyro_flows.support.figures import COLORS, STYLE, WIDTH
from tests.posteriors import SPREAD, Y, schools, schools_chains, schools_flow, schools_posterior

NAMES = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "$1 to $2"]


@pytest.fixture(scope="module")
def ok():
    return schools_posterior("ok", draws=1000).assign_coords({"school": NAMES})


@pytest.fixture(scope="module")
def chains():
    generator = torch.Generator().manual_seed(0)
    draws = {"theta": 0.8 * Y + SPREAD * torch.randn(4, 500, 8, generator=generator)}
    return pf.from_mcmc(draws, schools, Y).assign_coords({"school": NAMES})


@pytest.fixture(scope="module")
def refined():
    found = schools_chains()
    assert found.verdict.status == "refined"
    return found


def texts(figure):
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


# chosen as in ArviZ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"var_names": "theta", "coords": {"school": ["Choate", "Exeter"]}}, ["theta[Choate]", "theta[Exeter]"]),
        ({"var_names": ["~double"], "coords": {"school": "Exeter"}}, ["theta[Exeter]"]),
        ({"var_names": "th", "filter_vars": "like", "coords": {"school": "Exeter"}}, ["theta[Exeter]"]),
        ({"var_names": "^d.*e$", "filter_vars": "regex", "coords": {"school": "Exeter"}}, ["double[Exeter]"]),
    ],
)
def test_variables_and_labels(ok, chosen, expected):
    assert titles(plots.plot_posterior(ok, **chosen)) == expected


def test_what_is_not_there_is_named(ok):
    with pytest.raises(ValueError, match=r"coords\['school'\]: expected labels among 'Choate', .*, got 'Choat'"):
        plots.plot_posterior(ok, coords={"school": ["Choat"]})
    with pytest.raises(ValueError, match="coords, dimensions of sites: expected one of 'school', got 'scool'"):
        plots.plot_posterior(ok, coords={"scool": ["Choate"]})
    with pytest.raises(ValueError, match=r"var_names: expected some of .*, but 'zzz' leaves none"):
        plots.plot_posterior(ok, "zzz", filter_vars="like")
    with pytest.raises(ValueError, match="filter_vars: expected one of"):
        plots.plot_posterior(ok, "theta", filter_vars="glob")
    with pytest.raises(ValueError, match="expected a Posterior, or several by name"):
        plots.plot_posterior({"a": ok, "b": 3})


def test_a_label_with_dollars_is_no_formula(ok, tmp_path):
    figure = plots.plot_posterior(ok, "theta")
    assert r"theta[\$1 to \$2]" in titles(figure)
    figure.savefig(tmp_path / "figure.svg")
    plots.plot_forest(ok).savefig(tmp_path / "forest.svg")
    plots.plot_pairs(ok, "theta[$1 to $2]", "theta[Choate]").savefig(tmp_path / "pairs.svg")
    for name in ("figure", "forest", "pairs"):
        assert "$1 to $2]" in (tmp_path / f"{name}.svg").read_text()


# several posteriors ---------------------------------------------------------------------------------------------------


def test_marginals_over_each_other(ok, chains):
    figure = plots.plot_posterior({"guide": ok, "NUTS": chains}, "theta", coords={"school": ["Exeter"]})
    (axes,) = figure.axes
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(outlines) == 2
    assert outlines[0].get_linestyle() != outlines[1].get_linestyle()  # not by color alone
    for patch, posterior in zip(outlines, (ok, chains), strict=True):
        values, edges, _ = patch.get_data()
        middle = (values * (edges[1:] + edges[:-1]) / 2).sum() / values.sum()
        assert middle == pytest.approx(float(posterior.samples["theta"][:, 3].mean()), abs=0.05)
    assert {"guide (ok)", f"NUTS ({chains.verdict.status})"} <= set(texts(figure))
    with pytest.raises(ValueError, match="have no scalar in common"):
        plots.plot_posterior({"a": ok, "b": other_model()})


def other_model():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("o", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return pf.diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 0.7)), draws=200)


def test_pairs_of_many_make_a_triangle(ok, chains):
    figure = plots.plot_pairs(ok, var_names="theta", max_scalars=4)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 10
    assert "Pairs · 4 of 8 scalars · guide: ok" in texts(figure)
    cloud = next(
        axes for axes in shown if axes.lines and "Choate" in axes.get_xlabel() and "Exeter" in axes.get_ylabel()
    )
    np.testing.assert_allclose(cloud.lines[0].get_ydata(), ok.samples["theta"][:, 3].numpy())
    both = plots.plot_pairs({"guide": ok, "NUTS": chains}, "theta[0]", "theta[1]", "theta[2]")
    assert len([axes for axes in both.axes if axes.get_visible()]) == 6
    assert {"guide", "NUTS"} <= set(texts(both))
    with pytest.raises(ValueError, match="expected two scalars or more, got"):
        plots.plot_pairs(ok, "theta[0]")


@pytest.mark.slow
def test_a_forest_shows_what_a_correction_changed(refined):
    figure = plots.plot_forest(refined, "theta", draws="all")
    assert {"raw: guide", "corrected: importance-resampled", "refined: Markov chains"} <= set(texts(figure))
    (axes,) = figure.axes
    thick = [line for line in axes.lines if line.get_linewidth() == 3.0]
    assert len(thick) == 3 * 8
    widths = np.array([np.ptp(line.get_xdata()) for line in thick]).reshape(8, 3)
    assert (widths[:, 0] < 0.5 * widths[:, 2]).all()  # the guide was far too narrow
    exact = 2 * 0.6745 * SPREAD
    np.testing.assert_allclose(widths[:, 2], exact, rtol=0.15)
    alone = [line for line in plots.plot_forest(refined, "theta").axes[0].lines if line.get_linewidth() == 3.0]
    used = np.quantile(refined.samples["theta"].numpy(), [0.25, 0.75], axis=0).T
    np.testing.assert_allclose([line.get_xdata() for line in alone], used, rtol=1e-5)
    with pytest.raises(ValueError, match="'all' shows those of one"):
        plots.plot_forest({"a": refined, "b": refined}, draws="all")
    plain = schools_posterior("ok", draws=200)
    assert (
        len(
            [
                line
                for line in plots.plot_forest(plain, "theta", draws="all").axes[0].lines
                if line.get_linewidth() == 3.0
            ]
        )
        == 8
    )


def test_the_prior_behind_the_posterior(ok):
    figure = plots.plot_prior_posterior(ok, "theta", coords={"school": ["Choate"]})
    (axes,) = figure.axes
    prior = axes.patches[-1]
    values, edges, _ = prior.get_data()
    inside = math.erf(edges[-1] / 2 / math.sqrt(2)) / 2 - math.erf(edges[0] / 2 / math.sqrt(2)) / 2  # N(0, 2)
    assert (values * np.diff(edges)).sum() == pytest.approx(inside, abs=0.04)
    assert {"prior", "posterior"} <= set(texts(figure))

    def improper():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    posterior = pf.diagnose(improper, lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), draws=200)
    with pytest.raises(ValueError, match="its prior cannot be drawn from"):
        plots.plot_prior_posterior(posterior)


# weights, steps, replicates, layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7.0, 3.7])
def test_weights_and_the_tail_that_k_hat_is_of(width):
    posterior = schools_posterior("corrected", draws=1000)
    figure = plots.plot_weights(posterior, width=width)
    k_hat = psis(posterior.log_p - posterior.log_q)[1]
    assert (
        f"k-hat of these 1000 draws {k_hat:.2f}\nthe verdict's {posterior.verdict.k_hat:.2f}, threshold 0.70"
        in texts(figure)
    )
    draws, fitted = figure.axes[1].lines[:2]
    x, share = fitted.get_data()
    assert share[0] == pytest.approx(int(3 * math.sqrt(1000)) / 1000)
    weights, shares = draws.get_data()
    body = (weights > x[0]) & (shares > 5e-3)
    np.testing.assert_allclose(np.interp(weights[body], x, share), shares[body], rtol=0.35)


def test_weights_without_a_tail_and_without_any(chains):
    posterior = schools_posterior("ok", draws=200)  # the guide is exact: equal weights
    assert any("no tail to fit" in text for text in texts(plots.plot_weights(posterior)))
    with pytest.raises(ValueError, match="chains have no weights"):
        plots.plot_weights(chains)


def test_data_within_their_replicates(ok):
    figure = plots.plot_predictive(ok)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "y"
    data = axes.lines[0]
    jumps = data.get_xdata()[np.diff(data.get_ydata(), prepend=0.0) > 0]
    np.testing.assert_allclose(jumps, np.sort(Y.numpy()), atol=0.15)  # of a grid of values
    wide = axes.collections[0].get_paths()[0].vertices
    assert wide[:, 1].min() >= 0.0
    assert wide[:, 1].max() <= 1.0


def test_layers_end_at_the_draws():
    posterior = pf.diagnose(schools, schools_flow(), Y, draws=500)
    figure = plots.plot_layers(posterior, "theta[2]", "theta[5]", count=4000)
    last = np.asarray(figure.axes[len([a for a in figure.axes if a.get_visible()]) - 1].collections[0].get_offsets())
    drawn = posterior.z[:, [2, 5]].numpy()
    np.testing.assert_allclose(last.mean(0), drawn.mean(0), atol=0.15)
    np.testing.assert_allclose(last.std(0), drawn.std(0), rtol=0.15)
    with pytest.raises(ValueError, match="x and y: expected one of"):
        plots.plot_layers(posterior, "theta", "theta[5]")
    with pytest.raises(ValueError, match="expected one with a flow, got none: the guide"):
        plots.plot_layers(schools_posterior("ok", draws=200))


# style ----------------------------------------------------------------------------------------------------------------


def test_one_style_that_leaves_others_alone(ok):
    import matplotlib

    before = dict(matplotlib.rcParams)
    axes = plots.plot_posterior(ok, "theta").axes[0]
    assert dict(matplotlib.rcParams) == before
    assert not axes.spines["top"].get_visible()
    style = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    assert style["axes.prop_cycle"].by_key()["color"] == list(COLORS)


@pytest.mark.parametrize("ground", ["#ffffff", "#1d2126"])
def test_colors_are_seen_on_light_and_dark(ground):
    def luminance(color):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in COLORS:
        dark, light = sorted((luminance(color), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 3.0, color  # WCAG 2.1, 1.4.11


@pytest.mark.parametrize("draw", ["plot_posterior", "plot_forest", "plot_predictive", "plot_prior_posterior"])
def test_narrow_figures_fit_a_phone(ok, draw):
    figure = getattr(plots, draw)(ok, width=3.7)
    assert figure.get_size_inches()[0] <= 3.7
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    assert renderer is not None or figure._get_renderer() is not None
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.x1


# counts ---------------------------------------------------------------------------------------------------------------


def counts_posterior():
    y = torch.tensor([0.0, 1, 0, 2, 3, 1, 0, 5])

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.deterministic("whole", (4 * rate).round())
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return pf.diagnose(model, lambda y: pyro.sample("rate", dist.Gamma(2.0 + y.sum(), 1.0 + len(y))), y, draws=500)


def test_counts_step_at_whole_numbers():
    posterior = counts_posterior()
    line = plots.plot_predictive(posterior).axes[0].lines[0]
    jumps = line.get_xdata()[np.diff(line.get_ydata(), prepend=0.0) > 0]
    assert jumps.tolist() == [0.0, 1.0, 2.0, 3.0, 5.0]
    edges = plots.plot_posterior(posterior, "whole").axes[0].patches[0].get_data().edges
    assert (np.diff(edges) == 1.0).all()
    assert (edges % 1.0 == 0.5).all()
    wide = parts.edges(0.0, 999.0, [np.arange(1000.0)], 45)
    assert len(wide) <= 45
    assert len(np.unique(np.histogram(np.arange(wide[0] + 0.5, wide[-1]), wide)[0])) == 1


def test_all_figures_have_one_width(ok):
    figures = [
        *(plots.plot_posterior(ok), plots.plot_posterior(ok, coords={"school": "Exeter"}), plots.plot_forest(ok)),
        *(plots.plot_pairs(ok, "theta[0]", "theta[1]"), plots.plot_pairs(ok, var_names="theta")),
        *(plots.plot_predictive(ok), plots.plot_prior_posterior(ok), plots.plot_layers(pf.planar(2, layers=3))),
        *(plots.plot_weights(ok), plots.plot_images(torch.rand(8, 4, 4)), plots.plot_points(torch.rand(9, 2))),
    ]
    assert {figure.get_figwidth() for figure in figures} == {WIDTH}
