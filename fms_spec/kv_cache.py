"""One preallocated cache of keys and values for a batch, shared by all candidates of every sequence.

Shapes: b sequences, n new tokens, g key-value heads, d head width.

A forward stores its tokens behind what each sequence holds; they count only once they are accepted. Accepted candidates of a tree move
up to the place where plain decoding would have put them, and nothing else ever moves: what was rejected is overwritten by the next
forward. Nothing is concatenated, expanded or copied per candidate, so the bytes are those of the longest text plus one tree.
"""

import torch


class KVCache:
    """Keys and values of every layer, allocated once: [layers, 2, b, capacity, g, d].

    counts: list of b ints, tokens each sequence holds, on the host, so that no forward waits for the device to know its shapes.
    lengths: the same as int64 [b] on the device.
    """

    def __init__(self, layers, batch, capacity, groups, width, dtype, device):
        # Zeros, not empty: a shorter sequence's unused slots are read under a mask, and 0 x NaN would be NaN.
        self.store = torch.zeros(layers, 2, batch, capacity, groups, width, dtype=dtype, device=device)
        self.hold([0] * batch)

    def hold(self, counts):
        """From now on sequence i holds its first counts[i] slots."""
        self.counts = counts
        self.lengths = torch.tensor(counts, device=self.store.device)

    def layer(self, index):
        """(keys, values) of one layer, each [b, capacity, g, d], views."""
        return self.store[index, 0], self.store[index, 1]

    def place(self, count):
        """Where the next `count` tokens of every sequence go."""
        return Place(self, count)

    def accept(self, paths):
        """Keep, of the tokens of the last forward, those at `paths`: for each sequence ascending indices, from 0, into its n tokens."""
        moves = [(row, to, come) for row, path in enumerate(paths) for to, come in enumerate(path) if to != come]
        if moves:
            rows, to, come = torch.tensor(moves, device=self.store.device).unbind(1)
            behind = self.lengths[rows]
            self.store[:, :, rows, behind + to] = self.store[:, :, rows, behind + come]
        self.hold([count + len(path) for count, path in zip(self.counts, paths)])

    def keep_sequences(self, kept):
        """Drop finished sequences: `kept` list of m ints, ascending. Moves the survivors to the front in place, layer by layer."""
        index = torch.tensor(kept, device=self.store.device)
        for layer in self.store:
            layer[:, : len(kept)] = layer[:, index]
        self.store = self.store[:, :, : len(kept)]
        self.hold([self.counts[row] for row in kept])


class Place:
    """Slots behind what each sequence holds, for one forward over all layers.

    slots: int64 [b, n]. end: one past the last slot of the longest sequence.
    """

    def __init__(self, cache, count):
        self.end = max(cache.counts) + count
        self.slots = cache.lengths[:, None] + torch.arange(count, device=cache.store.device)
        # Sequences of equal length, one above all, are written as a slice: two copies a layer instead of two scatters.
        self.start = self.end - count if min(cache.counts) == max(cache.counts) else None
        self.rows = torch.arange(len(cache.counts), device=cache.store.device)[:, None]

    def store(self, keys, values, key_cache, value_cache):
        """Write keys and values [b, n, g, d]; return everything there is to attend to, views [b, g, end, d]."""
        index = (self.rows, self.slots) if self.start is None else (slice(None), slice(self.start, self.end))
        key_cache[index], value_cache[index] = keys, values
        return key_cache[:, : self.end].transpose(1, 2), value_cache[:, : self.end].transpose(1, 2)


def visible(cache, place, tree=None):
    """Which slots each new token sees: bool [b, n, end]; None where each sees all of them.

    Args:
        tree: `candidates.Tree` of the new tokens; None where they are a text, each seeing those before it.
    """
    if place.start is not None and place.slots.shape[1] == 1:
        return None
    slots = torch.arange(place.end, device=place.slots.device)
    if tree is None:
        return slots <= place.slots[:, :, None]
    batch, count = place.slots.shape
    held = (slots < cache.lengths[:, None, None]).expand(batch, count, -1)
    return held.scatter(2, place.slots[:, None].expand(batch, count, count), tree.ancestors.expand(batch, -1, -1))


class TransformersCacheView:
    """What a `transformers` attention layer sees of a `KVCache` for one forward: an `update` that stores in place."""

    def __init__(self, cache, place):
        self.cache, self.place = cache, place

    def update(self, keys, values, layer_index, *_, **__):
        """keys, values [b, g, n, d] -> everything stored so far, views [b, g, end, d]."""
        return self.place.store(keys.transpose(1, 2), values.transpose(1, 2), *self.cache.layer(layer_index))
