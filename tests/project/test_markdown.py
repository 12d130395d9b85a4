"""All code in README, CONTRIBUTING and docs runs, file by file and in order, and prints what the text says.

``tests/markdown.py`` says what the comments before fences mean. Commands in fences of ``sh`` are checked here too.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pyro
import pytest
import typer

from pyro_flows.cli import app
from pyro_flows.flows.recipe import BUILDERS, VECTOR_BUILDERS
from tests.markdown import differences, fences, run
from tests.slow import rest_slow

ROOT = Path(__file__).parent.parent.parent
WRITTEN = {"_build", "_notebooks"}  # folders of docs that the build makes
PAGES = [path for path in (ROOT / "docs").rglob("*.md") if not WRITTEN & set(path.parts)]
FILES = sorted([*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *PAGES])
KINDS = {
    "python",
    "text",
    "sh",
    "bibtex",
    "{eval-rst}",
    "{toctree}",
    "{include} ../CHANGELOG.md",
    "{include} ../../CONTRIBUTING.md",
}
# Pages whose code takes more than four seconds: slow, as a whole.
LONG = {"counts", "minibatches", "mixture", "survival", "svi", "time-series", "training-loops"}
COMMENTS = {"", "slow", "setup", "needs chirho", "needs sbi", "needs sklearn"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def check(path, tmp_path, monkeypatch, *, slow):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    with mock.patch.dict(BUILDERS), mock.patch.dict(VECTOR_BUILDERS):  # a document may register a builder of its own
        compared = run(path.read_text(encoding="utf-8"), str(path), slow=slow)
    for printed, fence in compared:
        wrong = differences(printed, fence.text, fence.comment)
        assert not wrong, f"{name_of(path)}, line {fence.line}: {wrong}"
    return compared


def with_code(*, slow):
    """The files that have code to run in this suite."""
    return [
        path
        for path in FILES
        for found in [[fence for fence in fences(path.read_text(encoding="utf-8")) if fence.kind == "python"]]
        if found and (not slow or any(fence.comment == "slow" or fence.comment.startswith("needs ") for fence in found))
    ]


@pytest.mark.parametrize("path", rest_slow(with_code(slow=False), lambda path: path.stem not in LONG), ids=name_of)
def test_code_runs_and_prints_what_the_text_says(path, tmp_path, monkeypatch):
    check(path, tmp_path, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", with_code(slow=True), ids=name_of)
def test_slow_code_runs_too(path, tmp_path, monkeypatch):
    check(path, tmp_path, monkeypatch, slow=True)


def test_readme_prints_something_that_is_compared():
    found = fences((ROOT / "README.md").read_text(encoding="utf-8"))
    pairs = [(one.kind, two.kind) for one, two in itertools.pairwise(found) if not two.gap.strip()]
    assert ("python", "text") in pairs


def test_fences_say_what_they_hold():
    wrong = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        found = fences(text)
        faults = {fence.kind for fence in found} - KINDS
        faults |= {fence.comment for fence in found if fence.kind == "python"} - COMMENTS
        if 2 * len(found) != len(re.findall(r"^\s*```", text, flags=re.MULTILINE)):
            faults.add("a fence that this test overlooks")
        if faults:
            wrong[name_of(path)] = faults
    assert not wrong


ITEM = re.compile(r"(?:\d+[.)]|[-+*]) ")


def chance_items(text):
    """Lines of a paragraph that Markdown takes for an item of a list, since they begin with a number or a sign."""
    lines = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    in_list = [bool(ITEM.match(line.lstrip())) or line.startswith("  ") for line in lines]
    pairs = zip(itertools.pairwise(lines), itertools.pairwise(in_list), strict=True)
    return [line for (before, line), (inside, _) in pairs if before.strip() and not inside and ITEM.match(line)]


def test_no_line_of_a_paragraph_is_an_item_by_chance():
    found = {name_of(path): chance_items(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {name: lines for name, lines in found.items() if lines}


def test_pages_begin_with_the_same_lines():
    """Setups are few, so that a process runs them once; a page that differs by a letter would pay for its own."""
    found = {}
    for path in PAGES:
        for number, fence in enumerate(fences(path.read_text(encoding="utf-8"))):
            if fence.comment == "setup":
                found.setdefault(fence.text, []).append((name_of(path), number))
    assert len(found) <= 4, [pages[0] for pages in found.values()]
    assert sum(map(len, found.values())) > 15


# commands -------------------------------------------------------------------------------------------------------------


def commands():
    """All lines of shell, with their files."""
    return [
        (path.name, shlex.split(line, comments=True))
        for path in FILES
        for fence in fences(path.read_text(encoding="utf-8"))
        if fence.kind == "sh"
        for line in fence.text.splitlines()
    ]


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert commands()
    for name, (head, *rest) in commands():
        if head == "torchrun":  # its own options, then a command of the package
            place = rest.index("-m")
            assert rest[place + 1] == "pyro_flows", name
            head, rest = "pyro-flows", rest[place + 2 :]
        assert head in ("make", "pyro-flows", "pip"), f"{name}: a command that this test does not know: {head}"
        if head == "make":
            assert {word for word in rest if "=" not in word} <= targets, name
        if head == "pyro-flows":
            group = typer.main.get_command(app)
            command = group.commands[rest[0]]
            command.make_context(rest[0], rest[1:])  # refuses options that do not exist, and missing ones


@pytest.mark.slow
def test_commands_of_the_package_run(tmp_path, monkeypatch):
    """In a directory with the two files that the page names: its model and its data."""
    found = fences((ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8"))
    model, data = (fence.text for fence in found if fence.kind == "python")
    (tmp_path / "models.py").write_text(model, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(data, {})
    wanted = {tuple(words[1:]) for _, words in commands() if words[0] == "pyro-flows"}
    assert wanted
    for words in sorted(wanted, key=lambda words: (words[0] == "report", words)):  # of what a fit has saved
        command = [sys.executable, "-m", "pyro_flows", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert re.match("ok|corrected|Wrote", done.stdout)


# the test itself ------------------------------------------------------------------------------------------------------


def test_the_test_bites():
    assert chance_items("Powers near\n1. A change\n") == ["1. A change"]
    assert not chance_items("Steps:\n\n1. one\n   more\n2. two\n")
    text = (
        "Text.\n\n```python\nx = 2.0\nprint('x is', x)\n```\n\n<!-- within 0.1 or 10 % -->\n```text\nx is 2.15\n```\n"
    )
    ((printed, fence),) = run(text, "text.md", slow=False)
    assert printed == "x is 2.0\n"
    assert not differences(printed, fence.text, fence.comment)
    assert differences(printed, fence.text)
    assert differences(printed, "x is 2.5", fence.comment) == ["expected 2.5, got 2.0"]
    assert differences(printed, "y is 2.0", fence.comment)
    assert differences("1 2", "1", fence.comment)
    with pytest.raises(ZeroDivisionError) as found:
        run("```python\na = 0\n```\nand\n```python\n\n1 / a\n```\n", "broken.md", slow=False)
    assert found.traceback[-1].lineno + 1 == 7
    slow = "```python\na = 1\n```\n<!-- slow -->\n```python\na = 2\n```\n```python\nprint(a)\n```\n```text\n```\n"
    assert [run(slow, "slow.md", slow=choice)[0][0] for choice in (False, True)] == ["1\n", "2\n"]
    with pytest.raises(AssertionError, match="a comment that this test does not know"):
        differences("", "", "roughly")
