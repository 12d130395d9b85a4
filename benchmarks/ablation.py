"""Switch off one part of a fit at a time, and fit anew the random models in which it acted.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --parts "walks" "symmetric copies" --most 10

A part is a method, a search or a step before a flow. The models are those of the zoo whose stored fit names the part as
what decided, what found a region, or what took .05 CPU seconds. Other fits are the same without it, but for random
numbers. A row says how many fits were right, alarms, honest and lies without the part, in how many the verdict or the
method is another one than in the stored fit, and how many gradients both took.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row
from benchmarks.sensitivity import OUTCOMES
from benchmarks.zoo import FAMILIES
from benchmarks.zoo import running as zoo_running

OUT = records.RESULTS / "ablation.csv"
FIELDS = (
    *("part", "version", "acted", "models", *OUTCOMES, "changed", "gradients", "gradients_with", "seconds"),
    *("others", "machine", "software"),
)
MOST, SECONDS, ACTED = 12, 60.0, 0.05  # models of a part; CPU seconds of a stored fit at most, and of a part at least


@dataclass(frozen=True)
class Part:
    """What is replaced, by what, and whether the record of a fit tells that it acted."""

    replaced: str  # module:name
    by: Callable[[Any], Any]  # of what stands there
    acted: Callable[[dict[str, Any]], bool]


def _accepts(*tests: str) -> Callable[[dict[str, Any]], bool]:
    return lambda kept: any(test in kept["accepted"] for test in tests)


def _finds(search: str) -> Callable[[dict[str, Any]], bool]:
    return lambda kept: search in kept["found"]


def _spends(stage: str) -> Callable[[dict[str, Any]], bool]:
    return lambda kept: kept["spent"].get(stage, (0.0, 0))[0] >= ACTED


def _without(method: str, when: str = "") -> Callable[[Any], Any]:
    """Return the table of methods without one, at all moments or at one."""
    return lambda methods: tuple(row for row in methods if row.name != method or (when and row.when != when))


def _returns(value: Any) -> Callable[[Any], Any]:
    return lambda _: lambda *given, **named: value


METHODS = "pyro_flows.fitting.methods:METHODS"
PARTS = {
    "conditional Laplace grid": Part(
        METHODS, _without("conditional Laplace grid"), _accepts("conditional Laplace grid")
    ),
    "Gaussian conditionals": Part(METHODS, _without("Gaussian conditionals"), _accepts("Gaussian conditionals")),
    "mixture at several modes of the start": Part(METHODS, _without("mixture", "at modes"), _accepts("mixture")),
    "mixture after a flow": Part(
        METHODS,
        _without("mixture", "after a flow"),
        lambda kept: kept["accepted"][:2] == ["mixture", "combined: mixture"] and kept["steps"] > 0,
    ),
    "MCMC instead of training": Part(
        METHODS, _without("MCMC", "at the best start"), _accepts("MCMC instead of training")
    ),
    "MCMC in the latent space": Part(METHODS, _without("MCMC", "after a flow"), _accepts("MCMC in the latent space")),
    "tables of coordinates": Part(
        "pyro_flows.fitting.multimodal:_tabulated",
        _returns(None),
        _accepts("combined: independent coordinates", "combined: tabulated density"),
    ),
    "symmetric copies": Part("pyro_flows.fitting.combine:_copied", _returns(False), _accepts("symmetric copies")),
    "mixture of a second survey": Part(
        "pyro_flows.fitting.combine:_surveyed",
        _returns(False),
        lambda kept: "combined: mixture" in kept["accepted"] and "mixture" not in kept["accepted"],
    ),
    "added runs": Part("pyro_flows.fitting.combine:MEASURED_PLACES", lambda _: 0, _accepts("run at a missed mode")),
    "exact moves": Part("pyro_flows.inference.modes.missed_modes:mirrored", _returns([]), _finds("mirrored")),
    "survey": Part("pyro_flows.inference.modes.missed_modes:surveyed", _returns([]), _finds("survey")),
    "paths": Part("pyro_flows.inference.modes.missed_modes:climbed", _returns([]), _finds("paths")),
    "walks": Part("pyro_flows.inference.modes.missed_modes:under_covered_region", _returns([]), _finds("walks")),
    "moments of the start": Part(
        "pyro_flows.fitting.run:matched",
        lambda _: lambda density, start, *rest, **named: start,
        _spends("matching moments"),
    ),
    "transforms of angles and heavy tails": Part(
        "pyro_flows.fitting.run:choose_charts",
        lambda _: lambda density, start, **named: (density, start, {}),
        _spends("choosing transforms for angles and heavy tails"),
    ),
}


def models(rows: Iterable[Row], part: Part, most: int) -> tuple[int, list[Row]]:
    """Return in how many fits a part acted, and some of them: spread over families, the quick ones first."""
    newest = {(row["seed"], row["number"]): row for row in rows if row["ledger"]}
    acting = [row for row in newest.values() if part.acted(json.loads(row["ledger"]))]
    found: dict[str, list[Row]] = {}
    for row in sorted(acting, key=lambda row: float(row["seconds"])):
        if float(row["seconds"]) <= SECONDS:
            found.setdefault(row["family"], []).append(row)
    chosen: list[Row] = []
    while len(chosen) < most and any(found.values()):
        chosen += [left.pop(0) for left in found.values() if left]
    return len(acting), chosen[:most]


def _gradients(kept: str) -> int:
    return sum(int(count) for _, count in json.loads(kept)["spent"].values()) if kept else 0


def work(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Fit models without a part, in this process; return its figures."""
    import pyro_flows.fitting.fit  # noqa: F401  # loads what a fit loads

    module, attribute = PARTS[name].replaced.split(":")
    place = __import__(module, fromlist=[attribute])
    counted: Counter[str] = Counter()
    gradients, seconds, others = 0, 0.0, []
    with mock.patch.object(place, attribute, PARTS[name].by(getattr(place, attribute))):
        for stored in rows:
            row = zoo_running.fitted(int(stored["seed"]), int(stored["number"]))
            counted[row["outcome"]] += 1
            gradients += _gradients(row["ledger"])
            seconds += float(row["seconds"])
            now, before = _answer(row), _answer(stored)
            if now != before or row["outcome"] != stored["outcome"]:
                others.append(f"{stored['seed']}/{stored['number']} {before}: {now}, {row['outcome']}")
    return {
        "models": len(rows),
        **{outcome: counted[outcome] for outcome in OUTCOMES},
        "changed": len(others),
        "gradients": gradients,
        "gradients_with": sum(_gradients(row["ledger"]) for row in rows),
        "seconds": f"{seconds:.1f}",
        "others": "; ".join(others),
    }


def _answer(row: Row | dict[str, Any]) -> str:
    return f"{row['status']} by {json.loads(row['ledger'])['method'] if row['ledger'] else 'nothing'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that the file lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--most", type=int, default=MOST, help="models of a part")
    given = parser.parse_args(arguments)
    version = records.code_version()
    had = {row["part"] for row in records.start(OUT, FIELDS) if row["version"] == version}
    present = {family: zoo_running.zoo_version(family) for family in FAMILIES}
    stored = [row for row in records.read(zoo_running.OUT) if row["zoo"] == present[row["family"]]]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in given.parts:
            if name in had:
                continue
            acted, rows = models(stored, PARTS[name], given.most)
            row = {"part": name, "version": version, "acted": acted, **pool.submit(work, name, rows).result()}
            row.update(machine=records.machine(), software=records.software())
            records.append(OUT, FIELDS, row)
            print(", ".join(f"{field} {row[field]}" for field in FIELDS[:-2]), flush=True)


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table of a page."""
    header = ["without", "acted in", "models", "right", "alarms", "honest", "lies", "other answers", "gradients"]
    lines = [
        [
            *(row[name] for name in ("part", "acted", "models", "right", "alarm", "honest", "lie", "changed")),
            f"{int(row['gradients']) / max(int(row['gradients_with']), 1):.2f} x" if int(row["models"]) else "",
        ]
        for row in rows
    ]
    return f"{table(header, lines)}\n\n{about(rows)}"


if __name__ == "__main__":
    main()
