"""The MLP speculator as published: arXiv 2404.19124, in the layout of IBM's accelerators.

Formulas (D base width, d inner width, n heads, V vocabulary; s_w = 0.5^(0.5/n), e_w = sqrt((1 - s_w^2) d / 2)):
    s_0 = h, or RMS(h) / sqrt(2) with scaled input
    u = P_i s_i + (e_w / s_w) E_i[token];  s_{i+1} = GELU(g_i * RMS(u) + b_i);  logits_i = W_i s_{i+1}
"""

import math
import re
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fms_spec.context import Recent, Seen
from fms_spec.errors import UserError
from fms_spec.settings import Side
from fms_spec.speculators.interface import BaseWeights, Corpus, Settings, Size, Sizes, Speculator, State
from fms_spec.speculators.pointer import Pointer, PointerSettings
from fms_spec.speculators.tensor_files import form

EPS = 1e-6


def rms(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without parameters, in fp32: [..., d] -> same shape and dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


class MLPSettings(Settings):
    family: Literal["mlp"]
    inner_dim: Side = 4096
    tie_weights: bool = True
    scale_input: bool = True
    pointer: PointerSettings | None = None  # onto the text; None: nothing is copied, and the layout is the published one


class MLPSizes(Sizes):
    inner_dim: Size
    # Both flags are absent from the oldest published configs, which are untied and unscaled.
    tie_weights: bool = False
    scale_input: bool = False
    pointer_width: int = Field(0, ge=0, le=2**24)  # 0: no pointer


class MLPSpeculator(Speculator):
    """Published MLP speculator. Tied: one E, one W, one (g, b); P_0 (D -> d) stands apart and P_1 serves all later heads."""

    name, model_type, architecture = "mlp", "mlp_speculator", "MLPSpeculatorPreTrainedModel"
    settings, sizes = MLPSettings, MLPSizes
    draft_ids, any_depth = None, False  # how a token weighs against the state hangs on `n_predict`

    def __init__(
        self, emb_dim: int, vocab_size: int, n_predict: int = 3, inner_dim: int = 4096, tie_weights: bool = True, scale_input: bool = True,
        pointer_width: int = 0,
    ) -> None:  # fmt: skip
        """emb_dim: D. inner_dim: d. vocab_size: V."""
        super().__init__()
        self.emb_dim, self.vocab_size, self.n_predict = emb_dim, vocab_size, n_predict
        self.inner_dim, self.tie_weights, self.scale_input = inner_dim, tie_weights, scale_input
        copies = 1 if tie_weights else n_predict
        projections = min(2, n_predict) if tie_weights else n_predict
        self.emb = nn.ModuleList(nn.Embedding(vocab_size, inner_dim) for _ in range(copies))
        self.proj = nn.ModuleList(nn.Linear(emb_dim if i == 0 else inner_dim, inner_dim, bias=False) for i in range(projections))
        self.head = nn.ModuleList(nn.Linear(inner_dim, vocab_size, bias=False) for _ in range(copies))
        self.ln = nn.ModuleList(GainAndShift(inner_dim) for _ in range(copies))
        state_weight = 0.5 ** (0.5 / n_predict)
        self.token_scale = math.sqrt((1 - state_weight**2) * inner_dim / 2) / state_weight
        for module in (*self.emb, *self.proj, *self.head):
            nn.init.normal_(module.get_parameter("weight"), std=1 / math.sqrt(inner_dim))
        self.context_width, self.copies = pointer_width, bool(pointer_width)
        if pointer_width:
            self.pointer = Pointer(emb_dim, inner_dim, pointer_width)

    @classmethod
    def build(cls, settings: Any, base_model: Any, corpus: Corpus | None = None) -> Self:
        sizes = settings.model_dump(exclude={"family", "pointer", "init_from"})
        pointer_width = settings.pointer.width if settings.pointer else 0
        return cls(base_model.width, base_model.vocab_size, pointer_width=pointer_width, **sizes)

    @property
    def distinct_heads(self) -> int:
        return len(self.proj)

    def attach(self, base_model: BaseWeights) -> None:
        if self.context_width:
            self.pointer.attach(base_model.embedding_weight)

    def start(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> State:
        return rms(hidden) / math.sqrt(2) if self.scale_input else hidden, before, None

    def advance(self, state: Any, tokens: torch.Tensor, head: int, seen: Seen | None = None) -> State:
        own = 0 if self.tie_weights else head
        projection = self.proj[min(head, 1) if self.tie_weights else head]
        inner, newest, _ = state
        mixed = projection(inner) + self.token_scale * self.emb[own](tokens)
        return F.gelu(self.ln[own](rms(mixed))), tokens, newest

    def output(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return state[0], self.head[0 if self.tie_weights else head].get_parameter("weight")

    def keep(self, states: torch.Tensor, recent: Recent, slots: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        return self.pointer.keys(recent, states.dtype)

    def point(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pointer.look(*state)

    def pack(self) -> None:
        if self.context_width:
            self.pointer.pack()

    def saved_config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type, "architectures": [self.architecture], "emb_dim": self.emb_dim,
            "inner_dim": self.inner_dim, "vocab_size": self.vocab_size, "n_predict": self.n_predict, "n_candidates": 1,
            "top_k_tokens_per_head": [1] * self.n_predict, "tie_weights": self.tie_weights, "scale_input": self.scale_input,
        } | ({"pointer_width": self.context_width} if self.context_width else {})  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from a published config.json."""
        return cls(**cls.sizes.model_validate(config).model_dump())

    def published_state(self) -> dict[str, torch.Tensor]:
        """Tensors under the published keys; tied weights are kept once, at index 0 (and proj.1)."""
        return {f"speculator.{key}": value for key, value in self.state_dict().items()}

    def load_published_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load tensors under the published keys; tied files may repeat a shared weight at every index.

        Raises:
            UserError: a missing tensor, a wrong shape, or repeats of a tied weight that differ.
        """
        own = self.state_dict()
        for key, value in tensors.items():
            name = target = key.removeprefix("speculator.")
            numbered = re.fullmatch(r"(\w+)\.(\d+)\.(\w+)", name)
            if self.tie_weights and numbered:
                part, index, rest = numbered.groups()
                target = f"{part}.{min(int(index), 1) if part == 'proj' else 0}.{rest}"
            if target not in own:
                raise UserError(f"speculator tensor {key} has no place in a {self.n_predict}-head MLP speculator")
            if target != name and target in {k.removeprefix("speculator.") for k in tensors}:
                if not torch.equal(value, tensors[f"speculator.{target}"]):
                    raise UserError(f"speculator tensor {key} differs from speculator.{target}, though the config ties them")
                continue
            if form(own[target]) != form(value):
                raise UserError(f"speculator tensor {key} is {form(value)}, the config says {form(own[target])}")
            own[target] = value
        missing = [name for name in self.state_dict() if f"speculator.{name}" not in tensors]
        if missing:
            raise UserError(f"speculator tensor speculator.{missing[0]} is missing from the file")
        self.load_state_dict(own, assign=True)


class GainAndShift(nn.Module):
    """g * x + b, the trained part of the published norm; its tensors are called weight and bias there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.bias
