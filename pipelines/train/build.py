"""From a config to an untrained speculator."""

import torch

from fms_spec.errors import UserError
from fms_spec.speculators import HiddenStateSpeculator, MLPSpeculator

SAMPLE_ROWS = 8  # corpus rows on which the spread of hidden states is measured
STATE_SCALE_FLOOR = 1e-3  # keeps a coordinate that hardly moves from being blown up


def build_speculator(config, base_model, token_counts, sample):
    """An attached speculator with fp32 weights drawn from the config's seed.

    Args:
        token_counts: int64 [tokenizer vocabulary], how often each token stands in the corpus; the draft vocabulary is its most frequent.
        sample: a corpus `Batch`, on which the spread of the base model's states is measured.

    Raises:
        UserError: a draft vocabulary larger than the base model's.
    """
    settings = config.speculator
    torch.manual_seed(config.seed)
    if settings.family == "mlp":
        speculator = MLPSpeculator(
            base_model.width, base_model.vocab_size, settings.n_predict, settings.inner_dim, settings.tie_weights, settings.scale_input
        )
    else:
        size = settings.draft_vocab_size or base_model.vocab_size
        if size > base_model.vocab_size:
            raise UserError(f"speculator.draft_vocab_size {size} is over the base model's vocabulary, {base_model.vocab_size}")
        rows = zip(sample.tokens.split(1), sample.segment_ids.split(1))  # one at a time: the device holds the states of one
        states = torch.cat([base_model.hidden_states(*row)[row[1] >= 0].float().cpu() for row in rows])
        speculator = HiddenStateSpeculator(
            base_model.width, base_model.vocab_size, most_frequent(token_counts, size, base_model), states.std(0) + STATE_SCALE_FLOOR,
            settings.n_predict, settings.width, settings.inner_dim,
        )  # fmt: skip
    speculator.to(base_model.device)
    speculator.attach(base_model)
    return speculator


def most_frequent(token_counts, size, base_model):
    """Ids of the `size` most frequent tokens and of EOS, ascending: int64 [size]. Equal counts go to the lower id."""
    counts = torch.zeros(base_model.vocab_size, dtype=torch.int64)
    known = min(len(token_counts), base_model.vocab_size)
    counts[:known] = token_counts[:known]
    for eos in base_model.eos_token_ids:
        counts[eos] = counts.max() + 1
    return counts.argsort(descending=True, stable=True)[:size].sort().values
