"""A store of continuations, written by one process of any number."""

import signal
import sys
from pathlib import Path

from data.continuations.writer import write_shards
from data.reader import read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from pipelines.config import BaseModelSection, GenerationSection
from pipelines.generate.engines import make_engine
from pipelines.generate.producers import end_with_parent
from pipelines.generate.supply import open_store
from pipelines.machine.environment import environment


def write_continuations(parsed):
    """Write the shards that are missing and, when all are there, the manifest; parsed: the flags of scripts.generate_continuations."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception: claims are released
    if parsed.parent:
        end_with_parent(parsed.parent)
    settings = GenerationSection(
        engine=parsed.engine, batch_size=parsed.shard_prompts, max_new_tokens=parsed.max_tokens, memory_share=parsed.memory_share,
        temperature=parsed.temperature, top_k=parsed.top_k, top_p=parsed.top_p,
    )  # fmt: skip
    base_model = BaseModelSection(name=parsed.base_model, backend=parsed.backend, dtype=parsed.dtype)
    prompts = read_prompts(parsed.prompts, limit=parsed.limit)
    store = open_store(parsed.out_dir, parsed.prompts, prompts, base_model, settings, parsed.seed)
    indices = shard_numbers(parsed.shards, store.shard_count, parsed.shard_prompts)
    missing = [index for index in indices if not store.has(index)]
    if missing:
        engine = make_engine(settings, base_model, prompts.longest, parsed.seed)
        if settings.engine == "embedded":
            engine.use(BaseModel(base_model.name, dtype=base_model.dtype, backend=base_model.backend))
        try:
            tally = write_shards(store, engine, missing, parsed.ahead, Path(parsed.status) if parsed.status else None)
        finally:
            engine.close()
        rate = tally.values()["tokens_per_s"]
        print(f"{parsed.out_dir}: {tally.shards} shards of {len(indices)} written, {tally.tokens:,} tokens, {rate:,.0f} tokens/s")
    manifest = store.finish(environment())
    if manifest:
        print(f"{parsed.out_dir} is complete: {manifest['rows']:,} rows, {manifest['tokens']:,} tokens")


def shard_numbers(text, count, shard_prompts):
    """The shards that --shards names, of `count`; all of them for None."""
    if text is None:
        return range(count)
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= count):
        raise UserError(f"--shards={text}: give FROM:TO with FROM below TO and TO at most {count}, the shards of {shard_prompts} prompts")
    return range(int(first), int(end))
