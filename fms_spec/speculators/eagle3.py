"""EAGLE-3 as published (arXiv 2503.01840), in the layout that vLLM and SGLang serve without any package of ours.

Shapes: m positions, d base width, k inner layers that are read, r draft vocabulary, w what is kept of a slot.

With a_t what enters the k layers at t, e the base model's frozen embedding, n RMS norms with weights of their own, and L a decoder layer
that attends to the slots up to its own:
    g_0 = F a_t                             F [n_1 a_t1; ...; n_k a_tk] with fc_norm
    x_i = L([n e(x_{t+1+i}); n g_i], g_i)   over the slots up to t, each made of its own a and token, and x_1 ... x_i's
    logits_i = W n(x_i)
    g_{i+1} = x_i                           n(x_i) with norm_output
Of several layers, those after the first are Llama's own, on its output; x_i is what leaves the last. They are run over a whole text once;
n_predict - 1 further steps are run on their own outputs in training as in decoding ("training-time test"), so that they learn from the
states they will see. All of it is trained, W among it, which starts as the base model's lm_head.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from fms_spec.context import Recent, Seen, parts_of
from fms_spec.errors import UserError
from fms_spec.model_config import attention_heads, head_width
from fms_spec.packed_linear import pack_linears
from fms_spec.settings import Layers, Side
from fms_spec.speculators import draft_vocabulary, eagle3_layout, eagle3_start
from fms_spec.speculators.draft_layer import DraftLayer, FirstLayer, Norm, Rotary
from fms_spec.speculators.eagle3_layout import IDS, Eagle3Sizes
from fms_spec.speculators.interface import BaseWeights, Corpus, Settings, Speculator, State
from fms_spec.transformers_backend import first_line

LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}


class Eagle3Settings(Settings):
    family: Literal["eagle3"]
    layers: int = Field(1, ge=1, le=64, exclude_if=lambda count: count == 1)  # one: a run is recorded as before there were several
    attention_heads: Side | None = None  # None: as the base model's own layers have, as the three below
    kv_heads: Side | None = None
    head_dim: Side | None = None
    inner_dim: Side | None = None
    draft_vocab_size: int | None = Field(None, ge=2)  # the tokens trained on most often; None keeps all
    base_layers: Layers = ()  # whose input is read; none given: 2, half of them, and 3 before the last, as published
    fc_norm: bool = False  # a norm of each before they are mixed, as in 3.1
    norm_output: bool = False  # hand on the step's normed state, as in 3.1
    # last_layers: the base model's, where they are Llama's; induction: these, and heads beside the first's that copy, see `eagle3_start`.
    # They take fc_norm, and the states that enter the first layer and the last too.
    init: Literal["random", "last_layers", "induction"] = "random"


class Eagle3Speculator(Speculator):
    """See the module's formulas.

    Args:
        config: `LlamaConfig` of the layers. draft_ids: int64 [r], ascending. base_layers: k ids, see `inner_states`. norm_before_residual:
        the first layer's states are added to their norm, as in `speculators`' own heads.
    """

    name, model_type, architecture = "eagle3", "llama", eagle3_layout.ARCHITECTURE
    settings, sizes = Eagle3Settings, Eagle3Sizes
    sample_rows = 8  # for the scale of the deepest state
    needs_embedding, distinct_heads, vllm_method = True, 1, "eagle3"
    layouts: ClassVar = {"speculators": eagle3_layout.as_speculators}
    inherited = frozenset({"max_position_embeddings", "norm_before_residual", "rms_norm_eps", "rope_scaling", "rope_theta"})
    draft_ids: torch.Tensor
    layers: Any  # `nn.ModuleList` of a `FirstLayer` and further `DraftLayer`s

    def __init__(
        self, config: LlamaConfig, draft_ids: torch.Tensor, n_predict: int, base_layers: tuple[int, ...], fc_norm: bool = False,
        norm_output: bool = False, norm_before_residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.config, self.emb_dim, self.vocab_size, self.n_predict = config, d, config.vocab_size, n_predict
        self.base_layers, self.norm_output, self.norm_before_residual = tuple(base_layers), norm_output, norm_before_residual
        self.context_width = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        self.register_buffer("draft_ids", draft_ids)
        self.fc_norm = nn.ModuleList(Norm(d, eps) for _ in base_layers) if fc_norm else None
        self.fc = nn.Linear(len(base_layers) * d, d, bias=False)
        later = (DraftLayer(config, d) for _ in range(1, config.num_hidden_layers))
        self.layers = nn.ModuleList([FirstLayer(config, norm_before_residual), *later])
        self.norm = Norm(d, eps)
        self.lm_head = nn.Linear(d, len(draft_ids), bias=False)
        self.own_embedding: torch.Tensor | None = None  # of published directories that repeat the base model's

    @classmethod
    def base_layers_of(cls, settings: Any, base_model: Any) -> tuple[int, ...]:
        layers, count, copying = settings.base_layers, base_model.layers, settings.init == "induction"
        if layers and layers[-1] > count:
            raise UserError(f"speculator.base_layers {layers[-1]}: the base model has {count} layers; give some of 0 to {count}")
        published = (2, count // 2, count - 3)
        if not layers and not published[0] < published[1] < published[2]:
            raise UserError(f"speculator.base_layers: the published ones are none of a base model of {count} layers; give them")
        if layers and copying and layers[0]:
            raise UserError(f"speculator.base_layers {list(layers)}: init induction reads 0 too; give it or none")
        return layers or ((0, *published, count - 1) if copying else published)  # SGLang can't give what leaves the last layer

    @classmethod
    def build(cls, settings: Any, base_model: Any, corpus: Corpus | None = None) -> Self:
        """The draft vocabulary is the tokens trained on most often, and W starts as the base model's lm_head of them."""
        copying, size, d = settings.init == "induction", draft_vocabulary.size_of(settings, base_model), base_model.width
        draft_ids, layers = torch.zeros(size, dtype=torch.int64), cls.base_layers_of(settings, base_model)
        if corpus is not None:
            draft_ids = draft_vocabulary.most_frequent(corpus.token_counts, size, base_model)
        config, fc_norm = layer_config(settings, base_model), settings.fc_norm or copying
        speculator = cls(config, draft_ids, settings.n_predict, layers, fc_norm, settings.norm_output)
        if corpus is None:
            return speculator
        speculator.lm_head.weight.data = base_model.output_weight[draft_ids, :d].float().cpu()
        if settings.init != "random":
            assert corpus.states is not None
            scale = corpus.states[:, -d:].square().mean(-1).sqrt().median().item() if fc_norm else 1.0
            eagle3_start.copy_last_layers(speculator, base_model, scale)
            if copying:
                eagle3_start.add_induction_heads(speculator, attention_heads(base_model.config)[0], scale)
        return speculator

    def attach(self, base_model: BaseWeights) -> None:
        self.draft_index = draft_vocabulary.entries(self.draft_ids, self.vocab_size)
        embedding, weight = base_model.embedding_weight, base_model.output_weight
        if self.own_embedding is not None and not torch.equal(self.own_embedding.to(embedding), embedding):
            raise UserError("speculator tensor embed_tokens.weight: it is not the base model's, and heads here share that; take another")
        self.own_embedding = None
        whole = len(self.draft_ids) == self.vocab_size
        self.frozen = (embedding, weight if whole else weight[self.draft_ids])  # a tuple, so that neither becomes a parameter
        self.rotary = Rotary(self.config, self.draft_ids.device)

    def teacher_weight(self, base_model: BaseWeights) -> torch.Tensor:
        return self.frozen[1]

    def draft_targets(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.draft_index[tokens]

    def start(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> State:
        return self.mixed(hidden), *[None] * len(self.layers)

    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        """g_0 of states [..., (1 + k) d]: [..., d]."""
        inner = hidden[..., self.emb_dim :]
        if self.fc_norm is not None:
            parts = inner.split(self.emb_dim, dim=-1)
            inner = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], dim=-1)
        return self.fc(inner)

    def keep(self, states: torch.Tensor, recent: Recent, slots: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        """Keys and values of each layer, side by side; those of later ones hang on what the layers before make of the text."""
        hidden, places, parts = self.mixed(states).flatten(0, -2), slots.flatten(), []
        embedded = self.embedded(recent.tokens(0).clamp(min=0).flatten(), hidden)
        for layer in self.layers:
            x, residual = layer.read(hidden, embedded)
            parts.append(layer.self_attn.keys_values(x, places, self.rotary))
            if len(parts) < len(self.layers):
                assert seen is not None
                text = seen.with_newest(parts[-1], parts[-1].shape[-1] * (len(parts) - 1))
                hidden = layer(x, residual, places, self.rotary, None, text)
        kept = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return kept.unflatten(0, slots.shape)

    def advance(self, state: Any, tokens: torch.Tensor, head: int, seen: Seen | None = None) -> State:
        hidden, *drafted = state
        assert seen is not None
        places, embedded = seen.places(len(tokens)) + head, self.embedded(tokens, hidden)
        for number, (layer, text) in enumerate(zip(self.layers, parts_of(seen, len(self.layers)))):
            x, residual = layer.read(hidden, embedded)
            if head:  # what the first one would add is kept of the text
                own = layer.self_attn.keys_values(x, places, self.rotary)[:, None]
                drafted[number] = own if drafted[number] is None else torch.cat([drafted[number], own], dim=1)
            hidden = layer(x, residual, places, self.rotary, drafted[number], text)
        return self.norm(hidden) if self.norm_output else hidden, *drafted

    def embedded(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The base model's embedding of tokens int64 [m], in the dtype of hidden: [m, d]."""
        return F.embedding(tokens, self.frozen[0]).to(hidden.dtype)

    def features(self, state: Any) -> torch.Tensor:
        return state[0] if self.norm_output else self.norm(state[0])

    def output(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features(state), self.lm_head.weight

    def read_out_logits(self, state: Any, head: int) -> torch.Tensor:
        return self.lm_head(self.features(state))

    def prune(self, entries: torch.Tensor) -> None:
        super().prune(entries)
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach()[entries])

    def pack(self) -> None:
        pack_linears(self)

    def saved_config(self) -> dict[str, Any]:
        """In the published layout; n_predict is our own key, which vLLM takes as num_speculative_tokens where that isn't given."""
        config, rope = self.config, dict(self.config.rope_parameters)
        theta = rope.pop("rope_theta")
        return LLAMA | {
            "model_type": self.model_type, "architectures": [self.architecture], "vocab_size": self.vocab_size,
            "draft_vocab_size": len(self.draft_ids), "hidden_size": self.emb_dim, "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope, "n_predict": self.n_predict,
            "fc_norm": self.fc_norm is not None, "norm_output": self.norm_output, "norm_before_residual": self.norm_before_residual,
            IDS: list(self.base_layers),
            "eagle_config": {IDS: [index - 1 for index in self.base_layers], "use_aux_hidden_state": True},
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        sizes = cls.sizes.model_validate(config)
        layer = layer_of(config, sizes)
        draft_ids = torch.zeros(sizes.draft_vocab_size or sizes.vocab_size, dtype=torch.int64)
        variant = sizes.model_dump(include={"n_predict", "base_layers", "fc_norm", "norm_output", "norm_before_residual"})
        return cls(layer, draft_ids, **variant)

    @classmethod
    def translated(cls, config: Any, directory: Path) -> Any:
        return eagle3_layout.translated(config)

    @classmethod
    def complete(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """With the layers as vLLM counts them."""
        sizes = cls.sizes.model_validate(config)
        return config | {IDS: sizes.base_layers or [index + 1 for index in sizes.leaving] or [2, layers // 2, layers - 3]}

    def published_state(self) -> dict[str, torch.Tensor]:
        """With the draft vocabulary as published: d2t int64 [r], how far each token's id is from its entry; t2d bool [v], which are in."""
        state = eagle3_layout.published(self.state_dict())
        draft_ids = state.pop("draft_ids")
        if len(draft_ids) < self.vocab_size:
            state["d2t"] = draft_ids - torch.arange(len(draft_ids), device=draft_ids.device)
            state["t2d"] = torch.zeros(self.vocab_size, dtype=torch.bool, device=draft_ids.device).index_fill_(0, draft_ids, True)
        return state

    def load_published_state(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors = eagle3_layout.own(tensors)
        d2t, t2d, self.own_embedding = (tensors.pop(key, None) for key in ("d2t", "t2d", "embed_tokens.weight"))
        draft_ids = torch.arange(len(self.draft_ids))
        if d2t is not None or len(draft_ids) < self.vocab_size:
            said = "missing" if d2t is None else f"{d2t.dtype} {list(d2t.shape)}"
            if d2t is None or d2t.is_floating_point() or d2t.shape != draft_ids.shape:
                raise UserError(f"speculator tensor d2t: the file says {said}, the config {list(draft_ids.shape)}; export it again")
            draft_ids += d2t
            draft_vocabulary.check_ids(draft_ids, self.vocab_size, "d2t")
        if t2d is not None and not torch.equal(t2d.flatten().nonzero()[:, 0], draft_ids):
            raise UserError("speculator tensor t2d: it names other tokens than d2t; export it again")
        super().load_published_state(tensors | {"draft_ids": draft_ids})


def layer_of(config: dict[str, Any], sizes: Eagle3Sizes) -> LlamaConfig:
    """The layer's config in a config.json's values; raises UserError where `transformers` can't build one, or no rotary positions."""
    try:
        layer = LlamaConfig.from_dict(config)
        layer.num_hidden_layers, layer.num_key_value_heads = sizes.layers, sizes.kv_heads or sizes.attention_heads
        layer.head_dim = sizes.head_dim or sizes.emb_dim // sizes.attention_heads
        if layer.head_dim % 2:
            raise ValueError(f"heads of {layer.head_dim} coordinates, and rotary positions turn pairs")
        Rotary(layer, torch.device("meta"))
    except Exception as error:  # of many kinds: each value is checked by what reads it
        raise UserError(f"config.json of a speculator: its layer can't be built ({first_line(error)}); take an undamaged copy") from None
    return layer


def layer_config(settings: Eagle3Settings, base_model: Any) -> LlamaConfig:
    """The layer's config, of the base model's own where the settings say nothing."""
    base, copying = base_model.config, settings.init == "induction"
    inner_dim, (heads, groups) = settings.inner_dim or getattr(base, "intermediate_size", None), attention_heads(base)
    if not isinstance(inner_dim, int):
        raise UserError("speculator.inner_dim: the base model's config has no intermediate_size to take; give it")
    if copying:
        if settings.attention_heads or settings.kv_heads or not getattr(base, "tie_word_embeddings", False):
            what = "a base model with a tied embedding, and as many heads as they make, all with keys of their own"
            raise UserError(f"speculator.init: induction heads take {what}; leave attention_heads and kv_heads out, or take last_layers")
        copied = eagle3_start.heads_that_copy(base_model.width, settings.head_dim or head_width(base), heads)
        if not copied:
            raise UserError(f"speculator.init: no number of heads over {heads} divides the width {base_model.width}; take last_layers")
        heads = groups = heads + copied
    heads, groups = settings.attention_heads or heads, settings.kv_heads or groups
    if heads % groups or base_model.width % heads:
        what = f"no multiple of its kv_heads, {groups}, or no divisor of the width, {base_model.width}"
        raise UserError(f"speculator.attention_heads {heads} are {what}; give others")
    if (head_dim := settings.head_dim or head_width(base)) % 2:
        raise UserError(f"speculator.head_dim {head_dim}: rotary positions turn pairs; give an even one")
    theta = (getattr(base, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    return LlamaConfig(
        hidden_size=base_model.width, vocab_size=base_model.vocab_size, intermediate_size=inner_dim, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head_dim, rms_norm_eps=getattr(base, "rms_norm_eps", 1e-5),
        max_position_embeddings=base.max_position_embeddings, rope_parameters={"rope_type": "default", "rope_theta": theta},
        num_hidden_layers=settings.layers, **LLAMA,
    )  # fmt: skip
