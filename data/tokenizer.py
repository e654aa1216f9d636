"""The base model's tokenizer: loading, identity, and the encoding of whole documents."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.manifest import reason
from fms_spec.errors import UserError

# Text handed to the tokenizer's threads at once; enough to keep them busy, small against memory.
BATCH_CHARACTERS = 2**21
BATCH_DOCUMENTS = 10_000
# One call on one huge text would use one thread and a hundred bytes of memory per character, so longer documents are encoded in
# pieces, cut where a line begins. Shorter ones get exactly the tokens that the tokenizer gives the whole text.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class DocumentTokenizer:
    """A fast tokenizer without truncation, padding or added special tokens, with what identifies it."""

    name: str
    backend: Tokenizer
    sha256: str
    vocab_size: int
    eos_token_id: int

    def encode(self, texts):
        """Token ids of each text, without the end-of-text token: a list of int32 arrays.

        The tokenizer's own threads share the texts, which does not change the result.
        """
        pieces = [list(cut(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        encodings = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        return [np.concatenate([np.array(next(encodings).ids, np.int32) for _ in parts]) for parts in pieces]

    def identity(self):
        """What the manifest records of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
        }


def load_tokenizer(name):
    """Load a tokenizer by folder or Hub name.

    Raises:
        UserError: it cannot be loaded, is not a fast one, or has no end-of-text token.
    """
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise UserError(f"tokenizer {name}: no such folder")
    from transformers import AutoTokenizer  # takes seconds to import, and readers of prepared data do not need it

    try:
        loaded = AutoTokenizer.from_pretrained(os.path.expanduser(name))
        backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # the library raises a dozen kinds, from a missing file to a failed import
        need = "it needs a folder with tokenizer.json or a Hub name"
        raise UserError(f"tokenizer {name}: cannot be loaded; {need} ({reason(error)})") from None
    if loaded.eos_token_id is None:
        mend = "set eos_token in its tokenizer_config.json"
        raise UserError(f"tokenizer {name}: has no EOS token, which ends each document; {mend}")
    # Some tokenizer.json files carry a truncation length; it would cut documents, and it is no part of the identity.
    backend.no_truncation()
    backend.no_padding()
    serialised = json.dumps([json.loads(backend.to_str()), loaded.eos_token_id], sort_keys=True)
    return DocumentTokenizer(
        name=name,
        backend=backend,
        sha256=hashlib.sha256(serialised.encode()).hexdigest(),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=loaded.eos_token_id,
    )


def check_tokenizer(manifest, tokenizer_dir):
    """Refuse prepared data whose tokens are not those of the tokenizer in `tokenizer_dir` (the base model's folder).

    Raises:
        UserError: the tokenizers differ.
    """
    loaded, prepared = load_tokenizer(str(tokenizer_dir)), manifest["tokenizer"]
    if loaded.sha256 != prepared["sha256"]:
        raise UserError(
            f"the data was prepared with tokenizer {prepared['name']} (sha256 {prepared['sha256'][:12]}), "
            f"{tokenizer_dir} has another ({loaded.sha256[:12]}); run scripts.prepare_data with --tokenizer={tokenizer_dir}"
        )


def use_threads(workers):
    """Let the tokenizer use `workers` threads (None: one per core). Has an effect only before the first text is encoded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)


def cut(text):
    """Yield `text` in pieces of about PIECE_CHARACTERS, cut after a newline where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start, start + PIECE_CHARACTERS)
        end = newline + 1 if newline > start else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def encode_documents(documents, tokenizer, skipped):
    """Yield (document, tokens) in order, the end-of-text token included; tokens: int32 array.

    Empty documents and those that are not UTF-8 are told to `skipped` and left out.
    """
    batch, characters = [], 0
    for document in documents:
        if document.text is None:
            skipped.add("not UTF-8", document)
            continue
        if not document.text.strip():
            skipped.add("empty", document)
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield from encode_batch(batch, tokenizer)
            batch, characters = [], 0
    if batch:
        yield from encode_batch(batch, tokenizer)


def encode_batch(batch, tokenizer):
    """Yield (document, tokens with the end-of-text token) for a list of documents."""
    for document, tokens in zip(batch, tokenizer.encode([document.text for document in batch]), strict=True):
        yield document, np.append(tokens, np.int32(tokenizer.eos_token_id))
