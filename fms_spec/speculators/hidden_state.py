"""Attached heads that stay in the base model's own hidden space, without attention and without a cache.

Shapes: m positions, d base width, w trunk width, f inner width, r draft vocabulary, l inner layers that are read.

Head i predicts the state from which the base model itself would predict the head's token, and reads it out with the base model's frozen
lm_head on a pruned draft vocabulary. Only what leads to that state is trained:

    x_0 = A_0 [h_t / sigma ; e(x_{t+1})]
    x_i = A_1 [h_t / sigma ; z_{i-1} / sigma ; y_{i-1} ; e(x_{t+1+i})]      for i > 0, one set of weights for all later heads
    x_i <- x_i + D (SiLU(G n(x_i)) * U n(x_i));  y_i = n(x_i);  z_i = sigma * (O y_i + o);  logits_i = W_draft z_i

n: RMS norm without parameters; sigma: standard deviation of each coordinate of the base model's states; e: frozen embedding, scaled to
unit RMS. O and o start at zero, so an untrained head holds all tokens equally likely.

With `base_layers` the residual stream that enters these layers, and what leaves the last one, takes the place of h_t: each is normed by n
and divided by a sigma of its own. What leaves the last layer is h_t before the final norm, whose weights A_0 and A_1 take in: an engine
that serves such heads need hand over residual streams alone. The states that are predicted are those after the final norm as ever.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fms_spec.context import Recent, Seen
from fms_spec.errors import UserError
from fms_spec.read_out import read_out
from fms_spec.settings import Layers, Side
from fms_spec.speculators import draft_vocabulary
from fms_spec.speculators.interface import BaseWeights, Corpus, Settings, Size, Sizes, Speculator, State
from fms_spec.speculators.packed_heads import PackedHeads
from fms_spec.speculators.pointer import Pointer, PointerSettings, rms

STATE_SCALE_FLOOR = 1e-3  # keeps a coordinate that hardly moves from being blown up


class Trunk(nn.Module):
    """One set of weights: for head 0, or for all later heads."""

    def __init__(self, inputs: int, width: int, inner_dim: int, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Linear(inputs, width, bias=False)
        self.gate = nn.Linear(width, inner_dim, bias=False)
        self.up = nn.Linear(width, inner_dim, bias=False)
        self.down = nn.Linear(inner_dim, width, bias=False)
        self.out = nn.Linear(width, outputs)
        nn.init.normal_(self.down.weight, std=0.5 / inner_dim**0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[m, inputs] -> (predicted state in units of sigma [m, d], y [m, w])."""
        x = self.mix(inputs)
        normed = rms(x)
        y = rms(x + self.down(F.silu(self.gate(normed)) * self.up(normed)))
        return self.out(y), y


class HiddenStateSettings(Settings):
    family: Literal["hidden_state"]
    width: Side = 768  # of the trunk
    inner_dim: Side = 4096
    draft_vocab_size: int | None = Field(None, ge=2)  # the tokens trained on most often; None keeps all
    pointer: PointerSettings | None = None  # onto the text; None: nothing is copied
    base_layers: Layers = Field((), exclude_if=lambda ids: not ids)  # whose input is read; none: a run is recorded as before there were any


class HiddenStateSizes(Sizes):
    draft_vocab_size: Size
    width: Size
    inner_dim: Size
    pointer_width: int = Field(0, ge=0, le=2**24)  # 0: no pointer
    base_layers: Layers = ()  # the last is how many the base model has

    def misfit(self, layers: int) -> str | None:
        return f"a base model of {self.base_layers[-1]} layers" if self.base_layers and self.base_layers[-1] != layers else None


class HiddenStateSpeculator(Speculator):
    """See the module's formulas.

    Args:
        emb_dim: d. vocab_size: of the base model. draft_ids: int64 [r], ascending. state_scale: sigma, [(1 + l) d], of the final states,
        then of what each of `base_layers` is when it has been normed. width: w. inner_dim: f. base_layers: l ids, see `inner_states`.
    """

    name, model_type, architecture = "hidden_state", "hidden_state_speculator", "HiddenStateSpeculator"
    settings, sizes = HiddenStateSettings, HiddenStateSizes
    sample_rows, needs_embedding, predicts_states = 8, True, True
    draft_ids: torch.Tensor
    state_scale: torch.Tensor
    packed: PackedHeads | None

    def __init__(
        self,
        emb_dim: int,
        vocab_size: int,
        draft_ids: torch.Tensor,
        state_scale: torch.Tensor,
        n_predict: int = 3,
        width: int = 768,
        inner_dim: int = 1536,
        pointer_width: int = 0,
        base_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.emb_dim, self.vocab_size, self.n_predict, self.width, self.inner_dim = emb_dim, vocab_size, n_predict, width, inner_dim
        self.register_buffer("draft_ids", draft_ids)
        self.register_buffer("state_scale", state_scale)
        self.base_layers = tuple(base_layers)
        read = emb_dim * max(1, len(self.base_layers))
        inputs = (read + emb_dim, read + 2 * emb_dim + width)[: self.distinct_heads]
        self.trunks = nn.ModuleList(Trunk(size, width, inner_dim, emb_dim) for size in inputs)
        self.context_width, self.copies = pointer_width, bool(pointer_width)
        if pointer_width:
            self.pointer = Pointer(emb_dim, width, pointer_width)

    @classmethod
    def base_layers_of(cls, settings: Any, base_model: Any) -> tuple[int, ...]:
        """Those of the settings, and the last layer's output."""
        if not settings.base_layers:
            return ()
        deepest, count = settings.base_layers[-1], base_model.layers
        if deepest >= count:
            raise UserError(f"speculator.base_layers {deepest}: the base model has {count} layers; give some of 0 to {count - 1}")
        return *settings.base_layers, count

    @classmethod
    def build(cls, settings: Any, base_model: Any, corpus: Corpus | None = None) -> Self:
        """The draft vocabulary is the tokens trained on most often, and sigma the spread of its states."""
        d, v = base_model.width, base_model.vocab_size
        size, layers = draft_vocabulary.size_of(settings, base_model), cls.base_layers_of(settings, base_model)
        if corpus is None:
            draft_ids, state_scale = torch.zeros(size, dtype=torch.int64), torch.ones(d * (1 + len(layers)))
        else:
            draft_ids = draft_vocabulary.most_frequent(corpus.token_counts, size, base_model)
            assert corpus.states is not None
            final, *inner = corpus.states.split(d, dim=-1)
            state_scale = torch.cat([final.std(0), *(rms(part).std(0) for part in inner)]) + STATE_SCALE_FLOOR
        pointer_width = settings.pointer.width if settings.pointer else 0
        return cls(d, v, draft_ids, state_scale, settings.n_predict, settings.width, settings.inner_dim, pointer_width, layers)

    @property
    def distinct_heads(self) -> int:
        return min(2, self.n_predict)

    def attach(self, base_model: BaseWeights) -> None:
        self.draft_index = draft_vocabulary.entries(self.draft_ids, self.vocab_size)
        embedding = base_model.embedding_weight
        self.embedding_scale = 1 / embedding.float().square().mean().sqrt().item()
        # A tuple, so that neither becomes a parameter.
        self.frozen: tuple[torch.Tensor, ...] = (embedding, base_model.output_weight[self.draft_ids])
        self.packed = None  # see `pack`
        if self.context_width:
            self.pointer.attach(embedding)

    def teacher_weight(self, base_model: BaseWeights) -> torch.Tensor:
        return self.frozen[1]

    def draft_targets(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.draft_index[tokens]

    def start(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> State:
        scale = self.state_scale
        if self.base_layers:
            read = len(self.base_layers) * self.emb_dim
            hidden, scale = rms(hidden[:, -read:].unflatten(-1, (-1, self.emb_dim))).flatten(-2), scale[-read:]
        if self.packed is not None:
            return self.packed.start(hidden, before)
        return (hidden / scale).to(hidden.dtype), None, None, before, None

    def advance(self, state: Any, tokens: torch.Tensor, head: int, seen: Seen | None = None) -> State:
        if self.packed is not None:
            return self.packed.advance(state, tokens, head)
        hidden, *drafted, newest, _ = state
        embedded = F.embedding(tokens, self.frozen[0]) * self.embedding_scale
        inputs = [hidden, embedded] if head == 0 else [hidden, *drafted, embedded]
        predicted, inner = self.trunks[min(head, 1)](torch.cat(inputs, dim=-1))
        return hidden, predicted, inner, tokens, newest

    def output(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return read_out(state[1] * self.final(self.state_scale), self.frozen[1]), self.frozen[1]

    def keep(self, states: torch.Tensor, recent: Recent, slots: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        return self.pointer.keys(recent, states.dtype)

    def point(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pointer.look(*state[2:]) if self.packed is None else self.pointer.asked(state[3], *state[5:])

    def read_out_logits(self, state: Any, head: int) -> torch.Tensor:
        if self.packed is not None:
            return state[4]
        features, weight = self.output(state, head)
        return F.linear(features.to(weight.dtype), weight)

    def pack(self) -> None:
        self.packed = PackedHeads(self)
        self.trunks, self.frozen = nn.ModuleList(), self.frozen[:1]  # what they hold is in `packed` now
        if self.context_width:
            self.pointer.pack()

    def state_distance(self, features: torch.Tensor, target_states: torch.Tensor) -> torch.Tensor:
        """Smooth L1 between predicted and true states, in units of sigma (a few coordinates are fifty times the others): fp32 [m]."""
        scale = self.final(self.state_scale).float()
        return F.smooth_l1_loss(features[:, : self.emb_dim].float() / scale, target_states.float() / scale, reduction="none").mean(-1)

    def saved_config(self) -> dict[str, Any]:
        more: dict[str, Any] = {"pointer_width": self.context_width} if self.context_width else {}
        if self.base_layers:
            more["base_layers"] = list(self.base_layers)
        return {
            "model_type": self.model_type, "architectures": [self.architecture], "emb_dim": self.emb_dim, "vocab_size": self.vocab_size,
            "draft_vocab_size": len(self.draft_ids), "n_predict": self.n_predict, "width": self.width, "inner_dim": self.inner_dim,
        } | more  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        sizes = cls.sizes.model_validate(config).model_dump()
        draft_ids = torch.zeros(sizes.pop("draft_vocab_size"), dtype=torch.int64)
        state_scale = torch.ones(sizes["emb_dim"] * (1 + len(sizes["base_layers"])))
        return cls(draft_ids=draft_ids, state_scale=state_scale, **sizes)

    def load_published_state(self, tensors: dict[str, torch.Tensor]) -> None:
        super().load_published_state(tensors)
        draft_vocabulary.check_ids(self.draft_ids, self.vocab_size, "draft_ids")
