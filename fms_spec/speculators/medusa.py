"""Medusa's heads (arXiv 2401.10774): each looks at h_t alone, whatever has been drafted before its own token.

Shapes: m positions, d base width, v vocabulary.

    y <- y + SiLU(A_ij y + b_ij)  from h_t, for each of head i's layers j;  logits_i = W_i y
A and b start at zero and W as the base model's lm_head, so that an untrained head says what the base model says one token earlier.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fms_spec.context import Seen
from fms_spec.errors import UserError
from fms_spec.packed_linear import pack_linears
from fms_spec.settings import Side
from fms_spec.speculators.interface import Corpus, Settings, Size, Sizes, Speculator, State
from fms_spec.speculators.tensor_files import read_tensors, weight_files

# A published config.json's keys, of vLLM's layout and of the first one, by ours.
PUBLISHED = {
    "emb_dim": ("hidden_size",), "vocab_size": ("vocab_size",), "n_predict": ("num_heads", "medusa_num_heads"),
    "layers": ("num_hidden_layers", "medusa_num_layers"), "bias": ("medusa_fc_bias",),
    "base_model_name_or_path": ("base_model_name_or_path",), "truncated_vocab_size": ("truncated_vocab_size",),
}  # fmt: skip
# The first layout's names: HEAD.LAYER.linear.weight and .bias, and behind a head's layers, as one more, its lm_head.
LINEAR, LM_HEAD = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)"), re.compile(r"(\d+)\.(\d+)\.weight")


class MedusaSettings(Settings):
    family: Literal["medusa"]
    layers: Side = 1  # of each head


class MedusaSizes(Sizes):
    layers: Size = 1
    bias: bool = False  # which published ones of vLLM's layout lack
    truncated_vocab_size: None = Field(None, exclude=True)  # a token_map isn't read


class Block(nn.Module):
    """What one head adds to h_t: [m, d] -> [m, d]."""

    def __init__(self, width: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(layers))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class MedusaSpeculator(Speculator):
    """See the module's formulas. Args: d, v, how many heads, their layers, and whether these have biases."""

    name, model_type, architecture = "medusa", "medusa_speculator", "MedusaHeads"
    settings, sizes = MedusaSettings, MedusaSizes
    draft_ids, inherited = None, frozenset({"bias"})

    def __init__(self, emb_dim: int, vocab_size: int, n_predict: int, layers: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.emb_dim, self.vocab_size, self.n_predict, self.layers, self.bias = emb_dim, vocab_size, n_predict, layers, bias
        self.blocks = nn.ModuleList(Block(emb_dim, layers, bias) for _ in range(n_predict))
        self.lm_heads = nn.ModuleList(nn.Linear(emb_dim, vocab_size, bias=False) for _ in range(n_predict))

    @classmethod
    def build(cls, settings: Any, base_model: Any, corpus: Corpus | None = None) -> Self:
        speculator = cls(base_model.width, base_model.vocab_size, settings.n_predict, settings.layers)
        if corpus is not None:
            for head in speculator.lm_heads:
                head.weight.data = base_model.output_weight[:, : base_model.width].float().cpu().clone()
        return speculator

    def start(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> State:
        return hidden, None

    def advance(self, state: Any, tokens: torch.Tensor, head: int, seen: Seen | None = None) -> State:
        return state[0], self.blocks[head](state[0])

    def output(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return state[1], self.lm_heads[head].get_parameter("weight")

    def read_out_logits(self, state: Any, head: int) -> torch.Tensor:
        return self.lm_heads[head](state[1])

    def pack(self) -> None:
        pack_linears(self)

    def saved_config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type, "architectures": [self.architecture], "emb_dim": self.emb_dim, "vocab_size": self.vocab_size,
            "n_predict": self.n_predict, "layers": self.layers, "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def translated(cls, config: Any, directory: Path) -> Any:
        """A published config.json, of vLLM's layout or of the first one."""
        if not isinstance(config, dict) or (config.get("model_type") != "medusa" and "medusa_num_heads" not in config):
            return config
        known = {ours: config[key] for ours, keys in PUBLISHED.items() for key in keys if key in config}
        if config.get("model_type") != "medusa":
            known |= counted(directory, config["medusa_num_heads"])
        if known.get("truncated_vocab_size") == known.get("vocab_size"):
            known.pop("truncated_vocab_size", None)
        return known | {"model_type": cls.model_type}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**cls.sizes.model_validate(config).model_dump())

    def load_published_state(self, tensors: dict[str, torch.Tensor]) -> None:
        super().load_published_state({self.own_name(key): value for key, value in tensors.items()})

    def own_name(self, key: str) -> str:
        """Of a tensor that the first layout names so; any other name as it is."""
        if last := LM_HEAD.fullmatch(key):
            return f"lm_heads.{last[1]}.weight" if int(last[2]) == self.layers else key
        return LINEAR.sub(r"blocks.\1.layers.\2.\3", key)


def counted(directory: Path, said: Any) -> dict[str, Any]:
    """The sizes that a config.json of the first layout lacks, from its weights; said: how many heads it says there are.

    The original release says 2 and has 5, which its own code takes.
    """
    tensors = {key: value for file in weight_files(directory) for key, value in read_tensors(file).items()}
    heads = [value.shape for key, value in tensors.items() if LM_HEAD.fullmatch(key) and value.dim() == 2]
    if not heads or (isinstance(said, int) and said > len(heads)):
        what = f"its weights hold {len(heads)} heads that end in an lm_head, and medusa_num_heads is {said!r:.60}"
        raise UserError(f"speculator {directory}: {what}; take a whole copy")
    return {"n_predict": len(heads), "vocab_size": heads[0][0], "emb_dim": heads[0][1], "bias": any(map(LINEAR.fullmatch, tensors))}
