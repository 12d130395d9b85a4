"""Pictures and the table of flows: one small row, its section, and what the commands write."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.gallery import flows, pictures, reference
from benchmarks.gallery.entries import ENTRIES, Entry, faithful

REFERENCE = Path(__file__).parent.parent.parent / "docs" / "reference"
Y = torch.tensor([0.3, 1.2, -0.4, 0.9], dtype=torch.float64)


def pair(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 5.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros_like(y[0]), 0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def entry(reference=None):
    return Entry(pair, (Y,), ("mu", "sigma"), {"sigma": torch.log}, reference)


@pytest.mark.slow
def test_a_row_and_its_table(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draws = {"mu": 0.5 + 0.4 * torch.randn(500, generator=generator), "sigma": torch.rand(500, generator=generator)}
    monkeypatch.setitem(ENTRIES, "small", lambda root: entry(draws))
    page, file = tmp_path / "page.md", tmp_path / "flows.csv"
    page.write_text("Before.\n<!-- flows: begin -->\n<!-- flows: end -->\nAfter.\n")
    options = ["--only", "small", "--flows", "planar", "--out", str(file), "--page", str(page)]
    flows.main(options)
    (row,) = records.read(file)
    assert not row["error"]
    assert row["status"] in ("ok", "corrected", "unreliable")
    assert math.isfinite(float(row["mean_error"]))
    text = page.read_text()
    assert text.startswith("Before.\n<!-- flows: begin -->\n\nOne round of each flow")
    assert f"| small | 2 | planar | {row['status']} |" in text
    flows.main(options)
    assert len(records.read(file)) == 1  # a row of the same version is not done again


def test_errors_are_those_of_the_worst_coordinate():
    found = SimpleNamespace(samples={"mu": torch.tensor([[0.0, 3.0], [2.0, 5.0]]), "tau": torch.tensor([1.0, 3.0])})
    reference = {"mu": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "tau": torch.tensor([0.0, 4.0])}
    mean, sd = flows.errors(entry(reference), found)
    assert mean == pytest.approx(2.0 / 2.0**0.5)
    assert sd == pytest.approx(math.log(2.0))
    assert all(math.isnan(value) for value in flows.errors(entry(), found))


def test_pictures_of_tails_and_of_moons():
    assert len(pictures.tails().axes) == 2
    found = {name: (torch.zeros(3, 2), -1.0) for name in pictures.MOONS}
    assert [axes.get_title() for axes in pictures._moons(found).axes] == [f"{name}: -1.000 nats" for name in found]


def test_a_grid_after_each_transform():
    figure = reference.transforms()
    assert [axes.get_title() for axes in figure.axes] == list(reference.LAYERS)
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for name, make in reference.LAYERS.items():
        layer = make()
        assert type(layer).__name__ == name
        moved = layer(points)
        assert not torch.allclose(moved, points, atol=0.1)
        assert torch.allclose(layer.inv(moved), points, atol=1e-4)


def test_pages_of_reference_show_each_figure_and_small_pictures_with_words():
    text = (REFERENCE / "figures.md").read_text(encoding="utf-8")
    names = {name for name in vars(pf.plots) if name.startswith("plot_")}
    assert names == set(re.findall(r"autofunction:: (plot_\w+)", text))
    shown = []
    for path in REFERENCE.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"!\[[^\]]{20,}\]\((\S+)\)|\.\. image:: (\S+)\n +:alt: .{20,}", text)
        assert len(found) == text.count("../images/"), path
        shown += [path.parent / (one or two) for one, two in found]
    assert {f"{name}.png" for name in reference.PICTURES} <= {path.name for path in shown}
    assert all(path.stat().st_size < 60_000 for path in shown)


def test_the_mixture_of_waiting_times_does_not_name_its_parts():
    minutes = torch.tensor([50.0, 80.0, 55.0, 82.0], dtype=torch.float64)
    values = {"share": 0.3, "loc": [55.0, 80.0], "scale": [6.0, 7.0]}
    swapped = {"share": 0.7, "loc": [80.0, 55.0], "scale": [7.0, 6.0]}
    scores = []
    for one in (values, swapped):
        fixed = {name: torch.tensor(value, dtype=torch.float64) for name, value in one.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(faithful, data=fixed)).get_trace(minutes)
        scores.append(float(trace.log_prob_sum()))
    assert scores[0] == pytest.approx(scores[1])
