"""Two faults of vLLM 0.32's speculative sampling on a CPU, mended in memory before it drafts with attached heads.

Both are in vLLM's own code and strike any speculative method there; greedy decoding is free of them. Shapes: b requests, m drafted tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler


def mend_sampling() -> None:
    """Let drafted tokens be checked at their request's own temperature, top-k and top-p, and steps without drafts pass with top-k."""
    rejection_sampler.expand_batch_to_tokens = repeat_for_tokens
    constrain = rejection_sampler.apply_sampling_constraints
    if not hasattr(constrain, "unmended"):
        rejection_sampler.apply_sampling_constraints = passing_empty(constrain)


def repeat_for_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value for each of its drafted tokens: [b] -> [m], cu_num_tokens the running count of them, [b].

    vLLM's kernel fills a copy where x is not int64, as temperatures and top-k are not, and returns uninitialised memory.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype), x).repeat_interleave(counts, output_size=num_tokens)


def passing_empty(constrain: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_sampling_constraints` that returns no logits [0, v] as they are: their largest top-k is asked for, and there is none."""

    def apply_sampling_constraints(logits: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return constrain(logits, *arguments, **named) if len(logits) else logits

    apply_sampling_constraints.unmended = constrain  # type: ignore[attr-defined]
    return apply_sampling_constraints
