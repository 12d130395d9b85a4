"""fit_density: what it finds, its options, resuming, saving, and what it refuses."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pyro_flows as pf
from pyro_flows import datasets
from pyro_flows.densities import fit_density, training
from pyro_flows.densities.ascent import RACED, Ascent
from pyro_flows.densities.files import FILES
from pyro_flows.densities.points import points_for
from pyro_flows.densities.standardizing import warn_dependent

QUICK = {"progress": False, "max_epochs": 4}


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(lambda: (torch.zeros(2), torch.zeros(3)), None)


def correlated(count, seed=0):
    """Gaussian data on two very different scales, and their exact entropy."""
    factor = torch.tensor([[1.0, 0.0], [900.0, 400.0]])
    y = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)) @ factor.T + torch.tensor([5.0, -3e3])
    return y, 1.0 + math.log(2 * math.pi) + math.log(400.0)


def weights(fit):
    return torch.cat([value.flatten() for value in fit.flow.state_dict().values() if value.is_floating_point()])


def test_reaches_the_entropy_of_data_on_very_different_scales():
    y, entropy = correlated(4000)
    fit = pf.fit_density(pf.realnvp(2, layers=2), y, max_epochs=25, progress=False)
    fresh, _ = correlated(4000, seed=1)
    # 3 standard errors: the standard deviation of log p is 1 for two Gaussian coordinates
    assert -entropy - 0.05 < fit.nats(fresh) < -entropy + 3 / math.sqrt(4000)
    draws = fit.sample(4000, seed=0)
    assert (draws.mean(0) - y.mean(0)).abs().div(y.std(0)).max() < 0.1
    assert (draws.std(0) / y.std(0)).log().abs().max() < 0.1


@pytest.mark.parametrize("kind", ["standardize", "whiten", None])
def test_the_density_counts_the_preprocessing(kind):
    y = datasets.toy("moons", 600)
    fit = pf.fit_density("realnvp", y, preprocess=kind, **QUICK)
    line = torch.linspace(-3.0, 4.0, 281)
    grid = torch.cartesian_prod(line, line)
    mass = fit.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(mass) - 1.0) < 0.02
    assert fit.settings["preprocess"] == kind
    x = fit.flow.bijection.inverse_and_ladj(y)[0]
    assert torch.allclose(fit.flow.bijection.forward_and_ladj(x)[0], y, atol=1e-4)


def test_one_seed_one_fit_and_the_globals_are_left_alone():
    y = datasets.toy("moons", 300)
    torch.manual_seed(7)
    flow = pf.nice(2)
    before, state = [p.clone() for p in flow.parameters()], torch.get_rng_state()
    first, second = (pf.fit_density(flow, y, seed=3, **QUICK) for _ in range(2))
    other = pf.fit_density(flow, y, seed=4, **QUICK)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    assert all(p.requires_grad for p in first.flow.parameters())


def test_conditional():
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(2, (3000, 1), generator=generator).float()
    y = torch.randn(3000, 2, generator=generator) * (0.2 + context) + 6.0 * context
    for kind in ("standardize", "whiten"):
        flow = pf.realnvp(2, layers=4, context_dim=1)
        fit = pf.fit_density(flow, y, context=context, preprocess=kind, max_epochs=15, progress=False)
        for c in (0.0, 1.0):
            draws = fit.sample(2000, torch.tensor([c]), seed=1)
            assert (draws.mean(0) - 6.0 * c).abs().max() < 0.15
            assert (draws.std(0) / (0.2 + c)).log().abs().max() < 0.15
        assert fit.log_prob(y[:5], context[:5]).shape == (5,)
        with pytest.raises(ValueError, match=r"context: expected one row or 3 rows, got shape \(2, 1\)"):
            fit.sample(3, context[:2])


def test_a_temperature_shrinks_what_is_drawn_of_the_base():
    fit = pf.fit_density("realnvp", datasets.toy("moons", 400), **QUICK)
    hot, cold = fit.sample(50, seed=1), fit.sample(50, temperature=0.5, seed=1)
    x, y = (fit.flow.bijection.inverse_and_ladj(draws)[0] for draws in (hot, cold))
    assert (0.5 * x - y).abs().max() < 1e-4
    assert torch.equal(hot, fit.sample(50, temperature=1.0, seed=1))
    with pytest.raises(ValueError, match="temperature: expected"):
        fit.sample(1, temperature=0.0)


@pytest.mark.parametrize("build", [pytest.param(pf.glow, marks=pytest.mark.slow), pf.multiscale_realnvp])
def test_far_images_cost_about_their_distance(build):
    """White images, three hundred standard deviations out; plain convolutions make 1e20 nats of them."""
    y = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    flow = build((1, 8, 8), hidden=(8, 8))
    flow.bijection.start_from(y[:200])
    fit = pf.fit_density(flow, y, max_epochs=5, progress=False)
    assert fit.validation > -64 * 1.5  # a Gaussian has 1.42 a pixel
    assert fit.log_prob(y[:20] + 300.0).min() > -10.0 * 64 * 300.0


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a hundredth of a second with each look."""
    ticks = itertools.count()
    monkeypatch.setitem(fit_density.CLOCKS, "cpu", lambda: 0.01 * next(ticks))


def test_steps_that_were_skipped_are_told():
    """A point whose density overflows, in one batch of ten, of every epoch."""
    y = datasets.toy("moons", 320)
    flow = pf.realnvp(2, layers=2)
    options = {"validation": None, "preprocess": None, "batch": 32, "learning_rate": 1e-3}
    fit = pf.fit_density(flow, y, max_epochs=2, progress=False, **options)
    assert fit.settings["skipped"] == 0
    assert "skipped" not in fit.summary()
    y[7] = 1e30
    with pytest.warns(UserWarning, match="2 of 20 steps were skipped"):
        fit = pf.fit_density(flow, y, max_epochs=2, progress=False, **options)
    assert "2 steps were skipped" in fit.summary()
    y[:] = 1e30
    with pytest.warns(UserWarning, match="10 of 10 steps were skipped"):
        pf.fit_density(flow, y, max_epochs=1, max_seconds=60.0, progress=False, **options)


def test_few_held_out_points_do_not_decide_a_race():
    """They are unlike the others, so that each step makes them less likely."""
    y = 3.0 + 0.1 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    flow = pf.Flow(pf.transforms.LowerTriangularAffine(1))
    ascent = Ascent(flow, points_for(flow, "data", y, None), [(torch.zeros(4, 1), None)], batch=32)
    start = ascent.validate()
    ascent.race(RACED, 40)
    assert ascent.state.learning_rate == 1e-2
    assert ascent.validate() < ascent.state.best == start
    assert ascent.validate(ascent.best_weights) == start


def test_weights_decay_by_how_much_can_be_learned_by_heart():
    """By parameters and epochs over points, unless it is given; scales of NICE do not decay, and move faster."""
    y, flow = datasets.toy("moons", 320), pf.nice(2)
    found = [pf.fit_density(flow, y, validation=None, max_epochs=n, progress=False) for n in (1, 2)]
    expected = 1e-4 * sum(parameter.numel() for parameter in flow.parameters()) / 320
    assert [fit.settings["weight_decay"] for fit in found] == pytest.approx([expected, 2 * expected])
    given = pf.fit_density(flow, y, validation=None, max_epochs=1, weight_decay=0.25, progress=False)
    assert given.settings["weight_decay"] == 0.25
    ascent = Ascent(flow, None, [], batch=32)
    ascent.state.weight_decay = 0.25
    ascent.fresh_moments()
    ascent.step(y, None, 1e-3)
    weights, scales = ascent.optimizer.param_groups
    assert (weights["weight_decay"], scales["weight_decay"]) == (0.25, 0.0)
    assert scales["lr"] == 5 * weights["lr"]
    assert [scale.shape for scale in scales["params"]] == [(2,)]


@pytest.mark.slow
def test_levels_and_bits_per_dim():
    """A fair coin a coordinate: log 2 nats each, so one bit a dimension, which no model beats but by chance."""
    y = torch.randint(2, (4000, 3), generator=torch.Generator().manual_seed(0))
    flow = pf.spline(3, layers=2, base="logistic", hidden=(16,))
    fit = pf.fit_density(flow, y, levels=2, max_epochs=15, progress=False)
    assert 0.999 < fit.bits_per_dim(y) < 1.12
    same = fit.bits_per_dim(y.to(torch.uint8))
    assert same == fit.bits_per_dim(y) == pytest.approx((math.log(2) - fit.nats(y) / 3) / math.log(2))
    assert fit.levels.count == 2
    draws = fit.sample(500, seed=0)
    assert float(((draws > 0) & (draws < 1)).float().mean()) > 0.9


def test_a_density_of_noisy_data_and_their_means():
    """Of a Gaussian the mean is known: what is left of a deviation is the share of its variance that is no noise."""
    y = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 3.0
    fit = pf.fit_density(pf.realnvp(2, layers=2), y, noise=0.4, start="identity", learning_rate=1e-9, **QUICK)
    variance = y.var(0)
    noisy = y + 0.4 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    expected = y.mean(0) + (noisy - y.mean(0)) * variance / (variance + 0.16)
    found = fit.denoise(noisy)
    assert torch.allclose(found, expected, atol=0.04)
    assert not found.requires_grad
    assert f"held out: {fit.validation:.4f} nats, with noise of 0.4" in fit.summary()
    assert (found - y).square().mean() < 0.7 * (noisy - y).square().mean()
    entropy = (2.0 * math.pi * math.e * (variance + 0.16)).log().mul(0.5).sum()
    assert fit.nats(y) == pytest.approx(-float(entropy), abs=0.05)
    assert fit.pit(y).std(0).mul(12.0**0.5).log().abs().max() < 0.05, "rows get the noise first"
    assert fit.sample(4000, seed=0).var(0).div(variance + 0.16).log().abs().max() < 0.15


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((torch.zeros(8, 2), torch.zeros(8)), r"context: expected shape \(N, 3\) from the loader, got \(4, 1\)"),
        ((torch.zeros(8, 5), torch.zeros(8, 3)), r"data: expected shape \(N, 2\) from the loader, got \(4, 5\)"),
        ((torch.zeros(8, 2), torch.full((8, 3), math.nan)), "context: batch 0 of the loader holds missing"),
        ((torch.zeros(0, 2), torch.zeros(0, 3)), "data: expected points, got a loader without any"),
        (None, "data: expected a loader with a length, got one of Endless; give it __len__"),
    ],
)
def test_what_a_loader_gives_is_checked(items, message):
    flow, points = pf.nice(2, context_dim=3), Endless() if items is None else TensorDataset(*items)
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, DataLoader(points, batch_size=4), validation=None, **QUICK)


def test_values_outside_of_the_unit_cube_are_told():
    flow = pf.glow((1, 4, 4), levels=1, layers=1, hidden=(4,), alpha=0.05)
    with pytest.raises(
        ValueError, match=r"y: expected values in the support .* got 7\. Move them into it, or pass levels="
    ):
        pf.fit_density(flow, torch.full((50, 1, 4, 4), 7, dtype=torch.uint8), **QUICK)


def test_numbers_and_labels_of_a_loader_are_columns():
    y, label = torch.randn(64), torch.randint(2, (64,))
    flow = pf.spline(1, layers=1, context_dim=1)
    loaded = pf.fit_density(flow, DataLoader(TensorDataset(y, label), batch_size=16), validation=None, **QUICK)
    columns = DataLoader(TensorDataset(y[:, None], label[:, None]), batch_size=16)
    assert torch.equal(loaded.losses, pf.fit_density(flow, columns, validation=None, **QUICK).losses)


def test_noise_and_levels_are_added_to_what_the_fit_sees():
    y = torch.randint(2, (3000, 2), generator=torch.Generator().manual_seed(0))
    fit = pf.fit_density("nice", y, levels=2, noise=2.0, **QUICK)
    assert fit.flow.bijection.layers[-1].scale.sub(math.sqrt(4.0 + 1.0 / 12.0)).abs().max() < 0.1
    loader = DataLoader(TensorDataset(y.float()), batch_size=500)
    fit = pf.fit_density(pf.nice(2), loader, levels=2, noise=2.0, validation=None, **QUICK)
    assert fit.flow.bijection.layers[-1].scale.sub(math.sqrt(4.0 + 1.0 / 12.0)).abs().max() < 0.1


def test_noise_that_does_not_fit_is_refused():
    y = datasets.toy("moons", 100)
    with pytest.raises(ValueError, match=r"^noise: "):
        pf.fit_density("nice", y, noise=-1.0, **QUICK)
    images = torch.randint(256, (50, 1, 4, 4))
    flow = pf.multiscale_realnvp((1, 4, 4), layers=1, hidden=(4,), alpha=0.05)
    with pytest.raises(ValueError, match=r"^noise: .*; pass a flow without alpha="):
        pf.fit_density(flow, images, levels=256, noise=0.1, **QUICK)
    with pytest.raises(ValueError, match=r"^denoise: "):
        pf.fit_density("nice", y, **QUICK).denoise(y)


def test_transforms_and_nats_of_levels_are_of_the_levels_of_the_fit():
    y = torch.randint(16, (2000, 1), generator=torch.Generator().manual_seed(0)).float()
    fit = pf.fit_density("planar", y, levels=16, **QUICK)
    u = fit.pit(y)
    assert float(u.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(u.std()) == pytest.approx(12**-0.5, abs=0.03)
    low = y[y <= 1.0][:, None]  # in the data of the fit these are the levels 0 and 1, and not 0 and 15
    at = (low + 0.5) / 16.0
    assert fit.nats(low) == pytest.approx(float(fit.log_prob(at).mean()), abs=0.05)


def test_levels_given_as_fractions_are_the_same_as_integers():
    y = torch.randint(256, (200, 4), generator=torch.Generator().manual_seed(0))
    fits = [pf.fit_density("nice", values, levels=256, **QUICK) for values in (y, y / 255.0, y.to(torch.uint8))]
    assert torch.allclose(weights(fits[0]), weights(fits[1]), atol=1e-3)
    assert torch.equal(weights(fits[0]), weights(fits[2]))


def test_a_memory_map_is_the_same_as_a_tensor(tmp_path):
    y = datasets.toy("moons", 500)
    kept = np.memmap(tmp_path / "y.bin", dtype=np.float64, mode="w+", shape=(500, 2))
    kept[:] = y.numpy()
    kept.flush()
    flow = pf.realnvp(2, layers=2)
    mapped = pf.fit_density(flow, np.memmap(tmp_path / "y.bin", dtype=np.float64, mode="r", shape=(500, 2)), **QUICK)
    assert torch.equal(weights(mapped), weights(pf.fit_density(flow, y, **QUICK)))


def test_loaders_with_and_without_context():
    y = datasets.toy("moons", 512)
    loader = DataLoader(TensorDataset(y), batch_size=64, shuffle=True)
    fit = pf.fit_density(pf.realnvp(2, layers=2), loader, validation=y[:100], **QUICK)
    assert fit.settings["steps"] == 4 * 8
    assert math.isfinite(fit.validation)
    pairs = DataLoader(TensorDataset(y, torch.ones(512, 1)), batch_size=64)
    fit = pf.fit_density(pf.realnvp(2, layers=2, context_dim=1), pairs, validation=None, **QUICK)
    assert fit.log_prob(y, torch.ones(512, 1)).isfinite().all()
    assert math.isnan(fit.validation)
    with pytest.raises(ValueError, match="no share"):
        pf.fit_density(pf.realnvp(2), loader, **QUICK)
    with pytest.raises(ValueError, match="itself, as pairs"):
        pf.fit_density(pf.realnvp(2), loader, context=y, validation=None, **QUICK)


@pytest.mark.slow
def test_stops_by_itself_before_it_learns_the_data_by_heart():
    y = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    flow = pf.realnvp(8, layers=6, hidden=(64, 64), activation="relu")
    fit = pf.fit_density(flow, y, validation=0.5, progress=False)
    assert fit.why.startswith("validation no longer improved")
    assert fit.settings["steps"] < 2000
    exact = -8 * 0.5 * (1 + math.log(2 * math.pi))
    fresh = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    assert fit.nats(fresh) > exact - 3.0


def test_a_start_at_the_identity_is_the_gaussian_of_the_data_and_is_kept_if_nothing_is_better():
    y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    flow = pf.realnvp(6, layers=4)
    fit = pf.fit_density(
        flow, y, start="identity", preprocess="whiten", learning_rate=1.0, max_epochs=2, progress=False
    )
    assert fit.validation > -6 * 1.6  # of a step size that destroys the flow; a standard Gaussian has -6 * 1.42
    assert fit.checks[-1, 1] >= fit.checks[:, 1].max()


@pytest.mark.usefixtures("ticking")
def test_seconds_end_the_training():
    y = datasets.toy("moons", 2000)
    fit = pf.fit_density("realnvp", y, max_seconds=1.0, clock="cpu", progress=False)
    assert 0.9 < fit.settings["seconds"] < 1.6
    assert fit.why == "the budget ended it"


class _Stop(Exception):
    pass


def test_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_density, "SAVE_EVERY", 0.0)
    y, flow = datasets.toy("moons", 400), pf.realnvp(2, layers=2)
    options = {"levels": None, "max_epochs": 12, "progress": False}
    whole = pf.fit_density(flow, y, **options)
    step, steps = Ascent.step, []

    def stopping(self, *args):
        if self.state.steps == 31:  # in the middle of an epoch
            steps.append(self.state.steps)
            raise _Stop
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Ascent, "step", stopping)
        with pytest.raises(_Stop):
            pf.fit_density(flow, y, checkpoint=tmp_path / "run.pt", **options)
    assert steps == [31]
    resumed = pf.fit_density(flow, y, checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.losses, resumed.losses)
    assert torch.equal(whole.checks, resumed.checks)
    assert whole.validation == resumed.validation
    again = pf.fit_density(flow, y, checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(again.checks, whole.checks)
    with pytest.raises(ValueError, match=r"another run \(different: .*seed"):
        pf.fit_density(flow, y, checkpoint=tmp_path / "run.pt", seed=1, **options)
    with pytest.raises(ValueError, match=r"another run \(different: learning_rate\)"):
        pf.fit_density(flow, y, checkpoint=tmp_path / "run.pt", learning_rate=1e-3, **options)
    with pytest.raises(ValueError, match=r"another run \(different: flow\)"):
        pf.fit_density(pf.realnvp(2, layers=2, network="robust"), y, checkpoint=tmp_path / "run.pt", **options)
    short, longer = (DataLoader(TensorDataset(y[:count]), batch_size=32) for count in (64, 128))
    options = {"validation": None, "max_epochs": 1, "progress": False}
    pf.fit_density(flow, short, checkpoint=tmp_path / "loader.pt", **options)
    with pytest.raises(ValueError, match=r"another run \(different: epoch\)"):
        pf.fit_density(flow, longer, checkpoint=tmp_path / "loader.pt", **options)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        pf.fit_density(flow, y, checkpoint=tmp_path / "other.pt", **options)


@pytest.mark.parametrize("kind", ["standardize", "whiten", None])
def test_saves_and_loads(tmp_path, kind):
    y = torch.randint(17, (200, 4), generator=torch.Generator().manual_seed(0))
    fit = pf.fit_density("nice", y, levels=17, preprocess=kind, **QUICK)
    fit.save(tmp_path / "fit")
    fit.save(tmp_path / "fit")
    back = pf.DensityFit.load(tmp_path / "fit")
    assert torch.equal(back.sample(5, seed=1), fit.sample(5, seed=1))
    assert back.bits_per_dim(y) == fit.bits_per_dim(y)
    assert back.summary() == fit.summary()
    assert torch.equal(back.losses, fit.losses)
    assert sorted(file.name for file in (tmp_path / "fit").iterdir()) == ["density.json", "density.pt"]


def resealed(folder, text):
    """Write another text, with the digests that belong to it."""
    about = {name: value for name, value in text.items() if name not in ("format", "version", "digests")}
    FILES.write(folder, about, {"density.pt": (folder / "density.pt").read_bytes()})


def test_saving_and_loading_refuse_what_is_not_theirs(tmp_path):
    fit = pf.fit_density("nice", datasets.toy("moons", 100), **QUICK)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no saved density"):
        fit.save(tmp_path)
    with pytest.raises(ValueError, match="expected the directory of a saved density"):
        pf.DensityFit.load(tmp_path)
    fit.save(tmp_path / "fit")
    text = json.loads((tmp_path / "fit" / "density.json").read_text())
    (tmp_path / "fit" / "density.json").write_text(json.dumps({**text, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        pf.DensityFit.load(tmp_path / "fit")
    text["builder"]["layers"] += 2
    resealed(tmp_path / "fit", text)
    with pytest.raises(ValueError, match=r"the tensors are not those of pf\.nice"):
        pf.DensityFit.load(tmp_path / "fit")
    text["builder"]["bins"] = 8
    resealed(tmp_path / "fit", text)
    with pytest.raises(ValueError, match=r"the tensors are not those of pf\.nice"):
        pf.DensityFit.load(tmp_path / "fit")
    own = pf.Flow(pf.transforms.Planar(2))
    with pytest.raises(ValueError, match="builder"):
        pf.fit_density(own, datasets.toy("moons", 100), **QUICK).save(tmp_path / "own")


def quick(data, **options):
    return pf.fit_density("realnvp", data, max_epochs=1, learning_rate=1e-3, progress=False, **options)


def test_arrays_that_torch_does_not_take_are_copied():
    points = np.random.default_rng(0).normal(size=(40, 2))
    points.flags.writeable = False
    expected = quick(points[::-1].copy()).validation
    assert quick(points[::-1]).validation == expected


def test_columns_of_data_frames_are_numbers():
    pandas = pytest.importorskip("pandas")
    size = np.random.default_rng(0).normal(size=40)
    frame = pandas.DataFrame({"size": pandas.array(size, dtype="Float64"), "many": np.arange(40), "yes": size > 0})
    assert quick(frame).validation == quick(np.stack([size, np.arange(40), size > 0], 1)).validation
    with pytest.raises(
        ValueError, match=r"data: expected columns of numbers, got 'kind' of .*pass categories as context="
    ):
        quick(frame.assign(kind=["a", "b"] * 20))
    with pytest.raises(ValueError, match=r"context: expected columns of numbers, .* or let fit_density make the flow"):
        pf.fit_density(
            pf.nice(2, context_dim=1), torch.randn(40, 2), context=pandas.DataFrame({"kind": ["a", "b"] * 20})
        )
    with pytest.raises(ValueError, match="the value in row 0, column 0 is missing"):
        quick(frame.assign(size=pandas.array([None, *size[1:]], dtype="Float64")))


def test_numbers_that_single_precision_does_not_hold_are_told():
    points = np.random.default_rng(0).normal(size=(40, 2))
    options = {"max_epochs": 1, "learning_rate": 0.01, "progress": False}
    with pytest.warns(UserWarning, match="column 1 has a range of .* which float32 does not hold. Subtract its mean"):
        pf.fit_density(pf.nice(2), points + np.array([0.0, 6e5]), **options)
    with pytest.warns(UserWarning, match="context: column 0 has a range"):
        pf.fit_density(pf.nice(2, context_dim=1), points, context=points[:, 0] + 6e5, **options)
    with pytest.warns(UserWarning, match="context: column 0 has a range of 39 and numbers as large as 1.6e"):
        pf.fit_density(pf.nice(2, context_dim=1), points, context=np.arange(40) + 1_600_000_000, **options)


@pytest.mark.parametrize("name", ["auto", "nice"])
def test_flows_of_numbers_that_single_precision_does_not_hold_are_of_double(tmp_path, name):
    """Of 1e8 with a standard deviation of 1, columns were constant, also for a flow of float64."""
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double()
    far = points + torch.tensor([1e8, 0.0])
    validation = {"validation": far[:20]} if name == "auto" else {}
    options = {"max_epochs": 1, "learning_rate": 0.01, "progress": False, **validation}
    fit = pf.fit_density(name, far, **options)
    assert fit.sample(2).dtype == torch.float64
    near = {**options, "validation": points[:20]} if name == "auto" else options
    assert fit.nats(far) == pytest.approx(pf.fit_density(name, points, **near).nats(points), abs=0.3)
    given = pf.fit_density(pf.nice(2).double(), far, max_epochs=1, learning_rate=0.01, progress=False)
    assert given.nats(far) < 0.0
    fit.save(tmp_path / "density")
    assert torch.equal(pf.DensityFit.load(tmp_path / "density").log_prob(far), fit.log_prob(far))
    time = 1.6e9 + torch.arange(60.0, dtype=torch.float64)
    later = pf.fit_density("nice", points, context=time, max_epochs=1, learning_rate=0.01, progress=False)
    assert later.sample(60, time).dtype == torch.float64
    assert later.encode(time[:2]).diff(dim=0) == 1.0


def test_wrong_orders_of_arguments_are_told_the_right_one():
    with pytest.raises(ValueError, match=r"got a Tensor. Pass fit_density\(data\) or fit_density\(flow, data\)"):
        pf.fit_density(torch.randn(40, 2), "realnvp")
    fit = quick(torch.randn(40, 2), context=torch.randn(40, 1), validation=np.float32(0.2))
    with pytest.raises(ValueError, match=r"sample: expected a context of shape \(..., 1\), got none"):
        fit.sample(3)


def test_two_points_with_a_context_are_enough():
    two = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="is constant") as said:
        found = pf.fit_density(two, context=two, max_epochs=1, learning_rate=1e-3, progress=False)
    assert math.isfinite(found.validation)
    assert [Path(one.filename).name for one in said] == ["test_density.py"]  # once, and at the user's line


def test_tensors_with_a_gradient_are_data(tmp_path):
    x, y = (torch.randn(50, 1, requires_grad=True) for _ in range(2))
    found = pf.fit_density(y, context=x, max_epochs=1, learning_rate=1e-3, progress=False)
    found.save(tmp_path / "saved")
    assert torch.equal(pf.DensityFit.load(tmp_path / "saved").log_prob(y, x), found.log_prob(y, x))


def test_a_context_in_half_precision():
    x, y = torch.randn(2, 50, 1)
    found = pf.fit_density(y.bfloat16(), context=x.bfloat16(), max_epochs=1, learning_rate=1e-3, progress=False)
    assert found.log_prob(y.bfloat16(), x.bfloat16()).isfinite().all()


def test_a_loader_tells_how_many_points_a_step_takes():
    y = torch.randn(512, 2)
    several = BatchSampler(RandomSampler(y), 40, drop_last=False)
    listed = [TensorDataset(y[first : first + 30])[:] for first in range(0, 90, 30)]
    options = {"validation": None, "max_epochs": 1, "progress": False, "learning_rate": 1e-3}
    found = {
        size: pf.fit_density(pf.nice(2), DataLoader(points, **given), **options).settings
        for size, points, given in (
            (16, TensorDataset(y), {"batch_size": 16}),
            (64, TensorDataset(y), {"batch_size": 64}),
            (40, TensorDataset(y), {"batch_sampler": several}),
            (30, listed, {"batch_size": None}),
        )
    }
    assert all(settings["batch"] == size for size, settings in found.items())
    assert found[16]["weight_decay"] == pytest.approx(found[64]["weight_decay"], rel=0.01)  # of as many points
    with pytest.raises(ValueError, match="batch: a DataLoader has batches of its own"):
        pf.fit_density(pf.nice(2), DataLoader(TensorDataset(y), 16), batch=8, **options)


def test_refuses_missing_values_and_says_where(tmp_path):
    y = torch.randn(5000, 3)
    y[4321, 2] = math.nan
    with pytest.raises(ValueError, match=r"data: the value in row 4321, column 2 is missing"):
        pf.fit_density("nice", y, **QUICK)
    with pytest.raises(ValueError, match=r"row 4321, column 2"):
        pf.fit_density("nice", y.numpy(), **QUICK)
    kept = np.memmap(tmp_path / "y.bin", dtype=np.float32, mode="w+", shape=(5000, 3))
    kept[:] = y.numpy()
    with pytest.raises(ValueError, match=r"row 4321, column 2"):
        pf.fit_density(pf.nice(3), kept, **QUICK)
    with pytest.raises(ValueError, match=r"context: the value in row 0, column 0"):
        pf.fit_density("nice", torch.randn(9, 2), context=torch.full((9, 1), math.inf), **QUICK)
    loader = DataLoader(TensorDataset(y), batch_size=100)
    with pytest.raises(ValueError, match="batch 43 of the loader"):
        pf.fit_density(pf.nice(3), loader, validation=None, **QUICK)
    image = torch.zeros(2, 1, 2, 2)
    image[1, 0, 1, 0] = math.nan
    flow = pf.Flow(pf.transforms.AffineCoupling((1, 2, 2), mask=pf.transforms.masks.checkerboard((1, 2, 2))))
    with pytest.raises(ValueError, match=r"row 1, column \(0, 1, 0\)"):
        pf.fit_density(flow, image, **QUICK)


def test_constant_columns_are_named():
    y = torch.randn(300, 3)
    y[:, 1] = 1234.5
    with pytest.warns(UserWarning, match=r"coordinate 1 is constant \(1 of 3"):
        fit = pf.fit_density("nice", y, **QUICK)
    assert fit.losses.isfinite().all()


def test_columns_of_a_linear_equation_are_named():
    y = torch.randn(300, 5) * torch.tensor([1.0, 0.1, 30.0, 1.0, 1.0]) + 100.0
    y[:, 3] = y[:, 1] + y[:, 2]
    with pytest.warns(UserWarning, match=r"coordinates 1, 2, 3 fulfil a linear equation, such"):
        pf.fit_density("nice", y, **QUICK)
    x = torch.randn(300, 2)
    y = x[:, :1] + torch.randn(300, 2)
    y[:, 1] = y[:, 0] - 2.0 * x[:, 1]
    with pytest.warns(UserWarning, match=r"coordinates 0, 1 fulfil a linear equation with the context"):
        pf.fit_density("nice", y, context=x, **QUICK)
    y = torch.cat([x + 2.0, torch.randn(300, 1)], 1)
    with pytest.warns(UserWarning, match="data: coord") as said:
        pf.fit_density("nice", y, context=x, **QUICK)
    assert [str(one.message)[:60] for one in said if "data: coord" in str(one.message)] == [
        "data: coordinate 0 is constant given the context (2 of 3 are"
    ]


def test_columns_that_nearly_fulfil_a_linear_equation_or_are_few_or_quantized_are_no_matter(recwarn):
    y = torch.randn(300, 3)
    y[:, 2] = y[:, 0] + 1e-4 * y[:, 2]
    warn_dependent([(y, None)])
    warn_dependent([(torch.randn(4, 3), None)])
    warn_dependent([(y[:, :2], torch.nn.functional.one_hot(torch.arange(300) % 3).float())])
    far = torch.randn(300, 3)
    far[7, :2] = 1e8
    warn_dependent([(far, None)])
    warn_dependent([(far[:, 1:], far[:, :1])])
    warn_dependent([(1e8 * torch.randn(300, 3) / torch.randn(300, 3).pow(5), None)])
    shares = torch.randint(3, (300, 1))
    pf.fit_density("nice", torch.cat([shares, 2 - shares], 1), levels=3, **QUICK)
    assert not [str(one.message) for one in recwarn if "equation" in str(one.message)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocess": "whitten"}, "Did you mean 'whiten'"),
        ({"validation": 1.5}, "a share between 0 and 1"),
        ({"validation": True}, "a share between 0 and 1"),
        ({"validation": torch.zeros(3, 5)}, r"validation: expected points of shape \(2,\), got \(5,\)"),
        ({"levels": 256}, "data: expected 256 levels"),
        ({"context": torch.zeros(4, 1)}, "context: expected a row for each of 50"),
        ({"context": torch.zeros(50, 1)}, "takes no context"),
    ],
)
def test_bad_options(options, message):
    y = torch.linspace(-1.0, 1.0, 100).reshape(50, 2)
    with pytest.raises(ValueError, match=message):
        pf.fit_density(pf.nice(2), y, **{"progress": False, **options})


@pytest.mark.parametrize(
    ("flow", "data", "message"),
    [
        ("glaw", torch.zeros(4, 2), "flow: expected one of"),
        (None, torch.zeros(4, 2), "expected a Flow or a builder's name"),
        ("nice", torch.zeros(4, 1, 2, 2), "a name makes a flow of vectors"),
        ("nice", "words", "expected a tensor, an array or a DataLoader"),
        ("nice", torch.tensor(4.0), "expected one point a row"),
        (pf.nice(3), torch.zeros(4, 2), r"expected points of shape \(3,\), got \(2,\)"),
        ("nice", torch.zeros(1, 2), "at least two points"),
    ],
)
def test_bad_data(flow, data, message):
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, data, progress=False)


def test_summary_and_bar(capsys):
    fit = pf.fit_density("nice", torch.randint(4, (100, 2)), levels=4, max_epochs=30)
    assert "bits/dim" in capsys.readouterr().err
    assert "nice on 90 points of shape (2,)" in fit.summary()
    assert f"{fit.validation:.4f} nats" in fit.summary()


def test_a_gain_within_its_standard_error_leaves_the_start():
    """Six held-out rows of sixty tell little of a training. Many rows that gain go their own way."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 3, generator=generator)
    few = pf.fit_density(pf.realnvp(3, layers=4), points, max_epochs=60, progress=False)
    assert training.KEPT in few.why
    assert float(few.validation) == float(few.checks[-1, 1])
    x, noise = torch.randn(2, 3000, generator=generator)
    bent = torch.stack([x, x.square() + 0.1 * noise], 1)
    found = pf.fit_density(pf.realnvp(2, layers=4), bent, max_epochs=4, learning_rate=0.01, progress=False)
    assert training.KEPT not in found.why
    default = pf.fit_density(points, max_epochs=60, progress=False)
    assert training.KEPT not in default.why
    assert 0.1 < default.settings["share_of_mixture"] < 0.9  # of the start, by six points
