"""The rooms of the package, as docs/design.md lists them, against what they import."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "pyro_flows"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
HEAVY = {"arviz", "arviz_base", "arviz_plots", "arviz_stats", "h5netcdf", "h5py", "matplotlib", "pandas", "xarray"}
MOST_NAMES, MOST_ARROWS = 15, 60  # at the root of the package; pairs of its folders of which one imports the other
CLOSED = ("model/graphs",)  # rooms whose names are those of their __init__
WITH_INNER_NAMES = ("tests/model/graphs/", "tests/registry.py")  # of the room graphs


@dataclass(frozen=True)
class Room:
    """A row of the table."""

    storey: int
    allowed: frozenset[str]


def table(text: str) -> dict[str, Room]:
    """The rooms by name; the files of the ground are rooms that may import each other."""
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rooms: dict[str, Room] = {}
    for storey, names, allowed in re.findall(r"^\| (\d+) \|([^|]*)\|([^|]*)\|", section, flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in rooms, f"{name} stands twice in the table"
            rooms[name] = Room(int(storey), frozenset(re.findall(r"`([^`]+)`", allowed)))
    return rooms


ROOMS = table((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def room_of(file: str) -> str:
    """The room that a file stands in: the innermost folder that has a row, or the file itself."""
    folder = Path(file).parent.as_posix()
    while folder not in ROOMS and "/" in folder:
        folder = folder.rpartition("/")[0]
    return file.removesuffix(".py") if folder == "." else folder


def top_of(file: str) -> str:
    """The folder or file of the root that a file stands in."""
    return file.partition("/")[0].removesuffix(".py")


def text_of(file: str) -> str:
    """The source of a file of the package."""
    return (PACKAGE / file).read_text(encoding="utf-8")


@cache
def imports(source: str, *, top_only: bool = False) -> list[tuple[str, tuple[str, ...]]]:
    """Modules that are imported, with the names taken from them; with ``top_only`` those that an import loads."""
    found: list[tuple[str, tuple[str, ...]]] = []
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if top_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.extend(node.orelse)
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            found.append((node.module, tuple(alias.name for alias in node.names)))
        nodes.extend(ast.iter_child_nodes(node))
    return found


def own_imports(source: str, files: list[str] = FILES) -> set[str]:
    """Files of this package that are imported."""
    found = set()
    for module, names in imports(source):
        head, *parts = module.split(".")
        if head != "pyro_flows":
            continue
        folder = "/".join(parts)
        for name in names or ("",):
            inner = f"{folder}/{name}".strip("/")
            places = (f"{inner}.py", f"{inner}/__init__.py", f"{folder}.py", f"{folder}/__init__.py".lstrip("/"))
            found.add(next((place for place in places if place in files), folder))
    return found


@cache
def imported() -> dict[str, set[str]]:
    """What each file of the package imports of it."""
    return {name: own_imports(text_of(name)) for name in FILES}


def faults(file: str, others: set[str], rooms: dict[str, Room]) -> list[str]:
    """Imports that the table does not allow."""
    here = room_of(file)
    found = []
    for other in sorted(others):
        there = room_of(other)
        on_the_ground = rooms[there].storey == 0
        if there != here and not on_the_ground and there not in rooms[here].allowed:
            found.append(f"{file} imports {other}, which the row of {here} does not name")
    return found


def test_every_room_is_in_the_table():
    assert set(ROOMS) == {room_of(file) for file in FILES}


def test_rooms_import_from_lower_storeys():
    for name, room in ROOMS.items():
        upward = {other for other in room.allowed if not ROOMS[other].storey < room.storey}
        assert not upward, f"{name} may import {upward}, which do not lie below it"


def test_imports_are_those_that_the_table_allows():
    unknown = {name: others - set(FILES) for name, others in imported().items() if others - set(FILES)}
    assert not unknown, "imports that this test does not understand"
    assert not [fault for name, others in imported().items() for fault in faults(name, others, ROOMS)]


def inner_names(file: str, others: set[str]) -> list[str]:
    """Imports of modules of a closed room from outside of it."""
    return [
        f"{file} imports {other}, not the names of {room_of(other)}"
        for other in sorted(others)
        if room_of(other) in CLOSED and room_of(file) != room_of(other) and "__init__" not in other
    ]


def test_closed_rooms_are_entered_by_their_public_names():
    assert not [fault for name, others in imported().items() for fault in inner_names(name, others)]
    tests = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("*.py"))]
    outside = [file for file in tests if not file.startswith(WITH_INNER_NAMES)]
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in outside}
    assert not [fault for file, text in texts.items() for fault in inner_names(file, own_imports(text))]


@pytest.mark.parametrize("room", CLOSED)
def test_the_names_of_a_closed_room_are_used_and_are_on_its_page(room):
    names = next(
        set(ast.literal_eval(node.value))
        for node in ast.parse(text_of(f"{room}/__init__.py")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    taken = {
        name
        for file in FILES
        if room_of(file) != room
        for module, found in imports(text_of(file))
        if module == f"pyro_flows.{room.replace('/', '.')}"
        for name in found
    }
    assert taken == names
    page = (ROOT / "docs" / "contribute" / f"{Path(room).name}.md").read_text(encoding="utf-8")
    assert not {name for name in names if f"`{name}`" not in page}


def test_permissions_are_used():
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for file, others in imported().items():
        used[room_of(file)] |= {room_of(other) for other in others}
    assert not {name: room.allowed - used[name] for name, room in ROOMS.items() if room.allowed - used[name]}


def test_files_of_a_room_make_no_circle():
    for name in ROOMS:
        inside = {file for file in FILES if room_of(file) == name}
        list(TopologicalSorter({file: imported()[file] & inside for file in inside}).static_order())


def test_the_root_has_few_names_and_its_folders_make_no_circle():
    tops = {top: set() for top in map(top_of, FILES)}
    for file, others in imported().items():
        tops[top_of(file)] |= {top_of(other) for other in others} - {top_of(file)}
    list(TopologicalSorter(tops).static_order())
    assert len(tops) <= MOST_NAMES
    assert sum(len(others) for top, others in tops.items() if top in FOLDERS) <= MOST_ARROWS


@pytest.mark.parametrize("folder", sorted({Path(file).parent.as_posix() for file in FILES} - {"."}))
def test_a_folder_says_what_it_is_for_and_where_to_begin(folder):
    said = ast.get_docstring(ast.parse(text_of(f"{folder}/__init__.py"))) or ""
    first = re.findall(r"``(\w+)\.py``", said)
    assert len(re.findall(r"[.:](?=\s|$)", said)) >= 3
    assert first
    assert all((PACKAGE / folder / f"{name}.py").is_file() for name in first)


def test_heavy_packages_are_imported_inside_functions_and_arviz_in_one_file():
    found = []
    for name in FILES:
        heads = {module.partition(".")[0] for module, _ in imports(text_of(name), top_only=True)}
        found += [f"{name} imports {head} at once" for head in sorted(heads & HEAVY)]
        anywhere = {module.partition(".")[0] for module, _ in imports(text_of(name))}
        if name != "support/arviz.py":
            found += [f"{name} imports {head}" for head in sorted(anywhere) if head.startswith("arviz")]
    assert not found


def test_the_test_bites():
    """On imports of every form, inside functions and for type checkers too; on circles."""
    source = """
from __future__ import annotations
import pyro_flows.posterior.plots
from pyro_flows import fitting
from pyro_flows.support import checks
from pyro_flows.transforms import masks, Compose
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pyro_flows.cli import main
def late():
    import arviz
    from pyro_flows.transforms.base import Bound
"""
    found = own_imports(source)
    assert found == {
        "posterior/plots/__init__.py",
        "support/checks.py",
        "fitting/__init__.py",
        "cli.py",
        "transforms/masks.py",
        "transforms/__init__.py",
        "transforms/base.py",
    }
    wrong = [line.split()[2].rstrip(",") for line in faults("guides/autoflow.py", found, ROOMS)]
    assert wrong == ["cli.py", "fitting/__init__.py", "posterior/plots/__init__.py"]
    assert ("arviz", ()) in set(imports(source))
    assert ("arviz", ()) not in set(imports(source, top_only=True))
    entered = own_imports(
        "from pyro_flows.model.graphs import Recorder, rounding\nfrom pyro_flows.model.graphs.graph import sweep"
    )
    assert [line.split()[2] for line in inner_names("model/runs.py", entered)] == [
        "model/graphs/graph.py,",
        "model/graphs/rounding.py,",
    ]
    assert not inner_names("model/graphs/runner.py", entered)
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


RECORDS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "decisions").glob("0*.md"))]
PAGES = [
    "CONTRIBUTING.md",
    "docs/design.md",
    "docs/contribute/graphs.md",
    "docs/evidence/nuts.md",
    "docs/dependencies.md",
]


@pytest.mark.parametrize("page", [*PAGES, *RECORDS])
def test_files_that_prose_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:pyro_flows|tests|benchmarks|docs|examples)/[\w/.]*)`", text))
    rooms = "|".join(FOLDERS)
    named |= {f"pyro_flows/{path}" for path in re.findall(rf"`((?:{rooms})/[\w/]*(?:\.py)?)`", text)}
    missing = sorted(path for path in named if "NAME" not in path and not (ROOT / path).exists())
    assert named
    assert not missing
