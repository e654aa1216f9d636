"""A store of continuations, written by one process of any number."""

import signal
from functools import partial
from pathlib import Path

from data.continuations.writer import write_shards
from data.reader import read_prompts
from fms_spec.errors import UserError
from pipelines.config import BaseModelSection, GenerationSection
from pipelines.generate.cluster_engine import ClusterEngine
from pipelines.generate.engines import start_engine
from pipelines.generate.producers import end_with_parent
from pipelines.generate.supply import open_store
from pipelines.machine.environment import environment
from pipelines.parallel.stopping import Stopped


def write_continuations(parsed):
    """Write the shards that are missing and, when all are there, the manifest; parsed: the flags of scripts.generate_continuations."""
    if parsed.parent:
        end_with_parent(parsed.parent)
    settings, base_model = sections_of(parsed)
    prompts = read_prompts(parsed.prompts, limit=parsed.limit)
    store = open_store(parsed.out_dir, parsed.prompts, prompts, base_model, settings, parsed.seed)
    indices = shard_numbers(parsed.shards, store.shard_count, parsed.shard_prompts)
    with Writer(settings, base_model, prompts.longest, parsed.ray) as writer:
        writer.write(store, indices, parsed.ahead, Path(parsed.status) if parsed.status else None)
    manifest = store.finish(environment())
    if manifest:
        print(f"{parsed.out_dir} is complete: {manifest['rows']:,} rows, {manifest['tokens']:,} tokens")


def sections_of(parsed):
    """(`GenerationSection`, `BaseModelSection`) of a command's flags."""
    settings = GenerationSection(
        engine=parsed.engine, batch_size=parsed.shard_prompts, max_new_tokens=parsed.max_tokens, memory_share=parsed.memory_share,
        temperature=parsed.temperature, top_k=parsed.top_k, top_p=parsed.top_p,
    )  # fmt: skip
    return settings, BaseModelSection(name=parsed.base_model, backend=parsed.backend, dtype=parsed.dtype)


class Writer:
    """An engine that is started when the first shard is missing, for stores one after the other; SIGTERM ends it and all claims.

    settings: `GenerationSection`. base_model: `BaseModelSection`. prompt_length: tokens of the longest prompt. ray: the address
    of a cluster that the engine runs on, see `data.cluster.Cluster`; None for this process.
    """

    def __init__(self, settings, base_model, prompt_length, ray=None):
        self.settings, self.base_model, self.prompt_length, self.ray = settings, base_model, prompt_length, ray
        self.engine, self.stopped = None, False

    def __enter__(self):
        signal.signal(signal.SIGTERM, self.stop)
        return self

    def stop(self, *_):
        self.stopped = True
        raise Stopped  # as an exception: claims are released

    def __exit__(self, *_):
        if self.engine:
            self.engine.close()
        if self.stopped:
            raise Stopped  # what is raised while Ray waits becomes its own SystemExit, with another code

    def write(self, store, indices, ahead=None, status=None):
        """`write_shards` of what is missing of `indices`."""
        missing = [index for index in indices if not store.has(index)]
        if not missing:
            return
        if self.engine is None:
            start = partial(ClusterEngine, self.ray) if self.ray else start_engine
            self.engine = start(self.settings, self.base_model, self.prompt_length, store.seed)
        self.engine.seed = store.seed
        tally = write_shards(store, self.engine, missing, ahead, status)
        rate = tally.values()["tokens_per_s"]
        print(f"{store.out_dir}: {tally.shards} shards of {len(indices)} written, {tally.tokens:,} tokens, {rate:,.0f} tokens/s")


def shard_numbers(text, count, shard_prompts):
    """The shards that --shards names, of `count`; all of them for None."""
    if text is None:
        return range(count)
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= count):
        raise UserError(f"--shards={text}: give FROM:TO with FROM below TO and TO at most {count}, the shards of {shard_prompts} prompts")
    return range(int(first), int(end))
