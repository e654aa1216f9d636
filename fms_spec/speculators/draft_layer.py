"""Llama decoder layers that draft: they attend to what is kept of a text and to what has been drafted since.

Shapes: m positions, d width, h query heads, g key-value heads, a head width, w = 2 g a, i tokens drafted before.

The keys and values of a text are worked out once, by `keys_values`, and kept. A draft's own come on top: those of the tokens on its own way
from the text, seen by nobody else. One softmax runs over both, as if all stood in one text.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fms_spec.attention import attend
from fms_spec.context import Seen
from fms_spec.kv_cache import fold_mask


class Norm(nn.Module):
    """RMS norm with weights, computed in fp32: [..., d] -> same shape and dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Rotary:
    """Rotary positions as `transformers` has them for Llama: pairs of coordinates a / 2 apart."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        theirs = LlamaRotaryEmbedding(config)
        self.frequencies, self.scaling = theirs.inv_freq.to(device), theirs.attention_scaling  # fp32 [a / 2]

    def turned(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [..., heads, a] at places int64 [...], in fp32 between: same shape and dtype."""
        angles = places[..., None, None].float() * self.frequencies
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Its keys [.., g, a] and values are handed around side by side, as [..., w]."""

    def __init__(self, config: LlamaConfig, inputs: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(inputs, self.heads * self.head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(inputs, self.groups * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def keys_values(self, x: torch.Tensor, places: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Of x [..., inputs] at places int64 [...]: [..., w]."""
        keys = rotary.turned(self.k_proj(x).unflatten(-1, (self.groups, -1)), places).flatten(-2)
        return torch.cat([keys, self.v_proj(x)], dim=-1)

    @torch.compiler.disable  # its blocks are laid out on the host; the rest of the layer compiles around it
    def forward(self, x: torch.Tensor, places: torch.Tensor, rotary: Rotary, drafted: torch.Tensor | None, seen: Seen) -> torch.Tensor:
        """x [m, inputs] at places int64 [m], drafted [m, i, w] of each one's own tokens, itself the last: [m, d]."""
        query = rotary.turned(self.q_proj(x).unflatten(-1, (self.heads, -1)), places)
        parts = []
        for rows in seen.blocks(len(query)):
            inputs = query[rows], None if drafted is None else drafted[rows], seen, rows
            if torch.is_grad_enabled():  # a block's mask, and its copy of what is kept, are made again rather than held
                parts.append(checkpoint(self.attended, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self.attended(*inputs))
        if not parts:  # of a head without a position: zeros as gradients, for processes add up those of the same weights
            assert seen.kept is not None
            parts = [query.flatten(1), seen.kept.flatten()[:0].view(0, self.heads * self.head_dim).to(query.dtype)]
        return self.o_proj(torch.cat(parts))

    def attended(self, query: torch.Tensor, drafted: torch.Tensor | None, seen: Seen, rows: slice) -> torch.Tensor:
        """Of a block of positions: query [c, h, a], drafted [c, i, w] -> [c, h a]."""
        laid = seen.lay(rows)
        kept, hidden = laid.kept.to(query.dtype), laid.hidden
        if drafted is not None:
            texts, each, _ = hidden.shape
            others = ~torch.eye(each, dtype=torch.bool, device=hidden.device).repeat_interleave(drafted.shape[1], 1)
            kept = torch.cat([kept, laid.by_text(drafted).flatten(1, 2)], dim=1)
            hidden = torch.cat([hidden, others.expand(texts, -1, -1)], dim=-1)
        keys, values = kept.unflatten(-1, (2, self.groups, self.head_dim)).transpose(1, 3).unbind(2)
        mask = fold_mask(~hidden, self.heads // self.groups, query.dtype)
        attended = attend(laid.by_text(query).transpose(1, 2), keys, values, mask, None)
        return laid.by_position(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated, as Llama's: [m, d] -> [m, d]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """A layer on the state alone: its parts are named as published. inputs: width of what its attention reads."""

    def __init__(self, config: LlamaConfig, inputs: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = Attention(config, inputs), FeedForward(config)

    def read(self, hidden: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the attention reads, [..., inputs]; what it is added to, [..., d]) of states and token embeddings [..., d]."""
        return self.input_layernorm(hidden), hidden

    def forward(self, *arguments: Any) -> torch.Tensor:
        """As `Attention.forward`, with the sum behind x: [m, d]."""
        x, residual, *rest = arguments
        residual = residual + self.self_attn(x, *rest)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class FirstLayer(DraftLayer):
    """EAGLE-3's first layer, whose attention reads the token's embedding beside the state."""

    def __init__(self, config: LlamaConfig, norm_before_residual: bool) -> None:
        super().__init__(config, 2 * config.hidden_size)
        self.hidden_norm, self.norm_before_residual = Norm(config.hidden_size, config.rms_norm_eps), norm_before_residual

    def read(self, hidden: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.hidden_norm(hidden)
        return torch.cat([self.input_layernorm(embedded), normed], dim=-1), normed if self.norm_before_residual else hidden
