"""One file of continuations: its columns, writing it, and telling a damaged one. Shapes: p prompts, m tokens of a continuation."""

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import reason
from data.parquet import column
from fms_spec.errors import UserError

FINISH_REASONS = ("stop", "length")
REWRITE = "delete it: it will be written again"

SCHEMA = pa.schema(
    [
        column("prompt_id", pa.int64(), "number of the prompt in the prompt table", "count from 0"),
        column("prompt", pa.list_(pa.int32()), "the prompt", "token id"),
        column("continuation", pa.list_(pa.int32()), "what the base model wrote after it", "token id"),
        column("finish_reason", pa.string(), "stop: ended by itself; length: cut at the asked length", "word"),
    ]
)


def read_shard(path):
    """(its Arrow table, the settings that it was made with) of a file that `shard_bytes` made.

    A flipped byte is noticed; in a file from before there was `rows_sha256` only where its format or its prompts tell.

    Raises:
        UserError: it can't be read or was altered; names it.
    """
    return readable(path, whole_shard)


def read_made_by(path):
    """The settings that a shard was made with, without reading its rows; raises as `read_shard`."""
    return readable(path, lambda path: made_by_of(pq.read_schema(path)))


def whole_shard(path):
    with pq.ParquetFile(path) as file:
        table = file.read()
    if table.schema != SCHEMA:
        raise ValueError("its columns are others")
    if table.schema.metadata.get(b"rows_sha256", rows_sha256(table).encode()) != rows_sha256(table).encode():
        raise ValueError("its rows were altered")
    return table, made_by_of(table.schema)


def rows_sha256(table):
    """Hexadecimal sha256 of the rows, however the file spells them."""
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest()


def made_by_of(schema):
    made_by = json.loads(schema.metadata[b"made_by"])
    if not isinstance(made_by, dict):
        raise ValueError("its settings are no settings")
    return made_by


def readable(path, read):
    """`read(path)`, with what can go wrong in a damaged file as a UserError that names it."""
    try:
        return read(path)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read, it may be cut short ({reason(error)}); {REWRITE}") from None


def shard_bytes(prompt_ids, prompts, continuations, finish_reasons, made_by):
    """One shard as the bytes of a Parquet file: prompt_ids int64 [p], prompts a list of p int64 [length], the rest as in `Claim.write`."""
    if not len(prompt_ids) == len(continuations) == len(finish_reasons):
        raise ValueError(f"{len(prompt_ids)} prompts, {len(continuations)} continuations, {len(finish_reasons)} finish reasons")
    if not set(finish_reasons) <= set(FINISH_REASONS):
        raise ValueError(f"finish reasons are {FINISH_REASONS}, got {sorted(set(finish_reasons))}")
    columns = [prompt_ids.tolist(), lists_of(prompts), lists_of(continuations), list(finish_reasons)]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    about = {"made_by": json.dumps(made_by, sort_keys=True), "rows_sha256": rows_sha256(table)}
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(about), file, compression="zstd")
    return file.getvalue()


def lists_of(tensors):
    """1-D tensors as lists of ints."""
    return [tensor.tolist() for tensor in tensors]
