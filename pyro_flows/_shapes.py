"""Shapes of tensors, without torch's function for them: its first call imports computer algebra, half a second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that all shapes broadcast to."""
    try:
        return torch.Size(np.broadcast_shapes(*map(tuple, shapes)))
    except ValueError as error:
        raise RuntimeError(str(error)) from None
