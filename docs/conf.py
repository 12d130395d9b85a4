"""Settings of the documentation; `make docs` builds it, and any warning stops the build."""

from sphinx.util.logging import getLogger

import pyro_flows

if not getattr(pyro_flows, "__all__", None):
    getLogger(__name__).warning("docs/api.md documents the names in pyro_flows.__all__, and there are none.")

project = "pyro_flows"
author = "The pyro_flows developers"
copyright = author
release = version = pyro_flows.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# A docstring is the project's own: not one of torch.nn.Module's that a method without its own would inherit.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes from the docstring and from the class are then described once

html_theme = "furo"
html_title = f"pyro_flows {release}"
