"""The comparison of recipes as it runs: each variant's training, with everything but its head steps done once for all."""

import hashlib
import json
import shutil
import time

from data.continuations.batches import Continuations
from data.progress import progress
from data.reader import RowReader, read_manifest, read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError, first_difference
from fms_spec.files import OWNER, owned, read_json, write_json, write_whole
from fms_spec.speculators.registry import FAMILIES
from pipelines.config import FILL_ROWS, load_config
from pipelines.machine.environment import environment
from pipelines.measure.recipe import SharedStates, averaged, digest, judge, read_results, read_variants, shared_values
from pipelines.plan.feasible import check_sizes
from pipelines.train.run import read_data, sizes_of, train
from pipelines.train.state_cache import HiddenStates
from pipelines.train.validation import Validation

RESULTS, RECORD = "results.jsonl", "shared.json"


def sweep(config_path, variants_path, out_dir, overrides):
    """Run what is missing of the variants one after the other; returns the lines of all of them, in the order of the list.

    Raises:
        UserError: anything wrong with the list, a variant's config or data, or `out_dir`, before any work.
    """
    variants = read_variants(variants_path, config_path, overrides)
    with owned(out_dir):
        return run_missing(variants, load_config(config_path, overrides), out_dir, overrides)


def run_missing(variants, base, out_dir, overrides):
    """As `sweep`, in a folder that is this process's own."""
    results = out_dir / RESULTS
    lines = read_results(results, variants)
    prompts = read_prompts(base.data.dir, "held_out").tokens
    measured_on = environment()  # of the code that is loaded, whatever is committed while it runs
    missing = {name: parts for name, parts in variants.items() if name not in lines}
    for _, config in missing.values():  # data that isn't there is told before the first variant
        check_sizes(config, sizes_of(*read_data(config)))
    if missing:
        base_model = BaseModel(base.base_model.name, dtype=base.base_model.dtype, backend=base.base_model.backend)
        claim(out_dir, base)
        lookahead = max(config.speculator.n_predict for _, config in variants.values())
        validations = {}  # by the inner layers whose states they hold
    for name, (variant, config) in missing.items():
        layers = FAMILIES[config.speculator.family].base_layers_of(config.speculator, base_model)
        if layers not in validations:
            base_model.give_layers(layers)
            validations[layers] = Validation(base_model, prompts, base.validation.max_new_tokens, lookahead)
        print(f"== {name}: {variant.why}", flush=True)
        line = {"variant": name, "why": variant.why, "overrides": [*overrides, *variant.set]}
        line |= run_variant(config, base_model, validations[layers], out_dir)
        lines[name] = {"benchmark": "recipe"} | line | {"environment": measured_on}
        before = results.read_bytes() if results.is_file() else b""
        write_whole(results, before + json.dumps(lines[name]).encode() + b"\n")
    return [lines[name] for name in variants]


def claim(out_dir, base):
    """Make `out_dir` these variants': hidden states of another model or other data would be taken for these.

    Raises:
        UserError: it holds such states, or other files.
    """
    record, values = out_dir / RECORD, shared_values(base) | {"prepared": read_manifest(base.data.dir)["inputs"]}
    if not any(path.name not in (RECORD, OWNER) for path in out_dir.iterdir()):  # nothing yet that an older record would be of
        write_json(record, values)
    if not record.is_file():
        raise UserError(f"{out_dir} holds other files; give an empty or new --out_dir")
    difference = first_difference(read_json(record, "give another --out_dir"), values)
    if difference:
        key, before, now = difference
        raise UserError(f"{out_dir} holds what was made with another {key} ({before!r}, now {now!r}); give another --out_dir")


def run_variant(config, base_model, validation, out_dir):
    """Train and judge one; its figures as JSON values. A run that an interrupted sweep left half-way begins again."""
    run_dir, name, at_start = out_dir / "run", texts_name(config), {}
    shutil.rmtree(run_dir, ignore_errors=True)

    def before(trainer):
        at_start["tokens"] = share_states(trainer, config, out_dir / "hidden_states", name)
        at_start["average"] = averaged(trainer)
        at_start["start"] = time.process_time()

    trainer = train(only_head_steps(config, out_dir / "continuations" / name), run_dir, base_model=base_model, before=before)
    seconds = time.process_time() - at_start["start"]
    shutil.rmtree(run_dir)
    figures = {
        "steps": trainer.step, "positions": trainer.tokens, "head_cpu_seconds": seconds,
        "parameters": sum(weight.numel() for weight in trainer.speculator.parameters()),
    }  # fmt: skip
    judged = judge(trainer.speculator, validation) | {"averaged": judge(at_start["average"].module, validation)}
    return {"config": digest(config), "base_model_tokens": at_start["tokens"]} | figures | judged


def share_states(trainer, config, directory, name):
    """Have the trainer read its hidden states from the variants' cache, and fill that with what the run will read.

    Variants with the same inner layers share one.

    Returns:
        {what: tokens that pass through the base model}, whether this variant or one before it paid for them: rows; generation, prompts and
        what is written after them; continuations, the same texts once more for their states.
    """
    rows, prompts, _ = read_data(config)
    length = prompts.longest + config.generation.max_new_tokens
    readers = {
        "phase1": (RowReader(config.data.dir, batch_size=FILL_ROWS, seed=config.seed, rows=config.data.rows), len(rows), "rows"),
        "phase2": (Continuations(trainer.supply.store, FILL_ROWS), len(prompts), name),
    }
    sizes = {"phase1": (rows.table_rows, rows.seq_length), "phase2": (len(prompts), length)}
    tokens = dict.fromkeys(readers, 0)
    for phase, steps in trainer.phase_steps.items():
        reader, available, folder = readers[phase]
        settings = getattr(config, phase)
        kept = directory / "-".join([folder, *map(str, trainer.base_model.inner_layers)])
        cache = HiddenStates(trainer.base_model, None, kept, *sizes[phase], available)
        count = -(-min(available, steps * settings.accumulate * settings.batch_size) // FILL_ROWS)
        if phase == "phase2":
            for index, begun in reader.needed(count):
                trainer.supply.have(index, begun)
        tokens[phase] = fill(cache, reader, count)
        trainer.states[phase] = SharedStates(cache, trainer.states[phase].best_tokens)
    return {"rows": tokens["phase1"], "generation": tokens["phase2"], "continuations": tokens["phase2"]}


def fill(cache, batches, count):
    """Pass `count` batches through the cache; returns how many tokens their different rows hold."""
    lengths = {}
    for _ in progress(range(count), desc="hidden states", unit="batch"):
        batch = next(batches)
        cache(batch)
        lengths |= zip(batch.row_ids.tolist(), (batch.segment_ids >= 0).sum(1).tolist())
    return sum(lengths.values())


def texts_name(config):
    """A folder's name for phase 2's texts: variants with the same prompts, sampling and seed share them."""
    values = json.dumps([config.data.prompts, config.seed, config.generation.model_dump()], sort_keys=True)
    return f"{config.data.prompts or 'all'}-prompts-{hashlib.sha256(values.encode()).hexdigest()[:8]}"


def only_head_steps(config, continuations):
    """The config of a run that does nothing beside them, no cache, validation or checkpoint of its own; and reads these continuations."""
    changes = {
        "data": config.data.model_copy(update={"continuations": str(continuations)}),
        "hidden_state_cache": False,
        "compile": False,  # the averaged copy of the heads would go on with the first ones' compiled step
        "validation": config.validation.model_copy(update={"prompts": 0}),
        "checkpoint": config.checkpoint.model_copy(update={"every": config.schedule.steps}),
    }
    return config.model_copy(update=changes)
