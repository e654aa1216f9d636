"""What a training step is fed with. Shapes: b batch, n sequence."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, from the corpus (phase 1) or from continuations (phase 2).

    tokens: int64 [b, n], every entry a valid token, padding included
    segment_ids: int32 [b, n], 0, 1, 2, … counting the documents within the row, -1 for padding (on the right)
    first_states: int64 [b], the first position whose hidden state may be used: 0 for corpus rows, the end of the
        prompt for continuations
    row_ids: int64 [b], the row's number in its table; the same in every epoch and run, so a cache may be keyed by it
    trained: bool [b, n], the tokens that heads are trained to predict; None for all
    """

    tokens: torch.Tensor
    segment_ids: torch.Tensor
    first_states: torch.Tensor
    row_ids: torch.Tensor
    trained: torch.Tensor | None = None


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting for it: from ordinary memory a GPU's queue would be emptied before the copy begins."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
