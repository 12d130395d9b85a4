"""The section on calibration of ``docs/evidence/accuracy.md``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import records
from benchmarks.markdown import table

HEADER = ("model", "draws of", "simulations", "CPU s", "CPU s each", "p, all", "smallest p", "50 %", "95 %", "verdicts")


def newest(rows: Sequence[records.Row]) -> list[records.Row]:
    """Return the last row of each model, method and number of simulations."""
    found = {(row["model"], row["method"], row["simulations"]): row for row in rows}
    return [found[key] for key in sorted(found)]


def section(rows: Sequence[records.Row]) -> str:
    """Return the text and the table."""
    rows = newest(rows)
    body = [_line(row) for row in rows]
    return "\n\n".join([_text(rows), _about(rows), table(HEADER, body)])


def _about(rows: Sequence[records.Row]) -> str:
    """Say what was measured where, by which versions."""
    models: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        models.setdefault((row["machine"], row["software"], row["version"]), []).append(row["model"])
    return " ".join(
        f"Measured on {machine}; {software}; pyro_flows {version}: {', '.join(dict.fromkeys(names))}."
        for (machine, software, version), names in models.items()
    )


def _line(row: records.Row) -> list[str]:
    each = float(row["cpu_seconds"]) / int(row["simulations"])
    what = {"together": "fit, side by side", "one by one": "fit, one by one"}.get(row["method"], row["method"])
    columns = [
        row["model"],
        what,
        row["simulations"],
        f"{float(row['cpu_seconds']):.0f}",
        f"{each:.2f}",
        row["p_value"],
    ]
    return [*columns, f"{row['smallest_p']}, {row['at']}", row["coverage_50"], row["coverage_95"], row["verdicts"]]


def _text(rows: Sequence[records.Row]) -> str:
    """Say how much faster fits are side by side, and how far ranks are apart."""
    said = [
        "Ranks of true values among 999 draws. Seconds are processor time of one thread. p is that of uniformity of "
        "all scalars together (Bonferroni); the log density counts as one. The columns 50 % and 95 % are the shares of "
        "true values in central intervals."
    ]
    for row in (row for row in rows if row["method"] == "one by one"):
        model, count = row["model"], int(row["simulations"])
        if row["together_seconds"]:
            slow, fast = float(row["cpu_seconds"]) / count, float(row["together_seconds"]) / count
            said.append(
                f"On {model}, {count} fits side by side take {fast:.2f} s each and one by one {slow:.2f} s, "
                f"{slow / fast:.0f} times as long, in one run."
            )
        said.append(
            f"On {model}, ranks of {count} simulations side by side and one by one, over the number of draws, differ "
            f"by {row['rank_distance']} on average; two sets of exact draws differ by {row['expected_distance']}."
        )
    return " ".join(said)
