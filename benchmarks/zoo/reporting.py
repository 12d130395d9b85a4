"""What the zoo's fits say: a line for each, and a table by family."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from scipy.stats import binomtest

from benchmarks.fingerprints import akin
from benchmarks.markdown import plural
from benchmarks.records import RESULTS, Row
from benchmarks.zoo import FAMILIES
from benchmarks.zoo.judging import OUTCOMES

CAUSES = RESULTS / "causes.csv"  # more models of three families
SHOWN = {"lie": "lies", "crash": "crashes", "alarm": "alarms", "right": "right", "honest": "honest", "late": "cut off"}
HEADER = ("family", *SHOWN.values(), "fits", "strictly right", "seconds, median", "seconds, most")
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all seeds of the version that was written last, one a seed and number, in their order."""
    kept = {(int(row["seed"]), int(row["number"])): row for row in rows if akin(row["version"], rows[-1]["version"])}
    return [kept[key] for key in sorted(kept)]


def line(row: Row) -> str:
    """Return one line about one fit."""
    head = f"{row['number']:>4} {row['outcome']:<6} {row['status'] or '-':<10} {row['family']}: {row['name']}"
    if row["error"]:
        return f"{head} | {row['error']}"
    errors = f"{_text(row['ratio'])} of the limit in {row['worst']}" if row["worst"] else ""
    times = f"D = {row['dim']}, k-hat {_text(row['k_hat'])}, {_text(row['seconds'])} s"
    return f"{head} | {errors}; {times}; {row['reasons'] or 'no reasons'}"


def _text(value: str) -> str:
    return f"{float(value):.2f}" if value else "-"


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return how many fits came to each outcome."""
    return {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES}


def strictly_right(rows: Sequence[Row]) -> int:
    """Return how many right fits are so by the strict limits too, refused impossible data among them."""
    return sum(row["outcome"] == "right" and float(row["strict_ratio"] or 0.0) <= 1.0 for row in rows)


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of the table: a row for each family, and one for all."""
    groups = [(family, [row for row in rows if row["family"] == family]) for family in FAMILIES]
    body = []
    for name, group in [*((name, group) for name, group in groups if group), ("all", list(rows))]:
        found = counts(group)
        seconds = [float(row["seconds"]) for row in group if row["seconds"]]
        median, most = (statistics.median(seconds), max(seconds)) if seconds else (math.nan, math.nan)
        cells = [str(found[outcome]) for outcome in SHOWN]
        body.append([name, *cells, str(len(group)), str(strictly_right(group)), f"{median:.1f}", f"{most:.0f}"])
    return body


def bound(lies: int, fits: int) -> float:
    """Return the one-sided 95 % upper bound of Clopper and Pearson for the share of lies."""
    return float(binomtest(lies, fits, alternative="less").proportion_ci(0.95, method="exact").high)


def rate(rows: Sequence[Row]) -> str:
    """Return in words how many fits were wrong and called usable, of all seeds, with the upper bound of their share."""
    lies, fits = counts(rows)["lie"], len(rows)
    wrong = "no wrong result was" if lies == 0 else "1 wrong result was" if lies == 1 else f"{lies} wrong results were"
    share = "" if lies == 0 else f"{100 * lies / fits:.2f} %, "
    return f"{wrong} called usable ({share}95 % upper bound {100 * bound(lies, fits):.2f} %)"


def section(rows: Sequence[Row], table: Table, about: Callable[[Sequence[Row]], str]) -> str:
    """Return the section of ``docs/evidence/accuracy.md``: all seeds of the newest version."""
    rows = newest(rows)
    text = (
        f"`fit` as it comes on {plural(len(rows), 'random model')} of {_seeds(rows)}: {rate(rows)}. The bound is that "
        f"of Clopper and Pearson, one-sided.\n\n{about(rows)} "
        f"pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    return f"{text}\n\n{table(HEADER, table_rows(rows))}"


def causes_section(rows: Sequence[Row], table: Table, about: Callable[[Sequence[Row]], str]) -> str:
    """Return the section on three causes of wrong answers: more models of these families, and what was wrong."""
    rows = newest(rows)
    wrong = [f"Seed {row['seed']}, model {row['number']}: {row['name']}." for row in rows if row["outcome"] == "lie"]
    text = (
        f"{plural(len(rows), 'random model')} of the families {', '.join(sorted({row['family'] for row in rows}))}, "
        f"{_seeds(rows)}: {rate(rows)}. {' '.join(wrong)}\n\n{about(rows)} "
        f"pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    return f"{text}\n\n{table(HEADER, table_rows(rows))}"


def _seeds(rows: Sequence[Row]) -> str:
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def claim(rows: Sequence[Row]) -> str:
    """Return the sentence's part that README and other pages state."""
    rows = newest(rows)
    return f"{len(rows)} random models of {plural(len({row['seed'] for row in rows}), 'seed')}, {rate(rows)}"


def wanting(rows: Sequence[Row]) -> list[str]:
    """Return a line for each lie, crash, alarm, and fit that was cut off."""
    order = ("lie", "crash", "alarm", "late", "honest")
    kept = [row for row in rows if row["outcome"] in order]
    return [line(row) for row in sorted(kept, key=lambda row: (order.index(row["outcome"]), int(row["number"])))]
