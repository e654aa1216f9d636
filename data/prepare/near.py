"""Documents that are nearly those read before: found by MinHash and locality-sensitive hashing, which `datasketch` does."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.prepare.overlap import hashed
from fms_spec.errors import UserError

CHARACTERS = 24  # of a shingle, about five words; characters, as not all languages part words by spaces
KEPT = 4  # one shingle in so many is looked at, chosen by its hash, so the same ones of every document: as many as there are tokens
PERMUTATIONS = 128  # at a similarity of 0.8 the estimate is off by 0.035 (one standard deviation, sqrt(s (1 - s) / PERMUTATIONS))
NEAR = "near copies"


class NearCopies:
    """What was read so far, by its shingles. Takes about 4 KB of memory a document.

    Args:
        threshold: the Jaccard similarity of two documents' shingles from which on they count as the same, over 0 and up to 1.

    Raises:
        UserError: the threshold is none, or `datasketch` is not there.
    """

    def __init__(self, threshold):
        if not 0 < threshold <= 1:
            raise UserError(f"--near_duplicates={threshold}: a similarity, over 0 and up to 1, such as 0.8")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError("--near_duplicates: needs datasketch; pip install 'fms-spec[near-duplicates]', or leave it out") from None
        self.new = MinHash
        self.threshold, self.index, self.signatures = threshold, MinHashLSH(threshold, PERMUTATIONS), []

    def seen(self, document, _):
        """(why, "") of a `sources.Document` that is near to one before, None of others, which are kept in mind."""
        values = shingles(document)
        if not len(values):  # a conversation without a word of user or assistant
            return None
        signature = self.new(PERMUTATIONS, hashfunc=int, scheme="affine32")
        signature.update_batch(values.tolist())
        for number in self.index.query(signature):
            if np.mean(self.signatures[number] == signature.hashvalues) >= self.threshold:
                return NEAR, ""
        self.index.insert(len(self.signatures), signature)
        self.signatures.append(signature.hashvalues)
        return None


def shingles(document):
    """Hashes of a document's shingles, uint32 values [some], once each; of a conversation only what its user and assistant say."""
    codes = np.frombuffer(" ".join(" ".join(document.texts).split()).encode("utf-32-le"), np.uint32)
    if not len(codes):
        return codes
    hashes = np.unique(hashed(sliding_window_view(codes, min(CHARACTERS, len(codes)))) >> np.uint64(32))
    kept = hashes[hashes % KEPT == 0]
    return kept if len(kept) else hashes
