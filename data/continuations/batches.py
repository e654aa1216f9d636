"""Batches of prompts with the base model's continuations (phase 2), in an order that can be resumed."""

import numpy as np
import torch

from fms_spec.batch import Batch
from fms_spec.errors import UserError


class Continuations:
    """Endless batches of prompts with the base model's continuations.

    The first epoch reads the shards in order, later ones in newly drawn orders; nothing is generated twice.
    """

    def __init__(self, store, supply, batch_size):
        """
        store: ContinuationStore. supply: of data.continuations.supply; has each shard there before it is read. batch_size: rows.

        Raises:
            UserError: batch_size is not positive.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self.store, self.supply, self.batch_size = store, supply, batch_size
        self._epoch, self._place, self._row = 0, 0, 0  # the next row: within the shard at this place of the epoch's order
        self._loaded, self._rows = None, None

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch: `batch_size` rows, padded on the right to the longest.

        Raises:
            UserError: a shard cannot be had or read, or was written with other settings; or no prompt has a continuation.
        """
        return batch_of(self._next_rows())

    def skip(self, count):
        """Pass over `count` batches; raises as `next` does."""
        for _ in range(count):
            self._next_rows()

    def _next_rows(self):
        rows, fruitless = [], 0
        while len(rows) < self.batch_size:
            available = self._current()
            taken = available[self._row : self._row + self.batch_size - len(rows)]
            rows.extend(taken)
            self._row += len(taken)
            fruitless = 0 if taken else fruitless + 1
            if fruitless > self.store.shard_count:  # no shard of a whole epoch held a row
                raise UserError(f"{self.store.out_dir}: the base model stopped at once after every prompt; use other prompts")
            if self._row >= len(available):
                self._advance()
        return rows

    @property
    def shards_read(self):
        """Shards of the first epoch that have been read to their end."""
        return self._place if self._epoch == 0 else self.store.shard_count

    def state_dict(self):
        """Where the next batch begins; small, and fit for JSON."""
        position = {"epoch": self._epoch, "place": self._place, "row": self._row}
        return {**position, "seed": self.store.seed, "shard_prompts": self.store.shard_prompts}

    def load_state_dict(self, state):
        """Continue where `state` was taken: the batches are those of an object that was never interrupted.

        Raises:
            UserError: the state is of another seed or shard size.
        """
        for name in ("seed", "shard_prompts"):
            if state[name] != getattr(self.store, name):
                raise UserError(f"continuations: the saved position is for {name} {state[name]}, not {getattr(self.store, name)}")
        self._epoch, self._place, self._row = state["epoch"], state["place"], state["row"]

    def _current(self):
        """The useful rows of the shard at the present place, in this epoch's order."""
        if self._loaded != (self._epoch, self._place):
            self._loaded, self._rows = None, None
            count = self.store.shard_count
            order = np.arange(count) if self._epoch == 0 else self._generator().permutation(count)
            index = int(order[self._place])
            self.supply.need(index, min(count, self.shards_read + 1))
            rows = self.store.read(index)
            self._rows = [rows[number] for number in self._generator(index + 1).permutation(len(rows))]
            self._loaded = (self._epoch, self._place)
        return self._rows

    def _advance(self):
        self._place, self._row = self._place + 1, 0
        if self._place == self.store.shard_count:
            self._epoch, self._place = self._epoch + 1, 0

    def _generator(self, *stream):
        """Random choices of this epoch; `stream` must not be 0, which numpy does not tell from none."""
        return np.random.default_rng((self.store.seed, self._epoch, *stream))


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
