"""How a base model's states become logits, where it isn't the lm_head's weight alone: a bias, and a soft cap.

Shapes: d base width, v vocabulary.
"""

import torch
from torch.nn import functional as F


def with_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The read-out [v, d], or [v, d + 1] with the bias as last column, so that read-outs with and without one are products alike."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def read_out(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """States [..., d] as a read-out made by `with_bias` takes them."""
    return states if weight.shape[-1] == states.shape[-1] else F.pad(states, (0, 1), value=1.0)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits z as cap * tanh(z / cap), in place (Gemma 2's final_logit_softcapping); as they are without a cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
