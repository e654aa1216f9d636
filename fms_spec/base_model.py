"""The frozen base model: the one seam to ibm-fms, with `transformers` for architectures that ibm-fms lacks.

Shapes: b batch, n tokens, d base width, v vocabulary.
"""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from fms_spec.attention import CACHED, PACKED, document_spans, fold_mask, span_positions
from fms_spec.batch import upload
from fms_spec.errors import UserError
from fms_spec.hub import local_directory
from fms_spec.kv_cache import KVCache, TransformersCacheView, visible
from fms_spec.packed_linear import PackedLinear, can_pack, pack_linears
from fms_spec.rotary import look_up_once

# What ibm-fms loads from a Hugging Face checkpoint and what was compared with `transformers` here (tests/test_base_model.py).
FMS_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "Qwen3ForCausalLM")
FMS_ANY_HEAD_WIDTH = ("Qwen3ForCausalLM",)  # the others only with heads that together are as wide as the model
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bytes of every tensor that enter the fingerprint: a fine-tune changes nearly all of them, and 70B weights take seconds, not minutes.
FINGERPRINT_BYTES = 4096


def resolve_base_model(name):
    """Directory of a base model given as a directory or a Hugging Face hub name.

    Raises:
        UserError: no such directory or hub model, or one without config or safetensors weights.
    """
    path = local_directory("base model", name)
    if not (path / "config.json").is_file():
        raise UserError(f"base model {name}: no config.json in it, so it is not a Hugging Face model directory")
    if not list(path.glob("*.safetensors")):
        raise UserError(f"base model {name}: no *.safetensors weights in it; save the model with save_pretrained first")
    return path


def fingerprint(path):
    """Hash (hex, 32 characters) that tells base models apart, whatever backend or dtype they are loaded with.

    Over every tensor's name, dtype, shape and 4 KiB from its middle, in name order, so that re-sharded files agree.

    Raises:
        UserError: a weights file that can't be read.
    """
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass  # checks that the header and the file's size agree
            with open(file, "rb") as stream:
                header_size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(header_size))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    start, end = entry["data_offsets"]
                    stream.seek(8 + header_size + start + max(0, (end - start - FINGERPRINT_BYTES) // 2))
                    sample = stream.read(min(FINGERPRINT_BYTES, end - start))
                    tensors[name] = f"{name} {entry['dtype']} {entry['shape']} ".encode() + sample
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"base model weights {file}: can't be read ({error}); copy or download them again") from error
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()[:32]


class BaseModel:
    """A frozen language model that gives hidden states, and vocabulary logits only where they are asked for.

    Attributes:
        name: directory or hub name as given. fingerprint: see `fingerprint`. backend: "fms" or "transformers".
        width (d), vocab_size (v), context_length (tokens), eos_token_ids (set), dtype, device.
        embedding_weight [v, d] and output_weight [v, d]: the frozen token embedding and lm_head, shared with the model.
    """

    def __init__(self, name, *, dtype="bfloat16", backend="auto", device=None):
        """Load the model.

        Args:
            name: directory or hub name. dtype: a key of DTYPES. backend: "fms", "transformers", or "auto" for ibm-fms where it
            knows the architecture. device: a torch device; the first GPU if there is one by default.

        Raises:
            UserError: not a model that can be loaded, or one whose cache can't drop tokens or whose logits are not a linear map.
        """
        path = resolve_base_model(name)
        self.path, self.name = path, str(name)
        self.config = read_config(path)
        self.backend = pick_backend(name, self.config, backend)
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.fingerprint = fingerprint(path)
        self.query_heads, self.kv_groups = attention_heads(self.config)
        self.model = self._load_fms() if self.backend == "fms" else self._load_transformers()
        self._settle()

    def _load_fms(self):
        from fms.models import get_model

        # Among several processes ibm-fms would split the model by itself, were it not told of a strategy.
        return get_model(
            "hf_pretrained", model_path=str(self.path), data_type=self.dtype, device_type=self.device.type, distributed_strategy="none"
        )

    def _load_transformers(self):
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype).to(self.device)

    def _settle(self):
        """Freeze the loaded model and take out of it what the attributes name."""
        if self.backend == "fms":
            self.trunk = self.model.base_model
            look_up_once(self.trunk, self.config.max_position_embeddings, self.device)
            self.embedding_weight, self.output_weight = self.trunk.embedding.weight, self.model.head.weight
        else:
            self.trunk = self.model.get_decoder()
            self.embedding_weight = self.model.get_input_embeddings().weight
            self.output_weight = self.model.get_output_embeddings().weight
        self.model.eval().requires_grad_(False)
        self.width, self.vocab_size = self.config.hidden_size, self.output_weight.shape[0]
        if getattr(self.config, "logits_scaling", 1.0) != 1.0:  # Granite divides its logits; a divided lm_head says the same
            self.output_weight = self.output_weight / self.config.logits_scaling
        self.context_length = self.config.max_position_embeddings
        self.eos_token_ids = read_eos_token_ids(self.path, self.config)
        self.packed_output = None  # see `pack`

    def together(self):
        """A context in which processes that hold one model between them may call for different numbers of forwards."""
        return nullcontext()

    @torch.no_grad()
    def hidden_states(self, tokens, segment_ids):
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

    def packed_states(self, tokens, positions, spans):
        """`hidden_states` with the work on the host done: positions int64 [b, n] and `document_spans`' spans of the tokens' documents."""
        if self.backend == "fms":
            return self.trunk(tokens, position_ids=positions, use_cache=False, attn_name=PACKED, spans=spans)[0]
        self.trunk.config._attn_implementation = PACKED
        return self.trunk(tokens, position_ids=positions, use_cache=False, spans=spans).last_hidden_state

    def new_cache(self, batch, capacity):
        """An empty `KVCache` for `batch` sequences of up to `capacity` tokens, candidates among them."""
        layers, width = self.config.num_hidden_layers, head_width(self.config)
        return KVCache(layers, batch, capacity, self.kv_groups, width, self.dtype, self.device)

    @torch.no_grad()
    def extend(self, tokens, cache, tree=None):
        """Run new tokens on top of a cache; they are stored behind what each sequence holds, and count only once accepted there.

        Args:
            tokens: int64 [b, n], on the model's device. tree: `candidates.Tree` of n nodes, which then see what the cache holds and their
                ancestors, at positions by their depth; by default the tokens are a text, each seeing those before it.

        Returns:
            [b, n, d] states after the final norm.
        """
        place = cache.place(tokens.shape[1])
        positions = place.slots if tree is None else cache.lengths[:, None] + tree.depths
        mask = visible(cache, place, tree)
        if mask is not None:
            mask = fold_mask(mask, self.query_heads // self.kv_groups, self.dtype)
        if self.backend == "fms":
            layers = [cache.layer(index) for index in range(len(cache.store))]
            return self.trunk(
                tokens, position_ids=positions, past_key_value_states=layers, use_cache=True, attn_name=CACHED, place=place, mask=mask
            )[0]
        self.trunk.config._attn_implementation = CACHED
        view = TransformersCacheView(cache, place)
        return self.trunk(tokens, position_ids=positions, past_key_values=view, use_cache=True, mask=mask).last_hidden_state

    def pack(self):
        """Lay the weights out for forwards over a few tokens, where that pays (bf16 on a CPU); for decoding, not for training.

        The lm_head is laid out beside the shared one, which heads and a tied embedding go on reading.
        """
        pack_linears(self.trunk)
        if can_pack(self.output_weight):
            self.packed_output = PackedLinear(self.output_weight)

    def logits(self, states):
        """Vocabulary logits [..., v] of states [..., d]."""
        return F.linear(states, self.output_weight) if self.packed_output is None else self.packed_output(states)


def read_config(path):
    """The model's `transformers` config, refused where speculation on it can't be exact.

    Raises:
        UserError: an unreadable config; sliding windows or state-space layers (their caches can't drop tokens); soft-capped logits.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base model {path}: its config.json can't be used ({str(error).splitlines()[0]})") from error
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or (windowed and "layer_types" not in config.to_dict()):
        raise UserError(f"base model {path}: only full attention is supported; sliding windows and state spaces can't drop tokens")
    if getattr(config, "final_logit_softcapping", None):
        raise UserError(f"base model {path}: soft-capped logits are not supported")
    return config


def pick_backend(name, config, backend):
    """ "fms" or "transformers" for a model's `transformers` config; "auto" is ibm-fms where it knows the architecture.

    Raises:
        UserError: ibm-fms was asked for and doesn't know it.
    """
    architecture = (config.architectures or ["unknown"])[0]
    usual = architecture in FMS_ANY_HEAD_WIDTH or head_width(config) == default_head_width(config)
    known = architecture in FMS_ARCHITECTURES and usual
    if backend == "fms" and not known:
        raise UserError(f"base model {name}: ibm-fms doesn't load this {architecture} here; use backend=transformers")
    return backend if backend != "auto" else ("fms" if known else "transformers")


def attention_heads(config):
    """(query heads, key-value heads) of a layer."""
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_width(config):
    """Coordinates of one attention head."""
    return getattr(config, "head_dim", None) or default_head_width(config)


def default_head_width(config):
    return config.hidden_size // config.num_attention_heads


def read_eos_token_ids(path, config):
    """Set of end-of-sequence token ids, from generation_config.json where there is one, else from the config."""
    file = Path(path) / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    found = config.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else set() if found is None else {found}
