"""Linear layers of a frozen bf16 model on a CPU, laid out once for the few tokens of a decoding step.

oneDNN lays a weight out anew in every call of `F.linear` with more than one token. Laid out once, a forward of SmolLM2-135M on two cores
took 53 ms instead of 74 for five tokens, and 46 instead of 57 for one (`python -m scripts.benchmark decode`, the line named "forward").
These are the operators torch.compile uses when it freezes weights; it needs a compiler, they don't.
"""

import torch
from torch import nn

TOKENS = 8  # oneDNN is told how many to expect; told 1, 4, 8 or 16, forwards over 1 to 16 tokens took the same


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] in oneDNN's own layout, for any number of tokens."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether packing pays: bf16 on a CPU with oneDNN."""
    has_operators = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_operators and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` below `module` that can be packed, letting its own weight go."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))


@torch.no_grad()
def linear_of(like: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A layer of these values, on the device and in the dtype of `like`."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=like.device, dtype=like.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made
