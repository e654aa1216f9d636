"""The part of a base model's vocabulary that heads draft from: which tokens, and where each stands in it."""

from typing import Any

import torch

from fms_spec.errors import UserError


def most_frequent(token_counts: torch.Tensor, size: int, base_model: Any, among: torch.Tensor | None = None) -> torch.Tensor:
    """Ids of the `size` most frequent tokens and of EOS, ascending: int64 [size]. Equal counts go to the lower id.

    among: ids int64 [r], ascending, that they are chosen of; None: all.
    """
    counts = torch.zeros(base_model.vocab_size, dtype=torch.int64)
    known = min(len(token_counts), base_model.vocab_size)
    counts[:known] = token_counts[:known]
    for eos in base_model.eos_token_ids:
        counts[eos] = counts.max() + 1
    among = torch.arange(base_model.vocab_size) if among is None else among
    return among[counts[among].argsort(descending=True, stable=True)[:size]].sort().values


def coverage(token_counts: torch.Tensor, draft_ids: torch.Tensor) -> float:
    """Share of the counted tokens that are among these ids int64 [r]."""
    return (token_counts[draft_ids[draft_ids < len(token_counts)]].sum() / token_counts.sum()).item()


def size_of(settings: Any, base_model: Any) -> int:
    """How many tokens `settings.draft_vocab_size` asks for; raises UserError where the base model has fewer."""
    size = settings.draft_vocab_size or base_model.vocab_size
    if size > base_model.vocab_size:
        raise UserError(f"speculator.draft_vocab_size {size} is over the base model's vocabulary, {base_model.vocab_size}")
    return size


def entries(draft_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Draft-vocabulary entry of each token, -1 where it has none: int64 [v]."""
    index = torch.full((vocab_size,), -1, device=draft_ids.device)
    index[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return index


def check_ids(draft_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Raises UserError for ids int64 [r] that are no ascending tokens of the vocabulary; name: of the tensor that says them."""
    if draft_ids[0] < 0 or draft_ids[-1] >= vocab_size or (draft_ids.diff() <= 0).any():
        raise UserError(f"speculator tensor {name}: no ascending tokens of a vocabulary of {vocab_size}; export it again")
