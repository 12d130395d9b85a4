"""The gallery: each picture is drawn from a kept fit, and what is absent is left out with a sentence."""

import pytest
import torch

import pyro_flows as pf
from benchmarks.density import gallery
from benchmarks.density import problems as density_problems
from benchmarks.toys import planar
from pyro_flows.datasets import Split

QUICK = {"levels": 4, "max_epochs": 1, "validation": None, "learning_rate": 1e-3, "progress": False}


@pytest.fixture
def fits(tmp_path, monkeypatch):
    """NICE on small flat images under the name of MNIST; no other fits."""
    values = torch.randint(4, (240, 16), generator=torch.Generator().manual_seed(0))
    problem = density_problems.Problem(lambda seed: Split(values, values, values), 1.0, levels=4)
    monkeypatch.setitem(density_problems.PROBLEMS, "mnist", problem)
    monkeypatch.setitem(gallery.SHAPES, "mnist", (4, 4))
    trained = planar.train
    monkeypatch.setattr(planar, "train", lambda layers, base, seed: trained(layers, base, seed, steps=2))
    flow = pf.nice(16, layers=2, hidden=(8,), base="logistic")
    pf.fit_density(flow, values, **QUICK).save(tmp_path / "fits" / "mnist-additive-0-600.0")
    return tmp_path / "fits"


def test_pictures_of_what_is_there(fits, tmp_path, capsys):
    gallery.main(["--fits", str(fits), "--out", str(tmp_path / "images")])
    drawn = {path.stem for path in (tmp_path / "images").iterdir()}
    nice = {"nice-samples", "nice-nearest", "nice-spectrum", "nice-inpainting", "nice-walk"}
    assert drawn == {"planar-normal", "planar-uniform"} | nice
    told = capsys.readouterr().out
    assert "emoji-glow-walk: left out." in told
    assert "corners off by" in told


def test_one_picture_alone(fits, tmp_path):
    gallery.main(["--fits", str(fits), "--out", str(tmp_path / "images"), "--only", "nice-samples"])
    assert [path.stem for path in (tmp_path / "images").iterdir()] == ["nice-samples"]


def test_figures_of_walks(fits):
    text = gallery.walk_figures(pf.DensityFit.load(fits / "mnist-additive-0-600.0"), "mnist", walks=3)
    single, double = (float(word) for word in text.split() if "e-" in word)
    assert single < 1e-4
    assert double < 1e-9
