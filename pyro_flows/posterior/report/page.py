"""What stands on the page, gathered from a posterior, and the file that it becomes."""

from __future__ import annotations

import inspect
import math
import os
import platform
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_flows.inference.record import Record, attributes_of
from pyro_flows.inference.verdict.methods import METHODS
from pyro_flows.posterior.export.methods_text import methods_text, references
from pyro_flows.posterior.plots.predictive import plot_predictive, predictive_data
from pyro_flows.posterior.report import tables
from pyro_flows.posterior.report.figures import Picture, drawn, graph, pictures
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.files.files import check_folder, replace_file
from pyro_flows.support.numbers.arrays import ALL, Chosen
from pyro_flows.support.process.progress import unseen

if TYPE_CHECKING:
    import pandas as pd

MARK = '<meta name="generator" content="pyro_flows report">'
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# what the search for missed modes can see: planted modes that it finds, percent, by dimension and width
WIDTHS = {"1": "as wide as the first", "1/3": "a third as wide", "1/10": "a tenth as wide"}
FOUND = {
    1: (100, 100, 98),
    2: (100, 100, 100),
    3: (100, 100, 100),
    5: (100, 100, 30),
    10: (100, 42, 0),
    20: (100, 15, 0),
}


@dataclass(frozen=True)
class Options:
    """What the caller wants on the page; see :meth:`~pyro_flows.Posterior.report`."""

    title: str | None = None
    comparison: Any = None  # a Comparison: its room stands beside this one
    predictive: bool = True
    source: bool = True
    chosen: Chosen = field(default_factory=ALL.copy)
    watch: Callable[[str], None] = unseen


def content(posterior: Record, table: pd.DataFrame, options: Options) -> dict[str, object]:
    """Return what the template is filled with."""
    verdict, sites = posterior.verdict, ", ".join(posterior.samples)
    options.watch("figures")
    shown = pictures(posterior, options.chosen, scalars=len(table))
    options.watch("replicates of the data")
    checks = _checks(posterior) if options.predictive else None
    options.watch("the page")
    return {
        "title": options.title or f"Posterior of {sites if len(sites) <= 60 else f'{len(posterior.samples)} sites'}",
        "verdict": verdict,
        "chains_of_others": posterior._of_mcmc,
        "figures": tables.figures(posterior),
        "about": _about(posterior),
        "summary": tables.of_frame(table, "summary", "Summary of the draws to use", "variable"),
        "pictures": shown,
        "checks": checks,
        "graph": graph(posterior),
        "comparison": None if options.comparison is None else _comparison(options.comparison),
        "history": tables.stages(posterior.history) if posterior.history else None,
        "settings": tables.flat(posterior.settings),
        "versions": _versions(posterior),
        "recipe": recipe(posterior),
        "methods_text": methods_text(posterior),
        "references": references(posterior),
        "source": _source(posterior) if options.source else None,
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _about(posterior: Record) -> list[tuple[str, str]]:
    """Return what was fitted, in a few lines."""
    found = [
        ("Sites", ", ".join(posterior.samples)),
        ("Draws", f"{len(posterior._used)}"),
        ("Dimensions", f"{posterior.z.shape[1]} unconstrained coordinates"),
        ("Method", f"{posterior.described}: {METHODS[posterior.method].meaning}"),
    ]
    searched_for = not any("no search" in note for note in posterior.verdict.notes)
    if searched_for and posterior.verdict.status != "unreliable":
        found.append(("Search for modes", searched(posterior.z.shape[1])))
    if not math.isnan(posterior.seconds):
        found.append(("Time", f"{posterior.seconds:.1f} seconds"))
    density = posterior.density
    if density is not None and density.structure.observed:
        sizes = [f"{name} ({values.numel()} values)" for name, values in density.structure.observed.items()]
        found.append(("Data", ", ".join(sizes)))
    return found


def _checks(posterior: Record) -> tuple[Picture, tables.Table | None, str]:
    """Return the figure of replicates, the table of their statistics, if the model can draw any, and what it says."""
    picture = drawn("replicates", plot_predictive, posterior)
    if picture.missing:
        return picture, None, ""
    table = tables.statistics(*predictive_data(posterior))
    return picture, table, tables.not_reproduced(table)


def searched(dim: int) -> str:
    """Return what share of second modes the search finds in so many dimensions, where a model computes no sum.

    It is that of the next larger dimension that was measured, of 40 to 50 planted modes for each width, in percent;
    masses are .1 to .9 and distances 2 to 10 standard deviations (``python -m benchmarks.search``).

    >>> print(searched(8).split(", the ")[0])
    Of second modes planted in 10 dimensions
    """
    measured = next((size for size in FOUND if size >= dim), max(FOUND))
    shares = ", ".join(f"{share} % {width}" for share, width in zip(FOUND[measured], WIDTHS.values(), strict=True))
    where = f"{measured} dimension{'s' if measured > 1 else ''}"
    more = "It finds more where the model computes a sum of densities."
    return f"Of second modes planted in {where}, the search finds {shares}. {more}"


def _comparison(comparison: Any) -> dict[str, object]:
    """Return a comparison as table and sentences."""
    frame = comparison.table.round(3)
    best, *others = comparison.names
    said = [(name, *comparison.difference(best, name)) for name in others]
    table = tables.of_frame(frame, "comparison", "Models of the same data, the best elpd first", "model")
    return {"table": table, "best": best, "differences": said, "notes": comparison.notes}


def _versions(posterior: Record) -> list[tuple[str, str]]:
    """Return the software that made the posterior: as stored, if it was loaded."""
    attrs = attributes_of(posterior)
    found = [("pyro-flows", str(attrs.get("inference_library_version", "unknown")))]
    for name, value in attrs.items():
        if name.endswith("_version") and name != "inference_library_version":
            found.append((name.removesuffix("_version").replace("_", "-"), str(value)))
    if posterior._stored is None:
        found.append(("Python", platform.python_version()))
        found.append(("system", platform.platform()))
    return [*found, ("device", str(attrs.get("device"))), ("dtype", str(attrs.get("dtype")))]


# how to make it again -------------------------------------------------------------------------------------------------


def recipe(posterior: Record) -> str:
    """Return the call that makes this posterior, as it was asked for; data and a flow or guide are the caller's."""
    settings, density = posterior.settings, posterior.density
    model = "model" if density is None else getattr(density.model, "__name__", type(density.model).__name__)
    names = list(filter(None, [_arguments(posterior)]))
    names += ["model_kwargs=model_kwargs"] if density is not None and density.kwargs else []
    known = {"seed": settings["seed"]}
    if posterior._of_mcmc:
        call = _call("pf.from_mcmc", ["mcmc", model, *names], known)
    elif settings.get("diagnosed"):
        call = _call("pf.diagnose", [model, "guide", *names], {"draws": settings["draws"], **known})
    elif "amortized" in settings:
        call = _call("amortized.posterior", names, {"draws": settings["draws"], **known})
        call = f"# amortized = pf.amortize({model}, ...), or pf.Amortized.load(...)\n{call}"
    elif "side_by_side" in settings:  # one of many, whose own seed came of that of the call
        call = _call("pf.fit", [model, *names], {"draws": settings["draws"], **known, **settings.get("asked", {})})
        call = f"# fitted side by side with {settings['side_by_side'] - 1} others by pf.fit_many; by itself:\n{call}"
    else:
        call = _call("pf.fit", [model, *names], {"draws": settings["draws"], **known, **settings["asked"]})
    for again in settings.get("refinements", ()):
        call += f"posterior = posterior.refine({_words({k: v for k, v in again.items() if v is not None})})\n"
    return f"import pyro_flows as pf\n\n{call}"


def _call(name: str, given: list[str], options: Entries) -> str:
    usual = {"draws": 4000, "seed": 0}
    words = _words({key: value for key, value in options.items() if usual.get(key) != value})
    return f"posterior = {name}({', '.join(filter(None, [*given, words]))})\n"


def _arguments(posterior: Record) -> str:
    """Return the names of the model's arguments, where it tells these."""
    if posterior.density is None:
        return "*data"
    model = posterior.density.model
    try:
        count = len(posterior.density.args)
        named = [one.name for one in signature_of(model).parameters.values() if one.kind in POSITIONAL]
    except (TypeError, ValueError):  # no signature
        return "*data"
    return ", ".join(named[:count]) if len(named) >= count else "*data"


def _words(options: Entries) -> str:
    """Return options as they are written in a call; infinity and a flow of the caller's have no literal."""
    found = {name: value for name, value in options.items() if value != math.inf}
    if str(found.get("flow", "")).startswith("<"):
        return f"flow=flow, {_words({name: value for name, value in found.items() if name != 'flow'})}"
    return ", ".join(f"{name}={value!r}" for name, value in found.items())


def _source(posterior: Record) -> str | None:
    """Return the source of the model, where Python can find it."""
    if posterior.density is None:
        return None
    model = posterior.density.model
    try:
        text = inspect.getsource(model if inspect.isroutine(model) else type(model))
    except (OSError, TypeError):  # typed into a shell, or no Python
        return None
    return textwrap.dedent(text) if len(text) <= 20_000 else None  # more would fill the page


# the file -------------------------------------------------------------------------------------------------------------


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
    try:
        check_folder(target.parent)
    except OSError as error:
        raise ValueError(
            f"path: expected a file that can be written, got {str(target)!r}: {error.strerror or error}. Name another."
        ) from None
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
