"""The base model's continuations of one prompt table, as Parquet shards that several processes write and read at once.

The base model is frozen, so what it writes never depends on the speculator: shards may be written ahead, alongside or inline.
Shapes: p prompts of a shard, m tokens of a continuation.
"""

import hashlib
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data.continuations.shard import REWRITE, lists_of, read_made_by, read_shard, shard_bytes
from data.manifest import MANIFEST, Count, Known, Shard, check_seed, checked, shown
from data.parquet import shard_entry
from fms_spec.errors import UserError, first_difference
from fms_spec.files import cannot_write, let_go, locked, read_json, write_whole

# Head 0 sees the state at the end of the prompt and the first token after it, and predicts the second: fewer teach nothing.
USEFUL_TOKENS = 2
READER = "reader.json"


class ShardsManifest(Known):
    made_by: dict
    rows: Count
    tokens: Count
    shards: list[Shard]


class ReaderRecord(Known):
    shards_begun: Count


class ContinuationStore:
    """Shard i holds the continuations of the i-th block of `shard_prompts` prompts, in an order drawn from the seed.

    A writer claims a shard before it works on it. A claim is a file lock, let go by the system when its process ends, however it ends.
    """

    def __init__(self, out_dir, prompts, *, shard_prompts, settings, seed):
        """
        out_dir: folder of the shards, made when the first is claimed
        prompts: data.reader.Prompts
        settings: what decides the continuations besides the prompts, fit for JSON: the base model's fingerprint, the engine's
            name, the sampling. Kept in each shard.

        Raises:
            UserError: there are no prompts, a size is not positive, the seed is not from 0 to 2^63 - 1, or the folder holds other files
                or shards of other settings.
        """
        check_seed(seed, f"seed {seed}")
        if not len(prompts):
            raise UserError("the prompt table is empty, no document is long enough; prepare with a smaller --prompt_length")
        if shard_prompts < 1:
            raise UserError(f"shard_prompts {shard_prompts}: must be at least 1")
        self.out_dir, self.prompts, self.shard_prompts, self.seed = Path(out_dir), prompts, shard_prompts, seed
        parts, lengths = [prompts.ids, *prompts.tokens], {len(tokens) for tokens in prompts.tokens}
        if len(lengths) > 1:  # otherwise their number and all their tokens tell where each ends
            parts.append(torch.tensor([len(tokens) for tokens in prompts.tokens]))
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        made_by = {**settings, "seed": seed, "shard_prompts": shard_prompts, "prompts_sha256": digest}
        self.made_by = json.loads(json.dumps(made_by))  # as it will be read back: tuples are lists
        self._prompt_order = np.random.default_rng(seed).permutation(len(prompts))
        self._check_folder()

    @property
    def shard_count(self):
        """Shards of the whole prompt table."""
        return -(-len(self.prompts) // self.shard_prompts)

    def path(self, index):
        """The file of shard `index`."""
        return self.out_dir / f"continuations-{index:05d}.parquet"

    def has(self, index):
        """Whether shard `index` is there."""
        return self.path(index).exists()

    def block(self, index):
        """Prompts, a list of p int64 [length], and ids int64 [p] of shard `index`."""
        chosen = torch.from_numpy(self._prompt_order[index * self.shard_prompts : (index + 1) * self.shard_prompts])
        return [self.prompts.tokens[number] for number in chosen], self.prompts.ids[chosen]

    def read(self, index):
        """The useful rows of a shard: a list of (prompt_id, prompt int64 [length], continuation int64 [m]), as numpy arrays.

        Raises:
            UserError: the file cannot be read or was written with other settings; names the file and the setting.
        """
        return [row[:3] for row in self.rows(index) if len(row[2]) >= USEFUL_TOKENS]

    def rows(self, index):
        """All rows of a shard, each with its finish reason behind what `read` has; raises as that."""
        ids, *lists, reasons = self._table(index).columns
        prompts, continuations = ([part.values.to_numpy().astype(np.int64) for part in column] for column in lists)
        return list(zip(ids.to_pylist(), prompts, continuations, reasons.to_pylist()))

    def claim(self, index):
        """A `Claim` on shard `index`, or None: the shard is there, or another live claim holds it.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.has(index):
            return None
        lock = self._lock(self.path(index).name)
        if lock is None:
            return None
        claim = Claim(self, index, lock)
        if self.has(index):  # written while the lock was sought
            claim.release()
            return None
        remove_partials(lock)
        return claim

    def finish(self, environment):
        """Write manifest.json once every shard is there, and return it; None while shards are missing.

        environment: what the shards were written with (command, versions, git revision), fit for JSON.

        Raises:
            UserError: a shard cannot be read, or the manifest cannot be written.
        """
        self.sweep()
        if not all(map(self.has, range(self.shard_count))):
            return None
        shards = [shard_entry(self.path(index), len(self.block(index)[1])) for index in range(self.shard_count)]
        existing = self._manifest()
        if existing and existing["shards"] == shards:
            return existing
        tokens, finish_reasons = 0, Counter()
        for index in range(self.shard_count):
            table = self._table(index)
            tokens += len(table.column("continuation").combine_chunks().values)
            finish_reasons.update(table.column("finish_reason").to_pylist())
        counts = {"rows": len(self.prompts), "tokens": tokens, "finish_reasons": dict(finish_reasons)}
        manifest = {"made_by": self.made_by, **counts, "shards": shards, "environment": environment}
        self._write(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        return manifest

    def sweep(self):
        """Remove the locks and half-written files of processes that were killed; in a folder that may only be read, they stay."""
        with suppress(OSError):
            for path in sorted({*self.out_dir.glob(".*.lock"), *map(self._lock_path, (MANIFEST, READER))}):
                lock = locked(path)
                if lock:
                    remove_partials(lock)
                    let_go(lock)

    def post_shards_begun(self, count):
        """Tell writers how many shards of the first epoch the reader has begun."""
        self._write(READER, json.dumps({"shards_begun": count}))

    def shards_begun(self):
        """What `post_shards_begun` told last; 0 before."""
        path = self.out_dir / READER
        if not path.exists():
            return 0
        values = read_json(path, "delete it")
        checked(ReaderRecord, values, path, "delete it")
        return values["shards_begun"]

    def _check_folder(self):
        """Raise UserError if the folder holds other files, or its manifest or a shard was made with other settings."""
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"{self.out_dir}: is a file; give a folder for the continuations")
        names = sorted(os.listdir(self.out_dir)) if self.out_dir.exists() else []
        foreign = [name for name in names if not name.startswith((".", "continuations-")) and name not in (MANIFEST, READER)]
        if foreign:
            raise UserError(f"{self.out_dir} holds other files ({foreign[0]}); give an empty or new folder for the continuations")
        manifest = self._manifest()
        if manifest:
            self._refuse_others(self.out_dir / MANIFEST, manifest["made_by"])
        for index in filter(self.has, range(self.shard_count)):
            self._refuse_others(self.path(index), read_made_by(self.path(index)))

    def _manifest(self):
        path = self.out_dir / MANIFEST
        if not path.exists():
            return None
        manifest = read_json(path, REWRITE)
        checked(ShardsManifest, manifest, path, REWRITE)
        return manifest

    def _table(self, index):
        """A shard's whole table, checked to be of these settings and prompts."""
        path, (prompts, ids) = self.path(index), self.block(index)
        table, made_by = read_shard(path)
        self._refuse_others(path, made_by)
        if table.column("prompt_id").to_pylist() != ids.tolist() or table.column("prompt").to_pylist() != lists_of(prompts):
            raise UserError(f"{path}: holds other prompts than shard {index} of these; {REWRITE}")
        return table

    def _lock_path(self, name):
        return self.out_dir / f".{name}.lock"

    def _lock(self, name):
        """The sole right to write a file of the folder, or None if another process has it."""
        path = self._lock_path(name)
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            return locked(path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def _write(self, name, text):
        """Write a file of the folder, unless another process is just writing it."""
        lock = self._lock(name)
        if lock:
            try:
                write_whole(self.out_dir / name, text.encode())
            finally:
                let_go(lock)

    def _refuse_others(self, path, made_by):
        difference = first_difference(made_by, self.made_by)
        if difference:
            name, before, now = difference
            mend = "use another folder or delete it"
            raise UserError(f"{path}: written with another {name} ({shown(before)} there, {shown(now)} asked); {mend}")


class Claim:
    """The right to write one shard, until it is written or released."""

    def __init__(self, store, index, lock):
        self.store, self.index, self._lock = store, index, lock

    def write(self, continuations, finish_reasons):
        """Write the shard so that it is there whole or not at all, and end the claim.

        continuations: p 1-D int64 tensors; finish_reasons: p of continuation_shard.FINISH_REASONS.

        Raises:
            ValueError: not as many as there are prompts, or an unknown finish reason.
            UserError: the shard cannot be written; names the file.
        """
        try:
            prompts, ids = self.store.block(self.index)
            content = shard_bytes(ids, prompts, continuations, finish_reasons, self.store.made_by)
            write_whole(self.store.path(self.index), content)
        finally:
            self.release()

    def release(self):
        """End the claim; more than once does nothing more."""
        if self._lock.is_locked:
            let_go(self._lock)


def remove_partials(lock):
    """Remove what was left half-written of the file that `lock` is for, by processes that were killed: we hold it now."""
    path = Path(lock.lock_file)
    for stale in path.parent.glob(f"{path.name.removesuffix('.lock')}.*.partial"):
        stale.unlink(missing_ok=True)
