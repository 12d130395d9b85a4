"""What stands on the page, gathered from a posterior."""

from __future__ import annotations

import inspect
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pyro_flows.plots.predictive import predictive_data
from pyro_flows.report import tables
from pyro_flows.report.figures import Picture, pictures, replicates
from pyro_flows.report.graph import graph
from pyro_flows.report.words import figures
from pyro_flows.results import arviz_groups
from pyro_flows.results.record import Record
from pyro_flows.verdict.coverage import searched

if TYPE_CHECKING:
    import pandas as pd

SOURCE = 20_000  # characters of a model's source at most


@dataclass(frozen=True)
class Options:
    """What the caller wants on the page; see :meth:`~pyro_flows.Posterior.report`."""

    title: str | None = None
    comparison: Any = None
    predictive: bool = True
    source: bool = True
    chosen: Mapping[str, Any] = field(default_factory=dict)


def content(posterior: Record, table: pd.DataFrame, options: Options) -> dict[str, Any]:
    """Return what the template is filled with."""
    verdict, sites = posterior.verdict, ", ".join(posterior.samples)
    checks = _checks(posterior) if options.predictive else None
    return {
        "title": options.title or f"Posterior of {sites if len(sites) <= 60 else f'{len(posterior.samples)} sites'}",
        "verdict": verdict,
        "chains_of_others": posterior._of_mcmc,
        "figures": figures(posterior),
        "about": _about(posterior),
        "summary": tables.of_frame(table, "summary", "Summary of the draws to use", "variable"),
        "pictures": pictures(posterior, dict(options.chosen), scalars=len(table)),
        "checks": checks,
        "graph": graph(posterior),
        "comparison": None if options.comparison is None else _comparison(options.comparison),
        "history": tables.stages(posterior.history) if posterior.history else None,
        "settings": tables.flat(posterior.settings),
        "versions": _versions(posterior),
        "recipe": recipe(posterior),
        "source": _source(posterior) if options.source else None,
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _about(posterior: Record) -> list[tuple[str, str]]:
    """Return what was fitted, in a few lines."""
    count, effective = len(posterior._used), posterior.effective
    found = [
        ("Sites", ", ".join(posterior.samples)),
        ("Draws", f"{count}" + (f", worth {effective:.0f} independent ones" if effective == effective else "")),
        ("Dimensions", f"{posterior.z.shape[1]} unconstrained coordinates"),
        ("Guide", posterior.guide_name),
    ]
    searched_for = not any("no search" in note for note in posterior.verdict.notes)
    if searched_for and posterior.verdict.status != "unreliable":
        found.append(("Search for modes", searched(posterior.z.shape[1])))
    if posterior.seconds == posterior.seconds:
        found.append(("Time", f"{posterior.seconds:.1f} seconds"))
    density = posterior.density
    if density is not None and density.structure.observed:
        sizes = [f"{name} ({values.numel()} values)" for name, values in density.structure.observed.items()]
        found.append(("Data", ", ".join(sizes)))
    return found


def _checks(posterior: Record) -> tuple[Picture, tables.Table | None]:
    """Return the figure of replicates and the table of their statistics, if the model can draw any."""
    picture = replicates(posterior)
    if picture.missing:
        return picture, None
    return picture, tables.statistics(*predictive_data(posterior))


def _comparison(comparison: Any) -> dict[str, Any]:
    """Return a comparison as table and sentences.

    Raises:
        ValueError: for anything but what :func:`~pyro_flows.compare` returns.
    """
    if not all(hasattr(comparison, name) for name in ("table", "names", "difference", "notes")):
        kind = type(comparison).__name__
        raise ValueError(f"comparison: expected what compare() returns, got a {kind}. Call pf.compare first.")
    frame = comparison.table.round(3)
    best, *others = comparison.names
    said = [(name, *comparison.difference(best, name)) for name in others]
    table = tables.of_frame(frame, "comparison", "Models of the same data, the best elpd first", "model")
    return {"table": table, "best": best, "differences": said, "notes": comparison.notes}


def _versions(posterior: Record) -> list[tuple[str, str]]:
    """Return the software that made the posterior: as stored, if it was loaded."""
    attrs = arviz_groups.attributes(posterior) if posterior._stored is None else posterior._stored[1]
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
    """Return the call that makes this posterior, as far as the settings tell."""
    settings = posterior.settings
    density = posterior.density
    model = "model" if density is None else getattr(density.model, "__name__", type(density.model).__name__)
    seed = settings["seed"]
    if posterior._of_mcmc:
        return f"import pyro_flows as pf\n\nposterior = pf.from_mcmc(mcmc, {model}, *data, seed={seed})\n"
    if settings.get("diagnosed"):
        call = f"pf.diagnose({model}, guide, *data, draws={settings['draws']}, seed={seed})"
        return f"import pyro_flows as pf\n\nposterior = {call}\n"
    flow = settings.get("flow") or {}
    options = {"draws": settings["draws"], "seed": seed}
    if isinstance(flow, Mapping) and "builder" in flow:
        options["flow"] = flow["builder"]
    for name, usual in (("runs", 1), ("max_steps", None), ("max_seconds", None), ("train_model", False)):
        if settings.get(name) not in (None, usual):
            options[name] = settings[name]
    words = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    return f"import pyro_flows as pf\n\nposterior = pf.fit(\n    {model},\n    *data,\n{words})\n"


def _source(posterior: Record) -> str | None:
    """Return the source of the model, where Python can find it."""
    if posterior.density is None:
        return None
    model: Any = posterior.density.model
    try:
        text = inspect.getsource(model if inspect.isroutine(model) else type(model))
    except (OSError, TypeError):  # typed into a shell, or no Python
        return None
    return textwrap.dedent(text) if len(text) <= SOURCE else None
