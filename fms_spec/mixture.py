"""Losses of a draft distribution that is part read-out and part copy, with their gradients, a chunk of positions at a time.

Shapes: c positions of a chunk, n slots that any of them sees, r draft vocabulary, m positions, s slots, w pointer width.

With s = softmax(logits), attended = softmax(scores) and q = (1 - gate) s + gate sum_t attended_t [token_t], all losses of `losses` are
functions of q on the draft vocabulary; what is copied from outside of it has no target, and its mass is lost to the loss as it should be.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fms_spec.context import Context, Text
from fms_spec.passes import Room, add_at, dot

LEAST = 1e-30  # probability of a draft: what its inverse weighs, times any loss's weight, is still a number


class Copying:
    """One head's pointer in the losses: its inputs, and what becomes their gradients.

    Args:
        query: [m, w]. gate: [m]. keys: [s, w], of all heads; their fp32 gradient is added up in `grad_keys`. entries: int64 [s], draft
        vocabulary's entry of the token that each slot stands for, -1 where it has none. text: `context.Text`.
    """

    def __init__(
        self, query: torch.Tensor, gate: torch.Tensor, keys: torch.Tensor, grad_keys: torch.Tensor, entries: torch.Tensor, text: Text
    ):
        self.query, self.gate, self.keys, self.grad_keys, self.entries, self.text = query, gate, keys, grad_keys, entries, text
        self.grad_query, self.grad_gate = torch.empty_like(query), torch.empty_like(gate, dtype=torch.float32)

    def chunk_loss(
        self, rows: slice, passes: Any, products: list[Any], targets: torch.Tensor, weights: Any, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `losses.chunk_loss`, of the positions `rows`, and the gradient by their logits; passes, products: see `passes.InPlace`."""
        query = self.query[rows]
        block = self.text.block(rows, len(query))
        keys = block.of_slots(self.keys)
        scores = block.seen((block.by_row(query) @ keys.transpose(1, 2)).float())
        total = scores.logsumexp(-1, keepdim=True)
        attended = scores.sub_(total).exp_()
        opened = self.gate[rows, None].float() + total
        gates = torch.sigmoid(opened), torch.sigmoid(-opened)  # of which neither is a difference that has lost its digits
        entries = block.of_slots(self.entries)[block.group]
        (loss, grad_gate, grad_attended), grad = passes(mixture_loss, products, targets, weights, *gates, attended, entries)
        grad_gate = grad_gate * gates[0] * gates[1]
        grad_attended -= (attended * grad_attended).sum(-1, keepdim=True) - grad_gate
        grad_scores = block.by_row((grad_attended * attended).mul_(scale).to(keys.dtype))
        self.grad_query[rows] = block.by_position(grad_scores @ keys)
        block.of_slots(self.grad_keys, add=(grad_scores.transpose(1, 2) @ block.by_row(query)).float())
        self.grad_gate[rows] = grad_gate[:, 0] * scale
        return loss, torch.ones_like(total), grad


def mixture_loss(
    room: Room, targets: torch.Tensor, weights: Any, gate: torch.Tensor, rest: torch.Tensor, attended: torch.Tensor, entries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of a chunk, summed: (fp32 scalar, gradient by gate [c, 1], gradient by attended [c, n]).

    With weights a, b, c and acceptance rate A = sum_v min(p, q): dL/dq = -a onehot / q - b p / q - (c / A) [q < p], and from there
    dL/dlogits = (1 - gate) s (dL/dq - sum s dL/dq), which log s becomes.

    Args:
        room: log s, log p or None where no loss asks for p, and two more or None, fp32 [c, r]; see `passes`. targets: int64 [c], -1 where
        there is none. weights: `losses.LossWeights`. gate, rest: fp32 [c, 1], the gate and 1 - gate. attended: fp32 [c, n]. entries:
        int64 [c, n].
    """
    log_s, log_p, spare, other = room
    s, known = log_s.exp_(), entries >= 0
    index = entries.clamp(min=0)
    copied = attended * known
    q = torch.mul(s, rest, out=other).scatter_add_(1, index, gate * copied).clamp_(min=LEAST)
    places, told = targets[:, None].clamp(min=0), weights.cross_entropy * (targets[:, None] >= 0)
    said = q.gather(1, places)
    total = -(told * said.log()).sum()
    if log_p is None:
        grad = torch.mul(s, 0.0, out=spare)
    else:
        p = torch.exp(log_p, out=spare)
        if weights.distillation:
            total = total + weights.distillation * dot(p, log_p)
            total = total - weights.distillation * dot(p, torch.log(q, out=log_p))
        if weights.acceptance:
            rate = torch.minimum(p, q, out=log_p).sum(-1, keepdim=True).clamp(min=LEAST)
            total = total - weights.acceptance * rate.log().sum()
        grad = torch.div(p, q, out=log_p).mul_(-weights.distillation)
        if weights.acceptance:
            grad.addcmul_(torch.lt(q, p, out=spare), -weights.acceptance / rate)
    if weights.cross_entropy:
        add_at(grad, places, -told / said)
    at_slots = grad.gather(1, index) * known
    grad.mul_(s)
    each = grad.sum(-1, keepdim=True)
    grad_gate = (copied * at_slots).sum(-1, keepdim=True) - each
    torch.sub(grad, s.mul_(each), out=log_s).mul_(rest)
    return total, grad_gate, at_slots.mul_(gate)


def mixed(
    known: torch.Tensor, over_all: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor, gate: torch.Tensor, context: Context
) -> torch.Tensor:
    """(1 - gate) known + gate copied, for proposing: known fp32 [m, r], `over_all` makes [m, v] of it; query [m, w], gate [m] -> [m, v].

    With g = gate's G y + a, both parts are one softmax over the scores g + s_t and a last one of 0, which is what is known.
    """
    scores = context.scores(query).add_(gate.float()[:, None])
    copied, rest = F.pad(scores, (0, 1)).softmax(-1).split([scores.shape[-1], 1], dim=-1)
    found, texts = over_all(known.mul_(rest)), len(context.tokens)
    copied = copied.view(texts, -1, copied.shape[-1])
    found.view(texts, -1, found.shape[-1]).scatter_add_(2, context.tokens[:, None].expand_as(copied), copied)
    return found
