"""Log-probs of given tokens without the table of all positions and all tokens: the output layer, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zr.models.sharding import holder, running

__all__ = ["token_log_probs"]


def token_log_probs(
    hidden: Tensor,
    tokens: Tensor,
    output: nn.Module,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    r"""Log-probs of tokens and the entropy at their positions, :math:`\log \mathrm{softmax}(z / T)` of the logits z.

    No more than ``chunk`` positions meet the vocabulary at once. Where only the hidden states need a gradient, it is computed
    in the forward pass, from logits that are there anyway (a log-prob depends on its own position only). Where the output layer
    learns too, its gradient needs all that comes after, so the backward pass visits the chunks again and adds it up in float32.

    The layer is run as it is, adapters included, by one call of the module for all chunks: hooks that gather the weights of a
    sharded layer run once, as often on every rank. Logits are widened to float32 or more.

    Args:
        hidden: ``(N, H)`` hidden states, each of the position before its token.
        tokens: ``(N,)`` ids.
        output: the output layer, ``(..., H) -> (..., V)``, the same at every call: no dropout.
        temperature: T, above 0; divides the logits.
        forbidden: ``(F,)`` ids of probability zero, whatever their logits.
        chunk: positions at a time; memory grows with it and not with N.

    Returns:
        ``(N,)`` log-probs in nats, with gradients into ``hidden`` and the layer's parameters (once: no gradient of a gradient),
        and the ``(N,)`` entropy in nats, without gradient.

    Raises:
        ValueError: shapes that do not fit, a temperature or a chunk that is not positive.

    Example:
        >>> layer = nn.Linear(1, 3, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0], [1.0], [7.0]]))
        >>> hidden = torch.tensor([[1.0], [2.0]]).log() # logits 0, then 0 and log 2; the third token is forbidden
        >>> log_probs, entropy = token_log_probs(hidden, torch.tensor([1, 1]), layer, forbidden=torch.tensor([2]))
        >>> [round(p, 4) for p in log_probs.exp().tolist()]                         # 1 of 2, 2 of 1 + 2
        [0.5, 0.6667]
        >>> [round(h, 4) for h in entropy.tolist()]                                 # log 2, log 3 - 2/3 log 2
        [0.6931, 0.6365]
    """
    if hidden.dim() != 2 or tokens.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be (N, H) and tokens (N,), got {tuple(hidden.shape)} and {tuple(tokens.shape)}")
    if not (temperature > 0 and chunk >= 1):
        raise ValueError(f"token log-probs need temperature > 0 and chunk >= 1, got {temperature} and {chunk}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    layer = _Layer(output.forward, tokens, temperature, forbidden, chunk, device, dtype)

    def chunked(states: Tensor) -> tuple[Tensor, Tensor]:
        learning = [parameter for parameter in output.parameters() if parameter.requires_grad]
        inputs = (states, *learning) if torch.is_grad_enabled() else (states.detach(),)
        found: tuple[Tensor, Tensor] = _TokenLogProbs.apply(layer, *inputs)
        return found

    module = holder(output)
    with running(module, lambda *given: chunked(*(given or (hidden,)))):
        result: tuple[Tensor, Tensor] = module(hidden) if module is output else module()
    return result


@dataclass(frozen=True)
class _Layer:
    """The output layer and how it is read."""

    forward: Callable[[Tensor], Tensor]
    tokens: Tensor
    temperature: float
    forbidden: Tensor | None
    chunk: int
    device: str
    autocast: torch.dtype | None

    def parts(self) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, len(self.tokens), self.chunk)]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of a chunk ``(C, V)``, in memory of its own."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        scaled = logits.detach().to(wide, copy=True).div_(self.temperature)
        if self.forbidden is not None:
            scaled.index_fill_(-1, self.forbidden, -torch.inf)
        return scaled.sub_(scaled.logsumexp(-1, keepdim=True))

    def slope(self, probs: Tensor, tokens: Tensor) -> Tensor:
        """``(C, V)`` derivatives of the log-probs by the logits, in the memory of the probabilities."""
        one = probs.new_ones(()).expand(len(tokens), 1)
        return probs.neg_().scatter_add_(-1, tokens[:, None], one).div_(self.temperature)


class _TokenLogProbs(torch.autograd.Function):
    """See :func:`token_log_probs`."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, hidden: Tensor, *learning: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layer = layer
        ctx.now = ctx.needs_input_grad[1] and not learning
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        slopes = torch.empty_like(hidden) if ctx.now else None
        for part in layer.parts():
            states, tokens = hidden[part].detach().requires_grad_(ctx.now), layer.tokens[part]
            with torch.set_grad_enabled(ctx.now):
                logits = layer.forward(states)
            logs = layer.log_softmax(logits)
            log_probs[part] = logs.gather(-1, tokens[:, None]).squeeze(-1)
            probs = logs.exp()
            entropy[part] = -logs.clamp_min_(torch.finfo(logs.dtype).min).mul_(probs).sum(-1)
            if slopes is not None:
                (slopes[part],) = torch.autograd.grad(logits, states, layer.slope(probs, tokens).to(logits.dtype))
        ctx.save_for_backward(*((slopes,) if ctx.now else (hidden, *learning)))
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        layer, (hidden, *learning) = ctx.layer, ctx.saved_tensors
        if ctx.now:
            return None, (gradient[:, None] * hidden).to(hidden.dtype)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in learning]
        into = torch.zeros_like(hidden) if ctx.needs_input_grad[1] else None
        for part in layer.parts():
            states, tokens = hidden[part].detach().requires_grad_(), layer.tokens[part]
            with torch.enable_grad(), torch.autocast(layer.device, layer.autocast, enabled=layer.autocast is not None):
                logits = layer.forward(states)
            slope = layer.slope(layer.log_softmax(logits).exp_(), tokens).mul_(gradient[part, None]).to(logits.dtype)
            wanted = learning if into is None else [*learning, states]
            found = torch.autograd.grad(logits, wanted, slope, allow_unused=True)
            for total, one in zip(sums, found, strict=False):
                if one is not None:
                    total += one
            if into is not None and found[-1] is not None:
                into[part] = found[-1]
        return None, into, *(total.to(p.dtype) for total, p in zip(sums, learning, strict=True))
