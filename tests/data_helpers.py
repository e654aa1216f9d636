"""A tokenizer of fifty words, and folders prepared with it, for the tests of `data`."""

import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from data.prepare import prepare

WORDS = [f"w{number}" for number in range(50)]
EOS = 50


def write_tokenizer(folder, eos="<eos>", words=WORDS):
    """A word-level tokenizer.json and its config; word w7 is token 7."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate([*words, "<eos>", "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **({"eos_token": eos} if eos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def write_corpus(folder, documents):
    """One text file per list of token numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tokens in enumerate(documents):
        (folder / f"{number:04d}.txt").write_text(" ".join(WORDS[token] for token in tokens))
    return str(folder)


def distinct_documents(count, length):
    """Documents that differ, each of `length` tokens."""
    return [[(number // 50 + position * (number % 50 + 1)) % 50 for position in range(length)] for number in range(count)]


def prepare_small(tmp_path, documents=None, out="prepared", **settings):
    """Prepare documents (lists of token numbers) into tmp_path/out; returns its path."""
    source = write_corpus(tmp_path / "corpus", documents or distinct_documents(40, 20))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = {"seq_length": 16, "prompt_length": 4, **settings}
    prepare(source=source, tokenizer=tokenizer, out_dir=str(tmp_path / out), **settings)
    return tmp_path / out
