"""What a base model's own files say of it, before any weight is read: its directory, config and tokens that end a text."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fms_spec import transformers_backend
from fms_spec.errors import UserError
from fms_spec.hub import local_directory
from fms_spec.weights import weight_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")  # of a config
SHORTEST = 8  # tokens of a context: what `proof` needs for a text that is read in pieces
ATTENDING = {"full_attention", "sliding_attention"}  # kinds of layers whose cache can drop tokens like any other


def resolve_base_model(name: Path | str) -> Path:
    """Directory of a base model given as a directory or a Hugging Face hub name.

    Raises:
        UserError: no such directory or hub model, or one without config or safetensors weights.
    """
    path = local_directory("base model", name)
    if not (path / "config.json").is_file():
        raise UserError(f"base model {name}: no config.json in it, so it is not a Hugging Face model directory")
    weight_files(path)
    return path


def read_config(path: Path | str) -> PretrainedConfig:
    """The model's `transformers` config, of its text part where it also reads images, refused where speculation on it can't be exact.

    Raises:
        UserError: an unreadable config; layers that don't attend to their whole cache or a sliding window of it; rotary positions that
        change with the length of the text.
    """
    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = whole.get_text_config(decoder=True)
        config.architectures = config.architectures or whole.architectures
        unfit = why_unfit(config)
    except Exception as error:  # of many kinds: a config is checked by what reads it
        raise UserError(f"base model {path}: its config.json can't be used ({transformers_backend.first_line(error)})") from error
    if unfit:
        raise UserError(f"base model {path}: {unfit}")
    return config


def why_unfit(config: PretrainedConfig) -> str | None:
    """What in a config can't be honoured, in words, or None."""
    missing = [name for name in NEEDED if not isinstance(getattr(config, name, None), int) or getattr(config, name) < 1]
    if missing:
        return f"a {type(config).__name__} with no {missing[0]}, or none that is a number from 1 on, is no causal language model"
    if not isinstance(config.architectures or [], list):
        return f"architectures {config.architectures} in its config.json is no list"
    if getattr(config, "transformers_weights", None):
        named = f"transformers_weights in its config.json names {config.transformers_weights}"
        return f"{named}, which engines don't read; rename the files instead"
    if "head_dim" in (getattr(config, "per_layer_attributes", None) or ()):
        return "its layers have heads of different widths, which the one cache doesn't hold"
    kinds = set(getattr(config, "layer_types", None) or [])
    others = sorted(kinds - ATTENDING) or ["chunked_attention"] * bool(getattr(config, "attention_chunk_size", None))
    if others:
        return f"only full attention and sliding windows are supported; the cache of {others[0]} can't drop tokens"
    if "sliding_attention" in kinds and not getattr(config, "sliding_window", None):
        return "its layer_types ask for sliding_attention, and it has no sliding_window"
    for kind in rope_kinds(config):
        if kind == "dynamic":
            return "rope_type dynamic hangs on the length of the text, and engines disagree how; set another"
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            return f"rope_type {kind} is none that transformers knows"
    if context_length(config) < SHORTEST:
        return f"a context of {context_length(config)} tokens is too short"
    return None


def rope_kinds(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """{rope_type: its numbers} of a config, whose kinds of layers may have one each."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [parameters] if "rope_type" in parameters else [value for value in parameters.values() if isinstance(value, dict)]
    return {group.get("rope_type", "default"): group for group in groups}


def context_length(config: PretrainedConfig) -> int:
    """Tokens of the longest text. With longrope those of its short factors: for longer ones all positions, and all states, are others."""
    short = rope_kinds(config).get("longrope", {}).get("original_max_position_embeddings")
    return min(short or config.max_position_embeddings, config.max_position_embeddings)


def attention_heads(config: PretrainedConfig) -> tuple[int, int]:
    """(query heads, key-value heads) of a layer."""
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_width(config: PretrainedConfig) -> int:
    """Coordinates of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read_eos_token_ids(path: Path | str, config: PretrainedConfig) -> set[int]:
    """Set of end-of-sequence token ids, from generation_config.json where there is one, else from the config.

    Raises:
        UserError: a generation_config.json that can't be read, or ids that are no integers.
    """
    file, eos = Path(path) / "generation_config.json", None
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if os.path.lexists(file) else None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({transformers_backend.first_line(error)}); copy or download it again") from error
    eos = config.eos_token_id if eos is None else eos
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int for token in eos):
        raise UserError(f"base model {path}: its eos_token_id {eos} is no list of token ids; correct generation_config.json or config.json")
    return set(eos)
