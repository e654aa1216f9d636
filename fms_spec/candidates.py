"""Candidate trees: what a proposer hands over, and what each candidate may see.

Shapes: b sequences, n candidates (nodes beside the root), v vocabulary, t either b or 1 where all sequences share one tree.

The root, node 0, is the last token that was chosen and not yet run through the base model. Nodes 1 ... n are candidates; a node's parent
stands before it, and the children of one node differ, so common prefixes are merged and a tree costs one token per node.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F


class Tree:
    """parents: int64 [t, n + 1], parents[:, 0] = 0.

    ancestors: bool [t, n + 1, n + 1], whether node i sees node j: itself and all on its way from the root. depths: int64 [t, n + 1],
    0 for the root.
    """

    def __init__(self, parents: torch.Tensor):
        self.parents = parents
        nodes = parents.shape[1]
        reach = F.one_hot(parents, nodes).float() + torch.eye(nodes, device=parents.device)
        seen = 1
        while seen < nodes - 1:  # each squaring doubles how many generations are seen
            reach, seen = (reach @ reach).clamp_(max=1), 2 * seen
        self.ancestors = reach > 0
        self.depths = self.ancestors.sum(-1) - 1

    @property
    def nodes(self) -> int:
        """n + 1."""
        return self.parents.shape[1]

    @classmethod
    def full(cls, widths: Sequence[int], device: torch.device | None = None) -> "Tree":
        """One tree for all: every node of level i has widths[i] children. Ones make a chain, an empty list the root alone."""
        parents, level = [0], range(1)
        for width in widths:
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = range(first, len(parents))
        return cls(torch.tensor([parents], device=device))

    @cached_property
    def depth(self) -> int:
        """Levels below the root, an int. Waits for the device, once a tree."""
        return int(self.depths.max())

    @cached_property
    def children(self) -> torch.Tensor:
        """Children of each node in order, 0 where there are no more, for a tree that all sequences share: int64 [n + 1, most children]."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        for node, parent in enumerate(self.parents[0].tolist()[1:], start=1):
            children[parent].append(node)
        width = max(len(nodes) for nodes in children)
        return torch.tensor([nodes + [0] * (width - len(nodes)) for nodes in children], device=self.parents.device)


@dataclass
class Candidates:
    """tokens: int64 [b, n], -1 where a sequence has no candidate at that node; what stands below it is never accepted. tree: `Tree`.

    draft_probs: None where candidates were picked, whatever way; fp32 [b, nodes with children, v] where a node's children were drawn, one
    after the other and without replacement, from row `node` of it; nodes with children then stand before those without. Only then does a
    candidate's chance of being accepted depend on it.
    """

    tokens: torch.Tensor
    tree: Tree
    draft_probs: torch.Tensor | None = None
