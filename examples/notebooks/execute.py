"""Run notebooks from clean kernels, and store their outputs: each ``NN_name.py`` gives ``NN_name.ipynb`` beside it.

python examples/notebooks/execute.py [NUMBER ...] [--out DIR] [--prose]

Edit the ``.py`` files, which are jupytext's "percent" form; the ``.ipynb`` files are made from them. A warning or an
error in an output is a fault, and its notebook is not stored. ``make notebooks`` runs all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LONGEST = 180  # seconds of processor time
PATIENCE = 1800  # seconds of a cell on a busy machine
QUIET = "-torch.utils.cpp_extension"  # which says of a machine that it has CUDA's tools and no GPU
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The notebooks as text, in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path: Path) -> Any:
    """Return a notebook without outputs; the same text gives the same notebook."""
    import jupytext

    notebook = jupytext.read(path)
    notebook.metadata = type(notebook.metadata)(kernelspec=KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
    return notebook


def faults(notebook: Any) -> list[str]:
    """What a reader must not see: errors, and anything on stderr, which is where warnings go."""
    found = []
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                found.append(f"cell {number}: {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number}: on stderr: {''.join(output['text'])}")
    return found


def execute(notebook: Any, folder: Path = HERE) -> float:
    """Run a notebook in a new kernel, whose directory is ``folder``; return seconds of processor time."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    with contextlib.suppress(CellExecutionError):  # the cell holds it, and nothing after it runs
        client.execute(env={**os.environ, "PYTHONPATH": path, "TORCH_LOGS": QUIET})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def store(notebook: Any, path: Path) -> None:
    """Write a notebook as Jupyter does."""
    import nbformat

    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def rewrite(notebook: Any, path: Path) -> bool:
    """Give a stored notebook the prose of its text; say whether it could be done: code must be as it ran."""
    import nbformat

    old = nbformat.read(path, as_version=4)
    code = [[cell.source for cell in one.cells if cell.cell_type == "code"] for one in (old, notebook)]
    if code[0] != code[1]:
        return False
    ran = iter([cell for cell in old.cells if cell.cell_type == "code"])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            before = next(ran)
            cell.execution_count, cell.outputs = before.execution_count, before.outputs
    notebook.metadata = old.metadata
    store(notebook, path)
    return True


def run(path: Path, out: Path) -> list[str]:
    """Run a notebook, and return what is wrong with it; it is then stored among temporary files, to be looked at."""
    notebook, began = read(path), time.monotonic()
    seconds = execute(notebook)
    found = faults(notebook) + ([f"took more than {LONGEST} s"] if seconds > LONGEST else [])
    print(f"{path.stem}: {seconds:.0f} s of processor, {time.monotonic() - began:.0f} s in all", flush=True)
    out = Path(tempfile.gettempdir()) if found else out
    store(notebook, out / f"{path.stem}.ipynb")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="notebooks to run, such as 01; all by default")
    parser.add_argument("--out", type=Path, default=HERE, help="where to store them; beside their text by default")
    parser.add_argument("--prose", action="store_true", help="run nothing: store changed prose where code is as it ran")
    options = parser.parse_args()
    wrong = []
    for path in sources():
        if options.numbers and path.name[:2] not in options.numbers:
            continue
        if not options.prose:
            found = run(path, options.out)
        else:
            done = rewrite(read(path), options.out / f"{path.stem}.ipynb")
            found = [] if done else ["its code has changed: run it"]
        wrong += [f"{path.stem}: {fault}" for fault in found]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
