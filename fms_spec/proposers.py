"""Who proposes candidates: a speculator's heads in three shapes of tree, or the text itself.

Shapes: b sequences, n candidates, w nodes of a tree's level, d base width, r draft vocabulary, v vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy
import torch
from torch.nn import functional as F

from fms_spec.candidates import Candidates, Tree
from fms_spec.context import Context
from fms_spec.errors import UserError
from fms_spec.sampling import Sampling, best_token, draw
from fms_spec.speculators.interface import Speculator, select

MOST_NODES = 1024  # of a tree: who sees whom is a matrix of their square, worked out anew for each step


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

    Args:
        speculator: attached. top_k_per_head: ints; `DraftShape` makes one that has been checked.
    """

    def __init__(self, speculator: Speculator, top_k_per_head: Sequence[int]):
        self.widths = list(top_k_per_head)
        self.speculator, self.lookahead = speculator, len(self.widths)
        self.tree = Tree.full(self.widths, next(speculator.buffers(), next(speculator.parameters())).device)
        self.nodes = self.tree.nodes - 1

    def propose(self, step: Step) -> Candidates:
        speculator, batch = self.speculator, len(step.tokens)
        state, tokens, levels, drafts = started(speculator, step), step.tokens, [], []
        seen = () if step.context is None else (step.context,)
        numbers = None if step.chance is None else step.chance.split(level_sizes(self.widths), dim=1)
        for head, width in enumerate(self.widths):
            state = speculator.advance(state, tokens, head, *seen)
            logits = speculator.logits(state, head, step.context)
            if numbers is None:
                picked = best_token(logits)[:, None] if width == 1 else logits.topk(width, dim=-1).indices
            else:
                drafts.append(step.sampling.probabilities(logits))
                picked = draw_children(drafts[-1], numbers[head].reshape(-1, width))
            children = speculator.to_tokens(picked)
            levels.append(children.reshape(batch, -1))
            if head + 1 < len(self.widths):
                tokens = children.flatten().clamp(min=0)
                if width > 1:
                    state = select(state, torch.arange(len(picked), device=tokens.device).repeat_interleave(width))
        draft_probs = None
        if drafts:
            draft_probs = speculator.over_vocabulary(torch.cat([level.view(batch, -1, level.shape[-1]) for level in drafts], dim=1))
        return Candidates(torch.cat(levels, dim=1), self.tree, draft_probs)


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
        speculator, batch = self.speculator, len(step.tokens)
        device = step.tokens.device
        state, tokens = started(speculator, step), step.tokens
        seen = () if step.context is None else (step.context,)
        scores = torch.zeros(batch, 1, device=device)  # [b, w] joint log-probability of the nodes that the heads go on from
        ids, first, all_scores, all_tokens, all_parents = torch.zeros(batch, 1, dtype=torch.int64, device=device), 0, [], [], []
        for head in range(self.lookahead):
            state = speculator.advance(state, tokens.flatten(), head, *seen)
            logits = speculator.logits(state, head, step.context).float()
            keep = min(self.nodes - head, logits.shape[-1])
            best, picked = logits.log_softmax(-1).topk(keep, dim=-1)  # [b * w, keep]
            joint = (scores[:, :, None] + best.view(batch, -1, keep)).flatten(1)
            scores, flat = joint.topk(min(self.nodes - head, joint.shape[1]), dim=-1)  # [b, w'], best first
            parent = flat // keep  # within the level before
            tokens = speculator.to_tokens(picked.view(batch, -1).gather(1, flat))
            all_scores.append(scores)
            all_tokens.append(tokens)
            all_parents.append(ids.gather(1, parent))
            if head + 1 < self.lookahead:
                ids = first + 1 + torch.arange(scores.shape[1], device=device).expand(batch, -1)
                first += scores.shape[1]
                parent = torch.arange(batch, device=device)[:, None] * (len(logits) // batch) + parent
                parent, ids, scores, tokens = (part[:, : self.nodes - head - 1] for part in (parent, ids, scores, tokens))
                state = select(state, parent.flatten())
        scores, tokens, parents = (torch.cat(levels, dim=1) for levels in (all_scores, all_tokens, all_parents))
        return best_nodes(scores, tokens, parents, self.nodes)


def started(speculator: Speculator, step: Step) -> Any:
    """The running state of a step."""
    return speculator.start(step.hidden) if step.context is None else speculator.start(step.hidden, step.context.before)


def best_nodes(scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, count: int) -> Candidates:
    """`Candidates` of the `count` best of m nodes, parents before children: all [b, m], parents counted from 1 with the root as 0."""
    # A child's score never exceeds its parent's; stable, so that the parent comes first where they are equal.
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values
    new_ids = torch.zeros(len(order), scores.shape[1] + 1, dtype=torch.int64, device=order.device)
    new_ids.scatter_(1, order + 1, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order))
    root = torch.zeros_like(order[:, :1])
    return Candidates(tokens.gather(1, order), Tree(torch.cat([root, new_ids.gather(1, parents.gather(1, order))], dim=1)))


class PromptLookup:
    """What followed the latest earlier place where the text had the same last tokens: a chain of `lookahead`, no model at all.

    The longest of `LONGEST` to `shortest` equal tokens decides, as in the public prompt-lookup decoding, where it is 1.
    """

    LONGEST, speculator = 3, None

    def __init__(self, lookahead: int, shortest: int = 1):
        """Raises UserError for a lookahead under 1."""
        if lookahead < 1:
            raise UserError(f"lookahead {lookahead}: must be at least 1")
        self.lookahead = self.nodes = lookahead
        self.shortest = shortest

    def propose(self, step: Step) -> Candidates | None:
        drafts = [self.look_up(numpy.array(text)) for text in step.texts]
        longest = max(len(line) for line in drafts)
        if not longest:
            return None
        device = step.tokens.device
        padded = torch.tensor([[*line, *[-1] * (longest - len(line))] for line in drafts], device=device)
        return Candidates(padded, Tree.full([1] * longest, device))

    def look_up(self, text: numpy.ndarray) -> list[int]:
        """Up to `lookahead` tokens that followed, as a list."""
        for size in range(min(self.LONGEST, len(text) - 1), self.shortest - 1, -1):
            # A match must end before the text does, so that something follows it.
            same = (numpy.lib.stride_tricks.sliding_window_view(text[:-1], size) == text[-size:]).all(-1)
            if same.any():
                start = int(same.nonzero()[0][-1]) + size
                return text[start : start + self.lookahead].tolist()
        return []


class LookupFirst:
    """What followed the last two or more tokens where they stood before, otherwise a speculator's chain: what heads that copy must beat."""

    def __init__(self, speculator: Speculator, lookahead: int):
        """lookahead: of the lookup; the chain is as long as the speculator was trained for, at most so long."""
        self.lookup = PromptLookup(lookahead, shortest=2)
        self.heads = TopKProposer(speculator, [1] * min(lookahead, speculator.n_predict))
        self.speculator, self.lookahead, self.nodes = speculator, lookahead, lookahead

    def propose(self, step: Step) -> Candidates:
        copied = self.lookup.propose(step)
        drafted = self.heads.propose(replace(step, sampling=Sampling(), chance=None)).tokens
        if copied is None:
            return Candidates(drafted, self.heads.tree)
        width = max(drafted.shape[1], copied.tokens.shape[1])
        copies, drafted = (F.pad(tokens, (0, width - tokens.shape[1]), value=-1) for tokens in (copied.tokens, drafted))
        return Candidates(copies.where(copies[:, :1] >= 0, drafted), Tree.full([1] * width, copies.device))


@dataclass(frozen=True)
class DraftShape:
    """Which tree a speculator drafts: a chain of `lookahead`, the tree of `top_k_per_head`, or the best `nodes` up to `lookahead` deep.

    Everything left out is as deep as the speculator was trained for.
    """

    lookahead: int | None = None
    top_k_per_head: tuple[int, ...] | None = None
    nodes: int | None = None

    def check(self, n_predict: int) -> tuple[tuple[int, ...] | None, int | None, int]:
        """(children of each level or None, nodes, lookahead) for a speculator of `n_predict` heads.

        Raises:
            UserError: deeper than the heads, a level without candidates, over MOST_NODES, or shapes that exclude each other.
        """
        widths = self.top_k_per_head
        if widths is not None and (self.nodes is not None or self.lookahead is not None):
            raise UserError("top_k_per_head says how deep and wide the tree is: give it without lookahead and nodes")
        lookahead = len(widths) if widths is not None else n_predict if self.lookahead is None else self.lookahead
        if not 1 <= lookahead <= n_predict:
            raise UserError(f"lookahead {lookahead}: this speculator was trained for 1 to {n_predict}")
        if widths is not None and min(widths) < 1:
            raise UserError(f"top_k_per_head {','.join(map(str, widths))}: every level needs at least 1")
        if self.nodes is not None and self.nodes < lookahead:
            raise UserError(f"nodes {self.nodes}: must be at least the lookahead, {lookahead}")
        nodes = self.nodes or sum(level_sizes(widths or ()))
        if nodes > MOST_NODES:
            raise UserError(f"a tree of {nodes:,} candidates: at most {MOST_NODES:,}; lower nodes or top_k_per_head")
        return widths or (None if self.nodes else (1,) * lookahead), self.nodes, lookahead

    def proposer(self, speculator: Speculator) -> Proposer:
        """The proposer of this shape; raises UserError as `check`, and for a level wider than the draft vocabulary."""
        widths, nodes, lookahead = self.check(speculator.n_predict)
        size = speculator.vocab_size if speculator.draft_ids is None else len(speculator.draft_ids)
        if widths and max(widths) > size:
            raise UserError(f"top_k_per_head {','.join(map(str, widths))}: this speculator's heads know {size} tokens")
        if widths:
            return TopKProposer(speculator, widths)
        assert nodes is not None
        return BestNodesProposer(speculator, nodes, lookahead)


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
