"""A model of the data at hand and of new ones together: what posterior calibration fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows.calibration.cases import Case
from pyro_flows.model.sites import is_data, messages

AT_HAND = " (at hand)"


class _Again(Messenger):
    """Give latent sites the values that they have, unseen from outside; call observed sites otherwise."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"], msg["stop"] = self.values[msg["name"]], True, True
        elif msg["is_observed"] and is_data(msg):
            msg["name"] = f"{msg['name']}{AT_HAND}"
        elif msg["is_observed"]:
            msg["stop"] = True  # deterministic sites, which are there already


class Augmented:
    r"""A model run twice with the same latents: on its arguments, and on the data at hand.

    Its posterior is :math:`p(\theta \mid y_{\text{at hand}}, y)`. It can be pickled where the model can.

    Args:
        model: the model.
        case: its arguments with the data at hand.
    """

    def __init__(self, model: Callable[..., Any], case: Case) -> None:
        self.model, self.case = model, case
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.trace() as seen:
            result = self.model(*args, **kwargs)
        sites = messages(seen.trace).items()
        latents = {name: site["value"] for name, site in sites if site["type"] == "sample" and not site["is_observed"]}
        with _Again(latents):
            self.model(*self.case.args, **self.case.kwargs)
        return result
