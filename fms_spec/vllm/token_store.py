"""What a draft keeps of each request's text inside vLLM: the tokens, in a paged cache of its own that vLLM allocates, shares and frees.

To vLLM it is one more attention layer, of 4 bytes a token. So prefix caching, preemption and requests that move within the batch need no
word of ours, and what the tables of keys hang on (`speculators.pointer`) is read where it is.

Shapes: n tokens of a pass, b requests, k tokens of a block, s slots of a text. Slot t of a text holds x_{t+1}.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fms_spec.context import Context, recent_tokens


@dataclass(frozen=True)
class Pass:
    """One pass of the draft over a batch.

    slots: int64 [n], where each token is kept, -1 for padding. blocks: int [b, ...], of the texts. longest: of the texts, in slots.
    """

    slots: torch.Tensor
    blocks: torch.Tensor
    longest: int


class PassBuilder(AttentionMetadataBuilder[Pass]):
    """Makes a `Pass` of what vLLM knows of a batch."""

    _cudagraph_support = AttentionCGSupport.ALWAYS  # what it hands on stays where it is; less would take the base model's graphs away too

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Pass:
        common = common_attn_metadata
        return Pass(common.slot_mapping, common.block_table_tensor, common.max_seq_len)


class Nothing(AttentionImpl[Any]):
    """No attention is computed."""

    def __init__(self) -> None:
        pass

    def forward(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError


class TokenBackend(AttentionBackend):
    """Names the builder above."""

    @staticmethod
    def get_name() -> str:
        return "FMS_SPEC_TOKENS"

    @staticmethod
    def get_impl_cls() -> Any:
        return Nothing

    @staticmethod
    def get_builder_cls() -> Any:
        return PassBuilder


class TokenStore(nn.Module, AttentionLayerBase):
    """The layer. Its cache is int32 [blocks, 1, k, 1]."""

    supports_dcp = False

    def __init__(self, vllm_config: Any, name: str) -> None:
        super().__init__()
        self.name, self.impl, self.kv_cache = name, Nothing(), torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> Any:
        return TokenBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        block = vllm_config.cache_config.block_size
        return FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, head_size_v=0, dtype=torch.int32)

    def current(self) -> Pass | None:
        """The `Pass` that runs now; None while vLLM measures memory, before there is a cache."""
        passes = get_forward_context().attn_metadata
        return passes.get(self.name) if isinstance(passes, dict) and self.kv_cache.numel() else None

    def write(self, batch: Pass, tokens: torch.Tensor) -> None:
        """Keep tokens int64 [n], x_{t+1} of each slot. Padding goes to block 0, which no request ever has."""
        slots = batch.slots.clamp(min=0)[: len(tokens)]
        size = self.kv_cache.shape[2]
        self.kv_cache[slots // size, 0, slots % size, 0] = tokens[: len(slots)].int()

    def context(self, batch: Pass, speculator: Any, positions: torch.Tensor, dtype: torch.dtype) -> Context:
        """What the requests' texts show: positions int64 [b], t of each request's newest slot."""
        size, texts = self.kv_cache.shape[2], len(positions)
        blocks = batch.blocks[:texts, : -(-batch.longest // size)].long()
        tokens = self.kv_cache[blocks, 0, :, 0].flatten(1)[:, : batch.longest].long()
        before = tokens.gather(1, (positions - 1).clamp(min=0)[:, None])[:, 0].where(positions > 0, -1)
        recent = recent_tokens(F.pad(tokens, (1, 0), value=-1)).slots(0, -1)
        states = torch.full((), torch.nan, dtype=dtype, device=tokens.device).expand(*tokens.shape, speculator.emb_dim)  # not kept here
        return Context(speculator.keep(states, recent, torch.zeros_like(tokens)), tokens, positions + 1, before)
