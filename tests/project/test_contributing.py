"""The table of CONTRIBUTING.md that says where to find things: each file defines what its row names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEAD = "| you look for | file | there |"
QUESTIONS = [  # the most frequent ones of newcomers, with the file that answers each
    ("the threshold of k-hat", "inference/verdict/psis.py"),
    ("the learning rate", "inference/training/loop.py"),
    ("the starts of a fit", "inference/starts/portfolio.py"),
    ("draws are resampled", "inference/verdict/weighing.py"),
    ("the text of the verdict", "inference/verdict/verdict.py"),
    ("a new flow is registered", "flows/recipe.py"),
    ("the search for missed modes, and where a new one is added", "inference/modes/missed_modes.py"),
    ("time limits", "support/process/clock.py"),
    ("ArviZ is imported", "support/arviz.py"),
    ("files are written", "support/files/files.py"),
]


def table(text: str) -> list[tuple[str, str, list[str]]]:
    """The rows: what is looked for, the file, and the names there; a row with several files is split at semicolons."""
    rows = text.partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    found = []
    for row in rows:
        question, files, names = (cell.split(";") for cell in row.strip("|").split("|"))
        assert len(files) == len(names), f"as many files as groups of names: {row}"
        for file, there in zip(files, names, strict=True):
            (path,) = re.findall(r"`([^`]+)`", file)
            found.append((";".join(question).strip(), path, re.findall(r"`([^`]+)`", there)))
    return found


def defined(source: str) -> set[str]:
    """Functions, classes, methods as ``Class.method``, and all names that get a value, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


ROWS = table((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("question", "path", "names"), ROWS, ids=[f"{path}-{names}" for _, path, names in ROWS])
def test_each_file_defines_what_its_row_names(question, path, names):
    assert names, f"{question}: no name"
    missing = set(names) - defined((ROOT / path).read_text(encoding="utf-8"))
    assert not missing, f"{question}: {path} does not define {missing}"


@pytest.mark.parametrize(("question", "path"), QUESTIONS)
def test_frequent_questions_have_a_row(question, path):
    assert any(question in asked and file == f"pyro_flows/{path}" for asked, file, _ in ROWS)


def test_the_test_bites():
    ((question, path, names),) = table(f"{HEAD}\n|---|---|---|\n| a | `b.py` | `C.d`, `E` |\n\nText\n")
    assert (question, path, names) == ("a", "b.py", ["C.d", "E"])
    with pytest.raises(AssertionError, match="as many files"):
        table(f"{HEAD}\n|---|---|---|\n| a | `b.py`; `c.py` | `D` |\n")
    source = "from x import A\nB, C = 1, 2\nclass D:\n    def e(self):\n        f: int = 1\n"
    assert defined(source) == {"B", "C", "D", "e", "D.e", "f"}


def test_long_tests_are_there():
    """Each line of tests/long.txt names a function of the file that it names, and none twice."""
    lines = (ROOT / "tests" / "long.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        file, name = line.split("::")[0], line.split("::")[1].split("[")[0]
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), line
