"""A flow's two passes for the path gradient, layer by layer through recorded bodies, without autograd."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pyro_flows import bases
from pyro_flows.bodies import Body, body_of
from pyro_flows.compiling import Runner, pays_at
from pyro_flows.flows import Flow
from pyro_flows.graphs import agree, record
from pyro_flows.transforms.base import Bijection
from pyro_flows.transforms.chain import Chain

logger = logging.getLogger("pyro_flows")


class Passes:
    r"""Draw with a score, then pull a cotangent of the draws back to the parameters: what one training step needs.

    The arithmetic is that of :meth:`Flow.sample_with_score` and of autograd, but each kind of layer is recorded as two
    flat graphs once (see :mod:`pyro_flows.bodies`) and then run without Python's modules and without a tape. When that
    has been done often enough to pay for it, both passes are compiled as a whole (see :mod:`pyro_flows.compiling`).

    Args:
        flow: an unconditional flow; its layers must keep the shape of an event.
        like: base points (S, D) of the batches to come.
        weights: the flow's parameters that are trained, in their order; the passes read these tensors, not the flow's.
        compile: whether to compile at once (True), never (False), or when it pays (None).

    Raises:
        Exception: of any kind, if some layer cannot be recorded, or the graphs give other numbers than the flow.
    """

    def __init__(self, flow: Flow, like: Tensor, weights: Sequence[Tensor], *, compile: bool | None = None) -> None:
        self.flow = flow
        layers = list(_flat(flow.bijection))
        owned = [parameter for layer in layers for parameter in layer.parameters()]
        if [id(parameter) for parameter in owned] != [id(parameter) for parameter in flow.parameters()]:
            raise ValueError("layers: expected parameters that belong to one layer each.")
        left = iter(weights)
        self.bodies: list[Body] = []
        self.state: list[Tensor] = []  # of all layers, one after the other
        self._ends = [0]
        for layer in layers:
            self.bodies.append(body_of(layer, like))
            self.state += [next(left) if part.requires_grad else part.detach() for part in layer.parameters()]
            self.state += layer.buffers()
            self._ends.append(len(self.state))
        self._taped = list(accumulate((2 + body.saved for body in self.bodies), initial=0))
        graphs = [module for body in self.bodies for module in (body.forward_graph, body.backward_graph)]
        self._compile_at = pays_at(graphs) if compile is None else int(compile)
        self._runs = 0
        self._whole: tuple[Runner, Runner] | None = None
        self._check(like)

    @torch.no_grad()
    def sample(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return ``z``, ``log q(z)``, the score and what :meth:`pull` needs, for base points ``x`` (S, D)."""
        self._runs += 1
        if self._runs == self._compile_at:
            self._compile(x)
        run = self._forward if self._whole is None else self._whole[0]
        z, log_q, score, *tape = run(*self.state, x)
        return z, log_q, score, tape

    @torch.no_grad()
    def pull(self, tape: list[Tensor], cotangent: Tensor) -> Tensor:
        """Return the gradient of ``(cotangent * z).sum()`` along all parameters, as one vector."""
        run = self._backward if self._whole is None else self._whole[1]
        return run(*self.state, *tape, cotangent)[0]

    @property
    def compiled(self) -> bool:
        """Whether the passes run as compiled code."""
        return self._whole is not None

    def _forward(self, *inputs: Tensor) -> list[Tensor]:
        *state, x = inputs
        log_q, score = self.flow._log_base(x), bases.score(self.flow.base, x, self.flow.df)
        tape: list[Tensor] = []
        for body, (first, last) in zip(self.bodies, pairwise(self._ends), strict=True):
            y, ladj, carried, *saved = body.forward(*state[first:last], x, score)
            tape += (x, score, *saved)
            x, score, log_q = y, carried, log_q - ladj
        return [x, log_q, score, *tape]

    def _backward(self, *inputs: Tensor) -> tuple[Tensor]:
        *given, cotangent = inputs
        state, tape = given[: self._ends[-1]], given[self._ends[-1] :]
        found: list[Tensor] = []
        for number in reversed(range(len(self.bodies))):
            (first, last), (begin, end) = self._ends[number : number + 2], self._taped[number : number + 2]
            cotangent, *gradients = self.bodies[number].backward(*state[first:last], *tape[begin:end], cotangent)
            found += reversed(gradients)
        return (torch.cat([gradient.reshape(-1) for gradient in reversed(found)]),)

    def _check(self, like: Tensor) -> None:
        """Compare with the flow and autograd; bodies may come from other flows."""
        x = 2.0 * torch.sin(torch.arange(like.numel(), dtype=like.dtype, device=like.device)).reshape(like.shape)
        pull = torch.cos(x)
        z, log_q, score = self.flow.sample_with_score(at=x)
        trained = [parameter for parameter in self.flow.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad((pull * z).sum(), trained, materialize_grads=True)
        expected = (z.detach(), log_q, score, torch.cat([gradient.reshape(-1) for gradient in gradients]))
        with torch.no_grad():
            z, log_q, score, *tape = self._forward(*self.state, x)
            got = z, log_q, score, *self._backward(*self.state, *tape, pull)
        if not agree(got, expected):
            raise RuntimeError("the graphs gave other values than the flow")

    def _compile(self, x: Tensor) -> None:
        """Compile both passes; where that fails, or gives other numbers, they stay as they are."""
        try:
            forward = Runner(record(self._contiguous, *self.state, x), compile=True)
            z, _, _, *tape = forward(*self.state, x)
            example = [part.clone() for part in (*self.state, *tape, z)]  # tensors that are one would be one input
            backward = Runner(record(self._backward, *example), compile=forward.compiled)
            backward(*self.state, *tape, z)
        except Exception as error:
            logger.debug("not compiled: %s", error)
            return
        if backward.compiled:
            self._whole = forward, backward

    def _contiguous(self, *inputs: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in self._forward(*inputs)]  # compiled code counts on strides


def _flat(bijection: Bijection) -> Iterator[Bijection]:
    if isinstance(bijection, Chain):
        for layer in bijection.layers:
            yield from _flat(layer)  # type: ignore[arg-type]
    else:
        yield bijection
