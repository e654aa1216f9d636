"""Head agreement on held-out rows: how often each head's best token is the base model's own.

A figure for training only: every head is given the true tokens before its target. What decoding earns is acceptance.
"""

import torch
from torch.nn import functional as F

from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.losses import CHUNK


@torch.no_grad()
def head_agreement(speculator, base_model, batch):
    """Share of positions at which head i's best token is the base model's best token: list of h floats, NaN where it had none."""
    hidden = base_model.hidden_states(batch.tokens, batch.segment_ids)
    positions = choose_positions(usable_positions(batch.segment_ids, batch.first_states, speculator.n_predict))
    windows = make_windows(hidden, batch.tokens, positions, speculator.n_predict)
    agreements = []
    with torch.autocast(hidden.device.type, dtype=hidden.dtype, enabled=hidden.dtype != torch.float32):
        for head, (features, weight) in enumerate(speculator.heads(windows.hidden, windows.tokens, windows.counts)):
            targets = windows.target_states(head)
            agree = torch.zeros((), device=hidden.device)
            for start in range(0, len(features), CHUNK):
                rows = slice(start, start + CHUNK)
                best = F.linear(features[rows], weight).argmax(-1)
                best = best if speculator.draft_ids is None else speculator.draft_ids[best]
                agree += (best == base_model.logits(targets[rows]).argmax(-1)).sum()
            agreements.append((agree / len(features)).item() if len(features) else float("nan"))
    return agreements
