"""The section on amortized posteriors of ``docs/evidence/accuracy.md``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import records
from benchmarks.markdown import about, table

HEADER = (
    *(
        "model",
        "simulations",
        "data sets",
        "usable and right",
        "wrong and usable",
        "verdicts",
        "ESS/S",
        "ms each, median (95 %)",
    ),
    *("training, CPU s", "p of ranks", "named: as predicted", "named: changed", "`ok`: changed"),
)


def section(rows: Sequence[records.Row]) -> str:
    """Return the text and the table."""
    rows = list({row["model"]: row for row in rows}.values())
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    where = f"{about(rows)} pyro_flows {versions}."
    return "\n\n".join([_text(rows), where, table(HEADER, [_line(row) for row in rows])])


def _line(row: records.Row) -> list[str]:
    times = f"{row['ms_median']} ({row['ms_95']})"
    first = [
        row["model"],
        f"{int(row['simulations']):,}",
        row["data_sets"],
        row["right"],
        row["lies"],
        row["verdicts"],
        row["ess_median"],
        times,
    ]
    named = [f"{row['false_alarms']} of {row['data_sets']}", f"{row['named']} of {row['changed']}", row["changed_ok"]]
    return [*first, row["train_cpu_seconds"], row["p_value"], *named]


def _text(rows: Sequence[records.Row]) -> str:
    """Say what the columns are."""
    agree, compared = (sum(int(row[name]) for row in rows) for name in ("agree_with_fit", "compared_with_fit"))
    return (
        "Each row is one flow, trained once, and new data sets from the model. Right is an answer whose means are "
        "within 0.1 standard deviations of the exact ones, and whose standard deviations are within 10 %. Seconds are "
        "processor time of one thread. Changed data sets have all values, one, or every other one a thousand robust "
        "standard deviations away, which the prior does not predict. "
        f"Compared with `pf.fit` too: {compared}, of which {agree} agree in this sense."
    )
