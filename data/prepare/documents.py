"""Tokenised documents on disk, and their packing into rows. Shapes: n tokens of a row."""

import hashlib
import heapq
import os
import tempfile
from array import array

import numpy as np

from data.prepare.encoding import Encoded

# Rows that conversations are fitted into at a time. Of 11,990 ones of 662 tokens on average in rows of 4,096, padding was 9.7% of the rows
# with 1, 1.8% with 4, 1.2% with 16 and 1.1% with 256.
OPEN_ROWS = 16


class DocumentSpool:
    """Tokenised documents in an unnamed file, appended in order and read back in any order.

    A shuffle over a corpus larger than memory needs random access; only 52 bytes per document are held in memory, and about 100 where
    copies are left out. The file vanishes when it is closed or the process ends.

    copies: whether a document may be there more than once.
    """

    def __init__(self, folder, copies=True):
        self._seen = None if copies else set()
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends, self._lengths, self._prefixed = array("q", [0]), array("q"), array("b")
        self._parts, self._files, self._rows = array("H"), array("q"), array("q")
        self._digests, self._promptable = array("Q"), array("b")
        self._about, self._one_of_each = [], {}  # equal ones are one in memory

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def append(self, encoded, part, file, row, promptable, about=None):
        """Add a document: encoding.Encoded, where it was read (its source's number, and see sources.Document), whether a prompt can be made
        of it, and what else is known about it, any value with a hash."""
        raw, answers, digest = encoded.tokens.tobytes(), encoded.answers, digest_of(encoded.tokens)
        if self._seen is not None:
            self._seen.add(digest)
        self._file.write(raw)
        self._file.write(answers.astype(np.int32).tobytes())
        self._ends.append(self._ends[-1] + len(encoded.tokens) + answers.size)
        self._lengths.append(len(encoded.tokens))
        self._prefixed.append(encoded.prefixed)
        self._parts.append(part)
        self._files.append(file)
        self._rows.append(row)
        self._digests.append(digest)
        self._promptable.append(bool(promptable))
        self._about.append(self._one_of_each.setdefault(about, about))

    def seen(self, _, encoded):
        """("copies", "") of a document, encoding.Encoded, that is there and may not be twice; None of others."""
        return ("copies", "") if self._seen is not None and digest_of(encoded.tokens) in self._seen else None

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        """One document as encoding.Encoded."""
        self._file.flush()
        begin, end = self._ends[index], self._ends[index + 1]
        # Not mapped: all pages that were ever read would count as this process's memory.
        numbers = np.frombuffer(os.pread(self._file.fileno(), (end - begin) * 4, begin * 4), np.int32)
        length = self._lengths[index]
        return Encoded(numbers[:length], numbers[length:].reshape(-1, 3), bool(self._prefixed[index]))

    def origin(self, index):
        """(source, file, row) of one document."""
        return self._parts[index], self._files[index], self._rows[index]

    def about(self, index):
        """What is known about one document, as it was given."""
        return self._about[index]

    @property
    def token_count(self):
        return sum(self._lengths)

    @property
    def lengths(self):
        """int64 [documents]: tokens of each, the end-of-text token included."""
        return np.frombuffer(self._lengths, np.int64)

    @property
    def parts(self):
        """uint16 [documents]: the number of each one's source."""
        return np.frombuffer(self._parts, np.uint16)

    @property
    def digests(self):
        """uint64 [documents]: equal for documents with equal tokens."""
        return np.frombuffer(self._digests, np.uint64)

    @property
    def promptable(self):
        """bool [documents]: whether a prompt can be made of each."""
        return np.frombuffer(self._promptable, bool)


def digest_of(tokens):
    """A number of 64 bits, equal for equal tokens."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())


def choose_held_out(spool, count, generator, weights=None):
    """Choose `count` of the documents that a prompt can be made of. Returns their numbers in order, and those of all others.

    weights: one for each source, by which tokens are held out of them; None draws all documents alike.

    Exact copies of a held-out document are in neither: training on them would be training on what is evaluated.

    Raises:
        ValueError: fewer than `count` are; says how many.
    """
    numbers = np.flatnonzero(spool.promptable)
    _, first_copies = np.unique(spool.digests[numbers], return_index=True)
    eligible = numbers[np.sort(first_copies)]
    if len(eligible) < count:
        raise ValueError(f"only {len(eligible)} different documents have")
    chances = None
    if weights and count:
        parts = spool.parts[eligible]
        chances = (np.array(weights) / np.maximum(1, np.bincount(parts, spool.lengths[eligible], len(weights))))[parts]
        chances /= chances.sum()
    held_out = np.sort(generator.choice(eligible, count, replace=False, p=chances))
    train = np.flatnonzero(~np.isin(spool.digests, spool.digests[held_out]))
    return held_out, train


def by_weight(queues, lengths, weights):
    """Documents of several sources in an order in which each source has its share of the tokens, also in every part of it.

    The next document is of the source with the fewest tokens so far for its weight; where that source has none left, the order ends.

    Args:
        queues: for each source the numbers of its documents, in order. lengths: int64 [documents], their tokens. weights: one for each
            source, None for all of its tokens, which uses every document.
    """
    weights = weights or [int(lengths[queue].sum()) for queue in queues]
    heap = [(0.0, number) for number, weight in enumerate(weights) if weight]
    ahead, taken = [iter(queue.tolist()) for queue in queues], [0] * len(queues)
    while heap:
        number = heap[0][1]
        document = next(ahead[number], None)
        if document is None:
            return
        yield document
        taken[number] += int(lengths[document])
        heapq.heapreplace(heap, (taken[number] / weights[number], number))


def missing_prefix(tokens, prefix):
    """What is to be put before `tokens` [n] for them to begin with `prefix`, a list of ids, once: a list."""
    return [] if np.array_equal(tokens[: len(prefix)], prefix) else prefix


class Row:
    """A row that is filled with pieces of documents.

    Attributes:
        tokens: int32 [n]. starts: offsets at which a document, or the continued piece of one, begins; the first is 0. own: bool [n], the
        documents' tokens, told from those put before them. answers: (start, end, whether it is its conversation's last). room: tokens that
        are still free, at the end.
    """

    def __init__(self, seq_length):
        self.tokens, self.own = np.zeros(seq_length, np.int32), np.zeros(seq_length, bool)
        self.starts, self.answers, self.room = [], [], seq_length

    def put(self, document, position, prefix):
        """Add a piece of a document (encoding.Encoded) from `position` on, as much as there is room for; returns where it ends.

        Each piece is a text of its own to the base model, so each begins with the tokenizer's `prefix`, a list of fewer than n ids, unless
        a chat template leaves that out; where the row has no room for more, what fits of it fills the row.
        """
        filled = len(self.tokens) - self.room
        added = (missing_prefix(document.tokens[position:], prefix) if document.prefixed else [])[: self.room]
        begin = filled + len(added)
        end = position + min(self.room - len(added), len(document.tokens) - position)
        self.starts.append(filled)
        self.tokens[filled:begin] = added
        self.tokens[begin : begin + end - position] = document.tokens[position:end]
        self.own[begin : begin + end - position] = True
        self.answers.extend(answers_within(document.answers, position, end, begin - position))
        self.room -= len(added) + end - position
        return end


def pack(documents, seq_length, prefix):
    """Lay documents end to end and yield each full `Row`; what does not fill the last one is dropped."""
    row = Row(seq_length)
    for document in documents:
        position = 0
        while position < len(document.tokens):
            position = row.put(document, position, prefix)
            if not row.room:
                yield row
                row = Row(seq_length)


def pack_whole(documents, seq_length, prefix):
    """Yield `Row`s in which documents are whole where a row can hold them: an answer hangs on all that came before it.

    A document goes to where it leaves the least room of OPEN_ROWS rows. What stays free in a row is padding. Those longer than a row fill
    rows of their own, up to their last piece.
    """
    rows = []
    for document in documents:
        position = 0
        while position < len(document.tokens):
            need = min(len(prefix) * document.prefixed + len(document.tokens) - position, seq_length)
            row = min((row for row in rows if row.room >= need), key=lambda row: row.room, default=None)
            if row is None:
                row = Row(seq_length)
                rows.append(row)
            position = row.put(document, position, prefix)
            if len(rows) > OPEN_ROWS or not row.room:
                fullest = min(rows, key=lambda row: row.room)
                rows.remove(fullest)
                yield fullest
    yield from rows


def answers_within(answers, begin, end, shift):
    """Yield what of `answers` int32 [a, 3] lies between two offsets of their document, as (start, end, last), moved by `shift`."""
    for number, (_, first, behind) in enumerate(answers.tolist(), start=1):
        if first < end and begin < behind:
            yield max(first, begin) + shift, min(behind, end) + shift, number == len(answers)
