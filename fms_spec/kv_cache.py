"""One preallocated cache of keys and values for a batch, shared by all candidates of every sequence.

Shapes: b sequences, n new tokens, l cached tokens, h query heads, g key-value heads, d head width.

A forward stores its tokens behind what each sequence holds; they count only once they are accepted. Accepted candidates of a tree move
up to the slots where plain decoding would have put them, and nothing else ever moves: what was rejected is overwritten by the next
forward. Nothing is concatenated, expanded or copied per candidate, so the bytes are those of the longest text plus one tree.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fms_spec.candidates import Tree


class KVCache:
    """Keys and values of every layer, allocated once: [layers, 2, b, capacity, g, d].

    counts: list of b ints, tokens each sequence holds, on the host, so that no forward waits for the device to know its shapes.
    lengths: the same as int64 [b] on the device.
    """

    def __init__(self, layers: int, batch: int, capacity: int, groups: int, width: int, dtype: torch.dtype, device: torch.device):
        # Zeros, not empty: a shorter sequence's unused slots are read under a mask, and 0 x NaN would be NaN.
        self.store = torch.zeros(layers, 2, batch, capacity, groups, width, dtype=dtype, device=device)
        self.hold([0] * batch)

    def hold(self, counts: list[int]) -> None:
        """From now on sequence i holds its first counts[i] slots."""
        self.counts = counts
        self.lengths = torch.tensor(counts, device=self.store.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer, each [b, capacity, g, d], views."""
        return self.store[index, 0], self.store[index, 1]

    def slot_mapping(self, count: int) -> "SlotMapping":
        """Where the next `count` tokens of every sequence go."""
        return SlotMapping(self, count)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of the tokens of the last forward, those at `paths`: for each sequence ascending indices, from 0, into its n tokens."""
        moves = [(row, to, come) for row, path in enumerate(paths) for to, come in enumerate(path) if to != come]
        if moves:
            rows, to, come = torch.tensor(moves, device=self.store.device).unbind(1)
            behind = self.lengths[rows]
            self.store[:, :, rows, behind + to] = self.store[:, :, rows, behind + come]
        self.hold([count + len(path) for count, path in zip(self.counts, paths)])

    def keep_sequences(self, kept: list[int]) -> None:
        """Drop finished sequences: `kept` list of m ints, ascending. Moves the survivors to the front in place, layer by layer."""
        index = torch.tensor(kept, device=self.store.device)
        for layer in self.store:
            layer[:, : len(kept)] = layer[:, index]
        self.store = self.store[:, :, : len(kept)]
        self.hold([self.counts[row] for row in kept])


class SlotMapping:
    """Slots behind what each sequence holds, for one forward over all layers.

    slots: int64 [b, n]. end: one past the last slot of the longest sequence.
    """

    def __init__(self, cache: KVCache, count: int):
        self.end = max(cache.counts) + count
        self.slots = cache.lengths[:, None] + torch.arange(count, device=cache.store.device)
        # Sequences of equal length, one above all, are written as a slice: two copies a layer instead of two scatters.
        self.start = self.end - count if min(cache.counts) == max(cache.counts) else None
        self.rows = torch.arange(len(cache.counts), device=cache.store.device)[:, None]

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [b, n, g, d]; return everything there is to attend to, views [b, g, end, d]."""
        index = (self.rows, self.slots) if self.start is None else (slice(None), slice(self.start, self.end))
        key_cache[index], value_cache[index] = keys, values
        return key_cache[:, : self.end].transpose(1, 2), value_cache[:, : self.end].transpose(1, 2)


class Visible:
    """Which slots each new token of a forward sees, as masks made once for all layers that have the same window.

    Args:
        tree: `candidates.Tree` of the new tokens, which then see what the cache holds and their ancestors; None where they are a text, each
            seeing those before it. shared, dtype: see `fold_mask`.

    Attributes:
        positions: int64 [b, n], of each new token in its text; slots hold the text in order, and behind it the new tokens.
    """

    def __init__(self, cache: KVCache, slot_mapping: SlotMapping, tree: Tree | None, shared: int, dtype: torch.dtype):
        self.cache, self.slot_mapping, self.tree, self.shared, self.dtype = cache, slot_mapping, tree, shared, dtype
        self.positions = slot_mapping.slots if tree is None else cache.lengths[:, None] + tree.depths
        self.masks: dict[int | None, tuple[int, torch.Tensor | None]] = {}

    def folded(self, window: int | None = None) -> tuple[int, torch.Tensor | None]:
        """(first slot that any of them sees, folded mask over the slots from there on; None where each sees all of them)."""
        if window not in self.masks:
            # The earliest of the new tokens stands right behind what its sequence holds.
            low = 0 if window is None else max(0, min(self.cache.counts) + 1 - window)
            mask = self.mask(window)
            self.masks[window] = low, None if mask is None else fold_mask(mask[:, :, low:], self.shared, self.dtype)
        return self.masks[window]

    def mask(self, window: int | None) -> torch.Tensor | None:
        """bool [b, n, end], or None."""
        slots = torch.arange(self.slot_mapping.end, device=self.positions.device)
        batch, count = self.positions.shape
        if self.slot_mapping.start is not None and count == 1:  # `folded` begins where its window does
            return None
        if self.tree is None:
            mask = slots <= self.positions[:, :, None]
            standing = slots
        else:
            held = (slots < self.cache.lengths[:, None, None]).expand(batch, count, -1)
            mask = held.scatter(2, self.slot_mapping.slots[:, None].expand(batch, count, count), self.tree.ancestors.expand(batch, -1, -1))
            standing = slots.expand(batch, -1).scatter(1, self.slot_mapping.slots, self.positions)[:, None]  # siblings share a position
        return mask if window is None else mask & (standing > self.positions[:, :, None] - window)


def fold_mask(mask: torch.Tensor, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as `attention.attend` adds it, made once for all layers: bool [b, n, l] -> dtype [b, 1, shared * n, l].

    Args:
        shared: query heads per key-value head, h / g.
    """
    batch, tokens, length = mask.shape
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added[:, None].expand(batch, shared, tokens, length).reshape(batch, 1, shared * tokens, length)


class TransformersCacheView:
    """What a `transformers` model sees of a `KVCache` for one forward: an `update` that stores in place."""

    is_compileable = False

    def __init__(self, cache: KVCache, slot_mapping: SlotMapping):
        self.cache, self.slot_mapping = cache, slot_mapping

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values [b, g, n, d] -> everything stored so far, views [b, g, end, d].

        Raises:
            ValueError: a layer with other keys or values than the cache holds.
        """
        held, shapes = self.cache.store.shape[-2:], [(part.shape[1], part.shape[3]) for part in (keys, values)]
        if shapes != [tuple(held)] * 2:
            raise ValueError(f"layer {layer_index} has keys and values of (heads, width) {shapes}, the config says {tuple(held)} for both")
        return self.slot_mapping.store(keys.transpose(1, 2), values.transpose(1, 2), *self.cache.layer(layer_index))

    def get_seq_length(self, *_: Any) -> int:
        return max(self.cache.counts)
