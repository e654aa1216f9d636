"""Which hidden state meets which tokens: the same alignment for both phases.

Shapes: b rows, n tokens, m positions, d width of the base model's states, h heads.

Head i (from 0) sees h_t and x_{t+1} ... x_{t+1+i}, and predicts x_{t+2+i}; all of them lie in one document, and in phase 2 t starts at
the end of the prompt. A later head's positions are always among an earlier one's.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fms_spec.batch import upload
from fms_spec.context import Text, packed_text


@dataclass(frozen=True)
class Positions:
    """Positions to train on, deepest first, so that head i trains on the first `counts[i]` of them.

    index: int64 [m], into the batch's flattened tokens, on the CPU. counts: list of h ints, never growing.
    """

    index: torch.Tensor
    counts: list[int]


@dataclass(frozen=True)
class Windows:
    """Hidden states and tokens lined up for the heads.

    states: [b * n, d], of every position. index: int64 [m]; see `Positions`. tokens: int64 [m, h + 1], x_{t+1} onwards.
    text: what families see that keep a context; None for others.
    """

    states: torch.Tensor
    index: torch.Tensor
    tokens: torch.Tensor
    counts: list[int]
    text: Text | None = None

    @property
    def hidden(self) -> torch.Tensor:
        """h_t: [m, d]."""
        return self.states[self.index]

    def targets(self, head: int) -> torch.Tensor:
        """Head i's target x_{t+2+i}: int64 [counts[i]]."""
        return self.tokens[: self.counts[head], head + 1]

    def target_states(self, head: int) -> torch.Tensor:
        """h_{t+1+i}, from which the base model itself predicts head i's target: [counts[i], d]."""
        return self.states[self.index[: self.counts[head]] + 1 + head]


def usable_positions(
    segment_ids: torch.Tensor, first_states: torch.Tensor, heads: int, greedy: torch.Tensor | None = None,
    trained: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Where each head has a state and a target: bool [h, b, n].

    Args:
        segment_ids: int [b, n], see `attention.document_spans`. first_states: int64 [b], first position whose state may be used.
        greedy: bool [b, n], whether each token is the base model's own best guess. If given, a later head is used only where the
            tokens drafted before its own would have been accepted: nowhere else is it ever asked in greedy decoding.
        trained: bool [b, n], the tokens that are predicted. If given, x_{t+1} up to a head's target must all be among them: nothing is
            drafted before the base model has begun an answer, or past its end. States are used whether their own token is or not.
    """
    n = segment_ids.shape[1]
    usable = (segment_ids >= 0) & (torch.arange(n) >= first_states[:, None])
    ahead = F.pad(segment_ids, (0, heads + 1), value=-1)
    accepted = F.pad(greedy, (0, heads + 1)) if greedy is not None else None
    predicted = F.pad(trained, (0, heads + 1)) if trained is not None else None
    if predicted is not None:
        usable = usable & predicted[:, 1 : 1 + n]
    masks = []
    for head in range(heads):
        if accepted is not None and head:
            usable = usable & accepted[:, head + 1 : head + 1 + n]
        if predicted is not None:
            usable = usable & predicted[:, head + 2 : head + 2 + n]
        masks.append(usable & (ahead[:, head + 2 : head + 2 + n] == segment_ids))
    return torch.stack(masks)


def choose_positions(usable: torch.Tensor, limit: int | None = None, generator: torch.Generator | None = None) -> Positions:
    """`Positions` from a `usable_positions` mask; at most `limit` of them, drawn evenly."""
    depth = usable.flatten(1).sum(0)  # how many heads have a target there
    index = depth.nonzero()[:, 0]
    if limit is not None and limit < len(index):
        index = index[torch.randperm(len(index), generator=generator)[:limit]].sort().values
    depth, order = depth[index].sort(descending=True, stable=True)
    return Positions(index[order], [int((depth > head).sum()) for head in range(len(usable))])


def make_windows(
    states: torch.Tensor, tokens: torch.Tensor, positions: Positions, heads: int, segment_ids: torch.Tensor | None = None
) -> Windows:
    """Line up states [b, n, d] (any device) with tokens int64 [b, n] (on the CPU) at `positions`.

    segment_ids: int [b, n] on the CPU, for families that keep a context.
    """
    ahead = F.pad(tokens, (0, heads + 1))
    following = torch.stack([ahead[:, 1 + i : 1 + i + tokens.shape[1]] for i in range(heads + 1)], dim=-1).flatten(0, 1)
    index = positions.index
    text = None if segment_ids is None else packed_text(tokens, segment_ids, index, states.device)
    return Windows(states.flatten(0, 1), upload(index, states.device), upload(following[index], states.device), positions.counts, text)
