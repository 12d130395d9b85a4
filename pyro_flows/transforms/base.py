"""What every bijection shares: torch's and Pyro's protocols, shapes, inversion and the one-shot memo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_flows.support import checks
from pyro_flows.support.numbers.tensors import broadcast

Scored = tuple[Tensor, Tensor, Tensor]  # y, log|dy/dx|, and the score at y, which comes back without a graph


class Bijection(TransformModule, ConditionalTransform):
    r"""An invertible map with trainable parameters, plain (``context_dim=0``) or conditional.

    A subclass writes :meth:`forward_and_ladj` and :meth:`inverse_and_ladj`; each returns the value and the log
    absolute determinant *in the direction asked for*. Torch's ``Transform`` protocol (``t(x)``, ``t.inv``,
    ``log_abs_det_jacobian``, ``with_cache``, shapes) and Pyro's ``condition`` follow from the two.
    Nothing that a pass computes is stored on the module.

    Shapes: ``x`` and ``y`` are ``(..., *event_shape)``, ``ladj`` is ``(...)``, ``context`` is ``(..., context_dim)``
    and broadcasts against the leading axes of ``x``.

    With :math:`y = f(x)`, both passes give :math:`\log|\det \partial y / \partial x|` or its negative. Cost: that of
    the subclass. Errors: a subclass raises ``ValueError`` for events of another shape and for a missing context.

    >>> import torch, pyro_flows as pf
    >>> class Twice(pf.transforms.Bijection):
    ...     def forward_and_ladj(self, x, context=None):
    ...         return 2.0 * x, torch.log(torch.tensor(2.0)).expand(x.shape[:-1]) * x.shape[-1]
    ...     def inverse_and_ladj(self, y, context=None):
    ...         return y / 2.0, -torch.log(torch.tensor(2.0)).expand(y.shape[:-1]) * y.shape[-1]
    >>> y, ladj = Twice().forward_and_ladj(torch.ones(5, 2))
    >>> y.shape, round(float(ladj[0]), 4)
    (torch.Size([5, 2]), 1.3863)
    """

    bijective = True
    event_dim: int = 1
    context_dim: int = 0
    linear_in_context: bool = False  # whether a context only adds a linear function of it

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``y`` and ``log|dy/dx|``."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``log|dx/dy|``."""
        raise NotImplementedError

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        r"""Return ``y``, ``log|dy/dx|`` and the score carried along.

        Given :math:`g_x = \nabla_x \log q(x)` (``score``, shaped like ``x``), the density of ``y`` has the score
        :math:`g_y = J^{-\top}(g_x - \nabla_x \log|J|)`. It comes back without a graph. This default goes through
        the inverse; families override it with a recursion that needs none (Vaitl et al. 2024, path gradients).
        """
        y, ladj = self.forward_and_ladj(x, context)
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, back_ladj = self.inverse_and_ladj(leaf, context)
            total = (back * score).sum() + back_ladj.sum()
        (carried,) = torch.autograd.grad(total, leaf)
        return y, ladj, carried

    @property
    def event_shape(self) -> torch.Size | None:
        """Shape of an event of x, from the map's ``dim`` (a number, or a shape); None if the map does not know it."""
        dim = getattr(self, "dim", None)
        return None if dim is None else torch.Size((dim,) if isinstance(dim, int) else dim)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        """Refuse events of another shape than the map's, a context that is missing, and one that is not expected."""
        assert self.event_shape is not None
        checks.event(type(self).__name__, x, self.event_shape)
        checks.context(type(self).__name__, context, self.context_dim)

    @torch.no_grad()
    def start_from(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Set what this map can set from a batch of data, and return the batch's ``x``.

        Chains hand the batch down, last layer first: each :class:`ActNorm` makes zero mean and unit variance of what
        reaches it. Maps without a data-dependent start, and those inside an :class:`Inverse`, stay as they are.
        """
        return self.inverse_and_ladj(y, context)[0]

    # torch's protocol -------------------------------------------------------------------------------------------

    @constraints.dependent_property
    def domain(self) -> constraints.Constraint:
        """The support of x, all real numbers unless a map says otherwise."""
        return constraints.independent(constraints.real, self.event_dim)

    @constraints.dependent_property
    def codomain(self) -> constraints.Constraint:
        """The support of y, all real numbers unless a map says otherwise."""
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def inv(self) -> Bijection:
        """The inverse as a bijection of its own that shares the parameters."""
        return Inverse(self)

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|dy/dx|`` at ``x``; one pass (see :class:`Bound` for how to save it)."""
        return self.forward_and_ladj(x)[1]

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Return a view with a one-shot memo (``cache_size=1``), or this bijection itself (``cache_size=0``)."""
        return Bound(self) if cache_size else self

    def condition(self, context: Tensor | None) -> Bound:
        """Bind a context; the result is a torch ``Transform``."""
        return Bound(self, context)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class _Memo(NamedTuple):
    x: Tensor
    y: Tensor
    ladj: Tensor
    point: bool  # whether x may still be handed out: it was given by the caller, and not read yet
    grad: bool
    state: tuple[tuple[int, int, bool], ...]


@checks.constructor
class Bound(Transform):
    r"""One bijection with one context, as a plain torch ``Transform``: made anew for each trace, never stored.

    Torch and Pyro ask for the map and then for its log-determinant. To cost one pass, a ``Bound`` remembers the last
    ``(x, y, ladj)`` of a pass: it answers one inversion of a ``y`` that it made, and one reading of the
    log-determinant, which ends it. It serves only the very same tensor objects, unedited, with unchanged parameters,
    and with gradients recorded if they are recorded now. (Edits through ``.data`` and fused optimizers leave no trace
    in torch's version counters: make a new ``Bound`` after a step.)

    >>> import torch, pyro_flows as pf
    >>> bound = pf.transforms.AffineCoupling(2).condition(None)
    >>> x = torch.ones(2)
    >>> torch.equal(bound.inv(bound(x)), x)
    True

    Shapes: those of the bijection, ``(..., *event_shape)`` and ``(...)``.
    """

    bijective = True

    def __init__(self, bijection: Bijection, context: Tensor | None = None) -> None:
        super().__init__(cache_size=0)
        checks.context(type(bijection).__name__, context, bijection.context_dim)
        self.bijection = bijection
        self._held = _held(bijection)
        parameters = (part for held in self._held for part in held.values() if isinstance(part, nn.Parameter))
        self._dtype = next((part.dtype for part in parameters), torch.get_default_dtype())
        self.context = None if context is None else checks.floating("context", context, self._dtype)
        self._memo: _Memo | None = None

    @constraints.dependent_property
    def domain(self) -> constraints.Constraint:
        """The support of x."""
        return self.bijection.domain

    @constraints.dependent_property
    def codomain(self) -> constraints.Constraint:
        """The support of y."""
        return self.bijection.codomain

    def with_cache(self, cache_size: int = 1) -> Bound:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_memo": None}  # the dicts in _held stay those of the copied bijection

    def _state(self, *tensors: Tensor) -> tuple[tuple[int, int, bool], ...]:
        """Identity and version of all that the memo depends on, and whether gradients are wanted for it."""
        owned = [tensor for held in self._held for tensor in held.values() if tensor is not None]
        rest = tensors if self.context is None else (*tensors, self.context)
        return tuple((id(tensor), tensor._version, tensor.requires_grad) for tensor in (*owned, *rest))

    def _keep(self, x: Tensor, y: Tensor, ladj: Tensor, *, point: bool) -> None:
        if torch.is_inference_mode_enabled() or x.is_inference() or y.is_inference():
            self._memo = None  # inference tensors have no version counter
        else:
            self._memo = _Memo(x, y, ladj, point, torch.is_grad_enabled(), self._state(x, y, ladj))

    def _recall(self, x: Tensor | None, y: Tensor) -> _Memo | None:
        memo = self._memo
        if memo is None or memo.y is not y or (x is not None and memo.x is not x):
            return None
        if torch.is_grad_enabled() and not memo.grad:
            return None
        return memo if memo.state == self._state(memo.x, memo.y, memo.ladj) else None

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self._forward(checks.floating("x", x, self._dtype))
        self._keep(x, y, ladj, point=True)
        return y

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_ladj(x, self.context)

    def _inverse(self, y: Tensor) -> Tensor:
        memo = self._recall(None, y)
        if memo is not None and memo.point:
            self._memo = memo._replace(point=False)
            return memo.x
        x, ladj = self.bijection.inverse_and_ladj(checks.floating("y", y, self._dtype), self.context)
        self._keep(x, y, -ladj, point=False)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo, self._memo = self._recall(x, y), None
        if memo is not None:
            return memo.ladj
        return self.bijection.forward_and_ladj(checks.floating("x", x, self._dtype), self.context)[1]

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        return self._broadcast(self.bijection.forward_shape(shape))

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        return self._broadcast(self.bijection.inverse_shape(shape))

    def _broadcast(self, shape: Iterable[int]) -> torch.Size:
        shape = torch.Size(shape)
        if self.context is None:
            return shape
        cut = len(shape) - self.bijection.event_dim
        return broadcast(shape[:cut], self.context.shape[:-1]) + shape[cut:]

    def __repr__(self) -> str:
        shape = "" if self.context is None else f", context {tuple(self.context.shape)}"
        return f"Bound({type(self.bijection).__name__}{shape})"


_HOOKS = [key for key in vars(nn.Module()) if "hooks" in key and "state_dict" not in key]


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which a graph of what it does would pass over."""
    return any(vars(module).get(key) for key in _HOOKS)


def _held(module: nn.Module) -> list[dict[str, Any]]:
    """Return the tables of parameters and buffers of all modules inside; torch's ``modules()`` takes thrice as long."""
    found = [held for held in (module._parameters, module._buffers) if held]
    for inner in module._modules.values():
        found += [] if inner is None else _held(inner)
    return found


class Inverse(Bijection):
    r"""A bijection run backwards, sharing its parameters: ``Inverse(t).forward_and_ladj`` is ``t.inverse_and_ladj``.

    >>> import torch, pyro_flows as pf
    >>> t = pf.transforms.Rescale(3)
    >>> t.inv.inv is t
    True

    :math:`y = f^{-1}(x)`, and :math:`\log|J|` is the negative of that of f. Shapes and cost are those of the other
    direction of f.
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        self.event_dim = bijection.event_dim
        self.context_dim = bijection.context_dim

    @property
    def event_shape(self) -> torch.Size | None:
        shape = self.bijection.event_shape
        return None if shape is None else torch.Size(self.bijection.forward_shape(shape))

    @constraints.dependent_property
    def domain(self) -> constraints.Constraint:
        return self.bijection.codomain

    @constraints.dependent_property
    def codomain(self) -> constraints.Constraint:
        return self.bijection.domain

    @property
    def inv(self) -> Bijection:
        return self.bijection

    def forward_shape(self, shape: Iterable[int]) -> Iterable[int]:
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape: Iterable[int]) -> Iterable[int]:
        return self.bijection.forward_shape(shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_ladj(y, context)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inverse) and self.bijection is other.bijection

    def __hash__(self) -> int:
        return hash((Inverse, id(self.bijection)))
