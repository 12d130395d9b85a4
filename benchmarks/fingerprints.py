"""How much of the code that made a row has changed since: a fingerprint of each version's lines.

A line is a logical one: a statement, or the head of a block, on however many lines it is written. Comments, docstrings,
imports, blanks and layout do not count, nor does in which file a line stands. Three bytes of the hash of each line that
decides are kept, sorted, in ``benchmarks/results/code/VERSION.txt``, so that no history of the repository is needed.

Code that is written in another way, and makes the same fits, does not change a table. ``benchmarks/same.py`` compares
the fits of two versions bit for bit. Lines between two versions with equal fits do not count.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import math
import re
import textwrap
import tokenize
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import pyro_flows

Hashes = NDArray[np.uint32]

PARTS = {
    "flows": ("flows", "transforms", "support/numbers/tensors"),
    "density": ("densities",),
    "step": ("model/graphs", "inference/training", "support/numbers/cache", "support/numbers/tensors"),
    "fit": (
        *("model", "inference/starts", "inference/modes", "inference/verdict", "inference/chains", "fitting"),
        *("support/thresholds", "support/numbers/mixing", "support/process/seeding", "support/numbers/tensors"),
    ),
}  # rooms of the package, each in one part
APART = (
    *("fitting/hierarchical.py", "fitting/ranks.py", "guides/marginal_density.py"),
    *("model/unchanged.py", "model/dims.py", "model/versions.py"),
)
"""Modules of these rooms that decide about no row: fits of minibatches, which no table of fits has, the refusal of data
that have changed after a fit, and names of axes and of versions."""
DECIDING = {"fit": ("flows", "step", "fit"), "step": ("flows", "step"), "density": ("flows", "density")}
"""Which parts decide about the tables of each kind: of fits, of single steps, of densities of data."""
LIMIT = 0.05  # share of these lines that may have changed before a table is stale
UNKNOWN = 1.0  # the share where a version left no fingerprint
KEPT = Path(__file__).resolve().parent / "results" / "code"
SAME = KEPT.parent / "same.csv"  # pairs of versions whose fits are equal
PACKAGE = Path(pyro_flows.__file__).parent
VERSION = re.compile(r"\d+\.\d+\.\d+-[0-9a-f]{8}")

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def logical_lines(source: str) -> list[str]:
    """Return the statements and heads of blocks of a module, without docstrings, imports, comments and blanks."""
    tree, skipped = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped.add(node.lineno)
        elif isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            skipped.add(node.body[0].lineno)
    lines, line, first = [], "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if first not in skipped:
                lines.append(_plain(line))
            line = ""
        elif token.type not in _LAYOUT:
            first = first if line else token.start[0]
            line += token.string
    return lines


def _plain(line: str) -> str:
    """Return a line without what depends on the layout, or on how a Python version reads formatted strings."""
    text = "".join(line.split()).replace("{{", "{").replace("}}", "}")
    return re.sub(r",(?=[)\]}])", "", text)


def of_code(package: Path = PACKAGE) -> dict[str, Hashes]:
    """Return the sorted hashes of the lines of each of `PARTS`, in a package as it stands.

    Raises:
        FileNotFoundError: if there is no such room.
    """
    found = {}
    for part, rooms in PARTS.items():
        files = [file for room in rooms for file in sorted((package / room).rglob("*.py")) or [package / f"{room}.py"]]
        names = {file.relative_to(package).as_posix(): file for file in files}
        files = [file for name, file in names.items() if name not in APART and not name.startswith(_inside(rooms))]
        lines = (line for file in files for line in logical_lines(file.read_text(encoding="utf-8")))
        found[part] = np.sort(np.array([_hash(line) for line in lines], dtype=np.uint32))
    return found


def _inside(rooms: Sequence[str]) -> tuple[str, ...]:
    """Return the folders of other parts that stand inside of these rooms."""
    others = (room for part in PARTS.values() for room in part if room not in rooms)
    return tuple(f"{other}/" for other in others if other.startswith(tuple(f"{room}/" for room in rooms)))


def _hash(line: str) -> int:
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:3], "big")


@cache
def today() -> dict[str, Hashes]:
    """Return the hashes of this process's package."""
    return of_code()


def save(version: str, folder: Path = KEPT, package: Path = PACKAGE) -> None:
    """Keep the fingerprint of the code as it stands, which is that of ``version``, unless it is kept already."""
    file = folder / f"{version}.txt"
    if file.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    changed.cache_clear()
    load.cache_clear()
    parts = [f"{part}\n{_packed(hashes)}\n" for part, hashes in of_code(package).items()]
    file.write_text("\n".join(parts), encoding="ascii")


def _packed(hashes: Hashes) -> str:
    """Return sorted hashes as text: their differences, byte by byte, compressed."""
    steps = np.diff(hashes, prepend=np.uint32(0)).astype(">u4").view(np.uint8).reshape(-1, 4)
    return "\n".join(textwrap.wrap(base64.b64encode(zlib.compress(steps.T.tobytes(), 9)).decode(), 120))


def _unpacked(text: str) -> Hashes:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(4, -1).T
    return np.cumsum(np.ascontiguousarray(steps).view(">u4")[:, 0].astype(np.uint64)).astype(np.uint32)


@cache
def load(version: str, folder: Path = KEPT) -> dict[str, Hashes]:
    """Return the hashes of a version by part, nothing if no fingerprint was kept."""
    file = folder / f"{version}.txt"
    if not file.is_file():
        return {}
    parts = (part.partition("\n") for part in file.read_text(encoding="ascii").split("\n\n"))
    return {part: _unpacked(text) for part, _, text in parts}


def version_in(text: str) -> str | None:
    """Return the version of the package that a row's column names, if it names one."""
    found = VERSION.search(text)
    return found.group() if found else None


def share(before: Hashes, after: Hashes) -> float:
    """Return which share of the lines before has changed: the larger number of those that went and those that came."""
    (then, times), (now, again) = (np.unique(part, return_counts=True) for part in (before, after))
    _, one, other = np.intersect1d(then, now, assume_unique=True, return_indices=True)
    kept = int(np.minimum(times[one], again[other]).sum())
    return (max(len(before), len(after)) - kept) / max(len(before), 1)


@cache
def changed(version: str, kind: str, folder: Path = KEPT, since: str | None = None) -> float:
    """Return which share of the lines that decide has changed from a version to the code as it stands.

    Lines between two versions of :func:`same` do not count for fits.

    Args:
        version: of the package.
        kind: of tables, see `DECIDING`.
        folder: where fingerprints are kept.
        since: another version in the place of the code as it stands.
    """
    if version == since:
        return 0.0
    before, after = load(version, folder), today() if since is None else load(since, folder)
    ends = [(0.0, before)]  # of ways over pairs that are the same, the older pair first: what has changed up to there
    for one, other in same() if kind == "fit" else []:
        to = load(one, folder)
        ends.append((min(past + _between(end, to, kind) for past, end in ends), load(other, folder)))
    return min(*(past + _between(end, after, kind) for past, end in ends), UNKNOWN)


def _between(before: dict[str, Hashes], after: dict[str, Hashes], kind: str) -> float:
    if not before or not after:
        return UNKNOWN
    return share(*(np.concatenate([hashes[part] for part in DECIDING[kind]]) for hashes in (before, after)))


@cache
def same() -> list[tuple[str, str]]:
    """Return the pairs of versions whose fits were compared, and are equal."""
    if not SAME.is_file():
        return []
    with SAME.open(newline="", encoding="utf-8") as stream:
        return [(row["before"], row["version"]) for row in csv.DictReader(stream)]


def stands(version: str, within: float = LIMIT, kind: str = "fit") -> bool:
    """Whether a row's version is that of the code as it stands, up to a share of the lines that decide."""
    named = version_in(version)
    return named is not None and changed(named, kind) <= within


def akin(one: str, other: str, kind: str = "fit") -> bool:
    """Whether the versions of two rows belong into one table: they are equal, or 5 % of the lines apart at most."""
    first, second = version_in(one), version_in(other)
    if one == other or first is None or second is None:
        return one == other
    return one.replace(first, "") == other.replace(second, "") and changed(first, kind, since=second) <= LIMIT


SAID = " ({} % of its deciding lines have changed since)"
NOT_KNOWN = " (not known how many of its deciding lines have changed since)"
_MENTION = re.compile(
    rf"({VERSION.pattern})({re.escape(NOT_KNOWN)}|{re.escape(SAID).replace(re.escape('{}'), '([0-9]+)')})?"
)


def stated(text: str, kind: str) -> str:
    """Say after the first mention of each version, outside of tables, how many of the lines have changed since."""
    seen: set[str] = set()

    def with_share(found: re.Match[str]) -> str:
        version = found[1]
        if version in seen:
            return version
        seen.add(version)
        if not load(version):
            return version + NOT_KNOWN
        percent = round(100.0 * changed(version, kind))
        return version + (SAID.format(percent) if percent else "")

    lines = text.split("\n")
    return "\n".join(line if line.startswith("|") else _MENTION.sub(with_share, line) for line in lines)


def statements(text: str) -> dict[str, float]:
    """Return the versions that a text names, and the share that it says of each: NaN where it is said to be unknown."""
    found: dict[str, float] = {}
    for version, words, percent in _MENTION.findall(text):
        found.setdefault(version, float(percent) / 100.0 if percent else math.nan if words else 0.0)
    return found
