"""Run the code of a Markdown file, and compare what it prints with what the file says.

A fence of ``python`` is run, in order, all fences of a file in one namespace. One of ``text`` right after it is what it
prints. A comment on the line before a fence says more:

- ``<!-- within 0.1 or 5 % -->`` before output: how far numbers may be off on another machine, the larger of the two;
- ``<!-- slow -->`` before code: it is left to the slow suite;
- ``<!-- needs NAME -->`` before code: it is left to the slow suite, and left out where that package is not installed;
- ``<!-- setup -->`` before code: many pages begin with the same lines, which are run once in a process.

Nothing here needs more than Python, so that the wheel is tested with it in an environment that holds nothing else:

    python tests/markdown.py README.md
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Fence:
    """A block of code or of output: its comment, its language, its text, its first line, and what stands before it."""

    comment: str
    kind: str
    text: str
    line: int
    gap: str


def fences(text: str) -> list[Fence]:
    """All fences of a file, in order."""
    found, end = [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Fence(match[1] or "", match[2], match[3], line, text[end : match.start()]))
        end = match.end()
    return found


_DONE: dict[
    str, tuple[dict[str, Any], str]
] = {}  # of setups that were run: the names that they made, what they printed


def _execute(fence: Fence, name: str, scope: dict[str, Any]) -> str:
    """Run a fence of code, and return what it printed."""
    if fence.comment == "setup" and fence.text in _DONE and len(scope) == 1:
        made, printed = _DONE[fence.text]
        scope.update(made)
        return printed
    out = io.StringIO()
    code = compile("\n" * (fence.line - 1) + fence.text, name, "exec")
    fresh = len(scope) == 1
    with contextlib.redirect_stdout(out):
        exec(code, scope)
    if fence.comment == "setup" and fresh:
        _DONE[fence.text] = dict(scope), out.getvalue()
    return out.getvalue()


def _wanted(fence: Fence, slow: bool) -> bool:
    """Whether code is run in this suite, and can be."""
    needed = fence.comment.removeprefix("needs ") if fence.comment.startswith("needs ") else None
    if needed is not None:
        return slow and importlib.util.find_spec(needed) is not None
    return slow or fence.comment != "slow"


def run(text: str, name: str, *, slow: bool) -> list[tuple[str, Fence]]:
    """Run the code of a file; return, of each fence of output, what was printed and the fence."""
    compared, printed = [], None
    scope: dict[str, Any] = {"__name__": "__main__"}
    for fence in fences(text):
        if fence.kind == "python" and _wanted(fence, slow):
            printed = _execute(fence, name, scope)
        elif fence.kind == "text" and printed is not None and not fence.gap.strip():
            compared.append((printed, fence))
        else:
            printed = None
    return compared


def differences(printed: str, expected: str, comment: str = "") -> list[str]:
    """Where ``printed`` is not as expected: other words, or numbers that are farther off than the comment allows."""
    allowed = re.fullmatch(r"within (\S+) or (\S+) %", comment)
    assert allowed or not comment, f"a comment that this test does not know: {comment!r}"
    absolute, relative = (float(allowed[1]), float(allowed[2]) / 100) if allowed else (0.0, 0.0)
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, expected)]
    if words[0] != words[1]:
        return [f"expected {expected!r}, got {printed!r}"]
    pairs = zip(*([float(number) for number in NUMBER.findall(text)] for text in (printed, expected)), strict=True)
    far = [(got, wanted) for got, wanted in pairs if abs(got - wanted) > max(absolute, relative * abs(wanted))]
    return [f"expected {wanted}, got {got}" for got, wanted in far]


def main(path: Path) -> None:
    """Run the code of a file as a reader would, print what it prints, and end with 1 where the file says otherwise."""
    compared = run(path.read_text(encoding="utf-8"), str(path), slow=True)
    wrong = [fault for printed, fence in compared for fault in differences(printed, fence.text, fence.comment)]
    for printed, _ in compared:
        print(printed, end="")
    if wrong or not compared:
        sys.exit(f"{path}: " + ("; ".join(wrong) or "nothing is compared"))
    print(f"{path.name} prints what it says.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
