"""Acceptance, defined once, as vLLM counts it; and what decoding would accept, computed without decoding.

A step drafts candidates, accepts a of them and emits a + 1. Acceptance length = 1 + sum(a) / steps, pooled over all steps of all prompts.
Acceptance at position i (from 1) = the share of steps that accepted at least i candidates.

Shapes: s tokens of a text, d base width, m positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fms_spec.context import of_text
from fms_spec.proposers import Proposer, Step
from fms_spec.verification import match

ROOTS = 32  # positions judged at once: copying heads say a probability of every token, with 16 parents and 49k tokens 100 MB a buffer


@dataclass(frozen=True)
class Acceptance:
    """length: tokens a step, from 1. per_position: k shares. steps: how many drafted."""

    length: float
    per_position: list[float]
    steps: int


def pooled_acceptance(accepted: Iterable[int], drafts: int) -> Acceptance:
    """`Acceptance` from the number of accepted tokens of every step (any iterable of ints), at most `drafts` a step."""
    counts = torch.tensor(list(accepted), dtype=torch.int64)
    steps = len(counts)
    if steps == 0:
        return Acceptance(1.0, [0.0] * drafts, 0)
    shares = [(counts >= position).double().mean().item() for position in range(1, drafts + 1)]
    return Acceptance(1 + counts.double().mean().item(), shares, steps)


@torch.inference_mode()
def steps_in_text(
    proposer: Proposer, states: torch.Tensor, tokens: torch.Tensor, prompt_length: int, new_tokens: int
) -> list[tuple[int, int]]:
    """What greedy decoding of this text would have accepted at each of its steps, of how many candidates, from the text alone.

    Every position of the text is given to the proposer, as if a step began there; the steps that decoding would have taken are then read
    off, each beginning where the one before ended. Equal to `Continuation.accepted` up to rounding of the states.

    Args:
        proposer: see `proposers`. states: [s, d], the base model's, of the whole text. tokens: int64 [s], a prompt and what the base model
        said greedily after it: new_tokens that decoding would have emitted, and the `proposer.lookahead` tokens it would have said next.
        Where those are missing, candidates past the end of the text count as wrong.

    Returns:
        list of (accepted, candidates), one for each step that had candidates.
    """
    count = new_tokens - 1  # the first new token comes from reading the prompt
    if count < 1:
        return []
    line = tokens.tolist()
    roots = torch.arange(prompt_length, prompt_length + count, device=tokens.device)
    accepted, drafted = [], []
    for some in roots.split(ROOTS):
        texts = [line[: root + 1] for root in some.tolist()]
        context = of_text(proposer.speculator, states, tokens, some)
        candidates = proposer.propose(Step(states[some - 1], tokens[some], texts, context=context))
        if candidates is None:
            return []
        # What the base model says after a node on the text's own path, as deep as it is; other nodes' parents are wrong already.
        positions = some[:, None] + 1 + candidates.tree.depths
        chosen = tokens[positions.clamp(max=len(tokens) - 1)].masked_fill(positions >= len(tokens), -2)
        accepted += (match(candidates, chosen).accepted.sum(-1) - 1).tolist()
        drafted += (candidates.tokens >= 0).sum(-1).tolist()
    steps, index = [], 0
    while index < count:
        if drafted[index]:
            steps.append((accepted[index], drafted[index]))
        index += 1 + accepted[index]
    return steps


def accepted_in_text(proposer: Proposer, states: torch.Tensor, tokens: torch.Tensor, prompt_length: int, new_tokens: int) -> list[int]:
    """The accepted alone, see `steps_in_text`."""
    return [accepted for accepted, _ in steps_in_text(proposer, states, tokens, prompt_length, new_tokens)]
