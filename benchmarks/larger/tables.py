"""The section about larger models: seconds to a right posterior, and by what stage ours went."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.fingerprints import akin
from benchmarks.larger.models import MODELS
from benchmarks.larger.running import NONCENTERED
from benchmarks.markdown import about, number, plural, table, yes
from benchmarks.nuts import stages
from benchmarks.nuts.running import cells_of, ratio
from benchmarks.nuts.samplers import NUMPYRO, NUTPIE, PYRO
from benchmarks.posteriors import judging
from benchmarks.posteriors.running import OURS
from benchmarks.records import Row

RIVALS = (NUMPYRO, NONCENTERED, NUTPIE, PYRO)
HONEST = ("unreliable",)  # verdicts that say that draws may be wrong

Groups = dict[str, list[Row]]


def newest(rows: Iterable[Row]) -> dict[str, Groups]:
    """Return the rows by method and model, of each of both those of the version that was written last."""
    rows = list(rows)
    last = {(row["method"], row["posterior"]): row["version"] for row in rows}
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if akin(row["version"], last[row["method"], row["posterior"]]):
            found.setdefault(row["method"], {}).setdefault(row["posterior"], {})[row["seed"]] = row
    return {
        method: {name: list(models[name].values()) for name in MODELS if name in models}
        for method, models in found.items()
    }


def larger_section(rows: Sequence[Row]) -> str:
    """Return the section of ``docs/evidence/nuts.md``."""
    groups = newest(rows)
    kept = [row for models in groups.values() for group in models.values() for row in group]
    versions = dict.fromkeys(row["version"].rpartition(" ")[0] for row in kept)
    text = (
        f"Seconds of the processor, in a process of one thread, from just before the model is built to the last draw. "
        f"Medians over {plural(len({row['seed'] for row in kept}), 'seed')}, at most. Draws are right if no mean is "
        f"off by more than {judging.MEAN} standard deviations of a long run of NUTS and no standard deviation by more "
        "than 10 %, in unconstrained coordinates; for item response, on one side of its mirrored modes, each of which "
        f"has to have 40 to 60 % of the draws. Ratios are seconds of others over ours, whether or not draws are right."
        f"\n\n{about(kept)} {', '.join(versions)}."
    )
    parts = [text, "\n".join(f"- {line}." for line in summary(groups)), _times(groups)]
    if any(row["parts"] for row in kept):
        parts += ["By what stage the seconds of our fits went:", _stages(groups[OURS])]
    return "\n\n".join(part for part in parts if part)


def summary(groups: Mapping[str, Groups]) -> list[str]:
    """Return a line about each rival, of the models that both have done."""
    ours, lines = groups.get(OURS, {}), []
    for rival in RIVALS:
        names = [name for name in groups.get(rival, {}) if name in ours]
        mine, theirs = (cells_of({name: found[name] for name in names}) for found in (ours, groups.get(rival, {})))
        ratios = [ratio(mine[name], theirs[name]) for name in names if name in mine and name in theirs]
        if not ratios:
            continue
        honest = sum(all(_honest(row) for row in ours[name]) for name in names)
        lines.append(
            f"Against {rival}: faster on {sum(value >= 1.0 for value in ratios)} of {len(ratios)}, "
            f"{statistics.median(ratios):.2f} x in the median, {min(ratios):.2f} x at worst; ours right on "
            f"{sum(cell.right for cell in mine.values())}, right or said to be unreliable on {honest}, its draws right "
            f"on {sum(cell.right for cell in theirs.values())}"
        )
    return lines


def _honest(row: Row) -> bool:
    return row["right"] == "yes" or row["status"] in HONEST


def _times(groups: Mapping[str, Groups]) -> str:
    rivals = [rival for rival in RIVALS if rival in groups]
    header = ["model", "D", OURS, "right", "verdict"]
    header += [column for rival in rivals for column in (rival, "right", "ratio")]
    ours, body = groups.get(OURS, {}), []
    mine = cells_of(ours)
    for name in MODELS:
        everyone = [row for models in groups.values() for row in models.get(name, [])]
        if not everyone:
            continue
        dims = next((row["dim"] for row in everyone if row["dim"]), "")
        line = [name, dims, *_cell(ours.get(name)), ", ".join(_counted(row["status"] for row in ours.get(name, [])))]
        for rival in rivals:
            theirs = cells_of({name: groups[rival].get(name, [])}) if name in groups[rival] else {}
            both = name in mine and name in theirs
            line += [*_cell(groups[rival].get(name)), number(ratio(mine[name], theirs[name]), 2) if both else ""]
        body.append(line)
    return table(header, body)


def _cell(group: Sequence[Row] | None) -> list[str]:
    """Return seconds and whether draws are right; nothing where it was not run, and what is known of a failed run."""
    if not group:
        return ["", ""]
    errors = [row["error"] for row in group if row["error"]]
    if errors:
        limit = [error.split()[3] for error in errors if error.startswith("took more than")]
        return [f"> {limit[0]}" if limit else "failed", ""]
    (cell,) = cells_of({"": group}).values()
    bound = "≥ " * cell.broken or "≈ " * cell.scaled
    return [f"{bound}{number(cell.seconds, 1)}", yes(cell.right)]


def _counted(words: Iterable[str]) -> list[str]:
    words = [word for word in words if word]
    kinds = list(dict.fromkeys(words))
    return kinds if len(kinds) <= 1 else [f"{words.count(word)} {word}" for word in kinds]


def _stages(ours: Groups) -> str:
    """Return the table of seconds by stage, medians over seeds, and the share of starts and searches."""
    found: dict[str, dict[str, float]] = {}
    for name, group in ours.items():
        read = [stages.read(row["parts"]) for row in group if row["parts"]]
        if read:
            columns = {stage for parts in read for stage in parts}
            found[name] = {stage: statistics.median(parts.get(stage, 0.0) for parts in read) for stage in columns}
    columns = [stage for stage in (*stages.STAGES, stages.OTHER) if any(stage in parts for parts in found.values())]
    body = []
    for name, parts in found.items():
        share = sum(parts.get(stage, 0.0) for stage in stages.SEARCHING) / max(sum(parts.values()), 1e-9)
        body.append([name, *(number(parts.get(stage, 0.0), 1) for stage in columns), f"{100.0 * share:.0f} %"])
    return table(["model", *columns, f"{', '.join(stages.SEARCHING[:-1])} and {stages.SEARCHING[-1]}"], body)
