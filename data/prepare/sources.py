"""Where documents come from: files (see data.prepare.formats), or a dataset of the Hugging Face Hub."""

import glob
import hashlib
import os
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from data.manifest import reason
from data.prepare.finding import find_files
from data.prepare.formats import UNREAD, arrow_rows, contents_of, has_conversations, has_mark, table_suffix
from data.prepare.rows import BAD_ROW, BadRow, Conversation, Wanted, layout_of, texts_within
from data.prepare.stores import digest_of, is_url, reaching
from data.progress import progress
from fms_spec.errors import UserError


class Document(NamedTuple):
    """One document as read: `content` is None where the bytes are not UTF-8; `row` is -1 where the file is the document."""

    content: str | Conversation | BadRow | None
    file: int
    row: int

    @property
    def messages(self):
        """Of a conversation, none of anything else."""
        return self.content.messages if isinstance(self.content, Conversation) else []

    @property
    def texts(self):
        """What it says: a text, or what the user and the assistant say in a conversation; nothing where it can't be read."""
        if isinstance(self.content, Conversation):
            return list(texts_within(self.content.messages))
        return [self.content] if isinstance(self.content, str) else []


class Skipped:
    """Counts of the documents left out of a source, and the first of each kind. label: function of (file, row)."""

    def __init__(self, label):
        self.label, self.counts, self.firsts = label, Counter(), {}

    def add(self, why, document, detail=""):
        """Count a document; `why`: in a few words that are the same for all of a kind. detail: more about this one."""
        self.counts[why] += 1
        if why not in self.firsts:
            self.firsts[why] = f"{self.label(document.file, document.row)} ({why}{detail and ': ' + detail})"

    @property
    def first(self):
        """The first of all, with the reason; None where there is none."""
        return next(iter(self.firsts.values()), None)

    def __str__(self):
        counts = ", ".join(f"{count} {why}" for why, count in sorted(self.counts.items()))
        bad = f"; the first {BAD_ROW} is {self.firsts[BAD_ROW]}" if BAD_ROW in self.firsts and len(self.firsts) > 1 else ""
        return f"skipped {self.counts.total()} documents ({counts}), the first is {self.first}{bad}"


def open_source(source, wanted=Wanted(), split=None):  # noqa: B008 - it is a tuple
    """A folder (searched recursively, hidden files left out), a glob, one file, each here or a URL, or a Hub dataset name[:config[:split]].

    wanted: `rows.Wanted`. split: of a data set's, None for train.

    Raises:
        UserError: nothing is there, or nothing that can be read (see data.prepare.finding), or a table has neither texts nor
            conversations, or some have texts and others conversations.
    """
    path = os.path.expanduser(source)
    if is_url(path) or os.path.isdir(path) or os.path.isfile(path) or glob.has_magic(path):
        return FileSource(*find_files(path, source, split), wanted)
    local = path.startswith((".", os.sep)) or path.count("/") > 1 or path.lower().endswith((*UNREAD, ".txt"))
    if local or table_suffix(path):
        raise UserError(f"source {source}: no such file or folder")
    return HubSource(source, wanted, split)


class FileSource:
    """Documents from files. Files are visited in a drawn order, the rows of a file from its first to its last."""

    finite = True

    def __init__(self, files, root, wanted):
        self.files, self.root, self.wanted = files, root, wanted
        kinds = {}  # whether they are conversations -> the first such file
        for file in files:
            if not is_url(file) and not os.access(file, os.R_OK):
                raise UserError(f"source {file}: cannot be read (permission denied)")
            kinds.setdefault(has_conversations(file, wanted), file)
        if {True, False} <= kinds.keys():
            mend = "prepare them apart, each with a pattern, or together as two sources of a .yaml"
            raise UserError(f"source {kinds[True]}: holds conversations, and {kinds[False]} beside it texts; {mend}")
        self.conversations = True in kinds

    def fingerprint(self):
        """sha256 over every file's name within the source and its contents: the same wherever the source lies."""
        digest = hashlib.sha256()
        for index, file in enumerate(progress(self.files, desc="fingerprint", unit="file", leave=False)):
            # What once was read as one text, or not at all, must not pass for the same set.
            kind = "" if file.endswith((".jsonl", ".jsonl.gz", ".parquet")) else table_suffix(file) or ("mark" if has_mark(file) else "")
            with reaching(file):
                digest.update(f"{self.label(index, -1)}\0{digest_of(file)}{kind}\n".encode())
        return digest.hexdigest()

    def documents(self, generator):
        """Yield every Document, visiting the files in an order drawn from the numpy `generator`."""
        for index in generator.permutation(len(self.files)).tolist():
            yield from (Document(content, index, row) for row, content in contents_of(self.files[index], self.wanted))

    def label(self, file, row):
        """The document's name: the path within the source, and `#row` (from 0) where a file holds many."""
        path = Path(os.path.relpath(self.files[file], self.root or ".")).as_posix()
        name = os.fsencode(path).decode("utf-8", "replace")  # a file's name may be any bytes
        return name if row < 0 else f"{name}#{row}"


class HubSource:
    """Documents streamed from the Hub in the dataset's own order."""

    finite = False

    def __init__(self, source, wanted, split):
        self.name, self.config, named = (*source.split(":"), "", "")[:3]
        if named and split:
            raise UserError(f"source {source}: names a split, and split {split} is asked too; leave one of the two out")
        self.config, self.split = self.config or None, named or split or "train"
        if source.count(":") > 2:
            raise UserError(f"source {source}: a dataset is given as name, name:config or name:config:split")
        import datasets

        try:
            self.builder = datasets.load_dataset_builder(self.name, self.config)
            rows = iter(self.builder.as_streaming_dataset(split=self.split))
            first = list(islice(rows, 1))
        except OSError as error:  # no network, and the library's own for no data set, are such
            raise UserError(f"source {source}: no such file or folder here, nor a dataset on the Hub ({reason(error)})") from None
        except Exception as error:  # a ValueError for a name that none has, a config or a split that this one lacks
            raise UserError(f"source {source}: not to be had from the Hub so ({reason(error)}); correct name, config or split") from None
        self.stream = chain(first, rows)
        self.wanted, self.layout = wanted, layout_of(list(first[0]), wanted, f"source {source}") if first else None
        self.conversations = bool(first) and self.layout.conversations

    def fingerprint(self):
        """The dataset's commit on the Hub, with its config and split."""
        return hashlib.sha256(f"{self.name}\0{self.config}\0{self.split}\0{self.builder.hash}".encode()).hexdigest()

    def documents(self, generator):
        """Yield every Document in stream order; `generator` has no say."""
        row = 0
        try:
            for row, example in enumerate(arrow_rows(self.stream, self.conversations)):
                yield Document(self.wanted.tried(self.layout.read, example, f"{self.name} row {row}"), 0, row)
        except UserError:
            raise
        except Exception as error:  # from whichever network or file library the stream uses
            raise UserError(f"source {self.name}: the stream broke after row {row} ({reason(error)}); try again") from None

    def label(self, file, row):
        """The document's name: the dataset's, and its number in the stream."""
        return f"{self.name}#{row}"
