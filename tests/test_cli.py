"""The command line: data from files, a fit, the demo, and one clear line for each mistake."""

import dataclasses
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_flows as pf
from pyro_flows import cli
from pyro_flows.cli import app
from pyro_flows.support.files.inputs import match, read_data, read_model
from pyro_flows.support.process.interrupts import interruptible
from tests.registry import FLOWS

MODEL = """
import pyro
import pyro.distributions as dist
from helper import SPREAD

NOTHING = 3

def schools(y, sigma, count=8):
    mu = pyro.sample("mu", dist.Normal(0.0, SPREAD))
    with pyro.plate("school", count):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)

def broken(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    raise RuntimeError("first line\\nsecond line")

def discrete(y, sigma):
    pyro.sample("k", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

def wrong(y, sigma):
    float("x")

def scale(y, sigma):
    pyro.sample("mu", dist.Normal(0.0, -1.0))
"""
ROOT = Path(__file__).parent.parent
Y = [28, 8, -3, 7, -1, 1, 18, 12]
SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("SPREAD = 5.0\n")
    (tmp_path / "data.json").write_text(json.dumps({"y": Y, "sigma": SIGMA}))
    return tmp_path


@pytest.fixture(autouse=True)
def _imports_undone():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("helper", "package") or name.startswith("_pyro_flows_model_"):
            del sys.modules[name]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# data -----------------------------------------------------------------------------------------------------------------


def test_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"n": 8, "flag": true, "x": [1, 2], "y": [[1, 2.5], [3, 4]], "mask": [true, false], "scale": 0.5}')
    found = read_data(path)
    assert found["n"] == 8
    assert isinstance(found["n"], int)
    assert found["flag"] is True
    assert found["x"].dtype == torch.int64
    torch.testing.assert_close(found["y"], torch.tensor([[1.0, 2.5], [3.0, 4.0]]))
    assert found["mask"].dtype == torch.bool
    torch.testing.assert_close(found["scale"], torch.tensor(0.5))


def test_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("﻿y, count\n1.5,2\n-3e2,4\n\n", encoding="utf-8")
    found = read_data(path)
    torch.testing.assert_close(found["y"], torch.tensor([1.5, -300.0]))
    torch.testing.assert_close(found["count"], torch.tensor([2, 4]))


def test_integers_where_torch_takes_none_are_named(tmp_path):
    (tmp_path / "models.py").write_text(
        "import torch, pyro, pyro.distributions as dist\n"
        "def linear(x, z, y):\n"
        "    w = pyro.sample('w', dist.Normal(torch.zeros(2), 1.0).to_event(1))\n"
        "    with pyro.plate('row', len(y)):\n"
        "        pyro.sample('y', dist.Normal(torch.stack((x, z), -1) @ w, 1.0), obs=y)\n"
    )
    (tmp_path / "data.csv").write_text("x,z,y\n1,2,0.5\n2,1,1.5\n")
    found = run("fit", f"{tmp_path / 'models.py'}:linear", "--data", tmp_path / "data.csv", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "The data have integers in x, z. Write x.float() in the model, or decimals there (--debug" in found.output


def test_npz(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, y=np.array([1.0, 2.0]), count=np.array([1, 2], dtype=np.int32), n=np.array(3), mask=np.array([True]))
    found = read_data(path)
    torch.testing.assert_close(found["y"], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found["count"], torch.tensor([1, 2]))
    assert found["n"] == 3
    assert found["mask"].dtype == torch.bool


def test_floats_follow_the_default_dtype(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"y": [0.1]}')
    torch.set_default_dtype(torch.float64)
    try:
        assert read_data(path)["y"].dtype == torch.float64
        assert read_data(path)["y"].item() == 0.1
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a\.json is not JSON: Expecting property name"),
        ("a.json", '{"y": ' + "9" * 5000 + "}", r"a\.json is not JSON: Exceeds the limit"),
        ("a.json", "[" * 100_000, r"a\.json is nested too deeply"),
        ("a.json", '{"y": [1], "y": [2]}', r"expected distinct names in a\.json, got y twice"),
        ("a.json", '{"y": [18446744073709551615]}', r"field 'y': expected integers below 2\*\*63"),
        ("a.json", '{"y": [1, 100000000000000000000]}', r"field 'y': expected integers below 2\*\*63"),
        ("a.json", b'{"y": "\xe9"}', r"expected UTF-8 text in a\.json"),
        ("a.csv", b"caf\xe9\n1\n", r"expected UTF-8 text in a\.csv: .* Save it with that encoding"),
        ("a.csv", "y\n1\n2,3\n", r"a\.csv is not CSV: .*Expected 1 fields in line 3, saw 2"),
        ("a.npz", b"", r"a\.npz is not an npz file of plain arrays\. Write one with numpy\.savez"),
        ("a.npz", b"\x93NUMPY", r"a\.npz is not an npz file of plain arrays"),
        ("a.json", "[1]", r"expected an object .* in a\.json, got a list"),
        ("a.json", "{}", r"a\.json has no fields"),
        ("a.json", '{"y": [1, null, NaN]}', r"field 'y': 2 of 3 values are missing or NaN.*obs_mask"),
        ("a.json", '{"y": [[1], [1, 2]]}', r"field 'y': expected lists of equal lengths"),
        ("a.json", '{"y": "text"}', r"field 'y': expected numbers, got 'text'"),
        ("a.json", '{"y": {"z": 1}}', r"field 'y': expected numbers"),
        ("a.csv", "y\n", r"expected a header and rows of numbers in a\.csv, got 1 lines"),
        ("a.csv", "y,y\n1,2\n", r"expected distinct column names"),
        ("a.csv", "x,y\n1,2\n3\n", r"a\.csv, row 3, column 'y': expected a number, got nothing"),
        ("a.csv", "x,y\n1,2\n3,\n", r"a\.csv, row 3, column 'y': expected a number, got nothing"),
        ("a.csv", "x,y\n1,2\n3,abc\n", r"row 3, column 'y': expected a number, got 'abc'"),
        ("a.csv", "y\n1\nnan\n", r"field 'y': 1 of 2 values are missing or NaN"),
        ("a.npz", "no archive", r"a\.npz is not an npz file of plain arrays"),
        ("a.txt", "", r"suffix of a\.txt: expected one of 'csv', 'json', 'npz', got 'txt'"),
    ],
)
def test_data_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / name)


def test_damaged_archives_and_directories_are_no_data(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, y=np.arange(1000.0))
    whole = path.read_bytes()
    for damaged in (whole[:200], whole[:100] + bytes(60) + whole[160:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.npz is not an npz file of plain arrays"):
            read_data(path)
    np.savez(path, y=np.array([2**64 - 1], dtype=np.uint64))
    with pytest.raises(ValueError, match=r"field 'y': expected integers below 2\*\*63"):
        read_data(path)
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ValueError, match=r"b\.json' is a directory"):
        read_data(tmp_path / "b.json")


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"n": 3}', encoding="utf-8")
    assert read_data(tmp_path / "a.json") == {"n": 3}


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", y=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not an npz file of plain arrays"):
        read_data(tmp_path / "a.npz")


def test_matching_fields_with_parameters():
    def model(y, sigma=1.0, *, n): ...

    assert match(model, {"y": 1, "n": 2}) == {"y": 1, "n": 2}
    with pytest.raises(ValueError, match=r"parameter of the model \(y, sigma, n\); no field for 'n'; .*the fields 'z'"):
        match(model, {"y": 1, "z": 2})
    assert match(lambda **anything: None, {"a": 1}) == {"a": 1}

    class Module(torch.nn.Module):
        def forward(self, x): ...

    assert match(Module(), {"x": 1}) == {"x": 1}
    with pytest.raises(ValueError, match=r"parameters 'x' cannot be passed by name \(positional-only\)"):
        match(eval("lambda x, /: None"), {"x": 1})


# models ---------------------------------------------------------------------------------------------------------------


def test_models_may_import_their_neighbors(folder):
    assert read_model(f"{folder}/models.py:schools").__name__ == "schools"


@pytest.mark.parametrize("name", ["statistics.py", "torch.py", "model-1.py", "model.v1.py", "helper2.py", "class.py"])
def test_a_model_file_replaces_no_module(tmp_path, name):
    folder = tmp_path / "a folder"
    folder.mkdir()
    text = "import statistics, torch\n" + MODEL + "ABOVE = statistics.fmean, torch.randn\n"
    (folder / name).write_text(text)
    (folder / "helper.py").write_text("SPREAD = 5.0\n")
    before, path = dict(sys.modules), list(sys.path)
    model = read_model(f"{folder / name}:schools")
    assert model.__globals__["ABOVE"] == (statistics.fmean, torch.randn)
    assert {key: sys.modules[key] for key in before} == before
    assert sys.path == [*path, str(folder)]
    assert pickle.loads(pickle.dumps(model)) is model


def test_files_of_one_name_live_side_by_side(tmp_path):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "models.py").write_text("from .helper import NAME\ndef model(): return NAME\n")
        found.append(read_model(f"{tmp_path / name / 'models.py'}:model"))
    assert [model() for model in found] == ["first", "second"]
    assert [pickle.loads(pickle.dumps(model)) for model in found] == found


def test_a_model_file_in_a_package(tmp_path):
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("from package.helper import ONE\n")
    (tmp_path / "package" / "helper.py").write_text("ONE = 1\n")
    (inner / "__init__.py").write_text("TWO = 2\n")
    (inner / "models.py").write_text(
        "from . import TWO\nfrom .. import ONE\nfrom ..helper import ONE as SAME\nimport package.helper\n"
        "def model(): return ONE, SAME, package.helper.ONE, TWO\n"
    )
    assert read_model(f"{inner}/models.py:model")() == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(4)\n", r"ends the program when it is run \(SystemExit: 4\).*__name__ == '__main__'"),
        ("from statistics import SPREAD\n", r"imports from 'statistics', which is .* `from \.statistics import "),
        ("from time import SPREAD\n", r"imports from 'time', which is a module of Python and not"),
    ],
)
def test_a_model_file_that_does_not_run_leaves_nothing_behind(tmp_path, text, message):
    (tmp_path / "models.py").write_text("from .helper import SPREAD\n" + text)
    for name in ("helper", "statistics", "time"):
        (tmp_path / f"{name}.py").write_text("SPREAD = 5.0\n")
    before, path = set(sys.modules), list(sys.path)
    with pytest.raises(ValueError, match=message):
        read_model(f"{tmp_path}/models.py:model")
    assert set(sys.modules) == before
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 3\n", r"expected 'model' in .*models\.py, which defines no function"),
        ("class model:\n    def __call__(self): ...\n", r"'model' in .* is a class\. Make an instance"),
    ],
)
def test_files_without_a_model(tmp_path, text, message):
    (tmp_path / "models.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_model(f"{tmp_path}/models.py:model")


def test_a_package_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        read_model(f"{tmp_path}:model")


# the commands ---------------------------------------------------------------------------------------------------------


def test_fit_writes_what_it_says(folder):
    out = folder / "results"
    arguments = ("fit", f"{folder}/models.py:schools", "--data", folder / "data.json", "--out", out)
    options = ("--flow", "planar", "--layers", "2", "--draws", "500", "--max-steps", "300", "--seed", "3")
    done = run(*arguments, *options)
    posterior = pf.load(out)
    assert posterior.verdict.status in ("ok", "corrected", "refined")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(str(posterior.verdict))
    assert "mcse_mean" in done.stdout
    assert len(posterior.samples["mu"]) >= 500
    assert posterior.settings["seed"] == 3
    assert posterior.flow.recipe.options["layers"] == 2
    files = {path.name for path in out.iterdir()}
    assert files == {"posterior.nc", "guide.pt", "posterior.json", "posterior.png"}  # the start left nothing to train
    assert posterior.method == "Gaussian"
    assert "No flow was trained (Gaussian)" in done.stdout
    assert f"Wrote guide.pt, posterior.json, posterior.nc, posterior.png to {out}." in done.stdout
    precision = sum(s**-2 for s in SIGMA) + 1 / 25
    mean = sum(y / s**2 for y, s in zip(Y, SIGMA, strict=True)) / precision
    assert float(posterior.samples["mu"].mean()) == pytest.approx(mean, abs=5 * (precision * 500) ** -0.5)
    assert run(*arguments, *options).exit_code == 0  # over its own earlier results


def test_demo(tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--seed", "1", "--max-steps", "250")
    assert done.exit_code == (3 if pf.load(out).verdict.status == "unreliable" else 0), done.output
    expected = {"posterior.nc", "guide.pt", "posterior.json", "posterior.png", "pairs.png"}
    assert {path.name for path in out.iterdir()} == expected
    posterior = pf.load(out)
    assert posterior.method == "conditional Laplace grid"
    assert "No flow was trained (conditional Laplace grid), so there is no elbo.png." in done.stdout
    assert list(posterior.samples) == ["mu", "tau", "eta", "theta"]
    assert str(posterior.verdict) in done.stdout
    assert "theta[7]" in done.stdout
    assert "For comparison, a full-rank Gaussian guide: " in done.stdout


def test_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pyro_flows", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "fit" in done.stdout


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A posterior to be returned in place of a fit, and the arguments of a command that would fit it."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "models.py").write_text(MODEL.replace("from helper import SPREAD", "SPREAD = 5.0"))
    (folder / "data.json").write_text(json.dumps({"y": Y, "sigma": SIGMA}))
    model = read_model(f"{folder}/models.py:schools")
    arguments = read_data(folder / "data.json")
    posterior = pf.fit(model, model_kwargs=arguments, flow="planar", draws=200, max_steps=200, progress=False)
    return posterior, ("fit", f"{folder}/models.py:schools", "--data", folder / "data.json")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("corrected", 0), ("refined", 0), ("unreliable", 3)])
def test_the_exit_code_is_the_verdict(fitted, tmp_path, monkeypatch, status, code):
    posterior, arguments = fitted
    judged = dataclasses.replace(posterior, verdict=dataclasses.replace(posterior.verdict, status=status))
    monkeypatch.setattr(cli, "fit", lambda *args, **options: judged)
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == code, done.output
    assert done.stdout.startswith(f"{status}: ")
    assert done.stderr == ""
    assert (tmp_path / "out" / "posterior.nc").is_file()


def test_options_reach_the_fit(fitted, tmp_path, monkeypatch):
    posterior, arguments = fitted
    seen = []
    monkeypatch.setattr(cli, "fit", lambda *args, **options: seen.append(options) or posterior)
    run(*arguments, "--out", tmp_path / "plain")
    run(
        *(*arguments, "--out", tmp_path / "full", "--flow", "spline", "--layers", "3", "--draws", "200", "--runs", "4"),
        *("--seed", "5", "--max-steps", "7", "--max-seconds", "2.5", "--no-escalate", "--no-refine", "--train-model"),
        *("--progress", "--checkpoint", tmp_path / "kept"),
    )
    plain, full = ({key: value for key, value in options.items() if key != "model_kwargs"} for options in seen)
    assert plain == {
        **{"flow": "auto", "layers": None, "draws": 4000, "runs": 1, "seed": 0, "max_steps": None},
        **{"max_seconds": float("inf"), "escalate": True, "refine": "auto", "train_model": False, "progress": False},
        "checkpoint": None,
    }
    assert full == {
        **{"flow": "spline", "layers": 3, "draws": 200, "runs": 4, "seed": 5, "max_steps": 7, "max_seconds": 2.5},
        **{"escalate": False, "refine": False, "train_model": True, "progress": True},
        "checkpoint": tmp_path / "kept",
    }


def test_help_names_every_flow_for_vectors_and_the_exit_codes():
    shown = " ".join(run("fit", "--help").stdout.split())
    assert ", ".join(["auto", *sorted(FLOWS)]) in shown
    assert "3 if it is unreliable" in shown
    for option in ("--runs", "--max-seconds", "--layers", "--seed", "--draws", "--escalate", "--train-model"):
        assert option in shown


def test_version():
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"pyro-flows {pf.__version__} (Python {sys.version.split()[0]}, torch ")


def test_ctrl_c_during_a_fit_is_one_line(fitted, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli, "fit", interrupted)
    before = signal.getsignal(signal.SIGINT)
    done = run(*fitted[1], "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stdout == ""
    assert done.stderr == "pyro-flows: interrupted; no complete results were written.\n"
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("command", ["fit", "demo"])
def test_ctrl_c_in_a_fit_that_returns_its_best_so_far_writes_the_results(fitted, tmp_path, monkeypatch, command):
    posterior, arguments = fitted

    def interrupted(*args, **options):
        try:
            with interruptible():
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return posterior
        raise AssertionError("no interrupt came")

    monkeypatch.setattr(cli, "fit", interrupted)
    done = run(*(arguments if command == "fit" else ("demo",)), "--out", tmp_path / "out")
    assert done.exit_code == 130, done.output
    assert done.stdout.startswith(str(posterior.verdict))
    assert done.stderr == "pyro-flows: interrupted; these are the best results so far.\n"
    assert pf.load(tmp_path / "out").verdict.status == posterior.verdict.status


# mistakes -------------------------------------------------------------------------------------------------------------


def refused(done):
    """The error line, after checking that there is nothing else."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pyro-flows: error: ")
    return lines[0]


def test_a_checkpoint_of_something_else_is_refused(folder, tmp_path):
    (tmp_path / "kept").write_bytes(b"pyro_flows density checkpoint 2\n")
    done = run(
        *("fit", f"{folder}/models.py:schools", "--data", folder / "data.json", "--out", tmp_path / "out"),
        *("--checkpoint", tmp_path / "kept"),
    )
    assert refused(done).startswith("pyro-flows: error: checkpoint: expected one of this release, got that of")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere.py:schools", (), "no file '"),
        ("models.py", (), "expected FILE.py:NAME, for example models.py:eight_schools"),
        ("models.py:shcools", (), "got 'shcools'. Did you mean 'schools'?"),
        ("models.py:NOTHING", (), "expected a callable, 'NOTHING'"),
        ("data.json:schools", (), "expected a Python file"),
        ("models.py:schools", ("--flow", "realnpv"), "got 'realnpv'. Did you mean 'realnvp'?"),
        ("models.py:schools", ("--data", "nowhere.json"), "data: no file 'nowhere.json'"),
        ("models.py:broken", (), "RuntimeError: first line (models.py, line 15) (--debug shows the traceback)"),
        ("models.py:scale", (), "found invalid values: -1.0 (models.py, line 25) (--debug"),
        ("models.py:wrong", (), "ValueError: could not convert string to float: 'x' (models.py, line 22) (--debug"),
        ("models.py:discrete", (), "site 'k': expected a continuous latent, got the discrete Poisson"),
    ],
)
def test_mistakes_are_one_line(folder, model, options, message):
    options = ("--data", folder / "data.json", "--out", folder / "out", *options)
    line = refused(run("fit", f"{folder}/{model}", *options))
    assert message in line
    assert "Traceback" not in line
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"y": Y}, "no field for 'sigma'"),
        ({"y": Y, "sigma": SIGMA, "tau": 1}, "no parameter for the fields 'tau'"),
        ({"y": [*Y[:7], None], "sigma": SIGMA}, "field 'y': 1 of 8 values are missing or NaN"),
    ],
)
def test_data_that_do_not_fit_the_model(folder, data, message):
    (folder / "other.json").write_text(json.dumps(data))
    model = f"{folder}/models.py:schools"
    assert message in refused(run("fit", model, "--data", folder / "other.json", "--out", folder / "out"))


def test_a_model_file_that_does_not_run(folder):
    (folder / "models.py").write_text("x = (\n")
    arguments = ("fit", f"{folder}/models.py:schools", "--data", folder / "data.json", "--out", folder / "out")
    assert "SyntaxError: '(' was never closed (models.py, line 1) (--debug shows the traceback)" in refused(
        run(*arguments)
    )


def test_folders_with_other_content_are_refused_before_the_fit(folder):
    arguments = ("fit", f"{folder}/models.py:schools", "--data", folder / "data.json", "--out", folder)
    assert "holds other files and no saved posterior" in refused(run(*arguments))
    assert "holds other files" in refused(run("demo", "--out", folder))


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_places_where_nothing_can_be_written_are_refused_before_the_fit(folder, monkeypatch, kind):
    def never(*args, **options):
        raise AssertionError("the fit began")

    monkeypatch.setattr(cli, "fit", never)
    out = {"file": "data.json", "below a file": "data.json/a/b", "dangling link": "link"}[kind]
    (folder / "link").symlink_to(folder / "nowhere")
    before = set(folder.rglob("*"))
    for command in (("fit", f"{folder}/models.py:schools", "--data", folder / "data.json"), ("demo",)):
        assert "out: expected a directory" in refused(run(*command, "--out", folder / out))
    assert {path for path in folder.rglob("*") if "__pycache__" not in path.parts} == before


def test_debug_shows_the_traceback(folder):
    arguments = (
        "fit",
        f"{folder}/models.py:broken",
        "--data",
        folder / "data.json",
        "--out",
        folder / "out",
        "--debug",
    )
    done = run(*arguments)
    assert isinstance(done.exception.__cause__, RuntimeError)
    assert done.exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit",),
        ("demo", "--sed", "1"),
        ("fit", "m.py:m", "--data", "d", "--out", "o", "--draws", "5"),
        ("fit", "m.py:m", "--data", "d", "--out", "o", "--runs", "0"),
        ("fit", "m.py:m", "--data", "d", "--out", "o", "--max-seconds", "-1"),
        ("fit", "m.py:m", "--data", "d", "--out", "o", "--max-seconds", "nan"),
    ],
)
def test_usage_errors(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
