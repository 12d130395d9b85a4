"""Files by strangers: three hundred damaged ones are refused in one line, at once, and nothing in them is run.

Each case changes a good file and seals it anew, as somebody could who knows the format: digests do not help.
"""

import copy
import io
import os
import random
import reprlib
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.densities import files as density_files
from pyro_flows.densities.fit_density import fit_density
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.posterior.export.files import FILES as POSTERIOR
from pyro_flows.priors import fitted as prior_files
from pyro_flows.support.files import checkpoints
from pyro_flows.support.files.bundles import digest, plain
from pyro_flows.support.numbers.arrays import read as read_groups
from pyro_flows.support.numbers.arrays import write as write_groups
from tests.calibration.test_sbc import check, from_exact

SECONDS = 20.0  # for one file, on a busy machine
EVERY = 9  # of the cases, the quick tests take one

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, tau), obs=y)


Y = torch.tensor([0.3, 1.1, -0.4, 0.8, 0.5])
POINTS = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
CHECKPOINTED = {"max_epochs": 4, "batch": 50, "learning_rate": 1e-3, "progress": False}


def of_mixture():
    """A posterior whose guide is a mixture of flows."""
    guide = pf.AutoRealNVP(model, layers=2)
    guide(Y)
    found = pf.diagnose(model, guide, Y, draws=100, progress=False)
    flow = FlowMixture([found.flow, copy.deepcopy(found.flow)], [Component(0), Component(1, -1.0)])
    z, log_q = flow.draw(100)
    log_p = found.density(z)
    weights = torch.log_softmax(log_p - log_q, 0).detach()
    return replace(found, flow=flow, z=z.detach(), log_p=log_p.detach(), log_q=log_q.detach(), log_weights=weights)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pf.Posterior, "_hand_on", lambda self, door: None)
        guide = pf.AutoRealNVP(model, layers=2)
        guide(Y)
        pf.diagnose(model, guide, Y, draws=200, progress=False).save(folder / "fit")
        of_mixture().save(folder / "mixture")
        chains = {"mu": torch.randn(2, 100), "tau": torch.rand(2, 100)}
        pf.from_mcmc(chains, model, Y).save(folder / "chains")
    fit_density("realnvp", POINTS, max_epochs=1, progress=False).save(folder / "density")
    fit_density("planar", POINTS, checkpoint=folder / "density.ckpt", **CHECKPOINTED)
    check(from_exact(), simulations=20, checkpoint=folder / "ranks.ckpt")
    made = pf.fit(model, Y, draws=1000, progress=False)
    pf.prior_from(made, "mu", max_epochs=2, progress=False).save(folder / "prior")
    return folder


# changes of what the files hold ---------------------------------------------------------------------------------------


def at(place, value):
    """Set an entry, ``place`` being names and numbers from the top."""

    def change(found):
        for name in place[:-1]:
            found = found[name]
        found[place[-1]] = value

    change.__name__ = f"{'.'.join(map(str, place))}={reprlib.repr(value)}"
    return change


def without(*place):
    """Remove an entry."""

    def change(found):
        for name in place[:-1]:
            found = found[name]
        del found[place[-1]]

    change.__name__ = f"without {'.'.join(map(str, place))}"
    return change


def nested(depth, wide=False):
    found = []
    for _ in range(depth):
        found = [found, found] if wide else [found]
    return found


def inners(depth):
    """A flow around a flow around a flow."""
    text = {"builder": "realnvp", "dim": 2, "base": "normal", "df": 15.0}
    for _ in range(depth):
        text = {"builder": "realnvp", "df": 15.0, "inner": text, "affine": "tril"}
    return text


SIZES = [
    *(("layers", value) for value in (10**6, 10**9, 2**63, 10**400, -1, 0, 1.5, "8", None, [1], True)),
    *(("hidden", value) for value in ([10**9], [10**5, 10**5], [32] * 10**4, [-5], [], "wide", {"a": 1}, [1e9], None)),
    *(("dim", value) for value in (10**9, 10**12, -2, 0, 2.5, "2", [2, 2], [], None, 3)),
    *(("context_dim", value) for value in (10**9, -1, "1", 3)),
    *(("base", value) for value in ("none", 5, None, ["normal"])),
    *(("df", value) for value in (-1.0, 0.0, "nan", None, [3.0])),
    *(("builder", value) for value in ("os.system", "__import__", None, 5, ["realnvp"], "glow", "nested", "mixture")),
    *(("mask", value) for value in ("none", 5, [1, 0])),
    *(("network", value) for value in ("none", 5)),
    *(("activation", value) for value in ("exec", 5)),
    *(("affine", value) for value in ("none", 5, "auto")),
    *(("preprocess", value) for value in ({}, {"full": 1}, 5, "whiten")),
    *(("bins", value) for value in (10**9, 8)),
    *(("unknown", value) for value in (1, None)),
]


def of_flow(place):
    """Changes of the description of a flow."""
    return [at((*place, name), value) for name, value in SIZES] + [
        at(place, {}),
        at(place, []),
        at(place, "realnvp"),
        at(place, 5),
        at(place, inners(300)),
        at(place, inners(40)),
        at(place, nested(400)),
        at(place, {"builder": "mixture", "flows": [inners(0)] * 20_000, "components": [[0, 1.0]]}),
        at(place, {"builder": "mixture", "flows": [inners(0)], "components": [[7, 1.0]]}),
        at(place, {"builder": "mixture", "flows": [], "components": []}),
        at(place, {"builder": "mixture"}),
        without(*place, "builder"),
        without(*place, "dim"),
        without(*place, "base"),
    ]


def first(state):
    """The name of a floating tensor with several entries."""
    return next(name for name, value in state.items() if value.is_floating_point() and value.numel() > 1)


def on_state(how, *place):
    """Change a tensor of a flow's state."""

    def change(found):
        for name in place:
            found = found[name]
        name = first(found)
        found[name] = WAYS[how](found[name])

    change.__name__ = f"{'.'.join(place)} {how}"
    return change


WAYS = {
    "nan": lambda value: torch.full_like(value, torch.nan),
    "doubled": lambda value: value.double(),
    "half": lambda value: value.half(),
    "whole": lambda value: value.long(),
    "imaginary": lambda value: value.to(torch.complex64),
    "longer": lambda value: torch.cat([value, value]),
    "flat": lambda value: value.reshape(-1)[:, None, None],
    "empty": lambda value: value[:0],
    "scalar": lambda value: value.sum(),
    "expanded": lambda value: torch.zeros(1).expand(10**12),
    "sparse": lambda value: value.to_sparse(),
    "number": lambda value: 3.0,
    "text": lambda value: "value",
    "far": lambda value: value + 5.0,
}
HOWS = [how for how in WAYS if how != "far"]


def on_tensor(how, *place):
    def change(found):
        for name in place[:-1]:
            found = found[name]
        found[place[-1]] = WAYS[how](found[place[-1]])

    change.__name__ = f"{'.'.join(map(str, place))} {how}"
    return change


def swapped(one, other):
    def change(found):
        found[one], found[other] = found[other], found[one]

    change.__name__ = f"{one} and {other} swapped"
    return change


class Planted:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


RECIPE = {"joint": [], "noncentered": {}, "seed": 0, "count": 4, "wide": False, "level_error": 0.0}
MANY = {**RECIPE, "count": 10**9}
TEXTS = {
    "posterior": [
        *(without(name) for name in ("numbers", "verdict", "settings", "history", "guide", "coordinates")),
        *(without("guide", name) for name in ("class", "flow")),
        *(without("verdict", name) for name in ("status", "k_hat", "where")),
        *(without("numbers", name) for name in ("k_hat", "elbo")),
        *(at(("verdict", "status"), value) for value in ("fine", None, 5, ["ok"])),
        *(at(("numbers", "ess"), value) for value in (None, "many", [1.0], True)),
        *(at(("settings",), value) for value in ([], None, "x")),
        *(at(("settings", "seed"), value) for value in (-5, "0", 1.5)),
        *(at(("settings", "integrated"), value) for value in ([], {}, MANY, {**RECIPE, "joint": [5]})),
        *(at(("history",), value) for value in ({}, [5], [{}], None)),
        *(at(("coordinates",), value) for value in (["a"], [], [5, 6], "ab", None, ["a"] * 10**5)),
        *(at(("labels",), value) for value in ({"coords": 5}, {"dims": {"mu": 5}}, {"other": {}}, 5)),
        *(at(("guide", "class"), value) for value in (None, 5)),
        at(("verdict", "chains"), {"chains": 4}),
        at(("verdict", "k_hat"), 10**400),
        at(("extra",), nested(5000)),
    ],
    "prior": [
        *(without(name) for name in ("flow", "parts", "status", "mean_shift")),
        *(at(("parts",), value) for value in ([], None, [5], {})),
        *(at(("parts", 0, "shape"), value) for value in ([10**9], [-1], "x", [3], None)),
        *(at(("parts", 0, "support"), value) for value in ({"kind": "exec"}, {}, None, nested(300))),
        at(("mean_shift",), "far"),
    ],
    "density": [
        *(without(name) for name in ("builder", "levels", "settings", "why", "validation")),
        *(at(("levels",), value) for value in ([1, 2, 3], [10], [-5, 1.0], ["a", "b"], 5, [256, 0.0], [256, "nan"])),
        *(at(("validation",), value) for value in ("good", None, [1])),
        *(at(("settings",), value) for value in (None, 5)),
        at(("why",), 5),
    ],
}
TENSORS = {
    "posterior": [
        *(on_tensor(how, name) for name in ("z", "log_p", "used") for how in HOWS[3:]),
        *(
            on_tensor(how, "samples", "mu")
            for how in ("longer", "empty", "scalar", "expanded", "sparse", "number", "text", "far")
        ),
        *(without(name) for name in ("z", "log_q", "log_weights", "used", "used_log_p", "losses", "samples", "flow")),
        *(at((name,), value) for name in ("samples", "flow") for value in ({}, [], 5, None)),
        swapped("log_p", "log_q"),
        swapped("z", "log_p"),
        on_tensor("far", "z"),
        at(("samples", 5), torch.zeros(200)),
        at(("chains",), {}),
        at(("chains",), {"z": torch.zeros(2, 3, 4), "stats": {}, "state": {}, "numbers": {"method": "hmc"}}),
    ],
    "density": [
        *(without(name) for name in ("flow", "losses", "checks")),
        *(at(("losses",), value) for value in (5, None, torch.zeros(3, 3), torch.zeros(3).long())),
        *(at(("flow",), value) for value in ({}, [], 5, None, {"a": torch.zeros(2)})),
    ],
    "prior": [],
}


def states(kind):
    place = () if kind == "prior" else ("flow",)
    return [on_state(how, *place) for how in HOWS if not (kind == "fit" and how == "doubled")]


BYTES = ["no pickle", "a pickle that runs", "an old pickle", "deflated", "a bomb", "cut", "wide", "a module", "empty"]


def changed_bytes(how, data, planted):
    """Return other bytes of tensors."""
    file = io.BytesIO()
    if how == "no pickle":
        return b"not a pickle at all"
    if how == "empty":
        return b""
    if how == "cut":
        return data[: len(data) // 2]
    if how == "a pickle that runs":
        torch.save({"z": Planted(planted)}, file)
    if how == "an old pickle":
        torch.save({"z": Planted(planted)}, file, _use_new_zipfile_serialization=False)
    if how == "a module":
        torch.save(torch.nn.Linear(2, 2), file)
    if how == "wide":
        torch.save({"z": nested(40, wide=True)}, file)
    if how in ("deflated", "a bomb"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as other:
            for one in archive.infolist():
                other.writestr(one.filename, archive.read(one))
            if how == "a bomb":
                other.writestr("archive/data/99", b"\0" * 10**8)
    return file.getvalue()


# the cases ------------------------------------------------------------------------------------------------------------

KINDS = {
    "fit": (POSTERIOR, "guide.pt", pf.load, "posterior"),
    "mixture": (POSTERIOR, "guide.pt", pf.load, "posterior"),
    "chains": (POSTERIOR, "guide.pt", pf.load, "posterior"),
    "density": (density_files.FILES, "density.pt", pf.DensityFit.load, "density"),
    "prior": (prior_files.FILES, "prior.pt", pf.FittedPrior.load, "prior"),
}
PLACES = {"fit": ("guide", "flow"), "density": ("builder",), "prior": ("flow",)}


def cases():
    """All cases: the kind of file, the part of it that is changed, and how."""
    found = []
    for kind, (_, _, _, of) in KINDS.items():
        if kind in ("fit", "density", "prior"):
            found += [(kind, "text", change) for change in (*TEXTS[of], *of_flow(PLACES[kind]))]
            found += [(kind, "tensors", change) for change in (*TENSORS[of], *states(kind))]
            found += [(kind, "bytes", how) for how in BYTES]
    found += [("mixture", "text", at(("guide", "flow", "flows"), [inners(0)] * 20_000))]
    found += [("mixture", "text", at(("guide", "flow", "components"), [[0, 1.0]] * 10**6))]
    found += [("mixture", "text", at(("guide", "flow", "components"), [[9, 1.0], [1, 0.5]]))]
    found += [("mixture", "tensors", on_tensor(how, "flow", "orders")) for how in ("empty", "number", "text")]
    found += [("chains", "tensors", on_tensor(how, "chains", "z")) for how in HOWS[3:]]
    found += [("chains", "text", at(("verdict", "chains", name), None)) for name in ("chains", "r_hat")]
    found += [("fit", "groups", how) for how in ("no posterior", "other draws", "fewer draws", "text", "cut")]
    return found


def name_of(case):
    kind, part, change = case
    return f"{kind} {part} {change if isinstance(change, str) else change.__name__}"


CASES = cases()


def damaged(case, good, folder):
    """Write a damaged file; return where."""
    kind, part, change = case
    bundle, tensors, _, _ = KINDS[kind]
    description, contents = bundle.read(good / kind)
    about = {name: value for name, value in description.items() if name not in ("format", "version", "digests")}
    if part == "text":
        change(about)
    elif part == "tensors":
        found = torch.load(io.BytesIO(contents[tensors]), weights_only=True)
        change(found)
        file = io.BytesIO()
        torch.save(found, file)
        contents[tensors] = file.getvalue()
    elif part == "bytes":
        contents[tensors] = changed_bytes(change, contents[tensors], folder / "planted")
    else:
        contents["posterior.nc"] = changed_groups(change, contents["posterior.nc"])
    target = folder / "damaged"
    try:
        bundle.write(target, plain(about), contents)
    except RecursionError:  # deeper than Python writes
        bundle.write(target, {}, contents)
        deep = "[" * 10**5 + "]" * 10**5
        written = (target / bundle.text).read_text(encoding="utf-8")
        (target / bundle.text).write_text(written[: written.rindex("}")] + f', "extra": {deep}}}')
    return target


def changed_groups(how, data):
    groups, attrs = read_groups(data)
    if how == "text":
        return b"no netCDF"
    if how == "cut":
        return data[: len(data) // 3]
    if how == "no posterior":
        del groups["posterior"]
    if how == "other draws":
        groups["posterior"] = groups["posterior"] + 1.0
    if how == "fewer draws":
        groups["posterior"] = groups["posterior"].isel(draw=slice(0, 10))
    return write_groups(groups, attrs)


def check_refused(case, good, folder):
    where = damaged(case, good, folder)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        KINDS[case[0]][2](where)
    said = str(caught.value)
    assert time.monotonic() - began < SECONDS
    assert str(where) in said
    assert "is damaged" in said or "was not written by pyro_flows" in said, said
    assert len(said.splitlines()) == 1
    assert len(said) < 1500
    assert "weights_only" not in said
    assert not (folder / "planted").exists()


QUICK = random.Random(0).sample(CASES, len(CASES) // EVERY)


@pytest.mark.parametrize("case", [pytest.param(case, id=name_of(case)) for case in QUICK])
def test_a_damaged_file_is_refused(good, tmp_path, case):
    check_refused(case, good, tmp_path)


@pytest.mark.slow
def test_there_are_three_hundred_cases():
    assert len(CASES) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name_of(case)) for case in CASES if case not in QUICK])
def test_each_damaged_file_is_refused(good, tmp_path, case):
    check_refused(case, good, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_files_are_read(good, kind):
    KINDS[kind][2](good / kind)


# checkpoints ----------------------------------------------------------------------------------------------------------

RANKS = [
    *(at(("done", 3, 0, "b"), value) for value in (None, [], "x", 7)),
    *(at(("done", 3, 0, "b"), torch.tensor(value)) for value in ([-5], [10**6], [1.5], [[1]])),
    *(at(("done", 3), value) for value in (None, {}, [], 5)),
    *(at(("done",), value) for value in (None, [], 5, {"x": {}}, {"x": [{}, "ok"]}, {-5: [{}, "ok"]})),
    *(at(("done", 3, 1), value) for value in ("fine", None, 5)),
    at(("done", 3, 0), {}),
    without("done"),
    without("about"),
]


def changed(file, change, target):
    """Write a checkpoint with other contents, and the digest of these."""
    found = torch.load(io.BytesIO(file.read_bytes()[len(checkpoints.FORMAT) :].partition(b"\n")[2]), weights_only=True)
    change(found)
    packed = io.BytesIO()
    torch.save(found, packed)
    target.write_bytes(checkpoints.FORMAT + digest(packed.getvalue()).encode() + b"\n" + packed.getvalue())


@pytest.mark.parametrize("change", [pytest.param(change, id=change.__name__) for change in RANKS])
def test_a_damaged_checkpoint_of_sbc_is_refused(good, tmp_path, change):
    changed(good / "ranks.ckpt", change, tmp_path / "ranks.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: .*damaged") as caught:
        check(from_exact(), simulations=20, checkpoint=tmp_path / "ranks.ckpt")
    assert str(tmp_path) in str(caught.value)


STATES = [
    *(without(name) for name in ("about", "weights", "average", "moments", "state", "random", "buffers")),
    *(at((name,), value) for name in ("weights", "average", "state", "moments") for value in ([], {}, 5, None)),
    *(at(("state", "steps"), value) for value in (-5, "many", None)),
    *(
        on_tensor(how, "weights", 0)
        for how in ("nan", "longer", "empty", "number", "text", "doubled", "whole", "expanded")
    ),
    at(("random",), torch.zeros(3)),
    at(("about",), {}),
]


@pytest.mark.parametrize("change", [pytest.param(change, id=change.__name__) for change in STATES])
def test_a_damaged_checkpoint_of_a_density_is_refused(good, tmp_path, change):
    file = tmp_path / "density.ckpt"
    changed(good / "density.ckpt", change, file)
    with pytest.raises(ValueError, match=r"^checkpoint: .*(damaged|of another)") as caught:
        fit_density("planar", POINTS, checkpoint=Path(file), **CHECKPOINTED)
    assert str(file) in str(caught.value)
    assert "weights_only" not in str(caught.value)
