"""The library in C that runs programs of :mod:`pyro_flows.graphs.programs`, compiled once on a machine and kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from pyro_flows._fallbacks import fallback

FLAGS = ("-O3", "-fno-unswitch-loops", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
UNKNOWN_TO_SOME = ("-march=native", "-fno-trapping-math")  # compilers
SECONDS = 120  # for the compiler at most
CACHE = "PYRO_FLOWS_CACHE"  # a variable of the environment: the folder where compiled code is kept


@functools.cache
def library() -> Callable[..., Any] | None:
    """Return ``run_program`` of ``native.c``; None where there is no compiler of C.

    Cost: two to three seconds, once a machine.

    >>> run = library()
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform == "win32":
        return None
    source = resources.files("pyro_flows.graphs").joinpath("native.c").read_text("utf-8")
    try:
        run = ctypes.CDLL(str(_compiled(compiler, source))).run_program
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        fallback("no code of its own for elementwise operations", error)
        return None
    run.restype = None
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return run  # type: ignore[no-any-return]


def _compiled(compiler: str, source: str) -> Path:
    """Return the file of the compiled library, made if it is not there; its name says what it was made of and for."""
    processor = f"{platform.machine()} {_processor()} {os.path.realpath(compiler)}"
    key = hashlib.sha256("\0".join((source, *FLAGS, processor)).encode()).hexdigest()[:24]
    known = _folder() / f"native_{key}.so"
    if not known.exists():
        with tempfile.TemporaryDirectory(dir=known.parent) as folder:
            text, made = Path(folder) / "native.c", Path(folder) / known.name
            text.write_text(source, "utf-8")
            order = [compiler, *FLAGS, "-fPIC", "-shared", "-o", str(made), str(text), "-lm"]
            try:
                _call(order)
            except subprocess.CalledProcessError:
                _call([part for part in order if part not in UNKNOWN_TO_SOME])
            made.replace(known)  # at once, so that another process finds all of it or nothing
    return known


def _call(order: list[str]) -> None:
    subprocess.run(order, check=True, capture_output=True, timeout=SECONDS)


def _folder() -> Path:
    given, shared = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(given) if given else (Path(shared) if shared else Path.home() / ".cache") / "pyro_flows"
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="pyro_flows_"))  # of this process alone


def _processor() -> str:
    """Return what distinguishes processors for which code is made."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
