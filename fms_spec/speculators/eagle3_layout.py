"""What EAGLE-3's published config.json may say, as vLLM and SGLang read it.

The layers whose states are read stand in it twice, as the two count differently. At the top level, which vLLM takes first (its V2 runner
takes no other), id i is what enters layer i. Within eagle_config, which SGLang takes, and by which those are trained that have no other,
id i is what leaves layer i: one lower. Where neither stands, both take the published ones.

Of several layers the two name the norm of what enters a later one differently: input_layernorm in vLLM, hidden_norm in SGLang. Both names
are written. The first layer is `midlayer`, which both know, and SGLang before May 2026 alone.
"""

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, AliasPath, BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from fms_spec.errors import UserError
from fms_spec.settings import Layers, as_tuple, ascending
from fms_spec.speculators.interface import Size, Sizes

ROPES = ("default", "linear", "llama3", "yarn")  # kinds of rotary positions that don't hang on a text's length
IDS = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURE = "LlamaForCausalLMEagle3"
TOLD = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", IDS)
FIRST, NORM = "layers.0.", ".input_layernorm.weight"
LATER = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight")
OURS = ("base_model_fingerprint", "weights_sha256", "torch_dtype", "draft_vocab_coverage")
REPLACED = ("n_predict", "architectures", "base_model_name_or_path")  # what speculators_config says
One = Annotated[float, Field(ge=1, le=1)]
LayersLeft = Annotated[tuple[Annotated[int, Field(ge=-1, le=2**16)], ...], as_tuple, AfterValidator(ascending)]


class Eagle3Sizes(Sizes):
    """The published config.json; what it may say and is not computed here is refused by its key."""

    architectures: list[Literal["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"]]
    emb_dim: Size = Field(validation_alias="hidden_size")
    n_predict: int = Field(7, ge=1, le=64)  # our own key; 7 is what the published ones are trained for
    attention_heads: Size = Field(validation_alias="num_attention_heads")
    kv_heads: Size | None = Field(None, validation_alias="num_key_value_heads")
    head_dim: int | None = Field(None, ge=2, le=2**16, multiple_of=2)
    inner_dim: Size = Field(validation_alias="intermediate_size")
    draft_vocab_size: Size | None = None
    target_hidden_size: int | None = None
    base_layers: Layers = Field((), validation_alias=IDS)
    leaving: LayersLeft = Field((), validation_alias=AliasPath("eagle_config", IDS))
    aux: Literal[True] = Field(True, validation_alias=AliasPath("eagle_config", "use_aux_hidden_state"))
    layers: int = Field(1, ge=1, le=64, validation_alias="num_hidden_layers")
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    is_causal: Literal[True] = True
    logit_scale: One = 1.0
    partial_rotary_factor: One = 1.0
    quantization_config: None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None  # its name in older ones

    def misfit(self, layers: int) -> str | None:
        return f"a base model of {self.base_layers[-1]} layers or more" if self.base_layers and self.base_layers[-1] > layers else None

    @field_validator("attention_heads", "kv_heads", "draft_vocab_size", "target_hidden_size")
    @classmethod
    def agrees(cls, value: int | None, info: Any) -> int | None:
        heads, width, most = (info.data.get(name, value) for name in ("attention_heads", "emb_dim", "vocab_size"))
        wrong = {
            "attention_heads": width and value and width % value and f"no divisor of hidden_size, {width}, as transformers has it",
            "kv_heads": heads and value and heads % value and f"no divisor of num_attention_heads, {heads}",
            "draft_vocab_size": value and value > most and f"over vocab_size, {most}",
            "target_hidden_size": value and value != width and f"another width than hidden_size, {width}, which is not computed here",
        }[info.field_name]
        if wrong:
            raise PydanticCustomError("agrees", "Input is {wrong}", {"wrong": wrong})
        return value

    @field_validator("rope_parameters", "rope_scaling")
    @classmethod
    def computed(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = (values or {}).get("rope_type", (values or {}).get("type", "default"))
        if kind not in ROPES or (values or {}).get("partial_rotary_factor", 1) != 1:
            raise PydanticCustomError("computed", "Input should be of a whole head, and one of {ropes}", {"ropes": ", ".join(ROPES)})
        return values


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An `Eagle3Speculator`'s tensors under the names that vLLM and SGLang read."""
    later = {key.replace("input_layernorm", "hidden_norm"): key for key in state if key.endswith(NORM) and not key.startswith(FIRST)}
    named = {key.replace(FIRST, "midlayer.") if key.startswith(FIRST) else key: value for key, value in state.items()}
    return named | {name: state[key].clone() for name, key in later.items()}


def own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A directory's tensors as an `Eagle3Speculator` names them; raises UserError where two names say different things."""
    named = {key.replace("midlayer.", FIRST): value for key, value in tensors.items()}
    for key in [key for key in named if LATER.fullmatch(key)]:
        norm, name = named.pop(key), key.replace("hidden_norm", "input_layernorm")
        if not torch.equal(named.setdefault(name, norm), norm):
            raise UserError(f"speculator tensor {key}: another than {name}, and engines read the one or the other; take another copy")
    return named


class Method(BaseModel):
    speculative_tokens: int


class Verifier(BaseModel):
    name_or_path: str | None = None


class Proposals(BaseModel):
    proposal_methods: list[Method] = Field(min_length=1)
    verifier: Verifier


class SpeculatorsLayout(BaseModel):
    """config.json as the package `speculators` writes it: the same weights, the layer's config in a section of its own."""

    speculators_model_type: Literal["eagle3"]
    speculators_config: Proposals
    transformer_layer_config: dict[str, Any]


def as_speculators(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], base_config: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the package `speculators` (0.9) writes and reads, and vLLM too, of a published config.json and its tensors.

    base_config: the base model's. What vLLM counts the states by that are read, eagle_config, stays with the layers' own values.
    """
    above = {key: config[key] for key in (*TOLD, *OURS) if key in config}
    section = {key: value for key, value in config.items() if key not in above and key not in REPLACED}
    method = {"proposal_type": "greedy", "speculative_tokens": config["n_predict"], "verifier_accept_k": 1, "accept_tolerance": 0.0}
    verifier = {"name_or_path": config["base_model_name_or_path"], "architectures": base_config.architectures or []}
    proposals = {
        "algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [method], "verifier": verifier,
    }  # fmt: skip
    layout = {
        "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "tie_word_embeddings": False,
        "speculators_config": proposals, "transformer_layer_config": section,
    }  # fmt: skip
    kept = {key.replace("midlayer.", FIRST): value for key, value in tensors.items() if not LATER.fullmatch(key)}
    return layout | above, kept


def translated(config: Any) -> Any:
    """A config.json in `SpeculatorsLayout` as vLLM translates it; any other value as it is."""
    try:
        layout = SpeculatorsLayout.model_validate(config)
    except ValidationError:
        return config
    own = {"norm_before_residual": True} | {key: config[key] for key in (*TOLD, *OURS) if config.get(key) is not None}
    told = {"n_predict": layout.speculators_config.proposal_methods[0].speculative_tokens}
    name = layout.speculators_config.verifier.name_or_path
    return layout.transformer_layer_config | own | told | {"architectures": [ARCHITECTURE], "base_model_name_or_path": name}
