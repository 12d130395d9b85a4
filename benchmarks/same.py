"""Whether two versions of the package make the same fits, bit for bit: ``python -m benchmarks.same BEFORE AFTER``.

    python -m benchmarks.same ../before .

BEFORE and AFTER are folders with this repository at two versions. Models are taken from the stored rows of the zoo: at
least one for each way through the methods (the acceptance tests that a fit passed), and more of those that many fits
take. Compared are the draws to use, the method, the verdict's status, the number of gradients, the accepted tests and
the stages. If all are equal, the pair is written to ``benchmarks/results/same.csv``. Then the lines in which the two
versions differ count as unchanged: see ``benchmarks/fingerprints.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import fingerprints, records
from benchmarks.records import Row
from benchmarks.zoo import running as zoo_running

FIELDS = ("before", "version", "models", "ways", "machine", "software")
SECONDS, SHARE, MOST = 12.0, 8, 8  # of a stored fit, if its way has a quicker one; one of so many fits, at most so many


def ways(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows that kept an account, by the acceptance tests that they passed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("ledger"):
            found.setdefault("|".join(json.loads(row["ledger"])["accepted"]), []).append(row)
    return found


def chosen(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return seeds and numbers of models of the zoo, some for each way."""
    found = []
    for way, own in sorted(ways(rows).items()):
        own = sorted(own, key=lambda row: (float(row["seconds"]), row["seed"], row["number"]))
        limit = max(SECONDS, float(own[0]["seconds"]))
        quick = [row for row in own if float(row["seconds"]) <= limit]
        count = min(max(1, min(MOST, len(own) // SHARE)), len(quick))
        found += [(int(row["seed"]), int(row["number"])) for row in random.Random(way).sample(quick, count)]
    return found


def fits(models: Sequence[tuple[int, int]]) -> Iterator[list[object]]:
    """Yield what tells each fit from another one."""
    import torch

    import pyro_flows
    from benchmarks.zoo import zoo
    from pyro_flows.support.process.ledger import ledger

    torch.set_num_threads(1)
    for seed, number in models:
        case = zoo(seed, number)
        with ledger() as kept:
            found = pyro_flows.fit(case.model, *case.args, model_kwargs=case.kwargs, seed=number, progress=False)
        draws = b"".join(found.samples[name].contiguous().numpy().tobytes() for name in sorted(found.samples))
        about = [found.method, found.verdict.status, found.settings["gradient_evaluations"]]
        accepted = json.loads(kept.as_json())["accepted"]
        yield [hashlib.sha256(draws).hexdigest(), *about, accepted, [stage["stage"] for stage in found.history]]


def _lines(folder: Path, models: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Run :func:`fits` with the package of a folder, one line a fit, after a line with the version."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = f"space = {{'__name__': 'same'}}; exec(open({__file__!r}).read(), space); space['_print']({list(models)!r})"
    code = f"import sys; sys.path[0] = {str(folder)!r}; {run}"  # this file: the folder may have none
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from (line.strip() for line in process.stdout)


def _print(models: Sequence[tuple[int, int]]) -> None:
    print(records.code_version(), flush=True)
    for one in fits(models):
        print(json.dumps(one), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and keep the pair if all fits are equal; return 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args(arguments)
    rows = records.read(zoo_running.OUT)
    models = chosen(rows)
    both = (_lines(folder.resolve(), models) for folder in (given.before, given.after))
    versions, *found = zip(*both, strict=True)
    differ = [model for model, (one, other) in zip(models, found, strict=True) if one != other]
    print(f"{len(models) - len(differ)} of {len(models)} fits are equal; others: {differ}")
    if differ or len(found) != len(models):
        return 1
    keep(*versions, models=len(models), ways=len(ways(rows)), packages=(given.before, given.after))
    return 0


def keep(before: str, after: str, *, models: int, ways: int, packages: Sequence[Path]) -> None:
    """Write a pair of versions with equal fits, and keep the fingerprints of both."""
    for version, folder in zip((before, after), packages, strict=True):
        fingerprints.save(version, package=folder / "pyro_flows")
    had = records.start(fingerprints.SAME, FIELDS)
    row = {"before": before, "version": after, "models": models, "ways": ways}
    if not any((one["before"], one["version"]) == (before, after) for one in had):
        records.append(fingerprints.SAME, FIELDS, {**row, "machine": records.machine(), "software": records.software()})


if __name__ == "__main__":
    sys.exit(main())
