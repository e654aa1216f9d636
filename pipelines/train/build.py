"""From a config to an untrained speculator."""

import torch

from data.reader import RowReader, read_token_counts
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.registry import FAMILIES
from pipelines.parallel.distributed_base_model import DistributedBaseModel
from pipelines.parallel.mesh import distribute_speculator
from pipelines.train.compiled import compile_base_model, compile_heads


def build_speculator(config, base_model, processes):
    """An attached speculator with fp32 weights drawn from the config's seed, shared and compiled as the config says.

    From here on the base model gives the states that it reads.

    Raises:
        UserError: settings that don't fit the base model.
    """
    family = FAMILIES[config.speculator.family]
    base_model.give_layers(family.base_layers_of(config.speculator, base_model))
    corpus = Corpus(read_token_counts(config.data.dir), sample_states(config, base_model, family.sample_rows))
    torch.manual_seed(config.seed)
    speculator = family.build(config.speculator, base_model, corpus)
    speculator.to(base_model.device)
    speculator.attach(base_model)
    distribute_speculator(speculator, config, processes)
    if config.compile:
        compile_heads(speculator)
        if not isinstance(base_model, DistributedBaseModel):
            compile_base_model(base_model)
    return speculator


def sample_states(config, base_model, rows):
    """The base model's states over so many rows of the corpus, padding left out: fp32 [m, s] on the CPU, or None for no rows."""
    if not rows:
        return None
    sample = next(RowReader(config.data.dir, batch_size=rows, seed=config.seed))
    one_by_one = zip(sample.tokens.split(1), sample.segment_ids.split(1))  # the device holds the states of one
    return torch.cat([base_model.hidden_states(*row)[row[1] >= 0].float().cpu() for row in one_by_one])
