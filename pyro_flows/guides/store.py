"""A guide's parameters in Pyro's store."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.nn.module import _is_module_local_param_enabled
from pyro.params.param_store import param_with_module_name
from pyro.poutine import runtime
from pyro.poutine.runtime import effectful
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.guides.setup import LatentGuide
from pyro_flows.guides.whole import Whole

UNSLOWED = {"gain": 1.0, "relative": 0.0}  # buffers of small steps, as they leave a flow without small steps

# Which tensor a guide of this process put into the store last under a name, and the store's table at that time, which
# is another one once the store was cleared. What else is found there was loaded.
_placed: dict[str, tuple[weakref.ref[Tensor], dict[str, Any]]] = {}


class Named:
    """The tensors of a flow by their names, and where the modules have them: to name them anew at each step takes long.

    Args:
        prefix: of the names.
        flow: whose tensors they are.
        tensors: by name.
    """

    def __init__(self, prefix: str, flow: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.prefix, self.flow, self.tensors = prefix, flow, tensors
        owners = [owner for module in flow.modules() for owner in (module._parameters, module._buffers)]
        self._places = [(owner, dict(owner)) for owner in owners]

    def still(self, prefix: str, flow: nn.Module) -> bool:
        """Whether the flow has these very tensors, under this name."""
        if prefix != self.prefix or flow is not self.flow:
            return False
        return all(
            len(owner) == len(kept) and all(owner.get(name) is tensor for name, tensor in kept.items())
            for owner, kept in self._places
        )


class StoredGuide(LatentGuide):
    """A flow guide whose tensors Pyro's store holds; see :class:`~pyro_flows.AutoFlow`."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._flow  # noqa: B018  (raises before the first run)
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._flow  # noqa: B018
        self._catch_up()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._flow  # noqa: B018
        return super().load_state_dict(*args, **kwargs)

    def _register(self, *, gather: bool = True) -> None:
        """Tell Pyro of the flow's parameters; make the store hold the very tensors of this guide.

        In SVI, optimizers get the parameters as one vector, by the name of the flow. With ``gather``, its gradient is
        that of the parameters.

        What the store holds under our names is either another guide's (then ours replaces it) or was loaded into the
        store (then we take its values over). The store holds the buffers too, m and L among them: without them the
        parameters, which are relative to the start, would mean something else in another guide.
        """
        tensors = self._named_tensors()
        if not _is_module_local_param_enabled():
            stored = pyro.get_param_store()._params
            if any(stored.get(full) is not tensor for full, tensor in tensors.items()):
                self._take_over(tensors)
                for full, tensor in tensors.items():
                    _place(full, tensor)
            self._in_store = True
        told: Mapping[str, Tensor] = tensors
        if in_svi() and (whole := self._as_one(tensors)) is not None:
            if gather and torch.is_grad_enabled():
                whole.gather()
            told = {self._pyro_get_fullname("flow"): whole.vector}
            pyro.get_param_store()._param_to_name.update({tensor: name for name, tensor in told.items()})
        elif self._whole is not None and self._whole.vector.grad is not None and gather and torch.is_grad_enabled():
            self._whole.gather()  # Pyro has set the vector's gradient to zero since, and so are the parameters' ones
        for full, tensor in told.items():
            if isinstance(tensor, nn.Parameter):
                # a param statement as pyro.param makes it, past the store's look-up and transform of real numbers
                tensor.unconstrained = weakref.ref(tensor)  # type: ignore[attr-defined]
                _param_statement(full, tensor, constraint=constraints.real, name=full)

    def _as_one(self, named: Mapping[str, Tensor]) -> Whole | None:
        """Return the trained parameters as one vector; None if they are of several kinds."""
        trained = {id(part): part for part in named.values() if isinstance(part, nn.Parameter) and part.requires_grad}
        parameters = list(trained.values())
        whole = self._whole
        if whole is None or list(map(id, whole.parameters)) != list(trained) or not whole.hold():
            kinds = {(part.dtype, part.device) for part in parameters}
            whole = self._whole = Whole(parameters) if len(kinds) == 1 else None
        return whole

    def _named_tensors(self) -> dict[str, Tensor]:
        """Return the flow's parameters and buffers by their names in Pyro's store."""
        prefix, flow = self._pyro_get_fullname("flow"), self._flow
        if self._named is None or not self._named.still(prefix, flow):
            state = flow.state_dict(keep_vars=True)
            tensors = {param_with_module_name(prefix, name): tensor for name, tensor in state.items()}
            self._named = Named(prefix, flow, tensors)
        return self._named.tensors

    def _take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values that were loaded into the store under these names, and put the tensors there.

        Parameters that come without the buffers of small steps were saved without small steps.
        """
        store = pyro.get_param_store()
        loaded = [full for full, tensor in tensors.items() if _was_loaded(full, tensor)]
        for full, tensor in tensors.items():
            if full in loaded:
                _copy_stored(full, tensor, store._params[full])
                _place(full, tensor)
            elif loaded and full not in store._params and full.rpartition(".")[2] in UNSLOWED:
                tensor.fill_(UNSLOWED[full.rpartition(".")[2]])

    def _catch_up(self) -> None:
        """See to it that draws are those of values that were loaded into the store since the guide last ran."""
        if self._in_store and not _is_module_local_param_enabled():
            self._take_over(self._named_tensors())


def in_svi() -> bool:
    """Whether a step of SVI asks for parameters; Pyro's compiled losses ask once more, and need each one."""
    asked = [part for part in runtime._PYRO_STACK if isinstance(part, TraceMessenger) and part.param_only]
    return len(asked) == 1


@effectful(type="param")
def _param_statement(name: str, tensor: nn.Parameter, **_: Any) -> nn.Parameter:
    return tensor


def _was_loaded(name: str, tensor: Tensor) -> bool:
    """Whether the store holds another tensor than this one under a name, and no guide put it there."""
    store = pyro.get_param_store()
    stored = store._params.get(name)
    if stored is None or stored is tensor:
        return False
    placed = _placed.get(name)
    return placed is None or placed[0]() is not stored or placed[1] is not store._constraints


def _place(name: str, tensor: Tensor) -> None:
    """Let the store hold this very tensor under a name."""
    store = pyro.get_param_store()
    if store._params.get(name) is not tensor:
        if name in store._params:
            del store[name]
        store._constraints[name] = constraints.real
        store._params[name] = tensor
        store._param_to_name[tensor] = name
        _placed[name] = weakref.ref(tensor), store._constraints


def _copy_stored(name: str, parameter: Tensor, stored: Tensor) -> None:
    if stored.shape != parameter.shape:
        raise ValueError(
            f"param store: {name!r} has shape {tuple(stored.shape)}, this guide's is {tuple(parameter.shape)}. "
            "It was saved from another guide; call pyro.clear_param_store(), or build the guide with the same settings."
        )
    with torch.no_grad():
        parameter.copy_(stored)
