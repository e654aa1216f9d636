"""Where a run's continuations are kept, and how it comes by them."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

from data.continuations.store import ContinuationStore
from data.continuations.supply import Ahead, Alongside, Awaited, GroupInline, Inline
from data.reader import check_tokenizer, check_vocabulary, read_manifest
from fms_spec.errors import UserError
from fms_spec.model_config import read_config, read_eos_token_ids, resolve_base_model
from fms_spec.weights import fingerprint
from pipelines.generate.engines import check_context, describe_generation, make_engine
from pipelines.generate.group_engine import GroupEngine
from pipelines.generate.producers import Producers, own_devices
from pipelines.parallel.mesh import group_size

ROOT = Path(__file__).parents[2]


def open_store(out_dir, data_dir, prompts, base_model, settings, seed):
    """The `ContinuationStore` in `out_dir` for the prompts of `data_dir`, refused where they don't fit; loads no weights.

    base_model: `BaseModelSection`. settings: `GenerationSection`.

    Raises:
        UserError: no such base model, another tokenizer, tokens that the model lacks, texts over the context, a setting out of range, or
            shards of other settings, or the model doesn't stop at what ends an answer.
    """
    path = resolve_base_model(base_model.name)
    tokenizer = check_tokenizer(read_manifest(data_dir), path)
    check_stops(map(int, read_manifest(data_dir).get("chat_template", {}).get("answers_end_with", {})), path, tokenizer)
    check_vocabulary(data_dir, read_config(path).vocab_size)
    check_context(path, prompts.longest, settings.max_new_tokens)
    described = describe_generation(settings, fingerprint(path), base_model.dtype)
    return ContinuationStore(out_dir, prompts, shard_prompts=settings.batch_size, settings=described, seed=seed)


def check_stops(ends, path, tokenizer):
    """Raise UserError where answers of conversations end with no token at which the base model stops: it would go on to the other side.

    ends: ids of the tokens that answers end with. Returns those at which the base model stops, a set.
    """
    ends, stops = {*ends}, read_eos_token_ids(path, read_config(path))
    if ends and not ends & stops:
        names, known = (", ".join(tokenizer.backend.id_to_token(token) or str(token) for token in sorted(some)) for some in (ends, stops))
        mend = "add it to eos_token_id in its generation_config.json, or take its own chat template"
        raise UserError(f"base model {path}: stops at {known or 'no token'}, and answers end with {names}; {mend}")
    return stops


def open_supply(config, store, out_dir, processes):
    """How the run comes by the continuations in `store`; loads nothing.

    Raises:
        UserError: they were to be written ahead, and some are missing; or there is no engine or device to write them with.
    """
    settings, words = config.generation, command_of(config, store.out_dir)
    rows = config.schedule.build().phase_steps().get("phase2", 0) * config.phase2.accumulate * config.phase2.batch_size * processes.count
    if settings.mode == "ahead":
        return Ahead(store, rows, shlex.join(["python", *words]))
    if settings.mode == "alongside":
        return alongside(config, store, rows, words, out_dir, processes.local_count) if processes.main else Awaited(store)
    size = group_size(config.parallel.base_model, config.parallel, processes)
    if size > 1:
        engine = GroupEngine(settings, config.seed)
        return GroupInline(Inline(store, rows, lambda: engine, processes.count // size), engine)
    make = partial(make_engine, settings, config.base_model, store.prompts.longest, config.seed, shared=True)
    return Inline(store, rows, make, processes.count)


def alongside(config, store, rows, words, out_dir, trainers):
    """Producers of the run's continuations, one for each of `producer_devices`, beside so many trainers on this machine."""
    settings = config.generation
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    devices = own_devices(settings.producer_devices, trainers)
    environments = [{"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) for device in devices]
    command = [sys.executable, *words, f"--ahead={settings.shards_ahead}"]
    return Alongside(store, rows, Producers(command, environments, out_dir / "producers"))


def command_of(config, out_dir):
    """The words behind `python` that write to `out_dir` what a run with `config` (`RunConfig`) reads."""
    settings = config.generation
    flags = {
        "base_model": config.base_model.name, "prompts": config.data.dir, "out_dir": out_dir, "engine": settings.engine,
        "max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        "seed": config.seed, "shard_prompts": settings.batch_size, "limit": config.data.prompts, "memory_share": settings.memory_share,
        "dtype": config.base_model.dtype, "backend": config.base_model.backend,
    }  # fmt: skip
    return ["-m", "scripts.generate_continuations", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
