"""Amortized posteriors as directories of tensors and JSON. Reading them runs no code but the model's own."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.amortization.building import Read, exchangeable_rows, networks, scale_of
from pyro_flows.amortization.form import Scale
from pyro_flows.amortization.networks import Conditional
from pyro_flows.flows.recipe import with_preprocess
from pyro_flows.support.files.bundles import Bundle, Entries, plain
from pyro_flows.support.files.untrusted import packed, reading, unpacked
from pyro_flows.support.process.fallbacks import first_line
from pyro_flows.transforms.fixed import Preprocess

TENSORS, TEXT = "amortized.pt", "amortized.json"
FILES = Bundle("amortized posterior", "pyro_flows amortized posterior", TEXT, (TENSORS,))
COMPARED = 8  # simulations at which a loaded model is compared with the one that was saved


def write(path: str | os.PathLike[str], tensors: Entries, text: Entries) -> None:
    """Write a trained flow and what belongs to it: all of it, or nothing."""
    FILES.write(FILES.check_target(path), plain(text), {TENSORS: packed(dict(tensors))})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    text, contents = FILES.read(path)
    with reading(path, TENSORS):
        return unpacked(contents[TENSORS]), text


def rebuilt(found: Read, tensors: Entries, settings: Entries, encoder: nn.Module | None) -> tuple[Scale, Conditional]:
    if (settings["encoder"] == "default") != (encoder is None):
        raise ValueError(f"encoder: expected the one of the training, which was {settings['encoder']!r}.")
    rows = settings["rows"]
    if rows > 1 and exchangeable_rows(found) != rows:
        raise ValueError(f"model: expected {rows} rows in any order, as in the training.")
    scale = scale_of(found, rows)
    features = scale(found.form.rows(found.observed)).float()
    made = networks(found, features, encoder, rows, settings["flow"], settings["layers"], seed=0)
    dim, entries = found.density.dim, sum(found.form.sizes)
    blank = Preprocess(torch.zeros(dim), torch.ones(dim), torch.zeros(entries, dim))
    flow = with_preprocess(made.flow, blank).to(features)
    try:
        scale.load_state_dict(tensors["scale"])
        flow.load_state_dict(tensors["flow"])
    except (LookupError, RuntimeError) as error:
        raise ValueError(
            f"model: expected the model, arguments and encoder of the training; the tensors do not fit: "
            f"{first_line(error)}"
        ) from error
    made.trained(flow)
    return scale, made


def probe(found: Read) -> Entries:
    """Return log densities of some simulations, by which the model is known again."""
    log_p = []
    for number in range(COMPARED):
        case = found.form.wiring({name: value[number] for name, value in found.observed.items()})
        with torch.no_grad():
            log_p.append(found.density.beside(case.args, case.kwargs)(found.z[number : number + 1]))
    data = {name: value[:COMPARED].cpu() for name, value in found.observed.items()}
    return {"z": found.z[:COMPARED].cpu(), "data": data, "log_p": torch.cat(log_p).cpu()}


def check_probe(found: Read, probed: Entries) -> None:
    """Compare log densities with those of the model that was saved."""
    device = found.density.device
    same = probed["z"].shape[1:] == found.z.shape[1:]
    if same:
        data: dict[str, Tensor] = {name: value.to(device) for name, value in probed["data"].items()}
        now = probe(found._replace(z=probed["z"].to(found.z), observed=data))["log_p"]
        same = torch.allclose(now.double(), probed["log_p"].double(), rtol=1e-4, atol=1e-2, equal_nan=True)
    if not same:
        raise ValueError("model: its log density is not that of the saved one. Pass what amortize was given.")
