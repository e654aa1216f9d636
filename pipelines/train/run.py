"""A training run from its config to its last checkpoint, in the order in which things happen: the project's table of contents."""

from contextlib import closing, nullcontext
from functools import partial

from data.continuations.batches import Continuations
from data.distributed import DistributedBatches
from data.manifest import data_fingerprint
from data.parquet import TOKEN_BYTES
from data.reader import RowReader, read_prompts
from fms_spec.errors import UserError
from fms_spec.files import owned
from fms_spec.model_config import resolve_base_model
from fms_spec.weights import fingerprint
from pipelines.config import FILL_ROWS
from pipelines.generate.supply import open_store, open_supply
from pipelines.machine.environment import environment
from pipelines.parallel.mesh import load_base_model, own_prompts
from pipelines.parallel.processes import Processes
from pipelines.plan.feasible import check_documents, check_sizes
from pipelines.plan.plan import Sizes
from pipelines.show.prepared import summary_of
from pipelines.train.build import build_speculator, given_heads
from pipelines.train.checkpoint import checkpoints
from pipelines.train.compiled import check_compiler
from pipelines.train.device_metrics import DeviceMetrics
from pipelines.train.disk_space import check_space
from pipelines.train.loop import Trainer
from pipelines.train.profiling import profiled_steps, profiling
from pipelines.train.run_record import check_out_dir, claim_out_dir
from pipelines.train.state_cache import HiddenStates
from pipelines.train.validation import Validation


def train(config, out_dir, resume=False, processes=Processes(), profile=None, base_model=None, before=lambda trainer: None):
    """Train a speculator; returns the `Trainer`, which has taken its last step and written its last checkpoint.

    Args:
        config: `RunConfig`. out_dir: Path, of this run alone. resume: go on with the run that is there. processes: the `Processes` that
        train together, all of which call this; by default this one alone. profile: "FIRST:END", steps to trace. base_model: the config's
        `BaseModel`, where it is loaded already. before: called with the trainer before its first step.

    Raises:
        UserError: anything wrong with the config, the data, the models or `out_dir`, before anything is written where that is possible.
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

        rows, prompts, held_out = read_data(config)
        sizes = sizes_of(rows, prompts, held_out)
        if processes.main:
            print("\n".join(summary_of(config.data.dir, rows.train_on)))
        check_sizes(config, sizes, processes.count)
        saved = checkpoints(out_dir / "checkpoints")
        begun = (saved, given_heads(config, saved)) if processes.main else None
        saved, given = processes.gather(begun)[0]  # on a network disk each may see another moment
        folder = config.data.continuations or out_dir / "continuations"
        store = open_store(folder, config.data.dir, prompts, config.base_model, config.generation, config.seed)
        with closing(open_supply(config, store, out_dir, processes)) as supply:  # before anything large is loaded: it may not be to be had
            base_model = base_model or load_base_model(config, processes)
            speculator = build_speculator(config, base_model, processes, given, fresh=not saved)
            claim(out_dir, config, processes, inputs, base_model, speculator, sizes)
            trainer = make_trainer(config, out_dir, processes, base_model, speculator, supply, rows, prompts, held_out)
            go_through(trainer, before, profiled)
    return trainer


def go_through(trainer, before, profiled):
    """All steps that are left, from the newest checkpoint on; see `train`."""
    step, continuations = trainer.resume(), trainer.batches["phase2"].batches
    if step and trainer.processes.main:
        print(f"going on from step {step}")
    trainer.supply.begin(trainer.base_model, continuations.shards_read)
    if trainer.config.hidden_state_cache:
        fill_cache(trainer)
    before(trainer)
    missed = profiled and step >= profiled[1]
    if missed and trainer.processes.main:
        print(f"no step is traced: those of --profile={profiled[0]}:{profiled[1]} were taken before")
    if profiled and not missed:
        with profiling(trainer.out_dir, *profiled, step, trainer.processes.rank) as profiler:
            trainer.train(profiler)
    else:
        trainer.train()


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


def read_data(config):
    """(phase 1's `RowReader`, phase 2's `Prompts`, list of validation's prompts, int64 [n] each) of a config."""
    data = config.data
    rows = RowReader(data.dir, batch_size=config.phase1.batch_size, seed=config.seed, rows=data.rows, train_on=data.train_on)
    check_documents(config, rows)
    held_out = read_prompts(data.dir, "held_out").tokens[-config.validation.prompts :] if config.validation.prompts else []
    return rows, read_prompts(data.dir, limit=data.prompts), held_out


def sizes_of(rows, prompts, held_out):
    return Sizes(rows.seq_length, prompts.longest, len(rows), len(prompts), max(map(len, held_out), default=None))


def claim(out_dir, config, processes, inputs, base_model, speculator, sizes):
    """Make `out_dir` this run's, now that all it needs is there, the disk's room included."""
    if processes.main:
        texts = sizes.prompts * (sizes.prompt_length + config.generation.max_new_tokens)
        read = {"phase1": sizes.rows * sizes.seq_length, "phase2": texts}
        state = base_model.state_width * base_model.dtype.itemsize
        kept = state * sum(read[phase] for phase in config.schedule.build().phase_steps()) if config.hidden_state_cache else 0
        check_space(out_dir, speculator, config.checkpoint.keep, kept, texts * TOKEN_BYTES)
        claim_out_dir(out_dir, config, processes, inputs, environment())
    processes.wait_for_all()


def make_trainer(config, out_dir, processes, base_model, speculator, supply, rows, prompts, held_out):
    """The `Trainer` of these parts, at its first step."""
    validation = None
    if held_out:
        own = own_prompts(held_out, base_model, processes)
        validation = partial(Validation, base_model, own, config.validation.max_new_tokens, config.speculator.n_predict)
    asked = config.phase1.loss.only_accepted or config.phase2.loss.only_accepted
    best_tokens = partial(speculator.best_base_tokens, base_model) if asked else None
    length = prompts.longest + config.generation.max_new_tokens
    tables = {"phase1": (rows.table_rows, rows.seq_length, len(rows)), "phase2": (len(prompts), length, len(prompts))}
    cached = config.schedule.build().phase_steps() if config.hidden_state_cache else ()
    kept = {phase: out_dir / "hidden_states" / phase if phase in cached else None for phase in tables}
    states = {phase: HiddenStates(base_model, best_tokens, kept[phase], *table) for phase, table in tables.items()}
    sources = {"phase1": rows, "phase2": Continuations(supply.store, config.phase2.batch_size)}
    batches = {phase: DistributedBatches(source, processes.rank, processes.count) for phase, source in sources.items()}
    device_metrics = DeviceMetrics(config, sizes_of(rows, prompts, held_out), processes, base_model.device)
    return Trainer(config, base_model, speculator, batches, supply, states, out_dir, device_metrics, validation, processes)


def fill_cache(trainer):
    """Keep phase 1's hidden states on disk before the first step, where it has any."""
    config, processes = trainer.config, trainer.processes
    size = sum(source.nbytes for source in trainer.states.values())
    if processes.main:
        print(f"hidden-state cache: up to {size / 1e9:.2f} GB in {trainer.out_dir / 'hidden_states'}")
    if "phase1" not in trainer.phase_steps:
        return
    reader = RowReader(config.data.dir, batch_size=FILL_ROWS, seed=config.seed, rows=config.data.rows)
    rounds = -(-len(reader) // (FILL_ROWS * processes.count))
    with trainer.watch.measure("base_model"):
        trainer.states["phase1"].fill(DistributedBatches(reader, processes.rank, processes.count), rounds)
    processes.wait_for_all()
