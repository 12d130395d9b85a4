"""The numbers that decide stand in one module, and on one page with the same values."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

from pyro_flows.support import thresholds

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "pyro_flows"
MODULE = PACKAGE / "support" / "thresholds.py"
ROOMS = ("model", "inference", "fitting", "calibration")
FILES = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
DECIDES = re.compile(r"(?:^|_)(?:K_HAT|ESS|R_HAT)(?:_|$)|_K$")
ROW = re.compile(r"^\| `([A-Z_]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", flags=re.MULTILINE)


def constants(source: str) -> list[str]:
    """Names in capitals that get a value anywhere."""
    names = [
        node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and type(node.ctx) is ast.Store
    ]
    return [name for name in names if name.isupper()]


def number(text: str) -> float:
    """A value as the page has it, such as 0.5 or log 2."""
    return math.log(float(text[4:])) if text.startswith("log ") else float(text)


def undocumented(source: str) -> list[str]:
    """Constants without a comment above them that ends with a source."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            above, line = "", node.lineno - 2
            while lines[line].startswith("# "):
                above, line = f"{lines[line][2:]} {above}", line - 1
            if not re.search(r"[^-] Source: .+\.\s*$", above):
                found.append(ast.unparse(node.targets[0]))
    return found


def test_the_page_has_every_threshold_with_its_value():
    rows = ROW.findall((ROOT / "docs" / "understand" / "thresholds.md").read_text(encoding="utf-8"))
    page = {name: number(value) for name, value, *_ in rows}
    assert len(page) == len(rows), "a name stands twice"
    assert page == {name: getattr(thresholds, name) for name in constants(MODULE.read_text(encoding="utf-8"))}


def test_every_threshold_says_what_it_decides_and_its_source():
    assert not undocumented(MODULE.read_text(encoding="utf-8"))


def test_no_other_module_has_a_threshold():
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in FILES
        if path != MODULE
        and (names := [name for name in constants(path.read_text(encoding="utf-8")) if DECIDES.search(name)])
    }
    assert not found, "thresholds stand in support/thresholds.py"


def test_the_test_bites():
    source = "LEAST_ESS, DRAWS = 0.1, 5\nGOOD_K: float = 0.5\nR_HAT = 1.01\nTRUSTED_K_HAT = 0.7\nGUESS = ASK = k = 1\n"
    found = [name for name in constants(source) if DECIDES.search(name)]
    assert sorted(found) == ["GOOD_K", "LEAST_ESS", "R_HAT", "TRUSTED_K_HAT"]
    assert undocumented("# ---- part ----\n\n# A. Source: chosen.\nA = 1\n# B.\nB = 1\n\nC = 1\n") == ["B", "C"]
    assert number("log 2") == math.log(2.0)
    assert ROW.findall("| `A_K` | 0.5 | what | source |\n") == [("A_K", "0.5", "what", "source")]
