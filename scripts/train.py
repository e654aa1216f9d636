"""Train a speculator: python -m scripts.train --config=CONFIG.yaml --out_dir=runs/mine [--resume] [key.path=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 -m scripts.train ...
"""

import os
import shlex
import sys
from contextlib import closing, nullcontext
from functools import cache, partial
from pathlib import Path

from data.continuations import Continuations
from data.dealing import Share
from data.manifest import data_fingerprint
from data.reader import RowReader, read_manifest, read_prompts, read_token_counts
from data.supply import Ahead, Alongside, Awaited, Inline, Led
from data.tables import TOKEN_BYTES
from fms_spec.base_model import resolve_base_model
from fms_spec.errors import UserError
from fms_spec.files import owned
from fms_spec.weights import fingerprint
from pipelines.build import SAMPLE_ROWS, build_speculator
from pipelines.compiled import check_compiler, compile_base_model, compile_heads
from pipelines.config import load_config
from pipelines.device_metrics import DeviceMetrics
from pipelines.devices import find_device
from pipelines.environment import environment
from pipelines.feasible import check_sizes
from pipelines.generation import make_engine
from pipelines.group_engine import GroupEngine
from pipelines.parallel import load_base_model, own_prompts, share_speculator
from pipelines.plan import Plan, Ranks, Sizes, verdict
from pipelines.processes import Processes, joined
from pipelines.producers import Producers, own_devices
from pipelines.profiling import profiled_steps, profiling
from pipelines.run_record import check_out_dir, claim_out_dir
from pipelines.shared_base_model import SharedBaseModel
from pipelines.space import check_space
from pipelines.states import FILL_ROWS, HiddenStates
from pipelines.tables import print_plan
from pipelines.train import Trainer
from pipelines.validation import Validation
from scripts.cli import arguments, main
from scripts.generate_continuations import command_of, open_store

ROOT = Path(__file__).parents[1]


@arguments
class Arguments:
    """Train attached speculator heads on a frozen base model, in two phases.

    Trailing key.path=value words override the config, e.g. schedule.steps=700.

    Args:
        config: YAML file; pipelines/configs holds examples with a reason for each value.
        out_dir: where checkpoints, metrics and continuations go; one run each.
        resume: go on with the run in out_dir from its newest checkpoint.
        profile: FIRST:END, write a trace of these steps, counted from 0 and without END, to out_dir/profile.
        plan: only say what memory, work and time the run would need and whether it fits, from the base model's config.json; writes nothing.
        processes: plan for so many; those of torchrun, or one, by default.
        processes_per_node: plan for so many on each machine; up to 8 by default.
        device: plan for h100, h200, b200, a100-80, a100-40, l40s or rtx4090; this machine, measured, by default.
    """

    config: str
    out_dir: str
    resume: bool = False
    profile: str | None = None
    plan: bool = False
    processes: int | None = None
    processes_per_node: int | None = None
    device: str | None = None


def run(parsed, overrides):
    if parsed.plan:
        return plan(load_config(parsed.config, overrides), parsed)
    for flag in ("processes", "processes_per_node", "device"):
        if getattr(parsed, flag) is not None:
            raise UserError(f"--{flag} is for --plan only; add --plan, or leave it out")
    with joined() as processes:
        train(load_config(parsed.config, overrides), Path(parsed.out_dir), parsed.resume, processes, parsed.profile)


def plan(config, parsed):
    """Print the plan of a run.

    Raises:
        UserError: a device that isn't known, numbers of processes that can't be, or a config that fits no base model.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1)) if parsed.processes is None else parsed.processes
    per_node = min(8, processes) if parsed.processes_per_node is None else parsed.processes_per_node
    if not 1 <= per_node <= processes:
        raise UserError(
            f"--processes={processes} --processes_per_node={per_node}: both must be at least 1, and no more on a node than in all"
        )
    check_processes(config, Ranks(processes, per_node))
    sizes, note = (
        Sizes(rows=config.data.rows, prompts=config.data.prompts),
        "no prepared data yet: rows of 4,096 and prompts of 64 tokens assumed",
    )
    if Path(config.data.dir).is_dir():
        manifest, note = read_manifest(config.data.dir), f"rows and prompts as in {config.data.dir}"
        inputs = manifest["inputs"]
        rows = len(RowReader(config.data.dir, batch_size=config.phase1.batch_size, seed=config.seed, rows=config.data.rows))
        prompts = len(read_prompts(config.data.dir, limit=config.data.prompts))
        sizes = Sizes(inputs["seq_length"], inputs["prompt_length"], rows, prompts)
        check_sizes(config, rows, sizes.seq_length, prompts, sizes.prompt_length, processes, memory=float("inf"))
    device = find_device(parsed.device or "here", config.base_model.dtype)
    found = Plan(config, sizes, Ranks(processes, per_node), device)
    print_plan(found, note, verdict(found))


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


if __name__ == "__main__":
    main(Arguments, run, overrides=True)
