"""The embedded engine of phase 2: the base model writes continuations through our own batched decoding."""

import torch
from tqdm import tqdm

from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.options import Options
from fms_spec.sampling import Sampling


class EmbeddedEngine:
    """Calls `decode` on blocks of prompts; each block has a seed of its own, so blocks may be written in any order.

    Args:
        settings: the config's `GenerationSection`.

    Raises:
        UserError: prompts and continuations together are over the base model's context.
    """

    name = "embedded"

    def __init__(self, base_model, settings, prompt_length, seed):
        self.base_model, self.settings, self.seed = base_model, settings, seed
        self.sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        if prompt_length + settings.max_new_tokens > base_model.context_length:
            raise UserError(
                f"prompts of {prompt_length} tokens and generation.max_new_tokens {settings.max_new_tokens} are over the context of "
                f"{base_model.name}, {base_model.context_length}; lower generation.max_new_tokens or prepare shorter prompts"
            )

    def describe(self):
        """What decides the text besides the prompts: kept in every shard."""
        return {
            "engine": self.name, "base_model": self.base_model.fingerprint, "dtype": str(self.base_model.dtype).removeprefix("torch."),
            "max_new_tokens": self.settings.max_new_tokens, **self.sampling.as_dict(),
        }  # fmt: skip

    def __call__(self, prompts, block):
        """prompts int64 [p, length] -> (list of p continuations, 1-D int64; list of p finish reasons)."""
        seeds = tuple((self.seed * 1_000_003 + block) * 1_000_003 + place for place in range(len(prompts)))
        options = Options(max_new_tokens=self.settings.max_new_tokens, sampling=self.sampling, seeds=seeds)
        total = len(prompts) * self.settings.max_new_tokens
        with tqdm(total=total, desc=f"continuations {block}", unit="token", unit_scale=True, leave=False, dynamic_ncols=True) as bar:
            results, _ = decode(self.base_model, list(prompts), options, progress=bar.update)
        return [torch.tensor(result.tokens) for result in results], [result.finish_reason for result in results]
