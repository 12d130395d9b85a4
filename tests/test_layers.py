"""The order of the files, as docs/design.md states it, against what they import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_flows"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
HEAVY = {"arviz", "arviz_base", "arviz_plots", "arviz_stats", "h5netcdf", "h5py", "matplotlib", "pandas", "xarray"}


def table() -> dict[str, int]:
    """The layer of each file."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("\n## Layers\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", section, flags=re.MULTILINE)
    pairs = [(name, int(layer)) for layer, files in rows for name in re.findall(r"`([^`]+)`", files)]
    assert len(pairs) == len(dict(pairs)), "a file stands twice in the table"
    return dict(pairs)


def imports(source: str, *, top_only: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that are imported, with the names taken from them; not those for type checkers only."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.extend(node.orelse)
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield node.module, tuple(alias.name for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def own_imports(source: str) -> set[str]:
    """Files of this package that are imported."""
    found = set()
    for module, names in imports(source):
        head, *parts = module.split(".")
        if head != "pyro_flows":
            continue
        folder = "/".join(parts)
        for name in names or ("",):
            inner = f"{folder}/{name}".strip("/") + ".py"
            outer = f"{folder}.py" if f"{folder}.py" in FILES else f"{folder}/__init__.py".lstrip("/")
            found.add(inner if inner in FILES else outer)
    return found


def faults(name: str, layer: int, imported: set[str], layers: dict[str, int]) -> list[str]:
    """Imports that do not come from below."""
    return [
        f"{name} (layer {layer}) imports {other} ({layers.get(other, 'not in the table')})"
        for other in sorted(imported)
        if not layers.get(other, layer) < layer
    ]


def test_every_file_has_a_layer():
    assert set(table()) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_come_from_lower_layers(name):
    layers = table()
    imported = own_imports((PACKAGE / name).read_text(encoding="utf-8"))
    assert imported <= set(FILES), "an import that this test does not understand"
    assert not faults(name, layers[name], imported, layers)


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_inside_functions_and_arviz_in_one_file(name):
    source = (PACKAGE / name).read_text(encoding="utf-8")
    heads = {module.partition(".")[0] for module, _ in imports(source, top_only=True)}
    assert not heads & HEAVY
    anywhere = {module.partition(".")[0] for module, _ in imports(source)}
    if name != "_arviz.py":
        assert not any(head.startswith("arviz") for head in anywhere)


def test_the_test_bites():
    """On imports of every form, inside functions too."""
    source = """
from __future__ import annotations
import pyro_flows.plots
from pyro_flows import _checks, fit
from pyro_flows.transforms import masks, Chain
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pyro_flows.cli import main
def late():
    import arviz
    from pyro_flows.transforms.base import Bound
"""
    found = own_imports(source)
    assert found == {
        "plots.py",
        "_checks.py",
        "fit.py",
        "transforms/masks.py",
        "transforms/__init__.py",
        "transforms/base.py",
    }
    layers = table()
    wrong = [line.split()[4] for line in faults("guides.py", layers["guides.py"], found, layers)]
    assert wrong == ["fit.py", "plots.py"]
    assert ("arviz", ()) in set(imports(source))
    assert ("arviz", ()) not in set(imports(source, top_only=True))
