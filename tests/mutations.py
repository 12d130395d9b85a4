"""Make one deliberate mistake at a time in a copy of the package, and see whether the tests of its room notice.

Tests run in forks of a process that has imported the copy: functions of a changed file get its code in place.

    make mutation
    python -m tests.mutations --only bridge objectives

An edit is a file, a piece of it that stands there once, what replaces it, and the tests that have to fail. Mistakes in
what decides a verdict are in ``tests/whole/test_bite_deciding.py``, which runs in every suite; these are about
transforms, losses, starts, searches, chains, evidence, leave-one-out, graphs and their interpreter, conversions and
files.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pyro
import pytest
import torch

ROOT = Path(__file__).parents[1]
SECONDS = 1800  # for the tests of one edit
FAILED = 1  # what pytest returns if a test failed; anything else is no catch
PRELOADED = pyro, pytest, torch


class Edit(NamedTuple):
    """A mistake: in ``file``, ``right`` becomes ``wrong``; one of ``tests`` has to fail."""

    file: str
    right: str
    wrong: str
    tests: str


TRANSFORMS = "tests/transforms"
GRAPHS = "tests/model/graphs"
BLOCKS = "tests/model/graphs/test_blocks.py tests/model/graphs/test_blocks_random.py"
LOSSES = "tests/inference/training/test_objectives.py"
EVIDENCE = "tests/posterior/comparison/test_evidence.py"
AFFINE, SPLINES = "transforms/affine_coupling.py", "transforms/splines.py"
INTERPRETER = "model/graphs/interpreter.c"
EDITS = (
    Edit(AFFINE, "return (moved - shift) * shrink.exp(), self._total(shrink)",
         "return moved * shrink.exp() - shift, self._total(shrink)", TRANSFORMS),
    Edit(AFFINE, "torch.addcmul(shift, moved, log_scale.exp()), self._total(log_scale)",
         "torch.addcmul(shift, moved, log_scale.exp()), -self._total(log_scale)", TRANSFORMS),
    Edit(AFFINE, "carried = score / parameters[0].exp()", "carried = score * parameters[0].exp()", TRANSFORMS),
    Edit(AFFINE, "return moved - parameters[0], moved.new_zeros(())",
         "return moved + parameters[0], moved.new_zeros(())", TRANSFORMS),
    Edit(SPLINES, "2.0 * torch.log(steep / denominator) + torch.log(numerator)",
         "torch.log(steep / denominator) + torch.log(numerator)", TRANSFORMS),
    Edit(SPLINES, "torch.where(inside, -log_slope, 0.0)", "torch.where(inside, log_slope, 0.0)", TRANSFORMS),
    Edit(SPLINES, "torch.where(falling, (root - b) / (2.0 * a)", "torch.where(falling, (root + b) / (2.0 * a)",
         TRANSFORMS),
    Edit("transforms/planar.py", "return y - u * tanh, -_log_determinant(tanh, slope)",
         "return y - u * tanh, _log_determinant(tanh, slope)", TRANSFORMS),
    Edit("transforms/planar.py", "for _ in range(2):  # leaves", "for _ in range(1):  # leaves", TRANSFORMS),
    Edit("transforms/lu.py", "matrix.tril(-1) + torch.ones_like(log_diagonal)",
         "matrix.tril(0) + torch.ones_like(log_diagonal)", TRANSFORMS),
    Edit("transforms/lu.py", "torch.argsort(self.permutation)", "self.permutation", TRANSFORMS),
    Edit("transforms/tails.py", "onset * torch.sinh(stretched) / power, (_log_cosh(stretched)",
         "onset * torch.sinh(stretched), (_log_cosh(stretched)", TRANSFORMS),
    Edit("transforms/tails.py", "= stretched / power\n        return onset * torch.sinh(angle), (_log_cosh(angle)",
         "= stretched / power\n        return onset * torch.sinh(angle), -(_log_cosh(angle)", TRANSFORMS),
    Edit("transforms/compose.py", "first, *others = reversed(self.layers)", "first, *others = self.layers",
         TRANSFORMS),
    Edit("inference/training/objectives.py", "forward * weights * (1.0 - weights)", "forward * weights", LOSSES),
    Edit("inference/training/objectives.py", "limit = steep * torch.where(good",
         "limit = 10.0 * steep * torch.where(good", LOSSES),
    Edit("inference/training/objectives.py", "(1.0 - forward) / len(log_p) * thinning",
         "(1.0 - forward) / len(log_p)", LOSSES),
    Edit("inference/training/objectives.py", "group / draws * weights.square()", "group / draws * weights", LOSSES),
    Edit("inference/training/objectives.py", "thinning * counts.sum() / torch.where",
         "thinning * len(counts) / torch.where", LOSSES),
    Edit("inference/training/objectives.py", "torch.logsumexp(grouped, 1) - math.log(group)",
         "torch.logsumexp(grouped, 1)", LOSSES),
    Edit("posterior/comparison/bridge.py", "variance += _relative_variance(below) / _effective(denominator, chains)",
         "variance += 0.0", EVIDENCE),
    Edit("posterior/comparison/bridge.py", "_relative_variance(below) / _effective(denominator, chains)",
         "_relative_variance(below) / len(below)", EVIDENCE),
    Edit("inference/verdict/weighing.py", "new = float(log_mean(above) - log_mean(below))",
         "new = _log_mean(below) - _log_mean(above)", EVIDENCE),
    Edit("posterior/comparison/evidence.py", "spread * size ** (-0.5 * convergence_rate(k_hat, size))",
         "spread * size ** -0.5", EVIDENCE),
    Edit("posterior/comparison/evidence.py", "key=lambda estimate: estimate.standard_error)\n    return Evidence",
         "key=lambda estimate: -estimate.standard_error)\n    return Evidence", EVIDENCE),
    Edit("posterior/comparison/evidence.py", "math.hypot(estimate.standard_error, rounding)",
         "estimate.standard_error", "tests/posterior/comparison tests/fitting/test_digits.py"),
    Edit("inference/verdict/psis.py", "math.floor(3.0 * math.sqrt(count))", "math.floor(6.0 * math.sqrt(count))",
         "tests/inference/verdict"),
    Edit("inference/verdict/psis.py", "10 * 0.5) / (count", "0.0) / (count", "tests/inference/verdict"),
    Edit("posterior/comparison/loo.py", "p = log_score(given.values, given.draws.ratio) - elpd",
         "p = log_score(given.values, None) - elpd", "tests/posterior/comparison/test_loo.py"),
    Edit("posterior/comparison/working.py", "math.sqrt(len(terms) * float(terms.var()))",
         "math.sqrt(float(terms.var()))",
         "tests/posterior/comparison/test_loo.py"),
    Edit("model/graphs/fusion_groups.py", "return wide - fixed", "return wide", GRAPHS),
    Edit("model/graphs/fusion_groups.py", "first if bool((value == first).all()) else value", "first", GRAPHS),
    Edit("model/graphs/sums.py", "begin += size", "begin += 0", GRAPHS),
    Edit("model/graphs/sums.py", "any(one[1] > other[0] for one, other in pairwise(spans))", "False", GRAPHS),
    Edit("model/graphs/recorder.py", "if not self._repeats(recorded, fresh):", "if False:", GRAPHS),
    Edit("model/graphs/recorder.py", "torch.cat(part)[: len(z)]", "torch.cat(part)[-len(z) :]", GRAPHS),
    Edit(INTERPRETER, "UNARY(9, 1.0 / sqrt(x))", "UNARY(9, sqrt(x))", BLOCKS),
    Edit(INTERPRETER, "BINARY(65, x - y)", "BINARY(65, y - x)", BLOCKS),
    Edit(INTERPRETER, "for (; i < n; i++) part[i & 7] += from[i];", "", BLOCKS),
    Edit(INTERPRETER, "index[first + i + 1] != index[first + i]", "0", BLOCKS),
    Edit(INTERPRETER, "sum[2] += a2[k * step] * b;", "sum[2] += a1[k * step] * b;", BLOCKS),
    Edit(INTERPRETER, "else if (stride > 1 || stride < 0)", "else if (stride > 1)", GRAPHS),
    Edit(INTERPRETER, "x > y || x != x) ? x : y)\n        BINARY(70", "x > y) ? x : y)\n        BINARY(70", BLOCKS),
    Edit("support/files/files.py", "os.replace(fresh, target)\n        _sync_folder",
         "target.write_bytes(data)\n        _sync_folder",
         "tests/support/test_files.py"),
    Edit("densities/standardizing.py", "mean = mean - context.double().mean(0) @ slope", "mean = mean + 0.0",
         "tests/densities"),
    Edit("densities/standardizing.py", "values.clamp(min=dim * 1e-7).sqrt()", "values.clamp(min=dim * 1e-7)",
         "tests/densities"),
    Edit("model/bijections.py", "return torch.where(self.mask, first, other)",
         "return torch.where(self.mask, other, first)", "tests/model"),
    Edit("model/bijections.py", "torch.where(self.mask, self.first.inv(y), self.other.inv(y))", "self.first.inv(y)",
         "tests/model"),
    Edit("posterior/export/arviz_groups.py",
         "groups[\"raw_posterior\"] = draws_group(labels, density.constrain(posterior.z))",
         "groups[\"raw_posterior\"] = draws_group(labels, posterior.samples)", "tests/posterior/export"),
    Edit("inference/verdict/weighing.py", "ess=float(1.0 / weights.square().sum())", "ess=float(len(weights))",
         "tests/inference/verdict/test_verdict.py"),
    Edit("support/numbers/mixing.py", "\"ess_tail\": torch.minimum(low, high)",
         "\"ess_tail\": torch.maximum(low, high)",
         "tests/support/test_mixing.py"),
    Edit("posterior/comparison/pointwise.py", "psis(-values if base is None else base - values)", "psis(-values)",
         "tests/posterior/comparison/test_loo.py"),
    Edit("posterior/comparison/pointwise.py", "squares *= len(influence) / arviz", "squares *= 1.0 / arviz",
         "tests/posterior/comparison/test_loo.py"),
    Edit("posterior/comparison/sensitivity.py",
         "posterior._used_log_p.double() - density.log_jacobian(posterior._used).double()",
         "posterior._used_log_p.double()", "tests/posterior/comparison/test_compare.py"),
    Edit("inference/modes/tempering.py", "self.log_weights += (beta - self.beta) *", "self.log_weights += beta *",
         "tests/inference/modes/test_tempering.py"),
    Edit("inference/modes/missed_regions.py", "(lowest < least - LEVEL).all()", "(lowest < least - LEVEL).any()",
         "tests/inference/modes/test_symmetric_modes.py"),
    Edit("inference/modes/symmetries.py", "tuple(flip * signs[place] for", "tuple(flip for",
         "tests/inference/modes/test_symmetries.py"),
    Edit("inference/starts/climb.py", "evidence=float(evidence[index]) + gauss", "evidence=float(evidence[index])",
         "tests/inference/starts/test_newton.py"),
    Edit("inference/starts/pathfinder.py", "mean + (count / terms.shape[-1]).log()", "mean",
         "tests/inference/starts/test_pathfinder.py"),
    Edit("inference/chains/hmc.py", "error + points.log_pi - new.log_pi", "error - points.log_pi + new.log_pi",
         "tests/inference/chains/test_microcanonical.py"),
    Edit("inference/chains/hmc.py", "gain = new.log_weight - points.log_weight", "gain = new.log_weight",
         "tests/contracts/test_kernels.py"),
    Edit("model/charts.py", "scale.log() + log_cosh", "log_cosh", "tests/model/test_charts.py"),
    Edit("model/noncentered.py", "log_diagonal + 0.5 * share.log()", "log_diagonal + share.log()",
         "tests/model/test_noncentered.py tests/inference/starts/test_coordinates.py"),
    Edit("support/files/bundles.py", "if digests.get(name) != value]", "if name not in digests]",
         "tests/support/test_files.py"),
    Edit("support/process/journal.py", "if step.inputs != digest:", "if False:", "tests/whole/test_resume.py"),
)  # fmt: skip


def _copied(place: Path) -> None:
    """Copy what is tracked or new, and the built interpreter."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "pyro_flows" / "model" / "graphs").glob("*.so")]
    for name in [*filter(None, listed.split("\0")), *built]:
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)


def _built(place: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)


def caught(place: Path, edit: Edit) -> tuple[bool, str]:
    """Return whether the tests notice an edit of the copy at ``place``, and their last line."""
    file = place / "pyro_flows" / edit.file
    text = file.read_text(encoding="utf-8")
    if text.count(edit.right) != 1:
        raise ValueError(f"{edit.file}: {edit.right!r} stands there {text.count(edit.right)} times, not once.")
    file.write_text(text.replace(edit.right, edit.wrong), encoding="utf-8")
    try:
        if file.suffix == ".c":
            _built(place)
        said = place / "said"
        process = multiprocessing.get_context("fork").Process(
            target=_tested, args=(place, file, edit.tests.split(), said)
        )
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
    finally:
        file.write_text(text, encoding="utf-8")
        if file.suffix == ".c":
            _built(place)
    lines = said.read_text(encoding="utf-8").splitlines()
    return process.exitcode == FAILED, [*lines[-1:], *(line for line in lines if line.startswith("FAILED"))][-1]


def _tested(place: Path, file: Path, tests: Sequence[str], said: Path) -> None:
    """Run tests of the copy, in a process that has imported the right package."""
    os.chdir(place)
    sys.stdout.flush()
    with said.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if file.suffix == ".py":
        _replace(file)
    else:
        _alone(place)
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(code)


def _replace(file: Path) -> None:
    """Give each function of a module that was imported the code that its file has by now, wherever it is known."""
    waiting, fresh = [compile(file.read_text(encoding="utf-8"), str(file), "exec", dont_inherit=True)], {}
    while waiting:
        code = waiting.pop()
        fresh[code.co_qualname, code.co_firstlineno] = code
        waiting += [part for part in code.co_consts if isinstance(part, CodeType)]
    for function in [one for one in gc.get_objects() if isinstance(one, FunctionType)]:
        code = function.__code__
        if code.co_filename == str(file):
            function.__code__ = fresh.get((code.co_qualname, code.co_firstlineno), code)


def _alone(place: Path) -> None:
    """Let imports be those of the copy."""
    sys.path[:] = [str(place), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "pyro_flows", "benchmarks")]:
        del sys.modules[name]


def _warm(place: Path) -> None:
    """Import the package of the copy, and what its tests need, so that no fork has to; nothing of it runs."""
    _alone(place)
    for file in sorted((place / "pyro_flows").rglob("*.py")):
        if file.stem != "__main__":
            importlib.import_module(".".join(file.relative_to(place).with_suffix("").parts).removesuffix(".__init__"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all edits; return 1 if one was not noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of files")
    parser.add_argument("--first", type=int, default=0, help="the number of the first edit, from 0 on")
    given = parser.parse_args(arguments)
    chosen = [edit for edit in EDITS[given.first :] if not given.only or any(part in edit.file for part in given.only)]
    survived = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        os.environ["PYTHONPATH"] = str(place)  # of processes that tests start
        _copied(place)
        for edit in sorted(chosen, key=lambda edit: edit.file != INTERPRETER):
            if edit.file != INTERPRETER and str(place) not in sys.path:
                _warm(place)
            noticed, line = caught(place, edit)
            survived += not noticed
            print("caught  " if noticed else "SURVIVED", edit.file, repr(edit.wrong), "|", line, flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mistakes were caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
