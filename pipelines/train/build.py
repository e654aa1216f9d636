"""From a config to the speculator that a run begins with."""

import torch

from data.reader import RowReader, read_token_counts
from fms_spec.errors import UserError, first_difference, shown
from fms_spec.files import read_json
from fms_spec.hub import local_directory
from fms_spec.model_config import read_config, resolve_base_model
from fms_spec.speculators.directory import check_config, check_speculator, from_config, read_weights
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.registry import FAMILIES
from pipelines.parallel.distributed_base_model import DistributedBaseModel
from pipelines.parallel.mesh import distribute_speculator
from pipelines.plan.feasible import model_sizes
from pipelines.train.checkpoint import HEADS, problem_of
from pipelines.train.compiled import compile_base_model, compile_heads


def given_heads(config, saved=()):
    """config.json of the heads that a run goes on from, its own or `speculator.init_from`'s; None where it makes them.

    Args:
        saved: directories of the run's checkpoints, oldest first; none where it begins.

    Raises:
        UserError: as `check_speculator`, or heads that the config's own settings don't make.
    """
    settings, name = config.speculator, config.base_model.name
    if saved:
        path = next((path for path in reversed(saved) if problem_of(path, {HEADS}) is None), None)
        given, what = path and check_config(read_json(path / HEADS, ""), path / HEADS), f"checkpoint {path}"
    else:
        given, what = settings.init_from and check_speculator(settings.init_from, name), f"speculator.init_from {settings.init_from}"
    if given:
        check_made_alike(settings, model_sizes(read_config(resolve_base_model(name))), given, what)
        given = given | {"n_predict": settings.n_predict}
    return given


def check_made_alike(settings, base, given, what):
    """Refuse heads, as their config.json `given` says, that the settings of a config don't make.

    What no setting says (a family's `inherited`) may differ. base: the base model's `model_sizes`. what: the heads, in words.
    """
    family = FAMILIES[settings.family]
    if given["model_type"] != family.model_type:
        raise UserError(f"{what}: a {given['model_type']}, and speculator.family is {settings.family}; set the family that it is of")
    with torch.device("meta"):
        made, theirs = family.build(settings, base), from_config(given)
    values = [heads.saved_config() for heads in (made, theirs)]
    shared = family.any_depth and made.distinct_heads == theirs.distinct_heads
    free = family.inherited | ({"n_predict"} if shared else set())
    difference = first_difference(*({key: value for key, value in each.items() if key not in free} for each in values))
    if difference:
        key, ours, other = difference
        raise UserError(f"{what}: its {key} is {shown(other)}, and the config's speculator section makes {shown(ours)}; make them alike")


def build_speculator(config, base_model, processes, given=None, fresh=True):
    """An attached speculator with fp32 weights, drawn from the config's seed or read, shared and compiled as the config says.

    From here on the base model gives the states that it reads.

    Args:
        given: `given_heads` of the config. fresh: whether the run begins; else its checkpoint has the weights.

    Raises:
        UserError: settings that don't fit the base model.
    """
    family = FAMILIES[config.speculator.family]
    base_model.give_layers(family.base_layers_of(config.speculator, base_model))
    if given is None:
        counts = read_token_counts(config.data.dir, config.data.train_on)
        corpus = Corpus(counts, sample_states(config, base_model, family.sample_rows))
        torch.manual_seed(config.seed)
        speculator = family.build(config.speculator, base_model, corpus)
    else:
        speculator = from_config(given)
    if given is not None and fresh:
        read_weights(speculator, local_directory("speculator", config.speculator.init_from), given)
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
