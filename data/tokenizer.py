"""The base model's tokenizer: loading, identity, what it puts around a text, and the encoding of whole documents."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.manifest import reason
from fms_spec.errors import UserError

# One call on one huge text would use one thread and a hundred bytes of memory per character, so longer documents are encoded in
# pieces, cut where a line begins. Shorter ones get exactly the tokens that the tokenizer gives the whole text.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class DocumentTokenizer:
    """A fast tokenizer without truncation, padding or added special tokens, with what identifies it.

    prefix: list of the ids that it puts before a text in serving, often none. embedding_size: ids that the base model beside it
    knows, None where there is none.
    """

    name: str
    backend: Tokenizer
    sha256: str
    vocab_size: int
    eos_token_id: int
    prefix: list
    embedding_size: int | None

    def encode(self, texts):
        """Token ids of each text as in serving, the prefix first and without the end-of-text token: a list of int32 arrays.

        The tokenizer's own threads share the texts, which does not change the result.
        """
        pieces = [list(cut(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        encodings = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        prefix = np.array(self.prefix, np.int32)
        return [np.concatenate([prefix, *(np.array(next(encodings).ids, np.int32) for _ in parts)]) for parts in pieces]

    @property
    def overflows(self):
        """Whether it has ids that the base model does not know."""
        return self.embedding_size is not None and self.vocab_size > self.embedding_size

    def identity(self):
        """What the manifest records of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            **({"prefix": self.prefix} if self.prefix else {}),
        }


def load_tokenizer(name):
    """Load a tokenizer by folder or Hub name.

    Raises:
        UserError: it cannot be loaded, is not a fast one, has no end-of-text token, puts another one behind a text, or puts tokens
            around it that the base model in the same folder lacks.
    """
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise UserError(f"tokenizer {name}: no such folder")
    from transformers import AutoTokenizer  # takes seconds to import, and readers of prepared data do not need it

    try:
        loaded = AutoTokenizer.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
        backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        prefix, suffix = added_around(loaded)
        embedding_size = read_embedding_size(os.path.expanduser(name))
    except Exception as error:  # the library raises a dozen kinds, from a missing file to a failed import
        need = "it needs a folder with tokenizer.json or a Hub name"
        raise UserError(f"tokenizer {name}: cannot be loaded; {need} ({reason(error)})") from None
    if loaded.eos_token_id is None:
        mend = "set eos_token in its tokenizer_config.json"
        raise UserError(f"tokenizer {name}: has no EOS token, which ends each document; {mend}")
    if suffix not in ([], [loaded.eos_token_id]):
        texts = " ".join(loaded.convert_ids_to_tokens(suffix))
        raise UserError(f"tokenizer {name}: ends a text with {texts}, where only its EOS token may stand; mend its post_processor")
    refuse_unknown([loaded.eos_token_id, *prefix], embedding_size, backend, f"tokenizer {name}")
    # Some tokenizer.json files carry a truncation length; it would cut documents, and it is no part of the identity.
    backend.no_truncation()
    backend.no_padding()
    # Without a prefix as it was before prefixes were known, for the sake of what was prepared then.
    identity = [json.loads(backend.to_str()), loaded.eos_token_id, *([prefix] if prefix else [])]
    serialised = json.dumps(identity, sort_keys=True)
    return DocumentTokenizer(
        name=name,
        backend=backend,
        sha256=hashlib.sha256(serialised.encode()).hexdigest(),
        vocab_size=count_ids(backend),
        eos_token_id=loaded.eos_token_id,
        prefix=prefix,
        embedding_size=embedding_size,
    )


def added_around(loaded):
    """(ids before, ids behind) what a `transformers` tokenizer makes of a text: lists of what it adds to it, as serving does."""
    text, whole = (loaded("a", add_special_tokens=added).input_ids for added in (False, True))
    begin = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
    return whole[:begin], whole[begin + len(text) :]


def without_prefix(tokens, prefix):
    """`tokens` [n] from behind the prefix, a list of ids, that a text may begin with by itself."""
    while prefix and list(tokens[: len(prefix)]) == prefix:
        tokens = tokens[len(prefix) :]
    return tokens


def served_tokenizer(path):
    """The `transformers` tokenizer beside a base model, as serving uses it.

    Raises:
        UserError: its files are damaged, or of a kind that isn't known.
    """
    from transformers import AutoTokenizer  # takes seconds to import, and readers of prepared data do not need it

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of a dozen kinds: the library parses several files of others' making
        raise UserError(f"tokenizer {path}: cannot be loaded ({reason(error)}); copy or download its files again") from None


def encode_prompt(loaded, text):
    """Ids of a text as a `transformers` tokenizer encodes it in serving, but with the prefix once where the text has it too: a list."""
    prefix, _ = added_around(loaded)
    return [*prefix, *without_prefix(loaded(text).input_ids, prefix)]


def count_ids(backend):
    """Ids of a tokenizer, added tokens included."""
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def read_embedding_size(name):
    """Ids that the base model in the tokenizer's folder or Hub name knows, from its config.json; None where there is none.

    Raises:
        OSError: a config.json that is not JSON.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(name)
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))


def refuse_unknown(tokens, embedding_size, backend, where):
    """Refuse ids that a base model does not know.

    Args:
        tokens: ids, a list, array or tensor of any shape. embedding_size: None where it is not known; all are let pass.
        backend: the `tokenizers` one that they are of. where: what they stand in, for the message.

    Raises:
        UserError: names the first such token.
    """
    if embedding_size is None:
        return
    tokens = np.asarray(tokens)
    unknown = tokens[tokens >= embedding_size].tolist()
    if unknown:
        raise UserError(
            f"{where}: token {backend.id_to_token(unknown[0])!r} has id {unknown[0]}, but the tokenizer has {count_ids(backend)} ids, the "
            f"model's embedding {embedding_size}; take the model's own tokenizer, or leave such tokens out"
        )


def check_tokenizer(manifest, tokenizer_dir):
    """The `DocumentTokenizer` in `tokenizer_dir` (the base model's folder), refused where the prepared data's tokens are not its own.

    Raises:
        UserError: the tokenizers differ.
    """
    loaded, prepared = load_tokenizer(str(tokenizer_dir)), manifest["tokenizer"]
    if loaded.sha256 != prepared["sha256"]:
        raise UserError(
            f"the data was prepared with tokenizer {prepared['name']} (sha256 {prepared['sha256'][:12]}), "
            f"{tokenizer_dir} has another ({loaded.sha256[:12]}); run scripts.prepare_data with --tokenizer={tokenizer_dir}"
        )
    return loaded


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
