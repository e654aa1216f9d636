"""The base model's continuations of prompts (phase 2): written once, read ever after.

The base model is frozen, so what it writes never depends on the speculator: shards may be written ahead, alongside or inline.
Shapes: p prompts of a shard, b batch, n prompt and continuation.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.manifest import reason, shown
from data.tables import column
from fms_spec.batch import Batch
from fms_spec.errors import UserError, first_difference

FINISH_REASONS = ("stop", "length")
# Head 0 sees the state at the end of the prompt and the first token after it, and predicts the second: fewer teach nothing.
USEFUL_TOKENS = 2

SCHEMA = pa.schema(
    [
        column("prompt_id", pa.int64(), "number of the prompt in the prompt table", "count from 0"),
        column("prompt", pa.list_(pa.int32()), "the prompt", "token id"),
        column("continuation", pa.list_(pa.int32()), "what the base model wrote after it", "token id"),
        column("finish_reason", pa.string(), "stop: ended by itself; length: cut at the asked length", "word"),
    ]
)


class Continuations:
    """Endless batches of prompts with the base model's continuations, generating what is not there yet.

    Shard i holds the continuations of the i-th block of `shard_prompts` prompts, in an order drawn from the seed. The first
    epoch reads the shards in order, later ones in newly drawn orders; nothing is generated twice.
    """

    def __init__(self, out_dir, prompts, generate, *, shard_prompts, batch_size, settings, seed):
        """
        out_dir: folder of the shards, made when the first is written
        prompts: data.reader.Prompts
        generate: called with (prompt tokens int64 [p, length], shard number); returns a list of p continuations (1-D int64
            tensors) and a list of p finish reasons, "stop" or "length"
        settings: what decides the continuations besides the prompts, fit for JSON: the base model's fingerprint, the engine's
            name, the sampling. Kept in each shard; a shard of other settings is refused.

        Raises:
            UserError: there are no prompts, or a size is not positive.
        """
        if not len(prompts):
            raise UserError("the prompt table is empty, no document is long enough; prepare with a smaller --prompt_length")
        if shard_prompts < 1 or batch_size < 1:
            raise UserError(f"shard_prompts {shard_prompts} and batch_size {batch_size} must be at least 1")
        self.out_dir, self.prompts, self.generate, self.seed = Path(out_dir), prompts, generate, seed
        self.shard_prompts, self.batch_size = shard_prompts, batch_size
        digest = hashlib.sha256(prompts.ids.numpy().tobytes() + prompts.tokens.numpy().tobytes()).hexdigest()
        made_by = {**settings, "seed": seed, "shard_prompts": shard_prompts, "prompts_sha256": digest}
        self.made_by = json.loads(json.dumps(made_by))  # as it will be read back: tuples are lists
        self._prompt_order = np.random.default_rng(seed).permutation(len(prompts))
        self._epoch, self._place, self._row = 0, 0, 0  # the next row: within the shard at this place of the epoch's order
        self._loaded, self._rows = None, None
        self.generate_seconds = 0.0  # spent in `generate` by this object

    @property
    def shard_count(self):
        """Shards of an epoch."""
        return -(-len(self.prompts) // self.shard_prompts)

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch: `batch_size` rows, padded on the right to the longest.

        Raises:
            UserError: a shard cannot be read or was written with other settings; or no prompt has a continuation.
        """
        rows, fruitless = [], 0
        while len(rows) < self.batch_size:
            available = self._current()
            taken = available[self._row : self._row + self.batch_size - len(rows)]
            rows.extend(taken)
            self._row += len(taken)
            fruitless = 0 if taken else fruitless + 1
            if fruitless > self.shard_count:  # no shard of a whole epoch held a row
                raise UserError(f"{self.out_dir}: the base model stopped at once after every prompt; use other prompts")
            if self._row >= len(available):
                self._advance()
        return batch_of(rows)

    def state_dict(self):
        """Where the next batch begins; small, and fit for JSON."""
        position = {"epoch": self._epoch, "place": self._place, "row": self._row}
        return {**position, "seed": self.seed, "shard_prompts": self.shard_prompts}

    def load_state_dict(self, state):
        """Continue where `state` was taken: the batches are those of an object that was never interrupted.

        Raises:
            UserError: the state is of another seed or shard size.
        """
        for name in ("seed", "shard_prompts"):
            if state[name] != getattr(self, name):
                raise UserError(f"continuations: the saved position is for {name} {state[name]}, not {getattr(self, name)}")
        self._epoch, self._place, self._row = state["epoch"], state["place"], state["row"]

    def path(self, index):
        """The file of shard `index`."""
        return self.out_dir / f"continuations-{index:05d}.parquet"

    def ensure_shard(self, index):
        """Write shard `index` unless it is there, e.g. ahead of training. Returns True if it was written now."""
        if self.path(index).exists():
            return False
        tokens, ids = self._block(index)
        started = time.monotonic()
        continuations, finish_reasons = self.generate(tokens, index)
        self.generate_seconds += time.monotonic() - started
        write_shard(self.path(index), ids, tokens, continuations, finish_reasons, self.made_by)
        return True

    def _block(self, index):
        """Prompt tokens int64 [p, length] and ids int64 [p] of shard `index`."""
        chosen = torch.from_numpy(self._prompt_order[index * self.shard_prompts : (index + 1) * self.shard_prompts])
        return self.prompts.tokens[chosen], self.prompts.ids[chosen]

    def _current(self):
        """The useful rows of the shard at the present place, in this epoch's order."""
        if self._loaded != (self._epoch, self._place):
            self._loaded, self._rows = None, None
            order = np.arange(self.shard_count) if self._epoch == 0 else self._generator().permutation(self.shard_count)
            index = int(order[self._place])
            self.ensure_shard(index)
            rows = read_shard(self.path(index), self.made_by)
            self._rows = [rows[number] for number in self._generator(index + 1).permutation(len(rows))]
            self._loaded = (self._epoch, self._place)
        return self._rows

    def _advance(self):
        self._place, self._row = self._place + 1, 0
        if self._place == self.shard_count:
            self._epoch, self._place = self._epoch + 1, 0

    def _generator(self, *stream):
        """Random choices of this epoch; `stream` must not be 0, which numpy does not tell from none."""
        return np.random.default_rng((self.seed, self._epoch, *stream))


def write_shard(path, prompt_ids, prompts, continuations, finish_reasons, made_by):
    """Write one shard so that it is there whole or not at all.

    prompt_ids: int64 [p]; prompts: int64 [p, length]; continuations: p 1-D int64 tensors; finish_reasons: p strings; made_by:
    what decided the continuations, kept in the file.

    Raises:
        ValueError: the lists differ in length, or a finish reason is unknown.
        UserError: the folder cannot be written.
    """
    if not len(prompt_ids) == len(prompts) == len(continuations) == len(finish_reasons):
        raise ValueError(f"{len(prompt_ids)} prompts, {len(continuations)} continuations, {len(finish_reasons)} finish reasons")
    if not set(finish_reasons) <= set(FINISH_REASONS):
        raise ValueError(f"finish reasons are {FINISH_REASONS}, got {sorted(set(finish_reasons))}")
    columns = [
        prompt_ids.tolist(),
        prompts.tolist(),
        [continuation.tolist() for continuation in continuations],
        list(finish_reasons),
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA)]
    schema = SCHEMA.with_metadata({"made_by": json.dumps(made_by, sort_keys=True)})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), partial, compression="zstd")
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def read_shard(path, made_by):
    """The useful rows of a shard: a list of (prompt_id, prompt int64 [length], continuation int64 [m]), as numpy arrays.

    Raises:
        UserError: the file cannot be read, or its settings differ from `made_by`; names the file or the setting.
    """
    try:
        table = pq.read_table(path)
        found = json.loads(table.schema.metadata[b"made_by"])
        columns = [table.column(name) for name in ("prompt_id", "prompt", "continuation")]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        mend = "delete it: it will be written again"
        raise UserError(f"{path}: cannot be read, it may be cut short ({reason(error)}); {mend}") from None
    difference = first_difference(found, made_by)
    if difference:
        name, before, now = difference
        mend = "use another folder or delete it"
        raise UserError(f"{path}: written with another {name} ({shown(before)} there, {shown(now)} asked); {mend}")
    ids, *lists = columns
    prompts, continuations = ([part.values.to_numpy().astype(np.int64) for part in column] for column in lists)
    return [row for row in zip(ids.to_pylist(), prompts, continuations) if len(row[2]) >= USEFUL_TOKENS]


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
