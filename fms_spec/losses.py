"""Losses of attached heads; the memory of logits is bounded by a chunk, never [heads x tokens x vocabulary].

Shapes: m positions, k feature width, r draft vocabulary, d base width.

Per head, with student distribution q = softmax(features @ weight.T) and the base model's p, restricted to the draft vocabulary:
    cross-entropy  -log q[token]        on the token of the text; tokens outside the draft vocabulary give none
    distillation   KL(p || q)           towards the base model's distribution for the same place
    smooth L1      on predicted hidden states, for families that predict them
The phase's loss is the sum over heads of weight_i times the mean over that head's valid positions.
"""

from dataclasses import dataclass

import torch

# Positions whose logits exist at once: 512 x 128k in fp32 is 0.26 GB, and matrix products of 512 rows already run at full rate.
CHUNK = 512


@dataclass(frozen=True)
class LossWeights:
    """Weights of a phase: of the three losses, and of each head (a tuple of n_predict)."""

    cross_entropy: float
    distillation: float
    smooth_l1: float
    heads: tuple


class SoftTargetLoss(torch.autograd.Function):
    """Sum over positions of cross-entropy and distillation, its gradients worked out while a chunk's logits are at hand.

    The gradient with respect to the logits is (a + b) q - a onehot - b p for weights a and b, so one softmax serves both losses and
    nothing of size [m, r] is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, features, weight, targets, cross_entropy, teacher, teacher_weight, distillation):
        """features [m, k], weight [r, k], targets int64 [m] (-1: none), teacher [m, d], teacher_weight [r, d] -> fp32 scalar."""
        train_weight = ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=features.device)
        grad_features = torch.empty_like(features)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train_weight else None
        compute_weight = weight.to(features.dtype)
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            log_q = (features[rows] @ compute_weight.T).float().log_softmax(-1)
            q, grad = log_q.exp(), torch.zeros_like(log_q)
            if cross_entropy:
                places = targets[rows, None].clamp(min=0)
                known = cross_entropy * (targets[rows, None] >= 0)
                total -= (known * log_q.gather(1, places)).sum()
                grad.addcmul_(known, q).scatter_add_(1, places, -known)
            if distillation:
                log_p = (teacher[rows] @ teacher_weight.T).float().log_softmax(-1)
                p = log_p.exp()
                total += distillation * (p * (log_p - log_q)).sum()
                grad.add_(q.sub_(p), alpha=distillation)
            grad = grad.to(features.dtype)
            grad_features[rows] = grad @ compute_weight
            if train_weight:
                grad_weight += grad.T @ features[rows]
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_features, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_features * grad_total, grad_weight, None, None, None, None, None


def head_losses(speculator, windows, base_model, weights, counts):
    """The weighted loss of each head: fp32 [h]; their sum is what is trained on.

    Args:
        windows: `alignment.Windows`. weights: `LossWeights`. counts: positions of each head over the whole step, fp32 [h] on the device,
        so that micro-batches, of all processes, add up to exactly the mean over the step.
    """
    losses = []
    teacher_weight = speculator.teacher_weight(base_model) if weights.distillation else None
    for head, (features, weight) in enumerate(speculator.heads(windows.hidden, windows.tokens, windows.counts)):
        target_states = windows.target_states(head)
        loss = SoftTargetLoss.apply(
            features, weight, speculator.draft_targets(windows.targets(head)), weights.cross_entropy,
            target_states, teacher_weight, weights.distillation,
        )  # fmt: skip
        if weights.smooth_l1:
            loss = loss + weights.smooth_l1 * speculator.state_distance(features, target_states).sum()
        losses.append(loss * (weights.heads[head] / counts[head].clamp(min=1)))
    return torch.stack(losses)
