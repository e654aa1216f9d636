"""Heads of `hidden_state` laid out for proposing: what stands between two nonlinearities becomes one product.

Shapes: m positions, d base width, s width of what heads read of the states, w trunk width, f inner width, r draft vocabulary, p pointer
width.

With A = [A^h A^z A^y A^e] cut by what it is multiplied with (head 0 has no A^z and A^y), head i is four products, of which the last says
everything that hangs on y_i:
    x_i = A^h h_t / sigma + A^e e(x_{t+1+i}) + u_{i-1};   x_i <- x_i + D (SiLU(G n(x_i)) * U n(x_i));   y_i = n(x_i)
    [u_i; the pointer's share of query and gate; logits_i] = [A_1^z O + A_1^y; P; W_draft sigma O] y_i + [A_1^z o; a; W_draft sigma o]
The states' share is worked out once a step, for head 0 and all later ones. Logits that come from y_i take r w weights instead of r d, so
that a draft of the quickstart's heads reads 2.5 million weights instead of 3.9. Where w isn't below d, the base model's rows read out z_i.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fms_spec.packed_linear import linear_of, pack_linears
from fms_spec.speculators.pointer import rms


class PackedHeads(nn.Module):
    """Of an attached `HiddenStateSpeculator` whose weights are still as trained; all that it computes with is in their dtype.

    A running state is (the states' share of x_0, that of later heads' x, u [m, w], the pointer's share [m, p + 1], logits [m, r], newest
    token, the one before it), both tokens int64 [m].
    """

    @torch.no_grad()
    def __init__(self, heads: Any) -> None:
        super().__init__()
        trunks, d, w = list(heads.trunks), heads.emb_dim, heads.width
        self.embedding, rows, base_bias = heads.frozen[0], heads.frozen[1][:, :d], heads.frozen[1][:, d:].sum(-1)  # see `with_bias`
        mixes = [trunk.mix.weight.float() for trunk in trunks]
        read, sigma = mixes[0].shape[1] - d, heads.state_scale.float()
        like = trunks[0].mix.weight
        self.states = linear_of(like, torch.cat([mix[:, :read] / sigma[-read:] for mix in mixes]))
        self.tokens = nn.ModuleList(linear_of(like, mix[:, -d:] * heads.embedding_scale) for mix in mixes)
        self.inner = nn.ModuleList(linear_of(like, torch.cat([trunk.gate.weight, trunk.up.weight])) for trunk in trunks)
        self.down = nn.ModuleList(linear_of(like, trunk.down.weight) for trunk in trunks)
        self.read_out = linear_of(like, rows, base_bias) if w >= d else None
        self.said, pointer = nn.ModuleList(), heads.pointer.state_rows() if heads.context_width else (like[:0, :w], like[:0, 0])
        of_z, of_y = mixes[-1][:, read:-d].split([d, w], dim=1) if len(mixes) > 1 else (sigma.new_empty(0, d), sigma.new_empty(0, w))
        self.sizes = [len(of_z), len(pointer[0]), len(rows) if w < d else d]
        for trunk in trunks:
            weight, bias = trunk.out.weight.float(), trunk.out.bias.float()
            u, features, constant = (of_z @ weight + of_y, of_z @ bias), sigma[:d, None] * weight, sigma[:d] * bias
            if self.read_out is None:
                features, constant = rows.float() @ features, rows.float() @ constant + base_bias.float()
            weights, biases = zip(u, pointer, (features, constant))
            self.said.append(linear_of(like, torch.cat(weights), torch.cat(biases)))
        pack_linears(self)

    def start(self, states: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """See `Speculator.start`; states [m, s], not yet divided by sigma."""
        first, *later = self.states(states).chunk(len(self.said), dim=-1)
        return first, later[0] if later else None, None, None, None, before, None

    def advance(self, state: Any, tokens: torch.Tensor, head: int) -> tuple[torch.Tensor | None, ...]:
        """See `Speculator.advance`."""
        first, later, u, *_, newest, _ = state
        own = min(head, 1)
        x = self.tokens[own](F.embedding(tokens, self.embedding)) + (first if u is None else later + u)
        gate, up = self.inner[own](rms(x)).chunk(2, dim=-1)
        y = rms(x + self.down[own](F.silu(gate) * up))
        u, pointer, logits = self.said[own](y).split(self.sizes, dim=-1)
        if self.read_out is not None:
            logits = self.read_out(logits)
        return first, later, u, pointer, logits, tokens, newest
