"""The frozen base model: the one seam to ibm-fms, with `transformers` for what ibm-fms lacks.

Shapes: b batch, n tokens, d base width, k inner layers that were asked for, v vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from fms_spec import fms_backend, transformers_backend
from fms_spec.attention import CACHED, PACKED, Span, asking, document_spans, span_positions
from fms_spec.batch import upload
from fms_spec.candidates import Tree
from fms_spec.errors import UserError
from fms_spec.inner_states import InnerStates
from fms_spec.kv_cache import KVCache, TransformersCacheView, Visible
from fms_spec.model_config import DTYPES, attention_heads, context_length, head_width, read_config, read_eos_token_ids, resolve_base_model
from fms_spec.packed_linear import PackedLinear, can_pack, pack_linears
from fms_spec.proof import layer_stack, settle_backend
from fms_spec.read_out import capped, read_out, with_bias
from fms_spec.rotary import look_up_once
from fms_spec.weights import fingerprint


class BaseModel:
    """A frozen language model that gives hidden states, and vocabulary logits only where they are asked for.

    Attributes:
        name: directory or hub name as given. fingerprint: see `weights.fingerprint`. backend: "fms" or "transformers".
        width (d), vocab_size (v), layers (how many), context_length (tokens), eos_token_ids (set), dtype, device.
        inner_layers: the k ids of `give_layers`. state_width: (1 + k) d, of the states it gives.
        embedding_weight [v, d]: the frozen token embedding. output_weight [v, d]: the frozen lm_head; where it has a bias, see
        `read_out.with_bias`. output_cap: see `read_out.capped`; None for most models.
    """

    inner_layers: tuple[int, ...] = ()
    inner_states: InnerStates | None = None

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
        path = resolve_base_model(name)
        config = read_config(path)
        if not proved:
            backend = settle_backend(name, path, config, backend, BaseModel)
        self.open(name, path, config, backend, DTYPES[dtype], device)

    def open(
        self, name: Path | str, path: Path, config: PretrainedConfig, backend: str, dtype: torch.dtype,
        device: torch.device | str | None = None, model: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """Load without proof. model: a loaded `transformers` one, to be taken instead of the files."""
        self.path, self.name, self.config, self.backend, self.dtype = path, str(name), config, backend, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            # torch's first choice on Hopper and Blackwell, which plans anew, on the host, for every new number of tokens and keys: nearly
            # every call of ours is one, of 65 ms on an H200 (torch 2.11) where known lengths take 0.07.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.query_heads, self.kv_groups = attention_heads(config)
        self.layers = config.num_hidden_layers
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

    @property
    def state_width(self) -> int:
        return (1 + len(self.inner_layers)) * self.width

    def give_layers(self, ids: Sequence[int]) -> None:
        """From now on give beside the final states the residual stream that enters these layers, in this order; see `inner_states`.

        Whoever asks for none leaves a forward as it is: nothing stands in its way.

        Raises:
            UserError: a layer that there isn't.
        """
        if tuple(ids) == self.inner_layers:
            return
        for index in ids:
            if not 0 <= index <= self.layers:
                raise UserError(f"base model {self.name} has {self.layers} layers, no state {index}; correct speculator.base_layers")
        if self.inner_states:
            self.inner_states.remove()
        self.inner_layers, self.inner_states = tuple(ids), None
        if ids:
            stack = layer_stack(self.trunk, self.config.num_hidden_layers)
            self.inner_states = InnerStates(self.name, self.trunk, stack, self.layers, ids, self.width, self.dtype)

    def together(self) -> AbstractContextManager[None]:
        """A context in which processes that hold one model between them may call for different numbers of forwards."""
        return nullcontext()

    @torch.no_grad()
    def hidden_states(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        """States after the final norm, then those of `inner_layers`, for packed rows; no vocabulary logits are computed.

        Args:
            tokens: int64 [b, n]. segment_ids: int [b, n], on the CPU; see `attention.document_spans`.

        Returns:
            [b, n, (1 + k) d] in the model's dtype; padding holds arbitrary finite values.

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
            [b, n, (1 + k) d] states, as `hidden_states` gives them.
        """
        slot_mapping = cache.slot_mapping(tokens.shape[1])
        visible = Visible(cache, slot_mapping, tree, self.query_heads // self.kv_groups, self.dtype)
        if self.backend == "fms":
            layers = [cache.layer(index) for index in range(len(cache.store))]
            return self.trunk(
                tokens, position_ids=visible.positions, past_key_value_states=layers, use_cache=True, attn_name=CACHED,
                slot_mapping=slot_mapping, visible=visible,
            )[0]  # fmt: skip
        self.trunk.config._attn_implementation = CACHED
        view = TransformersCacheView(cache, slot_mapping)
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
        """Vocabulary logits [..., v] of states [..., d or more], of which the first d are read."""
        states = read_out(states[..., : self.width], self.output_weight)
        logits = F.linear(states, self.output_weight) if self.packed_output is None else self.packed_output(states)
        return capped(logits, self.output_cap)
