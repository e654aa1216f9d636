"""Train a speculator: python -m scripts.train --config=CONFIG.yaml --out_dir=runs/mine [--resume] [key.path=value ...]"""

from functools import partial
from pathlib import Path

from data.continuations import Continuations
from data.reader import RowReader, check_tokenizer, read_manifest, read_prompts, read_token_counts
from fms_spec.base_model import BaseModel
from pipelines.build import build_speculator
from pipelines.config import load_config
from pipelines.environment import environment
from pipelines.generation import EmbeddedEngine
from pipelines.states import HiddenStates
from pipelines.train import Trainer, check_out_dir, claim_out_dir
from pipelines.validation import Validation
from scripts.cli import arguments, main

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
    manifest = read_manifest(config.data.dir)
    rows = RowReader(config.data.dir, batch_size=config.phase1.batch_size, seed=config.seed, rows=config.data.rows)
    prompts = read_prompts(config.data.dir, limit=config.data.prompts)
    base_model = BaseModel(config.base_model.name, dtype=config.base_model.dtype, backend=config.base_model.backend)
    check_tokenizer(manifest, base_model.path)
    engine = EmbeddedEngine(base_model, config.generation, prompts.tokens.shape[1], config.seed)
    continuations = Continuations(
        config.data.continuations or out_dir / "continuations", prompts, engine, shard_prompts=config.generation.batch_size,
        batch_size=config.phase2.batch_size, settings=engine.describe(), seed=config.seed,
    )  # fmt: skip
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
    trainer = Trainer(config, base_model, speculator, {"phase1": rows, "phase2": continuations}, states, out_dir, validation)
    step = trainer.resume()
    if step:
        print(f"going on from step {step}")
    if config.hidden_state_cache:
        size = sum(source.nbytes for source in states.values())
        print(f"hidden-state cache: up to {size / 1e9:.2f} GB in {out_dir / 'hidden_states'}")
        reader = RowReader(config.data.dir, batch_size=FILL_ROWS, seed=config.seed, rows=config.data.rows)
        with trainer.watch.measure("base_model"):
            states["phase1"].fill(reader, -(-len(reader) // FILL_ROWS))
    return trainer.train(), trainer


def cache_dir(config, out_dir, phase):
    """Where a phase's hidden states are kept, or None where they aren't."""
    return out_dir / "hidden_states" / phase if config.hidden_state_cache else None


if __name__ == "__main__":
    main(Arguments, run, overrides=True)
