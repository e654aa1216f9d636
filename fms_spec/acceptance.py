"""Acceptance, defined once, as vLLM counts it.

A step drafts k tokens, accepts a of them and emits a + 1. Acceptance length = 1 + sum(a) / steps, pooled over all steps of all prompts.
Acceptance at position i (from 1) = the share of steps that accepted at least i tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Acceptance:
    """length: tokens a step, from 1. per_position: k shares. steps: how many drafted."""

    length: float
    per_position: list
    steps: int


def pooled_acceptance(accepted, drafts):
    """`Acceptance` from the number of accepted tokens of every step (any iterable of ints), `drafts` of them drafted a step."""
    accepted = torch.tensor(list(accepted), dtype=torch.int64)
    steps = len(accepted)
    if steps == 0:
        return Acceptance(1.0, [0.0] * drafts, 0)
    shares = [(accepted >= position).double().mean().item() for position in range(1, drafts + 1)]
    return Acceptance(1 + accepted.double().mean().item(), shares, steps)
