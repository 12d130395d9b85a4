"""The Makefile: which environment a target takes, what it installs, what it leaves alone. Pythons here are scripts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mutations import EDITS

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# A Python that knows its version, makes environments, and writes down what pip and the package are asked to do.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info?:2*) echo {version} ;;
  *"version_info >= "*) [ {new} = yes ] && echo True || echo False ;;
  "-m venv "*)
    shift 2
    [ "$1" = --clear ] && shift && rm -rf "$1"
    echo "venv $*" >> log
    mkdir -p "$1/bin" && cp "$0" "$1/bin/python" && touch "$1/pyvenv.cfg" "$1/has-pip"
    for tool in pyro-flows ruff mypy; do printf '#!/bin/sh\\necho %s "$*" >> log\\n' $tool > "$1/bin/$tool"; done
    chmod +x "$1"/bin/* ;;
  "-m pip --version") [ -e "$(dirname "$0")/../has-pip" ] ;;
  *"import sys, pip"*) echo {version} ;;
  "-m pip show "*) exit 1 ;;
  *) echo "{version} $*" >> log ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile and two Pythons in front of the path."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "pyro_flows/model/graphs/interpreter.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, version in (("python3", "3.11"), ("python3.13", "3.13"), ("python3.9", "3.9")):
        text = PYTHON.format(version=version, new="no" if version == "3.9" else "yes")
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def make(project, *arguments, **environment):
    """Run make as a user would, whatever make or variables the tests themselves run under."""
    known = ("PYTHON", "VENV", "ARGS", "TORCH", "PIP_ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    kept = {name: value for name, value in os.environ.items() if name not in known}
    kept["PATH"] = f"{project / 'programs'}{os.pathsep}{kept['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=project, env={**kept, **environment}, capture_output=True, text=True, timeout=60
    )


def log(project):
    """What was done since the last call."""
    path = project / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def done(project, *arguments, **environment):
    result = make(project, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return log(project)


def refused(project, *arguments, **environment):
    """The sentence of a target that does nothing."""
    before = sorted(project.rglob("*"))
    result = make(project, *arguments, **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert log(project) == []
    assert sorted(project.rglob("*")) == before
    return result.stderr.splitlines()[0]


DEMO = "3.11 -m pyro_flows demo --out demo-output"


def test_the_demo_installs_the_package_and_no_development_tools(project):
    result = make(project, "demo")
    assert result.returncode == 0, result.stderr
    assert log(project) == ["venv .venv", "3.11 -m pip install --upgrade pip", "3.11 -m pip install -e .", DEMO]
    first = result.stdout.splitlines()[0]
    assert first.startswith("Installing pyro-flows and the libraries that it runs on into .venv, with Python 3.11; ")
    assert "3 GB with CUDA" in first
    assert "README.md" in first
    assert done(project, "demo") == [DEMO]


def test_development_tools_come_with_the_targets_that_need_them(project):
    done(project, "demo")
    assert done(project, "test")[:2] == ["3.11 -m pip install --upgrade pip", "3.11 -m pip install -e .[dev]"]
    assert done(project, "lint") == ["ruff check .", "ruff format --check .", "mypy "]
    assert done(project, "demo") == [DEMO]


def test_development_tools_bring_the_package(project):
    result = make(project, "venv")
    assert "what development needs (pytest, ruff, mypy) into .venv" in result.stdout.splitlines()[0]
    assert log(project)[-1] == "3.11 -m pip install -e .[dev]"
    assert done(project, "demo") == [DEMO]
    assert done(project, "docs")[0] == "3.11 -m pip install -e .[docs]"


def test_environments_of_two_pythons_stand_side_by_side(project):
    done(project, "demo", PYTHON="python3.13")
    (project / ".venv" / "mine").touch()
    assert done(project, "demo")[0] == "venv .venv-3.11"
    assert (project / ".venv" / "mine").exists()
    assert done(project, "demo") == [DEMO]
    assert done(project, "demo", PYTHON="python3.13") == ["3.13 -m pyro_flows demo --out demo-output"]
    assert done(project, "test", "PYTHON=python3.13")[-1].startswith("3.13 -m pytest")


def test_an_environment_that_is_named_is_taken(project):
    assert done(project, "demo", "VENV=env")[0] == "venv env"
    assert done(project, "demo", VENV="env") == [DEMO]
    assert not (project / ".venv").exists()
    assert done(project, "demo", VENV="")[0] == "venv .venv"


def test_an_unfinished_environment_is_completed(project):
    done(project, "venv")
    (project / ".venv" / "has-pip").unlink()
    (project / ".venv" / ".stamp-3.11-dev").unlink()
    (project / ".venv" / "mine").touch()
    assert done(project, "venv")[0] == "venv .venv"
    assert (project / ".venv" / "mine").exists()


def test_changed_requirements_are_installed(project):
    done(project, "venv")
    later = (project / ".venv" / ".stamp-3.11-dev").stat().st_mtime + 10
    os.utime(project / "pyproject.toml", (later, later))
    assert "3.11 -m pip install -e ." in done(project, "demo")


def test_another_build_of_torch_and_arguments_of_pip(project):
    options = {"TORCH": "torch --index-url cpu", "PIP_ARGS": "--quiet"}
    result = make(project, "demo", **options)
    assert "PyTorch comes as TORCH= says" in result.stdout.splitlines()[0]
    pip = "3.11 -m pip install --quiet"
    wanted = [f"{pip} --upgrade pip", f"{pip} torch --index-url cpu", f"{pip} -e .", DEMO]
    assert log(project) == ["venv .venv", *wanted]
    assert done(project, "demo", *(f"{name}={value}" for name, value in options.items())) == wanted  # never ignored
    assert done(project, "demo") == [DEMO]


def test_an_environment_of_another_python_is_left_alone(project):
    done(project, "demo", "VENV=env")
    said = refused(project, "demo", "VENV=env", "PYTHON=python3.13")
    assert said.startswith(
        "VENV='env' has Python 3.11, but 'python3.13' is Python 3.13. It is left alone: leave out VENV="
    )


def test_a_broken_environment_is_left_alone(project):
    done(project, "demo")
    (project / ".venv" / "bin" / "python").unlink()
    (project / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    said = refused(project, "demo")
    assert said.startswith("The Python of the virtual environment '.venv' does not run")
    assert "make VENV=.venv-3.11 test" in said
    assert done(project, "demo", "VENV=.venv-3.11")[0] == "venv .venv-3.11"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_environment_is_left_alone(project, kind):
    {
        "folder": lambda path: path.mkdir(),
        "file": lambda path: path.touch(),
        "link": lambda path: path.symlink_to("nowhere"),
    }[kind](project / ".venv")
    assert refused(project, "test").startswith(
        "VENV='.venv' is there but is no virtual environment, so it is left alone."
    )


def test_a_name_with_a_space_is_refused(project):
    assert "VENV='my env' has a space in it" in refused(project, "demo", "VENV=my env")


@pytest.mark.parametrize(("python", "said"), [("python3.9", "is Python 3.9"), ("nowhere", "does not run")])
def test_pythons_that_will_not_do(project, python, said):
    assert f"needs Python 3.11 or newer, but '{python}' {said}." in refused(project, "demo", PYTHON=python)


def test_targets_that_install_nothing_need_no_environment(project):
    assert "make demo " in make(project).stdout
    assert done(project, "clean") == []
    assert not (project / ".venv").exists()


def test_the_wheel_is_installed_in_an_environment_of_its_own(project):
    (project / "tests").mkdir()
    (project / "build").mkdir()
    done(project, "dist")  # the environment for development
    clean = project / "build" / "wheel-3.11"
    (clean / "left-over").touch()
    (project / "build" / "log").unlink()
    wanted = ["3.11 -m build", "3.11 -m twine check --strict dist/*", "venv build/wheel-3.11"]
    assert done(project, "dist", PIP_ARGS="") == [*wanted, "3.11 -m pip install dist/*.whl"]
    assert not (clean / "left-over").exists()
    inside = (project / "build" / "log").read_text().splitlines()
    assert inside == ["3.11 ../tests/markdown.py ../README.md", "pyro-flows demo --out ../build/wheel-3.11/demo-output"]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.file)
def test_each_mistake_of_make_mutation_can_be_made(edit):
    """What it replaces stands in its file once, and its tests are there."""
    assert (ROOT / "pyro_flows" / edit.file).read_text(encoding="utf-8").count(edit.right) == 1
    assert all((ROOT / place).exists() for place in edit.tests.split())
