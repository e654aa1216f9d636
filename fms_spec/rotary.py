"""Rotary positions for ibm-fms's decoders, with the angles looked up once a forward.

Shapes: b batch, n tokens, h query heads, g key-value heads, d head width.

ibm-fms multiplies each pair of coordinates with a 2 x 2 matrix that every layer looks up again: 76 microseconds a layer for one token of
SmolLM2-135M on two CPU cores and 243 for nine, 2 to 7 ms a forward, where this takes 26 and 35 (`scripts.benchmark train_step`, the lines
named "rotary"); on a GPU its range check waits for the device in every layer. The angles are ibm-fms's own.
"""

import torch
from fms.modules.positions import PositionEncoder, RotaryEmbedding


class RotaryOnce(PositionEncoder):
    """Drop-in for `RotaryEmbedding`: pairs of coordinates as complex numbers, turned by one multiplication.

    Args:
        encoder: the `RotaryEmbedding` it replaces. context_length: positions go up to here, exclusive.
    """

    def __init__(self, encoder, context_length, device):
        scale = encoder.compute_freqs_cis(device, context_length)
        matrices = encoder.cached_freqs[device.index][scale].float()  # [positions, d / 2, 2, 2]: ((cos, -sin), (sin, cos))
        self.table = torch.complex(matrices[..., 0, 0], matrices[..., 1, 0])
        self.positions = self.factors = None

    def adjusted_qk(self, q, k, position_ids, past_kv_state=None, use_cache=False):
        """q [b, n, h, d] and k [b, n, g, d], turned by their positions int64 [b, n]."""
        if position_ids is not self.positions:  # the first layer of a forward; the others are handed the same tensor
            self.positions, self.factors = position_ids, self.table[position_ids][:, :, None]
        pairs = torch.view_as_complex(torch.cat([q, k], dim=2).float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * self.factors).flatten(-2).to(q.dtype)
        return turned.split([q.shape[2], k.shape[2]], dim=2)


def look_up_once(trunk, context_length, device):
    """Let every layer of an ibm-fms decoder share one `RotaryOnce`, where its rotary embedding is one that it covers."""
    layers = [module for module in trunk.modules() if isinstance(getattr(module, "position_encoder", None), RotaryEmbedding)]
    shared = {}
    for layer in layers:
        encoder = layer.position_encoder
        if encoder.rope_type in ("regular", "llama3") and encoder.partial_rope == 1.0:
            if encoder not in shared:
                shared[encoder] = RotaryOnce(encoder, context_length, device)
            layer.position_encoder = shared[encoder]
