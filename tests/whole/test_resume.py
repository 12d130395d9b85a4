"""Calls that are stopped at any moment go on from their checkpoint, to the last digit of unbroken ones."""

import functools
import hashlib
import pickle
import random
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.calibration.checkpoint import Folder
from pyro_flows.densities import fit_density as estimation
from pyro_flows.inference.training.loop import Budget, train
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.model.unchanged import identity
from pyro_flows.support.files import checkpoints
from pyro_flows.support.files.untrusted import packed
from pyro_flows.support.process import journal
from pyro_flows.support.process.clock import Clock
from tests.interrupts import in_a_fork
from tests.posteriors import location, location_guide, schools_posterior

Y = torch.tensor([1.0, 2.5, 0.5, 3.0, 1.5, 2.0])


class Stopped(BaseException):
    """No ``Exception``, so that nothing takes it for a failure of the model."""


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    pyro.sample("y", dist.Normal(mu, sigma).expand([len(y)]).to_event(1), obs=y)


def bent(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.sin(3.0 * x), 0.3))
    pyro.sample("y", dist.Normal(x * w, 0.5), obs=y)


def by_start(**more):
    return pf.fit(normal, Y, draws=200, progress=False, **more)


def by_flow(**more):
    options = {"flow": "realnvp", "layers": 2, "max_steps": 90, "escalate": False, "refine": False}
    return pf.fit(bent, torch.tensor(0.4), draws=100, progress=False, **options, **more)


def narrow(y):
    pyro.sample("x", dist.Normal(0.0, 0.3))
    pyro.sample("w", dist.Normal(0.0, 0.3))


def by_chains(**more):
    started = pf.diagnose(bent, narrow, torch.tensor(0.4), draws=400)
    return started.refine(chains=16, max_steps=100, progress=False, **more)


CALLS = [
    (by_chains, Stopped),
    pytest.param(by_start, Stopped, marks=pytest.mark.slow),
    pytest.param(by_flow, KeyboardInterrupt, marks=pytest.mark.slow),
]


def numbers(posterior):
    """All that a call returns, but for seconds."""
    fields = {name: getattr(posterior, name) for name in ("z", "log_p", "log_q", "log_weights", "losses")}
    chains = {} if posterior.chains is None else {"chains": posterior.chains.z, **posterior.chains.state}
    tensors = {**fields, **posterior.samples, **chains}
    settings = {name: value for name, value in posterior.settings.items() if name != "seconds"}
    plain = [str(posterior.verdict), posterior.history, settings, posterior.log_evidence, posterior.k_hat]
    return {name: journal.checksum([value]) for name, value in tensors.items()} | {"plain": repr(plain)}


def called(call, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that is cut so short is unreliable
        return numbers(call(**more))


def stopping(monkeypatch, at, error=Stopped):
    """Raise an error at the ``at``-th look at the clock, as all evaluations take one; return the list of looks."""
    looks, look = [], Clock.look

    def counted(self):
        looks.append(None)
        if len(looks) == at:
            raise error
        look(self)

    monkeypatch.setattr(Clock, "look", counted)
    return looks


@pytest.fixture
def always_kept(monkeypatch):
    """Keep at each occasion, however long a disk takes to write."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "SHARE", float("inf"))


@pytest.mark.usefixtures("always_kept")
@pytest.mark.parametrize(("call", "error"), CALLS)
def test_a_call_goes_on_to_the_last_digit(call, error, tmp_path, monkeypatch):
    """After an error, and after Ctrl-C, with which a fit returns what it has."""
    with monkeypatch.context() as patch:
        looks = stopping(patch, -1)
        expected = called(call)
    path, at = tmp_path / "kept", random.Random(len(looks)).randrange(len(looks) // 2, len(looks))
    with monkeypatch.context() as patch:
        stopping(patch, at, error)
        found = expected
        with suppress(Stopped):
            found = called(call, checkpoint=path)
        assert (found == expected) == (error is Stopped)
    with monkeypatch.context() as patch:
        again = stopping(patch, -1)
        assert called(call, checkpoint=path) == expected
    assert len(again) < len(looks) or call is by_start


@pytest.mark.usefixtures("always_kept")
def test_a_training_goes_on_to_the_last_digit(tmp_path, monkeypatch):

    def trained(at=-1, path=None):
        torch.manual_seed(0)
        flow, density = pf.realnvp(2, layers=2), pf.LogDensity(bent, (torch.tensor(0.4),))
        trainer = Trainer(flow, density, learning_rate=1e-2, batch=16)
        with monkeypatch.context() as patch, journal.keeping(path, lambda: {}):
            looks = stopping(patch, at)
            found = train(trainer, Budget(120), seed=0, report=lambda *said: None)
        return [found, journal.checksum([trainer.weights]), density.evaluations], len(looks)

    expected, looks = trained()
    with pytest.raises(Stopped):
        trained(looks - 30, tmp_path / "kept")
    found, again = trained(path=tmp_path / "kept")
    assert found == expected
    assert again < looks


# evaluations ----------------------------------------------------------------------------------------------------------


@pytest.mark.falls_back
def test_evaluations_of_slow_models_are_kept_and_those_that_draw_are_not(tmp_path, monkeypatch):
    runs = []

    def branching(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        runs.append(float(x.detach()))
        if runs[-1] > 1.5:
            raise ValueError("too large")
        pyro.deterministic("twice", 2.0 * x)
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    monkeypatch.setattr(journal, "DENSE", float("inf"))
    z, results = torch.linspace(-1.0, 2.0, 7)[:, None], []
    for _ in range(2):
        density = pf.LogDensity(branching, (torch.tensor(0.7),))
        runs.clear()
        with journal.keeping(tmp_path / "kept", lambda: {"call": "this"}), torch.no_grad():
            found = [density(z), *density.value_and_grad(z), density.constrain(z)["twice"]]
        results.append([*(value.nan_to_num().tolist() for value in found), vars(density.faults), density.evaluations])
        if len(results) == 1:
            assert len(runs) > 20
    assert not runs
    assert results[0] == results[1]
    assert results[0][-2]["undefined"] == 3

    drawn = []
    for _ in range(2):
        with journal.keeping(tmp_path / "random", lambda: {}):
            found = journal.evaluated([z], lambda: (torch.rand(7),), density.faults)
            drawn.append(found[0].tolist())
    assert drawn[0] != drawn[1]


def test_a_checkpoint_stays_where_the_call_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "DENSE", 0.0)  # as if each step of the fit were too quick to be kept
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def moving(y):
        monkeypatch.chdir(tmp_path / "other")
        location(y)

    pf.fit(moving, Y, draws=100, progress=False, checkpoint="fit.ckpt")
    monkeypatch.chdir(tmp_path)
    points = Moving(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), tmp_path / "other", monkeypatch)
    loader = torch.utils.data.DataLoader(points, batch_size=32)
    flow = pf.nice(2, layers=2)
    pf.fit_density(flow, loader, checkpoint="run.pt", max_epochs=1, learning_rate=0.01, validation=None, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "fit.ckpt", "run.pt"}
    assert not list((tmp_path / "other").iterdir())


class Moving(torch.utils.data.Dataset):
    """Points whose reading changes the working directory."""

    def __init__(self, points, folder, patch):
        self.points, self.folder, self.patch = points, folder, patch

    def __len__(self):
        return len(self.points)

    def __getitem__(self, number):
        self.patch.chdir(self.folder)
        return self.points[number]


def test_what_is_inside_of_a_step_is_no_step_and_what_comes_after_a_cut_is_not_kept(tmp_path):
    def step(value):
        def compute():
            journal.evaluated([value], lambda: [value + 1.0])
            time.sleep(0.002)
            return [2.0 * value]

        return journal.evaluated([value], compute)[0]

    one = torch.ones(1)
    with journal.keeping(tmp_path / "kept", lambda: {}):
        assert step(one) == step(one) == 2.0
        journal.stop()
        step(one)
    kept = journal.Journal(tmp_path / "kept", {})
    assert list(kept.evaluations) == [0, 1]
    with journal.keeping(tmp_path / "kept", lambda: {}), pytest.raises(ValueError, match="got others at a step"):
        step(one + 1.0)


# files ----------------------------------------------------------------------------------------------------------------


def sealed(body):
    return checkpoints.FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_files_of_others_and_damaged_ones_are_refused_before_the_work(tmp_path):
    path = tmp_path / "kept"
    with journal.keeping(path, lambda: {"seed": 1}):
        journal.evaluated([torch.ones(3)], lambda: time.sleep(0.002) or [torch.zeros(3)])
    whole = path.read_bytes()
    about = {"seed": 1}
    steps = [{0: ["5", []]}, {0: [5, [], 12]}, {0: 5}, [[0], [[5, []]]], None]
    forms = [sealed(packed({"about": about, "steps": one})) for one in steps]
    forms += [sealed(packed({"about": 5, "steps": {}})), sealed(packed([])), sealed(pickle.dumps({"about": about}))]
    for bad in (whole[:-1], whole[:60], whole.replace(b"seed", b"feed"), sealed(b"{}\n"), *forms):
        path.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"^checkpoint: expected a whole file, got .*kept', damaged \(.*to begin anew"
        ):
            journal.Journal(path, {"seed": 1})
    for bad in (b"", b"pyro_flows density checkpoint 2\n", b"\x80\x04\x95"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"^checkpoint: expected one of this release, got"):
            journal.Journal(path, {"seed": 1})
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this call, got .* \(different: seed, draws\)"):
        journal.Journal(path, {"seed": 2, "draws": 3})
    assert path.read_bytes() == whole


def test_a_checkpoint_belongs_to_a_model_its_data_and_options(tmp_path):
    path = tmp_path / "kept"
    density = pf.LogDensity(normal, (Y,))
    about = {"call": "fit", **identity(density)}
    assert about == {"call": "fit", **identity(pf.LogDensity(normal, (Y.clone(),)))}
    other = identity(pf.LogDensity(normal, (Y + 1.0,)))
    assert [name for name in other if other[name] != about[name]] == ["argument 'y'", "log density"]
    with journal.keeping(path, lambda: about):
        journal.evaluated([Y], lambda: time.sleep(0.01) or [Y])
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this call, .*draws, seed"):
        by_start(checkpoint=path)
    with pytest.raises(ValueError, match=r"^checkpoint: expected a file in a directory that can be written to"):
        by_start(checkpoint=tmp_path)


# fit_many -------------------------------------------------------------------------------------------------------------


class Answers:
    """What answers at once in the place of a fit."""

    def __repr__(self):
        return "answers"

    def posterior(self, y, *, model_kwargs, draws, seed):
        return answer(tuple(y.tolist()), draws, seed)


@functools.cache
def answer(values, draws, seed):
    found = pf.diagnose(location, location_guide, torch.tensor(values), draws=draws, seed=seed)
    return replace(found, verdict=replace(found.verdict, status="corrected"))


def by_many(model=normal, **more):
    options = {"draws": 100, "progress": False, "refine": False, "escalate": False, "max_steps": 40}
    return pf.fit_many(model, [Y, Y[:5] + 1.0], **{**options, **more})


def many_numbers(**more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            [*map(journal.checksum, ([*one.samples.values()], [one.log_weights])), str(one.verdict)]
            for one in by_many(**more)
        ]


def stop_adding(patch, number):
    """Raise as the posterior of a data set is to be saved."""
    add = Folder.add

    def stopped(self, at, posterior):
        if at == number:
            raise Stopped
        add(self, at, posterior)

    patch.setattr(Folder, "add", stopped)


def test_many_answers_go_on_from_a_folder(tmp_path, monkeypatch):
    path, answers = tmp_path / "kept", {"model": location, "amortized": Answers()}
    expected = many_numbers(**answers)
    with monkeypatch.context() as patch:
        stop_adding(patch, 1)
        with pytest.raises(Stopped):
            many_numbers(checkpoint=path, **answers)
    assert sorted(item.name for item in path.iterdir()) == ["0", "fit_many.json"]
    assert many_numbers(checkpoint=path, **answers) == expected
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected one of this call, got .* of another \(different: seed\)"
    ):
        by_many(checkpoint=path, seed=1, **answers)
    (path / "0" / "guide.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged"):
        by_many(checkpoint=path, **answers)
    with pytest.raises(ValueError, match=r"^checkpoint: expected a new folder or one of fit_many"):
        by_many(checkpoint=path / "0", **answers)


@pytest.mark.slow
def test_many_fits_go_on_from_a_folder(tmp_path, monkeypatch):
    path, expected = tmp_path / "kept", many_numbers()
    with monkeypatch.context() as patch:
        stop_adding(patch, 1)
        with pytest.raises(Stopped):
            many_numbers(checkpoint=path)
    assert sorted(item.name for item in path.iterdir()) == ["0", "1.journal", "fit_many.json"]
    assert many_numbers(checkpoint=path) == expected


# kills ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """Checkpoints are written as often as they can be."""
    for module, name in ((journal, "EVERY"), (estimation, "SAVE_EVERY"), (checkpoints, "EVERY")):
        monkeypatch.setattr(module, name, 0.0)


def rows(y, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        z = pyro.sample("z", dist.StudentT(4.0, mu, tau))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def by_minibatches(**more):
    y = 3.0 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    return pf.fit(rows, y, 10, draws=100, max_steps=200, progress=False, **more)


def by_density(**more):
    points = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]])
    found = pf.fit_density("realnvp", points, max_epochs=25, progress=False, **more)
    plain = {name: value for name, value in found.settings.items() if name != "seconds"}
    return [*map(journal.checksum, ([found.losses], [found.checks], [found.log_prob(points).detach()])), repr(plain)]


def by_ranks(**more):
    """The mean of a normal distribution with a known variance, of three values."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def exact(y):
        return {"mu": y.sum() / 3.04 + 3.04**-0.5 * torch.randn(199)}

    found = pf.sbc(model, torch.zeros(3), sampler=exact, simulations=80, draws=99, progress=False, **more)
    return [{name: value.tolist() for name, value in found.ranks.items()}, dict(found.statuses)]


KILLED = {
    "fit, a flow": (partial(called, by_flow), 12),
    "fit, a start": (partial(called, by_start), 4),
    "fit, minibatches": (partial(called, by_minibatches), 8),
    "refine": (partial(called, by_chains), 12),
    "fit_many": (many_numbers, 8),
    "fit_density": (by_density, 8),
    "sbc": (by_ranks, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_any_moment(name, tmp_path, eager):
    call, kills = KILLED[name]
    expected, seconds = in_a_fork(call)
    chance, ended = random.Random(kills), 0
    for trial in range(kills):
        path = tmp_path / str(trial)
        found = in_a_fork(lambda path=path: call(checkpoint=path), end=chance.uniform(0.0, seconds))
        ended += found is None
        assert in_a_fork(lambda path=path: call(checkpoint=path))[0] == expected
        assert list(tmp_path.rglob(".*")) == []
    print(f"{name}: {ended} of {kills} killed on the way, all went on to the same numbers")


@pytest.mark.slow
def test_saves_that_are_killed_at_any_moment_leave_the_old_or_the_new(tmp_path):
    place, pair = tmp_path / "saved", [schools_posterior(status, draws=200) for status in ("ok", "corrected")]
    whole = [journal.checksum([one.z, one.log_weights]) for one in pair]

    def saving():
        for one in pair * 2:
            one.save(place)

    chance, seen = random.Random(1), []
    _, seconds = in_a_fork(saving)
    for _ in range(12):
        ended = in_a_fork(saving, end=chance.uniform(0.0, seconds)) is None
        found = pf.load(place)
        seen.append((ended, whole.index(journal.checksum([found.z, found.log_weights]))))
    pair[0].save(place)
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]
    assert {(True, 0), (True, 1)} <= {*seen}
    print(f"save: {sum(ended for ended, _ in seen)} of 12 killed on the way, all files old or new")
