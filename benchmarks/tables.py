"""Write the tables of ``docs/performance.md`` from the CSV files of the benchmarks.

    python -m benchmarks.tables

Only what stands between the markers is replaced; the text around them stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    density,
    density_tables,
    named,
    nuts,
    planar,
    posteriordb,
    records,
    rivals,
    samplers,
    speed,
    speed_tables,
    stopping,
    toys,
)
from benchmarks.modes import __main__ as modes
from benchmarks.records import Row
from benchmarks.zoo import reporting as zoo_reporting
from benchmarks.zoo import running as zoo_running

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
SKELETON = """# Performance

`make bench` runs the benchmarks and writes the tables of this page.

## Is the verdict right?

<!-- zoo: begin -->
<!-- zoo: end -->

## Models that statisticians bring

<!-- named: begin -->
<!-- named: end -->

## Several modes

<!-- modes: begin -->
<!-- modes: end -->

## Speed

<!-- speed: begin -->
<!-- speed: end -->

## Posteriors with reference draws

<!-- posteriordb: begin -->
<!-- posteriordb: end -->

## Against NUTS

<!-- nuts: begin -->
<!-- nuts: end -->

## What the automatic stop costs

<!-- stopping: begin -->
<!-- stopping: end -->

## Toy targets

<!-- toys: begin -->
<!-- toys: end -->

## Densities of data

<!-- density: begin -->
<!-- density: end -->
"""


def write_tables(
    page: Path = PAGE,
    *,
    zoo_csv: Path = zoo_running.OUT,
    named_csv: Path = named.OUT,
    modes_csv: Path = modes.OUT,
    speed_csv: Path = speed.OUT,
    posteriordb_csv: Path = posteriordb.OUT,
    nuts_csv: Path = nuts.OUT,
    stopping_csv: Path = stopping.OUT,
    toys_csv: Path = toys.OUT,
    density_csv: Path = density.OUT,
) -> None:
    """Fill the sections of ``page`` whose CSV file is there; make the page if there is none.

    Raises:
        ValueError: if the page lacks the markers of a section.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else SKELETON
    sections: list[tuple[str, Path, Callable[[Sequence[Row]], str]]] = [
        ("zoo", zoo_csv, lambda rows: zoo_reporting.section(rows, table, about)),
        ("named", named_csv, lambda rows: named.section(rows, table, about)),
        ("modes", modes_csv, lambda rows: modes.section(rows, table, about)),
        ("speed", speed_csv, lambda rows: speed_tables.section(rows, table)),
        ("posteriordb", posteriordb_csv, posteriordb_section),
        ("nuts", nuts_csv, nuts_section),
        ("stopping", stopping_csv, stopping_section),
        ("toys", toys_csv, toys_section),
        ("density", density_csv, density_section),
    ]
    for name, file, section in sections:
        if rows := records.read(file):
            text = replace(text, name, section(rows))
    page.write_text(text, encoding="utf-8")


def replace(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: if a marker is missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"page: expected the markers {begin} and {end}, in this order; put them in.")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are set to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(rows: Sequence[Row]) -> str:
    """Name the machines, the software and the versions that the rows come from."""
    columns = ("machine", "software")
    found = [" and ".join(dict.fromkeys(row[column] for row in rows if row[column])) for column in columns]
    return f"Measured on {found[0]}; {found[1]}."


# ---- sections --------------------------------------------------------------------------------------------------------


def stopping_section(rows: Sequence[Row]) -> str:
    """Return the section about the automatic stop."""
    rows = [row for row in rows if row["version"] == rows[-1]["version"]]
    longer = statistics.median(int(row["longer_steps"]) / int(row["steps"]) for row in rows)
    text = (
        f"The first round of a fit against one with the same seed that goes on {longer:.1f} times as long (a budget of "
        f"{stopping.LONGER} times the steps, less what its shorter cool-down leaves); ELBOs on {stopping.DRAWS} common "
        f"draws. {stopping.summary(rows)} {about(rows)} pyro_flows {rows[-1]['version']}."
    )
    body = [
        [
            f"{row['posterior']}, seed {row['seed']}",
            row["steps"],
            row["longer_steps"],
            _lost(row),
            _lost(row, "error_of_"),
        ]
        for row in rows
    ]
    return f"{text}\n\n{table(['', 'steps', 'longer', 'nats lost', 'standard error'], body)}"


def _lost(row: Row, prefix: str = "") -> str:
    return f"{float(row[f'{prefix}lost']):.4f}"


def posteriordb_section(rows: Sequence[Row]) -> str:
    """Return the section about posteriordb: our fits by posterior, then all methods."""
    methods = posteriordb.newest(rows)
    parts = []
    if ours := methods.get(posteriordb.OURS):
        parts += [_ours_text(ours), _ours_table(ours)]
    parts += [_methods_text(methods), _methods_table(methods)]
    return "\n\n".join(parts)


def _ours_text(rows: Sequence[Row]) -> str:
    found = posteriordb.count(rows)
    return (
        f"`fit` as it comes, on {found.posteriors} posteriors of posteriordb with {_plural(found.seeds, 'seed')} each; "
        f"every figure is that of the worst seed. Errors are those of the worst unconstrained coordinate against the "
        "reference draws: of the mean, in reference standard deviations, and the absolute log ratio of standard "
        "deviations. They are given for the draws to use and for raw draws of the guide. The ELBO gap is to a log "
        f"evidence known to 0.02 nats. Seconds are of one thread. {about(rows)} pyro_flows {rows[-1]['version']}."
    )


def _ours_table(rows: Sequence[Row]) -> str:
    header = ["posterior", "D", "mean", "sd", "raw mean", "raw sd", "k-hat", "ESS/S", "ELBO gap", "gradients"]
    body = []
    for name, group in posteriordb.by_posterior(rows).items():
        errors = [posteriordb.worst(group, f"{which}_{what}") for which in ("used", "raw") for what in ("mean", "sd")]
        statuses = ", ".join(sorted({row["status"] or "failed" for row in group}))
        body.append(
            [
                name,
                next((row["dim"] for row in group if row["dim"]), ""),
                *(_number(error, 3) for error in errors),
                _number(posteriordb.worst(group, "k_hat"), 2),
                _number(posteriordb.worst(group, "ess_ratio", smallest=True), 2),
                _number(posteriordb.worst(group, "elbo_gap"), 3),
                _number(posteriordb.worst(group, "gradient_evaluations"), 0),
                _number(posteriordb.worst(group, "seconds"), 0),
                statuses,
            ]
        )
    return table([*header, "seconds", "verdicts"], body)


def _methods_text(methods: dict[str, list[Row]]) -> str:
    others = [name for name in methods if name != posteriordb.OURS]
    text = (
        f"A fit is right if no mean is off by more than {posteriordb.MEAN} standard deviations and no standard "
        "deviation by more than 10 %, wrong if one is off by more than 0.25 standard deviations or 25 %. A posterior "
        "counts as right if all seeds are."
    )
    if not others:
        return text
    return (
        f"{text} Pyro's guides are trained by Pyro's `SVI` with Adam: 2000 steps of 0.01 with one particle, or, with "
        f"equal gradients, {rivals.PARTICLES} particles and a step size of 0.005 for as many gradient evaluations as "
        f"our fit of the same posterior and seed took ({rivals.GRADIENTS_AT_MOST} at most). They get each posterior in "
        "unconstrained coordinates, since on the models as written they cannot start from improper priors. Their flow "
        f"has {rivals.COUPLINGS} affine couplings of hidden layers {rivals.HIDDEN} with flips. Verdicts, and the draws "
        "to use, are those of `diagnose`."
    )


def _methods_table(methods: dict[str, list[Row]]) -> str:
    gaps = [f"gap ≤ {limit:g}" for limit in posteriordb.SMALL_GAPS]
    header = ["method", "right, to use", "right, raw", "k-hat < 0.7", "ESS/S ≥ 0.1", *gaps]
    header += ["wrong and ok", "right and unreliable", "gradients", "seconds"]
    body = []
    for name, rows in methods.items():
        found = posteriordb.count(rows)
        total = f"of {found.posteriors}"
        counts = (found.right_used, found.right_raw, found.small_k, found.large_ess)
        body.append(
            [
                name,
                *(f"{number} {total}" for number in counts),
                *(f"{number} of {found.evidence_known}" for number in found.small_gap),
                f"{found.wrong_and_ok_fits} of {found.fits}",
                f"{found.right_and_unreliable_fits} of {found.right_fits}",
                _number(found.gradients, 0),
                _number(found.seconds, 1),
            ]
        )
    return table(header, body)


def nuts_section(rows: Sequence[Row]) -> str:
    """Return the section about seconds to a right posterior."""
    found = nuts.cells(rows)
    versions = [kept[-1]["version"] for kept in posteriordb.newest(rows).values()]
    text = (
        f"Seconds of the processor, in a process of one thread, from just before the model is built to the last draw. "
        f"Medians over {_plural(len({row['seed'] for row in rows}), 'seed')}. Draws are right if no mean is off by "
        f"more than {posteriordb.MEAN} standard deviations and no standard deviation by more than 10 %; ratios compare "
        "seconds whether or not they are, a failed run has neither. Where "
        f"{samplers.CHAINS} chains of Pyro's NUTS would take more than {samplers.LIMIT / 60:g} minutes, one of "
        f"{samplers.SHORT} draws after as many of warm-up is timed and scaled by {samplers.SCALE}; after "
        f"{samplers.MOST / 60:g} minutes it is broken off, which gives a lower bound (≥). {about(rows)} "
        f"{', '.join(versions)}."
    )
    verdicts = "\n".join(f"- {line[0].upper()}{line[1:]}." for line in nuts.summary(rows).splitlines())
    return f"{text}\n\n{verdicts}\n\n{_nuts_table(found, list(posteriordb.by_posterior(rows)))}"


def _nuts_table(found: dict[str, dict[str, nuts.Cell]], posteriors: Sequence[str]) -> str:
    rivals_here = [rival for rival in nuts.GOALS if rival in found]
    header = ["posterior", posteriordb.OURS, "right"]
    header += [column for rival in rivals_here for column in (rival, "right", "scaled", "ratio")]
    body = []
    for name in posteriors:
        ours = found.get(posteriordb.OURS, {}).get(name)
        cells = ["", ""] if ours is None else [_number(ours.seconds, 1), _yes(ours.right)]
        for rival in rivals_here:
            theirs = found[rival].get(name)
            if theirs is None:
                cells += ["", "", "", ""]
            else:
                times = "" if ours is None else _number(nuts.ratio(ours, theirs), 2)
                scaled = f"{'≥ ' * theirs.broken}× {samplers.SCALE}" if theirs.scaled else ""
                cells += [_number(theirs.seconds, 1), _yes(theirs.right), scaled, times]
        body.append([name, *cells])
    return table(header, body)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def toys_section(rows: Sequence[Row]) -> str:
    """Return the section about toy targets."""
    cases = toys.newest(rows)
    kept = [row for group in cases.values() for row in group]
    seeds = max(len(group) for group in cases.values())
    text = (
        f"`fit` as it comes, on targets of known log normaliser and moments, with up to {_plural(seeds, 'seed')} each. "
        "u1 to u4 are Rezende and Mohamed's potentials; the funnel is Neal's in 10 dimensions (best Gaussian: a gap of "
        "1.863), as a hierarchical model and as a mere density; many_well has 32 dimensions and 2 wells in each of 16 "
        "pairs; mixture is 40 Gaussians scattered over a square of side 80. Gaps are those of the ELBO to the log "
        "normaliser, in nats. A mode is found if draws of the "
        f"guide hold {toys.FOUND_SHARE:.0%} of its mass at least. A fit is wrong if it lacks a mode, or draws to use "
        "miss a mean by more than 0.25 standard deviations or a standard deviation by more than 25 %. Where a first "
        f"round did not suffice, the fit added layers. Each target was run last at its own version. {about(kept)}"
    )
    return f"{text}\n\n{_toys_table(cases)}"


def _toys_table(cases: dict[toys.Case, list[Row]]) -> str:
    header = ["target", "flow", "layers", "runs", "median gap", "worst gap", "k-hat", "ESS/S", "modes", "sd of x0"]
    header += ["wrong and ok", "gradients", "seconds", "verdicts", "version"]
    body = []
    for case, rows in cases.items():
        good = [row for row in rows if not row["error"]]
        gaps = [float(row["elbo_gap"]) for row in good]
        modes = sorted({int(row["modes"]) for row in good if row["of_modes"]})
        sds = [float(row["sd_x0"]) for row in good if row["sd_x0"]]
        body.append(
            [
                case.target,
                case.flow,
                str(case.layers),
                str(case.runs),
                _number(statistics.median(gaps) if gaps else math.nan, 3),
                _number(posteriordb.worst(rows, "elbo_gap"), 3),
                _number(posteriordb.worst(rows, "k_hat"), 2),
                _number(posteriordb.worst(rows, "ess_ratio", smallest=True), 2),
                f"{_range(modes, 0)} of {good[0]['of_modes']}" if modes else "",
                _range(sds, 2),
                f"{sum(toys.wrong(row) and row['status'] == 'ok' for row in rows)} of {len(rows)}",
                _number(posteriordb.median(good, "gradient_evaluations"), 0),
                _number(posteriordb.median(good, "seconds"), 0),
                ", ".join(sorted({row["status"] or "failed" for row in rows})),
                rows[-1]["version"].rpartition("-")[-1],
            ]
        )
    return table(header, body)


def _range(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def density_section(rows: Sequence[Row], planar_csv: Path = planar.OUT) -> str:
    """Return the section about densities of data."""
    return density_tables.section(rows, records.read(planar_csv), table, about)


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    write_tables()
