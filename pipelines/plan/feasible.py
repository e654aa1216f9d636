"""Whether a run can be at all: its sizes against the data and the memory, before anything is loaded or written.

What is refused here could never run, or is a slip of some digits; `plan` tells how much a run needs in truth, which is more.
"""

from types import SimpleNamespace

import torch

from fms_spec.errors import UserError
from fms_spec.model_config import DTYPES, context_length, read_config
from fms_spec.speculators.registry import FAMILIES
from pipelines.plan.devices import device_memory

TRAINED = 4 * 4  # bytes of a trained weight at least: itself, its gradient and two moments, in fp32


def check_sizes(config, sizes, processes=1, memory=None):
    """Refuse sizes that the data or the memory can't bear.

    Args:
        config: `RunConfig`. sizes: `plan.Sizes`, all known. processes: that train together. memory: bytes of one's device; those of this
        machine by default.

    Raises:
        UserError: a step over the whole data, heads that no row is long enough for, a draft vocabulary or layers over the base model's,
        validation over its context, or heads and hidden states over the memory; and as `read_config`.
    """
    memory = device_memory() if memory is None else memory
    base = read_config(config.base_model.name)
    width = base.hidden_size * (1 + len(FAMILIES[config.speculator.family].base_layers_of(config.speculator, model_sizes(base))))
    heads, written = config.speculator.n_predict, config.generation.max_new_tokens
    tables = {
        "phase1": ("rows", sizes.rows, sizes.seq_length, sizes.seq_length - 1, "data prepared with a longer --seq_length"),
        "phase2": ("prompts", sizes.prompts, sizes.prompt_length + written, written, "more generation.max_new_tokens"),
    }
    for phase in config.schedule.build().phase_steps():
        settings, (what, count, length, new, longer) = getattr(config, phase), tables[phase]
        read = settings.batch_size * settings.accumulate
        if read > count:
            raise UserError(
                f"{phase}.batch_size {settings.batch_size} x accumulate {settings.accumulate}: a step reads {read:,} {what}, and there are "
                f"{count:,}; lower them, or prepare or ask for more"
            )
        if new - heads < 1:
            raise UserError(f"speculator.n_predict {heads}: the last head finds no token in {phase}'s texts; take fewer, or {longer}")
        states = read * length * width * DTYPES[config.base_model.dtype].itemsize
        check_memory(states, memory, f"holding the hidden states of a step's {read:,} {what}", f"lower {phase}.batch_size or accumulate")
    longest = sizes.held_out_length or sizes.prompt_length
    needed = longest + config.validation.max_new_tokens + heads
    if config.validation.prompts and needed > context_length(base):
        raise UserError(
            f"validation.max_new_tokens {config.validation.max_new_tokens}: with prompts of {longest} tokens and {heads} heads "
            f"that is over the context of {config.base_model.name}, {context_length(base)}; lower it"
        )
    shards = 1 if config.parallel.speculator == "replicate" else processes
    what, mend = "training the heads", "lower speculator.inner_dim, width or n_predict"
    check_memory(TRAINED * count_weights(config.speculator, base) // shards, memory, what, mend)


def check_documents(config, rows):
    """Refuse rows with a document, or a piece of one, over the base model's context, which would end a run at the step that meets it.

    rows: phase 1's `RowReader`.

    Raises:
        UserError: there is one; and as `read_config`.
    """
    context = context_length(read_config(config.base_model.name))
    if rows.seq_length <= context or "phase1" not in config.schedule.build().phase_steps():
        return
    longest = rows.longest_document()
    if longest > context:
        raise UserError(
            f"{config.data.dir}: its rows hold a document of {longest} tokens, over the context of {config.base_model.name}, {context}; "
            f"prepare it with --seq_length={context} or less"
        )


def count_weights(settings, base):
    """Trained weights of a family's settings on a base model's config; the heads are made without data."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in FAMILIES[settings.family].build(settings, model_sizes(base)).parameters())


def model_sizes(base):
    """What of a base model decides its heads' sizes, from its config."""
    return SimpleNamespace(width=base.hidden_size, vocab_size=base.vocab_size, layers=base.num_hidden_layers, config=base)


def check_memory(need, memory, what, mend):
    """Raise UserError where `what` alone takes more bytes than there are."""
    if need > memory:
        raise UserError(f"{what} takes at least {need / 1e9:,.1f} GB of memory, and there are {memory / 1e9:,.1f}; {mend}")
