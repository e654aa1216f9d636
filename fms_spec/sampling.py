"""How a token is chosen from the base model's logits.

Shapes: v vocabulary; leading dimensions are any.

Chance comes in as numbers that were drawn beforehand: a text's i-th new token is chosen with its i-th number, whichever way decoding gets
there. So one seed gives one text in any batch, with or without a speculator whose candidates are picked.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fms_spec.errors import UserError

LOWEST_TEMPERATURE = 1e-5  # logits divided by less overflow fp32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy), or a number from {LOWEST_TEMPERATURE}")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be over 0 and at most 1 (off)")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for metadata."""
        return asdict(self)

    def choose(self, logits: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
        """One token for each row: logits [..., v], uniforms float64 [...] in [0, 1), unused where greedy -> int64 [...]."""
        if self.temperature == 0:
            return best_token(logits)
        assert uniforms is not None
        probabilities, ids = self._kept(logits)
        drawn = draw(probabilities, uniforms)
        return drawn if ids is None else ids.gather(-1, drawn[..., None]).squeeze(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that `choose` draws from: fp32, the logits' shape, each row summing to 1."""
        if self.temperature == 0:
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best_token(logits)[..., None], 1.0)
        kept, ids = self._kept(logits)
        dense = kept if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, ids, kept)
        return dense / dense.sum(-1, keepdim=True)

    def _kept(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(probabilities fp32 [..., s] up to a factor, their tokens int64 [..., s]; None where s = v in the vocabulary's order)."""
        logits, ids = logits.float() / self.temperature, None
        if self.top_k and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k, dim=-1)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            ids = order if ids is None else ids.gather(-1, order)
            # A token stays while the mass before it is under top_p, so the most likely one always stays.
            probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < self.top_p)
        return probabilities, ids


def best_token(logits: torch.Tensor) -> torch.Tensor:
    """The first of the likeliest: [..., v] -> int64 [...].

    As argmax, which takes 0.66 ms instead of 0.19 over 5 x 49,152 bf16 on two CPU cores (`scripts.benchmark train_step`, "best_token").
    """
    return logits.max(-1).indices


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index drawn from each row by inverting its cumulated weights: weights [..., s] >= 0, uniforms float64 [...] -> int64 [...].

    In float64, so that no weight of 0 is ever drawn and none is lost to rounding. A row without any weight gives its last index.
    """
    cumulated = weights.double().cumsum(-1)
    total = cumulated[..., -1]
    # A uniform just under 1 may round up to the total, behind which there is nothing.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, wanted[..., None], right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


class Chance:
    """The numbers a batch's choices hang on, each sequence from its own seed: float64 in [0, 1), drawn on the host at the start.

    Args:
        seeds: list of b ints. steps: most new tokens and candidates of one sequence. tests: numbers a step for drawing and testing drafts.
    """

    def __init__(self, seeds: Iterable[int], steps: int, tests: int, device: torch.device):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.rand(steps, dtype=torch.float64, generator=generator) for generator in generators]
        self.choices = torch.stack(rows).to(device)
        rows = [torch.rand(steps if tests else 0, tests, dtype=torch.float64, generator=generator) for generator in generators]
        self.tests = torch.stack(rows).to(device)

    def at(self, emitted: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """Numbers that choose the token after nodes at `depths` int64 [t, n], sequences having emitted int64 [b, 1] tokens: [b, n]."""
        return self.choices.gather(1, emitted + depths)

    def for_step(self, emitted: torch.Tensor) -> torch.Tensor:
        """The numbers [b, tests] of a step that starts with so many emitted tokens, int64 [b, 1]."""
        return self.tests[torch.arange(len(emitted), device=emitted.device), emitted[:, 0]]

    def keep_sequences(self, kept: list[int]) -> None:
        """Drop finished sequences: `kept` list of ints."""
        self.choices, self.tests = self.choices[kept], self.tests[kept]
