"""What is asked of decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How tokens are chosen and when a text ends.

    max_new_tokens, min_new_tokens: EOS can't be chosen, and stop strings don't count, among the first min_new_tokens. ignore_eos: EOS is a
    token like any other. stop: strings that end a text and are left out of it. tokenizer: a `transformers` one, for `stop` and for text.
    seeds: an int for each prompt; 0, 1, 2 ... by default. What is sampled for a prompt depends on its own seed alone.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    tokenizer: PreTrainedTokenizerFast | None = None
    sampling: Sampling = Sampling()
    seeds: Sequence[int] | None = None

    def check(self, base_model: BaseModel, prompts: Sequence[torch.Tensor], lookahead: int) -> None:
        """Refuse what can't be decoded, before any work.

        Args:
            prompts: list of 1-D int64 tensors. lookahead: depth of the candidates.

        Raises:
            UserError: an empty prompt, impossible limits, tokens that are over the base model's vocabulary, or
                texts and candidates that are over its context.
        """
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise UserError("an empty prompt can't be continued; give at least one token")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min_new_tokens {self.min_new_tokens}: must be from 0 to max_new_tokens, {self.max_new_tokens}")
        if isinstance(self.stop, str):
            raise UserError(f"stop {self.stop!r}: give a list of strings, be it one")
        if self.stop and (self.tokenizer is None or not all(self.stop)):
            raise UserError("stop strings need a tokenizer, and none of them may be empty")
        if self.seeds is not None and len(self.seeds) != len(prompts):
            raise UserError(f"{len(self.seeds)} seeds for {len(prompts)} prompts; give one each")
        largest = max(int(prompt.max()) for prompt in prompts)
        if largest >= base_model.vocab_size:
            raise UserError(
                f"token {largest} of a prompt is over the vocabulary of {base_model.name}, {base_model.vocab_size}; "
                "its tokenizer is another model's, or has tokens that were added without the embedding"
            )
        longest = max(len(prompt) for prompt in prompts)
        if longest + self.max_new_tokens + lookahead > base_model.context_length:
            raise UserError(
                f"a prompt of {longest} tokens, {self.max_new_tokens} new ones and candidates {lookahead} deep are over the context of "
                f"{base_model.name}, {base_model.context_length}; shorten the prompt, or lower how many tokens are new, lookahead or lookup"
            )
