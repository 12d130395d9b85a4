"""The command line: data from files, a fit, the demo, and one clear line for each mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_flows as pf
from pyro_flows.cli import app
from pyro_flows.data import match, read_data, read_model

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
"""
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
    for name in ("models", "helper"):
        if name not in modules:
            sys.modules.pop(name, None)


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
        ("a.json", "[1]", r"expected an object .* in a\.json, got a list"),
        ("a.json", "{}", r"a\.json has no fields"),
        ("a.json", '{"y": [1, null, NaN]}', r"field 'y': 2 of 3 values are missing or NaN.*obs_mask"),
        ("a.json", '{"y": [[1], [1, 2]]}', r"field 'y': expected lists of equal lengths"),
        ("a.json", '{"y": "text"}', r"field 'y': expected numbers, got 'text'"),
        ("a.json", '{"y": {"z": 1}}', r"field 'y': expected numbers"),
        ("a.csv", "y\n", r"expected a header and rows of numbers in a\.csv, got 1 lines"),
        ("a.csv", "y,y\n1,2\n", r"expected distinct column names"),
        ("a.csv", "x,y\n1,2\n3\n", r"a\.csv, row 3: expected 2 values, got 1"),
        ("a.csv", "x,y\n1,2\n3,\n", r"a\.csv, row 3, column 'y': expected a number, got nothing"),
        ("a.csv", "x,y\n1,2\n3,abc\n", r"row 3, column 'y': expected a number, got 'abc'"),
        ("a.csv", "y\n1\nnan\n", r"field 'y': 1 of 2 values are missing or NaN"),
        ("a.npz", "no archive", r"a\.npz is not an npz file of plain arrays"),
        ("a.txt", "", r"suffix of a\.txt: expected one of 'csv', 'json', 'npz', got 'txt'"),
    ],
)
def test_data_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / name)


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


def test_models_may_import_their_neighbours(folder):
    assert read_model(f"{folder}/models.py:schools").__name__ == "schools"


# the commands ---------------------------------------------------------------------------------------------------------


def test_fit_writes_what_it_says(folder):
    out = folder / "results"
    arguments = ("fit", f"{folder}/models.py:schools", "--data", folder / "data.json", "--out", out)
    options = ("--flow", "planar", "--layers", "2", "--draws", "500", "--max-steps", "300", "--seed", "3")
    done = run(*arguments, *options)
    assert done.exit_code == 0, done.output
    posterior = pf.load(out)
    assert done.stdout.startswith(str(posterior.verdict))
    assert "mcse_mean" in done.stdout
    assert posterior.samples["mu"].shape == (500,)
    assert posterior.settings["seed"] == 3
    assert posterior.flow.settings["layers"] == 2
    files = {path.name for path in out.iterdir()}
    assert files == {"posterior.nc", "guide.pt", "posterior.json", "elbo.png", "posterior.png"}
    assert f"Wrote elbo.png, guide.pt, posterior.json, posterior.nc, posterior.png to {out}." in done.stdout
    precision = sum(s**-2 for s in SIGMA) + 1 / 25
    mean = sum(y / s**2 for y, s in zip(Y, SIGMA, strict=True)) / precision
    assert float(posterior.samples["mu"].mean()) == pytest.approx(mean, abs=5 * (precision * 500) ** -0.5)
    assert run(*arguments, *options).exit_code == 0  # over its own earlier results


def test_demo(tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--seed", "1", "--max-steps", "250")
    assert done.exit_code == 0, done.output
    expected = {"posterior.nc", "guide.pt", "posterior.json", "elbo.png", "posterior.png", "pairs.png"}
    assert {path.name for path in out.iterdir()} == expected
    posterior = pf.load(out)
    assert list(posterior.samples) == ["mu", "tau", "eta", "theta"]
    assert str(posterior.verdict) in done.stdout
    assert "theta[7]" in done.stdout
    assert "For comparison, a full-rank Gaussian guide: " in done.stdout


def test_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pyro_flows", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "fit" in done.stdout


# mistakes -------------------------------------------------------------------------------------------------------------


def refused(done):
    """The error line, after checking that there is nothing else."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pyro-flows: error: ")
    return lines[0]


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
        ("models.py:broken", (), "RuntimeError: first line"),
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
    assert isinstance(done.exception, RuntimeError)
    assert done.exit_code == 1


@pytest.mark.parametrize(
    "arguments", [("fit",), ("demo", "--sed", "1"), ("fit", "m.py:m", "--data", "d", "--draws", "5")]
)
def test_usage_errors(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
