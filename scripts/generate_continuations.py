"""Write phase 2's continuations: python -m scripts.generate_continuations --base_model=DIR --prompts=PREPARED --out_dir=DIR"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.continuations.writer import write_shards
from data.reader import read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from pipelines.cli import arguments, main
from pipelines.config import BaseModelSection, Count, CountOrZero, GenerationSection, Seed
from pipelines.generate.engines import make_engine
from pipelines.generate.producers import end_with_parent
from pipelines.generate.supply import open_store
from pipelines.machine.environment import environment


@arguments
class Arguments:
    """Have the base model continue a prepared folder's prompts, as Parquet shards that scripts.train reads (data.continuations).

    Stopped and started again, it goes on where it was; any number of processes share the work on one out_dir.

    Args:
        base_model: directory or hub name of the base model.
        prompts: a folder from scripts.prepare_data.
        out_dir: folder of the shards; manifest.json is written when all of them are there.
        engine: vllm, or embedded for the decoding of this project, which needs no other install.
        max_tokens: end each continuation at so many tokens; generation.max_new_tokens of the run's config.
        temperature: 0 is greedy.
        top_k: sample from the so many likeliest tokens; 0 is off.
        top_p: sample from the likeliest tokens that together have this probability; 1 is off.
        seed: decides which prompts a shard holds, and the sampling; seed of the run's config.
        shard_prompts: prompts of a shard; generation.batch_size of the run's config.
        limit: continue only the first so many prompts; data.prompts of the run's config.
        shards: FROM:TO, write only the shards from FROM up to TO, without TO, e.g. to spread them over machines.
        memory_share: of a GPU's memory, for vLLM.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers, for the embedded engine.
        ahead: begin no shard beyond so many after those a training run has begun; runs set it for their producers.
        parent: end when the process of this id is gone; runs set it for their producers.
        status: file that tells how far the work is, as JSON; runs set it for their producers.
    """

    base_model: str
    prompts: str
    out_dir: str
    engine: Literal["vllm", "embedded"] = "vllm"
    max_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: CountOrZero = 10
    top_p: float = 1.0
    seed: Seed = 0
    shard_prompts: Count = 96
    limit: Count | None = None
    shards: str | None = None
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"
    ahead: Count | None = None
    parent: Count | None = None
    status: str | None = None


def run(parsed):
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
        engine = make_engine(settings, base_model, prompts.tokens.shape[1], parsed.seed)
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


if __name__ == "__main__":
    main(Arguments, run)
