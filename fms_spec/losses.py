"""Losses of attached heads; the memory of logits is bounded by a chunk, never [heads x tokens x vocabulary].

Shapes: m positions, k feature width, r draft vocabulary, d base width.

Per head, with student distribution q = softmax(features @ weight.T) and the base model's p, restricted to the draft vocabulary:
    cross-entropy  -log q[token]            on the token of the text; tokens outside the draft vocabulary give none
    distillation   KL(p || q)               towards the base model's distribution for the same position
    acceptance     -log sum_v min(p, q)     of the rate at which drafts drawn from q are accepted by p (LK loss, arXiv 2602.23881)
    smooth L1      on predicted hidden states, for families that predict them
The phase's loss is the sum over heads of weight_i times the mean over that head's valid positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fms_spec.alignment import Windows
from fms_spec.base_model import BaseModel
from fms_spec.batch import upload
from fms_spec.mixture import Copying
from fms_spec.passes import Arithmetic, Compiled, InPlace, Room, add_at, add_product, arithmetic_of
from fms_spec.read_out import read_out

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LossWeights:
    """Weights of a phase: of the four losses, and of each head (a tuple of n_predict)."""

    cross_entropy: float
    distillation: float
    smooth_l1: float
    heads: tuple[float, ...]
    acceptance: float = 0.0

    @property
    def teacher(self) -> bool:
        """Whether the base model's distribution is asked for."""
        return bool(self.distillation or self.acceptance)


def chunk_loss(room: Room, targets: torch.Tensor, weights: LossWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, distillation and acceptance of a chunk, summed: (fp32 scalar, row_scale fp32 [m, 1]).

    Their gradient by the logits is row_scale times what log q becomes. With weights a, b, c and acceptance rate A = sum_v min(p, q):
        (a + b) q - a onehot - b p + (c / A) (q sum_{v: q < p} q_v - q [q < p])
    so one softmax serves all three, and everything is done in place: on a CPU each pass over [512, 49152] costs a tenth of a product.
    Where q's factor is a row's own, it is left to be applied to what is smaller.

    Args:
        room: log q, log p or None where no loss asks for p, and one more or None, fp32 [m, r]; see `passes`. targets: int64 [m], -1 where
        there is none.
    """
    log_q, log_p, spare, *_ = room
    index = targets[:, None].clamp(min=0)
    known = weights.cross_entropy * (targets[:, None] >= 0)
    total = -(known * log_q.gather(1, index)).sum()
    if log_p is not None:
        p = torch.exp(log_p, out=spare)
        if weights.distillation:
            total = total + weights.distillation * log_p.sub_(log_q).mul_(p).sum(-1).sum()
    grad = q = log_q.exp_()
    row_scale = known + weights.distillation
    if weights.acceptance:
        overlap = torch.minimum(p, q, out=log_p)
        rate = overlap.sum(-1, keepdim=True).clamp(min=TINY)
        total = total - weights.acceptance * rate.log().sum()
        under = overlap.masked_fill_(q >= p, 0.0)
        q_scale = row_scale + weights.acceptance * under.sum(-1, keepdim=True) / rate
        grad = q.mul_(q_scale).addcmul_(under, -weights.acceptance / rate)
        row_scale = torch.ones_like(row_scale)  # q's factor may be next to nothing here, and the others' is not
    if weights.cross_entropy:
        add_at(grad, index, -known / row_scale.clamp(min=TINY))
    if weights.distillation and weights.cross_entropy:
        grad.sub_(p.mul_(weights.distillation / row_scale))
    elif weights.distillation:
        grad.sub_(p, alpha=weights.distillation if weights.acceptance else 1.0)
    return total, row_scale


class SoftTargetLoss(torch.autograd.Function):
    """`chunk_loss` of all heads, their gradients worked out while a chunk's logits are at hand: none of size [m, r] is kept.

    A read-out has one fp32 gradient [r, k], however many heads share it; one for each of three tied heads was two thirds of the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, targets: list[torch.Tensor], teacher_of: Callable[[int], torch.Tensor] | None, teacher_weight: torch.Tensor | None,
        teacher_cap: float | None, scales: torch.Tensor, weights: LossWeights, arithmetic: Arithmetic, seen: Any, *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Returns (the heads' sum, fp32 scalar, to be trained on; each head's, fp32 [h], without gradient).

        Args:
            targets: one int64 [m] a head (-1: none). teacher_of, teacher_weight, teacher_cap: teacher_of(head) [m, d], [r, d] and the
            `BaseModel.output_cap`, of which the base model's logits are made; all None where no loss asks for them. scales: fp32 [h],
            what a head's loss is multiplied by. weights: `LossWeights`. arithmetic: `passes.Arithmetic`. seen: (entries, text) of
            `mixture.Copying` where heads have a pointer, otherwise None. inputs: each head's features [m, k], then its read-out [r, k];
            with a pointer each head's query and gate, then the keys.
        """
        heads, dtype = len(targets), arithmetic.dtype
        features, readouts, queries, gates = (inputs[part * heads : (part + 1) * heads] for part in range(4))
        ctx.dtypes, trained = [value.dtype for value in inputs], ctx.needs_input_grad[-len(inputs) :][heads : 2 * heads]
        shared = {id(weight): weight.to(dtype) for weight in readouts}
        grads = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight, train in zip(readouts, trained) if train}
        chunk, columns = arithmetic.rows(len(readouts[0])), len(readouts[0])
        wanted = [True, teacher_of is not None, teacher_of is not None or bool(seen), bool(seen)]
        passes = arithmetic.way(features[0], (min(chunk, len(features[0])), columns), wanted)
        losses, grad_features, copying = [], [], []
        if seen:
            keys = inputs[-1].to(dtype)
            grad_keys = torch.zeros_like(keys, dtype=torch.float32)
            copying = [Copying(query.to(dtype), gate, keys, grad_keys, *seen) for query, gate in zip(queries, gates)]
        for head, (x, weight) in enumerate(zip(features, readouts)):
            teacher = None if teacher_of is None else teacher_of(head).to(dtype)
            loss, grad = one_head(
                x.to(dtype), shared[id(weight)], grads.get(id(weight)), targets[head], teacher, teacher_weight,
                teacher_cap, scales[head], weights, passes, chunk, copying[head] if seen else None,
            )  # fmt: skip
            losses.append(loss)
            grad_features.append(grad.to(x.dtype))
        grad_readouts = [grads.pop(id(weight), None) for weight in readouts]  # the first of those who share it has it
        grad_pointers = [*(copied.grad_query for copied in copying), *(copied.grad_gate for copied in copying), grad_keys] if seen else []
        ctx.save_for_backward(*grad_features, *grad_readouts, *grad_pointers)
        each = torch.stack(losses)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        """In place: autograd refuses a second call, and nobody asks for one."""
        gradients = [grad if grad is None else grad.mul_(grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return (None,) * 8 + tuple(gradients)


def one_head(
    features: torch.Tensor, weight: torch.Tensor, grad_weight: torch.Tensor | None, targets: torch.Tensor, teacher: torch.Tensor | None,
    teacher_weight: torch.Tensor | None, teacher_cap: float | None, scale: torch.Tensor, weights: LossWeights,
    passes: InPlace | Compiled, chunk: int, copying: Copying | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss of a head, times `scale`, chunk by chunk: (fp32 scalar, gradient by its features [m, k]); `grad_weight`, if any, is added to.

    copying: takes the gradients of a pointer.
    """
    total = torch.zeros((), dtype=torch.float32, device=features.device)
    grad_features = torch.empty_like(features)
    for start in range(0, len(features), chunk):
        rows = slice(start, start + chunk)
        x = features[rows]
        taught = None if teacher is None or teacher_weight is None else (teacher[rows], teacher_weight, teacher_cap)
        products = [(x, weight, None), taught]
        if copying:
            loss, row_scale, grad = copying.chunk_loss(rows, passes, products, targets[rows], weights, scale)
        else:
            (loss, row_scale), grad = passes(chunk_loss, products, targets[rows], weights)
        total += loss
        row_scale = scale * row_scale
        torch.mm(grad, weight, out=grad_features[rows]).mul_(row_scale)
        if grad_weight is not None:
            add_product(grad_weight, grad.T, (x * row_scale).to(x.dtype))
    return total * scale, grad_features


def head_losses(
    speculator: Any, windows: Windows, base_model: BaseModel, weights: LossWeights, counts: torch.Tensor,
    arithmetic: Arithmetic | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(the weighted loss, fp32 scalar, to be trained on; each head's part of it, fp32 [h], without gradient).

    Heads that share their weights with earlier ones, and have no weight in the loss, are not run: their part is 0.

    Args:
        speculator: a `Speculator`. windows: `alignment.Windows`. weights: `LossWeights`. counts: positions of each head over the whole
        step, fp32 [h] on the device, so that micro-batches, of all processes, add up to exactly the mean over the step. arithmetic: what
        `arithmetic_of` chooses by default.
    """
    arithmetic = arithmetic or arithmetic_of(windows.states)
    device, dtype = windows.states.device, arithmetic.dtype
    last = max((head for head, weight in enumerate(weights.heads) if weight), default=0)
    run = max(last + 1, speculator.distinct_heads)
    scales = (upload(torch.tensor(weights.heads), device) / counts.clamp(min=1))[:run]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        if text := windows.text:
            text = replace(text, kept=speculator.keep(windows.states.to(dtype), text.recent, text.slots, text))
        features, readouts, pointers = zip(*speculator.heads(windows.hidden.to(dtype), windows.tokens, windows.counts[:run], text))
        targets = [speculator.draft_targets(windows.targets(head)) for head in range(len(features))]
        final = replace(windows, states=speculator.final(windows.states))
        teacher: tuple[Any, ...] = (None, None, None)
        if weights.teacher:
            weight = speculator.teacher_weight(base_model).to(dtype)
            teacher = (lambda head: read_out(final.target_states(head), weight), weight, base_model.output_cap)
        seen, inputs = None, [*features, *readouts]
        if text and speculator.copies:
            follows = text.recent.tokens(0)
            seen = speculator.draft_targets(follows.clamp(min=0)).where(follows >= 0, -1), text
            queries, gates = zip(*pointers)
            inputs += [*queries, *gates, text.kept]
        total, losses = SoftTargetLoss.apply(targets, *teacher, scales, weights, arithmetic, seen, *inputs)
        if weights.smooth_l1:
            distances = [speculator.state_distance(x, final.target_states(head)).sum() for head, x in enumerate(features)]
            weighted = weights.smooth_l1 * scales * torch.stack(distances)
            total, losses = total + weighted.sum(), losses + weighted.detach()
    return total, F.pad(losses, (0, len(weights.heads) - run))
