"""Attention over packed rows and over a preallocated cache (`kv_cache`), for both base-model backends.

Shapes: b batch, n query tokens, l cached tokens, h query heads, g key-value heads, d head width.

Two ways to attend, chosen per call:
- packed: a row holds several documents one after the other; no token sees another document. Each document is a causal attention of
  its own, so the cost is the sum of the documents' squares and no mask over a row is ever built.
- cached: new tokens are stored in place and attend to whatever `kv_cache.Visible` allows, be they a chain or a candidate tree. ibm-fms's
  own op without a mask takes a top-left causal one, silently wrong as soon as more than one token meets a filled cache; ours is never
  causal by itself.

What a layer asks for besides is honoured in both: a sliding window (a token sees itself and the window - 1 before it), soft-capped scores,
sinks. Grouped-query heads are never expanded: the query heads that share a key-value head are laid side by side as further query rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from fms.modules.attention import register_attention_op
from torch.nn import functional as F
from transformers import AttentionInterface

from fms_spec.kv_cache import SlotMapping, Visible, fold_mask

PACKED = "fms_spec_packed"
CACHED = "fms_spec_cached"
BLOCK = 512  # queries of a windowed or soft-capped document that are attended for together: bounds the scores, 4 bytes x h x 512 x l

Span = tuple[int, int, int]  # row, start, end of a document in a packed batch; end exclusive


def document_spans(segment_ids: torch.Tensor) -> list[Span]:
    """Where each document of a packed batch lies.

    Args:
        segment_ids: int [b, n] on the CPU (reading spans off a GPU would wait for it); equal neighbours belong to one document,
            -1 is padding and belongs to none.

    Returns:
        their `Span`s, row by row.
    """
    spans = []
    for row, ids in enumerate(segment_ids):
        lengths = torch.unique_consecutive(ids, return_counts=True)
        start = 0
        for segment, length in zip(lengths[0].tolist(), lengths[1].tolist()):
            if segment >= 0:
                spans.append((row, start, start + length))
            start += length
    return spans


def span_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token within its document: int64 [b, n], restarting at 0 with every document."""
    positions = torch.zeros_like(segment_ids, dtype=torch.int64)
    for row, start, end in document_spans(segment_ids):
        positions[row, start:end] = torch.arange(end - start)
    return positions


def attend_packed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Sequence[Span], scale: float | None,
    window: int | None = None, cap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention within each span: query [b, h, n, d], keys and values [b, g, n, d] -> [b, h, n, d]; padding gives zeros.

    window: tokens that each one sees, itself among them. cap, sinks: see `attend`.
    """
    attended = query.new_zeros(*query.shape[:-1], values.shape[-1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for row, start, end in spans:
        if cap is None and sinks is None and (window is None or end - start <= window):
            part = (slice(row, row + 1), slice(None), slice(start, end))
            attended[part] = F.scaled_dot_product_attention(
                query[part], keys[part], values[part], is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
            )
            continue
        for first in range(start, end, BLOCK):
            last, low = min(first + BLOCK, end), start if window is None else max(start, first - window + 1)
            queries, seen = (slice(row, row + 1), slice(None), slice(first, last)), (slice(row, row + 1), slice(None), slice(low, last))
            distance = torch.arange(first - low, last - low, device=query.device)[:, None] - torch.arange(last - low, device=query.device)
            mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            mask = fold_mask(mask[None], query.shape[1] // keys.shape[1], query.dtype)
            attended[queries] = attend(query[queries], keys[seen], values[seen], mask, scale, cap, sinks)
    return attended


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
    cap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention under a folded mask, or over everything with None: query [b, h, n, d], keys and values [b, g, l, d] -> [b, h, n, d].

    Args:
        cap: scores s become cap * tanh(s / cap) (Gemma 2). sinks: [h], a score of each head that takes its share of the softmax and gives
        no value (gpt-oss). Both are worked out in the open, their softmax in fp32, for torch's fused attention knows neither.
    """
    batch, heads, tokens, width = query.shape
    folded = query.reshape(batch, keys.shape[1], -1, width)
    if cap is None and sinks is None:
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = (folded @ keys.transpose(2, 3)).float() * (width**-0.5 if scale is None else scale)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1)
        if sinks is not None:  # exp(s) / (sum exp(s) + exp(sink)) = softmax(s) * sigmoid(logsumexp(s) - sink)
            sink = sinks.float().reshape(1, keys.shape[1], -1, 1).repeat_interleave(tokens, dim=2)
            weights = weights * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink)
        attended = weights.to(values.dtype) @ values
    return attended.reshape(batch, heads, tokens, values.shape[-1])


def attend_cached(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: Visible, scale: float | None,
    window: int | None = None, cap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`attend` to what a `kv_cache.Visible` lets each new token see: keys and values [b, g, l, d], everything that is stored."""
    low, mask = visible.folded(window)
    return attend(query, keys[:, :, low:], values[:, :, low:], mask, scale, cap, sinks)


def _fms_store(
    keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *, slot_mapping: SlotMapping, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seen_keys, seen_values = slot_mapping.store(keys, values, key_cache, value_cache)
    return seen_keys, seen_values, key_cache, value_cache


def _fms_store_nothing(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("packed rows are attended to without a cache")


def _fms_compute_packed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, nheads: int, kvheads: int, p_dropout: float, scale_factor: float | None,
    *, spans: Sequence[Span], **_: Any,
) -> torch.Tensor:  # fmt: skip
    attended = attend_packed(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), spans, scale_factor)
    return attended.transpose(1, 2).contiguous()


def _fms_compute_cached(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, nheads: int, kvheads: int, p_dropout: float, scale_factor: float | None,
    *, visible: Visible, **_: Any,
) -> torch.Tensor:  # fmt: skip
    return attend_cached(query.transpose(1, 2), keys, values, visible, scale_factor).transpose(1, 2).contiguous()


_asked: ContextVar[Any] = ContextVar("spans or Visible of the forward of a `transformers` model that is running")


@contextmanager
def asking(what: Sequence[Span] | Visible) -> Iterator[None]:
    """Within it, layers of `transformers` models attend within these spans (PACKED) or to this `Visible` (CACHED).

    Not an argument of the model's forward, because layers of many architectures don't hand those on to their attention.
    """
    token = _asked.set(what)
    try:
        yield
    finally:
        _asked.reset(token)


def _of_layer(attention: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function of `transformers` that reads what the layer asks for; what it doesn't know, `proof` finds to be missing."""

    def call(
        module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor | None,
        scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        if attention_mask is not None:  # nobody gave it one
            raise ValueError("its layers make attention masks of their own")
        attended = attention(query, keys, values, _asked.get(), scaling, sliding_window, softcap, s_aux)
        return attended.transpose(1, 2).contiguous(), None

    return call


register_attention_op(PACKED, _fms_store_nothing, _fms_compute_packed)
register_attention_op(CACHED, _fms_store, _fms_compute_cached)
AttentionInterface.register(PACKED, _of_layer(attend_packed))
AttentionInterface.register(CACHED, _of_layer(attend_cached))
