"""What ``import pyro_flows as pf`` offers: names, modules, and how little it loads."""

import importlib
import operator
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pyro_flows as pf

DOCS = Path(__file__).parent.parent.parent / "docs"
MODULES = ["datasets", "objectives", "plots", "transforms"]


def test_the_public_modules():
    assert sorted(name for name in pf.__all__ if isinstance(getattr(pf, name), ModuleType)) == MODULES


def test_all_public_names_are_there_and_dir_lists_them_alone():
    assert sorted(pf.__all__) == sorted(set(pf.__all__))
    assert all(hasattr(pf, name) for name in pf.__all__)
    assert {name for name in dir(pf) if not name.startswith("__")} == set(pf.__all__)
    assert {"__version__", "__all__", "__doc__"} <= set(dir(pf))


def test_the_index_names_every_public_name():
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert {name for name in pf.__all__ if f"`pf.{name}`" not in index} == set()
    assert len(pf.__all__) <= 48


def test_names_that_moved_say_where_they_are():
    for name in [*pf.transforms.__all__, *pf._MOVED]:
        with pytest.raises(AttributeError, match=r"; it is pf\.\S+ now") as raised:
            getattr(pf, name)
        new = str(raised.value).split("it is pf.")[1].split()[0]
        assert operator.attrgetter(new)(pf) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'fitt'$"):
        _ = pf.fitt


def test_modules_are_there_after_a_bare_import_which_loads_nothing_heavy():
    code = f"""
import sys
import pyro_flows as pf
for name in {MODULES}:
    assert name in dir(pf), name
    getattr(pf, name)
heavy = ("arviz", "arviz_base", "arviz_stats", "matplotlib", "pandas", "xarray", "sklearn", "h5py")
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_public_modules_are_in_the_reference(name):
    module = getattr(pf, name)
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    assert f".. automodule:: pyro_flows.{name}\n" in text
    assert f"`pf.{name}`" in text
    assert importlib.import_module(f"pyro_flows.{name}") is module


def test_functions_are_not_hidden_by_modules_of_their_name():
    assert all(callable(getattr(pf, name)) for name in ("fit", "diagnose", "planar", "nice", "load"))
