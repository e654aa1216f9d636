"""Which hidden state meets which tokens: the same alignment for both phases.

Shapes: b rows, n tokens, m usable positions, d base width, h heads.

Head i (from 0) sees h_t and x_{t+1} ... x_{t+1+i}, and predicts x_{t+2+i}; all of them lie in one document, and in phase 2 t starts at
the end of the prompt.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """The usable positions of a batch, flattened.

    states: [b * n, d], of every position. index: int64 [m], where in `states` each h_t stands. tokens: int64 [m, h + 1], x_{t+1}
    onwards. valid: bool [h, m], whether head i has its target x_{t+2+i} within the document.
    """

    states: torch.Tensor
    index: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor

    @property
    def hidden(self):
        """h_t: [m, d]."""
        return self.states[self.index]

    def target_states(self, head):
        """h_{t+1+i}, from which the base model itself predicts head i's target: [m, d]; arbitrary where not valid."""
        return self.states[(self.index + 1 + head).clamp(max=len(self.states) - 1)]


def usable_positions(segment_ids, first_states, heads):
    """Where each head has a state and a target: bool [heads, b, n].

    Args:
        segment_ids: int [b, n], see `attention.document_spans`. first_states: int64 [b], first position whose state may be used.
    """
    n = segment_ids.shape[1]
    usable = (segment_ids >= 0) & (torch.arange(n) >= first_states[:, None])
    ahead = F.pad(segment_ids, (0, heads + 1), value=-1)
    return torch.stack([usable & (ahead[:, head + 2 : head + 2 + n] == segment_ids) for head in range(heads)])


def make_windows(states, tokens, segment_ids, first_states, heads):
    """Line up states [b, n, d] (any device) with tokens int64 [b, n]; the masks are worked out on the CPU, so nothing waits."""
    usable = usable_positions(segment_ids, first_states, heads).flatten(1)
    index = usable[0].nonzero()[:, 0]  # a later head's positions are among the first head's
    ahead = F.pad(tokens, (0, heads + 1))
    following = torch.stack([ahead[:, 1 + i : 1 + i + tokens.shape[1]] for i in range(heads + 1)], dim=-1).flatten(0, 1)
    device = states.device
    return Windows(states.flatten(0, 1), index.to(device), following[index].to(device), usable[:, index].to(device))
