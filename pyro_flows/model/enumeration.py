"""Discrete latents summed out: Pyro's parallel enumeration in a form that ``vmap`` and recording accept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import cast

import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import Message
from torch import Tensor


class Enumerate(EnumMessenger):
    """Pyro's enumeration handler, which reads ``value.data``: forbidden under vmap, and only its shape matters."""

    def _pyro_post_sample(self, msg: Message) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = SimpleNamespace(data=value, dim=value.dim)
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


class Evaluator(TraceEinsumEvaluator):
    """Log density of a trace with its enumerated dimensions summed out by variable elimination."""

    def log_prob(self, model_trace: Trace) -> Tensor:
        return contract_to_tensor(self._get_log_factors(model_trace), self._enum_dims, ring=_Elimination())


class _Elimination(LogRing):
    """Sum-product in log space, one dimension at a time, the cheapest first; plain torch operations only."""

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        pool = [(term, vars(term)["_pyro_dims"]) for term in terms]
        left = set(dims)
        while left:
            dim = min(sorted(left), key=lambda name: len(_union(names for _, names in pool if name in names)))
            left.remove(dim)
            touched = [entry for entry in pool if dim in entry[1]]
            names = _union(names for _, names in touched)
            joint = torch.logsumexp(_add(touched, names), names.index(dim))
            pool = [entry for entry in pool if dim not in entry[1]] + [(joint, names.replace(dim, ""))]
        names = _union(names for _, names in pool)
        result = _add(pool, names)
        vars(result)["_pyro_dims"] = names
        return result


def _union(names: Iterable[str]) -> str:
    return "".join(sorted(set("".join(names))))


def _add(entries: Sequence[tuple[Tensor, str]], names: str) -> Tensor:
    """Add tensors with named axes, each broadcast to ``names``."""
    total: Tensor | float = 0.0
    for tensor, own in entries:
        order = sorted(range(len(own)), key=own.__getitem__)
        index = tuple(slice(None) if name in own else None for name in names)
        total = total + tensor.permute(order)[index]
    return cast(Tensor, total + 0.0)
