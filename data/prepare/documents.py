"""Tokenised documents on disk, and their packing into rows. Shapes: n tokens of a row."""

import hashlib
import tempfile
from array import array

import numpy as np


class DocumentSpool:
    """Tokenised documents in an unnamed file, appended in order and read back in any order.

    A shuffle over a corpus larger than memory needs random access; only 32 bytes per document are held in memory. The file
    vanishes when it is closed or the process ends.
    """

    def __init__(self, folder):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends, self._files, self._rows, self._digests = array("q", [0]), array("q"), array("q"), array("Q")
        self._tokens = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tokens = None
        self._file.close()

    def append(self, tokens, file, row):
        """Add a document: int32 tokens, and where it was read (see sources.Document)."""
        raw = tokens.tobytes()
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(tokens))
        self._files.append(file)
        self._rows.append(row)
        self._digests.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()))

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        """The tokens of one document: int32."""
        if self._tokens is None or len(self._tokens) != self._ends[-1]:
            self._file.flush()
            self._tokens = np.memmap(self._file, np.int32, mode="r")
        return self._tokens[self._ends[index] : self._ends[index + 1]]

    def origin(self, index):
        """(file, row) of one document."""
        return self._files[index], self._rows[index]

    @property
    def token_count(self):
        return self._ends[-1]

    @property
    def lengths(self):
        """int64 [documents]: tokens of each, the end-of-text token included."""
        return np.diff(np.frombuffer(self._ends, np.int64))

    @property
    def digests(self):
        """uint64 [documents]: equal for documents with equal tokens."""
        return np.frombuffer(self._digests, np.uint64)


def choose_held_out(spool, count, prompt_length, generator):
    """Choose `count` documents long enough for a prompt. Returns their numbers in order, and those of all other documents.

    Exact copies of a held-out document are in neither: training on them would be training on what is evaluated.

    Raises:
        ValueError: fewer than `count` documents are long enough.
    """
    long_enough = np.flatnonzero(spool.lengths - 1 >= prompt_length)  # without the end-of-text token
    _, first_copies = np.unique(spool.digests[long_enough], return_index=True)
    eligible = long_enough[np.sort(first_copies)]
    if len(eligible) < count:
        raise ValueError(f"only {len(eligible)} different documents have the {prompt_length} tokens of a prompt")
    held_out = np.sort(generator.choice(eligible, count, replace=False))
    train = np.flatnonzero(~np.isin(spool.digests, spool.digests[held_out]))
    return held_out, train


def missing_prefix(tokens, prefix):
    """What is to be put before `tokens` [n] for them to begin with `prefix`, a list of ids, once: a list."""
    return [] if np.array_equal(tokens[: len(prefix)], prefix) else prefix


def pack(documents, seq_length, prefix):
    """Lay documents end to end into rows and yield (tokens int32 [n], starts, own bool [n]) for each full row.

    `starts` are the offsets in the row at which a document, or the continued piece of one, begins; the first is 0. Each piece is a
    text of its own to the base model, so each begins with the tokenizer's `prefix`, a list of fewer than n ids; where a row has no
    room for more, what fits of it fills the row. `own` tells the documents' tokens from those put before them. What does not fill
    the last row is dropped.
    """
    row, starts, own, filled = np.empty(seq_length, np.int32), [], np.zeros(seq_length, bool), 0
    for document in documents:
        position = 0
        while position < len(document):
            starts.append(filled)
            added = missing_prefix(document[position:], prefix)[: seq_length - filled]
            row[filled : filled + len(added)] = added
            filled += len(added)
            taken = min(seq_length - filled, len(document) - position)
            row[filled : filled + taken] = document[position : position + taken]
            own[filled : filled + taken] = True
            filled, position = filled + taken, position + taken
            if filled == seq_length:
                yield row, starts, own
                row, starts, own, filled = np.empty(seq_length, np.int32), [], np.zeros(seq_length, bool), 0
