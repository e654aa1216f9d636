"""A tokenizer of fifty words, and folders prepared with it, for the tests of `data`."""

import json

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from data.prepare.encoding import text_of
from data.prepare.run import prepare
from data.reader import read_manifest

WORDS = [f"w{number}" for number in range(50)]
SPECIAL = ["<eos>", "<unk>", "<s>"]
EOS, UNKNOWN, BOS = 50, 51, 52


def write_tokenizer(folder, eos="<eos>", words=WORDS, template=None):
    """A word-level tokenizer.json and its config; word w7 is token 7. With a template of texts, e.g. "<s> $A", it also has <s>."""
    special = SPECIAL if template else SPECIAL[:2]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate([*words, *special])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    if template:
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(zip(SPECIAL, (EOS, UNKNOWN, BOS))))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **({"eos_token": eos} if eos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def write_corpus(folder, documents):
    """One text file per list of token numbers; those of SPECIAL are spelt out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tokens in enumerate(documents):
        (folder / f"{number:04d}.txt").write_text(" ".join([*WORDS, *SPECIAL][token] for token in tokens))
    return str(folder)


def distinct_documents(count, length):
    """Documents that differ, each of `length` tokens."""
    return [[(number // 50 + position * (number % 50 + 1)) % 50 for position in range(length)] for number in range(count)]


def as_text(tokens):
    """A text of these tokens, as it comes out of the tokenizer."""
    return text_of(np.array(tokens, np.int32))


def prepare_small(tmp_path, documents=None, out="prepared", template=None, **settings):
    """Prepare documents (lists of token numbers) into tmp_path/out; returns its path."""
    source = write_corpus(tmp_path / "corpus", documents or distinct_documents(40, 20))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template=template)
    settings = {"seq_length": 16, "prompt_length": 4, **settings}
    prepare(source=source, tokenizer=tokenizer, out_dir=str(tmp_path / out), **settings)
    return tmp_path / out


def rows_of(folder, split="train"):
    """(tokens, document_starts) of every row, in the order written."""
    manifest = read_manifest(folder)
    tables = [pq.read_table(folder / shard["file"]) for shard in manifest["tables"][f"rows-{split}"]["shards"]]
    return [(row["tokens"], row["document_starts"]) for table in tables for row in table.to_pylist()]


def pieces_of(rows):
    """The rows cut at their document starts."""
    return [tokens[start:end] for tokens, starts in rows for start, end in zip(starts, [*starts[1:], len(tokens)])]
