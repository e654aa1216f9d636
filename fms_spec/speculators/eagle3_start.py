"""Where EAGLE-3's layers start: as the base model's last ones, and with attention heads in the first that copy from the first step on.

Shapes: d base width, h attention heads of the base model, a head width, c code width.

Induction heads (arXiv 2209.11895) within the published layout. Slot s of a text holds a state g_s and the token after it, x_{s+1}; with e
the embedding at unit RMS, M and C random and fixed, and Q an orthonormal basis of c dimensions that the state gives up:
    g_s   = scale ((I - Q Q^T) n(last state) + Q M e(x_s))      through F, which reads the embedding as layer 0
    key   = C Q^T n(g_s) = C M e(x_s);  query = sharpness C M e(newest)      so that both meet where the newest token stood before
    value = R e(x_{s+1});  output = gain scale R^T value / w      what followed there: R a slice of a rotation, w the final norm's weights
Code coordinates are those of rotary pairs that turn slowly, or distance would destroy the match. Of what is drafted no key has a code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig

from fms_spec.errors import UserError
from fms_spec.model_config import attention_heads
from fms_spec.weights import Entry, read_entries, read_tensors

HEADS = 6  # that copy, at least: each carries a slice of the embedding as wide as itself
CODE = 96  # c, at most a quarter of the state
SLOW = 0.007  # radians a token: half a turn in 450 tokens
MATCH, GAIN = 27.0, 0.5  # score of a match, the noise of others a sixth of it; share of the state's RMS that what is copied adds
SMALL = 0.002  # of weights beside copied ones: they only have to be told apart


@torch.no_grad()
def copy_last_layers(speculator: Any, base_model: Any, scale: float) -> None:
    """Start as as many of the base model's last layers, on the deepest of the states that are read.

    Args:
        speculator: an `Eagle3Speculator`. scale: of the deepest state, 1 where no fc_norm takes it away.

    Raises:
        UserError: a base model with fewer layers, or whose last ones have not these parts and shapes.
    """
    entries, d, count = read_entries(base_model.path), speculator.emb_dim, len(speculator.layers)
    if count > base_model.layers:
        raise UserError(f"speculator.layers {count}: the base model has {base_model.layers} to start as; take fewer, or init random")
    for number, layer in enumerate(speculator.layers):
        own = dict(layer.named_parameters())
        own["input_layernorm.weight"] = own.pop("hidden_norm.weight", layer.input_layernorm.weight)  # the embedding's starts as every other
        copy_layer(own, entries, base_model.layers - count + number, base_model, speculator.config)
    speculator.norm.weight.copy_(read(entries, "model.norm.weight", [d], base_model))
    speculator.fc.weight.normal_(std=SMALL * scale)[:, -d:] += scale * torch.eye(d)


def copy_layer(own: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], number: int, base_model: Any, config: LlamaConfig) -> None:
    """Make a layer's parts `own` the base model's of this number.

    Where the layer has more heads, each has keys of its own, and the base model's come first; nothing is read of the others yet.
    """
    query_heads, groups = attention_heads(base_model.config)  # all of them, where each process holds a few
    rows, alone = query_heads * config.head_dim, config.num_key_value_heads > groups
    for name, weight in own.items():
        shared = 1
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight.normal_(std=SMALL)
            weight = weight[:, -config.hidden_size :]  # the state's part
            shared = query_heads // groups if alone and "q_proj" not in name else 1
            weight = weight[:rows] if alone else weight
        weight = weight.zero_()[:, :rows] if name.endswith("o_proj.weight") else weight
        theirs = read(entries, f"model.layers.{number}.{name}", [len(weight) // shared, *weight.shape[1:]], base_model)
        heads = theirs.unflatten(0, (-1, config.head_dim)).repeat_interleave(shared, 0) if shared > 1 else theirs
        weight.copy_(heads.reshape(weight.shape))


def read(entries: Mapping[str, Entry], name: str, shape: list[int], base_model: Any) -> torch.Tensor:
    """A tensor of the base model's files; raises UserError where it has none of this shape."""
    if name not in entries or list(entries[name].shape) != shape:
        raise UserError(f"speculator.init: base model {base_model.name} has no {name} of {shape}; take random, or other heads and widths")
    return read_tensors(entries, [name])[name].float()


def heads_that_copy(width: int, head_dim: int, heads: int) -> int:
    """How many stand beside `heads`: from `HEADS` on, so that all of them divide the width, as `transformers` wants it of a config."""
    most = width // head_dim
    return next((count for count in range(min(HEADS, most), most + 1) if width % (heads + count) == 0), 0)


@torch.no_grad()
def add_induction_heads(speculator: Any, heads: int, scale: float) -> None:
    """Make the attention heads from number `heads` on copy; see the module's formulas. The first of the states is the embedding."""
    config, d, first_layer = speculator.config, speculator.emb_dim, speculator.layers[0]
    attention = first_layer.self_attn
    a, width, count = config.head_dim, min(CODE, d // 4), config.num_attention_heads - heads
    pairs = torch.arange(a // 2)
    slow = pairs[config.rope_parameters["rope_theta"] ** (-2 * pairs / a) < SLOW]
    if not len(slow):
        raise UserError(f"speculator.init: no rotary pair of heads of {a} coordinates turns slowly enough to copy; take last_layers")
    slow = torch.cat([slow, slow + a // 2])
    basis, rotation = torch.linalg.qr(torch.randn(d, width))[0], torch.linalg.qr(torch.randn(d, d))[0]
    words = torch.randn(width, d) / d**0.5
    speculator.fc.weight[:, -d:] -= scale * basis @ basis.T
    speculator.fc.weight[:, :d] += scale * basis @ words
    state_norm, final_norm = first_layer.hidden_norm.weight.clamp(min=0.02), speculator.norm.weight
    back = final_norm.median() / final_norm.clamp(min=0.1)
    for number in range(count):
        first = (heads + number) * a
        head = slice(first, first + a)
        code, part = torch.randn(len(slow), width) / width**0.5, rotation[number * a : (number + 1) * a]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[head] = 0.0
        attention.q_proj.weight[first + slow, :d] = MATCH * a**0.5 / len(slow) * code @ words
        attention.k_proj.weight[first + slow, d:] = code @ basis.T / state_norm
        attention.v_proj.weight[head, :d] = part
        attention.o_proj.weight[:, head] = GAIN * scale * (part * back).T
