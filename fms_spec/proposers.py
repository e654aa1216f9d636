"""Who proposes candidates: a speculator's heads, in chains and trees; see `lookup` for what the text itself proposes.

Shapes: b sequences, n candidates, w nodes of a tree's level, d base width, r draft vocabulary, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fms_spec.candidates import Candidates, Tree
from fms_spec.context import Context
from fms_spec.mixture import LEAST
from fms_spec.sampling import Sampling, best_token, draw
from fms_spec.speculators.interface import Speculator, State


@dataclass(frozen=True)
class Step:
    """What a proposer may look at.

    hidden: [b, d], the base model's states that chose `tokens`. tokens: int64 [b], each sequence's newest token. texts: b lists of ints,
    prompt and new tokens up to the newest, not to be changed. sampling: how the base model's tokens are chosen. chance: float64 [b, n],
    a number for each candidate that is drawn; None where decoding is greedy. context: what the speculator keeps of the texts, None for
    those that keep nothing.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    texts: list[list[int]]
    sampling: Sampling = Sampling()
    chance: torch.Tensor | None = None
    context: Context | None = None


class Proposer(Protocol):
    """Whatever has these. lookahead: deepest level of its trees. nodes: most candidates of one."""

    lookahead: int
    nodes: int

    @property
    def speculator(self) -> Speculator | None:
        """Whose context is given in each `Step`, if it keeps one."""

    def propose(self, step: Step) -> Candidates | None:
        """None where no sequence has a candidate."""


class TopKProposer:
    """A tree in which every candidate of level i has top_k_per_head[i] children; ones make a chain. One batched step of the heads a level.

    Greedy decoding gets each head's best tokens. Under sampling the children are drawn from the head's own distribution, changed by
    temperature, top-k and top-p as the base model's is, without replacement.

    With `min_probability` a sequence's chain ends after the first candidate that the heads believe to be reached and right with less. It
    hangs on what was drafted before alone, so that rejection stays exact, and on the sequence's own candidates, whatever the batch.

    Args:
        speculator: attached. top_k_per_head: ints; `DraftShape` makes one that has been checked. min_probability: above 0 for chains only.
    """

    def __init__(self, speculator: Speculator, top_k_per_head: Sequence[int], min_probability: float = 0.0):
        self.widths, self.min_probability = list(top_k_per_head), min_probability
        self.speculator, self.lookahead = speculator, len(self.widths)
        device = next(speculator.buffers(), next(speculator.parameters())).device
        depths = range(1, self.lookahead + 1) if min_probability else [self.lookahead]
        self.trees = {depth: Tree.full(self.widths[:depth], device) for depth in depths}
        self.nodes = self.trees[self.lookahead].nodes - 1

    def propose(self, step: Step) -> Candidates:
        speculator, batch = self.speculator, len(step.tokens)
        state, tokens, levels, drafts = started(speculator, step), step.tokens, [], []
        seen = () if step.context is None else (step.context,)
        numbers = None if step.chance is None else step.chance.split(level_sizes(self.widths), dim=1)
        joint = torch.ones(batch, 1, device=tokens.device)
        for head, width in enumerate(self.widths):
            state = speculator.advance(state, tokens, head, *seen)
            if numbers is None:
                scores = speculator.scores(state, head, step.context)
                picked = best_token(scores)[:, None] if width == 1 else scores.topk(width, dim=-1).indices
            else:
                drafts.append(step.sampling.probabilities(speculator.logits(state, head, step.context)))
                picked = draw_children(drafts[-1], numbers[head].reshape(-1, width))
            children = speculator.to_tokens(picked)
            levels.append(children.reshape(batch, -1))
            if self.min_probability:
                levels[-1] = levels[-1].where(joint >= self.min_probability, -1)
                joint *= drafts[-1].gather(1, picked) if drafts else speculator.probability(scores, picked, step.context)
                if not (joint >= self.min_probability).any():
                    break
            if head + 1 < len(self.widths):
                tokens = children.flatten().clamp(min=0)
                if width > 1:
                    state = select(state, torch.arange(len(picked), device=tokens.device).repeat_interleave(width))
        draft_probs = None
        if drafts:
            draft_probs = speculator.over_vocabulary(torch.cat([level.view(batch, -1, level.shape[-1]) for level in drafts], dim=1))
        return Candidates(torch.cat(levels, dim=1), self.trees[len(levels)], draft_probs)


class BestNodesProposer:
    """The `nodes` candidates with the highest joint probability under the heads, a tree of another shape at every step.

    Level i keeps at most nodes - i candidates: one that deep has i ancestors, each at least as likely, so no other can be among the best.
    By the same count the last of them has no child among the best, and the heads don't go on from it. The candidates are picked, not drawn,
    also under sampling: which ones there are depends on all of their probabilities.

    Args:
        speculator: attached. nodes: candidates. lookahead: levels; `DraftShape` makes one that has been checked.
    """

    def __init__(self, speculator: Speculator, nodes: int, lookahead: int):
        self.speculator, self.nodes, self.lookahead = speculator, nodes, lookahead

    def propose(self, step: Step) -> Candidates:
        scores, tokens, parents = (torch.cat(levels, dim=1) for levels in self.levels(step))
        return best_nodes(scores, tokens, parents, self.nodes)

    def levels(self, step: Step) -> tuple[list[torch.Tensor], ...]:
        """What the best are picked from, level by level, each [b, w]: joint log-probability fp32, token, and parent, counted from 1 over
        all levels with the root as 0."""
        speculator, batch = self.speculator, len(step.tokens)
        device = step.tokens.device
        state, tokens = started(speculator, step), step.tokens
        seen = () if step.context is None else (step.context,)
        joint = torch.zeros(batch, 1, device=device)  # [b, w] of the nodes that the heads go on from
        ids, first, all_joint, all_tokens, all_parents = torch.zeros(batch, 1, dtype=torch.int64, device=device), 0, [], [], []
        for head in range(self.lookahead):
            state = speculator.advance(state, tokens.flatten(), head, *seen)
            scores = speculator.scores(state, head, step.context)
            keep = min(self.nodes - head, scores.shape[-1])
            picked = scores.topk(keep, dim=-1).indices  # [b * w, keep]
            best = speculator.probability(scores, picked, step.context).clamp(min=LEAST).log()
            joint = (joint[:, :, None] + best.view(batch, -1, keep)).flatten(1)
            joint, flat = joint.topk(min(self.nodes - head, joint.shape[1]), dim=-1)  # [b, w'], best first
            parent = flat // keep  # within the level before
            tokens = speculator.to_tokens(picked.view(batch, -1).gather(1, flat))
            all_joint.append(joint)
            all_tokens.append(tokens)
            all_parents.append(ids.gather(1, parent))
            if head + 1 < self.lookahead:
                ids = first + 1 + torch.arange(joint.shape[1], device=device).expand(batch, -1)
                first += joint.shape[1]
                parent = torch.arange(batch, device=device)[:, None] * (len(scores) // batch) + parent
                parent, ids, joint, tokens = (part[:, : self.nodes - head - 1] for part in (parent, ids, joint, tokens))
                state = select(state, parent.flatten())
        return all_joint, all_tokens, all_parents


def started(speculator: Speculator, step: Step) -> Any:
    """The running state of a step."""
    return speculator.start(step.hidden) if step.context is None else speculator.start(step.hidden, step.context.before)


def select(state: State, index: torch.Tensor) -> State:
    """Positions `index` int64 [m'] of a running state: a tensor, or a tuple of tensors and None."""
    if isinstance(state, tuple):
        return tuple(None if part is None else part[index] for part in state)
    return state[index]


def best_nodes(scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, count: int) -> Candidates:
    """`Candidates` of the `count` best of m nodes, parents before children: all [b, m], parents counted from 1 with the root as 0."""
    # A child's score never exceeds its parent's; stable, so that the parent comes first where they are equal.
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values
    new_ids = torch.zeros(len(order), scores.shape[1] + 1, dtype=torch.int64, device=order.device)
    new_ids.scatter_(1, order + 1, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order))
    root = torch.zeros_like(order[:, :1])
    return Candidates(tokens.gather(1, order), Tree(torch.cat([root, new_ids.gather(1, parents.gather(1, order))], dim=1)))


def level_sizes(widths: Sequence[int]) -> list[int]:
    """Candidates of each level of a full tree."""
    return [math.prod(widths[: level + 1]) for level in range(len(widths))]


def draw_children(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens drawn one after the other without replacement: fp32 [m, r], float64 [m, k] -> int64 [m, k], -1 where none is left."""
    left, drawn = probabilities, []
    for column in numbers.unbind(1):
        token = draw(left, column)
        drawn.append(token.where(left.sum(-1) > 0, -1))
        left = left.scatter(1, token[:, None], 0.0)
    return torch.stack(drawn, dim=1)
