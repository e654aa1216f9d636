"""A pointer onto the text, beside any family's read-out: what is copied rather than known.

Shapes: m positions, n slots of a text, d base width, w pointer width, y width of the family's own state.

With e the base model's frozen embedding, scaled to unit RMS, n an RMS norm and c = 8 / w:
    key_t   = K e(x_t) + K' e(x_{t-1})                              of slot t, which stands for the token x_{t+1} that followed
    query   = Q e(newest) + Q' e(the one before) + Q'' n(y)         of a draft
    s_t     = b c query . key_t over the slots that the position sees
    gate    = sigmoid(log sum_t exp s_t + G n(y) + a)               so that it closes where nothing matches
    draft   = (1 - gate) softmax(read-out) + gate sum_t softmax(s)_t [token = x_{t+1}]
K = Q and K' = Q' start as the same random projections and Q'' and G at zero: equal tokens find each other from the first step. Pointer
networks: arXiv 1506.03134; a gate that competes with the matches: arXiv 1609.07843.
"""

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fms_spec.context import Recent
from fms_spec.packed_linear import linear_of, pack_linears
from fms_spec.settings import Section, Side

SHARPNESS = 8.0  # score of a match of one token at the start; the noise of the others is about 8 / sqrt(w)
WEIGHTS = (1.0, 0.6)  # of the newest token and the one before it, so that a match of two is worth 1.36 of one
OPEN = -9.0  # gate's a at the start: closed at the noise of 500 slots, half open at a match, open at two


class PointerSettings(Section):
    width: Side = Field(128)


class Pointer(nn.Module):
    """See the module's formulas. Args: d, y and w."""

    def __init__(self, emb_dim: int, state_width: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.key_tokens, self.query_tokens = (nn.Linear(len(WEIGHTS) * emb_dim, width, bias=False) for _ in range(2))
        self.query_state = nn.Linear(state_width, width, bias=False)
        self.gate = nn.Linear(state_width, 1)
        self.sharpness = nn.Parameter(torch.ones(1))
        with torch.no_grad():
            start = torch.randn(width, len(WEIGHTS) * emb_dim) / emb_dim**0.5 * torch.tensor(WEIGHTS).repeat_interleave(emb_dim)
            for linear in (self.key_tokens, self.query_tokens):
                linear.weight.copy_(start)
            for value in (self.query_state.weight, self.gate.weight):
                value.zero_()
            self.gate.bias.fill_(OPEN)

    def attach(self, embedding: torch.Tensor) -> None:
        """Take the base model's token embedding [v, d]."""
        self.frozen = (embedding, 1 / embedding.float().square().mean().sqrt().item())  # a tuple, so that it becomes no parameter
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def pack(self) -> None:
        """Work out what keys and queries take of every token, as `projected` twice: from there on they are sums of rows."""
        weight, every = self.key_tokens.weight.detach(), torch.arange(len(self.frozen[0]), device=self.gate.weight.device)
        keys, queries = (self.projected(linear, every, weight.dtype).detach() for linear in (self.key_tokens, self.query_tokens))
        self.tables = keys, queries * (self.sharpness.detach() * (SHARPNESS / self.width))
        self.of_state = linear_of(weight, *self.state_rows())
        pack_linears(self)

    def state_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a draft's own state says of its query and gate is weight [w + 1, y] times n(y) plus bias [w + 1], see `asked`."""
        scale = self.sharpness.detach() * (SHARPNESS / self.width)
        weight = torch.cat([self.query_state.weight * scale, self.gate.weight]).detach()
        return weight, F.pad(self.gate.bias.detach(), (self.width, 0))

    def keys(self, recent: Recent, dtype: torch.dtype) -> torch.Tensor:
        """[..., w] of slots. Each token is projected once: a step of 32 rows of 512 has some 3,000 of them."""
        index = recent.index[..., 1:]
        if self.tables is not None:
            return sum_of_rows(self.tables[0], recent.of(index))
        return sum_of_rows(self.projected(self.key_tokens, recent.listed, dtype), index)

    def projected(self, linear: nn.Linear, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """K e(token) and K' e(token) of tokens int64 [u], -1 for none, each with a row of zeros behind: [2, u + 1, w]."""
        embedded = F.pad(self.embedded(tokens, dtype), (0, 0, 0, 1))
        return torch.stack([F.linear(embedded, weight) for weight in linear.weight.chunk(len(WEIGHTS), dim=1)])

    def look(self, inner: torch.Tensor, newest: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(query [m, w], scaled so that a score is its product with a key; gate [m], its G y + a): inner [m, y], tokens int64 [m]."""
        state = rms(inner)
        if self.tables is not None:
            return self.asked(self.of_state(state), newest, before)
        pair = self.embedded(torch.stack([newest, before], dim=-1), inner.dtype).flatten(-2)
        query = self.query_tokens(pair) + self.query_state(state)
        return query * (self.sharpness * (SHARPNESS / self.width)), self.gate(state).squeeze(-1)

    def asked(self, of_state: torch.Tensor, newest: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`look`, once packed, where what `state_rows` make of the state is known: [m, w + 1]."""
        assert self.tables is not None
        query, gate = of_state.split([self.width, 1], dim=-1)
        first, second = self.tables[1]
        return query + first[newest] + second[before], gate.squeeze(-1)

    def embedded(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """int64 [...] -> [..., d]; a token of -1 gives zeros."""
        embedding, scale = self.frozen
        return F.embedding(tokens.clamp(min=0), embedding).to(dtype) * (scale * (tokens >= 0)[..., None]).to(dtype)


def sum_of_rows(tables: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of each table its own row: tables [2, u + 1, w], places int64 [..., 2], -1 for the last: [..., w].

    In one pass: of 2,048 slots it takes 0.32 ms on a CPU core (bf16, w 128), and two lookups with their sum 0.70.
    """
    rows = tables.shape[1]
    firsts = torch.arange(0, len(tables) * rows, rows, device=places.device)
    return F.embedding_bag(places.flatten(0, -2) % rows + firsts, tables.flatten(0, 1), mode="sum").unflatten(0, places.shape[:-1])


def rms(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without parameters: [..., y] -> same shape and dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
