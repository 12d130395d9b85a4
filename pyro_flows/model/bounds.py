"""Draws that rounding puts onto a bound, and the mass that is lost next to it.

A sigmoid has no values between 1 - eps and 1, and torch cuts it there. A draw at the cut does not return to the same
coordinate, and the density decays with the Jacobian alone. If it went on to decay at the rate before the cut, the mass
beyond would be as many times as large as that rate is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def far_from_zero(dtype: torch.dtype) -> float:
    """Return the coordinate of the cut of a sigmoid."""
    return -math.log(torch.finfo(dtype).eps)


def on_bound(y: Tensor, back: Tensor) -> Tensor:
    """Say which coordinates ``y`` are on a bound: their values go ``back`` to others; NaN is of none."""
    return ~(torch.isclose(back, y, rtol=1e-3, atol=1e-3) | back.isnan()) & (y.abs() > far_from_zero(y.dtype))


def log_times(y: Tensor, lost: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
    """Return by which log factors the ``lost`` ones of the coordinates ``y`` count more; 0 for the others.

    ``slopes`` are derivatives of the log density. The rate before the cut is that half way to it, as rounding inside of
    the model comes before it.
    """
    half = 0.5 * far_from_zero(y.dtype)
    before, beyond = (
        -y.sign() * slopes(torch.where(lost, moved, y)).double() for moved in (y.clamp(-half, half), y + y.sign())
    )
    times = torch.where(lost, beyond / before.clamp_min(torch.finfo(y.dtype).eps), 1.0).nan_to_num(1.0)
    return times.clamp_min(0.0).log()
