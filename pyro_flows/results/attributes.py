"""What the ArviZ object of a result says of itself: verdict, method, versions, settings."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

from pyro_flows._bundles import plain
from pyro_flows.results.record import Record

PACKAGES = ("pyro-ppl", "torch", "arviz-base", "arviz-stats")


def attributes(posterior: Record) -> dict[str, str | float]:
    """Return what the object says of itself, the verdict first: numbers and strings only."""
    kind = {"corrected": "psis-resampled", "refined": "chains"}.get(posterior.verdict.status, posterior.method)
    kind = "mcmc" if posterior._of_mcmc else kind
    found: dict[str, str | float] = {
        "status": posterior.verdict.status,  # both first, where a display that is cut short still shows them
        "verdict": str(posterior.verdict),
        "method": posterior.method,
        "inference_library": "pyro_flows",
        "inference_library_version": _version("pyro-flows"),
        **{f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES},
        "settings": json.dumps(plain(posterior.settings)),
        "seed": int(posterior.settings["seed"]),
        "device": str(posterior.z.device),
        "dtype": str(posterior.z.dtype).removeprefix("torch."),
        "sampling": kind,
    }
    return found


def attributes_of(posterior: Record) -> dict[str, str | float]:
    """Return the attributes as they were stored, if the posterior was loaded."""
    return attributes(posterior) if posterior._stored is None else posterior._stored[1]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
