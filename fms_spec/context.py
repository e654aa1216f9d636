"""What a family keeps of the text beside the running state: a row for each token, and which of them a position sees.

Shapes: g texts, n slots of each, w width of what is kept, b sequences, m positions, d base width.

Slot t of a text stands for the base model's state h_t there and the token x_{t+1} that follows it. A position at t sees the slots of its
own document up to and with t; what was drafted since is in the running state. Whatever is kept is the family's own (`Speculator.keep`):
over whole packed rows in training, in a cache that is accepted and dropped with the base model's in decoding. A text's first token is not
known to a context: engines hand a draft the tokens from the second on (vLLM shows it x_{t+1} beside h_t), and one slot is nothing.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch.nn import functional as F

from fms_spec.batch import upload

ATTENDED = 256  # positions of a training step that attend together: bounds their mask, to which each one's own drafts add a column


@dataclass(frozen=True)
class Context:
    """What sequences see of texts: b sequences over g texts, b a multiple of g, the first b / g over the first text.

    kept: [g, n, w]. tokens: int64 [g, n], x_{t+1} of each slot. end: int64 [b], a sequence sees the slots before it. before: int64 [b],
    x_t of each sequence, whose newest token is x_{t+1}, -1 for none.
    """

    kept: torch.Tensor
    tokens: torch.Tensor
    end: torch.Tensor
    before: torch.Tensor

    def places(self, count: int) -> torch.Tensor:
        """t of each of `count` positions, count / b for each sequence: int64 [count]."""
        return (self.end - 1).repeat_interleave(count // len(self.end))

    def blocks(self, count: int) -> list[slice]:
        """Which of `count` positions attend together: all of them."""
        return [slice(0, count)]

    def lay(self, rows: slice) -> "Laid":
        """The positions of a block."""
        texts, slots = self.tokens.shape
        hidden = torch.arange(slots, device=self.end.device) >= self.end[:, None]
        return Laid(self.kept, hidden.repeat_interleave(rows.stop // len(self.end), 0).view(texts, -1, slots))

    def with_newest(self, part: torch.Tensor, first: int) -> "Context":
        """Lay `part` [b, w'] in each sequence's last slot, as columns `first` onwards of what is kept, and see those columns alone."""
        kept = self.kept[..., first : first + part.shape[-1]]
        texts = torch.arange(len(kept), device=part.device).repeat_interleave(len(part) // len(kept))
        kept[texts, self.end - 1] = part.to(kept.dtype)
        return replace(self, kept=kept)

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """query . kept, fp32 [m, n], -inf where a position doesn't look; query [m, w], m / b positions for each sequence."""
        texts, slots = self.tokens.shape
        kept, queries = self.kept.to(query.dtype), query.view(texts, -1, query.shape[-1])
        # Of one text's 8,192 slots 0.1 ms on a CPU core instead of 1.1.
        scores = F.linear(queries[0], kept[0]) if texts == 1 else queries @ kept.transpose(1, 2)
        scores = scores.float().view(len(self.end), -1, slots)
        return scores.masked_fill_(self.behind, -torch.inf).flatten(0, 1)

    @cached_property
    def behind(self) -> torch.Tensor:
        """Slots that a sequence doesn't see, the same for every head of a step: bool [b, 1, n]."""
        return (torch.arange(self.tokens.shape[1], device=self.end.device) >= self.end[:, None])[:, None]


@dataclass(frozen=True)
class Recent:
    """The tokens of slots: x_{t+1}, x_t and x_{t-1} of each, by their place in a list: what hangs on a token is worked out once.

    listed: int64 [u], tokens, -1 for none. index: int64 [..., 3] into it, -1 for none.
    """

    listed: torch.Tensor
    index: torch.Tensor

    def tokens(self, back: int) -> torch.Tensor:
        """x_{t+1} for 0, x_t for 1, x_{t-1} for 2: int64 [...], -1 where there is none."""
        return self.of(self.index[..., back])

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """The listed tokens at int64 [...], -1 where that is."""
        return self.listed[index.clamp(min=0)].where(index >= 0, -1)

    def slots(self, first: int, end: int | None) -> "Recent":
        """Those of these slots of texts [b, n]."""
        return Recent(self.listed, self.index[:, first:end])


@dataclass(frozen=True)
class Text:
    """Packed rows, as the positions of a training step see them, flattened to s = b * n slots.

    recent: of the s slots, none for tokens of another document. slots: int64 [s], place of each within its document. starts: int64 [s] on
    the host, first slot of each one's document. before, at: int64 [m], x_t of each position, -1 for none, and its t within the document.
    spans: int64 [m, 2] on the host, a position sees the slots from the first to before the second. length: n. kept: [s, w], once a family
    has said what it keeps.
    """

    recent: Recent
    slots: torch.Tensor
    starts: numpy.ndarray
    before: torch.Tensor
    at: torch.Tensor
    spans: numpy.ndarray
    length: int
    kept: torch.Tensor | None = None

    def places(self, count: int) -> torch.Tensor:
        """t of the first `count` positions within their documents: int64 [count]."""
        return self.at[:count]

    def blocks(self, count: int) -> list[slice]:
        """Which of the first `count` positions attend together: `ATTENDED` at a time."""
        return [slice(start, min(start + ATTENDED, count)) for start in range(0, count, ATTENDED)]

    def lay(self, rows: slice) -> "Laid":
        """The positions of a block."""
        assert self.kept is not None
        block = self.block(rows, rows.stop - rows.start)
        slot = torch.arange(block.low, block.high, device=block.begin.device)
        hidden = (slot < block.begin[:, None]) | (slot >= block.end[:, None])
        return Laid(block.of_slots(self.kept), block.by_row(hidden), block)

    def with_newest(self, part: torch.Tensor, first: int) -> "Text":
        """Every slot as a position, which sees `part` [s, w'] of its document up to itself."""
        spans = numpy.stack([self.starts, numpy.arange(len(self.starts)) + 1], axis=1)
        return replace(self, before=self.recent.tokens(1), at=self.slots, spans=spans, kept=part)

    def block(self, rows: slice, count: int) -> "Block":
        """The first `count` positions of `rows` beside the slots that any of them sees."""
        spans = self.spans[rows][:count]
        first = spans[:, 0] // self.length * self.length
        spans = spans - first[:, None]
        places, group, each = numpy.unique(first // self.length, return_inverse=True, return_counts=True)
        order = numpy.argsort(group, kind="stable")
        rank = numpy.empty_like(order)
        rank[order] = numpy.arange(count) - (each.cumsum() - each)[group[order]]
        host = torch.from_numpy(numpy.concatenate([spans.T.flatten(), group, group * each.max() + rank, places]))
        begin, end, number, cell, used = upload(host, self.before.device).split([count, count, count, count, len(places)])
        bounds = int(spans[:, 0].min()), int(spans[:, 1].max())
        return Block(begin, end, number, cell, used, int(each.max()), self.length, *bounds)


Seen = Context | Text  # what positions see, in decoding and in training: its `before`, `places`, `blocks`, `lay` and `with_newest`


def parts_of(seen: Seen, count: int) -> list[Seen]:
    """It with each of `count` equal parts of what is kept, side by side in w."""
    assert seen.kept is not None
    return [seen] if count == 1 else [replace(seen, kept=part) for part in seen.kept.chunk(count, dim=-1)]


@dataclass(frozen=True)
class Block:
    """Positions laid out by the row they stand in, so that each is held against its own row's slots alone, those from low to high.

    Shapes: c positions, g rows that have any, k most of one row, n = high - low.

    begin, end, group, cell: int64 [c], first and last slot, number of the row among the g, and place in [g, k]. rows: int64 [g].
    """

    begin: torch.Tensor
    end: torch.Tensor
    group: torch.Tensor
    cell: torch.Tensor
    rows: torch.Tensor
    most: int
    length: int
    low: int
    high: int

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """[c, ...] -> [g, k, ...], zeros where a row has fewer."""
        laid = values.new_zeros(len(self.rows) * self.most, *values.shape[1:]).index_copy_(0, self.cell, values)
        return laid.unflatten(0, (len(self.rows), self.most))

    def by_position(self, values: torch.Tensor) -> torch.Tensor:
        """[g, k, ...] -> [c, ...]."""
        return values.flatten(0, 1)[self.cell]

    def of_slots(self, values: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """[s, ...] -> [g, n, ...]; `add` is added to them there."""
        slots = values.unflatten(0, (-1, self.length))[:, self.low : self.high]
        return slots[self.rows] if add is None else slots.index_add_(0, self.rows, add)

    def seen(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [g, k, n] of each position, -inf where it doesn't look: [c, n]."""
        slots = torch.arange(self.low, self.high, device=scores.device)
        return self.by_position(scores).masked_fill_((slots < self.begin[:, None]) | (slots >= self.end[:, None]), -torch.inf)


@dataclass(frozen=True)
class Laid:
    """c positions laid out by the text they stand in, k of each, beside what is kept of it: what an attention works on.

    kept: [g, n, w]. hidden: bool [g, k, n], the slots that a position doesn't see. block: in training, where rows have different numbers.
    """

    kept: torch.Tensor
    hidden: torch.Tensor
    block: Block | None = None

    def by_text(self, values: torch.Tensor) -> torch.Tensor:
        """[c, ...] -> [g, k, ...]."""
        return values.unflatten(0, self.hidden.shape[:2]) if self.block is None else self.block.by_row(values)

    def by_position(self, values: torch.Tensor) -> torch.Tensor:
        """[g, k, ...] -> [c, ...]."""
        return values.flatten(0, 1) if self.block is None else self.block.by_position(values)


def packed_text(tokens: torch.Tensor, segment_ids: torch.Tensor, index: torch.Tensor, device: torch.device | str) -> Text:
    """`Text` of packed rows on `device`; all else is on the CPU.

    Args:
        tokens: int64 [b, n]. segment_ids: int [b, n], see `attention.document_spans`. index: int64 [m], positions in the flattened rows.
    """
    same = torch.zeros_like(segment_ids, dtype=torch.bool)
    same[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    slots = torch.arange(tokens.numel())
    first = torch.where(same.flatten(), 0, slots).cummax(0).values
    within = upload(slots - first, device)
    listed, number = tokens.unique(return_inverse=True)
    own = number.where(same, -1)  # none of a document's first token
    before, after, follows = F.pad(own, (1, 0))[:, :-1], F.pad(number, (0, 1))[:, 1:], F.pad(same, (0, 1))[:, 1:]
    three = torch.stack([after.where(follows, -1), own, before.where(same, -1)], dim=-1).flatten(0, 1)
    spans = torch.stack([first[index], index + 1], dim=1)
    before, at = upload(torch.stack([tokens.where(same, -1).flatten()[index], index - spans[:, 0]]), device)
    recent = Recent(upload(listed, device), upload(three, device))
    return Text(recent, within, first.numpy(), before, at, spans.numpy(), tokens.shape[1])


def without_first(tokens: torch.Tensor) -> torch.Tensor:
    """Texts int64 [b, n] as a context knows them: -1 for their first tokens."""
    return F.pad(tokens[:, 1:], (1, 0), value=-1)


def recent_tokens(tokens: torch.Tensor) -> Recent:
    """`Recent` of each slot of texts int64 [b, n], -1 for none."""
    number = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    index = torch.stack([F.pad(number, (0, 1), value=-1)[:, 1:], number, F.pad(number, (1, 0), value=-1)[:, :-1]], dim=-1)
    return Recent(tokens.flatten(), index)


def of_text(speculator: Any, states: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor) -> Context | None:
    """What sequences see that all have one text, the first ends int64 [b] of its slots; None of a family that keeps nothing.

    states: [s, d]. tokens: int64 [s].
    """
    if not speculator or not speculator.context_width:
        return None
    known = without_first(tokens[None])
    cache = ContextCache(speculator, 1, len(tokens) - 1, states.dtype, tokens.device)
    cache.read([0], states[None, :-1], recent_tokens(known).slots(0, -1))
    return Context(cache.kept, tokens[None, 1:], ends, known[0, ends - 1])


class ContextCache:
    """What is kept of a batch in decoding, allocated once: kept [b, capacity, w], tokens and own int64 [b, capacity], x_{t+1} and x_t.

    Slots hold the text in order, as those of the base model's cache, and nothing in them ever moves: only accepted tokens get here.
    """

    def __init__(self, speculator: Any, batch: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.speculator = speculator
        self.kept = torch.zeros(batch, capacity, speculator.context_width, dtype=dtype, device=device)
        self.tokens, self.own = torch.zeros(2, batch, capacity, dtype=torch.int64, device=device)

    def read(self, firsts: list[int], states: torch.Tensor, recent: Recent) -> None:
        """Fill the slots of each text from its first on: states [b, n, d]. What stands behind an end is never seen."""
        rows, count = torch.arange(len(states), device=states.device)[:, None], states.shape[1]
        slots = torch.tensor(firsts, device=states.device)[:, None] + torch.arange(count, device=states.device)
        self.tokens[rows, slots], self.own[rows, slots] = recent.tokens(0).clamp(min=0), recent.tokens(1)
        longest = max(firsts) + count
        seen = Context(self.kept[:, :longest], self.tokens[:, :longest], slots.flatten() + 1, recent.tokens(1).flatten())
        self.kept[rows, slots] = self.speculator.keep(states, recent, slots, seen).to(self.kept.dtype)

    def keep_sequences(self, kept: list[int]) -> None:
        """Drop finished sequences: `kept` list of ints, ascending."""
        self.kept, self.tokens, self.own = self.kept[kept], self.tokens[kept], self.own[kept]

    def seen(self, end: torch.Tensor, longest: int) -> Context:
        """`Context` of the batch: each sequence sees the first end int64 [b] of its slots, at most `longest`."""
        before = self.own.gather(1, end[:, None] - 1)[:, 0]
        return Context(self.kept[:, :longest], self.tokens[:, :longest], end, before)
