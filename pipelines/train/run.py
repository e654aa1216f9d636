"""A training run, from a config to its last checkpoint."""

import os
import shlex
import sys
from contextlib import closing, nullcontext
from functools import cache, partial
from pathlib import Path

from data.continuations.batches import Continuations
from data.distributed import Share
from data.manifest import data_fingerprint
from data.reader import RowReader, read_prompts, read_token_counts
from data.continuations.supply import Ahead, Alongside, Awaited, Inline, Led
from data.parquet import TOKEN_BYTES
from fms_spec.base_model import resolve_base_model
from fms_spec.errors import UserError
from fms_spec.files import owned
from fms_spec.weights import fingerprint
from pipelines.train.build import SAMPLE_ROWS, build_speculator
from pipelines.train.compiled import check_compiler, compile_base_model, compile_heads
from pipelines.train.device_metrics import DeviceMetrics
from pipelines.machine.environment import environment
from pipelines.plan.feasible import check_sizes
from pipelines.generate.engines import make_engine
from pipelines.generate.group_engine import GroupEngine
from pipelines.parallel.mesh import load_base_model, own_prompts, share_speculator
from pipelines.plan.plan import Sizes
from pipelines.parallel.processes import Processes
from pipelines.generate.producers import Producers, own_devices
from pipelines.train.profiling import profiled_steps, profiling
from pipelines.train.run_record import check_out_dir, claim_out_dir
from pipelines.parallel.shared_base_model import SharedBaseModel
from pipelines.train.disk_space import check_space
from pipelines.train.state_cache import FILL_ROWS, HiddenStates
from pipelines.train.loop import Trainer
from pipelines.train.validation import Validation
from pipelines.generate.write import command_of, open_store

ROOT = Path(__file__).parents[2]


def train(config, out_dir, resume=False, processes=Processes(), profile=None):
    """Put a run together and train it to its end; returns (its last checkpoint's directory, the trainer).

    processes: the `Processes` that train together, all of which call this; by default this one alone. profile: "FIRST:END", steps.
    """
    profiled = profiled_steps(profile, config.schedule.steps) if profile else None
    check_processes(config, processes)
    if config.compile:
        check_compiler()
    with owned(out_dir) if processes.main else nullcontext():
        inputs = inputs_of(config)
        if processes.main:
            check_out_dir(out_dir, config, resume, processes.count, inputs)
        processes.wait_for_all()  # before anyone writes there
        return train_in(out_dir, config, inputs, processes, profiled)


def check_processes(config, processes):
    """Refuse what can't be done by several processes; processes: `Processes` or `plan.Ranks`."""
    if config.hidden_state_cache and processes.count > processes.local_count:
        raise UserError("hidden_state_cache: true is for one node, whose processes map the same files; turn it off on several")
    if processes.count > 1 and config.generation.engine == "vllm" and config.generation.mode == "inline":
        raise UserError("generation.mode=inline: vLLM can't run inside one of several trainers; set alongside or ahead, or engine=embedded")


def inputs_of(config):
    """What tells the base model's weights and the prepared data from others of the same name."""
    return {
        "base_model_fingerprint": fingerprint(resolve_base_model(config.base_model.name)),
        "data_fingerprint": data_fingerprint(config.data.dir),
    }


def train_in(out_dir, config, inputs, processes, profiled):
    """`train` in a folder that is this run's alone; inputs: as `inputs_of`."""
    rows = RowReader(config.data.dir, batch_size=config.phase1.batch_size, seed=config.seed, rows=config.data.rows)
    prompts = read_prompts(config.data.dir, limit=config.data.prompts)
    check_sizes(config, len(rows), rows.seq_length, len(prompts), prompts.tokens.shape[1], processes.count)
    folder = config.data.continuations or out_dir / "continuations"
    store = open_store(folder, config.data.dir, prompts, config.base_model, config.generation, config.seed)
    load = cache(partial(load_base_model, config, processes))
    with closing(open_supply(config, store, out_dir, load, processes)) as supply:
        continuations = Continuations(store, supply, config.phase2.batch_size)
        trainer = put_together(config, out_dir, load(), rows, prompts, continuations, inputs, processes)
        step = trainer.resume()
        if step and processes.main:
            print(f"going on from step {step}")
        supply.begin(continuations.shards_read)
        if config.hidden_state_cache:
            fill_cache(config, trainer, processes)
        if profiled and step < profiled[1]:
            with profiling(out_dir, *profiled, step, processes.rank) as profiler:
                return trainer.train(profiler), trainer
        return trainer.train(), trainer


def open_supply(config, store, out_dir, load, processes=Processes()):
    """How the run comes by its continuations. load: gives the `BaseModel`, should the trainers themselves write them.

    Raises:
        UserError: they were to be written ahead, and some are missing; or vLLM was to write them in one of several trainers.
    """
    settings, words = config.generation, command_of(config, store.out_dir)
    rows = config.schedule.build().phase_steps().get("phase2", 0) * config.phase2.accumulate * config.phase2.batch_size * processes.count
    if settings.mode == "ahead":
        return Ahead(store, rows, shlex.join(["python", *words]))
    if settings.mode == "alongside":
        return alongside(config, store, rows, words, out_dir, processes.local_count) if processes.main else Awaited(store)
    prompt_length = store.prompts.tokens.shape[1]
    if isinstance(load(), SharedBaseModel):
        engine = GroupEngine(load(), settings, config.seed)
        return Led(Inline(store, rows, lambda: engine, load().copies), engine)
    make = partial(make_engine, settings, config.base_model, prompt_length, config.seed, load, shared=True)
    return Inline(store, rows, make, processes.count)


def alongside(config, store, rows, words, out_dir, trainers):
    """Producers of the run's continuations, one for each of `producer_devices`, beside so many trainers on this machine."""
    settings = config.generation
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    devices = own_devices(settings.producer_devices, trainers)
    environments = [{"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) for device in devices]
    command = [sys.executable, *words, f"--ahead={settings.shards_ahead}"]
    return Alongside(store, rows, Producers(command, environments, out_dir / "producers"))


def put_together(config, out_dir, base_model, rows, prompts, continuations, inputs, processes):
    """The `Trainer` of a run, whose out_dir is claimed when all it needs is there."""
    sample = next(RowReader(config.data.dir, batch_size=SAMPLE_ROWS, seed=config.seed))
    speculator = build_speculator(config, base_model, read_token_counts(config.data.dir), sample)
    share_speculator(speculator, config, processes)
    if config.compile:
        compile_heads(speculator)
    if config.compile and not isinstance(base_model, SharedBaseModel):
        compile_base_model(base_model)
    validation = None
    if config.validation.prompts:
        held_out = read_prompts(config.data.dir, "held_out").tokens[-config.validation.prompts :]
        own = own_prompts(held_out, base_model, processes)
        validation = partial(Validation, base_model, own, config.validation.max_new_tokens, config.speculator.n_predict)
    length = prompts.tokens.shape[1] + config.generation.max_new_tokens
    if processes.main:
        texts, state = len(prompts) * length, base_model.width * base_model.dtype.itemsize
        kept = state * (len(rows) * rows.seq_length + texts) if config.hidden_state_cache else 0
        check_space(out_dir, speculator, config.checkpoint.keep, kept, texts * TOKEN_BYTES)
        claim_out_dir(out_dir, config, processes.count, inputs, environment())
    processes.wait_for_all()
    asked = config.phase1.loss.only_accepted or config.phase2.loss.only_accepted
    best_tokens = partial(speculator.best_base_tokens, base_model) if asked else None
    states = {
        "phase1": HiddenStates(base_model, best_tokens, cache_dir(config, out_dir, "phase1"), rows.table_rows, rows.seq_length, len(rows)),
        "phase2": HiddenStates(base_model, best_tokens, cache_dir(config, out_dir, "phase2"), len(prompts), length, len(prompts)),
    }
    batches = {name: Share(source, processes.rank, processes.count) for name, source in (("phase1", rows), ("phase2", continuations))}
    sizes = Sizes(rows.seq_length, prompts.tokens.shape[1], len(rows), len(prompts))
    device_metrics = DeviceMetrics(config, sizes, processes, base_model.device)
    return Trainer(config, base_model, speculator, batches, continuations.supply, states, out_dir, device_metrics, validation, processes)


def fill_cache(config, trainer, processes):
    """Keep phase 1's hidden states on disk before the first step."""
    size = sum(source.nbytes for source in trainer.states.values())
    if processes.main:
        print(f"hidden-state cache: up to {size / 1e9:.2f} GB in {trainer.out_dir / 'hidden_states'}")
    reader = RowReader(config.data.dir, batch_size=FILL_ROWS, seed=config.seed, rows=config.data.rows)
    rounds = -(-len(reader) // (FILL_ROWS * processes.count))
    with trainer.watch.measure("base_model"):
        trainer.states["phase1"].fill(Share(reader, processes.rank, processes.count), rounds)
    processes.wait_for_all()


def cache_dir(config, out_dir, phase):
    """Where a phase's hidden states are kept, or None where they aren't."""
    return out_dir / "hidden_states" / phase if config.hidden_state_cache else None
