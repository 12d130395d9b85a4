"""The benchmark of densities: plans, resuming, our run and the humble rivals, its table."""

import io
import math
import subprocess

import numpy as np
import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.density import emoji
from benchmarks.density import peers as density_peers
from benchmarks.density import problems as density_problems
from benchmarks.density import running as density


@pytest.fixture
def small(monkeypatch):
    """A problem of little data, under the name of moons."""
    problem = density_problems.toy("moons")

    def make(seed):
        return density.Split(*(part[:800] for part in problem.make(seed)))

    fast = density.Problem(make, 0.3, layers=2, spline_layers=2, hidden=(8,), entropy=problem.entropy)
    monkeypatch.setitem(density.PROBLEMS, "moons", fast)
    return fast


def test_a_plan_holds_each_run_once():
    runs = density.plan(["moons", "mnist"], [density.OURS, "Pyro", density.GAUSSIAN], [0, 1])
    assert len(runs) == len(set(runs)) == 2 * ((3 + 2 + 1) + (2 + 1 + 1))
    assert ("moons", "Pyro", "additive", 0) not in runs
    assert ("moons", density.GAUSSIAN, "", 1) in runs
    images = density.plan(["emoji"], [density.OURS, "zuko", "normflows"], [0])
    assert [run[1:3] for run in images] == [(density.OURS, "multiscale"), (density.OURS, "glow"), ("normflows", "glow")]
    assert len(density.plan(["moons"], [density.OURS, density.GAUSSIAN], [0], ["affine"])) == 2


def test_toys_of_different_parts_and_seeds_share_no_points():
    splits = [density_problems.toy("moons").make(seed) for seed in (0, 1)]
    first = {tuple(point) for split in splits for part in split for point in part[:50].tolist()}
    assert len(first) == 6 * 50


@pytest.mark.parametrize(
    "kind", ["affine", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("additive", "spline"))]
)
def test_our_run_stays_below_the_entropy(small, kind):
    found = density.run(small, density.OURS, kind, 0, 1.5)
    assert -4.0 < found["test"] < -small.entropy + 4 * found["error"]
    assert found["steps"] > 0
    assert found["dim"] == 2
    assert found["log"][-1] == (found["log"][-1][0], found["last"])
    assert found["best"] == max(value for _, value in found["log"])


def test_a_run_on_images_and_its_fit(tmp_path):
    values = torch.randint(4, (300, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = density.Split(values[:200], values[200:250], values[250:])
    options = {"levels": 2, "layers": 1, "hidden": (4,), "alpha": 0.01}
    problem = density.Problem(lambda seed: split, 1.0, levels=4, kinds=("glow",), images={"glow": options})
    found = density.run(problem, density.OURS, "glow", 0, 1.0, tmp_path / "fit")
    assert -9.0 < found["test"] < 0.5  # at most 0, but for chance: the data are uniform
    assert found["dim"] == 16
    fit = pf.DensityFit.load(tmp_path / "fit")
    assert fit.flow.recipe.builder == "glow"
    assert fit.nats(values[250:]) == pytest.approx(found["test"], abs=0.5)


def test_quantized_data_are_scored_in_the_unit_cube(monkeypatch):
    values = torch.randint(4, (400, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = density.Split(values[:200], values[200:300], values[300:])
    problem = density.Problem(lambda seed: split, 0.5, layers=2, hidden=(8,), levels=4)
    score = density.run(problem, density.OURS, "affine", 0, 0.5)["test"]
    assert -0.8 < score < 0.1  # the uniform density on the cube, which these data have, scores 0


def test_the_recipe_of_the_peers_learns():
    torch.manual_seed(0)
    log_scale = torch.nn.Parameter(torch.zeros(2))
    data = 0.5 * torch.randn(1000, 2)

    def log_prob(y):
        return torch.distributions.Normal(0.0, log_scale.exp()).log_prob(y).sum(-1)

    steps = density_peers.train(
        ([log_scale], log_prob), lambda places: data[places], data, points=1000, batch=100, seconds=0.5
    )
    off = (log_scale.detach() - math.log(0.5)).abs().max()
    # the time allowed gives more steps on an idle machine; each moves by at most the step size
    assert steps > 10
    assert off < max(math.log(2.0) - 0.25 * density_peers.LEARNING_RATE * steps, 0.1)


def test_a_failed_run_leaves_no_row_and_says_why(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nOSError: set the folder")
    monkeypatch.setattr(records.subprocess, "run", lambda *_, **__: failed)
    density.bench(["mnist"], [density.OURS], [0], out=tmp_path / "density.csv")
    assert "OSError: set the folder" in capsys.readouterr().out
    assert records.read(tmp_path / "density.csv") == []


def test_absent_peers_are_left_out_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(density.importlib.util, "find_spec", lambda name: None if name == "zuko" else object())
    assert density.installed(["zuko", density.OURS]) == [density.OURS]
    assert "zuko: left out, since zuko is not installed." in capsys.readouterr().out


def test_emoji_are_rendered_from_bitmaps(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    contents = []
    for color in ((255, 0, 0, 255), (255, 0, 0, 255), (0, 0, 255, 0)):
        stream = io.BytesIO()
        image.new("RGBA", (136, 128), color).save(stream, "PNG")
        contents.append(stream.getvalue())
    monkeypatch.setattr(emoji, "bitmaps", lambda font: iter(contents))
    emoji.main(["any.ttf", str(tmp_path / "emoji.npy")])
    images = np.load(tmp_path / "emoji.npy")
    assert images.shape == (2, 3, 32, 32)  # the double is left out
    assert images[0, :, 16, 16].tolist() == [255, 0, 0]
    assert (images[1] == 255).all()  # transparent on white
