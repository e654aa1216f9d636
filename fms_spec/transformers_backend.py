"""A base model in `transformers`, every tensor of which comes from the files, and none of whose tensors is left over."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from fms_spec.errors import UserError


def load(name: Path | str, path: Path | str, config: PretrainedConfig, dtype: torch.dtype, some_layers: bool = False) -> PreTrainedModel:
    """The model on the CPU.

    Args:
        config: of the model's text part. some_layers: it has fewer layers than the files, whose other tensors are left alone.

    Raises:
        UserError: a tensor that is missing, of another shape, or that the model doesn't use; quantised weights that can't be run here.
    """
    try:
        with quiet() if some_layers else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                path, config=whole_config(path, config), dtype=dtype, output_loading_info=True, use_safetensors=True,
                ignore_mismatched_sizes=True, trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:  # of many kinds, from a missing package to a kernel that wants a GPU
        quantised = getattr(config, "quantization_config", None)
        if not quantised:
            raise
        kind = (quantised if isinstance(quantised, dict) else vars(quantised)).get("quant_method")
        raise UserError(
            f"base model {name}: it is quantised ({getattr(kind, 'value', kind)}), which transformers can't run here "
            f"({first_line(error)}); take the unquantised model, or a machine that has what this asks for"
        ) from error
    for key, *_ in sorted(info["mismatched_keys"]):
        if some_layers:
            raise ValueError(f"the shape of {key} hangs on the number of layers")
        raise UserError(f"base model {name}: tensor {key} has another shape in its files than config.json says; take both from one model")
    for key in sorted(info["missing_keys"]):
        raise UserError(f"base model {name}: its files hold no tensor {key}, which its config.json asks for; copy or download it again")
    for key in sorted(info["unexpected_keys"]):
        if not some_layers:
            raise UserError(f"base model {name}: {type(model).__name__} doesn't use tensor {key} of its files; check its config.json")
    check_finite(name, model.named_parameters())
    return model.eval().requires_grad_(False)


def check_finite(name: Path | str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise UserError for a weight with a value that is no number, or infinite. weights: iterable of (name, tensor)."""
    for key, weight in weights:
        if weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite():
            raise UserError(f"base model {name}: weight {key} holds values that are not finite; copy or download its files again")


def whole_config(path: Path | str, config: PretrainedConfig) -> PretrainedConfig:
    """What the files of a model that also reads images are loaded with: its own config, around that of its text part."""
    whole = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = whole.get_text_config(decoder=True)
    if text is whole:
        return config
    setattr(whole, next(name for name in whole.sub_configs if getattr(whole, name) is text), config)
    return whole


@contextmanager
def quiet() -> Iterator[None]:
    """Without `transformers`' progress and its report on tensors that weren't used."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(level)


def first_line(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    text, kind = " ".join(str(error).split()[:40])[:240], type(error).__name__
    return kind if not text else text if isinstance(error, ValueError) else f"{kind}: {text}"


def output_of(layer: Any, config: PretrainedConfig) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """(weight [v, d], bias [v] or None, cap or None) of how logits are made of states: cap * tanh((W h + b) / cap), or W h + b.

    A scale of the logits (Granite divides by logits_scaling, Cohere multiplies with logit_scale) is put into weight and bias.

    Args:
        layer: the lm_head, of either backend.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1.0:
        weight, bias = weight * scale, None if bias is None else bias * scale
    return weight, bias, getattr(config, "final_logit_softcapping", None)
