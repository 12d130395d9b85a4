"""The section about guides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.guides import running as guides
from benchmarks.guides.models import MODELS
from benchmarks.markdown import about, number, table
from benchmarks.records import Row

NEAR_BEST, NEAR_RATES = 0.02, 0.1  # nats
REFUSED = "ValueError: model: expected"  # begins the error of a guide that is not made for a model
NAMES = {
    "ours": "AutoRealNVP, PathELBO",
    "ours_trace": "AutoRealNVP, Trace_ELBO",
    "plates": "AutoHierarchicalFlow, Trace_ELBO",
    "normal": "AutoNormal",
    "full_rank": "AutoMultivariateNormal",
    "low_rank": "AutoLowRank",
    "iaf": "AutoIAFNormal",
    "affine_autoregressive": "affine autoregressive",
    "splines": "zuko's NSF",
}


def guides_section(rows: Sequence[Row]) -> str:
    """Return the section about guides, from the newest row of each run."""
    newest = {(float(row["budget"]), row["model"], row["guide"], float(row["rate"])): row for row in rows}
    refused = sorted({key[1] for key, row in newest.items() if row["error"].startswith(REFUSED)})
    newest = {key: row for key, row in newest.items() if not row["error"].startswith(REFUSED)}
    budgets = sorted({key[0] for key in newest})
    versions = ", ".join(dict.fromkeys(row["version"] for row in newest.values()))
    raised = {name: sum(bool(row["error"]) for row in newest.values() if row["guide"] == name) for name in NAMES}
    errors = "; ".join(f"{NAMES[name]} {count}" for name, count in raised.items() if count) or "none"
    parts = [f"{about(rows)} {versions}.", f"Runs that raised an exception: {errors}."]
    if refused:
        parts[-1] += (
            f" AutoHierarchicalFlow is not for models without plates, or without globals: {', '.join(refused)}."
        )
    for budget in budgets:
        mine = {key[1:]: row for key, row in newest.items() if key[0] == budget}
        parts += [f"ELBO after {budget:g} seconds, in nats: best and worst of the learning rates.", _elbos(mine)]
        parts += [_summary(mine), "Milliseconds of a step, median over the learning rates.", _steps(mine)]
    return "\n\n".join(parts)


Runs = dict[tuple[str, str, float], Row]


def elbos(runs: Runs, model: str, guide: str) -> list[float]:
    """Return the ELBOs of all learning rates, -inf for a run that raised or ended at no number."""
    found = []
    for (of, by, _), row in runs.items():
        if (of, by) == (model, guide):
            value = math.nan if row["error"] else float(row["elbo"])
            found.append(value if math.isfinite(value) else -math.inf)
    return found


def _present(runs: Runs) -> list[str]:
    return [name for name in NAMES if any(key[1] == name for key in runs)]


def _elbos(runs: Runs) -> str:
    present, body = _present(runs), []
    for model, case in MODELS.items():
        cells = [elbos(runs, model, name) for name in present]
        if any(cells):
            body.append([f"{model}, {case.latents}", *(_pair(cell) for cell in cells)])
    return table(["model, latents", *(NAMES[name] for name in present)], body)


def _pair(values: Sequence[float]) -> str:
    return " / ".join(_elbo(value) for value in (max(values), min(values))[: len(values)]) if values else ""


def _elbo(value: float) -> str:
    return "failed" if value == -math.inf else f"{value:.2g}" if value < -1e5 else number(value, 2)


def _summary(runs: Runs) -> str:
    best, near, of, rates, several = 0, 0, 0, 0, 0
    for model in MODELS:
        ours = elbos(runs, model, "ours")
        theirs = [max(found) for name in NAMES if name not in guides.OURS and (found := elbos(runs, model, name))]
        if not ours or not theirs:
            continue
        of += 1
        best += max(ours) >= max(theirs)
        near += max(ours) >= max(theirs) - NEAR_BEST
        several += len(ours) > 1
        rates += len(ours) > 1 and min(ours) >= max(ours) - NEAR_RATES
    said = (
        f"With `PathELBO`, `AutoRealNVP` is better than all guides of Pyro and zuko on {best} of {of} models, and "
        f"within {NEAR_BEST} nats of the best of them on {near}."
    )
    if several:
        said += f" Its worst learning rate is within {NEAR_RATES} nats of its best one on {rates} of {several}."
    return said


def _steps(runs: Runs) -> str:
    present, body = _present(runs), []
    for model in MODELS:
        cells = []
        for name in present:
            times = sorted(float(row["ms"]) for (of, by, _), row in runs.items()
                           if (of, by) == (model, name) and row["ms"] not in ("", "nan"))  # fmt: skip
            cells.append(number(times[len(times) // 2], 1) if times else "")
        if any(cells):
            body.append([model, *cells])
    return table(["model", *(NAMES[name] for name in present)], body)
