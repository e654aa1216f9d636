"""Rotary positions for ibm-fms's decoders, with the angles worked out once a forward.

Shapes: b batch, n tokens, h query heads, g key-value heads, d head width.

ibm-fms multiplies each pair of coordinates with a 2 x 2 matrix that every layer looks up again: 76 microseconds a layer for one token of
SmolLM2-135M on two CPU cores and 243 for nine, 2 to 7 ms a forward, where this takes 26 and 35 (`scripts.benchmark train_step`, the lines
named "rotary"); on a GPU its range check waits for the device in every layer. It also knows other kinds of scaling than the models'
configs do. The frequencies are those of `transformers`, whatever the kind.
"""

from typing import Any

import torch
from fms.modules.positions import PositionEncoder, RotaryEmbedding
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryOnce(PositionEncoder):
    """Drop-in for `RotaryEmbedding`: pairs of coordinates as complex numbers, turned by one multiplication.

    Args:
        config: of the model, a `transformers` one with rope_parameters.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device):
        theirs = LlamaRotaryEmbedding(config)  # the same for every model that ibm-fms runs here
        self.frequencies, self.scaling = theirs.inv_freq.to(device), theirs.attention_scaling  # fp32 [d / 2]
        self.positions: torch.Tensor | None = None
        self.factors: torch.Tensor  # of these positions, complex [b, n, 1, d / 2]

    def adjusted_qk(
        self, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, past_kv_state: Any = None, use_cache: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [b, n, h, d] and k [b, n, g, d], turned by their positions int64 [b, n]."""
        if position_ids is not self.positions:  # the first layer of a forward; the others are handed the same tensor
            angles = position_ids[:, :, None, None].float() * self.frequencies
            self.positions, self.factors = position_ids, torch.polar(torch.full_like(angles, self.scaling), angles)
        pairs = torch.view_as_complex(torch.cat([q, k], dim=2).float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * self.factors).flatten(-2).to(q.dtype)
        return turned.split([q.shape[2], k.shape[2]], dim=2)


def look_up_once(trunk: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Let every layer of an ibm-fms decoder share one `RotaryOnce`."""
    shared = RotaryOnce(config, device)
    for module in trunk.modules():
        if isinstance(getattr(module, "position_encoder", None), RotaryEmbedding):
            module.position_encoder = shared
