"""How a token is chosen from the base model's logits.

Shapes: b batch, v vocabulary.
"""

from dataclasses import asdict, dataclass

import torch

from fms_spec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be over 0 and at most 1 (off)")

    def as_dict(self):
        """Plain values, for metadata."""
        return asdict(self)

    def choose(self, logits, generator=None):
        """One token for each row: logits [b, v] -> int64 [b]. The generator lives on the logits' device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        ids = None
        if self.top_k and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k, dim=-1)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True)
            ids = order if ids is None else ids.gather(-1, order)
            # A token stays while the mass before it is under top_p, so the most likely one always stays.
            probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < self.top_p)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)
