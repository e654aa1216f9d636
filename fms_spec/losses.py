"""Losses of attached heads; the memory of logits is bounded by a chunk, never [heads x tokens x vocabulary].

Shapes: m positions, k feature width, r draft vocabulary, d base width.

Per head, with student distribution q = softmax(features @ weight.T) and the base model's p, restricted to the draft vocabulary:
    cross-entropy  -log q[token]            on the token of the text; tokens outside the draft vocabulary give none
    distillation   KL(p || q)               towards the base model's distribution for the same position
    acceptance     -log sum_v min(p, q)     of the rate at which drafts drawn from q are accepted by p (LK loss, arXiv 2602.23881)
    smooth L1      on predicted hidden states, for families that predict them
The phase's loss is the sum over heads of weight_i times the mean over that head's valid positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fms_spec.alignment import Windows
from fms_spec.base_model import BaseModel
from fms_spec.batch import upload
from fms_spec.mixture import Copying
from fms_spec.read_out import capped, read_out

# Positions whose logits exist at once: 512 x 128k in fp32 is 0.26 GB, and matrix products of 512 rows already run at full rate.
CHUNK = 512
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


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype in which heads and losses are computed on base-model states of this device and dtype: the one place that chooses.

    bf16 is slower than fp32 on CPUs without AMX, and its rounding gains nothing there; elsewhere it is left as it is. The products of a
    512-position chunk with 49,152 tokens ran at 132 to 138 GFLOP/s in bf16 and 235 to 258 in fp32 on two such cores. The rule asks what
    the CPU is rather than a clock, so that a resumed run computes as it began. `scripts.benchmark train_step` (the lines named "loss")
    compares it with torch's `F.linear_cross_entropy`, which is slower here and returns its loss in bf16, and with the plain way.
    """
    slow = states.device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.float32 if slow else states.dtype


def chunk_loss(
    log_q: torch.Tensor, log_p: torch.Tensor | None, spare: torch.Tensor | None, targets: torch.Tensor, weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, distillation and acceptance of a chunk, summed: (fp32 scalar, row_scale fp32 [m, 1]).

    Their gradient by the logits is row_scale times what `log_q` becomes. With weights a, b, c and acceptance rate A = sum_v min(p, q):
        (a + b) q - a onehot - b p + (c / A) (q sum_{v: q < p} q_v - q [q < p])
    so one softmax serves all three, and everything is done in place: on a CPU each pass over [512, 49152] costs a tenth of a product.
    Where q's factor is a row's own, it is left to be applied to what is smaller.

    Args:
        log_q, log_p, spare: fp32 [m, r], all overwritten; log_p and spare are None where no loss asks for p.
        targets: int64 [m], -1 where there is none.
    """
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
        grad.scatter_add_(1, index, -known / row_scale.clamp(min=TINY))
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
        teacher_cap: float | None, scales: torch.Tensor, weights: LossWeights, dtype: torch.dtype, seen: Any, *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Returns (the heads' sum, fp32 scalar, to be trained on; each head's, fp32 [h], without gradient).

        Args:
            targets: one int64 [m] a head (-1: none). teacher_of, teacher_weight, teacher_cap: teacher_of(head) [m, d], [r, d] and the
            `BaseModel.output_cap`, of which the base model's logits are made; all None where no loss asks for them. scales: fp32 [h],
            what a head's loss is multiplied by. weights: `LossWeights`. dtype: of the matrix products. seen: (entries, text) of
            `mixture.Copying` where heads have a pointer, otherwise None. inputs: each head's features [m, k], then its read-out [r, k];
            with a pointer each head's query and gate, then the keys.
        """
        heads = len(targets)
        features, readouts, queries, gates = (inputs[part * heads : (part + 1) * heads] for part in range(4))
        ctx.dtypes, trained = [value.dtype for value in inputs], ctx.needs_input_grad[-len(inputs) :][heads : 2 * heads]
        shared = {id(weight): weight.to(dtype) for weight in readouts}
        grads = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight, train in zip(readouts, trained) if train}
        size = (min(CHUNK, len(features[0])), len(readouts[0]))
        wanted = [True, teacher_of is not None, teacher_of is not None or bool(seen), bool(seen)]
        buffers = [features[0].new_empty(size, dtype=torch.float32) if want else None for want in wanted]
        losses, grad_features, copying = [], [], []
        if seen:
            keys = inputs[-1].to(dtype)
            grad_keys = torch.zeros_like(keys, dtype=torch.float32)
            copying = [Copying(query.to(dtype), gate, keys, grad_keys, *seen) for query, gate in zip(queries, gates)]
        for head, (x, weight) in enumerate(zip(features, readouts)):
            teacher = None if teacher_of is None else teacher_of(head).to(dtype)
            loss, grad = one_head(
                x.to(dtype), shared[id(weight)], grads.get(id(weight)), targets[head], teacher, teacher_weight,
                teacher_cap, scales[head], weights, buffers, copying[head] if seen else None,
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
    buffers: Sequence[torch.Tensor | None], copying: Copying | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss of a head, times `scale`, chunk by chunk: (fp32 scalar, gradient by its features [m, k]); `grad_weight`, if any, is added to.

    buffers: fp32 [CHUNK, r] for the logits, the teacher's, and two more, None where they aren't needed. copying: takes the gradients of a
    pointer.
    """
    total = torch.zeros((), dtype=torch.float32, device=features.device)
    grad_features = torch.empty_like(features)
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        x = features[rows]
        room: list[Any] = [None if buffer is None else buffer[: len(x)] for buffer in buffers]
        logits, teacher_logits, spare, _ = room
        log_softmax_of(x, weight, logits)
        if teacher is not None and teacher_weight is not None:
            log_softmax_of(teacher[rows], teacher_weight, teacher_logits, teacher_cap)
        if copying:
            loss, row_scale = copying.chunk_loss(rows, room, targets[rows], weights, scale)
        else:
            loss, row_scale = chunk_loss(logits, teacher_logits, spare, targets[rows], weights)
        total += loss
        grad, row_scale = logits.to(weight.dtype), scale * row_scale
        torch.mm(grad, weight, out=grad_features[rows]).mul_(row_scale)
        if grad_weight is not None:
            add_product(grad_weight, grad.T, (x * row_scale).to(x.dtype))
    return total * scale, grad_features


def log_softmax_of(features: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cap: float | None = None) -> None:
    """log_softmax(features @ weight.T), fp32, into `out` [m, r]; the logits soft-capped first, where there is a cap."""
    torch.mm(features, weight.T, out=out) if features.dtype == out.dtype else out.copy_(features @ weight.T)
    torch.log_softmax(capped(out, cap), -1, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; total is fp32."""
    total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def head_losses(
    speculator: Any, windows: Windows, base_model: BaseModel, weights: LossWeights, counts: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the weighted loss, fp32 scalar, to be trained on; each head's part of it, fp32 [h], without gradient).

    Heads that share their weights with earlier ones, and have no weight in the loss, are not run: their part is 0.

    Args:
        speculator: a `Speculator`. windows: `alignment.Windows`. weights: `LossWeights`. counts: positions of each head over the whole
        step, fp32 [h] on the device, so that micro-batches, of all processes, add up to exactly the mean over the step. dtype: of the
        arithmetic; what `compute_dtype` chooses by default.
    """
    device, dtype = windows.states.device, dtype or compute_dtype(windows.states)
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
        total, losses = SoftTargetLoss.apply(targets, *teacher, scales, weights, dtype, seen, *inputs)
        if weights.smooth_l1:
            distances = [speculator.state_distance(x, final.target_states(head)).sum() for head, x in enumerate(features)]
            weighted = weights.smooth_l1 * scales * torch.stack(distances)
            total, losses = total + weighted.sum(), losses + weighted.detach()
    return total, F.pad(losses, (0, len(weights.heads) - run))
