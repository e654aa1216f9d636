"""The attached head in the base model's own hidden space."""

import torch
from torch import nn
from torch.nn import functional as F

from fms_spec.speculators.base import Speculator


class HiddenStateSpeculator(Speculator):
    """PLACEHOLDER."""

    family = "hidden_state_speculator"

    def __init__(self, emb_dim, vocab_size, draft_ids, n_predict=3, inner_dim=1152):
        super().__init__()
        self.emb_dim, self.vocab_size, self.n_predict, self.inner_dim = emb_dim, vocab_size, n_predict, inner_dim
        self.register_buffer("draft_ids", draft_ids)
        self.up = nn.ModuleList(nn.Linear(2 * emb_dim, 2 * inner_dim, bias=False) for _ in range(min(2, n_predict)))
        self.down = nn.ModuleList(nn.Linear(inner_dim, emb_dim, bias=False) for _ in range(min(2, n_predict)))

    @classmethod
    def from_config(cls, c):
        return cls(c["emb_dim"], c["vocab_size"], torch.zeros(c["draft_vocab_size"], dtype=torch.int64), c["n_predict"], c["inner_dim"])

    def attach(self, base_model):
        self.draft_index = torch.full((self.vocab_size,), -1, device=self.draft_ids.device)
        self.draft_index[self.draft_ids] = torch.arange(len(self.draft_ids), device=self.draft_ids.device)
        self.frozen = (base_model.embedding_weight, base_model.output_weight[self.draft_ids].contiguous())

    def teacher_weight(self, base_model):
        return self.frozen[1]

    def draft_targets(self, tokens):
        return self.draft_index[tokens]

    def start(self, hidden):
        return hidden

    def advance(self, state, tokens, head):
        own = min(head, 1)
        embedded = F.rms_norm(self.frozen[0][tokens].float(), (self.emb_dim,)).to(state.dtype)
        inputs = torch.cat([F.rms_norm(state.float(), (self.emb_dim,)).to(state.dtype), embedded], dim=-1)
        gate, up = self.up[own](inputs).chunk(2, dim=-1)
        return state + self.down[own](F.silu(gate) * up)

    def output(self, state, head):
        return state, self.frozen[1]

    def saved_config(self):
        return {"model_type": self.family, "emb_dim": self.emb_dim, "vocab_size": self.vocab_size, "n_predict": self.n_predict, "inner_dim": self.inner_dim, "draft_vocab_size": len(self.draft_ids)}
