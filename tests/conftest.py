"""Tiny real models, tokenizers and prepared data, made on the spot: no network, no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.prepare import prepare
from fms_spec.base_model import BaseModel

WORDS = 96


def write_tokenizer(directory, words=WORDS):
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(words - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)


def write_model(directory, seed=0, kind="llama", **changes):
    """A random model with grouped-query heads and sharp logits, so that greedy continuations don't hang on rounding."""
    torch.manual_seed(seed)
    values = dict(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=None, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    if kind == "granite":
        config = GraniteConfig(**values, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2)
        GraniteForCausalLM(config).save_pretrained(directory)
    else:
        LlamaForCausalLM(LlamaConfig(**values | changes)).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def base_model(model_dir):
    return BaseModel(str(model_dir), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """Twelve documents of 40 to 150 words."""
    directory = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        words = torch.randint(0, WORDS - 2, (40 + 10 * i,), generator=generator).tolist()
        (directory / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    return directory


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, corpus_dir, model_dir):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare(source=str(corpus_dir), tokenizer=str(model_dir), out_dir=str(directory), seq_length=64, prompt_length=8, held_out=3)
    return directory
