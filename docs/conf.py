"""Settings of the documentation; `make docs` builds it, and any warning stops the build.

Nothing is loaded from elsewhere when the pages are read: MathJax comes from a package and is copied into the site.
"""

import base64
import importlib.util
import json
import re
import shutil
from pathlib import Path

from sphinx.util.logging import getLogger

import pyro_flows

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "examples" / "notebooks"

if not getattr(pyro_flows, "__all__", None):
    getLogger(__name__).warning("docs/reference documents the names in pyro_flows.__all__, and there are none.")

project = "pyro_flows"
author = "The pyro_flows developers"
copyright = author
release = version = pyro_flows.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-bibtex pre, div.cell_input pre"
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` executes them, and stores their outputs

# A docstring is the project's own: not one of torch.nn.Module's that a method without its own would inherit.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes from the docstring and from the class are then described once

html_theme = "furo"
html_title = f"pyro_flows {release}"
html_static_path = ["_static", "_build/vendor"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"

mathjax_path = "mathjax/tex-svg-full.js"  # one file: fonts and all extensions are in it
myst_update_mathjax = False
mathjax3_config = {"options": {"enableMenu": False, "processHtmlClass": "math", "ignoreHtmlClass": "body"}}


def copy_mathjax() -> None:
    """Put MathJax, which the package django-static-mathjax brings, where the site's static files come from."""
    found = importlib.util.find_spec("mathjax")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("MathJax: expected the package django-static-mathjax. Run: pip install -e '.[docs]'")
    source = Path(found.submodule_search_locations[0]) / "static" / "mathjax" / "es5" / "tex-svg-full.js"
    target = HERE / "_build" / "vendor" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target / source.name)


def copy_notebooks() -> dict[str, str]:
    """Copy the notebooks, and a picture of each, to a folder beside these pages; return their titles by name."""
    target = HERE / "_notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        shutil.copyfile(path, target / path.name)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[path.stem] = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
        pictures = [
            output["data"]["image/png"]
            for cell in cells
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", {})
        ]
        if pictures:
            (target / f"{path.stem}.png").write_bytes(base64.b64decode("".join(pictures[0])))
    return found


CARD = """:::{{grid-item-card}} {title}
:link: _notebooks/{name}
:link-type: doc
:img-top: _notebooks/{name}.png
:img-alt: The first figure of the notebook {title}
:::
"""


def list_notebooks(app, docname: str, source: list[str]) -> None:
    """Show a card of each notebook on their page."""
    found = app.config.notebooks_found
    if docname == "notebooks" and found:
        cards = "\n".join(CARD.format(name=name, title=title) for name, title in found.items())
        lines = "\n".join(f"_notebooks/{name}" for name in found)
        grid = f"::::{{grid}} 1 2 2 3\n:gutter: 2\n:class-container: thumbnails\n\n{cards}::::\n"
        source[0] += f"\n{grid}\n```{{toctree}}\n:hidden:\n\n{lines}\n```\n"


SETUP = re.compile(r"^<!-- setup -->\n(```python\n.*?^```\n)", flags=re.MULTILINE | re.DOTALL)
SHOWN = ("index", "start/index")  # the pages that introduce the model


def fold_setup(app, docname: str, source: list[str]) -> None:
    """Fold the model that many pages begin with, where it is one that the reader has seen."""
    if docname not in SHOWN:
        source[0] = SETUP.sub(
            lambda found: (
                f":::{{dropdown}} The eight schools, from *Start here*\n{found[1]}:::\n"
                if "def eight_schools" in found[1]
                else found[0]
            ),
            source[0],
        )


def drop_aliases(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Drop what Python says of the fields of a named tuple: "Alias for field number 0"."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app) -> None:
    """Prepare what the build needs from elsewhere."""
    app.connect("autodoc-process-docstring", drop_aliases)
    copy_mathjax()
    app.add_config_value("notebooks_found", copy_notebooks(), "env")
    app.connect("source-read", list_notebooks)
    app.connect("source-read", fold_setup)
