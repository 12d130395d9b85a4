"""Whether what a file says of a posterior fits together: shapes, names, and densities that can be computed anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows._bundles import Entries
from pyro_flows._figures import STATUS_COLORS
from pyro_flows._untrusted import check_tensor, require
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture

CHECKED = 8  # draws whose density is computed anew
ROUNDED, ROUNDED_AT_LEAST = 1e-3, 1e-2  # relative, and nats: between machines and precisions


def check_tensors(tensors: Entries, dim: int, verdict: Entries) -> None:
    """Refuse tensors of a posterior with D = ``dim`` coordinates that are of other shapes, or miss draws."""
    z, used = tensors["z"], tensors["used"]
    check_tensor("z", z, (None, dim))
    check_tensor("used", used, (None, dim))
    require(len(z) and len(used), "there are no draws")
    for name, like in {"log_p": z, "log_q": z, "log_weights": z, "used_log_p": used, "used_log_q": used}.items():
        check_tensor(name, tensors[name], (len(like),))
    check_tensor("losses", tensors["losses"], (None,))
    samples = tensors["samples"]
    require(isinstance(samples, dict) and samples, "there are no samples")
    for name, value in samples.items():
        fits = isinstance(name, str) and isinstance(value, Tensor) and value.dim() and len(value) == len(used)
        require(fits, f"samples of {name} are not {len(used)} draws")
    require(isinstance(tensors["flow"], dict), "the flow has no tensors")
    if "chains" in tensors:
        _check_chains(tensors["chains"], dim)
        kept = tensors["chains"]["z"][..., 0].numel()
        of_chains = verdict["status"] == "refined" or (verdict.get("chains") or {}).get("elsewhere")
        require(kept == len(used) or not of_chains, f"chains have {kept} draws, and not {len(used)}")
    _check_weights(tensors)


def _check_chains(chains: Any, dim: int) -> None:
    require(isinstance(chains, dict) and set(chains) == {"z", "stats", "state", "numbers"}, "chains lack entries")
    check_tensor("z of chains", chains["z"], (None, None, dim))
    require(all(isinstance(chains[name], dict) for name in ("stats", "state", "numbers")), "chains lack entries")
    for name, value in chains["stats"].items():
        require(value.shape == chains["z"].shape[:2], f"{name} of chains has shape {tuple(value.shape)}")
    require(isinstance(chains["numbers"].get("method"), str), "chains have no method")


def _check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not rise with p / q, as smoothed ones do."""
    ratio = tensors["log_p"].double() - tensors["log_q"].double()
    weights = tensors["log_weights"].double()
    finite = torch.isfinite(ratio) & torch.isfinite(weights)
    weights = weights[finite]
    ratio = ratio[finite][weights.argsort(stable=True)]
    if len(ratio) < 2 or not bool(weights.max() - weights.min() > ROUNDED_AT_LEAST):  # even weights have no order
        return
    scale = tensors["log_p"][finite].double().abs().max() + ratio.abs().max()
    rises = bool((ratio.cummax(0).values - ratio <= ROUNDED_AT_LEAST + ROUNDED * scale).all())
    require(rises, "log_weights are not those of log_p - log_q")


def check_texts(description: Entries) -> None:
    """Refuse texts, numbers and lists of other kinds than a posterior has."""
    verdict, coordinates = description["verdict"], description["coordinates"]
    require(isinstance(verdict, dict) and verdict.get("status") in STATUS_COLORS, "the verdict has no known status")
    texts = [verdict["where"], *verdict.get("reasons", ()), *verdict.get("notes", ()), *coordinates]
    require(isinstance(coordinates, list) and all(isinstance(text, str) for text in texts), "a text is no text")
    require(all(_is_number(value) for value in description["numbers"].values()), "a number is no number")
    settings, history = description["settings"], description["history"]
    require(isinstance(settings, dict) and isinstance(history, list), "settings or history are missing")
    require(type(settings.get("seed", 0)) is int and settings.get("seed", 0) >= 0, "the seed is none")
    stages = all(isinstance(entry, dict) and isinstance(entry.get("stage"), str) for entry in history)
    require(stages, "an entry of the history has no stage")
    guide, labels = description["guide"], description.get("labels", {})
    require(isinstance(guide, dict) and isinstance(guide["class"], str), "the guide has no class")
    require(isinstance(guide.get("reason"), (str, type(None))), "the reason is no text")
    parts = [labels.get(name, {}) for name in ("coords", "dims")]
    lists = all(isinstance(part, dict) and all(isinstance(one, list) for one in part.values()) for part in parts)
    require(lists, "labels are no lists")


def _is_number(value: object) -> bool:
    return value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool))


def check_groups(groups: Entries, tensors: Entries) -> None:
    """Refuse groups whose posterior is not that of the samples."""
    require("posterior" in groups, "there is no group 'posterior'")
    group = groups["posterior"]
    require({"chain", "draw"} <= set(group.sizes), "the posterior has no draws")
    count = group.sizes["chain"] * group.sizes["draw"]
    require(count == len(tensors["used"]), f"the posterior has {count} draws, and not {len(tensors['used'])}")
    for name, value in tensors["samples"].items():
        if name in group and group[name].size == value.numel():
            stored = group[name].transpose("chain", "draw", ...).to_numpy().reshape(-1)
            same = np.allclose(stored.astype(float), value.reshape(-1).double().numpy(), rtol=1e-5, equal_nan=True)
            require(same, f"{name} of the posterior is not that of the samples")


@torch.no_grad()
def check_flow(flow: Flow | FlowMixture, tensors: Entries) -> None:
    """Refuse a flow that gives draws another density than they have."""
    z, saved = tensors["z"][:CHECKED], tensors["log_q"][:CHECKED].double()
    require(flow.dim == z.shape[1], f"the flow has {flow.dim} coordinates, and not {z.shape[1]}")
    now = flow.log_prob(z.to(flow._like)).double()
    off = (now - saved).abs() - ROUNDED * saved.abs()
    off = off[torch.isfinite(saved)]
    worst = float(off.max()) if len(off) else 0.0
    require(worst <= ROUNDED_AT_LEAST and not math.isnan(worst), f"the flow's log density is off by {worst:.3g} nats")
