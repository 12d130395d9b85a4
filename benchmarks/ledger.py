"""Fit all that the evidence is made of, and print what has changed against the rows that are stored: ``make ledger``.

    python -m benchmarks.ledger --jobs 2
    python -m benchmarks.ledger --quick
    python -m benchmarks.ledger --compare --against build/before --out build/after

A fit is a row: its table and number, whether it is right, a lie (wrong, and called usable), an alarm (right, and called
unreliable), honest (wrong, and called unreliable), cut off or a crash; its verdict, method, steps, gradients, seconds;
which search found which region, and which acceptance tests it passed. Rows are written to a folder as they come, in the
files and columns of ``benchmarks/results``, and a run that was stopped goes on. ``--quick`` makes a tenth of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import records, zoo
from benchmarks.markdown import table
from benchmarks.modes.__main__ import FOUND
from benchmarks.named.running import right as named_right
from benchmarks.posteriors import judging
from benchmarks.posteriors.running import OURS
from benchmarks.records import Row
from benchmarks.standing import MIRRORED, TABLES

OUT = Path("build") / "ledger"
QUICK = {
    "zoo": (("--models", str(zoo.MODELS // 10)),),
    "posteriordb": (("--seeds", "1", *(word for name in judging.NAMES[::2] for word in ("--only", name))),),
    "larger": (("--seeds", "1", "--only", "seeds", "surgical", "--methods", OURS),),
    "named": (("--seeds", "1", "--only", *MIRRORED[:2]),),
    "modes": (("--seeds", "1", "--ways", "fit", "--only", "u1", "mixture", "two_moons_1"),),
}  # arguments of each table's command, for a tenth of its rows
SAID = {
    "right": "right",
    "lie": "wrong and called usable",
    "alarm": "right and called unreliable",
    "honest": "wrong and called unreliable",
    "late": "cut off",
    "crash": "ended with an error",
}
OUTCOMES = tuple(SAID)
ACTED, LEAST = 0.05, 0.002  # seconds from which a part counts as one of a fit; share of all seconds that is shown
LIES, ALARMS, RIGHT = 0, 0.01, 0.97  # what a change of the fit may not go beyond
SLOWER, DOUBLED, SHORT = 1.1, 2.0, 2.0  # times the seconds, in the median and of one fit; seconds more that are noise


@dataclass(frozen=True)
class Entry:
    """One fit of the ledger.

    Attributes:
        outcome: one of `OUTCOMES`.
        status: of the verdict.
        seconds: of the processor.
        account: what :class:`pyro_flows.support.process.ledger.Ledger` kept, empty in rows of earlier code.
        off: the worst error of a mean, in sds, and of an sd, the absolute log ratio; none where they are not known.
    """

    outcome: str
    status: str
    seconds: float
    account: dict[str, object] = field(default_factory=dict)
    off: tuple[float, ...] = ()

    @property
    def method(self) -> str:
        """Return what made the draws."""
        return str(self.account.get("method", ""))


def outcome(right: bool, row: Row) -> str:
    """Return the outcome of a fit that is right or not, by its verdict."""
    if row["error"]:
        return "crash"
    if row["status"] == "unreliable":
        return "alarm" if right else "honest"
    return "right" if right else "lie"


def _modes_right(row: Row) -> bool:
    return bool(row["least"]) and float(row["least"]) > FOUND and float(row["most"]) < 2.0 - FOUND


OF: dict[str, tuple[Callable[[Row], tuple[str, ...]], Callable[[Row], str], str]] = {
    "zoo": (lambda row: (row["seed"], row["number"]), lambda row: row["outcome"], "seconds"),
    "posteriordb": (
        lambda row: (row["posterior"], row["seed"]),
        lambda row: outcome(not judging.wrong(row), row),
        "seconds",
    ),
    "larger": (
        lambda row: (row["posterior"], row["seed"]),
        lambda row: outcome(row["right"] == "yes", row),
        "cpu_seconds",
    ),
    "named": (
        lambda row: (row["model"], row["runs"], row["seed"]),
        lambda row: outcome(named_right(row), row),
        "seconds",
    ),
    "modes": (lambda row: (row["target"], row["seed"]), lambda row: outcome(_modes_right(row), row), "seconds"),
}  # of each table: what tells its fits apart, their outcome, and the column of seconds
ERRORS = {"posteriordb": ("used_mean", "used_sd"), "larger": ("mean", "sd"), "named": ("mean_error", "sd_error")}
Key = tuple[str, ...]


def entries(folder: Path) -> dict[Key, Entry]:
    """Return the fits in the files of a folder, those that pages would show, by table and what tells them apart."""
    found = {}
    for name, one in TABLES.items():
        key, judged, seconds = OF[name]
        for row in one.shown(records.read(folder / one.csv.name)):
            account = json.loads(row["ledger"]) if row.get("ledger") else {}
            off = tuple(float(row[of]) for of in ERRORS.get(name, ()) if row[of])
            found[name, *key(row)] = Entry(judged(row), row["status"], float(row[seconds] or 0.0), account, off)
    return found


def make(folder: Path, jobs: int, *, quick: bool, only: Sequence[str]) -> None:
    """Make the rows that the files of a folder lack."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in only:
        one = TABLES[name]
        for arguments in QUICK[name] if quick else one.runs:
            more = ("--jobs", str(jobs)) if one.side_by_side else ()
            one.main([*arguments, *more, "--out", str(folder / one.csv.name)])


def counts(found: Iterable[Entry]) -> dict[str, int]:
    """Return how many fits came to each outcome."""
    had = Counter(entry.outcome for entry in found)
    return {name: had[name] for name in OUTCOMES}


def difference(before: dict[Key, Entry], after: dict[Key, Entry]) -> str:
    """Return what has changed, of the fits that both have, and whether a change of the fit may land so."""
    both = [key for key in after if key in before]
    if not both:
        return "No fit is in both."
    old, new = ([entries_of[key] for key in both] for entries_of in (before, after))
    ratios = [two.seconds / one.seconds for one, two in zip(old, new, strict=True) if one.seconds and two.seconds]
    doubled = [
        key for key in both
        if after[key].seconds > max(DOUBLED * before[key].seconds, before[key].seconds + SHORT)
    ]  # fmt: skip
    outcomes = [[when, *map(str, counts(of).values())] for when, of in (("before", old), ("after", new))]
    lines = [
        f"{len(both)} fits are in both.",
        table(["", *OUTCOMES], outcomes),
        f"Seconds: {statistics.median(ratios):.2f} times as many in the median, {sum(e.seconds for e in new):.0f} "
        f"after {sum(e.seconds for e in old):.0f} in all." if ratios else "No seconds are known.",
        *(_change(key, before[key], after[key]) for key in both if _differs(before[key], after[key])),
        *(
            f"{' '.join(key)}: {before[key].seconds:.1f} -> {after[key].seconds:.1f} seconds" for key in doubled
        ),
    ]  # fmt: skip
    return "\n".join([*lines, *faults(new, ratios, doubled)])


def _differs(one: Entry, two: Entry) -> bool:
    methods = one.method and two.method and one.method != two.method
    return bool((one.outcome, one.status) != (two.outcome, two.status) or methods)


def _change(key: Key, one: Entry, two: Entry) -> str:
    was, now = (f"{entry.outcome}, {entry.status or '-'}, {entry.method or '-'}" for entry in (one, two))
    return f"{' '.join(key)}: {was} -> {now}"


def faults(new: list[Entry], ratios: list[float], doubled: list[Key]) -> list[str]:
    """Return what forbids a change of the fit: lies, alarms, fewer right, slower in the median, or some doubled."""
    had, many = counts(new), len(new)
    found = {
        f"{had['lie']} lies, {LIES} are allowed": had["lie"] > LIES,
        f"{had['alarm']} alarms of {many}, {ALARMS:.0%} are allowed": had["alarm"] > ALARMS * many,
        f"{had['right']} of {many} right, {RIGHT:.0%} are asked for": had["right"] < RIGHT * many,
        f"slower in the median, {SLOWER:g} times is allowed": bool(ratios) and statistics.median(ratios) > SLOWER,
        f"{len(doubled)} fits took twice as long": bool(doubled),
    }
    return [f"Not allowed: {what}." for what, holds in found.items() if holds]


def used(found: Mapping[Key, Entry]) -> str:
    """Return tables of what answered: methods, acceptance tests, searches, and the seconds of each part."""
    kept = {key: entry for key, entry in found.items() if entry.account}
    names = [name for name in TABLES if any(key[0] == name for key in kept)]
    parts: dict[str, list[float]] = {}
    for entry in kept.values():
        for part, (seconds, gradients) in _dict(entry.account, "spent").items():
            sums = parts.setdefault(part, [0.0, 0.0, 0.0])
            sums[:] = sums[0] + seconds, sums[1] + gradients, sums[2] + (seconds >= ACTED)
    total = sum(sums[0] for sums in parts.values())
    body = [
        [part, f"{seconds:.0f}", f"{100.0 * seconds / total:.1f}", f"{gradients:.0f}", f"{fits:.0f}"]
        for part, (seconds, gradients, fits) in sorted(parts.items(), key=lambda pair: -pair[1][0])
        if seconds >= LEAST * total
    ]
    return "\n\n".join(
        [
            _counted("method", names, kept, lambda entry: [entry.method]),
            _counted("the acceptance test that decided", names, kept, _decided),
            _counted(
                "search that found a missed region", names, kept, lambda entry: list(_dict(entry.account, "found"))
            ),
            table(["part of a fit", "CPU seconds", "%", "gradients", "fits"], body),
        ]
    )


def _decided(entry: Entry) -> list[str]:
    accepted = entry.account.get("accepted")
    return [str(accepted[-1])] if isinstance(accepted, list) and accepted else ["none"]


def _counted(what: str, names: list[str], kept: Mapping[Key, Entry], of: Callable[[Entry], list[str]]) -> str:
    """Return a table of how many fits of each table have which words."""
    had = Counter((word, key[0]) for key, entry in kept.items() for word in of(entry))
    words = sorted({word for word, _ in had}, key=lambda word: (-sum(had[word, name] for name in names), word))
    body = [[word, *(str(had[word, name] or "") for name in names)] for word in words]
    return table([what, *names], body)


def _dict(account: Mapping[str, object], name: str) -> dict[str, tuple[float, float]]:
    found = account.get(name, {})
    return found if isinstance(found, dict) else {}


def section(folder: Path) -> str:
    """Return the section of ``docs/evidence/ledger.md``: outcomes, the lies by name, and what answered."""
    found = entries(folder)
    kept = {key: entry for key, entry in found.items() if entry.account}
    if not kept:
        return "No row has an account yet."
    lines = [table(["", "fits", *SAID.values()], [_row(name, found) for name in [*TABLES, "all"]])]
    lies = {key: entry for key, entry in found.items() if entry.outcome == "lie"}
    lines.append(
        f"A fit of zoo or posteriordb is wrong if a mean is off by more than {judging.WRONG_MEAN} sds, or an sd by "
        f"more than a factor {math.exp(judging.WRONG_SD):.2f}. For larger models and regressions the bar is stricter: "
        f"{judging.MEAN} sds and a factor {math.exp(judging.SD):.2f}."
    )
    if lies:
        beyond = sum(_far(entry) for entry in lies.values())
        lines += [
            f"Wrong and called usable: {len(lies)}, of which {beyond} are beyond the bar of zoo and posteriordb too.",
            "\n".join(_named(key, entry) for key, entry in lies.items()),
        ]
    lines.append(f"The tables below are of the {len(kept)} fits whose rows say what answered.")
    return "\n\n".join([*lines, used(found)])


def claim(folder: Path) -> str:
    """Return what pages say of the fits that are no random models."""
    others = [entry for key, entry in entries(folder).items() if key[0] != "zoo"]
    return f"Of {len(others)} other fits, {counts(others)['lie']} missed the bar of their table and were called usable"


def _row(name: str, found: Mapping[Key, Entry]) -> list[str]:
    of = [entry for key, entry in found.items() if name in (key[0], "all")]
    return [name, str(len(of)), *map(str, counts(of).values())]


def _far(entry: Entry) -> bool:
    """Whether errors are beyond the bar of posteriordb, or are not known."""
    return not entry.off or entry.off[0] > judging.WRONG_MEAN or entry.off[1] > judging.WRONG_SD


def _named(key: Key, entry: Entry) -> str:
    said = f"- {key[0]}, `{key[1]}`, seed {key[-1]}, `{entry.status}`"
    if not entry.off:
        return said
    return f"{said}: a mean is off by {entry.off[0]:.2f} sds, an sd by a factor {math.exp(entry.off[1]):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the fits")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="only these tables")
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"of the rows (default: {OUT})")
    parser.add_argument(
        "--against", type=Path, default=records.RESULTS, metavar="FOLDER", help="what to compare with (default: stored)"
    )
    parser.add_argument("--compare", action="store_true", help="fit nothing, compare what is there")
    options = parser.parse_args(arguments)
    if not options.compare:
        torch.set_num_threads(1)
        make(options.out, options.jobs, quick=options.quick, only=options.only)
    after = entries(options.out)
    print(used(after))
    print()
    print(difference(entries(options.against), after))


if __name__ == "__main__":
    main()
