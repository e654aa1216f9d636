"""What a file of a source holds, told by its name: one text, or a table with a document in each row.

Tables are JSON lines or arrays and CSV, also compressed, Parquet and Arrow. Any other file is one text, unless its name says that
it is packed or a table of another kind: those are refused.
"""

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import reason
from fms_spec.errors import UserError

OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.input_stream(file)),
    "": lambda file: open(file, "rb"),
}
LINES, COLUMNS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv"), (".parquet", ".arrow", ".feather")
UNREAD = (
    ".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar",
    ".orc", ".avro", ".xlsx", ".xls", ".ods",
)  # fmt: skip
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream; without it, rows may be missing
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot
CHATS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "chat")
SHOWN_COLUMNS = 500  # characters of a message: a table without a header has a text for a name


def table_suffix(file):
    """The suffix that makes a file a table, e.g. ".jsonl" of a.JSONL.gz; None for another file."""
    packing = packing_of(file)
    suffix = os.path.splitext(file.lower().removesuffix(packing))[1]
    return suffix if suffix in LINES or (suffix in COLUMNS and not packing) else None


def packing_of(file):
    """How a file is compressed, by its name: a key of OPENERS, "" for not at all."""
    return next(suffix for suffix in OPENERS if file.lower().endswith(suffix))


def refuse_unread(file):
    """Raise UserError for a file whose name says that it is of a kind that isn't read."""
    if not table_suffix(file) and file.lower().endswith(UNREAD):
        mend = "unpack it, or write it as text, JSON lines or Parquet; or leave it out, with a pattern for the others"
        raise UserError(f"source {file}: {os.path.splitext(file)[1]} files aren't read; {mend}")


def check_table(file, text_column):
    """Raise UserError if a table has no texts in `text_column`, or cannot be read. Reads the schema of Parquet, else the first row."""
    if table_suffix(file) == ".parquet":
        with readable(file):
            check_schema(pq.read_schema(file), text_column, file)
    elif table_suffix(file):
        with closing(texts_of(file, text_column)) as texts:
            next(texts, None)


def texts_of(file, text_column):
    """Yield (row from 0, text) of a table, (-1, text) of a file that is one text; the text is None where it is not UTF-8.

    Raises:
        UserError: the file is damaged, or a row has no text in `text_column`; names the file and the line.
    """
    suffix = table_suffix(file)
    with readable(file):
        if suffix == ".parquet":
            yield from parquet_texts(file, text_column)
        elif suffix in COLUMNS:
            yield from arrow_texts(file, text_column)
        elif suffix:
            with OPENERS[packing_of(file)](file) as opened:
                read = csv_texts if suffix in (".csv", ".tsv") else json_texts
                yield from read(opened, file, text_column)
        else:
            yield -1, file_text(file)


@contextmanager
def readable(file):
    """What can go wrong in a damaged file, as a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"source {file}: not UTF-8; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"source {file}: cannot be read, it may be cut short ({reason(error)})") from None


def file_text(file):
    """The text of a file, or None if it is not UTF-8, or has a NUL, which no text has. Told of a large one by its beginning."""
    with open(file, "rb") as opened:
        head = opened.read(2**16)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return None if b"\0" in head else (head + opened.read()).decode("utf-8-sig")  # Windows editors put a mark before it
        except UnicodeDecodeError:
            return None


def has_mark(file):
    """Whether a file begins with the mark of UTF-8."""
    with open(file, "rb") as opened:
        return opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def json_texts(opened, file, text_column):
    """(line number from 0, text) of JSON lines, blank ones left out; (number, text) of a JSON array, which is read at once."""
    begin = opened.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if begin == b"[" and table_suffix(file) == ".json":
        rows = ((f"{file} item {number + 1}", number, row) for number, row in enumerate(parsed(opened.read(), file)))
    else:
        rows = ((f"{file}:{at + 1}", at, parsed(line, f"{file}:{at + 1}")) for at, line in enumerate(opened) if not line.isspace())
    for where, number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object with a field {text_column!r}")
        text = checked_text(row, text_column, where)
        yield number, text if text.isascii() or not LONE_SURROGATE.search(text) else None


def parsed(content, where):
    """The JSON value that bytes spell."""
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({reason(error)}); mend or remove the line") from None


def csv_texts(opened, file, text_column):
    """(row from 0, text) of a CSV file, or a TSV one, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # of 131,072 characters before
    lines = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, delimiter="\t" if table_suffix(file) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        other = next((mark for mark in (";", "\t") if len(header) == 1 and mark in header[0]), None)
        if other:
            raise UserError(f"source {file}: its columns are apart by {other!r}; save it with commas, or with tabs as .tsv")
        column = column_index(header, text_column, f"source {file}")
        for number, row in enumerate(filter(None, rows)):  # a blank line is an empty list
            if len(row) != len(header):
                raise UserError(f"{file}:{rows.line_num}: {len(row)} fields, the first line names {len(header)}; mend the line")
            yield number, row[column]
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: not a line of CSV ({error}); mend the line, or write the table as JSON lines") from None


def parquet_texts(file, text_column):
    """(row, text) of a Parquet file."""
    with pq.ParquetFile(file) as opened:
        check_schema(opened.schema_arrow, text_column, file)
        yield from column_texts(batch.column(0) for batch in opened.iter_batches(batch_size=1024, columns=[text_column]))


def arrow_texts(file, text_column):
    """(row, text) of an Arrow file or stream, such as those of a folder that `datasets` saved."""
    with pa.memory_map(file) as opened:
        if opened.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(opened)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            opened.seek(max(0, opened.size() - len(END_OF_STREAM)))
            if opened.read() != END_OF_STREAM:
                raise EOFError("its end is missing")
            opened.seek(0)
            reader = batches = pa.ipc.open_stream(opened)
        check_schema(reader.schema, text_column, file)
        yield from column_texts(batch.column(text_column) for batch in batches)


def column_texts(columns):
    """(row from 0, text) of Arrow arrays one after the other; "" for null, and None for bytes that are not UTF-8."""
    values = (value for column in columns for value in column.to_pylist())
    for row, value in enumerate(values):
        try:
            yield row, value.decode() if isinstance(value, bytes) else value or ""
        except UnicodeDecodeError:
            yield row, None


def check_schema(schema, text_column, file):
    """Raise UserError if an Arrow schema has no column of text of this name."""
    kind = schema.field(column_index(schema.names, text_column, file)).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()):
        chat = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
        raise no_text(file, text_column, str(kind), chat, schema.names)


def column_index(names, text_column, where):
    """Where in a table's columns the text is."""
    if names.count(text_column) != 1:
        raise no_column(where, text_column, names) if text_column not in names else UserError(f"{where}: two columns {text_column!r}")
    return names.index(text_column)


def checked_text(row, text_column, where):
    """The text of one row, "" for null."""
    if text_column not in row:
        raise no_column(where, text_column, list(row))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        chat = isinstance(text, list) and any(isinstance(turn, dict) for turn in text)
        raise no_text(where, text_column, type(text).__name__, chat, list(row))
    return text or ""


def no_text(where, text_column, kind, chat, names):
    """The error for a text column that holds something else; chat: whether that is a list of turns."""
    if chat or text_column in CHATS:
        return no_chats(where, text_column, names)
    mend = "name another with --text_column, or make one of strings"
    return UserError(f"{where}: column {text_column!r} holds {kind}, not strings; {mend}")


def no_column(where, text_column, names):
    """The error for an absent text column, with the nearest one there is."""
    chat = next((name for name in names if name in CHATS), None)
    if chat:
        return no_chats(where, chat, names)
    near = difflib.get_close_matches(text_column, names, n=1)
    hint = f"did you mean --text_column={near[0]}? " if near else ""
    return UserError(f"{where}: no column {text_column!r}; {hint}It has: {listed(names)} (choose with --text_column)")


def no_chats(where, chat, names):
    """The error for conversations."""
    others = listed([name for name in names if name not in (chat, *CHATS)])
    rest = f"; the others are {others}" if others else ""
    mend = f"make one text of each in a column of its own and name that with --text_column{rest}"
    return UserError(f"{where}: holds conversations (column {chat!r}), which aren't read yet; {mend}")


def listed(names):
    """Names of columns, on one line and not too long."""
    text = " ".join(", ".join(names).split())
    return text if len(text) <= SHOWN_COLUMNS else text[:SHOWN_COLUMNS] + "…"
