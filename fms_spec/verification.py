"""Which candidates the base model accepts, and the token it adds itself. Every rule is exact: the text is the base model's own.

Shapes: b sequences, n candidates, v vocabulary, t either b or 1.
"""

from dataclasses import dataclass

import torch

from fms_spec.candidates import Candidates
from fms_spec.sampling import draw


@dataclass
class Verdict:
    """accepted: bool [b, n + 1], the root and the accepted path below it. last: int64 [b], its deepest node. newest: int64 [b], the bonus
    token: what the base model says after that node."""

    accepted: torch.Tensor
    last: torch.Tensor
    newest: torch.Tensor


def match(candidates: Candidates, chosen: torch.Tensor) -> Verdict:
    """Accept a candidate where it is what the base model chose after its parent.

    With the base model's choices drawn independently of the candidates this is exact for greedy choice and for sampling. For picked
    candidates it is also the rule of `reject`: their draft distribution is a single point.

    Args:
        chosen: int64 [b, n + 1], what the base model chooses after each node.
    """
    tree = candidates.tree
    parents = tree.parents[:, 1:].expand(len(chosen), -1)
    right = torch.ones_like(chosen, dtype=torch.bool)
    right[:, 1:] = candidates.tokens == chosen.gather(1, parents)
    accepted = (right[:, None, :] | ~tree.ancestors).all(-1)
    # Parents stand before children, so the deepest accepted node is the last accepted one.
    last = (accepted * torch.arange(tree.nodes, device=chosen.device)).argmax(-1)
    return Verdict(accepted, last, chosen.gather(1, last[:, None]).squeeze(1))


def reject(candidates: Candidates, target_probs: torch.Tensor, tests: torch.Tensor, bonus: torch.Tensor) -> Verdict:
    """Multi-round rejection for drawn candidates (arXiv 2305.09781; children drawn without replacement as in 2402.14160).

    At a node with target p and draft distribution q, the children x are tried in the order they were drawn: x is accepted with
    probability min(1, p(x) / q(x)); otherwise p becomes max(p - q, 0) and q loses x, both scaled to sum to 1. Where no child is left,
    the bonus token is drawn from what p has become. So the token after each node is distributed as the base model's p.

    Args:
        candidates: with draft_probs and a tree that all sequences share. target_probs: fp32 [b, n + 1, v]. tests: float64 [b, n], one
        number for each candidate. bonus: float64 [b, n + 1], the number that draws the bonus after each node.
    """
    assert candidates.draft_probs is not None
    tree, batch = candidates.tree, len(target_probs)
    rows = torch.arange(batch, device=target_probs.device)
    accepted = torch.zeros(batch, tree.nodes, dtype=torch.bool, device=target_probs.device)
    accepted[:, 0] = True
    node = torch.zeros_like(rows)
    going = accepted[:, 0].clone()
    final = target_probs[:, 0]
    for _ in range(tree.depth):
        target, draft = target_probs[rows, node], candidates.draft_probs[rows, node].float()
        moved, parent = torch.zeros_like(going), node
        for child in tree.children[parent].unbind(1):
            token = candidates.tokens[rows, (child - 1).clamp(min=0)]
            tried = going & ~moved & (child > 0) & (token >= 0)
            token = token.clamp(min=0)
            wins = tests[rows, (child - 1).clamp(min=0)] * draft[rows, token] < target[rows, token]
            moved = moved | (tried & wins)
            node = torch.where(tried & wins, child, node)
            lost = (tried & ~wins)[:, None]
            target = torch.where(lost, scaled((target - draft).clamp(min=0), target), target)
            draft = torch.where(lost, scaled(draft.scatter(1, token[:, None], 0.0), draft), draft)
        accepted[rows, node] = True
        final = torch.where(going[:, None], torch.where(moved[:, None], target_probs[rows, node], target), final)
        going = moved
    newest = draw(final, bonus[rows, node])
    return Verdict(accepted, node, newest)


def scaled(weights: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Rows of `weights` [b, v] scaled to sum to 1; rows without any weight, which only rounding can bring, become `otherwise`."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, otherwise)
