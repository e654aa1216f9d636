"""Documents that share a long run of tokens with what is evaluated on. Shapes: n tokens of a document, p places in texts."""

from itertools import chain

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.prepare.rows import ANY_TEXT, Wanted
from data.prepare.sources import open_source
from fms_spec.errors import UserError

# Of 1,760 pages and sources (8.8 million tokens of SmolLM2's) that have nothing to do with Spec-Bench, 18 share a run of 10 tokens with one
# of its 560 turns, and none one of 13; two of its turns share one of 20 with each other, none one of 25. Half of its turns have under 50
# tokens and could not be found with those, 31% under 25.
RUN = 25
WINDOW = (RUN + 1) // 2  # every run of a document has a window in it that begins at a multiple of its length: only those are looked up
AROUND = RUN - WINDOW  # tokens on each side of a window that a run around it may take
HASHING = np.random.default_rng(0).integers(0, 2**63, AROUND + WINDOW + AROUND, np.uint64) * np.uint64(2) + np.uint64(1)
NONE, EDGE = -1, -2  # of the evaluated texts, and of a document: what no token equals
OVERLAPS = f"share {RUN} tokens with the evaluation"


class Evaluation:
    """The runs of tokens of evaluated texts.

    Every text of their rows counts, whatever its column, and each by itself, as no chat template joins them; but not what system and
    tools say, nor descriptions of tools: conversations share those without having a question in common.

    Args:
        path: a file, folder, pattern or data set, as --source. tokenizer: `DocumentTokenizer`.

    Raises:
        UserError: nothing there that can be read, or no text of RUN tokens.
    """

    def __init__(self, path, tokenizer):
        owners = {}  # each text once -> where it stands
        try:
            self.path, self.source = path, open_source(path, Wanted(format=ANY_TEXT))
            for document in self.source.documents(np.random.default_rng(0)):
                for text in [document.content] if isinstance(document.content, str) else document.content or []:
                    owners.setdefault(text, (document.file, document.row))
        except UserError as error:
            raise UserError(f"--evaluation={path}: {error}") from None
        begin = len(tokenizer.prefix)
        encoded = [tokens[begin:] for tokens in tokenizer.encode(list(owners))]
        self.texts, self.shorter = len(encoded), sum(len(tokens) < RUN for tokens in encoded)
        if self.shorter == self.texts:
            raise UserError(f"--evaluation={path}: has no text of {RUN} tokens, so that nothing could be told by it; leave it out")
        gap = np.full(AROUND, NONE, np.int32)
        self.tokens = np.concatenate([gap, *chain.from_iterable((tokens, gap) for tokens in encoded)])
        self.begins, self.owners = np.cumsum([0, *(len(tokens) + AROUND for tokens in encoded[:-1])]), list(owners.values())
        contexts = sliding_window_view(self.tokens, len(HASHING))
        _, places = np.unique(hashed(contexts), return_index=True)  # what many texts begin with is looked at once
        windows = hashed(contexts[places, AROUND : AROUND + WINDOW])
        order = np.argsort(windows, kind="stable")
        self.hashes, self.contexts = windows[order], places[order]

    def overlap(self, _, encoded):
        """(why, where) of a document, encoding.Encoded, that shares a run with an evaluated text, None of others."""
        tokens = encoded.tokens
        starts = np.arange(0, len(tokens) - WINDOW + 1, WINDOW)
        looked_up = hashed(tokens[: len(starts) * WINDOW].reshape(-1, WINDOW))
        first, behind = (np.searchsorted(self.hashes, looked_up, side) for side in ("left", "right"))
        for window in np.flatnonzero(first < behind):
            places = self.contexts[first[window] : behind[window]]
            own = np.full(len(HASHING), EDGE, np.int32)
            low, high = starts[window] - AROUND, starts[window] + WINDOW + AROUND
            own[max(0, -low) : len(own) - max(0, high - len(tokens))] = tokens[max(0, low) : high]
            found = places[runs_around(sliding_window_view(self.tokens, len(own))[places] == own) >= RUN]
            if len(found):
                owner = np.searchsorted(self.begins, found[0], "right") - 1
                return OVERLAPS, self.source.label(*self.owners[owner])
        return None

    def identity(self):
        """What the manifest records of it."""
        return {"path": self.path, "tokens_shared": RUN, "texts": self.texts, "shorter_texts": self.shorter}


def hashed(windows):
    """uint64 [p] of int32 [p, tokens]; equal windows have equal ones."""
    return sum(column.astype(np.uint64) * factor for column, factor in zip(windows.T, HASHING))  # one column at a time takes no memory


def runs_around(equal):
    """Lengths of the runs around the windows in the middle, where they are equal too: int64 [p] of bool [p, AROUND + WINDOW + AROUND]."""
    left, middle, right = np.split(equal, [AROUND, AROUND + WINDOW], axis=1)
    sides = [np.cumprod(side, axis=1).sum(1) for side in (left[:, ::-1], right)]
    return (WINDOW + sides[0] + sides[1]) * middle.all(1)
