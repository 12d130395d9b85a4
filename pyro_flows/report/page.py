"""From content to one HTML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_flows._files import replace_file
from pyro_flows.report.content import Options, content
from pyro_flows.results.record import Record

if TYPE_CHECKING:
    import pandas as pd

MARK = '<meta name="generator" content="pyro_flows report">'


def write(posterior: Record, path: str | os.PathLike[str], table: pd.DataFrame, options: Options) -> Path:
    """Write the page in one step, and return where it is; see :meth:`~pyro_flows.Posterior.report`."""
    target = check_target(path)
    text = render(content(posterior, table, options))
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, text.encode())
    return target


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return where the page goes, or say why it cannot go there."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"path: expected a file, {str(target)!r} is a directory. Name a file in it, report.html.")
    if target.exists():
        with target.open("rb") as file:
            head = file.read(2000)
        if MARK.encode() not in head:
            raise ValueError(f"path: {str(target)!r} is there and is no earlier report. Name another file.")
    return target


def render(values: dict[str, object]) -> str:
    """Fill the template; all text is escaped but the figures' SVG."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = Markup  # of our own making
    return environment.get_template("report.html").render(values)
