"""The software below a fit, for a report of a bug."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from pyro_flows.model.graphs import interpreter_is_built

PACKAGES = ("pyro-flows", "torch", "pyro-ppl", "numpy", "scipy", "xarray", "arviz", "arviz-base", "arviz-stats")


def show_versions() -> None:
    """Print the versions on which results depend: packages, Python, system, processor, threads and the interpreter.

    The interpreter is the part of the package that is written in C. It is built by ``pip install`` where a compiler of
    C is found. Without it, all fits work, by torch alone: ordinary ones take 1.05 to 1.45 times as long, and results
    differ in their last digits. Cost: a millisecond.

    >>> show_versions()
    pyro-flows: ...
    interpreter: ...
    """
    for name in PACKAGES:
        print(f"{name}: {_version(name)}")
    print(f"Python: {platform.python_version()}")
    print(f"system: {platform.platform()}")
    print(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    print(f"threads of torch: {torch.get_num_threads()}")
    print(f"interpreter: {'built' if interpreter_is_built() else 'not built, so graphs run by torch alone'}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
