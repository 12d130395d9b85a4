"""Fitted densities that are fitted again, saved and resumed."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pyro_flows as pf
from pyro_flows.densities import fit_density
from pyro_flows.densities.ascent import Ascent
from pyro_flows.support.files import checkpoints
from pyro_flows.transforms.fixed import Preprocess

QUICK = {"progress": False, "max_epochs": 6}


def cloud(count=600, seed=0):
    """Two curved coordinates and one independent, of scales 1, 50 and 0.01, far from the origin."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    x[:, 1] += x[:, 0].square()
    return x * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([1e3, -7.0, 0.5])


def maps(flow):
    return [layer for layer in flow.modules() if isinstance(layer, Preprocess)]


# trained flows --------------------------------------------------------------------------------------------------------


@functools.cache
def fitted_by(preprocess):
    return pf.fit_density("realnvp", cloud(), preprocess=preprocess, **QUICK)


@pytest.mark.parametrize("first", ["auto", "whiten"])
@pytest.mark.parametrize("again", ["auto", "standardize", "whiten", None])
def test_a_fitted_flow_is_fitted_again_on_one_scale(tmp_path, first, again):
    y, fresh = cloud(), cloud(seed=1)
    once = fitted_by(first)
    twice = pf.fit_density(once.flow, y, preprocess=again, **QUICK)
    assert len(maps(twice.flow)) == len(maps(once.flow)) == 1
    assert twice.nats(fresh) > once.nats(fresh) - (0.3 if again == first or again in ("auto", None) else 1.0)
    twice.save(tmp_path / "fit")
    back = pf.DensityFit.load(tmp_path / "fit")
    assert torch.equal(back.log_prob(fresh), twice.log_prob(fresh))
    assert torch.equal(back.sample(5, seed=1), twice.sample(5, seed=1))


@pytest.mark.parametrize("kind", ["auto", "standardize"])
def test_a_fitted_flow_goes_over_to_data_of_another_scale(kind):
    once = fitted_by("auto")
    other = 1e3 * cloud() + 5e4
    twice = pf.fit_density(once.flow, other, preprocess=kind, **QUICK)
    anew = pf.fit_density("realnvp", other, **QUICK)
    assert twice.nats(1e3 * cloud(seed=1) + 5e4) > anew.nats(1e3 * cloud(seed=1) + 5e4) - 0.3


def test_a_saved_density_knows_its_noise(tmp_path):
    y = cloud()
    fit = pf.fit_density("nice", y, noise=0.3, **QUICK)
    fit.save(tmp_path / "fit")
    found = pf.DensityFit.load(tmp_path / "fit")
    assert found.noise == 0.3
    assert torch.equal(found.denoise(y), fit.denoise(y))
    assert found.nats(y) == fit.nats(y)


def test_a_flow_that_could_not_be_loaded_is_not_saved(tmp_path):
    fit = pf.fit_density("nice", cloud(), **QUICK)
    fit.flow.bijection.layers[0], fit.flow.bijection.layers[1] = (
        fit.flow.bijection.layers[1],
        fit.flow.bijection.layers[0],
    )
    with pytest.raises(ValueError, match=r"flow: expected one as a builder made it.* it was changed after"):
        fit.save(tmp_path / "fit")
    assert not list(tmp_path.iterdir())


# checkpoints ----------------------------------------------------------------------------------------------------------


class Listed(Dataset):
    """Points by index, with noise if asked for."""

    def __init__(self, y, noise=0.0):
        self.y, self.noise = y, noise

    def __len__(self):
        return len(self.y)

    def __getitem__(self, place):
        return self.y[place] + self.noise * torch.randn(3)


class Streamed(IterableDataset):
    def __init__(self, y):
        self.y = y

    def __len__(self):
        return len(self.y)

    def __iter__(self):
        return iter(self.y)


def memmap(y, folder, name):
    kept = np.memmap(folder / name, dtype=np.float32, mode="w+", shape=tuple(y.shape))
    kept[:] = y.numpy()
    return kept


KINDS = {
    "tensor": lambda y, folder, name: y,
    "array": lambda y, folder, name: y.double().numpy(),
    "memmap": memmap,
    "loader": lambda y, folder, name: DataLoader(TensorDataset(y), batch_size=50),
    "subset": lambda y, folder, name: DataLoader(Subset(TensorDataset(y), list(range(500))), batch_size=50),
    "listed": lambda y, folder, name: DataLoader(Listed(y), batch_size=50),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_of_other_data_is_refused(tmp_path, kind):
    make, flow = KINDS[kind], pf.realnvp(3, layers=2)
    options = {"checkpoint": tmp_path / "run.pt", **QUICK}
    options["validation"] = 0.1 if kind in ("tensor", "array", "memmap") else None
    first = pf.fit_density(flow, make(cloud(), tmp_path, "a"), **options)
    with pytest.raises(ValueError, match=r"run.pt' of another \(different: data\)") as caught:
        pf.fit_density(flow, make(cloud() + 100, tmp_path, "b"), **options)
    assert len(str(caught.value).splitlines()) == 1
    again = pf.fit_density(flow, make(cloud(), tmp_path, "c"), **options)
    assert torch.equal(first.log_prob(cloud()), again.log_prob(cloud()))


def test_one_other_number_is_other_data(tmp_path):
    y, options = cloud(), {"checkpoint": tmp_path / "run.pt", **QUICK}
    pf.fit_density("nice", y, **options)
    other = y.clone()
    other[-1, -1] += 1e-4
    with pytest.raises(ValueError, match=r"different: data\)"):
        pf.fit_density("nice", other, **options)
    with pytest.raises(ValueError, match=r"different: .*points"):
        pf.fit_density("nice", y[:-100], **options)


def test_other_contexts_validation_data_levels_and_flows_are_refused(tmp_path):
    y, c = cloud(), torch.randn(600, 1)
    flow = pf.nice(3, layers=2, context_dim=1)
    options = {"context": c, "validation": (cloud(100, 1), c[:100]), "checkpoint": tmp_path / "run.pt", **QUICK}
    once = pf.fit_density(flow, y, **options)
    for change, word in (
        ({"context": c + 1}, "data"),
        ({"validation": (cloud(100, 2), c[:100])}, "held out"),
        ({"validation": 0.2}, "points"),
        ({"validation": None}, "validation"),
        ({"preprocess": None}, "preprocess"),
        ({"start": "identity"}, "start"),
        ({"batch": 50}, "batch"),
        ({"max_epochs": 7}, "max_epochs"),
    ):
        with pytest.raises(ValueError, match=f"of another .*{word}"):
            pf.fit_density(flow, y, **{**options, **change})
    with pytest.raises(ValueError, match=r"different: .*weights"):
        pf.fit_density(once.flow, y, **{**options, "preprocess": "standardize"})
    trained = pf.fit_density(flow, y, context=c, preprocess=None, **QUICK).flow
    with pytest.raises(ValueError, match=r"different: weights\)"):
        pf.fit_density(trained, y, **{**options, "preprocess": "standardize"})
    counts = torch.randint(8, (600, 3))
    pf.fit_density("nice", counts, levels=8, checkpoint=tmp_path / "levels.pt", **QUICK)
    with pytest.raises(ValueError, match="different: levels"):
        pf.fit_density("nice", counts, levels=9, checkpoint=tmp_path / "levels.pt", **QUICK)


@pytest.mark.parametrize("make", [lambda y: Listed(y, 0.1), Streamed])
def test_data_that_cannot_be_compared_do_not_stand_in_the_way(tmp_path, make):
    options = {"checkpoint": tmp_path / "run.pt", "validation": None, **QUICK}
    flow = pf.nice(3)
    first = pf.fit_density(flow, DataLoader(make(cloud()), batch_size=50), **options)
    again = pf.fit_density(flow, DataLoader(make(cloud()), batch_size=50), **options)
    assert torch.equal(first.log_prob(cloud()), again.log_prob(cloud()))


class _Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: pf.realnvp(3, layers=2), lambda: pf.spline(3, layers=2), lambda: "nice"])
def test_a_script_that_is_run_anew_goes_on_exactly(tmp_path, monkeypatch, build):
    """Its flow has other random weights by then, and its tensors are other objects."""
    monkeypatch.setattr(fit_density, "SAVE_EVERY", 0.0)
    torch.manual_seed(1)
    whole = pf.fit_density(build(), cloud(), checkpoint=tmp_path / "whole.pt", **QUICK)
    torch.manual_seed(1)
    plain = pf.fit_density(build(), cloud(), **QUICK)
    assert torch.equal(plain.losses, whole.losses)  # a checkpoint changes nothing
    step = Ascent.step

    def stopping(self, *args):
        if self.state.steps == 25:
            raise _Stop
        return step(self, *args)

    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(Ascent, "step", stopping)
        with pytest.raises(_Stop):
            pf.fit_density(build(), cloud(), checkpoint=tmp_path / "run.pt", **QUICK)
    torch.manual_seed(2)
    resumed = pf.fit_density(build(), cloud().double().numpy(), checkpoint=tmp_path / "run.pt", **QUICK)
    assert torch.equal(resumed.losses, whole.losses)
    assert torch.equal(resumed.log_prob(cloud()), whole.log_prob(cloud()))
    assert [file.name for file in tmp_path.iterdir() if "run" in file.name] == ["run.pt"]


def test_a_training_that_validation_ended_goes_on_from_its_end(tmp_path):
    """Its cool-down began at a number of steps, where another one begins at a share of the budget."""
    points = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    options = {"checkpoint": tmp_path / "run.pt", "learning_rate": 0.05, "max_epochs": 400, "progress": False}
    first = pf.fit_density(pf.nice(2, layers=2), points, **options)
    assert "validation" in first.why
    assert torch.equal(pf.fit_density(pf.nice(2, layers=2), points, **options).log_prob(points), first.log_prob(points))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    options = {"checkpoint": tmp_path / "run.pt", **QUICK}
    pf.fit_density("nice", cloud(), **options)
    data = (tmp_path / "run.pt").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    others = ((b"words", "another file"), (b"", "another file"))
    for changed, why in ((bytes(flipped), "damaged"), (data[:-9], "damaged"), *others):
        (tmp_path / "run.pt").write_bytes(changed)
        with pytest.raises(ValueError, match=rf"^checkpoint: expected .*{why}") as caught:
            pf.fit_density("nice", cloud(), **options)
        assert len(str(caught.value).splitlines()) == 1
    torch.save({"format": "pyro_flows density checkpoint", "version": 1}, tmp_path / "run.pt")  # of an earlier release
    with pytest.raises(ValueError, match="expected one of this release, got another file"):
        pf.fit_density("nice", cloud(), **options)


def test_checkpoints_that_cannot_be_written(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "nowhere" / "run.pt"):
        with pytest.raises(ValueError, match="checkpoint: expected a file in a directory that can be written to"):
            pf.fit_density("nice", cloud(), checkpoint=path, **QUICK)
    whole = pf.fit_density("nice", cloud(), **QUICK)
    monkeypatch.setattr(fit_density, "SAVE_EVERY", 0.0)

    def fail(path, data):
        raise OSError(28, "path: 'run.pt' could not be written (No space left on device)")

    monkeypatch.setattr(checkpoints, "replace_file", fail)
    with pytest.warns(UserWarning, match=r"checkpoint: .*No space left on device.*; the work goes on") as caught:
        fit = pf.fit_density("nice", cloud(), checkpoint=tmp_path / "run.pt", **QUICK)
    assert len(caught) == 1
    assert torch.equal(fit.losses, whole.losses)
    assert math.isfinite(fit.validation)


def test_five_flows_go_on_from_checkpoints_of_their_own(tmp_path):
    y, x = cloud(60, 0)[:, :1], cloud(60, 1)[:, :2]
    options = {"context": x, "checkpoint": tmp_path / "run.pt", **QUICK}
    first = pf.fit_density(y, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.pt",
        *(f"run.pt.{number}" for number in range(1, 5)),
    ]
    for gone in ((), (2, 4)):  # all were done, or some have to be done again
        for number in gone:
            (tmp_path / f"run.pt.{number}").unlink()
        again = pf.fit_density(y, **options)
        assert torch.equal(again.log_prob(y, x), first.log_prob(y, x))
        assert again.settings["share_without_context"] == first.settings["share_without_context"]


def test_seconds_before_a_checkpoint_count(tmp_path, monkeypatch):
    """Only those of the first flow did, so that a second call fitted more flows than the first one."""
    ticks = itertools.count()
    monkeypatch.setitem(fit_density.CLOCKS, "cpu", lambda: float(next(ticks)))
    y, x = cloud(60, 0)[:, :1], cloud(60, 1)[:, :2]
    options = {"context": x, "checkpoint": tmp_path / "run.pt", "clock": "cpu", "learning_rate": 0.01, **QUICK}
    whole = pf.fit_density(y, **{**options, "checkpoint": None})
    options["max_seconds"] = 0.7 * whole.settings["seconds"]
    first, again = pf.fit_density(y, **options), pf.fit_density(y, **options)
    assert 1 < first.settings["flows"] < 5
    assert again.settings["flows"] == first.settings["flows"]
    assert again.settings["seconds"] == pytest.approx(first.settings["seconds"], rel=0.1)
    assert torch.equal(again.log_prob(y, x), first.log_prob(y, x))


def test_checkpoints_tell_means_of_densities_apart(tmp_path):
    """Their own map is none, and what is in the base was not compared."""
    y, x = cloud(60, 0)[:, :1], cloud(60, 1)[:, :2]
    one, other = (pf.fit_density(y, context=x, seed=seed, **QUICK).flow for seed in (0, 1))
    options = {"context": x, "checkpoint": tmp_path / "run.pt", **QUICK}
    first = pf.fit_density(one, y, **options)
    assert torch.equal(pf.fit_density(one, y, **options).log_prob(y, x), first.log_prob(y, x))
    with pytest.raises(ValueError, match="of another "):
        pf.fit_density(other, y, **options)
