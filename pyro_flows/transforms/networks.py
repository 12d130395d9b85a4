"""Networks that give a layer its parameters, from kept coordinates and a context; or free parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, unfold

from pyro_flows.support.numbers.tensors import broadcast

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


State = dict[str, Tensor]


def adopt_buffer(module: nn.Module, name: str, state_dict: State, prefix: str) -> None:
    """Let a module have a buffer if the state to be loaded has it, and none if the state lacks it."""
    found = state_dict.get(f"{prefix}{name}")
    if found is not None:
        setattr(module, name, found.detach().clone().to(next(chain(module.parameters(), module.buffers()))))
    elif any(key.startswith(prefix) for key in state_dict):
        setattr(module, name, None)


def adopt_context_scale(module: nn.Module, state_dict: State, prefix: str) -> None:
    """Let a module take over the location, scale and knots of a context from the state to be loaded, or have none.

    Raises:
        ValueError: for other shapes than (2, context_dim) and (2, context_dim, K), scales that are not positive, or
            knots that fall.
    """
    for name in ("context_scale", "context_knots"):
        adopt_buffer(module, name, state_dict, prefix)
    knots = module.context_knots
    if isinstance(knots, Tensor) and not (
        knots.dim() == 3 and knots.shape[:2] == (2, module.context_dim) and bool((knots.diff() >= 0.0).all())
    ):
        raise ValueError(f"context_knots: expected shape (2, {module.context_dim}, K) and numbers that do not fall.")
    found = module.context_scale
    if isinstance(found, Tensor) and (found.shape != (2, module.context_dim) or not bool((found[1] > 0.0).all())):
        raise ValueError(f"context_scale: expected shape (2, {module.context_dim}) and positive scales.")


def standardized(context: Tensor, scale: Tensor | None) -> Tensor:
    """Return a context (..., C) less its location, over its scale (2, C), if there is one."""
    return context if scale is None else (context - scale[0]) / scale[1]


def interpolated(context: Tensor, knots: Tensor) -> Tensor:
    """Map a context (..., C) along lines through knots (2, C, K), places and values; one place has one value."""
    places, values = knots
    c = context.movedim(-1, 0).reshape(len(places), -1)
    above = (c[:, :, None] >= places[:, None, :]).sum(-1).clamp(1, places.shape[1] - 1)
    low, high = (places.gather(1, at) for at in (above - 1, above))
    share = (c - low) / torch.where(high > low, high - low, 1.0)
    found = torch.lerp(values.gather(1, above - 1), values.gather(1, above), share)
    return found.reshape(len(places), *context.shape[:-1]).movedim(0, -1)


class Seen(NamedTuple):
    """What a flow sees of a context: layers whose effect is linear, and networks."""

    linear: Tensor | None
    bent: Tensor | None


def seen_of(context: Tensor | None, scale: Tensor | None, knots: Tensor | None) -> Seen:
    """Return the standardized context, and the one mapped through knots; without knots, both are the former."""
    if context is None:
        return Seen(None, None)
    linear = standardized(context, scale)
    return Seen(linear, linear if knots is None else interpolated(context, knots))


class Paced(nn.Module):
    """Numbers that come out times a fixed ``gain``, if there is one: with a small gain, a step of Adam moves them less.

    The gain is a buffer and goes with the parameters, which mean something else without it: a state that holds none is
    loaded as one of gain 1, and a module without a gain takes over that of the state.
    """

    gain: Tensor | None

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("gain", None)

    @torch.no_grad()
    def slow(self, gain: float | Tensor) -> None:
        """Set the gain, one number or one for each number that comes out, and leave what comes out as it is."""
        like = next(self.parameters())
        new = torch.as_tensor(gain, dtype=like.dtype, device=like.device)
        share = (1.0 if self.gain is None else self.gain) / new
        for parameter in self._last_parameters():
            parameter.mul_(share.reshape(-1, *[1] * (parameter.dim() - 1)))
        self.gain = new

    def _last_parameters(self) -> list[Tensor]:
        """Return the parameters that what comes out is linear in, a row for each number."""
        raise NotImplementedError

    def _paced(self, out: Tensor) -> Tensor:
        return out if self.gain is None else out * self.gain

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: object, **kwargs: object) -> None:
        adopt_buffer(self, "gain", state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def give_gains(module: nn.Module) -> None:
    """Give each layer that can have a gain, and has none, one of 1."""
    for layer in module.modules():
        if isinstance(layer, Paced) and layer.gain is None:
            Paced.slow(layer, 1.0)


class Linear(Paced, nn.Linear):
    """A linear layer within a network; its preactivations are what is paced."""

    def forward(self, x: Tensor) -> Tensor:
        return self._paced(super().forward(x))

    def _last_parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


class Free(Paced):
    """Parameters that depend on nothing: a vector of ``out`` numbers, zero at the start unless told otherwise."""

    def __init__(self, out: int, start: Tensor | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(out) if start is None else start.clone())

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        return self._paced(self.values)

    def _last_parameters(self) -> list[Tensor]:
        return [self.values]


class Network(Paced):
    """A multilayer perceptron of (kept, context); its last layer starts at ``start`` whatever the input."""

    def __init__(
        self, kept: int, context_dim: int, out: int, hidden: Sequence[int], activation: str, start: Tensor | None = None
    ) -> None:
        super().__init__()
        sizes = [kept + context_dim, *hidden]
        body = self._body(sizes, ACTIVATIONS[activation])
        self.layers = nn.Sequential(*body, self._starting_at(self._last(sizes[-1], out), start))

    @torch.no_grad()
    def _starting_at(self, last: nn.Module, start: Tensor | None) -> nn.Module:
        """Let a last layer without weights return ``start``, or zeros."""
        for parameter in last.parameters():
            parameter.zero_()
        if start is not None:
            last.get_parameter("bias").copy_(start)
        return last

    def _body(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
        return [part for wide, narrow in pairwise(sizes) for part in (Linear(wide, narrow), activation())]

    @torch.no_grad()
    def slow(self, gain: float | Tensor) -> None:
        """Set the gain, and one for each layer before the last: one over its width.

        The smaller the gain, the larger grow the weights of the last layer, and each moves what comes out by that much
        when the unit before it moves. A step of Adam moves all W units at once, in the direction that counts.
        """
        super().slow(gain)
        for layer in self.layers.modules():
            if isinstance(layer, (Linear, NormedLinear)):
                layer.slow(1.0 / max(layer.in_features, layer.out_features))

    def _last(self, width: int, out: int) -> nn.Linear | nn.Conv2d:
        return nn.Linear(width, out)

    def _last_parameters(self) -> list[Tensor]:
        return [*self.layers[-1].parameters()]

    @property
    def width(self) -> int:
        """How many numbers the last layer makes one number of."""
        return self._last_parameters()[0][0].numel()

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        x = beside(kept, context)
        try:
            return self._paced(self.layers(x))
        except RuntimeError as error:
            own = next(self.parameters()).dtype
            if x.dtype == own:
                raise
            raise ValueError(
                f"flow: its weights have dtype {own}, and the values {x.dtype}. Convert the values, as with "
                f".to({own}), or the flow, as with .double()."
            ) from error


class Robust(Network):
    """A multilayer perceptron of (asinh(kept), context): near zero the same, far out it sees the logarithm.

    Rare values of data can lie some hundred standard deviations out, such as a lit pixel that is dark in nearly all
    images. A network of lines goes on along its lines there, and an exponential follows.
    """

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        return super().forward(None if kept is None else kept.asinh(), context)


class Residual(Network):
    """A residual network, a block of two weight-normed layers for each entry of ``hidden``, which must be equal."""

    def _body(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
        return _residual(NormedLinear, sizes, activation)


class Convolution(Network):
    """Convolutions of kept channels: 3 x 3, then 1 x 1 up to the last, 3 x 3; a context enters as constant channels."""

    def _body(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for number, (wide, narrow) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(wide, narrow, 1 if number else 3, padding="same"), activation()]
        return layers

    def _last(self, width: int, out: int) -> nn.Linear | nn.Conv2d:
        return nn.Conv2d(width, out, 3, padding="same")

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        assert kept is not None
        first, *others = self.layers
        assert isinstance(first, nn.Conv2d)
        kernel = first.kernel() if isinstance(first, NormedConv2d) else first.weight
        batch, channels = kept.shape[:-3], kept.shape[-3]
        x = kept.reshape(math.prod(batch), *kept.shape[-3:])
        out = conv2d(x, kernel[:, :channels], first.bias, padding=1)
        if context is not None:
            out = out.reshape(*batch, *out.shape[1:]) + of_constants(context, kernel[:, channels:], kept.shape[-2:])
            batch = out.shape[:-3]
            out = out.reshape(math.prod(batch), *out.shape[-3:])
        for layer in others:
            out = layer(out)
        return self._paced(out).reshape(*batch, *out.shape[1:])


def of_constants(values: Tensor, kernel: Tensor, sides: Sequence[int]) -> Tensor:
    """Return the convolution (..., O, H, W) of channels that are constant, (..., C), by 3 x 3 filters (O, C, 3, 3).

    A pixel has the sum of the taps that lie in the image, so that channels cost the same in images of any size.
    """
    taps = torch.tensordot(values, kernel, ([-1], [1])).flatten(-2)
    inside = unfold(kernel.new_ones(1, 1, *sides), 3, padding=1)[0]
    return (taps @ inside).unflatten(-1, tuple(sides))


class RobustConvolution(Robust, Convolution):
    """Convolutions of asinh(kept)."""


class ResidualConvolution(Convolution):
    """A residual network of weight-normed 3 x 3 convolutions, a block of two for each entry of ``hidden``."""

    def _body(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
        return _residual(NormedConv2d, sizes, activation)


def _residual(
    normed: Callable[[int, int], nn.Module], sizes: Sequence[int], activation: Callable[[], nn.Module]
) -> list[nn.Module]:
    width = one_width(sizes[1:])
    blocks = [Block(activation(), normed(width, width), activation(), normed(width, width)) for _ in sizes[1:]]
    return [normed(sizes[0], width), *blocks, activation()]


class Block(nn.Sequential):
    """Layers with a way around them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class NormedLinear(Paced, nn.Linear):
    """A linear layer whose rows have a direction and a length of their own (torch's own one cannot be pickled)."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__(wide, narrow)
        self.length = nn.Parameter(self.weight.detach().norm(dim=1, keepdim=True))

    @torch.no_grad()
    def slow(self, gain: float | Tensor) -> None:
        """As for other layers; and rows as long as makes a step turn them by as little. Their length means nothing."""
        super().slow(gain)
        self.weight.div_(self.weight.norm(dim=1, keepdim=True) * gain)

    def forward(self, x: Tensor) -> Tensor:
        return self._paced(linear(x, self.length * self.weight / self.weight.norm(dim=1, keepdim=True), self.bias))

    def _last_parameters(self) -> list[Tensor]:
        return [self.length, self.bias]


class NormedConv2d(nn.Conv2d):
    """A 3 x 3 convolution whose filters have a direction and a length of their own."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__(wide, narrow, 3, padding="same")
        self.length = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1)[:, None, None, None])

    def kernel(self) -> Tensor:
        """Return the filters."""
        return self.length * self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.kernel(), self.bias, padding="same")


class Dense(Robust):
    """A perceptron of asinh of all kept pixels and the context: each number that comes out depends on all of them."""

    def __init__(
        self,
        kept: int,
        context_dim: int,
        out: int,
        hidden: Sequence[int],
        activation: str,
        start: Tensor | None = None,
        *,
        sides: Sequence[int],
    ) -> None:
        pixels = math.prod(sides)
        start = None if start is None else start.repeat_interleave(pixels)
        super().__init__(kept * pixels, context_dim, out * pixels, hidden, activation, start)
        self.sides = tuple(sides)

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        assert kept is not None
        return super().forward(kept.flatten(-3), context).unflatten(-1, (-1, *self.sides))


def beside(kept: Tensor | None, context: Tensor | None) -> Tensor:
    """Return both as one input."""
    if context is None or kept is None:
        only = context if kept is None else kept
        assert only is not None
        return only
    shape = broadcast(kept.shape[:-1], context.shape[:-1])
    return torch.cat([kept.expand(*shape, -1), context.expand(*shape, -1)], dim=-1)


NETWORKS: dict[int, dict[str, type[Network]]] = {
    1: {"mlp": Network, "robust": Robust, "residual": Residual},
    3: {"convolution": Convolution, "robust": RobustConvolution, "residual": ResidualConvolution, "dense": Dense},
}  # by the number of axes of an event; the default comes first


def one_width(widths: Sequence[int]) -> int:
    if len(set(widths)) != 1:
        raise ValueError(f"hidden: expected equal widths of residual blocks such as (32, 32), got {tuple(widths)}.")
    return widths[0]
