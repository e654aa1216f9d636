"""A base model in ibm-fms: built from its `transformers` config, and its weights read layer by layer from the files that hold it.

Whatever ibm-fms would silently leave out is set here or refused: a wrong number is found by `proof`, a wrong tensor by `misfit`.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fms.models import get_model
from fms.models.hf.config_utils import _FMS_MODEL_CONFIG_REGISTRY
from fms.utils import serialization
from fms.utils.activation import str_to_activation
from torch import nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from fms_spec.transformers_backend import check_finite
from fms_spec.weights import read_entries, read_tensors

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "Qwen3ForCausalLM")
ANY_HEAD_WIDTH = ("Qwen3ForCausalLM", "MistralForCausalLM")  # the others only with heads that together are as wide as the model
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints hold these frequencies too; the config says them


def unsupported(config: PretrainedConfig) -> str | None:
    """Why ibm-fms can't run a model with this `transformers` config as it is meant, or None."""
    architecture = (config.architectures or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        return f"ibm-fms doesn't load this {architecture} here"
    width = config.hidden_size // config.num_attention_heads
    if architecture not in ANY_HEAD_WIDTH and (getattr(config, "head_dim", None) or width) != width:
        return f"ibm-fms's {architecture} has no head_dim of its own ({config.head_dim})"
    if getattr(config, "quantization_config", None) is not None:
        return "ibm-fms doesn't load quantised weights here"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or windowed(config):
        return "ibm-fms knows no sliding windows here"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "ibm-fms turns whole heads only (partial_rotary_factor)"
    try:
        str_to_activation(config.hidden_act)
    except ValueError:
        return f"ibm-fms has no activation {config.hidden_act}"
    return None


def windowed(config: PretrainedConfig) -> bool:
    """Whether a config without layer_types asks for sliding windows in every layer."""
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "layer_types", None) is None


def build(config: PretrainedConfig, dtype: torch.dtype, group: ProcessGroup | None = None) -> Any:
    """The model on the meta device, without weights; with `group` its matrices are split over the group's processes (tensor parallel)."""
    params = _FMS_MODEL_CONFIG_REGISTRY.hf_config_to_fms_config_params(config, model_path=None)
    architecture, variant = params.pop("architecture"), params.pop("variant")
    # What ibm-fms's own translation leaves out or rounds. Its rotary table is as long as max_expected_seq_len and never read here.
    params |= {"activation_fn": config.hidden_act, "multiple_of": 1, "p_dropout": 0.0, "max_expected_seq_len": 1, "pad_id": -1}
    params["hidden_grow_factor"] = (config.intermediate_size + 0.5) / config.hidden_size  # it cuts the product's fraction off
    # It would split the model by itself among several processes, and says on standard output that it does what it was asked for.
    strategy = "tp" if group else "none"
    with contextlib.redirect_stdout(None):
        return get_model(architecture, variant, data_type=dtype, device_type="meta", distributed_strategy=strategy, group=group, **params)


def architecture_of(config: PretrainedConfig) -> str:
    return _FMS_MODEL_CONFIG_REGISTRY.map_hf_to_fms_arch(config.architectures[0])


def misfit(path: Path | str, config: PretrainedConfig) -> str | None:
    """What of the files' tensors doesn't fit the model as ibm-fms builds it, in words, or None; nothing but their headers is read."""
    model, entries = build(config, torch.float32), read_entries(path)
    held = {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items() if not COMPUTED.search(key)}
    try:
        adapted = serialization.get_adapted(architecture_of(config), "hf", held, {"model_config": model.config})
    except KeyError as error:
        return f"the files hold no {error.args[0]}"
    own = model.state_dict()
    if model.config.tie_heads:
        own.pop("head.weight")
        adapted = {key: value for key, value in adapted.items() if key != "head.weight"}
    for key in sorted(own.keys() | adapted.keys()):
        wanted, there = ("none" if key not in side else f"one of {list(side[key].shape)}" for side in (own, adapted))
        if wanted != there:
            return f"of tensor {key} ibm-fms has {wanted}, the files hold {there}"
    return None


def load(
    path: Path | str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str, group: ProcessGroup | None = None,
    settle_layer: Callable[[nn.Module], object] | None = None,
) -> Any:  # fmt: skip
    """The model with its weights on `device`; no more than one layer's are read at once.

    settle_layer: called with each layer once it has its weights, to keep only a part of them.
    """
    model, entries = build(config, dtype, group), read_entries(path)
    names, layers = [key for key in entries if not COMPUTED.search(key)], model.base_model.layers
    of_layer: list[list[str]] = [[] for _ in layers]
    for key in names:
        match = re.match(r"model\.layers\.(\d+)\.", key)
        if match and int(match[1]) < len(layers):
            of_layer[int(match[1])].append(key)
    rest = [key for key in names if not key.startswith("model.layers.")]
    for keys, layer in [*zip(of_layer, layers), (rest, None)]:
        tensors = read_tensors(entries, keys, device)
        check_finite(path, tensors.items())
        with torch.no_grad():
            serialization.load_state_dict_into_model(
                model, tensors, architecture_of(config), "hf", dtype, "tp" if group else None, initial_device=torch.device(device), rank=1,
            )  # fmt: skip
        if settle_layer and layer is not None:
            settle_layer(layer)
    model.post_init()  # ties the lm_head
    return model
