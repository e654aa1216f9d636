"""Acceptance, defined once, as vLLM counts it; and what decoding would accept, computed without decoding.

A step drafts candidates, accepts a of them and emits a + 1. Acceptance length = 1 + sum(a) / steps, pooled over all steps of all prompts.
Acceptance at position i (from 1) = the share of steps that accepted at least i candidates.

Shapes: s tokens of a text, d base width, m positions.
"""

from collections.abc import Iterable, Iterator, Sequence
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
def judged(
    proposer: Proposer, states: torch.Tensor, tokens: torch.Tensor, prompt_length: int, new_tokens: int
) -> tuple[list[int], list[int]]:
    """What greedy decoding of this text would have accepted, and of how many candidates, had a step begun at each of its positions.

    Args:
        proposer: see `proposers`. states: [s, d], the base model's, of the whole text. tokens: int64 [s], a prompt and what the base model
        said greedily after it: new_tokens that decoding would have emitted, and the `proposer.lookahead` tokens it would have said next.
        Where those are missing, candidates past the end of the text count as wrong.

    Returns:
        (accepted, candidates), two lists of new_tokens - 1 ints: the first new token comes from reading the prompt.
    """
    accepted: list[int] = []
    drafted: list[int] = []
    for roots, step in steps_at(proposer, states, tokens, prompt_length, new_tokens):
        candidates = proposer.propose(step)
        if candidates is None:
            accepted += [0] * len(roots)
            drafted += [0] * len(roots)
            continue
        # What the base model says after a node on the text's own path, as deep as it is; other nodes' parents are wrong already.
        positions = roots[:, None] + 1 + candidates.tree.depths
        accepted += (match(candidates, said_at(tokens, positions)).accepted.sum(-1) - 1).tolist()
        drafted += (candidates.tokens >= 0).sum(-1).tolist()
    return accepted, drafted


def steps_at(
    proposer: Proposer, states: torch.Tensor, tokens: torch.Tensor, prompt_length: int, new_tokens: int
) -> Iterator[tuple[torch.Tensor, Step]]:
    """(positions int64 [m] of newest tokens, the `Step` of them as a batch) over a text as for `judged`, `ROOTS` at a time."""
    line = tokens.tolist()
    for roots in torch.arange(prompt_length, prompt_length + new_tokens - 1, device=tokens.device).split(ROOTS):
        if len(roots):
            texts = [line[: root + 1] for root in roots.tolist()]
            context = of_text(proposer.speculator, states, tokens, roots)
            yield roots, Step(states[roots - 1], tokens[roots], texts, context=context)


def said_at(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A text's tokens int64 [s] at positions, -2 past its end: int64, the shape of positions."""
    return tokens[positions.clamp(max=len(tokens) - 1)].masked_fill(positions >= len(tokens), -2)


def walked(accepted: Sequence[int], drafted: Sequence[int]) -> list[int]:
    """At which of the positions of `judged` decoding would have begun a step with candidates: each begins where the one before ended."""
    steps, index = [], 0
    while index < len(accepted):
        if drafted[index]:
            steps.append(index)
        index += 1 + accepted[index]
    return steps


def accepted_in_text(proposer: Proposer, states: torch.Tensor, tokens: torch.Tensor, prompt_length: int, new_tokens: int) -> list[int]:
    """What decoding would have accepted in each of its steps that had candidates, arguments as for `judged`.

    Equal to `Continuation.accepted` up to rounding of the states.
    """
    accepted, drafted = judged(proposer, states, tokens, prompt_length, new_tokens)
    return [accepted[index] for index in walked(accepted, drafted)]
