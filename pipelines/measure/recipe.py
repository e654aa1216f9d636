"""Which recipe learns most from a fixed budget: named variants of one config, each trained and judged on the same development prompts.

Shapes: p prompts, n tokens of a row, b rows, d base width, v variants.
"""

import hashlib
import json

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.yaml_files import read_yaml
from fms_spec.acceptance import pooled_acceptance
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError, first_difference
from pipelines.config import Section, load_config
from pipelines.measure.figures import interval, resampled

AVERAGE = 0.99  # the moving average of the weights that is judged beside them reaches back over about a hundred steps


class Variant(Section):
    """One line of the comparison: a name, why it is worth its time, and the config's values that it changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1)
    why: str = Field(min_length=1)
    set: list[str] = []


def read_variants(path, config_path, overrides):
    """{name: (`Variant`, `RunConfig`)} of a YAML list; every config is checked. The list's overrides come after `overrides`.

    Raises:
        UserError: no such file, an unknown key, a value out of range, a name given twice, or a variant that changes what all share.
    """
    entries = read_yaml(path, "variants")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"variants {path}: expected a list of entries with name, why and set")
    base, variants = load_config(config_path, overrides), {}
    for number, entry in enumerate(entries, start=1):
        try:
            variant = Variant.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"variants {path}, entry {number}: {'.'.join(map(str, first['loc'])) or 'entry'}: {first['msg']}") from error
        if variant.name in variants:
            raise UserError(f"variants {path}, entry {number}: the name {variant.name} is given twice")
        try:
            config = load_config(config_path, [*overrides, *variant.set])
        except UserError as error:
            raise UserError(f"variants {path}, {variant.name}: {error}") from error
        difference = first_difference(*map(shared_values, (base, config)))
        if difference:
            raise UserError(f"variants {path}, {variant.name}: changes {difference[0]}, which all variants share; give it behind the flags")
        variants[variant.name] = (variant, config)
    return variants


def shared_values(config):
    """What no variant may change: what it is judged on, and what the hidden states come from."""
    return {"base_model": config.base_model.model_dump(), "data": config.data.dir, "validation": config.validation.model_dump()}


def digest(config):
    """A short name of a config's values."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def read_results(path, variants):
    """{name: line} of the variants that `path`, a file of JSON lines, holds already.

    Raises:
        UserError: it holds a variant with another config, or what is no result.
    """
    if not path.is_file():
        return {}
    try:
        lines = {line["variant"]: line for line in map(json.loads, path.read_text().splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is no result of this benchmark; give another --out_dir") from error
    for name, line in lines.items():
        if name in variants and line["config"] != digest(variants[name][1]):
            raise UserError(f"{path} holds {name} with other settings; give the variant another name, or another --out_dir")
    return {name: line for name, line in lines.items() if name in variants}


class SharedStates:
    """Hidden states that all variants read from one cache; the base model's own tokens are each variant's, for its draft vocabulary.

    Called like `HiddenStates`; `best_tokens` as there.
    """

    def __init__(self, cache, best_tokens):
        self.cache, self.best_tokens = cache, best_tokens
        rows, length, _ = cache.states.shape
        self.greedy, self.known = torch.zeros(rows, length, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)

    def __call__(self, batch):
        states, greedy = self.cache(batch)
        if self.best_tokens is None:
            return states, greedy
        new = (~self.known[batch.row_ids]).nonzero()[:, 0]
        n = batch.tokens.shape[1]
        if len(new):
            best = self.best_tokens(states[new, :-1]).cpu()
            self.greedy[batch.row_ids[new], 1:n] = best == batch.tokens[new, 1:]
            self.known[batch.row_ids[new]] = True
        return states, self.greedy[batch.row_ids, :n]


def averaged(trainer):
    """The moving average of the trainer's weights, from now on: torch's `AveragedModel`."""
    average = AveragedModel(trainer.speculator, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    trainer.optimizer.register_step_post_hook(lambda *_: average.update_parameters(trainer.speculator))
    return average


def judge(speculator, validation):
    """Acceptance of the speculator's whole chain on the development prompts, as JSON values; `by_prompt` is [accepted, steps] of each."""
    proposer = DraftShape().proposer(speculator)
    accepted = validation.accepted(proposer)
    acceptance = pooled_acceptance([count for counts in accepted for count in counts], proposer.lookahead)
    by_prompt = [[sum(counts), len(counts)] for counts in accepted]
    return {
        "acceptance_length": acceptance.length, "acceptance_length_interval": interval(resampled_lengths(by_prompt)),
        "acceptance_per_position": acceptance.per_position, "draft_steps": acceptance.steps, "by_prompt": by_prompt,
    }  # fmt: skip


def resampled_lengths(by_prompt):
    """Acceptance lengths of drawings of the prompts, see `resampled`: fp64. by_prompt: list of p pairs."""
    accepted, steps = resampled(torch.tensor(by_prompt, dtype=torch.float64).T)
    return 1 + accepted / steps.clamp(min=1)


def compared(lines):
    """Rows for `console.print_recipes`: each line, and its length against the first one's by the same draws of prompts."""
    first = resampled_lengths(lines[0]["by_prompt"])
    for line in lines:
        difference = resampled_lengths(line["by_prompt"]) - first
        yield line | {"more": line["acceptance_length"] - lines[0]["acceptance_length"], "more_interval": interval(difference)}
