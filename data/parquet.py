"""The Parquet tables of a prepared folder: their columns, and a writer of bounded shards. p: prompt_length, n: seq_length."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fms_spec.files import sha256_of

# A shard holds at most 64 MiB of tokens: a reader keeps one in memory. It is written in row groups of 4 MiB.
SHARD_BYTES = 64 * 2**20
GROUP_BYTES = 4 * 2**20
TOKEN_BYTES = 4


def column(name, kind, description, unit):
    """A column that says in the file itself what it holds."""
    return pa.field(name, kind, nullable=False, metadata={"description": description, "unit": unit})


ANSWERS = column(
    "answers",
    pa.list_(pa.struct({"start": pa.int32(), "end": pa.int32(), "last": pa.bool_()})),
    "what the assistant wrote, to the token behind the one that ends its turn, or a text; whether it is the conversation's last answer",
    "offset in tokens",
)
TURN = column("turn", pa.int32(), "which of the conversation's answers is asked for; 0 of a text", "count from 1")
CATEGORY = column("category", pa.string(), "what the row says it is; empty where it doesn't", "name")
ROLE = column("role", pa.string(), "whose message the answer follows; empty where that isn't known, and of a text", "name")
PADDING = column("padding", pa.int32(), "tokens at the end of the row that are none of a document", "tokens")


def rows_schema(seq_length, about, conversations=False):
    """Packed rows of texts, or of conversations and texts beside them; `about`: see metadata_of."""
    texts = "documents laid end to end, each with its EOS token"
    what = "conversations as the chat template writes them, and texts" if conversations else texts
    return pa.schema(
        [
            column("tokens", pa.list_(pa.int32(), seq_length), what, "token id"),
            column(
                "document_starts",
                pa.list_(pa.int32()),
                "where in the row a document, or the continued piece of one, begins; the first is 0",
                "offset in tokens",
            ),
            *([ANSWERS, PADDING] if conversations else []),
        ],
        metadata={"description": "packed rows of a corpus", "seq_length": str(seq_length), **about},
    )


def prompts_schema(prompt_length, about, conversations=False):
    """Prompts for continuations: all of p tokens, or of p at most where there are conversations; `about`: see metadata_of."""
    tokens = (
        column("tokens", pa.list_(pa.int32()), "a conversation up to where one of its answers begins, or a piece of a text", "token id")
        if conversations
        else column("tokens", pa.list_(pa.int32(), prompt_length), "a piece of the document from a random offset", "token id")
    )
    return pa.schema(
        [
            column("prompt_id", pa.int64(), "number of the prompt in this table", "count from 0"),
            column("document", pa.int64(), "number of the document in the order the source was read", "count from 0"),
            column("source", pa.string(), "file within the source, with #row where a file or dataset holds many", "name"),
            tokens,
            *([TURN, CATEGORY, ROLE] if conversations else []),
        ],
        metadata={"description": "prompts, one per document that is long enough", "prompt_length": str(prompt_length), **about},
    )


def token_counts_schema(about, conversations=False):
    """Token frequencies; `about`: see metadata_of."""
    answers = [
        column("answer_count", pa.int64(), "how often it occurs in answers there", "occurrences"),
        column("last_answer_count", pa.int64(), "how often it occurs in the last answers of conversations there", "occurrences"),
    ]
    return pa.schema(
        [
            column("token", pa.int32(), "every token of the vocabulary in order", "token id"),
            column("count", pa.int64(), "how often it occurs in the rows of rows-train", "occurrences"),
            *(answers if conversations else []),
        ],
        metadata={"description": "token frequencies of the train rows", **about},
    )


def metadata_of(tokenizer, seq_length, seed, version):
    """Table metadata that every file of a prepared folder carries; version: of manifest.VERSIONS."""
    return {
        "format_version": str(version),
        "seq_length": str(seq_length),
        "tokenizer_sha256": tokenizer.sha256,
        "seed": str(seed),
    }


class TableWriter:
    """Writes one table as `name-00000.parquet`, `name-00001.parquet`, …; at least one file, even without rows."""

    def __init__(self, folder, name, schema, tokens_per_row):
        self.folder, self.name, self.schema = Path(folder), name, schema
        self.rows_per_shard = max(1, SHARD_BYTES // (TOKEN_BYTES * tokens_per_row))
        self.rows_per_group = max(1, GROUP_BYTES // (TOKEN_BYTES * tokens_per_row))
        self.shards, self.rows, self._pending, self._in_shard, self._writer = [], 0, [], 0, None

    def append(self, row):
        """Add a row: one value per column, in the schema's order."""
        if self._in_shard + len(self._pending) == self.rows_per_shard:
            self._finish_shard()
        self._pending.append(row)
        self.rows += 1
        if len(self._pending) == self.rows_per_group:
            self._flush()

    def close(self):
        """Finish the table and return its entry for the manifest: {"rows", "shards": [{"file", "rows", "bytes", "sha256"}]}."""
        if self._pending or self._in_shard or not self.shards:
            self._finish_shard()
        return {"rows": self.rows, "shards": self.shards}

    def _path(self):
        return self.folder / f"{self.name}-{len(self.shards):05d}.parquet"

    def _flush(self):
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path(), self.schema, compression="zstd")
        if self._pending:
            columns = [pa.array(list(values), field.type) for values, field in zip(zip(*self._pending), self.schema)]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self._in_shard += len(self._pending)
        self._pending = []

    def _finish_shard(self):
        self._flush()
        self._writer.close()
        self._writer, path, rows, self._in_shard = None, self._path(), self._in_shard, 0
        self.shards.append(shard_entry(path, rows))


def longest_document(path, seq_length):
    """Tokens of the longest document, or piece of one, in a shard of rows, of which no token is read."""
    with pq.ParquetFile(path) as file:
        table = file.read([name for name in ("document_starts", "padding") if name in file.schema_arrow.names])
    starts = table.column("document_starts").combine_chunks()
    begins, last = starts.flatten().to_numpy(), starts.value_lengths().to_numpy().cumsum() - 1  # of each row
    ends = np.append(begins[1:], 0)
    ends[last] = seq_length - (table.column("padding").to_numpy() if "padding" in table.column_names else 0)
    return int((ends - begins).max())


def shard_entry(path, rows):
    """What the manifest records of one file."""
    return {"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
