"""Settings of the documentation; `make docs` builds it, and any warning stops the build.

Nothing is loaded from elsewhere when the pages are read: MathJax comes from a package and is copied into the site.
"""

import importlib.util
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
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
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


def copy_notebooks() -> list[str]:
    """Copy the notebooks to a folder of their own beside these pages; return their names."""
    target = HERE / "_notebooks"
    shutil.rmtree(target, ignore_errors=True)
    found = sorted(NOTEBOOKS.glob("*.ipynb"))
    if found:
        target.mkdir()
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.stem for path in found]


def list_notebooks(app, docname: str, source: list[str]) -> None:
    """List the notebooks that there are on their page."""
    if docname == "notebooks" and app.config.notebooks_found:
        lines = "\n".join(f"_notebooks/{name}" for name in app.config.notebooks_found)
        source[0] += f"\n```{{toctree}}\n:maxdepth: 1\n\n{lines}\n```\n"


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
