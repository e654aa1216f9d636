"""Batches of prompts with the base model's continuations (phase 2), in an order that can be resumed."""

import numpy as np
import torch

from fms_spec.batch import Batch
from fms_spec.errors import UserError


class Continuations:
    """Endless batches of prompts with the base model's continuations.

    The first epoch reads the shards in order, later ones in newly drawn orders; nothing is generated twice.
    """

    def __init__(self, store, batch_size):
        """
        store: ContinuationStore, in which the shards that `needed` names are there before a batch is asked for. batch_size: rows.

        Raises:
            UserError: batch_size is not positive.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self.store, self.batch_size = store, batch_size
        self._epoch, self._index, self._row = 0, 0, 0  # the next row: within the shard at this index of the epoch's order
        self._shards = {}  # (epoch, index) -> useful rows, of those from the present one on that have been read

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch: `batch_size` rows, padded on the right to the longest.

        Raises:
            UserError: a shard is missing, can't be read, or was written with other settings; or no prompt has a continuation.
        """
        return batch_of(self._next_rows())

    def skip(self, count):
        """Pass over `count` batches; raises as `next` does."""
        for _ in range(count):
            self._next_rows()

    def needed(self, batches):
        """Yield (number, begun) of each shard that the next so many batches begin to read, the one after it when that one is there.

        begun: shards of the first epoch that are begun when it is read, itself included. How many rows a shard gives is known once it is
        written: texts that end at once give none. Raises as `next` does.
        """
        (epoch, index), rows, fruitless = (self._epoch, self._index), batches * self.batch_size + self._row, 0
        while rows > 0:
            if (epoch, index) not in self._shards:
                yield self._number(epoch, index), min(self.store.shard_count, (index if epoch == 0 else self.store.shard_count) + 1)
            useful = len(self._rows(epoch, index))
            rows, fruitless = rows - useful, self._fruitless(fruitless, useful)
            epoch, index = self._after(epoch, index)

    def _next_rows(self):
        rows, fruitless = [], 0
        while len(rows) < self.batch_size:
            available = self._rows(self._epoch, self._index)
            taken = available[self._row : self._row + self.batch_size - len(rows)]
            rows.extend(taken)
            self._row += len(taken)
            fruitless = self._fruitless(fruitless, len(taken))
            if self._row >= len(available):
                del self._shards[self._epoch, self._index]
                self._row = 0
                self._epoch, self._index = self._after(self._epoch, self._index)
        return rows

    def _fruitless(self, before, useful):
        """Shards in a row that held no useful row; raises where all of an epoch did."""
        fruitless = 0 if useful else before + 1
        if fruitless > self.store.shard_count:
            raise UserError(f"{self.store.out_dir}: the base model stopped at once after every prompt; use other prompts")
        return fruitless

    @property
    def shards_read(self):
        """Shards of the first epoch that have been read to their end."""
        return self._index if self._epoch == 0 else self.store.shard_count

    def state_dict(self):
        """Where the next batch begins; small, and fit for JSON."""
        position = {"epoch": self._epoch, "place": self._index, "row": self._row}
        return {**position, "seed": self.store.seed, "shard_prompts": self.store.shard_prompts}

    def load_state_dict(self, state):
        """Continue where `state` was taken: the batches are those of an object that was never interrupted.

        Raises:
            UserError: the state is of another seed or shard size.
        """
        for name in ("seed", "shard_prompts"):
            if state[name] != getattr(self.store, name):
                raise UserError(f"continuations: the saved position is for {name} {state[name]}, not {getattr(self.store, name)}")
        self._epoch, self._index, self._row = state["epoch"], state["place"], state["row"]
        self._shards = {}

    def _after(self, epoch, index):
        """(epoch, index) of the shard that follows."""
        return (epoch, index + 1) if index + 1 < self.store.shard_count else (epoch + 1, 0)

    def _number(self, epoch, index):
        """The shard at an index of an epoch's order."""
        return index if epoch == 0 else int(self._generator(epoch).permutation(self.store.shard_count)[index])

    def _rows(self, epoch, index):
        """The useful rows of a shard, in that epoch's order."""
        if (epoch, index) not in self._shards:
            number = self._number(epoch, index)
            rows = self.store.read(number)
            self._shards[epoch, index] = [rows[row] for row in self._generator(epoch, number + 1).permutation(len(rows))]
        return self._shards[epoch, index]

    def _generator(self, epoch, *stream):
        """Random choices of an epoch; `stream` must not be 0, which numpy does not tell from none."""
        return np.random.default_rng((self.store.seed, epoch, *stream))


def batch_of(rows):
    """A Batch from (prompt_id, prompt, continuation) rows, padded on the right."""
    longest = max(len(prompt) + len(continuation) for _, prompt, continuation in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    segment_ids = torch.full_like(tokens, -1, dtype=torch.int32)
    for number, (_, prompt, continuation) in enumerate(rows):
        row = np.concatenate([prompt, continuation])
        tokens[number, : len(row)] = torch.from_numpy(row)
        segment_ids[number, : len(row)] = 0
    first_states = torch.tensor([len(prompt) - 1 for _, prompt, _ in rows])
    return Batch(tokens, segment_ids, first_states, torch.tensor([row_id for row_id, _, _ in rows]))
