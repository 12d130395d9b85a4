"""What is to be known of torch's operations, to record them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch._ops import OpOverload

from pyro_flows.graphs.graph import LIKE

_aten = torch.ops.aten
_NEW = frozenset(f"aten::new_{name}" for name in ("zeros", "ones", "full", "empty", "empty_strided"))
_BY_SHAPE = _NEW.union(f"aten::{name}" for name in LIKE)


class Kind(NamedTuple):
    """What is to be known of an operation."""

    composite: bool  # made of others
    same: bool  # returns its input
    random: bool
    by_shape: bool  # the values of its inputs do not count
    new: bool  # a new tensor of the dtype and device of its input
    view: bool  # shares memory with its input
    written: tuple[bool, ...]  # which arguments it changes
    named: tuple[str, ...]  # and which of those with names

    @property
    def mutable(self) -> bool:
        return any(self.written) or bool(self.named)


def _has_kernel(operation: OpOverload, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key))


@cache
def kind_of(operation: OpOverload) -> Kind:
    """Return what is to be known of one of torch's operations."""
    schema = operation._schema
    arguments = schema.arguments
    written = [part.alias_info is not None and part.alias_info.is_write for part in arguments]
    return Kind(
        composite=_has_kernel(operation, "CompositeImplicitAutograd") and not _has_kernel(operation, "CPU"),
        same=operation in (_aten.detach.default, _aten.alias.default),
        random=torch.Tag.nondeterministic_seeded in operation.tags,
        by_shape=schema.name in _BY_SHAPE,
        new=schema.name in _NEW,
        view=any(part.alias_info is not None for part in schema.returns),
        written=tuple(one for one, part in zip(written, arguments, strict=True) if not part.kwarg_only),
        named=tuple(part.name for one, part in zip(written, arguments, strict=True) if one and part.kwarg_only),
    )
