"""Train a speculator: python -m scripts.train --config=CONFIG.yaml --out_dir=runs/mine [--resume] [key.path=value ...]"""

import os
import shlex
import sys
from contextlib import closing
from functools import cache, partial
from pathlib import Path

from data.continuations import Continuations
from data.reader import RowReader, read_prompts, read_token_counts
from data.supply import Ahead, Alongside, Inline
from fms_spec.base_model import BaseModel
from pipelines.build import build_speculator
from pipelines.config import load_config
from pipelines.environment import environment
from pipelines.generation import make_engine
from pipelines.producers import Producers
from pipelines.states import HiddenStates
from pipelines.train import Trainer, check_out_dir, claim_out_dir
from pipelines.validation import Validation
from scripts.cli import arguments, main
from scripts.generate_continuations import command_of, open_store

ROOT = Path(__file__).parents[1]
SAMPLE_ROWS = 8  # corpus rows on which the spread of hidden states is measured
FILL_ROWS = 8  # rows of a base-model forward when hidden states are kept


@arguments
class Arguments:
    """Train attached speculator heads on a frozen base model, in two phases.

    Trailing key.path=value words override the config, e.g. schedule.steps=700.

    Args:
        config: YAML file; pipelines/configs holds examples with a reason for each value.
        out_dir: where checkpoints, metrics and continuations go; one run each.
        resume: go on with the run in out_dir from its newest checkpoint.
    """

    config: str
    out_dir: str
    resume: bool = False


def run(parsed, overrides):
    train(load_config(parsed.config, overrides), Path(parsed.out_dir), parsed.resume)


def train(config, out_dir, resume):
    """Put a run together and train it to its end; returns (its last checkpoint's directory, the trainer)."""
    check_out_dir(out_dir, config, resume)
    rows = RowReader(config.data.dir, batch_size=config.phase1.batch_size, seed=config.seed, rows=config.data.rows)
    prompts = read_prompts(config.data.dir, limit=config.data.prompts)
    folder = config.data.continuations or out_dir / "continuations"
    store = open_store(folder, config.data.dir, prompts, config.base_model, config.generation, config.seed)
    load = cache(partial(BaseModel, config.base_model.name, dtype=config.base_model.dtype, backend=config.base_model.backend))
    with closing(open_supply(config, store, out_dir, load)) as supply:
        continuations = Continuations(store, supply, config.phase2.batch_size)
        trainer = put_together(config, out_dir, load(), rows, prompts, continuations)
        step = trainer.resume()
        if step:
            print(f"going on from step {step}")
        supply.begin(continuations.shards_read)
        if config.hidden_state_cache:
            fill_cache(config, trainer)
        return trainer.train(), trainer


def open_supply(config, store, out_dir, load):
    """How the run comes by its continuations. load: gives the `BaseModel`, should the trainer's own process write them.

    Raises:
        UserError: they were to be written ahead, and some are missing.
    """
    settings, words = config.generation, command_of(config, store.out_dir)
    rows = config.schedule.build().phase_steps().get("phase2", 0) * config.phase2.accumulate * config.phase2.batch_size
    if settings.mode == "ahead":
        return Ahead(store, rows, shlex.join(["python", *words]))
    if settings.mode == "alongside":
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environments = [{"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) for device in settings.producer_devices]
        command = [sys.executable, *words, f"--ahead={settings.shards_ahead}"]
        return Alongside(store, rows, Producers(command, environments, out_dir / "producers"))
    prompt_length = store.prompts.tokens.shape[1]
    return Inline(store, rows, partial(make_engine, settings, config.base_model, prompt_length, config.seed, load, shared=True))


def put_together(config, out_dir, base_model, rows, prompts, continuations):
    """The `Trainer` of a run, whose out_dir is claimed when all it needs is there."""
    sample = next(RowReader(config.data.dir, batch_size=SAMPLE_ROWS, seed=config.seed))
    speculator = build_speculator(config, base_model, read_token_counts(config.data.dir), sample)
    validation = None
    if config.validation.prompts:
        held_out = read_prompts(config.data.dir, "held_out").tokens[-config.validation.prompts :]
        validation = partial(Validation, base_model, held_out, config.validation.max_new_tokens, config.speculator.n_predict)
    claim_out_dir(out_dir, config, environment())
    asked = config.phase1.loss.only_accepted or config.phase2.loss.only_accepted
    best_tokens = partial(speculator.best_base_tokens, base_model) if asked else None
    length = prompts.tokens.shape[1] + config.generation.max_new_tokens
    states = {
        "phase1": HiddenStates(base_model, best_tokens, cache_dir(config, out_dir, "phase1"), rows.table_rows, rows.seq_length, len(rows)),
        "phase2": HiddenStates(base_model, best_tokens, cache_dir(config, out_dir, "phase2"), len(prompts), length, len(prompts)),
    }
    batches = {"phase1": rows, "phase2": continuations}
    return Trainer(config, base_model, speculator, batches, continuations.supply, states, out_dir, validation)


def fill_cache(config, trainer):
    """Keep phase 1's hidden states on disk before the first step."""
    size = sum(source.nbytes for source in trainer.states.values())
    print(f"hidden-state cache: up to {size / 1e9:.2f} GB in {trainer.out_dir / 'hidden_states'}")
    reader = RowReader(config.data.dir, batch_size=FILL_ROWS, seed=config.seed, rows=config.data.rows)
    with trainer.watch.measure("base_model"):
        trainer.states["phase1"].fill(reader, -(-len(reader) // FILL_ROWS))


def cache_dir(config, out_dir, phase):
    """Where a phase's hidden states are kept, or None where they aren't."""
    return out_dir / "hidden_states" / phase if config.hidden_state_cache else None


if __name__ == "__main__":
    main(Arguments, run, overrides=True)
