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

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from fms.modules.attention import register_attention_op
from torch.nn import functional as F
from transformers import AttentionInterface

PACKED = "fms_spec_packed"
CACHED = "fms_spec_cached"
BLOCK = 512  # queries of a windowed or soft-capped document that are attended for together: bounds the scores, 4 bytes x h x 512 x l


def document_spans(segment_ids):
    """Where each document of a packed batch lies.

    Args:
        segment_ids: int [b, n] on the CPU (reading spans off a GPU would wait for it); equal neighbours belong to one document,
            -1 is padding and belongs to none.

    Returns:
        list of (row, start, end), end exclusive.
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


def span_positions(segment_ids):
    """Position of each token within its document: int64 [b, n], restarting at 0 with every document."""
    positions = torch.zeros_like(segment_ids, dtype=torch.int64)
    for row, start, end in document_spans(segment_ids):
        positions[row, start:end] = torch.arange(end - start)
    return positions


def attend_packed(query, keys, values, spans, scale, window=None, cap=None, sinks=None):
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


def fold_mask(mask, shared, dtype):
    """A boolean mask as `attend` adds it, made once for all layers: bool [b, n, l] -> dtype [b, 1, shared * n, l].

    Args:
        shared: query heads per key-value head, h / g.
    """
    batch, tokens, length = mask.shape
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added[:, None].expand(batch, shared, tokens, length).reshape(batch, 1, shared * tokens, length)


def attend(query, keys, values, mask, scale, cap=None, sinks=None):
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


def attend_cached(query, keys, values, visible, scale, window=None, cap=None, sinks=None):
    """`attend` to what a `kv_cache.Visible` lets each new token see: keys and values [b, g, l, d], everything that is stored."""
    low, mask = visible.folded(window)
    return attend(query, keys[:, :, low:], values[:, :, low:], mask, scale, cap, sinks)


def _fms_store(keys, values, key_cache, value_cache, *, place, **_):
    seen_keys, seen_values = place.store(keys, values, key_cache, value_cache)
    return seen_keys, seen_values, key_cache, value_cache


def _fms_store_nothing(*_, **__):
    raise AssertionError("packed rows are attended to without a cache")


def _fms_compute_packed(query, keys, values, nheads, kvheads, p_dropout, scale_factor, *, spans, **_):
    attended = attend_packed(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), spans, scale_factor)
    return attended.transpose(1, 2).contiguous()


def _fms_compute_cached(query, keys, values, nheads, kvheads, p_dropout, scale_factor, *, visible, **_):
    return attend_cached(query.transpose(1, 2), keys, values, visible, scale_factor).transpose(1, 2).contiguous()


_asked = ContextVar("spans or Visible of the forward of a `transformers` model that is running")


@contextmanager
def asking(what):
    """Within it, layers of `transformers` models attend within these spans (PACKED) or to this `Visible` (CACHED).

    Not an argument of the model's forward, because layers of many architectures don't hand those on to their attention.
    """
    token = _asked.set(what)
    try:
        yield
    finally:
        _asked.reset(token)


def _of_layer(attention):
    """An attention function of `transformers` that reads what the layer asks for; what it doesn't know, `proof` finds to be missing."""

    def call(module, query, keys, values, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_):
        if attention_mask is not None:  # nobody gave it one
            raise ValueError("its layers make attention masks of their own")
        attended = attention(query, keys, values, _asked.get(), scaling, sliding_window, softcap, s_aux)
        return attended.transpose(1, 2).contiguous(), None

    return call


register_attention_op(PACKED, _fms_store_nothing, _fms_compute_packed)
register_attention_op(CACHED, _fms_store, _fms_compute_cached)
AttentionInterface.register(PACKED, _of_layer(attend_packed))
AttentionInterface.register(CACHED, _of_layer(attend_cached))
