"""Reading a prepared folder: endless shuffled batches of rows, prompts, token counts. Shapes: b batch, n sequence, p prompts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from data.manifest import AGAIN, CONVERSATIONS, check_contents, check_seed, check_sizes, read_manifest, reason, table_of
from data.parquet import longest_document
from data.tokenizer import check_tokenizer
from fms_spec.batch import Batch
from fms_spec.errors import UserError

__all__ = ["Prompts", "RowReader", "check_tokenizer", "check_vocabulary", "read_manifest", "read_prompts", "read_token_counts"]

COUNTS = {"all": "count", "answers": "answer_count", "last_answer": "last_answer_count"}  # columns of token_counts


@dataclass(frozen=True)
class Prompts:
    """A prompt table. tokens: int64 [n], p of them, each with its own n; ids: int64 [p]; sources: where each document was read.

    turns: which of its conversation's answers each asks for, from 1; categories: what each conversation's row says it is; roles: whose
    message the answer follows. None where that isn't known, as of texts and of folders that were prepared before it was kept.
    """

    tokens: list
    ids: torch.Tensor
    sources: list
    turns: list
    categories: list
    roles: list

    @property
    def longest(self):
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens), default=0)

    def __len__(self):
        return len(self.sources)


class RowReader:
    """Endless batches of packed rows, in an order drawn from the seed anew for each epoch.

    Shards come in a drawn order, and so do the rows within each; one shard is in memory at a time. Batches always hold
    `batch_size` rows and may span shards and epochs.
    """

    def __init__(self, data_dir, split="train", *, batch_size, seed, rows=None, train_on=None):
        """Check the folder without reading the rows.

        rows: read only so many, drawn from the whole table by the seed, in every epoch the same ones; None reads all. train_on: of
        conversations "answers", "last_answer" or "all"; None is the first, and all of texts.

        Raises:
            UserError: the folder is half-written, lacks the split, has no rows in it, a shard is missing, cut short or not what the
                manifest says, the seed is not from 0 to 2^63 - 1, or answers are asked of texts.
        """
        check_seed(seed, f"seed {seed}")
        self.data_dir, self.split, self.batch_size, self.seed = Path(data_dir), split, batch_size, seed
        self.manifest = read_manifest(data_dir)
        self.train_on = trained_on(self.manifest, data_dir, train_on)
        table = table_of(self.manifest, data_dir, f"rows-{split}")
        if not table["rows"]:
            raise UserError(f"{data_dir}: rows-{split} has no rows (its documents fill none); prepare with a larger --held_out")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self.shards = [shard for shard in table["shards"] if shard["rows"]]
        check_sizes(data_dir, self.shards)
        for shard in self.shards:
            check_footer(self.data_dir / shard["file"], shard["rows"], self.seq_length)
        sizes = np.array([shard["rows"] for shard in self.shards])
        self.table_rows, self._first_rows = int(sizes.sum()), np.cumsum(sizes) - sizes
        if rows is not None and not 1 <= rows <= self.table_rows:
            raise UserError(f"{data_dir}: {rows} rows asked of rows-{split}, which has {self.table_rows}; ask for fewer")
        read = np.arange(self.table_rows)
        if rows is not None:
            read = np.sort(np.random.default_rng((seed, self.table_rows)).choice(read, rows, replace=False))
        self._read = np.split(read, np.searchsorted(read, self._first_rows[1:]))  # of each shard: its rows' numbers in the table
        self._sizes = np.array([len(numbers) for numbers in self._read])
        self._epoch, self._position, self._checked = 0, 0, set()
        self._loaded, self._shard, self._drawn, self._row_order = None, None, None, None

    def __len__(self):
        """Rows per epoch."""
        return int(self._sizes.sum())

    @property
    def seq_length(self):
        """Tokens of a row."""
        return self.manifest["inputs"]["seq_length"]

    def longest_document(self):
        """Tokens of the longest document, or piece of one, in the whole table.

        Raises:
            UserError: a shard was altered since it was prepared; names it.
        """
        for shard in self.shards:
            check_contents(self.data_dir, shard)
        return max(longest_document(self.data_dir / shard["file"], self.seq_length) for shard in self.shards)

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch, tokens [batch_size, seq_length].

        Raises:
            UserError: a shard was altered since it was prepared; names it.
        """
        pieces, missing = [], self.batch_size
        while missing:
            pieces.append(self._take(missing))
            missing -= len(pieces[-1][0])
        tokens, segment_ids, row_ids, *trained = (torch.from_numpy(np.concatenate(part)) for part in zip(*pieces))
        return Batch(tokens, segment_ids, torch.zeros(self.batch_size, dtype=torch.int64), row_ids, *trained)

    def skip(self, count):
        """Pass over `count` batches without reading them."""
        position = self._epoch * len(self) + self._position + count * self.batch_size
        self._epoch, self._position = divmod(position, len(self))

    def state_dict(self):
        """Where the next batch begins; small, and fit for JSON."""
        return {"epoch": self._epoch, "position": self._position, "seed": self.seed, "rows": len(self)}

    def load_state_dict(self, state):
        """Continue where `state` was taken: the batches are those of a reader that was never interrupted.

        Raises:
            UserError: the state is of another seed or of a table of another size.
        """
        for name, mine in dict(seed=self.seed, rows=len(self)).items():
            if state[name] != mine:
                mend = "resume with the same data and seed"
                raise UserError(f"{self.data_dir}: the saved position is for {name} {state[name]}, not {mine}; {mend}")
        self._epoch, self._position = state["epoch"], state["position"]

    def _take(self, count):
        """At most `count` rows from one shard, and move on: as `RowShard.rows`, with row_ids int64 [b], their numbers in the table."""
        if self._position == len(self):
            self._epoch, self._position = self._epoch + 1, 0
        order = np.random.default_rng((self.seed, self._epoch)).permutation(len(self.shards))
        ends = np.cumsum(self._sizes[order])
        index = int(np.searchsorted(ends, self._position, side="right"))
        shard = int(order[index])
        offset = self._position - int(ends[index] - self._sizes[shard])
        self._load(shard)
        row_ids = self._read[shard][self._row_order[offset : offset + count]]
        self._position += len(row_ids)
        tokens, segment_ids, *trained = self._shard.rows(row_ids - self._first_rows[shard])
        return tokens, segment_ids, row_ids, *trained

    def _load(self, shard):
        """Have `shard` in memory, and the order of its rows in this epoch."""
        if self._drawn != (self._epoch, shard):
            # + 1: numpy gives (seed, epoch, 0) the same stream as (seed, epoch), which orders the shards
            self._row_order = np.random.default_rng((self.seed, self._epoch, shard + 1)).permutation(self._sizes[shard])
            self._drawn = (self._epoch, shard)
        if self._loaded == shard:
            return
        self._loaded, self._shard = None, None  # let go of one shard before the next is read
        if shard not in self._checked:
            check_contents(self.data_dir, self.shards[shard])
            self._checked.add(shard)
        self._shard = RowShard(self.data_dir / self.shards[shard]["file"], self.shards[shard]["rows"], self.seq_length, self.train_on)
        self._loaded = shard


class RowShard:
    """One shard in memory. train_on: see `RowReader`."""

    def __init__(self, path, row_count, seq_length, train_on="all"):
        self.tokens = np.empty((row_count, seq_length), np.int32)
        self.trained = None if train_on == "all" else np.zeros((row_count, seq_length), bool)
        self.padding = np.zeros(row_count, np.int32)
        starts, lengths, filled = [], [], 0
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):  # group by group, so that the shard is never in memory twice
                table = file.read_row_group(group)
                tokens, document_starts = (table.column(name).combine_chunks() for name in ("tokens", "document_starts"))
                self.tokens[filled : filled + len(table)] = tokens.flatten().to_numpy().reshape(-1, seq_length)
                if "padding" in table.column_names:
                    self.padding[filled : filled + len(table)] = table.column("padding").to_numpy()
                if self.trained is not None:
                    mark_answers(self.trained[filled : filled + len(table)], table.column("answers"), train_on == "last_answer")
                starts.append(document_starts.flatten().to_numpy())
                lengths.append(document_starts.value_lengths().to_numpy())
                filled += len(table)
        self.starts, ends = np.concatenate(starts), np.cumsum(np.concatenate(lengths))
        self.spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)

    def rows(self, rows):
        """tokens int64 [b, n], segment_ids int32 [b, n] and, if not all are, trained bool [b, n] of the rows with these numbers [b]."""
        begins = np.zeros((len(rows), self.tokens.shape[1]), np.int32)
        for number, (start, end) in enumerate(self.spans[rows]):
            begins[number, self.starts[start + 1 : end]] = 1
        segment_ids, n = np.cumsum(begins, axis=1, dtype=np.int32), self.tokens.shape[1]
        segment_ids[np.arange(n) >= n - self.padding[rows, None]] = -1
        trained = () if self.trained is None else (self.trained[rows],)
        return self.tokens[rows].astype(np.int64), segment_ids, *trained


def trained_on(manifest, data_dir, asked):
    """What of a folder's rows is trained on where `asked` is: "answers", "last_answer" or "all"; see `RowReader`."""
    conversations = manifest["inputs"]["format_version"] == CONVERSATIONS
    if asked not in (None, "all") and not conversations:
        raise UserError(f"{data_dir}: holds texts, which have no answers to train on; leave data.train_on: {asked} out")
    return (asked or "answers") if conversations else "all"


def mark_answers(trained, answers, last):
    """Set `trained`, bool [b, n], within the answers of each row, an Arrow column; last: only the last ones of conversations."""
    for row, spans in zip(trained, answers.to_pylist()):
        for span in spans:
            if span["last"] or not last:
                row[span["start"] : span["end"]] = True


def check_footer(path, row_count, seq_length):
    """Compare a shard's own figures with the manifest's, which memory is taken by.

    Raises:
        UserError: they differ, or the file can't be read; names it.
    """
    try:
        with pq.ParquetFile(path) as file:
            rows, kind = file.metadata.num_rows, file.schema_arrow.field("tokens").type
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: can't be read ({reason(error)}); {AGAIN}") from None
    if rows != row_count or getattr(kind, "list_size", None) != seq_length or kind.value_type != pa.int32():
        asked = f"{row_count} rows of {seq_length} tokens"
        raise UserError(f"{path}: holds {rows} rows of {kind}, the manifest says {asked}, so one of them was altered; {AGAIN}")


def read_prompts(data_dir, split="train", limit=None):
    """The prompt table of a split, as Prompts; only the first `limit` (the documents were shuffled), None for all.

    Raises:
        UserError: fewer than `limit`, or the folder is half-written, lacks the split, or a shard is missing, cut short or altered.
    """
    table = read_table(data_dir, f"prompts-{split}")
    if limit is not None and limit > len(table):
        raise UserError(f"{data_dir}: {limit} prompts asked of prompts-{split}, which has {len(table)}; ask for fewer")
    table = table.slice(0, limit)
    column = table.column("tokens").combine_chunks()
    lengths = pc.list_value_length(column).to_pylist()
    tokens = torch.from_numpy(column.flatten().to_numpy().astype(np.int64)).split(lengths)
    ids = table.column("prompt_id").to_numpy().astype(np.int64)
    unknown = [None] * len(table)
    known = (table.column(name).to_pylist() if name in table.column_names else unknown for name in ("turn", "category", "role"))
    about = [[value or None for value in values] for values in known]
    return Prompts(list(tokens), torch.from_numpy(ids), table.column("source").to_pylist(), *about)


def read_token_counts(data_dir, train_on="all"):
    """How often each token occurs in the train rows: int64 [vocabulary].

    train_on: as for `RowReader`, only tokens that are trained on count; all do in folders that were prepared before these were counted.

    Raises:
        UserError: the folder is half-written, the file is missing, cut short or altered, or answers are asked of texts.
    """
    table, asked = read_table(data_dir, "token_counts"), COUNTS[trained_on(read_manifest(data_dir), data_dir, train_on)]
    return torch.from_numpy(table.column(asked if asked in table.column_names else "count").to_numpy().copy())


def check_vocabulary(data_dir, vocab_size):
    """Refuse train rows with tokens that a base model with an embedding of `vocab_size` ids does not know.

    Raises:
        UserError: names the first such token; or as read_token_counts.
    """
    counts = read_token_counts(data_dir)
    unknown = counts[vocab_size:].nonzero().flatten().tolist()
    if unknown:
        raise UserError(
            f"{data_dir}: token {vocab_size + unknown[0]} occurs in it, but the tokenizer has {len(counts)} ids, the base model's "
            f"embedding {vocab_size}; prepare it with the base model's own tokenizer, or leave documents with such tokens out"
        )


def read_table(data_dir, name):
    """All shards of a table, checked against the manifest, as one Arrow table."""
    entry = table_of(read_manifest(data_dir), data_dir, name)
    for shard in entry["shards"]:
        check_contents(data_dir, shard)
    table = pa.concat_tables([pq.read_table(Path(data_dir) / shard["file"]) for shard in entry["shards"]])
    if len(table) != entry["rows"]:
        raise UserError(f"{data_dir}: {name} has {len(table)} rows, the manifest says {entry['rows']}, so it was altered; {AGAIN}")
    return table
