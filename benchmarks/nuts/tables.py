"""The section about seconds to a right posterior."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import about, number, plural, table, yes
from benchmarks.nuts import running as nuts
from benchmarks.nuts import samplers
from benchmarks.posteriors import judging
from benchmarks.posteriors import running as posteriordb
from benchmarks.records import Row


def nuts_section(rows: Sequence[Row]) -> str:
    """Return the section about seconds to a right posterior."""
    found = nuts.cells(rows)
    versions = [kept[-1]["version"] for kept in judging.newest(rows).values()]
    text = (
        f"Seconds of the processor, in a process of one thread, from just before the model is built to the last draw. "
        f"Medians over {plural(len({row['seed'] for row in rows}), 'seed')}.\n\nDraws are right if no mean is off by "
        f"more than {judging.MEAN} standard deviations and no standard deviation by more than 10 %; ratios compare "
        "seconds whether or not they are, a failed run has neither.\n\nWhere "
        f"{samplers.CHAINS} chains of Pyro's NUTS would take more than {samplers.LIMIT / 60:g} minutes, one of "
        f"{samplers.SHORT} draws after as many of warm-up is timed and scaled by {samplers.SCALE}; after "
        f"{samplers.MOST / 60:g} minutes it is broken off, which gives a lower bound (≥).\n\n{about(rows)} "
        f"{', '.join(versions)}."
    )
    verdicts = "\n".join(f"- {line[0].upper()}{line[1:]}." for line in nuts.summary(rows).splitlines())
    return f"{text}\n\n{verdicts}\n\n{_nuts_table(found, list(judging.by_posterior(rows)))}"


def _nuts_table(found: dict[str, dict[str, nuts.Cell]], posteriors: Sequence[str]) -> str:
    rivals_here = [rival for rival in nuts.RIVALS if rival in found]
    header = ["posterior", posteriordb.OURS, "right"]
    header += [column for rival in rivals_here for column in (rival, "right", "ratio")]
    body = []
    for name in posteriors:
        ours = found.get(posteriordb.OURS, {}).get(name)
        cells = ["", ""] if ours is None else [number(ours.seconds, 1), yes(ours.right)]
        for rival in rivals_here:
            theirs = found[rival].get(name)
            if theirs is None:
                cells += ["", "", ""]
            else:
                times = "" if ours is None else number(nuts.ratio(ours, theirs), 2)
                cells += [_seconds(theirs), yes(theirs.right), times]
        body.append([name, *cells])
    return table(header, body)


def _seconds(cell: nuts.Cell) -> str:
    """Return seconds, and say if they are those of a shorter run or only a lower bound."""
    return f"{'≥ ' * cell.broken}{number(cell.seconds, 1)}{' (scaled)' * cell.scaled}"
