"""Attention over packed rows and over a preallocated cache (`kv_cache`), for both base-model backends.

Shapes: b batch, n query tokens, l cached tokens, h query heads, g key-value heads, d head width.

Two ways to attend, chosen per call:
- packed: a row holds several documents one after the other; no token sees another document. Each document is a causal attention of
  its own, so the cost is the sum of the documents' squares and no mask is ever built.
- cached: new tokens are stored in place and attend to whatever a boolean mask allows, be they a chain or a candidate tree. ibm-fms's own
  op without a mask takes a top-left causal one, silently wrong as soon as more than one token meets a filled cache; ours is never causal by
  itself.

Grouped-query heads are never expanded: the query heads that share a key-value head are laid side by side as further query rows.
"""

import torch
from fms.modules.attention import register_attention_op
from torch.nn import functional as F
from transformers import AttentionInterface

PACKED = "fms_spec_packed"
CACHED = "fms_spec_cached"


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


def attend_packed(query, keys, values, spans, scale):
    """Causal attention within each span: query [b, h, n, d], keys and values [b, g, n, d] -> [b, h, n, d]; padding gives zeros."""
    attended = torch.zeros_like(query)
    for row, start, end in spans:
        part = (slice(row, row + 1), slice(None), slice(start, end))
        attended[part] = F.scaled_dot_product_attention(
            query[part], keys[part], values[part], is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
    return attended


def fold_mask(mask, shared, dtype):
    """A boolean mask as `attend_masked` adds it, made once for all layers: bool [b, n, l] -> dtype [b, 1, shared * n, l].

    Args:
        shared: query heads per key-value head, h / g.
    """
    batch, tokens, length = mask.shape
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added[:, None].expand(batch, shared, tokens, length).reshape(batch, 1, shared * tokens, length)


def attend_masked(query, keys, values, mask, scale):
    """Attention under a folded mask, or over everything with None: query [b, h, n, d], keys and values [b, g, l, d] -> [b, h, n, d]."""
    batch, heads, tokens, width = query.shape
    folded = query.reshape(batch, keys.shape[1], -1, width)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, tokens, width)


def _fms_store(keys, values, key_cache, value_cache, *, place, **_):
    seen_keys, seen_values = place.store(keys, values, key_cache, value_cache)
    return seen_keys, seen_values, key_cache, value_cache


def _fms_store_nothing(*_, **__):
    raise AssertionError("packed rows are attended to without a cache")


def _fms_compute_packed(query, keys, values, nheads, kvheads, p_dropout, scale_factor, *, spans, **_):
    attended = attend_packed(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), spans, scale_factor)
    return attended.transpose(1, 2).contiguous()


def _fms_compute_cached(query, keys, values, nheads, kvheads, p_dropout, scale_factor, *, mask, **_):
    return attend_masked(query.transpose(1, 2), keys, values, mask, scale_factor).transpose(1, 2).contiguous()


def _transformers_packed(module, query, keys, values, attention_mask, *, spans, scaling=None, **_):
    return attend_packed(query, keys, values, spans, scaling).transpose(1, 2).contiguous(), None


def _transformers_cached(module, query, keys, values, attention_mask, *, mask, scaling=None, **_):
    return attend_masked(query, keys, values, mask, scaling).transpose(1, 2).contiguous(), None


register_attention_op(PACKED, _fms_store_nothing, _fms_compute_packed)
register_attention_op(CACHED, _fms_store, _fms_compute_cached)
AttentionInterface.register(PACKED, _transformers_packed)
AttentionInterface.register(CACHED, _transformers_cached)
