"""Candidates that the text itself proposes: what followed where it said the same before."""

from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch.nn import functional as F

from fms_spec.candidates import Candidates, Tree
from fms_spec.errors import UserError
from fms_spec.proposers import Step, TopKProposer
from fms_spec.sampling import Sampling


class PromptLookup:
    """What followed the latest earlier place where the text had the same last tokens: a chain of `lookahead`, no model at all.

    The longest of `LONGEST` to `shortest` equal tokens decides, as in the public prompt-lookup decoding, where that is 1.
    """

    LONGEST, speculator = 3, None

    def __init__(self, lookahead: int, shortest: int = 1):
        """Raises UserError for a lookahead under 1."""
        if lookahead < 1:
            raise UserError(f"lookahead {lookahead}: must be at least 1")
        self.lookahead = self.nodes = lookahead
        self.shortest = shortest

    def propose(self, step: Step) -> Candidates | None:
        lines = self.lines(step)
        return chains(lines, step.tokens.device) if any(lines) else None

    def lines(self, step: Step) -> list[list[int]]:
        """What is proposed for each sequence."""
        return [self.look_up(numpy.array(text)) for text in step.texts]

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
    """What followed the last `MATCH` tokens where they stood before, else a chain of heads: those aren't run where all texts go on so.

    The candidates are picked, not drawn, also under sampling. Heads that copy know better what to copy, but not for nothing.
    """

    MATCH = 3

    def __init__(self, heads: TopKProposer, lookup: int):
        """lookup: candidates at most that are looked up."""
        self.lookup, self.heads = PromptLookup(lookup, shortest=self.MATCH), heads
        self.speculator, self.lookahead = heads.speculator, max(lookup, heads.lookahead)
        self.nodes = self.lookahead

    def propose(self, step: Step) -> Candidates:
        lines, device = self.lookup.lines(step), step.tokens.device
        copied = chains(lines, device)
        if all(lines):
            return copied
        drafted = self.heads.propose(replace(step, sampling=Sampling(), chance=None)).tokens
        width = max(drafted.shape[1], copied.tokens.shape[1])
        copies, drafted = (F.pad(tokens, (0, width - tokens.shape[1]), value=-1) for tokens in (copied.tokens, drafted))
        found = torch.tensor([[bool(line)] for line in lines], device=device)
        return Candidates(copies.where(found, drafted), Tree.full([1] * width, device))


def chains(lines: Sequence[Sequence[int]], device: torch.device) -> Candidates:
    """A chain of tokens for each sequence, some of which may be empty."""
    longest = max(map(len, lines))
    padded = torch.tensor([[*line, *[-1] * (longest - len(line))] for line in lines], dtype=torch.int64, device=device)
    return Candidates(padded, Tree.full([1] * longest, device))
