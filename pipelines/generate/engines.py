"""The engines of phase 2, which decode the base model's continuations: what decides their text, and the embedded one.

The protocol of an engine stands in data/continuations/writer.py.
"""

import torch

from data.progress import progress
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.model_config import context_length, read_config
from fms_spec.options import DecodingOptions
from fms_spec.sampling import Sampling
from fms_spec.seeds import mixed


def sampling_of(settings):
    """`Sampling` of a `GenerationSection`.

    Raises:
        UserError: a value outside its range.
    """
    return Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)


def describe_generation(settings, fingerprint, dtype):
    """What decides the text besides the prompts and the seed: kept in every shard, and known without loading anything.

    settings: `GenerationSection`. fingerprint: of the base model's weights. dtype: name of the dtype it computes in.
    """
    return {
        "engine": settings.engine, "base_model": fingerprint, "dtype": dtype,
        "max_new_tokens": settings.max_new_tokens, **sampling_of(settings).as_dict(),
    }  # fmt: skip


def check_context(base_model_dir, prompt_length, max_new_tokens):
    """Refuse texts that the base model can't hold; lengths in tokens.

    Raises:
        UserError: prompt and continuation together are over the base model's context.
    """
    context = context_length(read_config(base_model_dir))
    if prompt_length + max_new_tokens > context:
        raise UserError(
            f"prompts of {prompt_length} tokens and {max_new_tokens} new tokens are over the context of {base_model_dir}, {context}; "
            "lower generation.max_new_tokens (--max_tokens) or prepare shorter prompts"
        )


def make_engine(settings, base_model, prompt_length, seed, shared=False):
    """The engine that `settings` (`GenerationSection`) name.

    base_model: `BaseModelSection`. prompt_length: tokens. shared: training uses the same device.
    """
    if settings.engine == "vllm":
        from pipelines.generate.vllm_engine import VLLMEngine  # an optional install

        sleeps = shared and torch.cuda.is_available()
        return VLLMEngine(base_model.name, settings, prompt_length, seed, base_model.dtype, sleeps)
    return EmbeddedEngine(settings, seed)


def start_engine(settings, base_model, prompt_length, seed):
    """As `make_engine`, with the base model that it decodes with where it does not load that itself."""
    engine = make_engine(settings, base_model, prompt_length, seed)
    if settings.engine == "embedded":
        engine.use(BaseModel(base_model.name, dtype=base_model.dtype, backend=base_model.backend))
    return engine


class EmbeddedEngine:
    """Decodes one shard at a time, all its prompts together, through our own batched decoding.

    Each shard has a seed of its own, so that shards may be written in any order and by anyone.

    Args:
        settings: the config's `GenerationSection`. base_model: where it is not given by `use`.
    """

    def __init__(self, settings, seed, base_model=None):
        self.base_model, self.settings, self.seed, self.sampling = base_model, settings, seed, sampling_of(settings)
        self._submitted = None

    def use(self, base_model):
        """Decode with this `BaseModel`."""
        self.base_model = base_model

    @property
    def idle(self):
        return self._submitted is None

    @property
    def wants_more(self):
        return self.idle

    def submit(self, index, prompts):
        """Take the prompts of shard `index`, a list of p int64 [length]."""
        self._submitted = index, prompts

    def step(self):
        """Decode what was submitted; returns [(index, list of p continuations, 1-D int64; list of p finish reasons)]."""
        (index, prompts), self._submitted = self._submitted, None
        continuations, finish_reasons = zip(*self.decode(index, prompts, range(len(prompts))))
        return [(index, list(continuations), list(finish_reasons))]

    def decode(self, index, prompts, rows):
        """[(continuation, finish reason)] of some rows, a list of ints, of shard `index`."""
        seeds = tuple(mixed(self.seed, index, row) for row in rows)
        options = DecodingOptions(max_new_tokens=self.settings.max_new_tokens, sampling=self.sampling, seeds=seeds)
        total = len(rows) * self.settings.max_new_tokens
        with progress(total=total, desc=f"continuations {index}", unit="token", unit_scale=True, leave=False) as bar:
            results, _ = decode(self.base_model, [prompts[row] for row in rows], options, progress=bar.update)
        return [(torch.tensor(result.tokens), result.finish_reason) for result in results]

    def close(self):
        """Nothing to end: the base model is its owner's."""
