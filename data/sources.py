"""Where documents come from: text files, JSON lines and Parquet on this machine, or a dataset of the Hugging Face Hub.

A file is read by its name: `.jsonl`, `.jsonl.gz` and `.parquet` hold one document per row, any other file is one document.
"""

import codecs
import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.manifest import reason
from fms_spec.errors import UserError
from fms_spec.files import sha256_of

JSON_LINES = (".jsonl", ".jsonl.gz")
PARQUET = ".parquet"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


class Document(NamedTuple):
    """One document as read: `text` is None where the bytes are not UTF-8; `row` is -1 where the file is the document."""

    text: str | None
    file: int
    row: int


class Skipped:
    """Counts of the documents left out, and the first of them."""

    def __init__(self, source):
        self.source, self.counts, self.first = source, Counter(), None

    def add(self, why, document):
        """Count a document; `why`: "empty" or "not UTF-8"."""
        self.counts[why] += 1
        self.first = self.first or f"{self.source.label(document.file, document.row)} ({why})"

    def __str__(self):
        counts = ", ".join(f"{count} {why}" for why, count in sorted(self.counts.items()))
        return f"skipped {self.counts.total()} documents ({counts}), the first is {self.first}"


def open_source(source, text_column):
    """A folder (searched recursively, hidden files left out), a glob, one file, or a Hub dataset name[:config[:split]].

    Raises:
        UserError: nothing is there, or a Parquet file is damaged or has no `text_column`.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found, root, nothing = files_below(path), path, "the folder holds no files"
    elif os.path.isfile(path):
        found, root, nothing = [path], os.path.dirname(path), ""
    elif glob.has_magic(path):
        found, root, nothing = glob.glob(path, recursive=True), glob_root(path), "the pattern matches no file"
    elif path.startswith((".", os.sep)) or path.count("/") > 1 or path.endswith((*JSON_LINES, PARQUET, ".txt", ".json")):
        raise UserError(f"source {source}: no such file or folder")
    else:
        return HubSource(source, text_column)
    files = sorted(file for file in found if os.path.isfile(file))
    if not files:
        raise UserError(f"source {source}: {nothing}")
    return FileSource(files, root, text_column)


class FileSource:
    """Documents from files. Files are visited in a drawn order, the rows of a file from its first to its last."""

    finite = True

    def __init__(self, files, root, text_column):
        self.files, self.root, self.text_column = files, root, text_column
        for file in files:
            if not os.access(file, os.R_OK):
                raise UserError(f"source {file}: cannot be read (permission denied)")
            if file.endswith(PARQUET):
                check_parquet(file, text_column)

    def fingerprint(self):
        """sha256 over every file's name within the source and its contents: the same wherever the source lies."""
        digest = hashlib.sha256()
        for index, file in enumerate(tqdm(self.files, desc="fingerprint", unit="file", leave=False)):
            digest.update(f"{self.label(index, -1)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()

    def documents(self, generator):
        """Yield every Document, visiting the files in an order drawn from the numpy `generator`."""
        for index in generator.permutation(len(self.files)).tolist():
            file = self.files[index]
            try:
                if file.endswith(PARQUET):
                    yield from (Document(text, index, row) for row, text in enumerate(parquet_texts(file, self.text_column)))
                elif file.endswith(JSON_LINES):
                    yield from (Document(text, index, row) for row, text in json_texts(file, self.text_column))
                else:
                    yield Document(file_text(file), index, -1)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
                raise UserError(f"source {file}: cannot be read, it may be cut short ({reason(error)})") from None

    def label(self, file, row):
        """The document's name: the path within the source, and `#row` (from 0) where a file holds many."""
        path = Path(os.path.relpath(self.files[file], self.root or ".")).as_posix()
        name = os.fsencode(path).decode("utf-8", "replace")  # a file's name may be any bytes
        return name if row < 0 else f"{name}#{row}"


class HubSource:
    """Documents streamed from the Hub in the dataset's own order."""

    finite = False

    def __init__(self, source, text_column):
        self.name, self.config, self.split = (*source.split(":"), "", "")[:3]
        self.config, self.split, self.text_column = self.config or None, self.split or "train", text_column
        if source.count(":") > 2:
            raise UserError(f"source {source}: a dataset is given as name, name:config or name:config:split")
        import datasets

        try:
            self.builder = datasets.load_dataset_builder(self.name, self.config)
            self.stream = self.builder.as_streaming_dataset(split=self.split)
        except Exception as error:  # the library raises its own kinds, OSError and ValueError, for one and the same mistake
            raise UserError(f"source {source}: no such file or folder here, nor a dataset on the Hub ({reason(error)})") from None

    def fingerprint(self):
        """The dataset's commit on the Hub, with its config and split."""
        return hashlib.sha256(f"{self.name}\0{self.config}\0{self.split}\0{self.builder.hash}".encode()).hexdigest()

    def documents(self, generator):
        """Yield every Document in stream order; `generator` has no say."""
        row = 0
        try:
            for row, example in enumerate(self.stream):
                yield Document(checked_text(example, self.text_column, f"{self.name} row {row}"), 0, row)
        except UserError:
            raise
        except Exception as error:  # from whichever network or file library the stream uses
            raise UserError(f"source {self.name}: the stream broke after row {row} ({reason(error)}); try again") from None

    def label(self, file, row):
        """The document's name: the dataset's, and its number in the stream."""
        return f"{self.name}#{row}"


def file_text(file):
    """The text of a file, or None if it is not UTF-8. A large binary file is recognised by its beginning."""
    with open(file, "rb") as opened:
        head = opened.read(2**16)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return (head + opened.read()).decode("utf-8")
        except UnicodeDecodeError:
            return None


def json_texts(file, text_column):
    """Yield (line number from 0, text) of a JSON lines file; blank lines are no documents."""
    with (gzip.open if file.endswith(".gz") else open)(file, "rb") as lines:
        for number, line in enumerate(lines):
            if line.isspace():
                continue
            where = f"{file}:{number + 1}"
            try:
                example = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not a line of JSON ({error}); mend or remove the line") from None
            if not isinstance(example, dict):
                raise UserError(f"{where}: not a JSON object with a field {text_column!r}")
            text = checked_text(example, text_column, where)
            yield number, text if text.isascii() or not LONE_SURROGATE.search(text) else None


def parquet_texts(file, text_column):
    """Yield the texts of a Parquet file."""
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=1024, columns=[text_column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def check_parquet(file, text_column):
    """Raise UserError if the file's footer or its text column is missing. Cheap: reads the footer only."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"source {file}: not a whole Parquet file, it may be cut short ({reason(error)})") from None
    if text_column not in schema.names:
        raise missing_column(file, text_column, schema.names)
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"source {file}: column {text_column!r} holds {kind}, not strings; name another with --text_column")


def checked_text(example, text_column, where):
    """The text of one row, "" for null."""
    if text_column not in example:
        raise missing_column(where, text_column, list(example))
    text = example[text_column]
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where}: column {text_column!r} holds {kind}, not a string; name another with --text_column")
    return text or ""


def missing_column(where, text_column, available):
    """The error for an absent text column, with the nearest one there is."""
    near = difflib.get_close_matches(text_column, available, n=1)
    hint = f"did you mean --text_column={near[0]}? " if near else ""
    return UserError(f"{where}: no column {text_column!r}; {hint}It has: {', '.join(available)} (choose with --text_column)")


def glob_root(pattern):
    """The folder part of a pattern before its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return os.path.join(*parts[:fixed]) if fixed else ""


def files_below(folder):
    """Every file below a folder. Hidden ones (.git and the like) are left out, as a glob does."""

    def refuse(error):  # os.walk alone would leave out silently what it cannot list
        raise UserError(f"source {error.filename}: cannot be read ({error.strerror})")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return found
