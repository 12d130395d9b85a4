"""Functions have at most 40 lines, and files at most 300, or say in a comment why they have more."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path for room in ("pyro_flows", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py"))
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 40, 300  # docstrings of functions do not count
REASONS = {"function": "# Over 40 lines: ", "file": "# Over 300 lines: "}


def functions(source: str) -> Iterator[tuple[str, int, str]]:
    """Names of functions, with their lines and their text; decorators are not counted."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            said = node.body[0] if ast.get_docstring(node) is not None else None
            docstring = 0 if said is None else (said.end_lineno or said.lineno) - said.lineno + 1
            yield node.name, last - first - docstring, "\n".join(lines[first:last])


def faults(source: str) -> list[str]:
    """What is too long, and does not say why; and what says why, and is not too long."""
    found = []
    for name, count, text in functions(source):
        if (count > LINES_OF_A_FUNCTION) != (REASONS["function"] in text):
            found.append(f"{name} has {count} lines")
    count = len(source.splitlines())
    if (count > LINES_OF_A_FILE) != (REASONS["file"] in source):
        found.append(f"the file has {count} lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_too_long_without_a_reason(path):
    assert not faults(path.read_text(encoding="utf-8"))


def test_the_test_bites():
    """From both sides of each limit, with and without a reason, inside of classes and functions too."""

    def function(lines: int, *more: str) -> str:
        return "\n".join(
            ["def one():", '    """A sentence.\n\n    More.\n    """', *more, *["    x = 1"] * (lines - 1)]
        )

    reason = f"    {REASONS['function']}a list."
    assert not faults(function(40))
    assert faults(function(41)) == ["one has 41 lines"]
    assert not faults(function(41, reason))
    assert faults(function(30, reason)) == ["one has 31 lines"]
    inner = "class A:\n" + "\n".join(f"    {line}" for line in function(41).splitlines())
    assert faults(inner) == ["one has 41 lines"]
    assert not faults("x = 1\n" * 300)
    assert faults("x = 1\n" * 301) == ["the file has 301 lines"]
    assert not faults(REASONS["file"] + "a list.\n" + "x = 1\n" * 301)
    assert faults(REASONS["file"] + "a list.\n") == ["the file has 1 lines"]
