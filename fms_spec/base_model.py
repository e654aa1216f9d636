"""The frozen base model: the one seam to ibm-fms, with `transformers` for what ibm-fms lacks.

Shapes: b batch, n tokens, d base width, v vocabulary.
"""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fms_spec import fms_backend, transformers_backend
from fms_spec.attention import CACHED, PACKED, Span, asking, document_spans, span_positions
from fms_spec.batch import upload
from fms_spec.candidates import Tree
from fms_spec.errors import UserError
from fms_spec.hub import local_directory
from fms_spec.kv_cache import KVCache, TransformersCacheView, Visible
from fms_spec.packed_linear import PackedLinear, can_pack, pack_linears
from fms_spec.read_out import capped, read_out, with_bias
from fms_spec.rotary import look_up_once
from fms_spec.weights import fingerprint, weight_files

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


class BaseModel:
    """A frozen language model that gives hidden states, and vocabulary logits only where they are asked for.

    Attributes:
        name: directory or hub name as given. fingerprint: see `weights.fingerprint`. backend: "fms" or "transformers".
        width (d), vocab_size (v), context_length (tokens), eos_token_ids (set), dtype, device.
        embedding_weight [v, d]: the frozen token embedding. output_weight [v, d]: the frozen lm_head; where it has a bias, see
        `read_out.with_bias`. output_cap: see `read_out.capped`; None for most models.
    """

    def __init__(
        self, name: Path | str, *, dtype: str = "bfloat16", backend: str = "auto", device: torch.device | str | None = None,
        proved: bool = False,
    ):  # fmt: skip
        """Load the model.

        Args:
            name: directory or hub name. dtype: a key of DTYPES. backend: "fms", "transformers", or "auto" for ibm-fms where it computes
            what `transformers` does. device: a torch device; the first GPU if there is one by default. proved: `backend` is what
            `proof.settle_backend` has said of this model.

        Raises:
            UserError: not a model that can be loaded, or one that this code doesn't compute as `transformers` does.
        """
        from fms_spec.proof import settle_backend  # which loads a part of the model through this class

        path = resolve_base_model(name)
        config = read_config(path)
        if not proved:
            backend = settle_backend(name, path, config, backend)
        self.open(name, path, config, backend, DTYPES[dtype], device)

    def open(
        self, name: Path | str, path: Path, config: PretrainedConfig, backend: str, dtype: torch.dtype,
        device: torch.device | str | None = None, model: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """Load without proof. model: a loaded `transformers` one, to be taken instead of the files."""
        self.path, self.name, self.config, self.backend, self.dtype = path, str(name), config, backend, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.query_heads, self.kv_groups = attention_heads(config)
        self.fingerprint = fingerprint(path)
        if backend == "fms":
            self.model: Any = self._load_fms()
        else:
            self.model = model or self._load_transformers()
        self._settle()

    def _load_fms(self) -> nn.Module:
        return fms_backend.load(self.path, self.config, self.dtype, self.device)

    def _load_transformers(self) -> nn.Module:
        return transformers_backend.load(self.name, self.path, self.config, self.dtype).to(self.device)

    def _settle(self) -> None:
        """Freeze the loaded model and take out of it what the attributes name."""
        if self.backend == "fms":
            self.trunk, lm_head = self.model.base_model, self.model.head
            self.embedding_weight: torch.Tensor = self.trunk.embedding.weight
            look_up_once(self.trunk, self.config, self.device)
        else:
            self.trunk, lm_head = self.model.get_decoder(), self.model.get_output_embeddings()
            self.embedding_weight = self.model.get_input_embeddings().weight
        self.model.eval().requires_grad_(False)
        weight, bias, self.output_cap = transformers_backend.output_of(lm_head, self.config)
        self.output_weight = with_bias(weight, bias)
        self.width, self.vocab_size = self.config.hidden_size, len(weight)
        self.context_length = context_length(self.config)
        self.eos_token_ids = read_eos_token_ids(self.path, self.config)
        outside = sorted(token for token in self.eos_token_ids if not 0 <= token < self.vocab_size)
        if outside:
            raise UserError(
                f"base model {self.name}: EOS token {outside[0]} is outside its vocabulary of {self.vocab_size}; correct eos_token_id in "
                "generation_config.json or config.json"
            )
        self.packed_output: PackedLinear | None = None  # see `pack`

    def together(self) -> AbstractContextManager[None]:
        """A context in which processes that hold one model between them may call for different numbers of forwards."""
        return nullcontext()

    @torch.no_grad()
    def hidden_states(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        """States after the final norm for packed rows; no vocabulary logits are computed.

        Args:
            tokens: int64 [b, n]. segment_ids: int [b, n], on the CPU; see `attention.document_spans`.

        Returns:
            [b, n, d] in the model's dtype; padding holds arbitrary finite values.

        Raises:
            UserError: a document longer than the base model's context.
        """
        spans = document_spans(segment_ids)
        longest = max((end - start for _, start, end in spans), default=0)
        if longest > self.context_length:
            raise UserError(f"a document piece of {longest} tokens is over the context of {self.name}, {self.context_length}")
        positions = upload(span_positions(segment_ids), self.device)
        tokens = upload(tokens, self.device) if tokens.device.type == "cpu" else tokens
        return self.packed_states(tokens, positions, spans)

    def packed_states(self, tokens: torch.Tensor, positions: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """`hidden_states` with the work on the host done: positions int64 [b, n] and `document_spans`' spans of the tokens' documents."""
        if self.backend == "fms":
            return self.trunk(tokens, position_ids=positions, use_cache=False, attn_name=PACKED, spans=spans)[0]
        self.trunk.config._attn_implementation = PACKED
        with asking(spans):
            return self.trunk(tokens, position_ids=positions, use_cache=False).last_hidden_state

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty `KVCache` for `batch` sequences of up to `capacity` tokens, candidates among them."""
        layers, width = self.config.num_hidden_layers, head_width(self.config)
        return KVCache(layers, batch, capacity, self.kv_groups, width, self.dtype, self.device)

    @torch.no_grad()
    def extend(self, tokens: torch.Tensor, cache: KVCache, tree: Tree | None = None) -> torch.Tensor:
        """Run new tokens on top of a cache; they are stored behind what each sequence holds, and count only once accepted there.

        Args:
            tokens: int64 [b, n], on the model's device. tree: `candidates.Tree` of n nodes, which then see what the cache holds and their
                ancestors, at positions by their depth; by default the tokens are a text, each seeing those before it.

        Returns:
            [b, n, d] states after the final norm.
        """
        place = cache.place(tokens.shape[1])
        visible = Visible(cache, place, tree, self.query_heads // self.kv_groups, self.dtype)
        if self.backend == "fms":
            layers = [cache.layer(index) for index in range(len(cache.store))]
            return self.trunk(
                tokens, position_ids=visible.positions, past_key_value_states=layers, use_cache=True, attn_name=CACHED, place=place,
                visible=visible,
            )[0]  # fmt: skip
        self.trunk.config._attn_implementation = CACHED
        view = TransformersCacheView(cache, place)
        with asking(visible):
            return self.trunk(tokens, position_ids=visible.positions, past_key_values=view, use_cache=True).last_hidden_state

    def pack(self) -> None:
        """Lay the weights out for forwards over a few tokens, where that pays (bf16 on a CPU); for decoding, not for training.

        The lm_head is laid out beside the shared one, which heads and a tied embedding go on reading.
        """
        pack_linears(self.trunk)
        if can_pack(self.output_weight):
            self.packed_output = PackedLinear(self.output_weight)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits [..., v] of states [..., d]."""
        states = read_out(states, self.output_weight)
        logits = F.linear(states, self.output_weight) if self.packed_output is None else self.packed_output(states)
        return capped(logits, self.output_cap)


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
    found = getattr(config, "rope_parameters", None) or {}
    groups = [found] if "rope_type" in found else [value for value in found.values() if isinstance(value, dict)]
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
    file, found = Path(path) / "generation_config.json", None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if os.path.lexists(file) else None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({transformers_backend.first_line(error)}); copy or download it again") from error
    found = config.eos_token_id if found is None else found
    found = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(token) is not int for token in found):
        raise UserError(
            f"base model {path}: its eos_token_id {found} is no list of token ids; correct generation_config.json or config.json"
        )
    return set(found)
