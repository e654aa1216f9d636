"""How a file of a source is read, told by its name: one text, or a table with a document in each row (see data.prepare.rows).

Tables are JSON lines or arrays and CSV, also compressed, Parquet and Arrow. Any other file is one text, unless its name says that
it is packed or a table of another kind: those are refused.
"""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import os
import sys
import zlib
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import reason
from data.prepare.rows import ANY_TEXT, BadRow, Conversation, layout_of, no_text
from data.prepare.stores import open_binary, reaching, store_of
from data.prepare.values import parsed
from fms_spec.errors import UserError

UNPACKERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.input_stream(file, compression="zstd")),
    "": lambda file: file,
}
LINES, COLUMNS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv"), (".parquet", ".arrow", ".feather")
UNREAD = (
    ".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar",
    ".orc", ".avro", ".xlsx", ".xls", ".ods",
)  # fmt: skip
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream; without it, rows may be missing


def table_suffix(file):
    """The suffix that makes a file a table, e.g. ".jsonl" of a.JSONL.gz; None for another file."""
    packing = packing_of(file)
    suffix = os.path.splitext(file.lower().removesuffix(packing))[1]
    return suffix if suffix in LINES or (suffix in COLUMNS and not packing) else None


def packing_of(file):
    """How a file is compressed, by its name: a key of UNPACKERS, "" for not at all."""
    return next(suffix for suffix in UNPACKERS if file.lower().endswith(suffix))


def refuse_unread(file):
    """Raise UserError for a file whose name says that it is of a kind that isn't read."""
    if not table_suffix(file) and file.lower().endswith(UNREAD):
        mend = "unpack it, or write it as text, JSON lines or Parquet; or leave it out, with a pattern for the others"
        raise UserError(f"source {file}: {os.path.splitext(file)[1]} files aren't read; {mend}")


def has_conversations(file, wanted):
    """Whether the rows of a file are conversations. Reads the schema of Parquet, else the first row that can be read; None where
    there is none.

    Raises:
        UserError: they hold nothing that is `wanted` (`rows.Wanted`), or the file cannot be read.
    """
    if table_suffix(file) == ".parquet":
        with readable(file), parquet_file(file) as opened:
            return arrow_layout(opened.schema_arrow, wanted, file).conversations
    if not table_suffix(file):
        if wanted.format not in (None, "text", ANY_TEXT):
            raise UserError(f"source {file}: is one text, and --format={wanted.format} asks for tables; name those with a pattern")
        return False
    with closing(contents_of(file, wanted)) as contents:
        first = next((content for _, content in contents if not isinstance(content, BadRow)), BadRow)
    return None if first is BadRow else isinstance(first, Conversation)


def contents_of(file, wanted):
    """Yield (row from 0, content) of a table, (-1, text) of a file that is one text; see `rows.Layout` for what contents are.

    Raises:
        UserError: the file is damaged, or a row does not hold what is `wanted` (`rows.Wanted`); names the file, the row and the field.
    """
    suffix = table_suffix(file)
    with readable(file):
        if suffix in COLUMNS:
            yield from (parquet_contents if suffix == ".parquet" else arrow_contents)(file, wanted)
        elif suffix:
            with open_binary(file) as packed, UNPACKERS[packing_of(file)](packed) as opened:
                read = csv_contents if suffix in (".csv", ".tsv") else json_contents
                yield from read(opened, file, wanted)
        else:
            yield -1, file_text(file)


@contextmanager
def readable(file):
    """What can go wrong in a damaged file, as a UserError that names it."""
    with reaching(file):
        try:
            yield
        except UnicodeDecodeError:
            raise UserError(f"source {file}: not UTF-8; save it as UTF-8") from None
        except UnicodeEncodeError:  # pyarrow's, of a path
            raise UserError(f"source {file}: its path is not UTF-8, as that of a Parquet file must be; rename it") from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            raise UserError(f"source {file}: cannot be read, it may be cut short ({reason(error)})") from None


def file_text(file):
    """The text of a file, or None if it is not UTF-8, or has a NUL, which no text has. Told of a large one by its beginning."""
    with open_binary(file) as opened:
        head = opened.read(2**16)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return None if b"\0" in head else (head + opened.read()).decode("utf-8-sig")  # Windows editors put a mark before it
        except UnicodeDecodeError:
            return None


def has_mark(file):
    """Whether a file begins with the mark of UTF-8."""
    with reaching(file), open_binary(file) as opened:
        return opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def json_contents(opened, file, wanted):
    """(line number from 0, content) of JSON lines, blank ones left out; (number, content) of a JSON array, which is read at once."""
    begin = opened.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if begin == b"[" and table_suffix(file) == ".json":
        rows = ((f"{file} item {number + 1}", number, row) for number, row in enumerate(parsed(opened.read(), file)))
        read = object_content
    else:
        rows = ((f"{file}:{at + 1}", at, line) for at, line in enumerate(opened) if not line.isspace())
        read = line_content
    layouts = []
    for where, number, row in rows:
        yield number, wanted.tried(read, row, where, wanted, layouts)


def line_content(line, where, wanted, layouts):
    """As `object_content`, of a line of JSON."""
    return object_content(parsed(line, where), where, wanted, layouts)


def object_content(row, where, wanted, layouts):
    """The content of a JSON value; by its columns, where none was before it, it also tells the layout of all: `layouts`, of one or none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object with a field {wanted.text_column!r}, or a conversation")
    if not layouts:
        layouts.append(layout_of(list(row), wanted, where))
    return layouts[0].read(row, where)


def csv_contents(opened, file, wanted):
    """(row from 0, content) of a CSV file, or a TSV one, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # of 131,072 characters before
    lines = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, delimiter="\t" if table_suffix(file) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        other = next((mark for mark in (";", "\t") if len(header) == 1 and mark in header[0]), None)
        if other:
            raise UserError(f"source {file}: its columns are apart by {other!r}; save it with commas, or with tabs as .tsv")
        layout = layout_of(header, wanted, f"source {file}")
        for number, row in enumerate(filter(None, rows)):  # a blank line is an empty list
            yield number, wanted.tried(record_content, row, f"{file}:{rows.line_num}", header, layout)
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: not a line of CSV ({error}); mend the line, or write the table as JSON lines") from None


def record_content(record, where, header, layout):
    """The content of a line of CSV, a list of fields."""
    if len(record) != len(header):
        raise UserError(f"{where}: {len(record)} fields, the first line names {len(header)}; mend the line")
    return layout.read(dict(zip(header, record)), where)


def parquet_file(file):
    """An open Parquet file; of a local one pyarrow makes its own."""
    store, inner = store_of(file)
    return pq.ParquetFile(inner, filesystem=store)


def parquet_contents(file, wanted):
    """(row, content) of a Parquet file."""
    with parquet_file(file) as opened:
        layout = arrow_layout(opened.schema_arrow, wanted, file)
        yield from batch_contents(opened.iter_batches(batch_size=1024, columns=layout.columns), layout, file, wanted)


def arrow_contents(file, wanted):
    """(row, content) of an Arrow file or stream, such as those of a folder that `datasets` saved."""
    with pa.PythonFile(open_binary(file), mode="r") as opened:
        if opened.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(opened)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            opened.seek(max(0, opened.size() - len(END_OF_STREAM)))
            if opened.read() != END_OF_STREAM:
                raise EOFError("its end is missing")
            opened.seek(0)
            reader = batches = pa.ipc.open_stream(opened)
        layout = arrow_layout(reader.schema, wanted, file)
        yield from batch_contents((batch.select(layout.columns) for batch in batches), layout, file, wanted)


def batch_contents(batches, layout, file, wanted):
    """(row from 0, content) of Arrow batches one after the other."""
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(arrow_rows(rows, layout.conversations)):
        yield number, wanted.tried(layout.read, row, f"{file} row {number + 1}")


def arrow_rows(rows, nested):
    """Rows as they were before Arrow had them, which gives every struct of nested columns the fields of all others: nulls are left out."""
    return ({name: without_nulls(value) for name, value in row.items()} for row in rows) if nested else rows


def without_nulls(value):
    """A nested value without the fields that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def arrow_layout(schema, wanted, file):
    """The `Layout` of an Arrow schema; raises UserError where it has none, or its texts are none."""
    layout = layout_of(schema.names, wanted, file)
    if layout.format == "text":
        kind = schema.field(wanted.text_column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if plain not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()):
            raise no_text(file, wanted.text_column, str(kind))
    return layout
